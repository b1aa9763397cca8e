/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Where Xen enters a PVH guest: flat 32-bit protected mode, paging off, interrupts off, no stack.
 */
        .section .note.Xen, "a", @note
        .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long _start

        .section .text.start, "ax", @progbits
        .globl _start
        .type _start, @function
_start: mov $stack_top, %esp
        cld
        call main
1:      hlt
        jmp 1b
        .size _start, . - _start

        .section .bss.stack, "aw", @nobits
        .balign 16
        .skip 1024
stack_top:

        .section .note.GNU-stack, "", @progbits
