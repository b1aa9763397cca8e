/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Of programs.c: what exceptions enter while a program runs, in 32-bit and in 64-bit mode.
 *
 * Each is noted in the vCPU's log. A program goes on behind a trap, and at its next block after a
 * fault. It ends by `int END`, outside its code, or when it has raised as many as it may: then its
 * registers are kept, a guest request says so, and the vCPU waits again.
 */
#include "../../../examples/guest/guest.h"

        /* tests/transparency/machine.py has the same numbers. */
        .set BLOCK, 128
        .set END, 0x40
        .set CONTROL, 0x207000          /* a block of 256 bytes for each vCPU */
        .set LOG, 0                     /* where its next exception is noted, in 32 bytes */
        .set LEFT, 4                    /* how many it may raise */
        .set STEPS_LEFT, 8              /* after how many debug exceptions TF is cleared */
        .set CODE_START, 12             /* offset within the code segment */
        .set CODE_SIZE, 16
        .set CODE_SELECTOR, 20
        .set OWN_STACK, 24              /* where to wait */
        .set DONE, 28
        .set HALTS, 32                  /* whether it waits by HLT, from which nobody wakes it */
        .set KEPT_FLAGS, 36             /* which flags of a debug exception's frame are kept */
        .set RESULT, 64
        .set VECTORS_STATE, 0x800       /* FXSAVE, 512 bytes for each vCPU */
        .set FIRST_TASK, 0x40           /* vCPU 0's TSS; the next one's is 16 bytes on */
        .set FLAT_DATA, 0x10

        .set DEBUG, 1
        .set BREAKPOINT, 3
        .set OVERFLOW, 4
        .set FIRST_INTERRUPT, 32
        .set TRAP_FLAG, 0x100
        .set HVM_OP, 34
        .set GUEST_REQUEST, 24
        .set SCHED_OP, 29
        .set SCHEDOP_YIELD, 0

        .section .note.Xen, "a", @note
        .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long _start

        .section .text.start, "ax", @progbits
        .code32
function _start
        mov $first_stack + 1024, %esp
        cld
        jmp start_other
end _start

        /* One entry of 16 bytes for each vector: all leave an error code and the vector. */
        .macro entries name, handler
        .balign 16
function \name
        .set vector, 0
        .rept END + 1
        .balign 16
        .if (vector != 8) && (vector != 17) && (vector != 21) && ((vector < 10) || (vector > 14))
        push $0
        .endif
        push $vector
        jmp \handler
        .set vector, vector + 1
        .endr
end \name
        .endm

        .text
        entries vectors32, handle32

function handle32
        pusha
        push %ds
        push %es
        cld
        mov $FLAT_DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %esp, %ebp          /* es, ds, edi to eax, vector at 40, error, eip, cs, eflags */
        xor %ebx, %ebx
        str %bx
        sub $FIRST_TASK, %ebx
        shl $4, %ebx
        mov %ebx, %ecx
        shl $1, %ecx
        add $CONTROL + VECTORS_STATE, %ecx
        add $CONTROL, %ebx
        cmpl $DEBUG, 40(%ebp)
        jne 1f
        mov KEPT_FLAGS(%ebx), %eax
        and %eax, 56(%ebp)
1:      mov LOG(%ebx), %edi
        addl $32, LOG(%ebx)
        .irp offset, 0, 4, 8, 12, 16
        mov 40 + \offset(%ebp), %eax
        mov %eax, \offset(%edi)
        .endr
        mov %ebp, 20(%edi)
        mov %dr6, %eax
        mov %eax, 24(%edi)
        xor %eax, %eax
        mov %eax, %dr6
        mov %cr2, %eax
        mov %eax, 28(%edi)

        decl LEFT(%ebx)
        jz finish32
        mov 40(%ebp), %eax
        cmp $END, %eax
        je finish32
        cmp $DEBUG, %eax
        jne 1f
        decl STEPS_LEFT(%ebx)
        jnz 3f
        jmp 2f
1:      cmp $BREAKPOINT, %eax
        je 3f
        cmp $OVERFLOW, %eax
        je 3f
        cmp $FIRST_INTERRUPT, %eax
        jae 3f
        mov 48(%ebp), %eax
        sub CODE_START(%ebx), %eax
        cmp CODE_SIZE(%ebx), %eax
        jae finish32
        and $-BLOCK, %eax
        add $BLOCK, %eax
        add CODE_START(%ebx), %eax
        mov %eax, 48(%ebp)
        mov CODE_SELECTOR(%ebx), %eax
        mov %eax, 52(%ebp)
