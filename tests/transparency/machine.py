# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a program in a domain that has tests/lab/guest/programs.elf, on the mock or on real Xen."""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.abi.x86 import repeated
from xenaltp2m.tools.symbols import Image
from xenaltp2m.types import PAGE_SIZE

from .programs import (
    ALIAS,
    CODE_SEGMENT,
    CONTROL,
    DATA_SEGMENT,
    FIRST_TASK,
    FLAT_CODE,
    FLAT_DATA,
    GDT,
    IDT,
    LOG_BYTES,
    LOG_ENTRY,
    LOGS,
    LONG_CODE,
    MEMORY_END,
    MOST_EXCEPTIONS,
    OWN_STACKS,
    STACK_SEGMENT,
    TABLES,
    TASK_BYTES,
    TASKS,
    VECTORS,
    Mode,
    Part,
    Program,
)

IMAGE = Path("tests/lab/guest/programs.elf")
FIRST, LAST = GDT, MEMORY_END
"""The memory that a program uses, its tables among it."""
PATIENCE = 2.0
"""Seconds in which something must happen."""
STEPS = 5
"""How many debug exceptions a program may raise by TF before it is cleared."""
_RUNNING = 1
_DR6_BS = 1 << 14
_PE, _MP, _ET, _NE, _WP, _PG = (1 << bit for bit in (0, 1, 4, 5, 16, 31))
_PAE, _OSFXSR, _OSXMMEXCPT, _OSXSAVE = (1 << bit for bit in (5, 9, 10, 18))
_LME_LMA = 1 << 8 | 1 << 10
_PRESENT_WRITABLE, _LARGE = 3, 0x80
_ONE_TABLE = 512 * PAGE_SIZE
_REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")

_STEP = xa.Response.singlestep()

Handler = Callable[[xa.Event], xa.Response | None]


class Stuck(Exception):
    """A program did not end."""


@dataclass
class Outcome:
    """What a program has left.

    Attributes:
        memory: All that it used, from :data:`FIRST` on.
        trace: Where each instruction was, of each vCPU, if it was stepped.
    """

    memory: bytes
    trace: dict[int, list[int]]


def _descriptor(base: int, flags: int) -> bytes:
    """A segment of 4 GiB."""
    low = 0xFFFF | (base & 0xFFFFFF) << 16 | 0xF << 48
    return struct.pack("<Q", low | flags << 40 | base >> 24 << 56)


def _tables(program: Program, image: Image) -> dict[int, bytes]:
    """GDT, IDT, TSSs and page tables."""
    big, code_16 = 0xC0, program.mode is Mode.BASED_16
    gdt = bytes(8) + b"".join(
        [
            _descriptor(0, 0x9B | big << 8),
            _descriptor(0, 0x93 | big << 8),
            _descriptor(0, 0x9B | 0xA0 << 8),
            _descriptor(program.code_base, 0x9B | (0x80 if code_16 else big) << 8),
            _descriptor(program.data_base, 0x93 | big << 8),
            _descriptor(program.stack_base, 0x93 | big << 8),
        ]
    )
    gdt = gdt.ljust(FIRST_TASK, b"\0")
    for vcpu in range(2):
        base = TASKS + vcpu * TASK_BYTES
        gdt += struct.pack("<QQ", 103 | (base & 0xFFFFFF) << 16 | 0x8B << 40 | base >> 24 << 56, 0)
    long = program.mode.is_long
    idt, first = b"", image.address("vectors64" if long else "vectors32")
    for entry in range(first, first + 16 * VECTORS, 16):
        selector = LONG_CODE if long else FLAT_CODE
        idt += struct.pack("<HHHH", entry & 0xFFFF, selector, 0x8E00, entry >> 16)
        idt += bytes(8 * long)
    found = {GDT: gdt, IDT: idt}
    if long:
        root, pointers, directory, small = (TABLES + n * PAGE_SIZE for n in range(4))
        found[root] = struct.pack("<Q", pointers | _PRESENT_WRITABLE)
        found[pointers] = struct.pack("<Q", directory | _PRESENT_WRITABLE)
        again = small | _PRESENT_WRITABLE
        assert ALIAS == _ONE_TABLE
        found[directory] = struct.pack("<QQQ", _LARGE | _PRESENT_WRITABLE, again, again)
        pages = range(_ONE_TABLE, 2 * _ONE_TABLE, PAGE_SIZE)
        found[small] = b"".join(struct.pack("<Q", page | _PRESENT_WRITABLE) for page in pages)
    return found


