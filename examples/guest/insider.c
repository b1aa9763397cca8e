/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest that watches itself, without leaving guest mode: what altp2m="mixed" is for. It switches
 * altp2m on, creates a view, makes the page of `secret` read-only there, and asks to be told by #VE.
 * For ever it makes passes. In each it
 *
 * - goes into that view by VMFUNC and writes to `secret`, which trips;
 * - in its handler of #VE looks what is in `information`, goes back to view 0 by VMFUNC, and
 *   returns, so that the write is done.
 *
 * `passes` and `trips` are counted; what is not as it should be counts in `noticed`, and nothing is
 * while nobody interferes. If Xen refuses something it says what, and halts. Paging is off.
 */

#include "guest.h"

enum { HVM_OP = 34, HVMOP_ALTP2M = 25, VERSION = 1, DOMID_SELF = 0x7ff0 };
enum { SET_STATE = 2, ENABLE_NOTIFY = 3, CREATE_VIEW = 4, SET_ACCESS = 7, SET_SUPPRESS_VE = 10 };
enum { ACCESS_R = 1, ACCESS_RWX = 7, VE = 20, CODE = 8 };
/* The exit qualification: a write, of a page that is readable, the linear address is known, and it
 * is not a page table that was written to. Bit 6 and those from 9 on may be anything. */
enum { EPT_VIOLATION = 48, QUALIFICATION = 1 << 1 | 1 << 3 | 1 << 7 | 1 << 8, KNOWN = 0x1bf };

struct information {            /* SDM 3C, "Virtualization-Exception Information" */
    u32 reason, busy;
    u64 qualification, linear, physical;
    u16 view;
};

struct operation {              /* struct xen_hvm_altp2m_op */
    u32 version, command;
    u16 domain, reserved0;
    u32 reserved1;
    union {
        u8 state;
        struct { u32 vcpu, reserved; u64 gfn; } notify;
        struct { u16 number, access; } view;
        struct { u16 view, access; u32 reserved; u64 gfn; } access;
        struct { u16 view; u8 suppress, reserved0; u32 reserved1; u64 gfn; } suppress;
    };
};

struct __attribute__((packed)) pointer {
    u16 limit;
    const void *base;
};

struct frame;

PAGE volatile u32 secret;
PAGE volatile struct information information;
PAGE volatile u32 passes;
PAGE volatile u32 trips;
PAGE volatile u32 noticed;

static const u64 gdt[] = { 0, 0x00cf9b000000ffff, 0x00cf93000000ffff };
static u64 idt[VE + 1];
static u32 view;

static void expect(u32 fulfilled)
{
    noticed += !fulfilled;
}

static inline void switch_view(u32 number)
{
    __asm__ volatile("vmfunc" : : "a"(0), "c"(number) : "memory");
}

__attribute__((interrupt, target("general-regs-only"))) static void tripped(struct frame *frame)
{
    (void)frame;
    trips++;
    expect(information.reason == EPT_VIOLATION);
    expect(information.busy == ~0u);
    expect((information.qualification & KNOWN) == QUALIFICATION);
    expect(information.linear == (u32)&secret);
    expect(information.physical == (u32)&secret);
    expect(information.view == view);
    expect(secret == passes);
    switch_view(0);
    information.busy = 0;
}

static void altp2m(u32 command, struct operation *operation)
{
    int result = HVM_OP, op = HVMOP_ALTP2M;
    void *argument = operation;

    operation->version = VERSION;
    operation->command = command;
    operation->domain = DOMID_SELF;
    __asm__ volatile("vmcall" : "+a"(result), "+b"(op), "+c"(argument) : : "memory");
    if (result == 0)
        return;
    print("insider: operation ");
    print_number(command);
    print(" ended with errno ");
    print_number((u32)-result);
    print("\n");
    for (;;)
        __asm__ volatile("hlt");
}

static void take_exceptions(void)
{
    struct pointer gdt_pointer = { sizeof(gdt) - 1, gdt }, idt_pointer = { sizeof(idt) - 1, idt };
    u32 handler = (u32)tripped;

    idt[VE] = (u64)(handler >> 16) << 48 | 0x8e00ull << 32 | CODE << 16 | (handler & 0xffff);
    __asm__ volatile("lgdt %0\n\tlidt %1\n\tljmp %2, $1f\n1:"
                     : : "m"(gdt_pointer), "m"(idt_pointer), "i"(CODE) : "memory");
}

__attribute__((noreturn)) void main(void)
{
    u64 page = (u32)&secret / PAGE_SIZE;
    struct operation create = { .view = { 0, ACCESS_RWX } };

    take_exceptions();
    altp2m(SET_STATE, &(struct operation){ .state = 1 });
    altp2m(CREATE_VIEW, &create);
    view = create.view.number;
    altp2m(SET_ACCESS, &(struct operation){ .access = { view, ACCESS_R, 0, page } });
    altp2m(SET_SUPPRESS_VE, &(struct operation){ .suppress = { view, 0, 0, 0, page } });
    altp2m(ENABLE_NOTIFY, &(struct operation){ .notify = { 0, 0, (u32)&information / PAGE_SIZE } });
    for (;;) {
        u32 before = trips;

        switch_view(view);
        secret = passes + 1;
        passes++;
        expect(secret == passes);
        expect(trips == before + 1);
        report("insider: pass ", passes, noticed);
        yield();
    }
}
