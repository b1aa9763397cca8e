# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that executes bytes of machine code, with descriptor tables and page tables by hand."""

from __future__ import annotations

import select
import struct
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from xenaltp2m.abi.vm_event import layout
from xenaltp2m.abi.x86 import Segment
from xenaltp2m.backend.clock import Clock, Poll
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.simulator import MachineCode
from xenaltp2m.types import PAGE_SIZE, Altp2mMode

from .test_mock_events import Guest

CODE, DATA, OTHER, HANDLERS = 0x10000, 0x20000, 0x21000, 0x30000
STACK, USER_STACK, IST_STACK = 0x41F00, 0x44F00, 0x47F00
GDT, IDT, TSS = 0x50000, 0x51000, 0x52000
TABLES = 0x60000
HOLE = 0x4000_0000
HOLE_32 = HOLE.to_bytes(4, "little")
VECTORS = 33
KERNEL_CODE, KERNEL_DATA, USER_DATA, USER_CODE = 0x08, 0x10, 0x1B, 0x23
HALT, STOP, FOREVER = b"\xf4", b"\xfb\xf4", b"\xeb\xfe"
"""HLT, which ends the domain where IF is clear; STI and HLT, which waits; JMP to itself."""
PE, ET, WP, PG = 1, 1 << 4, 1 << 16, 1 << 31
PSE, PAE, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
PRESENT, WRITABLE, USER, LARGE = 1, 2, 4, 1 << 7
CF, TF, IF, RF, IOPL = 1, 1 << 8, 1 << 9, 1 << 16, 3 << 12


def elf(
    segments: Mapping[int, bytes], entry: int = CODE, *, bits: int = 32, note: bytes | None = None
) -> bytes:
    """An image as Xen loads it: a program header for each segment, and the note of a PVH guest."""
    if note is None:
        note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)
    wide = bits == 64
    head, each = (64, 56) if wide else (52, 32)
    at = head + each * (len(segments) + 1)
    headers = b""
    for kind, address, data in [*((1, *one) for one in segments.items()), (4, 0, note)]:
        size = len(data)
        headers += (
            struct.pack("<IIQQQQQQ", kind, 7, at, address, address, size, size, 1)
            if wide
            else struct.pack("<IIIIIIII", kind, at, address, address, size, size, 7, 1)
        )
        at += size
    identity = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]).ljust(12, b"\0")
    rest = struct.pack("<HHI", 2, 62 if wide else 3, 1)
    places = struct.pack("<QQQI" if wide else "<IIII", entry, head, 0, 0)
    sizes = struct.pack("<HHHHHH", head, each, len(segments) + 1, 0, 0, 0)
    return identity + rest + places + sizes + headers + b"".join(segments.values()) + note


def gate(
    offset: int, *, wide: bool, ring: int = 0, stack: int = 0, kind: int = 0xE, present: bool = True
) -> bytes:
    """An entry of the IDT."""
    middle = stack | (kind | ring << 5 | present << 7) << 8
    low = struct.pack("<HHHH", offset & 0xFFFF, KERNEL_CODE, middle, offset >> 16 & 0xFFFF)
    return low + struct.pack("<II", offset >> 32, 0) if wide else low


class GuestTime(Clock):
    """Goes on only where nothing else does, so that a timeout ends no guest's run early.

    A guest that executes without an event takes a hundredth of a second of it in a thousand looks.
    """

    _LOOK = 1e-5

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def polling(self, poller: select.epoll) -> Poll:
        def poll(seconds: float) -> list[tuple[int, int]]:
            ready = poller.poll(0)
            self._now += self._LOOK if ready else seconds
            return ready

        return poll


