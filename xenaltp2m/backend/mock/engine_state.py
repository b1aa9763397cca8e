# SPDX-License-Identifier: LGPL-2.1-or-later
"""A vCPU's registers as Unicorn keeps them, where it is not asked for them one by one."""

from __future__ import annotations

import copy
import ctypes
import struct
from typing import Any, NamedTuple

from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.abi.x86 import (
    EFER_LMA,
    Segment,
)
from xenaltp2m.backend.mock.vcpu import GENERAL_REGISTERS, REGISTERS, Vcpu

_LAST_OF_32_BITS, LAST_ADDRESS = (1 << 32) - 1, (1 << 64) - 1
GENERAL = slice(HVM_CPU.fields["rax"].offset, HVM_CPU.fields["rip"].offset + 8)
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""As QEMU numbers them."""
SEGMENT = struct.Struct("<I4xQII")
"""``SegmentCache``: selector, base, limit, flags."""
_WORDS, _FLAGS, EXCEPTION_NUMBER = struct.Struct("<16Q"), struct.Struct("<I"), struct.Struct("<i")
_HF_CPL, _HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_PE, _HF_LMA, _HF_CS64 = (
    3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 14, 1 << 15,
)  # fmt: skip
"""``hflags``: what of the segments the translator looks at (QEMU, target/i386/cpu.h)."""
_BIG = 1 << 22
_ARITHMETIC, _CC_OP_EFLAGS = 0x8D5, 1
_USABLE, _CODE_OR_DATA = 1 << 7, 1 << 4


class Places(NamedTuple):
    """Offsets in what Unicorn saves of a CPU (QEMU: ``CPUX86State``)."""

    general: int
    rip: int
    hflags: int
    segments: int
    exception: int
    """The one being delivered, with which the next makes a double fault: ``old_exception``."""


class State:
    """All that Unicorn knows of one CPU, between its runs."""

    def __init__(self, template: Any, places: Places) -> None:
        self.saved = copy.copy(template)
        self._places = places
        size = self.saved.size
        room = (ctypes.c_char * size).from_address(
            ctypes.cast(self.saved.context, ctypes.c_void_p).value or 0
        )
        self._raw = memoryview(room).cast("B")
        self._segments: list[tuple[int, ...]] = [()] * len(SEGMENTS)
        self._tables = b""

    def put_general(self, vcpu: Vcpu) -> None:
        """Set the general registers and rip."""
        _WORDS.pack_into(self._raw, self._places.general, *map(vcpu.register, GENERAL_REGISTERS))
        struct.pack_into("<Q", self._raw, self._places.rip, vcpu.register("rip"))

    def put_segments(self, vcpu: Vcpu) -> None:
        """Set the segment registers, whatever the guest's tables say."""
        at, hflags = self._places.segments, self._hflags
        wide = bool(hflags & _HF_LMA) and vcpu.segment("cs").is_64_bit
        flags = {}
        bases = 0
        for number, name in enumerate(SEGMENTS):
            base, limit, attributes = vcpu.segment(name)
            if wide and name not in ("fs", "gs"):
                base = 0  # which the CPU ignores, and Unicorn does not (SDM 1, 3.4.4)
            elif name == "cs" and base + vcpu.register("rip") > _LAST_OF_32_BITS:
                base = base - (1 << 32) & LAST_ADDRESS  # the sum wraps
            flags[name] = (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12
            SEGMENT.pack_into(self._raw, at, vcpu.register(f"{name}_sel"), base, limit, flags[name])
            self._segments[number] = SEGMENT.unpack_from(self._raw, at)
            at += SEGMENT.size
            if name in ("ds", "es", "ss"):
                bases |= base
        hflags &= ~(_HF_CPL | _HF_CS32 | _HF_SS32 | _HF_ADDSEG | _HF_CS64)
        hflags |= vcpu.segment("ss").privilege
        if wide:  # cpu_x86_load_seg_cache
            hflags |= _HF_CS32 | _HF_SS32 | _HF_CS64
        else:
            hflags |= _HF_CS32 if flags["cs"] & _BIG else 0
            hflags |= _HF_SS32 if flags["ss"] & _BIG else 0
            if bases or not hflags & _HF_CS32 or not hflags & _HF_PE:
                hflags |= _HF_ADDSEG
        _FLAGS.pack_into(self._raw, self._places.hflags, hflags)

    @property
    def _hflags(self) -> int:
        flags: int = _FLAGS.unpack_from(self._raw, self._places.hflags)[0]
        return flags

    @property
    def privilege(self) -> int:
        """The current privilege level."""
        return self._hflags & _HF_CPL

    @property
    def rip_va(self) -> int:
        """Where the instruction is."""
        code = self._places.segments + SEGMENTS.index("cs") * SEGMENT.size
        rip: int
        base: int
        _, base, _, _ = SEGMENT.unpack_from(self._raw, code)
        [rip] = struct.unpack_from("<Q", self._raw, self._places.rip)
        return (base + rip) & LAST_ADDRESS

    @property
    def wraps(self) -> bool:
        """Whether it is at no address that code of 32 bits can have, for Unicorn adds 64 bits."""
        return not self._hflags & _HF_CS64 and self.rip_va > _LAST_OF_32_BITS

    def settle_flags(self) -> None:
        """Have the arithmetic flags be those in ``cc_src``, where a counted instruction has them.

        Unicorn puts them there before it, and then, when it asks for a page, goes back to how they
        were kept (disas_insn, gen_compute_eflags; unicorn_fill_tlb, cpu_restore_state; 2.1.4).
        """
        struct.pack_into("<I", self._raw, self._places.rip + 40, _CC_OP_EFLAGS)

    def mend_flags(self) -> None:
        """Set right the arithmetic flags of an instruction that Unicorn counted and that faulted.

        It has them in ``cc_src`` by then, and says so only after the instruction (disas_insn,
        gen_compute_eflags; Unicorn 2.0 to 2.1).
        """
        at = self._places.rip
        _, flags, _, source = struct.unpack_from("<4Q", self._raw, at)
        mended = flags & ~_ARITHMETIC | source & _ARITHMETIC
        struct.pack_into("<Q", self._raw, at + 8, mended)
        struct.pack_into("<I", self._raw, at + 40, _CC_OP_EFLAGS)

    def take(self, vcpu: Vcpu) -> None:
        """Give a vCPU's context the general registers, rip and the segment registers."""
        # Unicorn delivers none, and so never sees the end of one.
        EXCEPTION_NUMBER.pack_into(self._raw, self._places.exception, -1)
        values = _WORDS.unpack_from(self._raw, self._places.general)
        context, at = vcpu.context, GENERAL.start
        context[at : at + 128] = _WORDS.pack(*(values[number] for number in ORDER))
        rip = self._places.rip
        context[RIP] = self._raw[rip : rip + 8]
        segments = self._places.segments
        now = list(SEGMENT.iter_unpack(self._raw[segments : segments + 6 * SEGMENT.size]))
        for name, here, before in zip(SEGMENTS, now, self._segments, strict=True):
            if here == before:
                continue
            selector, base, limit, flags = here
            segment = Segment(base, limit, attributes_of(flags))
            if name == "ss" and not selector & ~3 and vcpu.register("msr_efer") & EFER_LMA:
                segment = null_stack(selector & 3)  # QEMU takes it for a flat one
            elif not selector and not flags:  # null: the CPU keeps the rest, and forbids its use
                kept = vcpu.segment(name)
                segment = kept._replace(attributes=kept.attributes & ~_USABLE)
            vcpu.set_register(f"{name}_sel", selector)
            vcpu.set_segment(name, segment)
        self._segments = now

    def tables_changed(self) -> bool:
        """Whether LDTR, TR, GDTR or IDTR, which follow the segments, did since this was asked."""
        at = self._places.segments + len(SEGMENTS) * SEGMENT.size
        raw = bytes(self._raw[at : at + 4 * SEGMENT.size])
        changed, self._tables = raw != self._tables, raw
        return changed


def attributes_of(flags: int) -> int:
    """Return the attributes of a segment, from the flags that QEMU keeps."""
    return (flags >> 8 & 0xFF) | (flags >> 12 & 0xF00)


def offset_of_mark(saved: Any, mark: int) -> int:
    """Find where a saved context has a register, by the value that was written to it."""
    raw = ctypes.string_at(saved.context, saved.size)
    at = raw.find(mark.to_bytes(8, "little"))
    if at < 0 or raw.find(mark.to_bytes(8, "little"), at + 1) >= 0:
        raise not_found()
    return at


def not_found() -> RuntimeError:
    """Return the error for a version of Unicorn that keeps registers elsewhere."""
    return RuntimeError("this version of unicorn keeps registers where they are not found")


def null_stack(privilege: int) -> Segment:
    """What SS is in long mode when its selector is null, as after an interrupt of ring 3."""
    return Segment(0, 0, _CODE_OR_DATA | privilege << 5)


SEGMENT_FIELDS = [
    f"{name}_{part}" for name in SEGMENTS for part in ("sel", "base", "limit", "arbytes")
]
ORDER = sorted(range(16), key=lambda number: REGISTERS[GENERAL_REGISTERS[number]].start)
"""Of the context's registers, where the CPU numbers them."""
RIP = REGISTERS["rip"]
REST = slice(REGISTERS["rflags"].stop, HVM_CPU.size)
