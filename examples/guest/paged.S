/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Of paged.c: the way into long mode, and those places where single instructions matter.
 * start.S, written for 32 bits, comes out the same when it is assembled for 64.
 */
#include "guest.h"

        .set HIGH, 0xffff800000000000
        .set MEMORY, 16 << 20
        .set LARGE_PAGE, 2 << 20
        .set PRESENT_WRITABLE, 3
        .set LARGE, 0x80
        .set CR0_WP_PG, 0x80010000
        .set CR4_PAE, 0x20
        .set EFER, 0xc0000080
        .set EFER_LME, 8

        .section .text.start, "ax", @progbits
        .code32
/* All memory in large pages, at 0 and at HIGH; paged.c makes better tables. */
function main
        mov $boot_directory, %edi
        mov $LARGE | PRESENT_WRITABLE, %eax
1:      mov %eax, (%edi)
        add $8, %edi
        add $LARGE_PAGE, %eax
        cmp $MEMORY, %eax
        jb 1b
        movl $boot_directory + PRESENT_WRITABLE, boot_pointers
        movl $boot_pointers + PRESENT_WRITABLE, boot_root
        movl $boot_pointers + PRESENT_WRITABLE, boot_root + 8 * 256
        mov $boot_root, %eax
        mov %eax, %cr3
        mov %cr4, %eax
        or $CR4_PAE, %eax
        mov %eax, %cr4
        mov $EFER, %ecx
        rdmsr
        bts $EFER_LME, %eax
        wrmsr
        mov %cr0, %eax
        or $CR0_WP_PG, %eax
        mov %eax, %cr0
        lgdt boot_gdt_pointer
        ljmp $KERNEL_CODE, $1f
        .code64
1:      mov $KERNEL_DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        movabs $kernel_stack + STACK_SIZE, %rsp
        movabs $run, %rax
        call *%rax
end main

        .balign 8
boot_gdt:
        .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
boot_gdt_pointer:
        .word . - boot_gdt - 1
        .long boot_gdt

        .section .bss.boot, "aw", @nobits
        .balign 4096
        .globl boot_root
        .type boot_root, @object
boot_root:
        .skip 4096
        .size boot_root, 4096
        .globl boot_pointers
        .type boot_pointers, @object
boot_pointers:
        .skip 4096
        .size boot_pointers, 4096
        .globl boot_directory
        .type boot_directory, @object
boot_directory:
        .skip 4096
        .size boot_directory, 4096

        .section .bss.user, "aw", @nobits
        .balign 4096
function user_stack
        .skip 4096
end user_stack

        .section .text.user, "ax", @progbits
/* u64 user_main(u64 a, u64 b, const void *forbidden), in user mode: returns user_target(a, b) by a
 * system call, after a look at what only the kernel may see.
 */
function user_main
        push %rdx
        call user_target
        pop %rdx
        .globl peek, peek_end
peek:   testb $0, (%rdx)
peek_end:
        int $SYSTEM_CALL
end user_main

function user_target
        lea 7(%rdi, %rsi, 4), %rax
        ret
end user_target

        .text
/* u64 call_user(u64 a, u64 b, const void *forbidden): calls user_main(). */
function call_user
        push %rbx
        push %rbp
        push %r12
        push %r13
        push %r14
        push %r15
        mov %rsp, tss + 4(%rip)         /* where exceptions and system_call find their stack */
        push $USER_DATA
        push $user_stack + 4096
        push $2                         /* no flag but the one that is always set */
        push $USER_CODE
        push $user_main
        iretq
end call_user

/* What int SYSTEM_CALL enters: returns from call_user(). */
function system_call
        mov tss + 4(%rip), %rsp
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %rbp
        pop %rbx
        ret
end system_call

/* void poke(volatile u64 *at, u64 value): writes to what is read-only. */
function poke
        mov %rsi, (%rdi)
        .globl poke_end
poke_end:
        ret
end poke

/* One entry of 16 bytes per vector: all leave an error code and the vector on the stack. */
        .balign 16
function vectors
        .set vector, 0
        .rept 32
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
        .irp register, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
        push %\register
        .endr
        mov %rsp, %rdi
        call exception
        .irp register, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
        pop %\register
        .endr
        add $16, %rsp
        iretq
end handle

        .section .page.target, "ax", @progbits
/* u64 target64(u64 a, u64 b, u64 c): returns a + 2b + 3c. */
function target64
        lea (%rdi, %rsi, 2), %rax
        lea (%rdx, %rdx, 2), %rdx
        add %rdx, %rax
        ret
end target64

        .section .note.GNU-stack, "", @progbits
