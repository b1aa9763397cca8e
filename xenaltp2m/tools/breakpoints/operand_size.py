# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the memory operands of an instruction by decoding it: Xen reports one address per violation.

The package capstone decodes; without it no operand is known.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from xenaltp2m.abi.x86 import Repeated, repeated
from xenaltp2m.errors import InvalidArgumentError, NotMappedError
from xenaltp2m.types import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xenaltp2m.handles.memory import AddressSpace
    from xenaltp2m.values.events import Registers

LONGEST_ACCESS = 64
"""The most bytes of one operand, except for instructions that save a CPU's whole state."""
LONGEST_INSTRUCTION = 15
_LONGEST_STATE = 11_008
"""Bytes of an XSAVE area with every component of today's CPUs, AMX included (CPUID leaf 0xd)."""


class Operand(NamedTuple):
    """A memory operand of an instruction."""

    va: int
    size: int
    written: bool
    """Whether the instruction is known to write it."""
    exact: bool
    """Whether all of it is used; else perhaps only a part, as with a mask."""
    on_stack: bool
    """Whether it is pushed."""


class DataAccess(NamedTuple):
    """The memory that an instruction uses, page tables excluded."""

    operands: list[Operand]
    complete: bool
    """Whether the list is complete. It is not for instructions that read descriptor tables, or push
    because of them: INT, IRET, far transfers, segment loads."""


class _Shape(NamedTuple):
    """An operand before the registers are known."""

    segment: str
    terms: tuple[tuple[str, int, int], ...]
    """The register, mask and factor of each part of the address."""
    offset: int
    mask: int
    """The mask of the address size; 0 for that of the stack."""
    size: int
    written: bool = False
    exact: bool = True
    on_stack: bool = False
    bits: tuple[str, int] | None = None
    """The register that holds the number of a bit (BT), and its size in bits."""


def code_at(registers: Registers, space: AddressSpace) -> bytes:
    """Read the bytes of the next instruction, as many as are mapped."""
    rip = registers.rip_va
    for length in (LONGEST_INSTRUCTION, -rip % PAGE_SIZE):
        try:
            return space.read(rip, min(length, LONGEST_INSTRUCTION))
        except (NotMappedError, InvalidArgumentError):
            continue
    return b""


def length(registers: Registers, code: bytes) -> int:
    """Return the length of the instruction that some code begins with.

    If it is unknown, return the longest that an instruction may have.
    """
    found = decoded(code[:LONGEST_INSTRUCTION], registers.word_size)
    return len(found[0]) if found else LONGEST_INSTRUCTION


def repeats(registers: Registers, code: bytes) -> Repeated | None:
    """Decode a repeated string instruction: a CPU steps one iteration at a time."""
    width = registers.word_size
    return repeated(code, width == 8, min(width, 4))


def data_access(registers: Registers, code: bytes) -> DataAccess | None:
    """Return the memory that an instruction uses.

    None if that is unknown: without the package capstone, for instructions that it does not
    know, and for those that gather or scatter by vectors, which events do not contain.
    """
    width = registers.word_size
    found = _shapes(code, width)
    if found is None:
        return None
    shapes, complete = found
    return DataAccess([_operand(shape, registers, width) for shape in shapes], complete)


