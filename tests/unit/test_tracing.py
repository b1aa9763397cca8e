# SPDX-License-Identifier: LGPL-2.1-or-later
"""Traces of programs that gcc has made: every call that comes back is a return, and no other."""

from __future__ import annotations

import inspect
import itertools
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.handles.memory import table_address
from xenaltp2m.tools.symbols import Image, Symbol, Symbols
from xenaltp2m.tools.tracing import Call, Return, Trace

from .machinecode import CODE, HALT, Computer

BITS = pytest.mark.parametrize("bits", [32, 64])
TEXT = 0x100000
PLAIN = """
#define APART __attribute__((noipa))
"""
OPTIONS = [
    "-O2", "-ffreestanding", "-fno-pie", "-no-pie", "-nostdlib", "-static", "-fcf-protection=none",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-mgeneral-regs-only",
    f"-Wl,-Ttext={TEXT:#x},--build-id=none,-e,run,-z,noseparate-code",
]  # fmt: skip
# setjmp and longjmp of the psABI's registers; `jump` is not told apart from a return by the CPU.
JUMPS = {
    32: """
__asm__(".globl setjmp, longjmp, save; save: setjmp: mov 4(%esp), %eax; mov %ebx, (%eax);"
        "mov %esi, 4(%eax); mov %edi, 8(%eax); mov %ebp, 12(%eax); lea 4(%esp), %ecx;"
        "mov %ecx, 16(%eax); mov (%esp), %ecx; mov %ecx, 20(%eax); xor %eax, %eax; ret;"
        "longjmp: mov 4(%esp), %edx; mov 8(%esp), %eax; mov (%edx), %ebx; mov 4(%edx), %esi;"
        "mov 8(%edx), %edi; mov 12(%edx), %ebp; mov 16(%edx), %esp; jmp *20(%edx);"
        ".size setjmp, longjmp - setjmp; .type setjmp, @function");
""",
    64: """
__asm__(".globl setjmp, longjmp, save; save: setjmp: mov %rbx, (%rdi); mov %rbp, 8(%rdi);"
        "mov %r12, 16(%rdi); mov %r13, 24(%rdi); mov %r14, 32(%rdi); mov %r15, 40(%rdi);"
        "lea 8(%rsp), %rdx; mov %rdx, 48(%rdi); mov (%rsp), %rdx; mov %rdx, 56(%rdi);"
        "xor %eax, %eax; ret;"
        "longjmp: mov %esi, %eax; mov (%rdi), %rbx; mov 8(%rdi), %rbp; mov 16(%rdi), %r12;"
        "mov 24(%rdi), %r13; mov 32(%rdi), %r14; mov 40(%rdi), %r15; mov 48(%rdi), %rsp;"
        "jmp *56(%rdi); .size setjmp, longjmp - setjmp; .type setjmp, @function");
""",
}
JUMPING = """
typedef long state[8];
__attribute__((returns_twice)) int setjmp(long *);
__attribute__((noreturn)) void longjmp(long *, int);
"""
BEGIN = 'APART void run(void) { work(); __asm__ volatile("cli; hlt"); __builtin_unreachable(); }'


class Program:
    """A program on a machine that has not begun."""

    def __init__(self, path: Path, source: str, bits: int, stack: ExitStack, *options: str) -> None:
        made = path / "program.elf"
        subprocess.run(
            ["gcc", f"-m{bits}", *OPTIONS, *options, "-x", "c", "-", "-o", str(made)],
            input=PLAIN + source + BEGIN, text=True, check=True,
        )  # fmt: skip
        self.image = Image.open(made)
        self.host = MockBackend((4, 17), memory_pages=1 << 13)
        memory = {one.address: one.data.ljust(one.size, b"\0") for one in self.image.segments}
        self.computer = Computer(b"\xf4", memory, host=self.host, vcpus=2)
        if bits == 64:
            self.computer.go_long()
        self.computer.describe()
        # As after the CALL of an entry point: gcc counts on the stack's alignment.
        self.computer.set(rip=self.image.address("run"), rsp=self.computer.register("rsp") & ~15)
        self.xen = stack.enter_context(xa.connect(self.host))
        self.dom = stack.enter_context(self.xen.domain(self.computer.domid))

    def trace(self, *names: str, arguments: int = 0) -> Trace:
        return xa.Trace(self.dom, *names, symbols=self.image, arguments=arguments, returns=True)

    def seen(self, trace: Trace) -> list[str]:
        """Run to the end: ``+name`` for a call, ``-name`` for a return, as they come."""
        self.host.steps_at_once = 200
        found = []
        for one in trace.calls():
            call = one if isinstance(one, Call) else one.call
            found.append(f"+{call.name}" if isinstance(one, Call) else f"-{call.name}")
        assert self.computer.vector is None
        assert trace.ended is not None
        return found


