# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much memory an instruction uses at once: Xen does not tell, the package capstone does."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.abi.x86 import page_table_entry_size
from xenaltp2m.errors import InvalidArgumentError, NotMappedError
from xenaltp2m.types import PAGE_SIZE

if TYPE_CHECKING:
    from xenaltp2m.events import MemAccess, Registers
    from xenaltp2m.memory import Memory

LONGEST_ACCESS = 64
"""Bytes that an instruction uses at once, but for those that save a CPU's whole state."""
_LONGEST_INSTRUCTION = 15


def access_size(event: MemAccess, memory: Memory) -> int | None:
    """Return how many bytes an access has at most.

    None where that is not known: without the package capstone, where the code cannot be read, and
    for instructions that capstone does not know.
    """
    registers = event.registers
    if event.access_flags & AccessFlag.FAULT_IN_GPT:
        return page_table_entry_size(registers.cr4)
    width, rip = registers.word_size, registers.linear_rip
    disassembler = _disassembler(width)
    if disassembler is None:
        return None
    for instruction in disassembler.disasm(_code(registers, rip, memory), rip, 1):
        if instruction.mnemonic.startswith(_WITHOUT_SIZE):
            return None
        sizes = [operand.size for operand in instruction.operands if operand.type == _MEMORY]
        if any(instruction.reg_name(one) in _STACK for one in instruction.regs_read):
            sizes.append(width)
        return max(sizes, default=0) or None
    return None


def decoded(code: bytes, size: int) -> list[range] | None:
    """Return which bytes each instruction has, up to the first that cannot be decoded.

    Args:
        code: Begins with an instruction.
        size: Bytes of an address in it.

    Returns:
        Offsets; None without the package capstone.
    """
    disassembler = _disassembler(size)
    if disassembler is None:
        return None
    return [range(at, at + length) for at, length, *_ in disassembler.disasm_lite(code, 0)]


_MEMORY = 3
"""``X86_OP_MEM``."""
_WITHOUT_SIZE = ("fxsave", "fxrstor", "xsave", "xrstor")
_STACK = ("rsp", "esp", "sp")


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


def _code(registers: Registers, rip: int, memory: Memory) -> bytes:
    """Read an instruction's bytes, as many as can be."""
    space = memory.address_space(registers)
    for length in (_LONGEST_INSTRUCTION, -rip % PAGE_SIZE):
        try:
            return space.read(rip, min(length, _LONGEST_INSTRUCTION))
        except (NotMappedError, InvalidArgumentError):
            continue
    return b""
