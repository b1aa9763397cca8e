/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest that goes through what is hard for breakpoints, `go` times, and then spins: code in a
 * segment with a base, code that begins in the page before, a repeated string instruction, an
 * interrupt to itself. It also asks Xen what tells that somebody has altp2m on. Paging is off.
 */
#include "../../../examples/guest/guest.h"

        .set SCHED_OP, 29
        .set MEMORY_OP, 12
        .set CURRENT_RESERVATION, 3
        .set MAXIMUM_RESERVATION, 4
        .set HVM_OP, 34
        .set HVMOP_ALTP2M, 25
        .set CREATE_P2M, 4
        .set DOMID_SELF, 0x7ff0
        .set APIC, 0xfee00000
        .set INTERRUPT, 0x40
        .set FLAT_CODE, 0x08
        .set FLAT_DATA, 0x10
        .set BASED_CODE, 0x18
        .set MOV_EAX, 0xb8
        .set NOP, 0x90
        .set OPERAND, 0x43424140        /* the first bytes of `aligned` */
        .set SIZE, 10

        .section .note.Xen, "a", @note
        .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long _start

        .text
        .macro gate vector, handler
        mov $\handler, %eax
        mov %ax, idt + 8 * \vector
        shr $16, %eax
        mov %ax, idt + 8 * \vector + 6
        movw $FLAT_CODE, idt + 8 * \vector + 2
        movw $0x8e00, idt + 8 * \vector + 4
        .endm

        .macro ask number, command, argument, answer
        mov $\number, %eax
        mov $\command, %ebx
        mov $\argument, %ecx
        vmcall
        mov %eax, answers + 4 * \answer
        .endm

function _start
        mov $stack_top, %esp
        cld
        mov $based, %eax                /* the base of the segment */
        mov %ax, gdt + BASED_CODE + 2
        shr $16, %eax
        mov %al, gdt + BASED_CODE + 4
        mov %ah, gdt + BASED_CODE + 7
        gate 3, trap
        gate INTERRUPT, interrupted
        lgdt gdt_pointer
        lidt idt_pointer
        ljmp $FLAT_CODE, $1f
1:      mov $FLAT_DATA, %eax
        .irp segment, ds, es, ss
        mov %eax, %\segment
        .endr

next:   mov rounds, %eax
        cmp go, %eax
        jae 9f

        lcall $BASED_CODE, $based_target - based

        call aligned
        movb $MOV_EAX, aligned - 1
        call aligned - 1
        cmp $OPERAND, %eax
        je 1f
        incl noticed
1:      movb $NOP, aligned - 1

        mov $buffer, %edi
        mov $SIZE, %ecx
        mov $0x5a, %eax
        .globl fill
fill:   rep stosb
        cmpl $0x5a5a5a5a, buffer + SIZE - 4
        je 1f
        incl noticed
1:      movl $0, buffer + SIZE - 4

        ask MEMORY_OP, CURRENT_RESERVATION, domain, 0
        ask MEMORY_OP, MAXIMUM_RESERVATION, domain, 1
        ask HVM_OP, HVMOP_ALTP2M, altp2m_op, 2

        cmpl $0, apic
        je 1f
        movl $0x1ff, APIC + 0xf0
        sti
        nop
        .globl send, sent
send:   movl $1 << 18 | INTERRUPT, APIC + 0x300 /* to this vCPU itself */
sent:   nop
        nop
        nop
        cli
1:      incl rounds
        jmp 8f

9:      movl $1, done
8:      mov $SCHED_OP, %eax
        xor %ebx, %ebx                  /* yield */
        xor %ecx, %ecx
        vmcall
        jmp next
end _start

function trap
        incl traps
        iret
end trap

function interrupted
        push %eax
        mov 4(%esp), %eax
        mov %eax, interrupted_at
        movl $0, APIC + 0xb0            /* end of interrupt */
        pop %eax
        iret
end interrupted

        .balign 4096
        .fill 0x18, 1, NOP
based:  .fill 0x10, 1, NOP
function based_target
        incl based_count
        .globl own_int3
own_int3:
        int3
        lret
end based_target

        .balign 4096, NOP
function aligned                        /* inc %eax, %ecx, %edx, %ebx; or the operand of mov $, %eax */
        .byte 0x40, 0x41, 0x42, 0x43
        ret
end aligned

        .balign 4096
        .macro word name, count=1
        .globl \name
\name:  .fill \count, 4, 0
        .endm

        .data
        .balign 4096
        word go
        word rounds
        word done
        word noticed
        word based_count
        word traps
        word apic
        word interrupted_at
        word answers, 3
        word buffer, 4
domain: .long DOMID_SELF
altp2m_op:
        .long 1, CREATE_P2M, DOMID_SELF /* struct xen_hvm_altp2m_op */
        .fill 17, 4, 0
        .balign 8
gdt:    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer:
        .word . - gdt - 1
        .long gdt
idt_pointer:
        .word 8 * (INTERRUPT + 1) - 1
        .long idt
        .balign 8
idt:    .fill INTERRUPT + 1, 8, 0
        .balign 16
        .fill 1024, 1, 0
stack_top:
        .section .note.GNU-stack, "", @progbits