def _operand(shape: _Shape, registers: Registers, width: int) -> Operand:
    offset = shape.offset
    for name, mask, factor in shape.terms:
        offset += (getattr(registers, name) & mask) * factor
    if shape.bits is not None:
        name, size = shape.bits
        number = getattr(registers, name) & (1 << size) - 1
        number -= (number >> size - 1) << size
        offset += (number >> size.bit_length() - 1) * (size // 8)
    va = offset & (shape.mask or _stack_mask(registers, width))
    if width < 8 or shape.segment in ("fs", "gs"):
        va += getattr(registers, f"{shape.segment}_base")
    va &= (1 << 64) - 1 if width == 8 else (1 << 32) - 1
    return Operand(va, shape.size, shape.written, shape.exact, shape.on_stack)


@lru_cache(maxsize=4096)
def _shapes(code: bytes, width: int) -> tuple[tuple[_Shape, ...], bool] | None:
    disassembler = _disassembler(width)
    if disassembler is None:
        return None
    for instruction in disassembler.disasm(code, 0, 1):
        name = instruction.mnemonic.split()[-1]  # after "rep", "lock"
        if name == "lea" or name.startswith(_UNUSED):
            return (), True
        if name.startswith(_UNKNOWN):
            return None
        if name.startswith(_BY_DESCRIPTORS) or _loads_descriptor(instruction, name):
            return (*_popped(instruction, name, width), *_in_memory(instruction, name)), False
        stacked = _by_stack(instruction, name, width)
        return stacked or tuple(_in_memory(instruction, name)), True
    return None


def decoded(code: bytes, size: int) -> list[range] | None:
    """Return the range of bytes of each instruction, up to the first that cannot be decoded.

    Args:
        code: Code that begins with an instruction.
        size: Bytes of an address in it.

    Returns:
        Offsets; None without the package capstone.
    """
    disassembler = _disassembler(size)
    if disassembler is None:
        return None
    return [range(at, at + length) for at, length, *_ in disassembler.disasm_lite(code, 0)]


def _stack_mask(registers: Registers, width: int) -> int:
    if width == 8:
        return _MASKS[8]
    return _MASKS[4 if registers.ss & _STACK_B else 2]


def _by_stack(instruction: Any, name: str, width: int) -> tuple[_Shape, ...] | None:
    """Return the operands of an instruction that pushes or pops; None for any other."""
    size = width
    if instruction.prefix[2] == _OPERAND_SIZE and not (width == 8 and name in _NEAR):
        size = {8: 2, 4: 2, 2: 4}[width]
    memory = _in_memory(instruction, name)
    if name in ("call", "push") or name.startswith("pushf"):
        if name == "push" and _names_segment(instruction):
            # The CPU may write only 2 bytes of a segment register (SDM 2B, PUSH).
            whole = _pushed(1, size)
            return whole._replace(size=2), whole._replace(exact=False)
        return _pushed(1, size), *memory
    if name.startswith("pusha"):
        return (_pushed(8, size),)
    if name.startswith("popa"):
        skipped = 3 * size  # the stack pointer's slot
        below, above = (
            _Shape("ss", (_RSP,), 0, 0, skipped),
            _Shape("ss", (_RSP,), skipped + size, 0, 4 * size),
        )
        return below, above, _Shape("ss", (_RSP,), skipped, 0, size, exact=False)
    if name in ("ret", "pop") or name.startswith("popf"):
        # Its own operand is addressed by the stack pointer after the pop (SDM 2B, POP).
        behind = [
            shape._replace(offset=shape.offset + size) if _uses_rsp(shape) else shape
            for shape in memory
        ]
        return _Shape("ss", (_RSP,), 0, 0, size), *behind
    if name == "leave":
        return (_Shape("ss", (_RBP,), 0, 0, size),)
    if name == "enter":
        depth = instruction.operands[1].imm & 31
        above = max(depth - 1, 0)
        read = _Shape("ss", (_RBP,), -above * size, 0, above * size)
        return _pushed(depth + 1, size), *([read] if above else [])
    return None


def _popped(instruction: Any, name: str, width: int) -> list[_Shape]:
    """Return what a far return, or a POP to a segment register, pops."""
    size = {2: 2, 4: 4, 8: 8 if instruction.rex & _REX_W or name == "pop" else 4}[width]
    if instruction.prefix[2] == _OPERAND_SIZE:
        size = {8: 2, 4: 2, 2: 4}[width]
    count = {"iret": 3, "retf": 2, "pop": 1}.get(name.rstrip("dq"), 0)
    if not count:
        return []
    if name.startswith("iret") and width == 8:
        return [_Shape("ss", (_RSP,), 0, 0, 5 * size)]
    found = [_Shape("ss", (_RSP,), 0, 0, count * size)]
    if count > 1:  # a return to an outer privilege level pops the stack pointer, too
        found.append(_Shape("ss", (_RSP,), count * size, 0, 2 * size, exact=False))
    return found


def _pushed(count: int, size: int) -> _Shape:
    return _Shape("ss", (_RSP,), -count * size, 0, count * size, True, on_stack=True)


def _in_memory(instruction: Any, name: str) -> Iterator[_Shape]:
    """Yield the operands that the instruction names."""
    mask = _MASKS[instruction.addr_size]
    if name in _IMPLIED:
        register, size = _IMPLIED[name]
        segment = _SEGMENT_PREFIXES.get(instruction.prefix[1], "ds")
        is_read = name.startswith("xlat")
        within = (("rax", 0xFF, 1),) if is_read else ()
        terms: tuple[tuple[str, int, int], ...] = ((register, mask, 1), *within)
        yield _Shape(segment, terms, 0, mask, size, not is_read, exact=is_read)
        return
    registers = [instruction.reg_name(one.reg) for one in instruction.operands if one.type == _REG]
    for at, operand in enumerate(instruction.operands):
        if operand.type != _MEMORY:
            continue
        where = operand.mem
        base, index = instruction.reg_name(where.base), instruction.reg_name(where.index)
        segment = instruction.reg_name(where.segment) or (
            "ss" if base in ("rsp", "esp", "sp", "rbp", "ebp", "bp") else "ds"
        )
        terms = ()
        offset = where.disp
        if base is not None:
            terms = ((*_REGISTERS[base], 1),)
            if base in ("rip", "eip"):
                offset += instruction.size
        if index is not None and index in _REGISTERS:
            terms = (*terms, (*_REGISTERS[index], where.scale))
        bits = None
        if name in _BIT_TESTS and registers:
            bits = _REGISTERS[registers[-1]][0], operand.size * 8
        size = _state_size(name, instruction) or operand.size
        masked = "mask" in name or any(register.startswith("k") for register in registers)
        found = _Shape(
            segment,
            terms,
            offset,
            mask,
            size,
            written=at == 0 if name.startswith("movs") else bool(operand.access & _WRITES),
            exact=not masked and not name.startswith(_WITH_XSAVE_AREA + _WITH_FXSAVE_AREA),
            bits=bits,
        )
        yield found
        if name.startswith(_WITH_FXSAVE_AREA):  # XMM registers; others have reserved bytes between
            size = 256 if instruction.addr_size == 8 else 128
            yield found._replace(offset=offset + 160, size=size, exact=True)


def _state_size(name: str, instruction: Any) -> int:
    """Return the bytes of a state that an instruction saves or loads; 0 for all others."""
    if name.startswith(_WITH_XSAVE_AREA):
        return _LONGEST_STATE
    if name.startswith(_WITH_FXSAVE_AREA):
        return 464  # SDM 1, table 10-2: the rest is available to software
    short = instruction.prefix[2] == _OPERAND_SIZE
    if name in ("fnsave", "frstor"):
        return 94 if short else 108
    if name in ("fnstenv", "fldenv"):
        return 14 if short else 28
    return 0


def _uses_rsp(shape: _Shape) -> bool:
    return bool(shape.terms) and shape.terms[0][0] == "rsp"


def _names_segment(instruction: Any) -> bool:
    first = instruction.operands[0]
    return first.type == _REG and instruction.reg_name(first.reg) in _SEGMENTS


def _loads_descriptor(instruction: Any, name: str) -> bool:
    """Return whether it is a far JMP or CALL, or loads a segment register by MOV or POP."""
    opcode = instruction.opcode[0]
    if opcode == 0xFF:
        return instruction.modrm >> 3 & 7 in (3, 5)
    return opcode in (0x9A, 0xEA, 0x8E) or (name == "pop" and _names_segment(instruction))


_REG, _MEMORY = 1, 3
"""``X86_OP_REG``, ``X86_OP_MEM``."""
_WRITES = 2
"""``CS_AC_WRITE``: capstone sets it for few of the instructions that write."""
_OPERAND_SIZE, _REX_W = 0x66, 8
_STACK_B = 1 << 30
"""SS.B in the format of events: ``struct vm_event_x86_selector_reg``."""
_MASKS = {size: (1 << 8 * size) - 1 for size in (2, 4, 8)}
_RSP, _RBP = ("rsp", _MASKS[8], 1), ("rbp", _MASKS[8], 1)
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_SEGMENT_PREFIXES = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
_NEAR = ("call", "ret")
_BIT_TESTS = ("bt", "bts", "btr", "btc")
_IMPLIED = {
    "xlatb": ("rbx", 1), "xlat": ("rbx", 1), "maskmovq": ("rdi", 8), "maskmovdqu": ("rdi", 16),
    "vmaskmovdqu": ("rdi", 16),
}  # fmt: skip
"""Operands that capstone does not list."""
_WITH_XSAVE_AREA, _WITH_FXSAVE_AREA = ("xsave", "xrstor"), ("fxsave", "fxrstor")
_UNUSED = ("nop", "prefetch", "clflush", "clwb", "cldemote", "invlpg")
_UNKNOWN = (
    "movdir64b", "enqcmd", "monitor", "umonitor", "vpgather", "vgather", "vpscatter", "vscatter",
)  # fmt: skip
_BY_DESCRIPTORS = (
    "int", "iret", "retf", "lcall", "ljmp", "lds", "les", "lfs", "lgs", "lss", "ltr", "lldt", "lar",
    "lsl", "verr", "verw",
)  # fmt: skip


def _registers() -> dict[str, tuple[str, int]]:
    """Return the register of an event, and the mask of its part, for each register name."""
    found = {"rip": ("rip", _MASKS[8]), "eip": ("rip", _MASKS[4])}
    for short in ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di"):
        for prefix, size in (("", 2), ("e", 4), ("r", 8)):
            found[prefix + short] = (f"r{short}", _MASKS[size])
    for number in range(8, 16):
        for suffix, size in (("w", 2), ("d", 4), ("", 8)):
            found[f"r{number}{suffix}"] = (f"r{number}", _MASKS[size])
    return found


_REGISTERS = _registers()


@cache
def _disassembler(width: int) -> Any:
    try:
        import capstone
    except ImportError:
        return None
    mode = {2: capstone.CS_MODE_16, 4: capstone.CS_MODE_32, 8: capstone.CS_MODE_64}[width]
    made = capstone.Cs(capstone.CS_ARCH_X86, mode)
    made.detail = True
    return made
