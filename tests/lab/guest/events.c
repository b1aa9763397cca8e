/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest that causes every kind of vm_event on command. Paging is off: addresses are
 * guest-physical. tests/live/mailbox.py is dom0's side of this protocol.
 *
 * `mailbox` is a page of slots, one per vCPU (struct slot). Dom0 writes `argument` and `value`,
 * then `command`: the address of a function here, all of which are called command_NAME. The vCPU
 * calls it, leaves `answer` and `fault`, and clears `command`. An exception that the command raises
 * ends it, with `fault` = 1 + its vector; traps (#DB, #BP) do not, they are counted and go on.
 * Exceptions that nobody asked for, such as injected ones, are counted and otherwise ignored.
 * Between commands a vCPU advances `heartbeat` and rests a millisecond, to leave dom0 the CPU. With
 * a storm on it only yields, and after each beat calls the function that storms, which `rounds`
 * counts.
 *
 * Of these each has a page of its own: target() counts in `counter`; constant() returns 1;
 * stepped() is xor eax,eax and eight times inc eax, then ret; breakpoint() is int3, then returns
 * 11; `data` is text; `scratch` is zeros that only commands touch; `descriptors` holds GDT and IDT.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum {
    VCPU_OP = 24, VCPUOP_INITIALISE = 0, VCPUOP_UP = 1,
    SCHED_OP = 29, SCHEDOP_YIELD = 0, SCHEDOP_POLL = 3,
    HVM_OP = 34, HVMOP_GET_TIME = 10, HVMOP_GUEST_REQUEST_VM_EVENT = 24,
};
enum { DEBUG_PORT = 0xe9, FLAG_TF = 1 << 8, CR4_OSXSAVE = 1 << 18 };
enum { DB = 1, OF = 4, EXCEPTIONS = 32, OURS = 32, INTERRUPT = 0x40 };
enum { REST = 1000000 }; /* nanoseconds between two beats */
enum { APIC_EOI = 0xb0, APIC_SPURIOUS = 0xf0, APIC_COMMAND = 0x300 };

#define PAGE __attribute__((used, aligned(4096), section(".bss.page")))
#define COMMAND(name) __attribute__((used)) u32 command_##name(u32 argument, u32 low, u32 high)
#define UNUSED (void)argument, (void)low, (void)high

typedef u32 function(void);
typedef u32 command(u32 argument, u32 low, u32 high);

struct slot {
    u32 command;
    u32 argument;
    u32 value[2];
    u32 answer;
    u32 fault;
    u32 heartbeat;
    u32 rounds;
    u32 results[4];         /* of what has more than one: cpuid, rdmsr, wrmsr, xsetbv */
    u32 interrupts;
    u32 last_eip, last_dr6; /* of the latest exception */
    u32 up;
    u32 exceptions[EXCEPTIONS];
    u32 pad[16];
};

struct frame {
    u32 edi, esi, ebp, esp, ebx, edx, ecx, eax, vector, error, eip, cs, eflags;
};

struct __attribute__((packed)) pointer {
    u16 limit;
    void *base;
};

struct vcpu_context { /* vcpu_hvm_context_t of Xen, for a vCPU in 32-bit mode */
    u32 mode, pad0;
    u32 eax, ecx, edx, ebx, esp, ebp, esi, edi, eip, eflags, cr0, cr3, cr4, pad1;
    u64 efer;
    u32 cs_base, ds_base, ss_base, es_base, tr_base;
    u32 cs_limit, ds_limit, ss_limit, es_limit, tr_limit;
    u16 cs_ar, ds_ar, ss_ar, es_ar, tr_ar, pad2[3];
    u64 pad3[4];            /* the 64-bit registers are more */
};

_Static_assert(sizeof(struct slot) == 256, "mailbox.py has it so");

u32 attempt(u32 *stack, command *call, u32 argument, u32 low, u32 high);
void enter(void), target(void);
extern const u8 vectors[];

PAGE volatile struct slot mailbox[VCPUS];
PAGE volatile u32 counter;
PAGE volatile u8 scratch[4096];
PAGE struct {
    u64 gdt[3 + VCPUS];
    u64 idt[INTERRUPT + 1];
} descriptors;
PAGE u8 stacks[VCPUS * STACK_SIZE];

__attribute__((used, section(".page.data"))) const char data[] = "events guest\n";

static u8 tss[VCPUS][104];
static struct {
    function *storm;
    u32 stack;              /* of the command that runs, else null */
    volatile u32 steps;     /* to go by the trap flag */
} vcpus[VCPUS];

struct pointer gdt_pointer, idt_pointer;

static int hypercall(u32 number, u32 first, u32 second, const volatile void *third)
{
    /* A debug build of Xen overwrites the arguments. */
    __asm__ volatile("vmcall"
                     : "+a"(number), "+b"(first), "+c"(second), "+d"(third) : : "memory");
    return (int)number;
}

static u32 this_vcpu(void)
{
    u32 stack;

    __asm__ volatile("mov %%esp, %0" : "=r"(stack));
    return (stack - 1 - (u32)stacks) / STACK_SIZE;
}

static volatile u32 *apic(u32 offset)
{
    return (volatile u32 *)(0xfee00000 + offset);
}

/* Called by what enters on exceptions; returns the stack to go on with, null to return from it. */
u32 exception(struct frame *frame);
__attribute__((used)) u32 exception(struct frame *frame)
{
    u32 id = this_vcpu(), dr6;
    volatile struct slot *slot = &mailbox[id];

    if (frame->vector == OURS) {
        slot->interrupts++;
        *apic(APIC_EOI) = 0;
        return 0;
    }
    __asm__ volatile("mov %%dr6, %0" : "=r"(dr6));
    slot->exceptions[frame->vector]++;
    slot->last_eip = frame->eip;
    slot->last_dr6 = dr6;
    if (frame->vector >= DB && frame->vector <= OF) {
        if (vcpus[id].steps != 0 && --vcpus[id].steps == 0)
            frame->eflags &= ~(u32)FLAG_TF;
        return 0;
    }
    if (vcpus[id].stack != 0)
        slot->fault = frame->vector + 1;
    return vcpus[id].stack;
}

/* Commands. */

COMMAND(ping)
{
    (void)low, (void)high;
    return argument;
}

COMMAND(read)
{
    (void)low, (void)high;
    return *(volatile u32 *)argument;
}

COMMAND(write)
{
    (void)high;
    *(volatile u32 *)argument = low;
    return low;
}

COMMAND(call)
{
    (void)low, (void)high;
    return ((function *)argument)();
}

COMMAND(storm)
{
    (void)low, (void)high;
    vcpus[this_vcpu()].storm = (function *)argument;
    return 0;
}

/* Writes of control registers flip the bits of the argument, and answer with what is then in it. */

#define CONTROL(register)                                                          \
    {                                                                              \
        u32 value;                                                                 \
                                                                                   \
        (void)low, (void)high;                                                     \
        __asm__ volatile("mov %%" register ", %0" : "=r"(value));                  \
        __asm__ volatile("mov %0, %%" register : : "r"(value ^ argument) : "memory"); \
        __asm__ volatile("mov %%" register ", %0" : "=r"(value));                  \
        return value;                                                              \
    }

COMMAND(cr0) CONTROL("cr0")
COMMAND(cr3) CONTROL("cr3")
COMMAND(cr4) CONTROL("cr4")

static u32 xgetbv(volatile u32 *results)
{
    u32 low, high;

    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    results[0] = low;
    results[1] = high;
    return low;
}

static void enable_xsave(void)
{
    u32 value;

    __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    if (!(value & CR4_OSXSAVE))
        __asm__ volatile("mov %0, %%cr4" : : "r"(value | CR4_OSXSAVE));
}

COMMAND(xcr0)
{
    (void)high;
    enable_xsave();
    __asm__ volatile("xsetbv" : : "a"(argument), "d"(low), "c"(0));
    return xgetbv(mailbox[this_vcpu()].results);
}

/* A write that Xen's emulator does not know; the address is a multiple of 64. */
COMMAND(xsave)
{
    (void)low, (void)high;
    enable_xsave();
    __asm__ volatile("xsave (%0)" : : "r"(argument), "a"(~0u), "d"(~0u) : "memory");
    return 0;
}

static u32 rdmsr(u32 msr, volatile u32 *results)
{
    u32 low, high;

    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    results[0] = low;
    results[1] = high;
    return low;
}

COMMAND(rdmsr)
{
    (void)low, (void)high;
    return rdmsr(argument, mailbox[this_vcpu()].results);
}

COMMAND(wrmsr)
{
    __asm__ volatile("wrmsr" : : "c"(argument), "a"(low), "d"(high) : "memory");
    return rdmsr(argument, mailbox[this_vcpu()].results);
}

COMMAND(cpuid)
{
    volatile u32 *results = mailbox[this_vcpu()].results;
    u32 a, b, c, d;

    (void)high;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(argument), "c"(low));
    results[0] = a;
    results[1] = b;
    results[2] = c;
    results[3] = d;
    return a;
}

