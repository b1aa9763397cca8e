# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random programs for one or two vCPUs: the same seed, the same program.

They change and read their own code, cross pages, raise exceptions, trap, repeat, use prefixes,
vectors and far jumps, in segments with bases that are no multiple of a page. A program always ends:
jumps go forward but for loops with counters, a fault goes on at the next block of code
(tests/lab/guest/programs.S), and what a program changes in its code keeps it so.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from xenaltp2m.types import PAGE_SIZE

GDT, IDT, TASKS, TABLES = 0x200000, 0x201000, 0x202000, 0x203000
CONTROL, OWN_STACKS, LOGS = 0x207000, 0x208000, 0x209000
CODE, DATA, SHARED, STACKS, MEMORY_END = 0x20C000, 0x210000, 0x218000, 0x219000, 0x21D000
CODE_BYTES, DATA_BYTES, STACK_BYTES, LOG_BYTES = 0x4000, 0x4000, 0x2000, 0x1000
"""Code is shared; of the others each vCPU has as much."""
DATA_PAGES = 3
COUNTERS_AT, POINTER_AT, VECTORS_AT = 0x3800, 0x3A00, 0x3C00
"""Behind its pages of data: loops' counters, a far pointer, and what its vector registers have."""
ALIAS = 0x200000
"""With paging on, everything from GDT on is here, too, so much above."""
BLOCK, END, VECTORS = 128, 0x40, 0x41
MOST_EXCEPTIONS, LOG_ENTRY = 60, 32
FLAT_CODE, FLAT_DATA, LONG_CODE, CODE_SEGMENT, DATA_SEGMENT, STACK_SEGMENT = range(8, 56, 8)
FIRST_TASK, TASK_BYTES = 0x40, 256
_TF, _ALWAYS = 0x100, 0x002
_FCW, _MXCSR = 0x37F, 0x1F80
_SAFE = b"\x90\xf8\xf9\xf5\xfc\x98\x99"
"""NOP, CLC, STC, CMC, CLD, CWDE, CDQ: instructions of one byte that may stand for each other."""


class Mode(Enum):
    """What code the program is of."""

    FLAT = "32-bit code, flat"
    BASED = "32-bit code in segments with bases"
    BASED_16 = "16-bit code in segments with bases"
    LONG = "64-bit code, with paging on"

    @property
    def is_long(self) -> bool:
        """Whether it has 64-bit registers."""
        return self is Mode.LONG


@dataclass
class Part:
    """What one vCPU executes."""

    entry: int
    """Linear addresses, as all here."""
    size: int
    stack: int
    registers: tuple[int, ...]


@dataclass
class Program:
    """A program, and where in it breakpoints and watchpoints can be."""

    seed: int
    mode: Mode
    code_base: int = 0
    data_base: int = 0
    stack_base: int = 0
    parts: list[Part] = field(default_factory=list)
    memory: dict[int, bytes] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    """Where instructions begin."""
    exits: set[int] = field(default_factory=set)
    """Where those begin that Xen completes for the CPU."""
    changing: list[range] = field(default_factory=list)
    """What of the code it may change."""


