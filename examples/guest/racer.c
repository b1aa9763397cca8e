/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest whose vCPUs, up to 8, all call hit(n) as fast as they can. hit() counts in `total` and
 * returns 3n + 1. After each call a vCPU looks at that and at its registers, flags and stack: what
 * is not as it should be counts in `noticed`, and nothing is while nobody interferes.
 *
 * `made`, `noticed` and `done` have a line of 64 bytes for each vCPU; `vcpus` tells how many there
 * are. With `go` 0, as at the start, calls never end. Else each vCPU makes calls until it has made
 * so many since its start, says so by `done` = `go`, and waits for another `go`: then the numbers
 * made are exact, and `total` is their sum.
 *
 * hit() and each of these words have pages of their own. Paging is off.
 */

#include "guest.h"

enum { VCPU_OP = 24, VCPUOP_INITIALISE = 0, VCPUOP_UP = 1 };
enum { VCPUS = 8, STACK_SIZE = 1024, CALLS_A_TURN = 64, REPORT_FROM = 4096 };

struct line {
    u32 count, pad[15];
};

struct vcpu_context { /* vcpu_hvm_context_t of Xen, for a vCPU in 32-bit mode */
    u32 mode, pad0;
    u32 eax, ecx, edx, ebx, esp, ebp, esi, edi, eip, eflags, cr0, cr3, cr4, pad1;
    u64 efer;
    u32 cs_base, ds_base, ss_base, es_base, tr_base;
    u32 cs_limit, ds_limit, ss_limit, es_limit, tr_limit;
    u16 cs_ar, ds_ar, ss_ar, es_ar, tr_ar, pad2[3];
    u64 pad3[4];            /* the 64-bit registers are more */
};

void enter(void);
u32 wrong_after_hit(u32 n);

PAGE volatile u32 total;
PAGE volatile u32 go;
PAGE volatile u32 vcpus;
PAGE volatile struct line made[VCPUS];
PAGE volatile struct line noticed[VCPUS];
PAGE volatile struct line done[VCPUS];

static u8 stacks[VCPUS][STACK_SIZE];

static int vcpu_op(u32 command, u32 id, const struct vcpu_context *context)
{
    int result = VCPU_OP;

    __asm__ volatile("vmcall" : "+a"(result), "+b"(command), "+c"(id), "+d"(context) : : "memory");
    return result;
}

static int start(u32 id)
{
    struct vcpu_context context = {
        .eax = id,
        .esp = (u32)stacks[id + 1],
        .eip = (u32)enter,
        .cr0 = 1,
        .cs_limit = ~0u, .ds_limit = ~0u, .ss_limit = ~0u, .es_limit = ~0u, .tr_limit = 103,
        .cs_ar = 0xc9b, .ds_ar = 0xc93, .ss_ar = 0xc93, .es_ar = 0xc93, .tr_ar = 0x8b,
    };

    return vcpu_op(VCPUOP_INITIALISE, id, &context) == 0 && vcpu_op(VCPUOP_UP, id, 0) == 0;
}

__attribute__((used, noreturn)) void run(u32 id);
void run(u32 id)
{
    for (;;) {
        u32 limit = go, calls = 0;

        for (; calls < CALLS_A_TURN && (limit == 0 || made[id].count < limit); calls++) {
            noticed[id].count += wrong_after_hit(made[id].count);
            made[id].count++;
        }
        if (calls == 0)
            done[id].count = limit;
        else if (id == 0 && made[id].count >= REPORT_FROM)
            report("racer: calls ", made[id].count, noticed[id].count);
        yield();
    }
}

__attribute__((noreturn)) void main(void)
{
    do
        vcpus++;
    while (vcpus < VCPUS && start(vcpus));
    run(0);
}
