/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest to practise on. It says hello in Xen's log, then calls target() for ever.
 * `target`, `data` and `counter` each have a page of their own (see flat.ld), so that a view can
 * protect or replace one of them and nothing else. Paging is off: addresses are guest-physical.
 */

#include "guest.h"

IN(".rodata.page") const char data[] = "hello from a PVH guest\n";

IN(".bss.page") volatile unsigned int counter;

IN(".text.page") __attribute__((noinline)) void target(void)
{
    counter++;
}

__attribute__((noreturn)) void main(void)
{
    print(data);
    for (;;) {
        target();
        yield();
    }
}