class Writer:
    """Writes the instructions of one vCPU."""

    def __init__(self, program: Program, chance: random.Random, vcpu: int) -> None:
        self.program, self.chance, self.vcpu = program, chance, vcpu
        self.wide, self.small = program.mode.is_long, program.mode is Mode.BASED_16
        self.at = 0
        self.code = bytearray()
        self.data = DATA + vcpu * DATA_BYTES
        self.span = range(CODE, CODE + CODE_BYTES)
        """The code that may be read: what another vCPU changes would be read at any moment."""
        self.sites: list[tuple[int, int, bytes]] = []
        """What may be changed in the code: where, how many bytes, and the bytes to choose from."""
        self.fixups: list[tuple[int, int]] = []
        """Stores into the code whose address and value are chosen last: where, and how wide."""
        self.functions: list[int] = []
        self.loops = 0

    # Encoding.

    def emit(self, code: bytes, *, exits: bool = False) -> int:
        """Write an instruction; return its offset."""
        offset = len(self.code)
        self.program.starts.append(self.at + offset)
        if exits:
            self.program.exits.add(self.at + offset)
        self.code += code
        return offset

    def memory(self, register: int, address: int, base: int | None = None) -> bytes:
        """ModRM and what follows, for an absolute address."""
        if self.wide:
            return bytes([register << 3 & 0x38 | 4, 0x25]) + struct.pack("<I", address)
        base = self.program.data_base if base is None else base
        return bytes([register << 3 & 0x38 | 5]) + struct.pack("<I", address - base & 0xFFFFFFFF)

    def prefix(self, size: int = 4, *, memory: bool = False) -> bytes:
        """What makes the operands so many bytes wide, and an address 32 bits."""
        found = b""
        if self.small:
            found += b"\x66" * (size == 4) + b"\x67" * memory
        else:
            found += b"\x66" * (size == 2)
        return found + b"\x48" * (size == 8)

    def size(self) -> int:
        """Of an operand, but for bytes."""
        return self.chance.choice([2, 4, 4, 8] if self.wide else [2, 4, 4])

    def register(self) -> int:
        """One that a program may change: not the stack's."""
        return self.chance.choice([0, 1, 2, 3, 6, 7])

    def immediate(self, size: int) -> bytes:
        return self.chance.randbytes(min(size, 4))

    def place(self, length: int = 8, align: int = 1) -> int:
        """An address in the vCPU's data, often across pages."""
        chance = self.chance
        if chance.random() < 0.3:
            at = PAGE_SIZE * chance.randrange(1, DATA_PAGES) - chance.randrange(length + 1)
        else:
            at = chance.randrange(DATA_PAGES * PAGE_SIZE - length)
        return self.data + (at & -align)

    def readable(self, length: int = 8) -> int:
        """An address to read: data, or code."""
        chance = self.chance
        if chance.random() < 0.6:
            return self.place(length)
        at = chance.randrange(self.span.start, self.span.stop - length)
        return at + ALIAS if self.wide and chance.random() < 0.3 else at

    def set_register(self, register: int, value: int) -> None:
        self.emit(self.prefix(4) + bytes([0xB8 | register]) + struct.pack("<I", value & 0xFFFFFFFF))

    # What a program is made of.

    def move_immediate(self) -> None:
        """MOV of a value that the program may change."""
        register = self.register()
        code = self.prefix(4) + bytes([0xB8 | register]) + self.immediate(4)
        offset = self.emit(code)
        self.sites.append((self.at + offset + len(code) - 4, 4, b""))

    def sled(self) -> None:
        """Instructions of one byte, which the program may change to others, or join."""
        start = self.at + len(self.code)
        for _ in range(8):
            self.emit(bytes([self.chance.choice(_SAFE)]))
        self.sites.append((start, 6, _SAFE))

    def arithmetic(self) -> None:
        chance, size = self.chance, self.size()
        operation = chance.randrange(8) << 3
        kind = chance.randrange(5)
        register = self.register()
        if kind == 0:
            self.emit(
                self.prefix(size) + bytes([operation | 1, 0xC0 | self.register() << 3 | register])
            )
        elif kind == 1:
            value = self.immediate(2 if size == 2 else 4)
            self.emit(self.prefix(size) + bytes([0x81, 0xC0 | operation | register]) + value)
        elif kind == 2:
            self.emit(
                self.prefix(size, memory=True)
                + bytes([operation | 3])
                + self.memory(register, self.readable(size))
            )
        elif kind == 3:
            lock = b"\xf0" if operation != 0x38 and chance.random() < 0.2 else b""
            self.emit(
                lock
                + self.prefix(size, memory=True)
                + bytes([operation | 1])
                + self.memory(register, self.place(size))
            )
        else:
            self.emit(
                self.prefix(1, memory=True)
                + bytes([0x80])
                + self.memory(operation >> 3, self.place(1))
                + self.immediate(1)
            )

    def store(self) -> None:
        size = self.size()
        register = self.register()
        self.emit(
            self.prefix(size, memory=True) + b"\x89" + self.memory(register, self.place(size))
        )

    def load(self) -> None:
        size = self.size()
        self.emit(
            self.prefix(size, memory=True)
            + b"\x8b"
            + self.memory(self.register(), self.readable(size))
        )

    def exchange(self) -> None:
        """XCHG, XADD, CMPXCHG, BTS, INC, NOT."""
        chance, size = self.chance, self.size()
        opcode = chance.choice([b"\x87", b"\x0f\xc1", b"\x0f\xb1", b"\x0f\xab"])
        lock = b"\xf0" if chance.random() < 0.3 else b""
        address = self.place(size)
        if opcode == b"\x0f\xab":  # the register chooses another byte
            self.set_register(1, chance.randrange(8 * size))
            self.emit(lock + self.prefix(size, memory=True) + opcode + self.memory(1, address))
        else:
            self.emit(
                lock
                + self.prefix(size, memory=True)
                + opcode
                + self.memory(self.register(), address)
            )

    def exchange_wide(self) -> None:
        """CMPXCHG8B, CMPXCHG16B."""
        lock = b"\xf0" if self.chance.random() < 0.5 else b""
        size = 8 if self.wide and self.chance.random() < 0.6 else 4
        prefix = b"\x48" if size == 8 else b""
        if self.small:
            prefix = b"\x67"
        self.emit(lock + prefix + b"\x0f\xc7" + self.memory(1, self.place(2 * size, 2 * size)))

    def stack(self) -> None:
        """PUSH and POP, PUSHA and POPA, ENTER and LEAVE."""
        chance = self.chance
        kind = chance.randrange(5)
        if kind == 0:
            count = chance.randrange(1, 4)
            for _ in range(count):
                self.emit(self.prefix(4) + bytes([0x50 | self.register()]))
            for _ in range(count):
                self.emit(self.prefix(4) + bytes([0x58 | self.register()]))
        elif kind == 1 and not self.wide:
            self.emit(self.prefix(4) + b"\x60")
            self.simple()
            self.emit(self.prefix(4) + b"\x61")
        elif kind == 2 and not self.small:
            self.emit(b"\xc8" + struct.pack("<HB", chance.randrange(64), chance.randrange(3)))
            self.simple()
            self.emit(b"\xc9")
        elif kind == 3:
            self.emit(self.prefix(4, memory=True) + b"\xff" + self.memory(6, self.readable(8)))
            self.emit(self.prefix(4, memory=True) + b"\x8f" + self.memory(0, self.place(8)))
        else:
            self.emit(self.prefix(4) + b"\x9c")
            self.emit(self.prefix(4) + bytes([0x58 | self.register()]))

    def call(self) -> None:
        if self.functions:
            target = self.chance.choice(self.functions)
            length = 6 if self.small else 5
            at = self.at + len(self.code)
            code = b"\x66" * self.small + b"\xe8"
            self.emit(code + struct.pack("<i", target - at - length))

    def loop(self) -> None:
        """Some instructions several times."""
        counter = self.data + COUNTERS_AT + 4 * self.loops
        self.loops += 1
        self.emit(
            self.prefix(4, memory=True)
            + b"\xc7"
            + self.memory(0, counter)
            + struct.pack("<I", self.chance.randrange(2, 9))
        )
        start = len(self.code)
        for _ in range(self.chance.randrange(1, 3)):
            self.simple()
        self.emit(self.prefix(4, memory=True) + b"\xff" + self.memory(1, counter))
        self.emit(b"\x75" + struct.pack("<b", start - len(self.code) - 2))

    def string(self) -> None:
        """MOVS, STOS, LODS, CMPS, SCAS, alone or repeated, up or down."""
        chance = self.chance
        operation = chance.choice([0xA4, 0xAA, 0xAC, 0xA6, 0xAE])
        wide = chance.randrange(2)
        base = self.program.data_base if not self.wide else 0
        count = chance.choice([0, 1, 2, 3, 10, 40])
        down = chance.random() < 0.3
        self.emit(b"\xfd" if down else b"\xfc")
        span = 4 * count + 8
        for register, address in ((6, self.readable(span)), (7, self.place(span))):
            self.set_register(register, address + (span - 8 if down else 0) - base)
        self.set_register(1, count)
        repeat = chance.choice([b"", b"\xf3", b"\xf3", b"\xf2"])
        self.emit(repeat + self.prefix(4, memory=True) + bytes([operation | wide]))
        self.emit(b"\xfc")

    def vector(self) -> None:
        """SSE and x87, across pages."""
        chance = self.chance
        kind = chance.randrange(7)
        register = chance.randrange(8)
        address32 = b"\x67" if self.small else b""
        if kind == 0:
            self.emit(address32 + b"\x0f\x10" + self.memory(register, self.readable(16)))
        elif kind == 1:
            self.emit(address32 + b"\x0f\x11" + self.memory(register, self.place(16)))
        elif kind == 2:  # MOVAPS: a fault, now and then
            address = self.place(16, chance.choice([16, 16, 4]))
            self.emit(address32 + b"\x0f\x29" + self.memory(register, address))
        elif kind == 3:  # PXOR
            self.emit(b"\x66\x0f\xef" + bytes([0xC0 | register << 3 | chance.randrange(8)]))
        elif kind == 4:  # FXSAVE, which uses 512 bytes
            address = self.place(512, 16)
            self.emit(address32 + b"\x0f\xae" + self.memory(0, address))
            if chance.random() < 0.5:
                self.emit(address32 + b"\x0f\xae" + self.memory(1, address))
        elif kind == 5:  # XSAVE of what XCR0 has on, and XRSTOR
            self.emit(self.prefix(4) + b"\x31\xd2")
            self.set_register(0, 7)
            address = self.place(640, 64)
            self.emit(address32 + b"\x0f\xae" + self.memory(4, address))
            if chance.random() < 0.5:
                self.emit(address32 + b"\x0f\xae" + self.memory(5, address))
        else:  # FLD1, FSTP of 80 bits
            self.emit(b"\xd9\xe8")
            self.emit(address32 + b"\xdb" + self.memory(7, self.place(10)))

    def trap(self) -> None:
        """INT3, INT n, ICEBP, INTO."""
        chance = self.chance
        kinds = [b"\xcc", b"\xcd\x03", b"\xcd\x31", b"\xf1", b"\x26\xcc"]
        if not self.wide:
            kinds.append(b"\xce")
        self.emit(chance.choice(kinds))

    def fault(self) -> None:
        """UD2, a division by zero, a bad selector, LOCK where it may not be."""
        kind = self.chance.randrange(4)
        if kind == 0:
            self.emit(b"\x0f\x0b")
        elif kind == 1:
            self.emit(self.prefix(4) + b"\x31\xc9")
            self.emit(self.prefix(4) + b"\xf7\xf1")
        elif kind == 2:
            self.set_register(0, 0x1234)
            self.emit(b"\x8e\xd8")
        else:
            self.emit(b"\xf0\x90")

    def single_step(self) -> None:
        """POPF with TF: a debug exception after each of the next few instructions."""
        self.emit(self.prefix(4) + b"\x68" + struct.pack("<I", _TF | _ALWAYS))
        self.emit(self.prefix(4) + b"\x9d")

    def stack_segment(self) -> None:
        """MOV SS, after which nothing interrupts for an instruction."""
        self.emit(self.prefix(2) + b"\x8c\xd0")
        self.emit(b"\x8e\xd0")
        self.simple()

    def segment(self) -> None:
        if not self.wide:
            self.emit(b"\x1e")
            self.emit(self.chance.choice([b"\x1f", b"\x07"]))

    def far_jump(self) -> None:
        """To the next instruction."""
        program = self.program
        at = self.at + len(self.code)
        if self.wide:
            pointer = self.data + POINTER_AT
            self.emit(b"\xc7" + self.memory(0, pointer + 4) + struct.pack("<I", LONG_CODE))
            length = len(b"\xc7" + self.memory(0, pointer) + b"1234")
            jump = b"\xff" + self.memory(5, pointer)
            target = self.at + len(self.code) + length + len(jump)
            self.emit(b"\xc7" + self.memory(0, pointer) + struct.pack("<I", target))
            self.emit(jump)
            return
        prefix = b"\x66" * self.small
        length = len(prefix) + 7
        selector = FLAT_CODE if program.mode is Mode.FLAT else CODE_SEGMENT
        self.emit(
            prefix
            + b"\xea"
            + struct.pack("<IH", at + length - program.code_base & 0xFFFFFFFF, selector)
        )

    def leave_guest(self) -> None:
        """CPUID, and ports."""
        kind = self.chance.randrange(3)
        if kind == 0:
            self.set_register(0, 0)
            self.emit(b"\x0f\xa2", exits=True)
        elif kind == 1:
            self.set_register(0, 0x20 + self.chance.randrange(0x5E))
            self.emit(b"\xe6\xe9", exits=True)
        else:
            self.emit(b"\xe4\x80", exits=True)

    def prefixed(self) -> None:
        """Prefixes that change nothing."""
        chance = self.chance
        some = [b"\x3e", b"\x3e\x3e"]
        if not self.small:
            some.append(b"\x67")
        prefixes = b"".join(chance.choice(some) for _ in range(chance.randrange(1, 4)))
        if self.wide and chance.random() < 0.5:
            prefixes += b"\x41"
        self.emit(prefixes + bytes([0x90]))

    def jump(self) -> None:
        """A condition, over an instruction or two."""
        offset = self.emit(bytes([0x70 | self.chance.randrange(16), 0]))
        self.simple()
        self.code[offset + 1] = len(self.code) - offset - 2

    def change_code(self) -> None:
        """A store into this code, of one to four bytes; where, and what, is chosen at the end."""
        size = self.chance.choice([1, 1, 2, 4])
        opcode = b"\xc6" if size == 1 else b"\xc7"
        code = self.prefix(size, memory=True) + opcode + self.memory(0, 0) + bytes(size)
        offset = self.emit(code)
        self.fixups.append((offset + len(code) - size - 4, size))

    def simple(self) -> None:
        """One that neither jumps nor needs another."""
        self.chance.choice([self.arithmetic, self.store, self.load, self.move_immediate])()

    def settle_changes(self) -> None:
        """Choose what the stores into the code change."""
        base = 0 if self.wide else self.program.data_base
        self.program.changing += [range(at, at + max(length, 4)) for at, length, _ in self.sites]
        for offset, size in self.fixups:
            site, length, choices = self.chance.choice(self.sites)
            at = site + self.chance.randrange(max(length - size, 0) + 1)
            if not choices:
                at = min(at, site + length - size)
            value = (
                bytes(self.chance.choice(choices) for _ in range(size))
                if choices
                else self.chance.randbytes(size)
            )
            if choices and size == 2 and self.chance.random() < 0.5:
                value = b"\xb0" + value[1:]  # MOV AL takes what was an instruction
            if self.wide and self.chance.random() < 0.3:
                at += ALIAS
            struct.pack_into("<I", self.code, offset, at - base & 0xFFFFFFFF)
            self.code[offset + 4 : offset + 4 + size] = value