2:      andl $~TRAP_FLAG, 56(%ebp)
3:      pop %es
        pop %ds
        popa
        add $8, %esp
        iret
end handle32

function finish32
        .irp offset, 0, 4, 8, 12, 16, 20, 24, 28, 40, 48
        mov 8 + \offset(%ebp), %eax
        mov %eax, RESULT + \offset(%ebx)
        .endr
        fxsave (%ecx)
        mov OWN_STACK(%ebx), %ecx
        mov $FLAT_DATA, %eax
        mov %eax, %ss
        mov %ecx, %esp
        movl $1, DONE(%ebx)
        mov HALTS(%ebx), %esi
        mov $HVM_OP, %eax
        mov $GUEST_REQUEST, %ebx
        xor %ecx, %ecx
        vmcall
        test %esi, %esi
        jz wait32
1:      sti
        hlt
        jmp 1b
end finish32

function wait32
        mov $SCHED_OP, %eax
        mov $SCHEDOP_YIELD, %ebx
        xor %ecx, %ecx
        vmcall
        jmp wait32
end wait32

        .code64
        entries vectors64, handle64

        .set REGISTERS, 15 * 8
function handle64
        .irp register, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
        push %\register
        .endr
        cld
        mov %rsp, %rbp                  /* r15 to rax, vector at 120, error, rip, cs, rflags, rsp */
        xor %ebx, %ebx
        str %bx
        sub $FIRST_TASK, %ebx
        shl $4, %ebx
        mov %ebx, %ecx
        shl $1, %ecx
        add $CONTROL + VECTORS_STATE, %ecx
        add $CONTROL, %ebx
        cmpl $DEBUG, REGISTERS(%rbp)
        jne 1f
        mov KEPT_FLAGS(%rbx), %eax
        and %eax, REGISTERS + 32(%rbp)
1:      mov LOG(%rbx), %edi
        addl $32, LOG(%rbx)
        .irp offset, 0, 4, 8, 12, 16, 20
        mov REGISTERS + 2 * \offset(%rbp), %rax
        mov %eax, \offset(%rdi)
        .endr
        mov %dr6, %rax
        mov %eax, 24(%rdi)
        xor %eax, %eax
        mov %rax, %dr6
        mov %cr2, %rax
        mov %eax, 28(%rdi)

        decl LEFT(%rbx)
        jz finish64
        mov REGISTERS(%rbp), %eax
        cmp $END, %eax
        je finish64
        cmp $DEBUG, %eax
        jne 1f
        decl STEPS_LEFT(%rbx)
        jnz 3f
        jmp 2f
1:      cmp $BREAKPOINT, %eax
        je 3f
        cmp $OVERFLOW, %eax
        je 3f
        cmp $FIRST_INTERRUPT, %eax
        jae 3f
        mov REGISTERS + 16(%rbp), %eax
        sub CODE_START(%rbx), %eax
        cmp CODE_SIZE(%rbx), %eax
        jae finish64
        and $-BLOCK, %eax
        add $BLOCK, %eax
        add CODE_START(%rbx), %eax
        mov %rax, REGISTERS + 16(%rbp)
        mov CODE_SELECTOR(%rbx), %eax
        mov %rax, REGISTERS + 24(%rbp)
2:      andl $~TRAP_FLAG, REGISTERS + 32(%rbp)
3:      .irp register, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
        pop %\register
        .endr
        add $16, %rsp
        iretq
end handle64

function finish64
        .set offset, 0
        .rept 15
        mov offset(%rbp), %rax
        mov %rax, RESULT + offset(%rbx)
        .set offset, offset + 8
        .endr
        .irp offset, 16, 32, 40
        mov REGISTERS + \offset(%rbp), %rax
        mov %rax, RESULT + REGISTERS + \offset - 16(%rbx)
        .endr
        fxsave64 (%rcx)
        mov OWN_STACK(%rbx), %esp
        movl $1, DONE(%rbx)
        mov HALTS(%rbx), %ebx
        mov $HVM_OP, %eax
        mov $GUEST_REQUEST, %edi
        xor %esi, %esi
        vmcall
        test %ebx, %ebx
        jz 2f
1:      sti
        hlt
        jmp 1b
2:      mov $SCHED_OP, %eax
        mov $SCHEDOP_YIELD, %edi
        xor %esi, %esi
        vmcall
        jmp 2b
end finish64

        .section .bss, "aw", @nobits
        .balign 16
first_stack:
        .skip 1024

        .section .note.GNU-stack, "", @progbits