COMMAND(int3)
{
    UNUSED;
    __asm__ volatile("int3");
    return 0;
}

COMMAND(icebp)
{
    UNUSED;
    __asm__ volatile(".byte 0xf1");
    return 0;
}

/* Raises the argument's number of #DB by the trap flag. */
COMMAND(step)
{
    volatile u32 *steps = &vcpus[this_vcpu()].steps;

    (void)low, (void)high;
    *steps = argument;
    if (argument != 0)
        __asm__ volatile("pushf\n\torl %0, (%%esp)\n\tpopf" : : "i"(FLAG_TF) : "memory", "cc");
    while (*steps != 0)
        ;
    return 0;
}

COMMAND(sgdt)
{
    struct pointer was;

    UNUSED;
    __asm__ volatile("sgdt %0" : "=m"(was));
    return (u32)was.base;
}

COMMAND(sidt)
{
    struct pointer was;

    UNUSED;
    __asm__ volatile("sidt %0" : "=m"(was));
    return (u32)was.base;
}

COMMAND(lgdt)
{
    UNUSED;
    __asm__ volatile("lgdt %0" : : "m"(gdt_pointer));
    return 0;
}

COMMAND(lidt)
{
    UNUSED;
    __asm__ volatile("lidt %0" : : "m"(idt_pointer));
    return 0;
}