Make = Callable[..., Program]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda source, bits, *options: Program(tmp_path, source, bits, stack, *options)


@BITS
def test_fault_12_a_tail_call_returns_from_both(make: Make, bits: int) -> None:
    program = make(
        """
        APART int inner(int x) { return 2 * x; }
        APART int outer(int x) { return inner(x + 1); }
        int sum;
        APART void work(void) { sum += outer(1); sum += outer(5); sum += inner(7); }
        """,
        bits,
    )
    with program.trace("outer", "inner") as trace:
        program.host.steps_at_once = 200
        seen = list(trace.calls())
        assert trace.unfinished == trace.waiting == 0
    assert [
        (type(one), one.name) if isinstance(one, Call) else (type(one), one.call.name, one.value)
        for one in seen
    ] == [
        (Call, "outer"), (Call, "inner"), (Return, "inner", 4), (Return, "outer", 4),
        (Call, "outer"), (Call, "inner"), (Return, "inner", 12), (Return, "outer", 12),
        (Call, "inner"), (Return, "inner", 14),
    ]  # fmt: skip


@BITS
@pytest.mark.parametrize("names", [("even", "odd"), ("even",), ("odd",)])
def test_fault_12_sibling_recursion(make: Make, bits: int, names: tuple[str, ...]) -> None:
    """even(10) jumps to odd(9), and so on: eleven calls that have one return address."""
    program = make(
        """
        int odd(unsigned n);
        APART int even(unsigned n) { return n ? odd(n - 1) : 1; }
        APART int odd(unsigned n) { return n ? even(n - 1) : 0; }
        int sum;
        APART void work(void) { for (int i = 0; i < 3; i++) sum += even(10); }
        """,
        bits,
    )
    called = [name for name in ("even", "odd") * 5 + ("even",) if name in names]
    with program.trace(*names) as trace:
        seen = program.seen(trace)
        assert trace.unfinished == trace.waiting == 0
    assert seen == [*(f"+{one}" for one in called), *(f"-{one}" for one in reversed(called))] * 3


@BITS
def test_fault_12_recursion_by_calls(make: Make, bits: int) -> None:
    program = make(
        """
        APART int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
        int sum;
        APART void work(void) { sum = fib(6); }
        """,
        bits,
        "-O1",
    )
    with program.trace("fib", arguments=1) as trace:
        program.host.steps_at_once = 200
        seen = list(trace.calls())
        assert trace.unfinished == trace.waiting == 0
    fib = [0, 1, 1, 2, 3, 5, 8]
    returns = [one for one in seen if isinstance(one, Return)]
    assert len(returns) == len(seen) - len(returns) == 25
    assert all(one.value == fib[one.call.arguments[0] & 0xFF] for one in returns)


LEFT = """
state around; int sum;
APART void inner(int x) { if (x & 1) longjmp(around, x); sum += x; }
APART void outer(int x) { inner(x); sum++; }
APART void work(void)
{
    for (volatile int i = 0; i < 6; i++)
        if (!setjmp(around)) outer(i);
}
"""


