/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the guests here have in common: the little they ask of Xen.
 */

#ifdef __ASSEMBLER__

        .macro function name
        .globl \name
        .type \name, @function
\name:
        .endm
        .macro end name
        .size \name, . - \name
        .endm

#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { SCHED_OP = 29, SCHEDOP_YIELD = 0, DEBUG_PORT = 0xe9, PAGE_SIZE = 4096 };

#define IN(section_name) __attribute__((used, section(section_name)))
#define PAGE __attribute__((aligned(PAGE_SIZE))) IN(".bss.page")

static inline void print(const char *text)
{
    for (; *text != '\0'; text++)
        __asm__ volatile("outb %b0, %w1" : : "a"(*text), "d"(DEBUG_PORT));
}

static inline void print_number(u32 number)
{
    char text[11], *first = &text[10];

    *first = '\0';
    do
        *--first = (char)('0' + number % 10);
    while ((number /= 10) != 0);
    print(first);
}

/* Tells how it goes: ever more seldom, for lines in Xen's log are slow. */
static inline void report(const char *what, u32 count, u32 noticed)
{
    if ((count & (count - 1)) != 0)
        return;
    print(what);
    print_number(count);
    print(", noticed ");
    print_number(noticed);
    print("\n");
}

static inline void yield(void)
{
    /* A debug build of Xen overwrites the arguments. */
#ifdef __x86_64__
    long result = SCHED_OP, command = SCHEDOP_YIELD, argument = 0;

    __asm__ volatile("vmcall" : "+a"(result), "+D"(command), "+S"(argument) : : "memory");
#else
    int result = SCHED_OP, command = SCHEDOP_YIELD, argument = 0;

    __asm__ volatile("vmcall" : "+a"(result), "+b"(command), "+c"(argument) : : "memory");
#endif
}

#endif
