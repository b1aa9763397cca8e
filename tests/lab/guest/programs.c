/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest for programs that an agent writes into its memory: its two vCPUs wait until the agent
 * points them at one (tests/transparency). programs.S catches what a program raises.
 */

#include "../../../examples/guest/guest.h"

enum { VCPU_OP = 24, VCPUOP_INITIALISE = 0, VCPUOP_UP = 1, STACK_SIZE = 1024 };

struct vcpu_context { /* vcpu_hvm_context_t of Xen, for a vCPU in 32-bit mode */
    u32 mode, pad0;
    u32 eax, ecx, edx, ebx, esp, ebp, esi, edi, eip, eflags, cr0, cr3, cr4, pad1;
    u64 efer;
    u32 cs_base, ds_base, ss_base, es_base, tr_base;
    u32 cs_limit, ds_limit, ss_limit, es_limit, tr_limit;
    u16 cs_ar, ds_ar, ss_ar, es_ar, tr_ar, pad2[3];
    u64 pad3[4];            /* the 64-bit registers are more */
};

void wait32(void);

static u8 stack[STACK_SIZE];

static int vcpu_op(u32 command, u32 id, const struct vcpu_context *context)
{
    int result = VCPU_OP;

    __asm__ volatile("vmcall" : "+a"(result), "+b"(command), "+c"(id), "+d"(context) : : "memory");
    return result;
}

__attribute__((used, noreturn)) void start_other(void);
void start_other(void)
{
    struct vcpu_context context = {
        .esp = (u32)(stack + STACK_SIZE),
        .eip = (u32)wait32,
        .cr0 = 1,
        .cs_limit = ~0u, .ds_limit = ~0u, .ss_limit = ~0u, .es_limit = ~0u, .tr_limit = 103,
        .cs_ar = 0xc9b, .ds_ar = 0xc93, .ss_ar = 0xc93, .es_ar = 0xc93, .tr_ar = 0x8b,
    };

    if (vcpu_op(VCPUOP_INITIALISE, 1, &context) == 0)
        vcpu_op(VCPUOP_UP, 1, 0);
    wait32();
    __builtin_unreachable();
}