@BITS
def test_fault_12_frames_that_longjmp_leaves(make: Make, bits: int) -> None:
    """Each second time outer and inner do not come back: the next call of outer shows it."""
    program = make(JUMPING + JUMPS[bits] + LEFT, bits)
    with program.trace("outer", "inner") as trace:
        seen = program.seen(trace)
        assert seen == ["+outer", "+inner", "-inner", "-outer", "+outer", "+inner"] * 3
        assert (trace.unfinished, trace.waiting) == (4, 2)
        assert trace.hits.total() == 12


@BITS
def test_fault_12_the_return_of_a_caller_ends_the_frames_below(make: Make, bits: int) -> None:
    program = make(
        JUMPING
        + JUMPS[bits]
        + """
        state around; int sum;
        APART void inner(int x) { longjmp(around, x); }
        APART void outer(int x) { inner(x); sum++; }
        APART int whole(int x) { if (!setjmp(around)) outer(x); return x; }
        APART void work(void) { sum += whole(1); }
        """,
        bits,
    )
    with program.trace("whole", "outer", "inner") as trace:
        assert program.seen(trace) == ["+whole", "+outer", "+inner", "-whole"]
        assert (trace.unfinished, trace.waiting) == (2, 0)


@BITS
def test_fault_12_a_function_that_returns_twice(make: Make, bits: int) -> None:
    """setjmp comes back once for its call, and once for each longjmp."""
    program = make(JUMPING + JUMPS[bits] + LEFT, bits)
    with program.trace("setjmp") as trace:
        program.host.steps_at_once = 200
        seen = list(trace.calls())
        assert (trace.unfinished, trace.waiting) == (0, 0)
    shown = [one.value if isinstance(one, Return) else None for one in seen]
    assert shown == [None, 0, None, 0, 1, None, 0, None, 0, 3, None, 0, None, 0, 5]
    for call, back in itertools.pairwise(seen):
        if isinstance(call, Call) and isinstance(back, Return):
            assert back.call is call


def test_fault_12_a_function_that_takes_its_arguments_off_the_stack(make: Make) -> None:
    """``ret n``: 4 for a structure that is returned (System V ABI, i386); all of stdcall's."""
    program = make(
        """
        struct three { int a, b, c; };
        int sum;
        APART struct three makes(int x) { return (struct three){x, 2 * x, 3 * x}; }
        __attribute__((stdcall)) APART int both(int x, int y) { return x - y; }
        APART void work(void) { sum = makes(4).c; sum += both(9, 2); sum += both(3, 1); }
        """,
        32,
    )
    with program.trace("makes", "both") as trace:
        assert program.seen(trace) == ["+makes", "-makes", "+both", "-both", "+both", "-both"]
        assert trace.unfinished == trace.waiting == 0


@BITS
def test_fault_12_calls_through_the_same_place_by_pointer(make: Make, bits: int) -> None:
    program = make(
        """
        APART int one(int x) { return x; }
        APART int two(int x) { return one(x + 1); }
        int (*volatile table[])(int) = {one, two, one, two};
        int sum;
        APART void work(void) { for (int i = 0; i < 4; i++) sum += table[i](i); }
        """,
        bits,
    )
    with program.trace("one", "two") as trace:
        seen = program.seen(trace)
        assert trace.unfinished == trace.waiting == 0
    assert seen == ["+one", "-one", "+two", "+one", "-one", "-two"] * 2


@pytest.mark.parametrize("before", [0, 2048, 4093])
def test_fault_12_calls_from_a_page_s_ends(make: Make, before: int) -> None:
    """The CALL of each has a breakpoint; it stays where to remove it concerns another page."""
    program = make(
        f"""
        int calls;
        APART int f(int n) {{ return calls += n; }}
        int again(int n);
        __asm__(".balign 4096; .skip {before}, 0x90; again: call f; ret");
        APART void work(void) {{ for (int i = 1; i < 4; i++) again(i); }}
        """,
        64,
    )
    with program.trace("f") as trace:
        assert program.seen(trace) == ["+f", "-f"] * 3
        assert (trace.unfinished, trace.waiting) == (0, 0)
        assert len(trace._breakpoints) == (2 if before == 2048 else 3)


