/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest that looks for signs of an observer, as software that does not want to be watched does.
 * For ever it makes passes. In each it
 *
 * - rewrites the operand of patched(), which shares the page of target(), and calls it; now and
 *   then also that of target2(), whose first instruction it is part of;
 * - calls target(), which counts in `counter`, and compares with how often it has;
 * - reads the first instruction of target(), byte by byte and in one go;
 * - sums its code up, the head of each page, and now and then whole pages;
 * - reads the gfns behind each range of the memory map, for pages that somebody has added: where
 *   there is nothing, all bits are ones.
 *
 * What is not as it should be counts in `noticed`: nothing is while nobody interferes. target(),
 * target2(), `counter`, `calls`, `noticed` and `holes` have pages of their own. Paging is off.
 */

#include "guest.h"

enum { CALLS = 16, SELDOM = 16, HEAD = 64, BEHIND = 64, HOLES = 8 * BEHIND };
enum { GFNS = 1 << 20 /* of 4 GiB */, OPERAND = 1 /* follows the opcode of mov */ };

struct start_info {
    u32 magic, version, flags, modules;
    u64 module_list, command_line, rsdp, map;
    u32 ranges, reserved;
};

struct range {
    u64 start, size;
    u32 type, reserved;
};

struct page {
    volatile u32 *words;
    u32 head, whole;            /* what they summed up to at the start */
};

typedef u32 function(void);

u32 _start(void), target(void), patched(void), target2(void);

PAGE volatile u32 counter;
PAGE volatile u32 calls;
PAGE volatile struct {
    u32 checksum, read, scan, modify, calls, passes;
} noticed;
PAGE volatile struct {
    u32 count, gfns[HOLES];
} holes;

static struct page pages[3];

static u32 checksum(const struct page *page, u32 bytes)
{
    u32 sum = 0;

    for (u32 i = 0; i < bytes / sizeof(u32); i++)
        sum = (sum << 1 | sum >> 31) ^ page->words[i];
    return sum;
}

static u32 is_known(const struct start_info *info, u64 gfn)
{
    const struct range *ranges = (const struct range *)(u32)info->map;
    u64 address = gfn * PAGE_SIZE;

    for (u32 i = 0; i < info->ranges; i++)
        if (address >= ranges[i].start && address < ranges[i].start + ranges[i].size)
            return 1;
    for (u32 i = 0; i < holes.count; i++)
        if (holes.gfns[i] == gfn)
            return 1;
    return gfn >= GFNS;
}

static void find_holes(const struct start_info *info)
{
    const struct range *ranges = (const struct range *)(u32)info->map;

    for (u32 i = 0; i < info->ranges; i++) {
        u64 end = (ranges[i].start + ranges[i].size + PAGE_SIZE - 1) / PAGE_SIZE;

        for (u64 gfn = end; gfn < end + BEHIND && holes.count < HOLES; gfn++)
            if (!is_known(info, gfn))
                holes.gfns[holes.count++] = (u32)gfn;
    }
}

/* Leaves the code as it was, for the checksums. */
static u32 wrong_when_modified(function *code, u32 operand)
{
    volatile u32 *at = (volatile u32 *)((u32)code + OPERAND);
    u32 result;

    *at = operand;
    result = code();
    *at = 0;
    return result != operand || code() != 0;
}

static u32 wrong_first_instruction(void)
{
    union {
        u8 bytes[6];
        struct __attribute__((packed)) { /* incl counter */
            u16 opcode;
            volatile u32 *address;
        } fields;
    } expected = { .fields = { 0x05ff, &counter } }, copy;
    const volatile u8 *bytes = (const volatile u8 *)target;
    const void *from = (const void *)target;
    void *to = &copy;
    u32 length = sizeof(copy), wrong = 0;

    __asm__ volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(length) : : "memory");
    for (u32 i = 0; i < sizeof(copy); i++)
        wrong |= bytes[i] != expected.bytes[i] || copy.bytes[i] != expected.bytes[i];
    return wrong;
}

static void pass(void)
{
    u32 number = noticed.passes, now_and_then = number % SELDOM == 0, before, wrong;

    wrong = wrong_when_modified(patched, number + 1);
    if (now_and_then)
        wrong |= wrong_when_modified(target2, number + 1);
    noticed.modify += wrong;

    before = counter;
    for (u32 i = 0; i < CALLS; i++) {
        target();
        calls++;
    }
    noticed.calls += counter - before != CALLS;

    noticed.read += wrong_first_instruction();

    wrong = 0;
    for (u32 i = 0; i < 3; i++) {
        wrong |= checksum(&pages[i], HEAD) != pages[i].head;
        if (now_and_then)
            wrong |= checksum(&pages[i], PAGE_SIZE) != pages[i].whole;
    }
    noticed.checksum += wrong;

    wrong = 0;
    for (u32 i = 0; i < holes.count; i++)
        wrong |= *(volatile u32 *)(holes.gfns[i] * PAGE_SIZE) != ~0u;
    noticed.scan += wrong;

    noticed.passes++;
}

__attribute__((used, noreturn)) void run(const struct start_info *info);
void run(const struct start_info *info)
{
    function *code[] = { _start, target, target2 };

    for (u32 i = 0; i < 3; i++) {
        pages[i].words = (volatile u32 *)((u32)code[i] & -PAGE_SIZE);
        pages[i].head = checksum(&pages[i], HEAD);
        pages[i].whole = checksum(&pages[i], PAGE_SIZE);
    }
    find_holes(info);
    for (;;) {
        pass();
        report("checker: pass ", noticed.passes,
               noticed.checksum + noticed.read + noticed.scan + noticed.modify + noticed.calls);
        yield();
    }
}