COMMAND(sldt)
{
    u32 selector;

    UNUSED;
    __asm__ volatile("sldt %0" : "=r"(selector));
    return selector;
}

COMMAND(str)
{
    u32 selector;

    UNUSED;
    __asm__ volatile("str %0" : "=r"(selector));
    return selector;
}

COMMAND(lldt)
{
    UNUSED;
    __asm__ volatile("lldt %w0" : : "r"(0));
    return 0;
}

COMMAND(ltr)
{
    u32 index = 3 + this_vcpu(), selector = index * 8, was;

    UNUSED;
    descriptors.gdt[index] &= ~(2ull << 40); /* not busy */
    __asm__ volatile("ltr %w1\n\tstr %0" : "=&r"(was) : "r"(selector) : "memory");
    return was;
}

COMMAND(out)
{
    (void)high;
    __asm__ volatile("outb %b0, %w1" : : "a"(low), "d"(argument));
    return 0;
}

COMMAND(in)
{
    u8 value;

    (void)low, (void)high;
    __asm__ volatile("inb %w1, %0" : "=a"(value) : "d"(argument));
    return value;
}

COMMAND(guest_request)
{
    UNUSED;
    return (u32)hypercall(HVM_OP, HVMOP_GUEST_REQUEST_VM_EVENT, 0, 0);
}