def _control(program: Program, vcpu: int, part: Part, *, halts: bool, kept_flags: int) -> bytes:
    """A vCPU's control block, for programs.S."""
    selector = {Mode.FLAT: FLAT_CODE, Mode.LONG: LONG_CODE}.get(program.mode, CODE_SEGMENT)
    start = part.entry - program.code_base
    log, stack = LOGS + LOG_BYTES * vcpu, OWN_STACKS + 0x400 * (vcpu + 1)
    return struct.pack(
        "<10I", log, MOST_EXCEPTIONS, STEPS, start, part.size, selector, stack, 0, halts, kept_flags
    )


def _registers(program: Program, vcpu: int, part: Part) -> dict[str, int]:
    """A vCPU's, as it begins."""
    long, based = program.mode.is_long, program.mode not in (Mode.FLAT, Mode.LONG)
    data = DATA_SEGMENT if based else FLAT_DATA
    code = LONG_CODE if long else CODE_SEGMENT if based else FLAT_CODE
    found = dict(zip(_REGISTERS, part.registers, strict=True))
    found.update({f"r{n}": n if long else 0 for n in range(8, 16)})
    stack = part.stack - program.stack_base
    found.update(
        rsp=stack & 0xFFFFFFFF, rbp=stack & 0xFFFFFFFF, rip=part.entry - program.code_base,
        rflags=2, dr6=0xFFFF0FF0, dr7=0x400, cr2=0,
        cr0=_PE | _MP | _ET | _NE | (_PG | _WP if long else 0),
        cr3=TABLES if long else 0,
        cr4=_OSFXSR | _OSXMMEXCPT | _OSXSAVE | (_PAE if long else 0),
        msr_efer=_LME_LMA if long else 0,
        cs_sel=code, cs_base=program.code_base,
        cs_arbytes=0xA9B if long else 0x89B if program.mode is Mode.BASED_16 else 0xC9B,
        ss_sel=STACK_SEGMENT if based else FLAT_DATA, ss_base=program.stack_base,
        gdtr_base=GDT, gdtr_limit=FIRST_TASK + 31, idtr_base=IDT,
        idtr_limit=VECTORS * (16 if long else 8) - 1,
        tr_sel=FIRST_TASK + 16 * vcpu, tr_base=TASKS + vcpu * TASK_BYTES, tr_limit=103,
        tr_arbytes=0x8B,
    )  # fmt: skip
    for name in ("ds", "es", "fs", "gs"):
        found[f"{name}_sel"], found[f"{name}_base"] = data, program.data_base
    for name in ("ds", "es", "fs", "gs", "ss"):
        found[f"{name}_arbytes"] = 0xC93
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        found[f"{name}_limit"] = 0xFFFFFFFF
    return found