def test_fault_12_what_waits_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more calls than may wait, the first ones are given up, and counted."""
    monkeypatch.setattr("xenaltp2m.tools.tracing.stacks._MOST_WAITING", 8)
    program = make(
        """
        APART int down(int n) { int of = n ? down(n - 1) : 0; __asm__ volatile(""); return of + n; }
        int odd(unsigned n);
        APART int even(unsigned n) { return n ? odd(n - 1) : 1; }
        APART int odd(unsigned n) { return n ? even(n - 1) : 0; }
        int sum;
        APART void work(void) { sum += down(20); sum += even(20); }
        """,
        32,
    )
    with program.trace("down", "even", "odd", arguments=1) as trace:
        program.host.steps_at_once = 200
        seen = list(trace.calls())
        assert (trace.unfinished, trace.waiting) == (2 * 13, 0)
    back = [(one.call.name, one.call.arguments[0]) for one in seen if isinstance(one, Return)]
    assert back == [
        *(("down", n) for n in range(8)),
        *(("odd" if n % 2 else "even", n) for n in range(8)),
    ]


@pytest.mark.parametrize("returns_to", [0x3FFFF000, 0xFEE00000], ids=["hole", "no memory"])
def test_fault_12_a_return_address_that_is_none(make: Make, returns_to: int) -> None:
    """A guest puts there what it likes: such a call is told, and its return not waited for."""
    program = make(
        f"""
        APART void odd(void) {{ __asm__ volatile(""); }}
        APART void work(void)
        {{ __asm__ volatile("push ${returns_to:#x}; jmp 1f; 1: jmp odd2; odd2: jmp enter"); }}
        __asm__(".globl enter; enter: mov $1, %eax; cli; hlt");
        """,
        32,
    )
    with program.trace("enter") as trace:
        assert program.seen(trace) == ["+enter"]
        assert (trace.unfinished, trace.waiting) == (1, 0)


def test_fault_12_a_callback_that_raises(make: Make) -> None:
    """Of two calls that return at once the one is told, and the other counted."""
    program = make(
        """
        APART int inner(int x) { return 2 * x; }
        APART int outer(int x) { return inner(x + 1); }
        int sum;
        APART void work(void) { sum += outer(1); }
        """,
        32,
    )
    told: list[str] = []

    def take(seen: Call | Return) -> None:
        if isinstance(seen, Call):
            return
        told.append(seen.call.name)
        raise RuntimeError("enough")

    with program.trace("outer", "inner") as trace:
        program.host.steps_at_once = 200
        with pytest.raises(RuntimeError, match="enough"):
            trace.run(take)
        trace.run(take)
        assert (told, trace.unfinished, trace.waiting) == (["inner"], 1, 0)


def test_fault_12_limit_code_that_longjmp_comes_back_to_joins_the_return(make: Make) -> None:
    """A limit that docs/breakpoints.md names: nothing tells this jump from a return."""
    program = make(
        JUMPING
        + JUMPS[64]
        + """
        state around;
        APART void outer(void) { longjmp(around, 7); }
        __asm__("work: sub $8, %rsp; mov $around, %edi; call setjmp; test %eax, %eax; jnz 1f;"
                "call outer; 1: add $8, %rsp; ret");
        void work(void);
        """,
        64,
    )
    with program.trace("outer") as trace:
        assert program.seen(trace) == ["+outer", "-outer"]


def test_fault_12_limit_calls_by_pointer_that_are_left(make: Make) -> None:
    """The other one: longjmp leaves the first call, and the second seems to be its tail call."""
    program = make(
        JUMPING
        + JUMPS[64]
        + """
        state around; int calls;
        APART void outer(void) { if (!calls++) longjmp(around, 7); }
        void (*pointer)(void) = outer;
        __asm__("work: sub $8, %rsp; mov $around, %edi; call setjmp; call *pointer;"
                "add $8, %rsp; ret");
        void work(void);
        """,
        64,
    )
    with program.trace("outer") as trace:
        assert program.seen(trace) == ["+outer", "+outer", "-outer", "-outer"]
        assert (trace.unfinished, trace.waiting) == (0, 0)


CALLS_BY_TABLES = """
APART int f(int n) { __asm__ volatile(""); return n; }
APART void by(long cr3) { __asm__ volatile("mov %0, %%cr3" :: "r"(cr3) : "memory"); f(0); }
APART void work(void) { by(0x60000); by(0x6a000); by(0x6b000); }
"""


def test_fault_14_two_page_tables_of_one_process(make: Make) -> None:
    """Page-table isolation: the kernel's table has the user half, too, which it may not execute."""
    program = make(CALLS_BY_TABLES, 64)
    [entry] = struct.unpack("<Q", program.computer.read(0x60000, 8))
    kernel, other = 0x6C000, 0x6A000  # 0x6b000: as the first, but leads on by other tables
    program.computer.write(kernel, struct.pack("<Q", entry | 1 << 63 | 1 << 5))
    program.computer.write(kernel + 2048, struct.pack("<Q", 0x1234_5003))
    program.computer.write(other, struct.pack("<Q", entry))
    program.computer.write(other + 8, struct.pack("<Q", entry))  # more than the process has
    program.computer.write(0x6D000, program.computer.read(0x61000, 4096))
    program.computer.write(0x6B000, struct.pack("<Q", 0x6D000 | entry & 0xFFF))
    with xa.Trace(program.dom, "f", symbols=program.image, cr3=kernel | 0x801) as trace:
        program.host.steps_at_once = 200
        seen = [one for one in trace.calls() if isinstance(one, Call)]
        assert trace.hits == {"f": 3}
    assert [call.cr3 for call in seen] == [0x60000]


