/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest to measure with: it makes `passes` passes of about 10 000 instructions each, with
 * arithmetic, memory and calls, then halts. Each pass calls hooked(), which is one instruction.
 */
#include "guest.h"

        .set ROUNDS, 500

        .text
function main
        push %ebx
1:      incl calls
        call hooked
        mov $ROUNDS, %ecx
        mov $numbers, %edi
2:      mov %ecx, %eax                  /* 20 instructions to the jump back, with those of mix() */
        call mix
        mov %ecx, %ebx
        and $0xff, %ebx
        add %eax, (%edi, %ebx, 4)
        mov (%edi, %ebx, 4), %edx
        xor %edx, %eax
        mov %eax, sum
        inc %ebx
        and $0xff, %ebx
        mov %eax, (%edi, %ebx, 4)
        dec %ecx
        jnz 2b
        decl passes
        jnz 1b
        pop %ebx
        ret
end main

function mix
        imul $1103515245, %eax, %eax
        add $12345, %eax
        push %eax
        rol $7, %eax
        pop %edx
        add %edx, %eax
        ret
end mix

        .section .text.page, "ax", @progbits
function hooked
        ret
end hooked

        .section .bss.page, "aw", @nobits
        .balign 4096
        .globl passes, calls, sum, numbers
passes: .long 0
        .balign 4096
calls:  .long 0
sum:    .long 0
numbers:
        .skip 1024

        .section .note.GNU-stack, "", @progbits
