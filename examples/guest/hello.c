/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest to practise on. It says hello in Xen's log, then calls target() for ever.
 * `target`, `data` and `counter` each have a page of their own (see hello.ld), so that a view can
 * protect or replace one of them and nothing else. Paging is off: addresses are guest-physical.
 */

enum { SCHED_OP = 29, SCHEDOP_YIELD = 0, DEBUG_PORT = 0xe9 };

#define IN(section_name) __attribute__((used, section(section_name)))

IN(".rodata.page") const char data[] = "hello from a PVH guest\n";

IN(".bss.page") volatile unsigned int counter;

IN(".text.page") __attribute__((noinline)) void target(void)
{
    counter++;
}

static void print(const char *text)
{
    for (; *text != '\0'; text++)
        __asm__ volatile("outb %b0, %w1" : : "a"(*text), "d"(DEBUG_PORT));
}

static void yield(void)
{
    int result = SCHED_OP, command = SCHEDOP_YIELD, argument = 0;

    /* A debug build of Xen overwrites the arguments. */
    __asm__ volatile("vmcall" : "+a"(result), "+b"(command), "+c"(argument) : : "memory");
}

__attribute__((noreturn)) void main(void)
{
    print(data);
    for (;;) {
        target();
        yield();
    }
}
