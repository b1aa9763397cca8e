/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest in 64-bit mode that makes use of paging as a kernel does. It has its 16 MiB twice, from 0
 * on and in the high half, from HIGH on, where it runs; the first 2 MiB in small pages, the rest in
 * large ones. For ever it makes passes. In each it
 *
 * - goes into each of two address spaces, in which the page at WINDOW is a different one, looks
 *   which one it is, and calls target64();
 * - reads and writes pages at LAZY, which are mapped when that faults, and unmaps them;
 * - writes to a page that is mapped read-only, which faults, and changes it where it is writable;
 * - calls user_main() in ring 3, which calls user_target(), reads from a page of the kernel, which
 *   faults, and comes back by int 0x80.
 *
 * What is not as it should be counts in `noticed`, and nothing is while nobody interferes. Words of
 * 64 bits count `passes`, `calls` of target64(), `user_calls` of user_main(), `page_faults`, and
 * in `page_fault_errors` the same by error code. Each of these words has a gfn of its own, as have
 * target64(), which runs in a large page, and user_main() with user_target().
 */

#include "guest.h"

enum { SPACES = 2, CALLS = 8, LAZY_PAGES = 6, TABLES = 16, ENTRIES = 512 };
enum { DB = 1, BP = 3, PF = 14, EXCEPTIONS = 32 };
enum { PRESENT = 1, WRITABLE = 2, USER = 4, LARGE = 0x80 }; /* the first three of error codes, too */
enum { FAULTS = LAZY_PAGES + 2, PROBE_WRITE = PRESENT | WRITABLE, PROBE_READ = PRESENT | USER };

static const u64 HIGH = 0xffff800000000000, WINDOW = 0xffff808000000000, LAZY = 0xffff810000000000;
static const u64 MEMORY = 16 << 20, LARGE_PAGE = 2 << 20;

struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};

struct __attribute__((packed)) pointer {
    u16 limit;
    void *base;
};

struct gate {
    u16 offset0, selector, type, offset1;
    u32 offset2, reserved;
};

typedef volatile u64 page[ENTRIES];

u64 target64(u64 a, u64 b, u64 c), call_user(u64 a, u64 b, const volatile void *forbidden);
void poke(volatile u64 *at, u64 value), system_call(void);
extern const u8 vectors[], user_main[], user_stack[], peek[], peek_end[], poke_end[];

PAGE volatile u64 passes;
PAGE volatile u64 calls;
PAGE volatile u64 user_calls;
PAGE volatile u64 page_faults;
PAGE volatile u64 page_fault_errors[8];
PAGE volatile u64 noticed;
PAGE page read_only;
PAGE page windows[SPACES];
PAGE page lazy_frames[LAZY_PAGES];
PAGE page roots[SPACES];
PAGE page tables[TABLES];
PAGE u8 kernel_stack[STACK_SIZE];

__attribute__((used)) struct __attribute__((packed)) {
    u32 reserved0;
    u64 rsp[3], reserved1, ist[7], reserved2;
    u16 reserved3, io_map;
} tss;

static u64 gdt[7];
static struct gate idt[SYSTEM_CALL + 1];
static u32 tables_used;

static u64 physical(const volatile void *address)
{
    return (u64)address - HIGH;
}

static volatile u64 *at_physical(u64 address)
{
    return (volatile u64 *)(address + HIGH);
}

/* The entry for an address in the tables of a level (1: small pages, 2: large pages). */
static volatile u64 *entry(volatile u64 *table, u64 address, u32 level)
{
    for (u32 shift = 39;; shift -= 9) {
        volatile u64 *found = &table[address >> shift & (ENTRIES - 1)];

        if (shift == 3 + 9 * level)
            return found;
        if (*found == 0)
            *found = physical(tables[tables_used++]) | PRESENT | WRITABLE | USER;
        table = at_physical(*found & -PAGE_SIZE);
    }
}

static void enter_space(u32 space)
{
    __asm__ volatile("mov %0, %%cr3" : : "r"(physical(roots[space])) : "memory");
}

static void invalidate(u64 address)
{
    __asm__ volatile("invlpg (%0)" : : "r"(address) : "memory");
}

static void expect(u32 fulfilled)
{
    noticed += !fulfilled;
}

static void map_memory(volatile u64 *root, u64 base, u64 user)
{
    for (u64 at = 0; at < LARGE_PAGE; at += PAGE_SIZE)
        *entry(root, base + at, 1) = at | PRESENT | WRITABLE;
    for (u64 at = LARGE_PAGE; at < MEMORY; at += LARGE_PAGE)
        *entry(root, base + at, 2) = at | PRESENT | WRITABLE | LARGE;
    *entry(root, base + (u64)user_main, 1) |= user;
    *entry(root, base + (u64)user_stack, 1) |= user;
}

static void make_tables(void)
{
    map_memory(roots[0], 0, USER);
    map_memory(roots[0], HIGH, 0);
    *entry(roots[0], (u64)read_only, 1) &= ~(u64)WRITABLE;
    *entry(roots[0], LAZY, 1) = 0;      /* so that the spaces share the tables */
    for (u32 i = 0; i < ENTRIES; i++)
        roots[1][i] = roots[0][i];
    for (u32 space = 0; space < SPACES; space++) {
        *entry(roots[space], WINDOW, 1) = physical(windows[space]) | PRESENT | WRITABLE;
        windows[space][0] = space;
    }
}