def test_fault_14_a_vcpu_with_the_user_s_page_tables(make: Make) -> None:
    """Page-table isolation: they do not have the kernel's functions, the tables before do."""
    program = make("APART int f(int n) { return n; } APART void work(void) { f(1); }", 64)
    upper = 0xFFFF_8000_0000_0000
    kernel, user = 0x6A000, 0x6B000
    [entry] = struct.unpack("<Q", program.computer.read(0x60000, 8))
    program.computer.write(user, struct.pack("<Q", entry))
    program.computer.write(kernel, struct.pack("<Q", entry | 1 << 63))
    program.computer.write(kernel + 2048, struct.pack("<Q", entry))
    program.computer.set(cr3=user)
    address = upper + program.image.address("f")
    symbols = Symbols([(address, 3, Symbol("f", address, 1))], "kernel")
    assert program.dom.memory.kernel_space(program.dom.registers()).read(address, 1) != b"\0"
    with xa.Trace(program.dom, "f", symbols=symbols, trust=True) as trace:
        assert program.seen(trace) == ["+f"]


def test_fault_14_tables_that_lie_in_one_page() -> None:
    """Outside long mode PAE's tables have 32 bytes: Linux for i386 has many in a page."""
    program = Computer(HALT)
    program.set(cr4=1 << 5, cr3=0x5040)
    with xa.connect(program.host) as xen, xen.domain(program.domid) as dom:
        registers = dom.registers()
    assert table_address(registers, 0x5040) != table_address(registers, 0x5060)
    assert table_address(registers, 0x5058) == 0x5040


def test_fault_14_vcpu_0_is_down(make: Make) -> None:
    program = make(
        "int sum; APART int f(int n) { return sum += n; } APART void work(void) { f(1); }", 64
    )
    first, second = program.computer.vcpus
    second.online, first.online = True, False
    second.context[:] = first.context
    linear = program.image.address("f")
    assert program.dom.memory.address_space().translate(linear).physical == linear
    assert program.dom.registers().cr3 == 0x60000
    with program.trace("f", arguments=1) as trace:
        assert program.seen(trace) == ["+f", "-f"]


