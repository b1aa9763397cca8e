# SPDX-License-Identifier: LGPL-2.1-or-later
"""Linear addresses by a guest's page tables: where they lead, and what is read and written there.

Expected values are put together here from the indices of SDM 3A, figures 4-2, 4-5, 4-8 to 4-11.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xenaltp2m as xa
from xenaltp2m.abi.x86 import (
    CR0_PE,
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    Paging,
)
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.handles.memory import AddressSpace

ROOT, TABLES = 0x10_0000, 0x10_1000
DATA, MORE = 0x20_0000, 0x31_0000
P, W, U, LARGE, NX = 1, 2, 4, 1 << 7, 1 << 63
ON, LONG = CR0_PE | CR0_PG, EFER_LME | EFER_LMA | EFER_NXE
HIGH = 0xFFFF_FFFF_8123_4000
PAGINGS = {
    "2": Paging(ON, ROOT, CR4_PSE, 0, user=False, physical_bits=52),
    "3": Paging(ON, ROOT, CR4_PAE, EFER_NXE, user=False, physical_bits=52),
    "4": Paging(ON, ROOT, CR4_PAE, LONG, user=False, physical_bits=52),
    "5": Paging(ON, ROOT, CR4_PAE | CR4_LA57, LONG, user=False, physical_bits=52),
}
SHIFTS = {"2": [22, 12], "3": [30, 21, 12], "4": [39, 30, 21, 12], "5": [48, 39, 30, 21, 12]}


@pytest.fixture
def dom() -> Iterator[xa.Domain]:
    mock = MockBackend()
    mock.add_domain("guest", memory_kib=8 << 10)
    with xa.connect(mock) as xen, xen.domain("guest") as domain:
        yield domain


class Tables:
    """Page tables that a test writes into a guest's memory."""

    def __init__(self, dom: xa.Domain, mode: str) -> None:
        self.dom, self.mode = dom, mode
        self.size = 4 if mode == "2" else 8
        self.bits = 10 if mode == "2" else 9
        self.next = TABLES
        self.known: dict[tuple[int, ...], int] = {(): ROOT}
        self.space = AddressSpace(dom.memory, PAGINGS[mode])

    def map(self, address: int, entry: int, shift: int = 12, above: int = P | W | U) -> None:
        """Have an address lead to what an entry says, in the table for that level."""
        path: tuple[int, ...] = ()
        for level in SHIFTS[self.mode]:
            index = address >> level & ((1 << self.bits) - 1)
            if self.mode == "3" and level == 30:
                index &= 3
            where = self.known[path] + index * self.size
            if level == shift:
                self.put(where, entry)
                return
            path = (*path, index)
            if path not in self.known:
                self.known[path], self.next = self.next, self.next + 4096
                rights = P if (self.mode, level) == ("3", 30) else above
                self.put(where, self.known[path] | rights)

    def put(self, where: int, value: int) -> None:
        self.dom.memory.write(where, value.to_bytes(self.size, "little"))


MODES = pytest.mark.parametrize("mode", PAGINGS)


def address_in(mode: str) -> int:
    return HIGH if mode in "45" else HIGH & 0xFFFF_FFFF


@MODES
def test_small_pages(dom: xa.Domain, mode: str) -> None:
    tables, address = Tables(dom, mode), address_in(mode)
    tables.map(address, DATA | P | W | U)
    tables.map(address + 0x1000, MORE | P)
    here, there = (tables.space.translate(address + at) for at in (0x123, 0x1FFF))
    assert here == (DATA + 0x123, 4096, True, True, True)
    assert there == (MORE + 0xFFF, 4096, False, False, True)
    dom.memory.write(DATA + 0xFFE, b"ab")
    dom.memory.write(MORE, b"cd\0e")
    assert tables.space.read(address + 0xFFE, 4) == b"abcd"
    assert tables.space.read_string(address + 0xFFE) == b"abcd"
    assert tables.space.read_string(address + 0xFFE, 3) == b"abc"
    assert tables.space.read_number(address + 0xFFE, 4) == int.from_bytes(b"abcd", "little")
    tables.space.write(address + 0xFFF, b"BC")
    assert dom.memory.read(DATA + 0xFFF, 1) + dom.memory.read(MORE, 1) == b"BC"


@pytest.mark.parametrize(
    ("mode", "shift", "size"),
    [
        ("2", 22, 4 << 20),
        ("3", 21, 2 << 20),
        ("4", 21, 2 << 20),
        ("4", 30, 1 << 30),
        ("5", 30, 1 << 30),
    ],
)
def test_large_pages(dom: xa.Domain, mode: str, shift: int, size: int) -> None:
    tables, address = Tables(dom, mode), address_in(mode)
    tables.map(address, P | U | LARGE, shift)
    found = tables.space.translate(address + 5)
    assert found == ((address + 5) % size, size, False, True, True)


@pytest.mark.parametrize("mode", ["3", "4", "5"])
def test_pages_that_are_not_for_code(dom: xa.Domain, mode: str) -> None:
    tables, address = Tables(dom, mode), address_in(mode)
    tables.map(address, DATA | P | NX)
    assert not tables.space.translate(address).executable


