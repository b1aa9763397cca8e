/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Of events.c: where vCPUs start, what exceptions enter, and code of which every byte is known.
 */
        .section .note.Xen, "a", @note
        .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long _start

        .macro function name
        .globl \name
        .type \name, @function
\name:
        .endm
        .macro end name
        .size \name, . - \name
        .endm

        .section .text.start, "ax", @progbits
function _start
        mov $stacks + STACK_SIZE, %esp
        cld
        call prepare                    /* makes the tables that secondary vCPUs share */
        xor %eax, %eax
end _start

/* Every vCPU gets here with its number in eax and a stack of its own. */
function enter
        lgdt gdt_pointer
        lidt idt_pointer
        ljmp $CODE_SELECTOR, $1f
1:      mov $DATA_SELECTOR, %edx
        mov %edx, %ds
        mov %edx, %es
        mov %edx, %fs
        mov %edx, %gs
        mov %edx, %ss
        push %eax
        call run
end enter

/* unsigned int attempt(unsigned int *stack, command function, unsigned int argument,
 *                      unsigned int low, unsigned int high):
 * calls the function; what it leaves in *stack, put back into esp, ends it from within a handler.
 */
function attempt
        push %ebp
        push %ebx
        push %esi
        push %edi
        mov 20(%esp), %ebx
        mov %esp, (%ebx)
        push 36(%esp)
        push 36(%esp)
        push 36(%esp)
        call *36(%esp)
        mov 32(%esp), %ebx
        add $12, %esp
1:      movl $0, (%ebx)
        pop %edi
        pop %esi
        pop %ebx
        pop %ebp
        ret
failed: mov 20(%esp), %ebx
        xor %eax, %eax
        jmp 1b
end attempt

/* One entry of 16 bytes per vector: all leave an error code and the vector on the stack. */
        .balign 16
function vectors
        .set vector, 0
        .rept 33
        .balign 16
        .if (vector != 8) && (vector != 17) && (vector != 21) && ((vector < 10) || (vector > 14))
        push $0
        .endif
        push $vector
        jmp handle
        .set vector, vector + 1
        .endr
end vectors

function handle
        cld
        pusha
        push %esp
        call exception                  /* the stack to go on with, or null: as it was */
        add $4, %esp
        test %eax, %eax
        jnz 1f
        popa
        add $8, %esp
        iret
1:      mov %eax, %esp
        jmp failed
end handle

        .section .page.target, "ax", @progbits
function target
        incl counter
        ret
end target

        .section .page.constant, "ax", @progbits
function constant
        mov $1, %eax
        ret
end constant

        .section .page.stepped, "ax", @progbits
function stepped
        xor %eax, %eax
        .rept 8
        inc %eax                        /* one byte each */
        .endr
        ret
end stepped

        .section .page.breakpoint, "ax", @progbits
function breakpoint
        int3
        mov $0xb, %eax
        ret
end breakpoint

        .section .note.GNU-stack, "", @progbits