_KINDS: list[tuple[Callable[[Writer], None], int]] = [
    (Writer.move_immediate, 6),
    (Writer.sled, 4),
    (Writer.arithmetic, 14),
    (Writer.store, 8),
    (Writer.load, 8),
    (Writer.exchange, 5),
    (Writer.exchange_wide, 2),
    (Writer.stack, 6),
    (Writer.call, 6),
    (Writer.loop, 5),
    (Writer.string, 6),
    (Writer.vector, 6),
    (Writer.trap, 3),
    (Writer.fault, 2),
    (Writer.single_step, 1),
    (Writer.stack_segment, 2),
    (Writer.segment, 1),
    (Writer.far_jump, 3),
    (Writer.leave_guest, 3),
    (Writer.prefixed, 3),
    (Writer.jump, 5),
    (Writer.change_code, 9),
]


def _fill(writer: Writer, blocks: int) -> None:
    """Write so many blocks of code, the first of which sets registers up, and an end."""
    kinds, weights = zip(*_KINDS, strict=True)
    address32 = b"\x67" if writer.small else b""
    writer.emit(address32 + b"\x0f\xae" + writer.memory(1, writer.data + VECTORS_AT))  # FXRSTOR
    writer.emit(b"\xdb\xe3")  # FNINIT: FXRSTOR leaves FIP as it is in the simulator
    writer.move_immediate()  # there is always something to change
    for block in range(blocks):
        end = (block + 1) * BLOCK
        while len(writer.code) < end:
            before = (
                len(writer.code), len(writer.program.starts), len(writer.fixups),
                len(writer.sites), set(writer.program.exits),
            )  # fmt: skip
            writer.chance.choices(kinds, weights)[0](writer)
            if len(writer.code) > end:  # it does not fit: NOPs to the block's end
                length, starts, fixups, sites, exits = before
                del writer.code[length:], writer.program.starts[starts:]
                del writer.fixups[fixups:], writer.sites[sites:]
                writer.program.exits.intersection_update(exits)
                while len(writer.code) < end:
                    writer.emit(b"\x90")
    writer.emit(bytes([0xCD, END]))
    writer.code += b"\xcc" * (BLOCK - len(writer.code) % BLOCK)
    writer.settle_changes()


