/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Boot sector: the emulator has put hypervisor, kernel and ramdisk into memory already, so all
 * that is left is to enter protected mode as a Multiboot loader would.
 */
        .code16
        .text
        .globl _start
_start: cli
        xor %ax, %ax
        mov %ax, %ds
        in $0x92, %al
        or $2, %al                      /* A20 */
        out %al, $0x92
        lgdt table
        mov %cr0, %eax
        or $1, %al
        mov %eax, %cr0
        ljmp $8, $flat
        .code32
flat:   mov $16, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov %ax, %fs
        mov %ax, %gs
        mov 0x100000, %ecx                 /* boot.py leaves the hypervisor's entry here, */
        mov $0x2badb002, %eax
        mov $0x100010, %ebx                /* and the Multiboot information here */
        jmp *%ecx

        .balign 8
descriptors:
        .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
table:  .word table - descriptors - 1
        .long descriptors
        .org 510
        .word 0xaa55
