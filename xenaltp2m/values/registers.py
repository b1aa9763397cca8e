# SPDX-License-Identifier: LGPL-2.1-or-later
"""A vCPU's registers, read by name from a structure's bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from xenaltp2m.abi import layouts
from xenaltp2m.abi.x86 import EFER_LMA

CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Format codes of :mod:`struct`, by the width in bytes."""
_U16, _U32 = (1 << 16) - 1, (1 << 32) - 1
_CODE_L, _BIG = 1 << 9, 1 << 10
_LIMIT_BITS = 20


class Registers:
    """A vCPU's registers by name, as attributes: ``registers.rip``. Read-only.

    An event's registers are a copy from the time of the event; :meth:`Vcpu.registers` copies them
    when it is called. ``dir()`` and iteration list the available names.
    """

    __slots__ = ("raw",)
    _fields: ClassVar[Mapping[str, layouts.Field]] = MappingProxyType({})
    _cs_attributes: int
    """Access rights: 12 bits as Xen packs them (``struct segment_register``)."""
    _ss_attributes: int
    rip_and_cs_base: tuple[int, int]
    """Both in one step, because every breakpoint hit needs them."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __getattr__(self, name: str) -> int:
        raise AttributeError(f"there is no register {name!r}: dir() lists the available ones")

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._fields]

    def __repr__(self) -> str:
        return f"<Registers rip={self.rip:#x} rsp={self.rsp:#x} cr3={self.cr3:#x}>"

    @property
    def word_size(self) -> int:
        """The size of an address in the running code in bytes: 8, 4 or 2, by CS.L and CS.D."""
        attributes = self._cs_attributes
        if attributes & _CODE_L and self.msr_efer & EFER_LMA:
            return 8
        return 4 if attributes & _BIG else 2

    @property
    def privilege(self) -> int:
        """The current privilege level, which is SS.DPL (SDM 3C, 25.4.1)."""
        return self._ss_attributes >> 5 & 3

    @property
    def rip_va(self) -> int:
        """The instruction's virtual address: outside 64-bit code, rip is an offset within CS."""
        base = self.cs_base
        if base and self.word_size < 8:  # 64-bit code ignores the base (SDM 3A, 3.4.4)
            return (base + self.rip) & _U32
        return self.rip

    @property
    def rsp_va(self) -> int:
        """The virtual address of the top of the stack: outside 64-bit code, in the segment SS."""
        if self.word_size == 8:
            return self.rsp
        size = _U32 if self._ss_attributes & _BIG else _U16
        return (self.ss_base + (self.rsp & size)) & _U32

    def as_dict(self) -> dict[str, int]:
        """Return all registers by name."""
        return {name: getattr(self, name) for name in self._fields}


def registers_at(fields: Mapping[str, layouts.Field]) -> type[Registers]:
    """Return a class of registers at these places; its properties take half a lookup's time."""
    places: dict[str, Any] = {name: property(_reader(*place)) for name, place in fields.items()}
    rip, base = fields["rip"], fields["cs_base"]
    gap = base.offset - rip.offset - rip.width
    both = struct.Struct(f"<{rip.offset}xQ{gap}x{CODES[base.width]}").unpack_from
    places["rip_and_cs_base"] = property(lambda registers: both(registers.raw))
    for name in ("cs", "ss"):
        hidden = f"{name}_arbytes"
        # In an event they are above the limit's bits (struct vm_event_x86_selector_reg).
        place, shift = (fields[hidden], 0) if hidden in fields else (fields[name], _LIMIT_BITS)
        places[f"_{name}_attributes"] = property(_reader(*place, shift))
    return type("Registers", (Registers,), {"__slots__": (), "_fields": fields, **places})


def _reader(offset: int, width: int, shift: int = 0) -> Callable[[Registers], int]:
    def read_long(registers: Registers) -> int:
        return int.from_bytes(registers.raw[offset : offset + width], "little")

    if width not in CODES:
        return read_long
    unpack = struct.Struct(f"<{CODES[width]}").unpack_from

    def read(registers: Registers) -> int:
        value: int = unpack(registers.raw, offset)[0]
        return value

    def read_upper(registers: Registers) -> int:
        return read(registers) >> shift

    return read_upper if shift else read