static struct gate gate(const void *code, u32 ring)
{
    u64 address = (u64)code;

    return (struct gate){ (u16)address, KERNEL_CODE, (u16)(0x8e00 | ring << 13),
                          (u16)(address >> 16), (u32)(address >> 32), 0 };
}

static void make_descriptors(void)
{
    u64 base = (u64)&tss;
    struct pointer gdt_pointer = { sizeof(gdt) - 1, gdt }, idt_pointer = { sizeof(idt) - 1, idt };

    gdt[KERNEL_CODE / 8] = 0x00af9b000000ffff;
    gdt[KERNEL_DATA / 8] = 0x00cf93000000ffff;
    gdt[USER_CODE / 8] = 0x00affb000000ffff;
    gdt[USER_DATA / 8] = 0x00cff3000000ffff;
    gdt[TASK / 8] = (base >> 24 & 0xff) << 56 | 0x89ull << 40 | (base & 0xffffff) << 16 |
                    (sizeof(tss) - 1);
    gdt[TASK / 8 + 1] = base >> 32;
    tss.io_map = sizeof(tss);
    for (u32 vector = 0; vector < EXCEPTIONS; vector++)
        idt[vector] = gate(&vectors[16 * vector], 0);
    idt[SYSTEM_CALL] = gate((const void *)system_call, 3);
    __asm__ volatile("lgdt %0\n\tlidt %1\n\tltr %w2"
                     : : "m"(gdt_pointer), "m"(idt_pointer), "r"(TASK) : "memory");
}

/* Tells whether the fault was meant to happen, after making the guest go on from it. */
static u32 handle_page_fault(struct frame *frame, u64 address)
{
    page_faults++;
    page_fault_errors[frame->error & 7]++;
    if (address >= LAZY && address < LAZY + sizeof(lazy_frames) && !(frame->error & PRESENT)) {
        volatile u64 *lazy = lazy_frames[(address - LAZY) / PAGE_SIZE];

        lazy[0] = address;
        *entry(roots[0], address, 1) = physical(lazy) | PRESENT | WRITABLE;
        return 1;
    }
    if (address != (u64)read_only)
        return 0;
    if (frame->rip == (u64)poke && frame->error == PROBE_WRITE)
        frame->rip = (u64)poke_end;
    else if (frame->rip == (u64)peek && frame->error == PROBE_READ)
        frame->rip = (u64)peek_end;
    else
        return 0;
    return 1;
}

void exception(struct frame *frame);
__attribute__((used)) void exception(struct frame *frame)
{
    u64 address;

    __asm__ volatile("mov %%cr2, %0" : "=r"(address));
    if (frame->vector == PF && handle_page_fault(frame, address))
        return;
    noticed++;
    if (frame->vector == DB || frame->vector == BP)
        return;
    print("paged: ended by exception ");
    print_number((u32)frame->vector);
    print("\n");
    for (;;)
        __asm__ volatile("hlt");
}

static void use_spaces(void)
{
    for (u32 space = 0; space < SPACES; space++) {
        enter_space(space);
        expect(*(volatile u64 *)WINDOW == passes * SPACES + space);
        *(volatile u64 *)WINDOW += SPACES;
        for (u64 n = 0; n < CALLS; n++) {
            expect(target64(n, space, passes) == n + 2 * space + 3 * passes);
            calls++;
        }
    }
}

static void use_lazy_pages(void)
{
    for (u32 i = 0; i < LAZY_PAGES; i++) {
        u64 address = LAZY + (u64)i * PAGE_SIZE;
        volatile u64 *lazy = (volatile u64 *)address;

        if (i % 2 == 0) {
            expect(lazy[0] == address);
        } else {
            lazy[1] = passes;
            expect(lazy_frames[i][1] == passes);
        }
    }
    for (u32 i = 0; i < LAZY_PAGES; i++) {
        *entry(roots[0], LAZY + (u64)i * PAGE_SIZE, 1) = 0;
        invalidate(LAZY + (u64)i * PAGE_SIZE);
    }
}

static void use_read_only_page(void)
{
    volatile u64 *writable = (volatile u64 *)physical(read_only);

    *writable = passes;
    poke(read_only, ~passes);
    expect(read_only[0] == passes);
}

static void use_user_mode(void)
{
    expect(call_user(passes, 3, read_only) == passes + 4 * 3 + 7);
    user_calls++;
}

void run(void);
__attribute__((used, noreturn)) void run(void)
{
    make_tables();
    enter_space(0);
    make_descriptors();
    for (;;) {
        u64 faults = page_faults;

        use_spaces();
        use_lazy_pages();
        use_read_only_page();
        use_user_mode();
        expect(page_faults - faults == FAULTS);
        passes++;
        report("paged: pass ", (u32)passes, (u32)noticed);
        yield();
    }
}