/* An interrupt from this vCPU to itself; answers with how many there were so far. */
COMMAND(interrupt)
{
    volatile struct slot *slot = &mailbox[this_vcpu()];
    u32 before = slot->interrupts;

    UNUSED;
    *apic(APIC_SPURIOUS) = 0x1ff;
    *apic(APIC_COMMAND) = 1 << 18 | INTERRUPT;
    for (u32 tries = 0; slot->interrupts == before && tries < 1000; tries++)
        __asm__ volatile("sti\n\tnop\n\tnop\n\tcli" : : : "memory");
    return slot->interrupts;
}

/* Start-up. */

static u64 descriptor(u32 base, u32 limit, u32 flags)
{
    return (u64)(base >> 24) << 56 | (u64)(flags >> 8) << 52 | (u64)(limit >> 16) << 48 |
           (u64)(flags & 0xff) << 40 | (u64)(base & 0xffffff) << 16 | (limit & 0xffff);
}

static u64 gate(const u8 *entry)
{
    u32 address = (u32)entry;

    return (u64)(address >> 16) << 48 | 0x8eull << 40 | (u64)CODE_SELECTOR << 16 |
           (address & 0xffff);
}

static int start(u32 id)
{
    struct vcpu_context context = {
        .eax = id,
        .esp = (u32)stacks + (id + 1) * STACK_SIZE,
        .eip = (u32)enter,
        .cr0 = 1,
        .cs_limit = ~0u, .ds_limit = ~0u, .ss_limit = ~0u, .es_limit = ~0u, .tr_limit = 103,
        .cs_ar = 0xc9b, .ds_ar = 0xc93, .ss_ar = 0xc93, .es_ar = 0xc93, .tr_ar = 0x8b,
    };

    return hypercall(VCPU_OP, VCPUOP_INITIALISE, id, &context) == 0 &&
           hypercall(VCPU_OP, VCPUOP_UP, id, 0) == 0;
}

void prepare(void);
__attribute__((used)) void prepare(void)
{
    descriptors.gdt[CODE_SELECTOR / 8] = descriptor(0, 0xfffff, 0xc9b);
    descriptors.gdt[DATA_SELECTOR / 8] = descriptor(0, 0xfffff, 0xc93);
    for (u32 id = 0; id < VCPUS; id++)
        descriptors.gdt[3 + id] = descriptor((u32)tss[id], sizeof(tss[id]) - 1, 0x89);
    for (u32 vector = 0; vector < EXCEPTIONS; vector++)
        descriptors.idt[vector] = gate(&vectors[16 * vector]);
    descriptors.idt[INTERRUPT] = gate(&vectors[16 * OURS]);
    gdt_pointer = (struct pointer){ sizeof(descriptors.gdt) - 1, descriptors.gdt };
    idt_pointer = (struct pointer){ sizeof(descriptors.idt) - 1, descriptors.idt };
    for (const char *text = data; *text != '\0'; text++)
        __asm__ volatile("outb %b0, %w1" : : "a"(*text), "d"(DEBUG_PORT));
}

/* Polls no ports, until the time is over. */
static void rest(void)
{
    u64 now;
    struct {
        void *ports;
        u32 count;
        u64 until;
    } poll = { 0, 0, 0 };

    hypercall(HVM_OP, HVMOP_GET_TIME, (u32)&now, 0);
    poll.until = now + REST;
    hypercall(SCHED_OP, SCHEDOP_POLL, (u32)&poll, 0);
}

__attribute__((used, noreturn)) void run(u32 id);
void run(u32 id)
{
    volatile struct slot *slot = &mailbox[id];

    if (id == 0)
        for (u32 other = 1; other < VCPUS && start(other); other++)
            ;
    slot->up = 1;
    for (;;) {
        slot->heartbeat++;
        if (vcpus[id].storm != 0) {
            vcpus[id].storm();
            slot->rounds++;
        }
        if (slot->command != 0) {
            slot->fault = 0;
            slot->answer = attempt(&vcpus[id].stack, (command *)slot->command, slot->argument,
                                   slot->value[0], slot->value[1]);
            slot->command = 0;
        }
        if (vcpus[id].storm != 0)
            hypercall(SCHED_OP, SCHEDOP_YIELD, 0, 0);
        else
            rest();
    }
}
