/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A PVH guest: entered in flat 32-bit protected mode without paging, so gfn = address >> 12.
 */
        .section .note.Xen, "a", @note
        .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long _start

        .text
        .globl _start
_start: mov $message, %esi
1:      lodsb
        test %al, %al
        jz 2f
        out %al, $0xe9                  /* Xen's log of this guest */
        jmp 1b
2:      incl counter
        mov $29, %eax                   /* sched_op: yield */
        xor %ebx, %ebx
        xor %ecx, %ecx
        vmcall
        jmp 2b

        .data
message: .asciz "guest runs\n"
        .balign 4096
        .globl counter
counter: .long 0
        .balign 4096
