/* SPDX-License-Identifier: MIT
 *
 * The monitor's ring and what travels in it.
 * Origin: xen/include/public/vm_event.h, RELEASE-4.14.0 .. RELEASE-4.22.0, and the ring of
 * xen/include/public/io/ring.h (MIT).
 *
 * Two interface versions: 6 is 4.14, 7 is 4.15 and everything after. They differ in the x86
 * registers alone (npt_base and vmtrace_pos are new in 7), so only what contains those comes
 * twice, its name carrying the version. A request and a response have one layout. The Arm
 * registers are left out: the x86 ones are longer and decide the union's size.
 */

enum {
    VM_EVENT_FLAG_VCPU_PAUSED        = 1 << 0,
    VM_EVENT_FLAG_FOREIGN            = 1 << 1,
    VM_EVENT_FLAG_EMULATE            = 1 << 2,
    VM_EVENT_FLAG_EMULATE_NOWRITE    = 1 << 3,
    VM_EVENT_FLAG_TOGGLE_SINGLESTEP  = 1 << 4,
    VM_EVENT_FLAG_SET_EMUL_READ_DATA = 1 << 5,
    VM_EVENT_FLAG_DENY               = 1 << 6,
    VM_EVENT_FLAG_ALTERNATE_P2M      = 1 << 7,
    VM_EVENT_FLAG_SET_REGISTERS      = 1 << 8,
    VM_EVENT_FLAG_SET_EMUL_INSN_DATA = 1 << 9,
    VM_EVENT_FLAG_GET_NEXT_INTERRUPT = 1 << 10,
    VM_EVENT_FLAG_FAST_SINGLESTEP    = 1 << 11,
    VM_EVENT_FLAG_NESTED_P2M         = 1 << 12, /* since 4.15 */
    VM_EVENT_FLAG_RESET_VMTRACE      = 1 << 13, /* since 4.15 */
    VM_EVENT_FLAG_RESET_FORK_STATE   = 1 << 14, /* since 4.17 */
    VM_EVENT_FLAG_RESET_FORK_MEMORY  = 1 << 15  /* since 4.17 */
};

enum {
    VM_EVENT_REASON_UNKNOWN             = 0,
    VM_EVENT_REASON_MEM_ACCESS          = 1,
    VM_EVENT_REASON_MEM_SHARING         = 2,
    VM_EVENT_REASON_MEM_PAGING          = 3,
    VM_EVENT_REASON_WRITE_CTRLREG       = 4,
    VM_EVENT_REASON_MOV_TO_MSR          = 5,
    VM_EVENT_REASON_SOFTWARE_BREAKPOINT = 6,
    VM_EVENT_REASON_SINGLESTEP          = 7,
    VM_EVENT_REASON_GUEST_REQUEST       = 8,
    VM_EVENT_REASON_DEBUG_EXCEPTION     = 9,
    VM_EVENT_REASON_CPUID               = 10,
    VM_EVENT_REASON_PRIVILEGED_CALL     = 11,
    VM_EVENT_REASON_INTERRUPT           = 12,
    VM_EVENT_REASON_DESCRIPTOR_ACCESS   = 13,
    VM_EVENT_REASON_EMUL_UNIMPLEMENTED  = 14,
    VM_EVENT_REASON_VMEXIT              = 15, /* since 4.17 */
    VM_EVENT_REASON_IO_INSTRUCTION      = 16  /* since 4.18 */
};

enum {
    VM_EVENT_X86_CR0  = 0,
    VM_EVENT_X86_CR3  = 1,
    VM_EVENT_X86_CR4  = 2,
    VM_EVENT_X86_XCR0 = 3
};

enum {
    MEM_ACCESS_R              = 1 << 0,
    MEM_ACCESS_W              = 1 << 1,
    MEM_ACCESS_X              = 1 << 2,
    MEM_ACCESS_GLA_VALID      = 1 << 3,
    MEM_ACCESS_FAULT_WITH_GLA = 1 << 4,
    MEM_ACCESS_FAULT_IN_GPT   = 1 << 5
};

enum {
    VM_EVENT_DESC_IDTR = 1,
    VM_EVENT_DESC_GDTR = 2,
    VM_EVENT_DESC_LDTR = 3,
    VM_EVENT_DESC_TR   = 4
};

enum {
    MEM_PAGING_DROP_PAGE  = 1 << 0,
    MEM_PAGING_EVICT_FAIL = 1 << 1
};

/* Registers. */

struct vm_event_x86_selector_reg {
    uint32_t limit : 20;
    uint32_t ar    : 12;
};

struct vm_event_v6_regs_x86 {
    uint64_t rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rflags, dr6, dr7, rip;
    uint64_t cr0, cr2, cr3, cr4;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t msr_efer, msr_star, msr_lstar;
    uint64_t gdtr_base;
    uint32_t cs_base, ss_base, ds_base, es_base;
    uint64_t fs_base, gs_base;
    struct vm_event_x86_selector_reg cs, ss, ds, es, fs, gs;
    uint64_t shadow_gs;
    uint16_t gdtr_limit, cs_sel, ss_sel, ds_sel, es_sel, fs_sel, gs_sel, _pad;
};

struct vm_event_v7_regs_x86 {
    uint64_t rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rflags, dr6, dr7, rip;
    uint64_t cr0, cr2, cr3, cr4;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t msr_efer, msr_star, msr_lstar;
    uint64_t gdtr_base;
    uint64_t npt_base;    /* valid with VM_EVENT_FLAG_NESTED_P2M */
    uint64_t vmtrace_pos; /* ~0: no trace */
    uint32_t cs_base, ss_base, ds_base, es_base;
    uint64_t fs_base, gs_base;
    struct vm_event_x86_selector_reg cs, ss, ds, es, fs, gs;
    uint64_t shadow_gs;
    uint16_t gdtr_limit, cs_sel, ss_sel, ds_sel, es_sel, fs_sel, gs_sel, _pad;
};