def _functions(writer: Writer) -> None:
    """Write what both vCPUs call: behind each other, one at the beginning of a page."""
    at = CODE + 2 * PAGE_SIZE
    for start in (at - 0x40, at, at + 0x31):
        writer.at, writer.code = start, bytearray()
        for _ in range(writer.chance.randrange(1, 4)):
            kind = writer.chance.randrange(3)
            if kind == 0:  # LOCK NOT: its result and flags tell nothing of the other vCPU
                writer.emit(
                    b"\xf0" + writer.prefix(4, memory=True) + b"\xf7" + writer.memory(2, SHARED)
                )
            elif kind == 1:
                writer.emit(writer.prefix(4) + bytes([0x05]) + writer.immediate(4))
            else:
                writer.emit(bytes([writer.chance.choice(_SAFE)]))
        writer.emit(b"\x66\xc3" if writer.small else b"\xc3")
        writer.program.memory[start] = bytes(writer.code)
        writer.functions.append(start)


def generate(seed: int) -> Program:
    """Make the program of a seed."""
    chance = random.Random(seed)
    mode = chance.choice(list(Mode))
    program = Program(seed, mode)
    if mode in (Mode.BASED, Mode.BASED_16):
        program.code_base = CODE - chance.randrange(1, 0x7FFF)
        program.data_base = chance.choice([0, chance.randrange(1 << 20), chance.getrandbits(32)])
        program.stack_base = chance.randrange(1 << 20)
    vcpus = chance.choice([1, 1, 1, 2])
    shared = Writer(program, chance, 0)
    _functions(shared)
    start = CODE + chance.randrange(0x40, 2 * PAGE_SIZE - 0x500)
    blocks = chance.randrange(2, 5)
    for vcpu in range(vcpus):
        data = DATA + vcpu * DATA_BYTES
        program.memory[data] = chance.randbytes(DATA_PAGES * PAGE_SIZE)
        vectors = struct.pack("<H22xI", _FCW, _MXCSR).ljust(160, b"\0") + chance.randbytes(256)
        program.memory[data + VECTORS_AT] = vectors
        writer = Writer(program, chance, vcpu)
        writer.functions = shared.functions
        writer.at = start
        if vcpus > 1:
            writer.span = range(start, start + blocks * BLOCK)
        _fill(writer, blocks)
        program.memory[start] = bytes(writer.code)
        stack = STACKS + (vcpu + 1) * STACK_BYTES
        if chance.random() < 0.2:  # in a page with code
            stack = CODE + CODE_BYTES - vcpu * 0x800
        registers = tuple(chance.getrandbits(64 if mode.is_long else 32) for _ in range(8))
        program.parts.append(Part(start, len(writer.code), stack, registers))
        start += len(writer.code)
        if vcpu == 0 and start > CODE + 2 * PAGE_SIZE - 0x40 - len(writer.code):
            start = CODE + 2 * PAGE_SIZE + 0x100
    return program
