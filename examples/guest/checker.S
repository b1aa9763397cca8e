/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Of checker.c: code of which every byte is known.
 */
#include "guest.h"

        .text
function main
        push %ebx                       /* where the start info is */
        call run
end main

        .section .text.page, "ax", @progbits
function target
        incl counter
        ret
end target

        .balign 16
function patched
        mov $0, %eax
        ret
end patched

        .balign 4096, 0
function target2
        mov $0, %eax
        ret
end target2

        .section .note.GNU-stack, "", @progbits
