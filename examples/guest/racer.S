/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Of racer.c: where its other vCPUs start, what they call, and a look at what that leaves.
 */
#include "guest.h"

        .set ON_STACK, 0xcafe5afe
        .set IN_EBX, 0xb0b1b2b3
        .set IN_ECX, 0xc0c1c2c3
        .set IN_EDX, 0xd0d1d2d3
        .set IN_ESI, 0x50515253
        .set IN_EDI, 0xe0e1e2e3
        .set TRAP_FLAG, 0x100

        .text
function enter                          /* its number is in eax */
        push %eax
        call run
end enter

/* u32 wrong_after_hit(u32 n): calls hit(n), and tells whether anything is not as it should be. */
function wrong_after_hit
        push %ebp
        push %ebx
        push %esi
        push %edi
        mov 20(%esp), %eax
        push $ON_STACK
        push %eax
        mov %esp, %ebp
        mov $IN_EBX, %ebx
        mov $IN_ECX, %ecx
        mov $IN_EDX, %edx
        mov $IN_ESI, %esi
        mov $IN_EDI, %edi
        call hit
        cmp %esp, %ebp
        jne 1f
        cmp $IN_EBX, %ebx
        jne 1f
        cmp $IN_ECX, %ecx
        jne 1f
        cmp $IN_EDX, %edx
        jne 1f
        cmp $IN_ESI, %esi
        jne 1f
        cmp $IN_EDI, %edi
        jne 1f
        cmpl $ON_STACK, 4(%esp)
        jne 1f
        mov 28(%esp), %edx              /* n, where the caller has put it */
        cmp %edx, (%esp)
        jne 1f
        lea 1(%edx, %edx, 2), %edx
        cmp %edx, %eax
        jne 1f
        pushf
        pop %eax
        and $TRAP_FLAG, %eax            /* somebody steps us */
        jnz 1f
        jmp 2f
1:      mov $1, %eax
2:      lea 8(%ebp), %esp
        pop %edi
        pop %esi
        pop %ebx
        pop %ebp
        ret
end wrong_after_hit

        .section .text.page, "ax", @progbits
/* u32 hit(u32 n): returns 3n + 1, and changes no register but eax. */
function hit
        mov 4(%esp), %eax
        lea 1(%eax, %eax, 2), %eax
        lock incl total
        ret
end hit

        .section .note.GNU-stack, "", @progbits