class Computer(Guest):
    """A domain that executes machine code, flat and with paging off, until told otherwise.

    An exception's handler is a HLT, which ends the domain: :attr:`vector` tells which it was.
    """

    def __init__(
        self,
        code: bytes,
        memory: Mapping[int, bytes] | None = None,
        *,
        xen: tuple[int, int] = (4, 17),
        vcpus: int = 1,
        mode: Altp2mMode = Altp2mMode.EXTERNAL,
        views: bool = False,
        listen: bool = False,
        host: MockBackend | None = None,
        **registers: int,
    ) -> None:
        self.host = host or MockBackend(xen, memory_pages=1 << 13)
        self.host.clock = GuestTime()
        self.host.steps_at_once = 0  # it runs when told to
        others = len(self.host.machine.domains)
        self.domid = self.host.add_domain(
            f"guest {others}" if others else "guest",
            vcpus=vcpus,
            memory_kib=2048,
            superpages=False,
            max_kib=4096,
            mode=mode,
        )
        self.model = self.host.domain(self.domid)
        self.vcpus = self.model.vcpus
        self.version = self.host.release.vm_event_version
        self.size = layout(self.version).size
        self.ring = None
        self.taken = self.answered = 0
        self.host.boot(self.domid, elf({CODE: code, **(memory or {})}))
        self.wide = False
        self.set(rsp=STACK, **registers)
        if views:
            self.host.altp2m_set_domain_state(self.domid, True)
        if listen:
            self.listen()
        self.host.domain_unpause(self.domid)

    def run(self, steps: int = 100) -> int:
        """Run, in thousands of instructions."""
        return super().run(1000 * steps)

    @property
    def processor(self) -> MachineCode:
        """The first vCPU's."""
        found = self.host._processors_of(self.domid)[0]
        assert isinstance(found, MachineCode)
        return found

    def set(self, **registers: int) -> None:
        """Set registers of the first vCPU."""
        for name, value in registers.items():
            self.vcpu.set_register(name, value)

    def write(self, address: int, data: bytes) -> None:
        """Write to memory as somebody who has it mapped does."""
        for at, one in enumerate(data, address):
            self.page(at // PAGE_SIZE)[at % PAGE_SIZE] = one

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.page(address // PAGE_SIZE)[address % PAGE_SIZE :][:size])

    def words(self, address: int, count: int) -> list[int]:
        """What lies on a stack."""
        width = 8 if self.wide else 4
        shape = f"<{count}{'Q' if self.wide else 'I'}"
        return list(struct.unpack(shape, self.read(address, width * count)))

    def describe(self, *, ring: int = 0, **gates: Any) -> None:
        """Have a GDT, an IDT with a gate for each vector, and a TSS; go on at a privilege level.

        ``gates`` are options of :func:`gate`, for those at ``at``, all by default.
        """
        flag = 1 << 53 if self.wide else 1 << 54
        code, data = 0x008F9B000000FFFF | flag, 0x00CF93000000FFFF
        user = 3 << 45
        self.write(GDT, struct.pack("<5Q", 0, code, data, data | user, code | user))
        chosen = gates.pop("at", range(VECTORS))
        for vector in range(VECTORS):
            options = gates if vector in chosen else {}
            entry = gate(HANDLERS + 16 * vector, wide=self.wide, **options)
            self.write(IDT + vector * len(entry), entry)
            self.write(HANDLERS + 16 * vector, HALT)
        if self.wide:
            self.write(TSS + 4, struct.pack("<Q", STACK))
            self.write(TSS + 0x24, struct.pack("<Q", IST_STACK))
        else:
            self.write(TSS + 4, struct.pack("<II", STACK, KERNEL_DATA))
        self.set(gdtr_base=GDT, gdtr_limit=39, tr_base=TSS, tr_sel=0x28)
        self.set(idtr_base=IDT, idtr_limit=VECTORS * (16 if self.wide else 8) - 1)
        at_ring = ring << 5
        self.set(cs_sel=KERNEL_CODE, cs_arbytes=0xA9B if self.wide else 0xC9B)
        self.set(ss_sel=KERNEL_DATA, ss_arbytes=0xC93)
        if ring:
            self.set(cs_sel=USER_CODE, cs_arbytes=self.register("cs_arbytes") | at_ring)
            self.set(ss_sel=USER_DATA, ss_arbytes=0xC93 | at_ring, rsp=USER_STACK)

    def go_real(self, **bases: int) -> None:
        """Have real mode, with the segments at the given bases and the vectors at 0."""
        self.set(cr0=ET, idtr_base=0, idtr_limit=0x3FF)
        for name in ("cs", "ds", "es", "ss"):
            base = bases.get(name, 0)
            kind = 0x9B if name == "cs" else 0x93
            self.vcpu.set_segment(name, Segment(base, 0xFFFF, kind))
            self.vcpu.set_register(f"{name}_sel", base >> 4)

    def go_long(self, flags: int = PRESENT | WRITABLE, cr4: int = 0, efer: int = 0) -> None:
        """Have 64-bit mode, with the first 2 MiB in small pages where they are."""
        tables = [TABLES + n * PAGE_SIZE for n in range(4)]
        for table, below in pairwise(tables):
            self.write(table, struct.pack("<Q", below | PRESENT | WRITABLE | USER))
        for page in range(512):
            self.write(tables[3] + 8 * page, struct.pack("<Q", page * PAGE_SIZE | flags))
        self.wide = True
        self.set(cr3=TABLES, cr4=PAE | cr4, msr_efer=LME | LMA | efer, cr0=PG | PE | ET)
        self.set(cs_arbytes=0xA9B)

    def map(self, page: int, entry: int) -> None:
        """Change an entry of the last table."""
        self.write(TABLES + 3 * PAGE_SIZE + page // PAGE_SIZE * 8, struct.pack("<Q", entry))

    @property
    def vector(self) -> int | None:
        """Which exception's handler it ended in, if in one."""
        offset, behind = divmod(self.register("rip") - HANDLERS, 16)
        return offset if behind == 1 and 0 <= offset < VECTORS else None

    def handled(self) -> list[int]:
        """Run to a handler's end; what lies on its stack."""
        self.run()
        assert self.vector is not None, hex(self.register("rip"))
        return self.words(self.register("rsp"), 6)