def test_fault_14_no_vcpu_is_up(make: Make) -> None:
    program = make('APART void f(void) { __asm__(""); } APART void work(void) { f(); }', 64)
    with program.trace("f") as trace:
        assert program.seen(trace) == ["+f", "-f"]
    for ask in (
        program.dom.registers,
        program.dom.memory.address_space,
        lambda: program.trace("f"),
    ):
        program.computer.vcpu.online = False
        with pytest.raises(xa.XenError, match="has no vCPU that is online: it powered off"):
            ask()
    assert not program.dom.altp2m_active


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"symbols": "file"}, r"symbols must be the result of Symbols.open\('file'\)"),
        ({"symbols": None}, "symbols must be the result of Symbols.open, not None"),
        ({"arguments": -1}, "the number of arguments must be 0 to 256.*not -1"),
        ({"arguments": 257}, "the number of arguments must be 0 to 256.*not 257"),
        ({"arguments": True}, "the number of arguments.*not True"),
        ({"arguments": "2"}, "the number of arguments.*not '2'"),
        ({"arguments": {"f": -1}}, "the number of arguments.*not -1"),
        ({"arguments": {"g": 1}}, "arguments of 'g' are requested, but it is not traced"),
        ({"most_per_second": -1}, "most_per_second must be a number above 0, or None, not -1"),
        ({"most_per_second": 0}, "most_per_second.*not 0"),
        ({"most_per_second": "5"}, "most_per_second.*not '5'"),
        ({"most_per_second": float("nan")}, "most_per_second.*not nan"),
        ({"cr3": "5"}, "cr3 must be a value of CR3, or several, not '5'"),
        ({"cr3": ["5"]}, "cr3 must be a value.*not '5'"),
        ({"cr3": 1.0}, "cr3 must be a value.*not 1.0"),
        ({"cr3": 1 << 64}, "cr3 must be a value"),
        ({"cr3": []}, "cr3 names no page tables"),
    ],
)
def test_fault_27_options_of_a_trace(make: Make, options: dict[str, Any], what: str) -> None:
    program = make('APART void f(void) { __asm__(""); } APART void work(void) { f(); }', 32)
    with pytest.raises(xa.InvalidArgumentError, match=what):
        xa.Trace(program.dom, "f", **{"symbols": program.image, **options})
    with pytest.raises(xa.InvalidArgumentError, match=r"named by a string, not \['f'\]"):
        xa.Trace(program.dom, ["f"], symbols=program.image)  # type: ignore[arg-type]
    assert not program.dom.altp2m_active


def test_fault_27_callbacks_of_a_trace(make: Make) -> None:
    async def later(seen: Call | Return) -> None:
        raise AssertionError(seen)

    program = make('APART void f(void) { __asm__(""); } APART void work(void) { f(); }', 32)
    with program.trace("f") as trace:
        with pytest.raises(xa.InvalidArgumentError, match="is async"):
            trace.run(later)
        with pytest.raises(xa.InvalidArgumentError, match="a callback must be callable, not 'f'"):
            trace.run("f")  # type: ignore[arg-type]


def test_fault_28_options_are_typed() -> None:
    taken = inspect.get_annotations(Trace.__init__)
    assert {"symbols", "arguments", "returns", "cr3", "trust"} <= taken.keys()
    assert not [name for name, kind in taken.items() if "Any" in kind]


def test_fault_02_a_stack_segment_with_a_base() -> None:
    """push $7; call; hlt: the return address is where SS begins, and esp."""
    base, top = 0x2_0008, 0x1000
    function = CODE + 8
    host = MockBackend((4, 17), memory_pages=1 << 13)
    computer = Computer(b"\x6a\x07" + b"\xe8\x01\0\0\0" + HALT + b"\x40\xc3", host=host)
    computer.describe()
    computer.set(rax=5, ss_base=base, rsp=top)
    symbols = Symbols([(function, 1, Symbol("function", function, 2))], "by hand")
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        Trace(dom, "function", symbols=symbols, arguments=1, returns=True, trust=True) as trace,
    ):
        host.steps_at_once = 200
        [call, came_back] = trace.calls(timeout=0.01)
    assert isinstance(call, Call)
    assert (call.stack, call.caller, call.arguments) == (base + top - 8, CODE + 7, (7,))
    assert isinstance(came_back, Return)
    assert came_back.value == 6