/* One per reason. */

struct vm_event_paging {
    uint64_t gfn;
    uint32_t p2mt;
    uint32_t flags;
};

struct vm_event_sharing {
    uint64_t gfn;
    uint32_t p2mt;
    uint32_t _pad;
};

struct vm_event_mem_access {
    uint64_t gfn;
    uint64_t offset;
    uint64_t gla; /* valid with MEM_ACCESS_GLA_VALID */
    uint32_t flags;
    uint32_t _pad;
};

struct vm_event_write_ctrlreg {
    uint32_t index;
    uint32_t _pad;
    uint64_t new_value;
    uint64_t old_value;
};

struct vm_event_mov_to_msr {
    uint64_t msr;
    uint64_t new_value;
    uint64_t old_value;
};

struct vm_event_desc_access {
    union {
        struct {
            uint32_t instr_info;
            uint32_t _pad1;
            uint64_t exit_qualification;
        } vmx;
    } arch;
    uint8_t descriptor;
    uint8_t is_write;
    uint8_t _pad[6];
};

struct vm_event_singlestep {
    uint64_t gfn;
};

struct vm_event_fast_singlestep {
    uint16_t p2midx;
};

struct vm_event_debug {
    uint64_t gfn;
    uint64_t pending_dbg;
    uint32_t insn_length;
    uint8_t type;
    uint8_t _pad[3];
};

struct vm_event_cpuid {
    uint32_t insn_length;
    uint32_t leaf;
    uint32_t subleaf;
    uint32_t _pad;
};

struct vm_event_interrupt_x86 {
    uint32_t vector;
    uint32_t type;
    uint32_t error_code;
    uint32_t _pad;
    uint64_t cr2;
};

/* 4.17 and 4.18 added these two to version 7 without a new number. */

struct vm_event_vmexit { /* since 4.17 */
    struct {
        struct {
            uint64_t reason;
            uint64_t qualification;
        } vmx;
    } arch;
};

struct vm_event_io { /* since 4.18 */
    uint32_t bytes;
    uint16_t port;
    uint8_t in;
    uint8_t str;
};

/* Data for the emulator shares its place with the registers. */

struct vm_event_emul_insn_data {
    uint8_t data[16];
};

struct vm_event_v6_emul_read_data {
    uint32_t size;
    uint8_t data[324];
};

struct vm_event_v7_emul_read_data {
    uint32_t size;
    uint8_t data[340];
};

typedef struct vm_event_v6 {
    uint32_t version;
    uint32_t flags;
    uint32_t reason;
    uint32_t vcpu_id;
    uint16_t altp2m_idx;
    uint16_t _pad[3];
    union {
        struct vm_event_paging mem_paging;
        struct vm_event_sharing mem_sharing;
        struct vm_event_mem_access mem_access;
        struct vm_event_write_ctrlreg write_ctrlreg;
        struct vm_event_mov_to_msr mov_to_msr;
        struct vm_event_desc_access desc_access;
        struct vm_event_singlestep singlestep;
        struct vm_event_fast_singlestep fast_singlestep;
        struct vm_event_debug software_breakpoint;
        struct vm_event_debug debug_exception;
        struct vm_event_cpuid cpuid;
        union {
            struct vm_event_interrupt_x86 x86;
        } interrupt;
    } u;
    union {
        union {
            struct vm_event_v6_regs_x86 x86;
        } regs;
        union {
            struct vm_event_v6_emul_read_data read;
            struct vm_event_emul_insn_data insn;
        } emul;
    } data;
} vm_event_v6_request_t, vm_event_v6_response_t;

typedef struct vm_event_v7 {
    uint32_t version;
    uint32_t flags;
    uint32_t reason;
    uint32_t vcpu_id;
    uint16_t altp2m_idx;
    uint16_t _pad[3];
    union {
        struct vm_event_paging mem_paging;
        struct vm_event_sharing mem_sharing;
        struct vm_event_mem_access mem_access;
        struct vm_event_write_ctrlreg write_ctrlreg;
        struct vm_event_mov_to_msr mov_to_msr;
        struct vm_event_desc_access desc_access;
        struct vm_event_singlestep singlestep;
        struct vm_event_fast_singlestep fast_singlestep;
        struct vm_event_debug software_breakpoint;
        struct vm_event_debug debug_exception;
        struct vm_event_cpuid cpuid;
        struct vm_event_vmexit vmexit; /* since 4.17 */
        struct vm_event_io io;         /* since 4.18 */
        union {
            struct vm_event_interrupt_x86 x86;
        } interrupt;
    } u;
    union {
        union {
            struct vm_event_v7_regs_x86 x86;
        } regs;
        union {
            struct vm_event_v7_emul_read_data read;
            struct vm_event_emul_insn_data insn;
        } emul;
    } data;
} vm_event_v7_request_t, vm_event_v7_response_t;

/*
 * The ring page up to its first entry, which the macro of ring.h puts at 64. The entries are left
 * out: there are as many as fit, rounded down to a power of two (8), of the version's structure.
 */
struct vm_event_sring {
    uint32_t req_prod, req_event;
    uint32_t rsp_prod, rsp_event;
    union {
        uint8_t pvt_pad[4];
    } pvt;
    uint8_t __pad[44];
};