class Machine:
    """A domain that runs programs, paused."""

    halts = False
    """Whether vCPUs wait by HLT once they have ended."""
    kept_flags = 0xFFFFFFFF
    """Which flags of a debug exception's frame are compared."""

    def __init__(self, dom: xa.Domain, image: Image, vcpus: int) -> None:
        self.dom, self.vcpus = dom, vcpus
        self.image = image
        self._backend, self._domid = dom.xen.backend, int(dom.domid)

    def begin(self, vcpu: int, registers: dict[str, int]) -> None:
        """Let a vCPU go on with these registers."""
        self.dom.vcpu(vcpu).set_registers(**registers)

    def put(self, program: Program) -> None:
        """Write a program into memory, with nothing left of the one before, and begin it."""
        memory = bytearray(LAST - FIRST)
        parts = {**_tables(program, self.image), **program.memory}
        for vcpu, part in enumerate(program.parts):
            parts[CONTROL + 256 * vcpu] = _control(
                program, vcpu, part, halts=self.halts, kept_flags=self.kept_flags
            )
        for address, content in parts.items():
            memory[address - FIRST : address - FIRST + len(content)] = content
        self.dom.memory.write(FIRST, bytes(memory))
        for vcpu, part in enumerate(program.parts):
            self.begin(vcpu, _registers(program, vcpu, part))
        wait = Part(self.image.address("wait32"), 0, OWN_STACKS, (0,) * len(_REGISTERS))
        for vcpu in range(len(program.parts), self.vcpus):  # not by the tables of the one before
            self.begin(vcpu, _registers(Program(0, Mode.FLAT), vcpu, wait))

    def run(self, program: Program, monitor: xa.Monitor, handler: Handler) -> bytes:
        """Let a program run to its end; return what it left.

        Raises:
            Stuck: It did not end, or its domain has.
        """
        ended = 0

        def handle(event: xa.Event) -> xa.Response | None:
            nonlocal ended
            if isinstance(event, xa.GuestRequest):
                ended += 1
                if ended == len(program.parts):
                    monitor.stop()
                return None
            return handler(event)

        self._backend.domain_unpause(self._domid)
        monitor.run(handle, timeout=PATIENCE)
        self._backend.domain_pause(self._domid)
        if ended != len(program.parts):
            raise Stuck(f"{ended} of {len(program.parts)} vCPUs have ended: {self._where()}")
        return self.dom.memory.read(FIRST, LAST - FIRST)

    def _where(self) -> str:
        """Say what its vCPUs do."""
        info = self.dom.info()
        if info.shutdown:
            return f"the domain has shut down with reason {info.shutdown_reason}"
        registers = [self.dom.vcpu(vcpu).registers() for vcpu in range(self.vcpus)]
        return ", ".join(f"at {one.rip_va:#x}, flags {one.rflags:#x}" for one in registers)

    def run_free(self, program: Program) -> Outcome:
        """Run it with nobody in its way."""
        self.put(program)
        with self.dom.monitor(xa.GuestRequest) as monitor:
            return Outcome(self.run(program, monitor, lambda _: None), {})

    def run_stepped(self, program: Program) -> Outcome:
        """Run it by single steps, and note each."""
        self.put(program)
        trace = {vcpu: [part.entry] for vcpu, part in enumerate(program.parts)}

        def step(event: xa.Event) -> xa.Response | None:
            if isinstance(event, xa.Singlestep):
                registers = event.registers
                trace[int(event.vcpu)].append(registers.cs_base + registers.rip)
                return _STEP
            return None

        with self.dom.monitor(xa.GuestRequest, xa.Singlestep) as monitor:
            for vcpu in trace:
                self._backend.domain_debug_control(self._domid, _RUNNING, vcpu)
            try:
                memory = self.run(program, monitor, step)
            finally:
                for vcpu in trace:
                    self._backend.domain_debug_control(self._domid, 0, vcpu)
        return Outcome(memory, trace)


def executions(program: Program, stepped: Outcome, image: Image) -> Counter[int]:
    """Count how often each instruction was executed: a repeated one once, not each iteration.

    A step ends before the single-step trap that its instruction has raised (SDM 3A, table 7-2):
    where the trap is delivered next, the instruction it will return to was not executed yet. It
    is delivered between two iterations, too, and the execution continues after it.
    """
    found: Counter[int] = Counter()
    trap = image.address("vectors64" if program.mode.is_long else "vectors32") + 16
    for vcpu, steps in stepped.trace.items():
        returns = deque(
            ip + program.code_base & 0xFFFFFFFF if dr6 & _DR6_BS else None
            for vector, _, ip, _, _, _, dr6, _ in log_of(stepped.memory, vcpu)
            if vector == 1
        )
        last = continues = None
        for step, after in zip(steps, [*steps[1:], 0], strict=True):
            is_trap = after == trap and bool(returns) and returns.popleft() == step
            if is_trap and step == last and _is_repeated(program, stepped, step):
                continues = step
            elif step == continues and not is_trap:
                continues = None
            elif step != last and not is_trap:
                found[_physical(program, step)] += 1
            last = None if is_trap else step
    return found


def _is_repeated(program: Program, stepped: Outcome, linear: int) -> bool:
    """Tell whether a repeated string instruction is somewhere."""
    code = stepped.memory[_physical(program, linear) - FIRST :][:15]
    size = 2 if program.mode is Mode.BASED_16 else 4
    return repeated(code, program.mode.is_long, size) is not None


def _physical(program: Program, linear: int) -> int:
    is_alias = program.mode.is_long and FIRST + ALIAS <= linear < LAST + ALIAS
    return linear - ALIAS if is_alias else linear


def log_of(memory: bytes, vcpu: int) -> list[tuple[int, ...]]:
    """What a vCPU has raised: vector, error code, ip, cs, flags, stack, DR6, CR2."""
    log = LOGS + LOG_BYTES * vcpu - FIRST
    end = int.from_bytes(memory[CONTROL - FIRST + 256 * vcpu :][:4], "little") - FIRST
    return [struct.unpack_from("<8I", memory, at) for at in range(log, end, LOG_ENTRY)]