@MODES
def test_what_leads_nowhere(dom: xa.Domain, mode: str) -> None:
    tables, address = Tables(dom, mode), address_in(mode)
    with pytest.raises(xa.NotMappedError, match="an entry is not present"):
        tables.space.read(address, 1)
    tables.map(address, DATA & ~P)
    with pytest.raises(xa.NotMappedError, match=f"{address:#x} is not mapped"):
        tables.space.translate(address)
    tables.map(address, 0x7000_0000 | P)
    with pytest.raises(xa.NotMappedError, match="gfn 0x70000, which is not memory"):
        tables.space.read(address, 1)
    tables.map(address, DATA | P)
    with pytest.raises(xa.NotMappedError):
        tables.space.write(address + 0xFFF, b"xy")
    assert dom.memory.read(DATA + 0xFFF, 1) == b"\0"


def test_bad_addresses(dom: xa.Domain) -> None:
    four, two = Tables(dom, "4").space, Tables(dom, "2").space
    with pytest.raises(xa.NotMappedError, match="not canonical"):
        four.translate(1 << 47)
    for space, address in ((four, -1), (four, 1 << 64), (two, 1 << 32)):
        with pytest.raises(xa.InvalidArgumentError):
            space.translate(address)
    with pytest.raises(xa.InvalidArgumentError):
        four.read(0, -1)
    with pytest.raises(xa.InvalidArgumentError):
        four.read_number(0, 9)


def test_without_paging(dom: xa.Domain) -> None:
    space = AddressSpace(dom.memory, Paging(CR0_PE, 0, 0, 0, user=False))
    dom.memory.write(DATA, b"here")
    assert space.read(DATA, 4) == b"here"
    assert space.translate(DATA).physical == DATA
    with pytest.raises(xa.InvalidArgumentError):
        space.translate(1 << 32)


def test_a_table_that_is_its_own(dom: xa.Domain) -> None:
    """A walk is bounded, whatever it meets."""
    tables = Tables(dom, "4")
    dom.memory.write_page(ROOT >> 12, struct.pack("<Q", ROOT | P | W | U) * 512)
    assert tables.space.translate(0x1234).physical == ROOT + 0x234


def test_pages_are_remembered_until_something_changes(dom: xa.Domain) -> None:
    mock = dom.xen.backend
    assert isinstance(mock, MockBackend)
    tables, address = Tables(dom, "4"), address_in("4")
    tables.map(address, DATA | P)

    def maps() -> int:
        before = len(list(mock.calls))
        tables.space.read(address, 8)
        return sum(call.op == "foreignmemory_map" for call in list(mock.calls)[before:])

    assert maps() == 5  # nothing is asked for who reads once
    assert maps() == 5
    assert maps() == 0
    dom.memory.write(DATA, b"changed!")
    assert maps() == 5
    assert tables.space.read(address, 8) == b"changed!"
    mock.machine.domains[int(dom.domid)].vcpus[0].cpu_time += 1
    assert maps() == 5


def test_by_a_vcpu_s_registers(dom: xa.Domain) -> None:
    tables, address = Tables(dom, "4"), address_in("4")
    tables.map(address, DATA | P)
    dom.memory.write(DATA, b"here")
    vcpu = dom.vcpu(0)
    vcpu.set_registers(cr0=ON | 0x10, cr4=CR4_PAE, msr_efer=LONG, cr3=ROOT)
    assert dom.memory.address_space().read(address, 4) == b"here"
    assert dom.memory.address_space(vcpu.registers()).read(address, 4) == b"here"
    assert dom.memory.read_va(ROOT, address, 4) == b"here"
    with pytest.raises(xa.NotMappedError):
        dom.memory.read_va(0x40_0000, address, 4)


@MODES
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_tables(dom: xa.Domain, mode: str, data: st.DataObject) -> None:
    """Whatever the guest has put there: an address in memory, or a typed error."""
    space = AddressSpace(dom.memory, PAGINGS[mode])
    entries = st.integers(0, (1 << (32 if mode == "2" else 64)) - 1) | st.builds(
        lambda gfn, flags: gfn << 12 | flags, st.integers(0, 0x800), st.integers(0, 0xFFF)
    )
    shape, count = ("<1024I", 1024) if mode == "2" else ("<512Q", 512)
    for gfn in range(ROOT >> 12, (ROOT >> 12) + 3):
        some = data.draw(st.lists(entries, min_size=4, max_size=4))
        dom.memory.write_page(gfn, struct.pack(shape, *some * (count // 4)))
    address = data.draw(st.integers(0, (1 << (64 if mode in "45" else 32)) - 1))
    try:
        found = space.translate(address)
    except xa.NotMappedError:
        return
    assert found.page_size in (4096, 2 << 20, 4 << 20, 1 << 30)
    assert found.physical % found.page_size == address % found.page_size


@pytest.mark.parametrize("how", ["the same connection", "another connection"])
def test_fault_09_a_write_through_another_handle_is_seen(how: str) -> None:
    """Pages are remembered while no vCPU runs: what this process writes changes them, too."""
    mock = MockBackend()
    mock.add_domain("guest", memory_kib=8 << 10)
    with xa.connect(mock) as xen, xa.connect(mock) as second, xen.domain("guest") as dom:
        tables, address = Tables(dom, "4"), address_in("4")
        tables.map(address, DATA | P)
        assert [tables.space.read(address, 2) for _ in range(2)] == [bytes(2)] * 2
        other = (xen if how == "the same connection" else second).domain("guest")
        other.memory.write(DATA, b"ab")
        assert tables.space.read(address, 2) == b"ab"
        other.close()
