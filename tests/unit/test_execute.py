# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machine code from raw pages and registers: 32 and 64 bit, paging on and off."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend

CODE, RESULT, VALUE = 0x10000, 0x5000, 0x11223344
HIGH_32, HIGH_64 = 0xC0000000, 0xFFFF_8000_0000_0000
PE, PG, PAE, PSE = 1, 1 << 31, 1 << 5, 1 << 4
LONG_MODE = 0x500
PRESENT, WRITABLE, ACCESSED, DIRTY, LARGE = 1, 2, 1 << 5, 1 << 6, 1 << 7
LINK = PRESENT | WRITABLE
POWEROFF = 0
MOV_EAX, MOV_RAX = b"\xb8", b"\x48\xb8"
STORE_EAX, STORE_RAX = b"\xa3", b"\x48\x89\x04\x25"
HLT = b"\xf4"


@pytest.fixture
def mock() -> Iterator[MockBackend]:
    host = MockBackend()
    yield host
    host.close()


@pytest.fixture
def dom(mock: MockBackend) -> Iterator[xa.Domain]:
    mock.add_domain("raw", vcpus=2)
    with xa.Xen(mock) as xen, xen.domain("raw") as domain:
        yield domain


def run(
    mock: MockBackend, dom: xa.Domain, memory: dict[int, bytes], registers: dict[str, int]
) -> None:
    """Put memory and registers into a domain, and let it run until it halts for good."""
    domid = int(dom.domid)
    for address, data in memory.items():
        dom.memory.write(address, data)
    mock.execute(domid, registers)
    mock.domain_unpause(domid)
    assert mock.domain(domid).shutdown_code == POWEROFF


def word(dom: xa.Domain, address: int, size: int = 4) -> int:
    return int.from_bytes(dom.memory.read(address, size), "little")


def program(wide: bool) -> bytes:
    move, store = (MOV_RAX, STORE_RAX) if wide else (MOV_EAX, STORE_EAX)
    return (
        move + VALUE.to_bytes(8 if wide else 4, "little") + store + struct.pack("<I", RESULT) + HLT
    )


def test_32_bit_without_paging(mock: MockBackend, dom: xa.Domain) -> None:
    run(mock, dom, {CODE: program(wide=False)}, {"rip": CODE})
    assert word(dom, RESULT) == VALUE


def test_32_bit_with_paging(mock: MockBackend, dom: xa.Domain) -> None:
    """Large pages, at 0 and high; the CPU marks the entries it used."""
    directory = 0x1000
    entries = {directory: LINK | LARGE, directory + 4 * (HIGH_32 >> 22): LINK | LARGE}
    memory = {at: struct.pack("<I", entry) for at, entry in entries.items()}
    registers = {"rip": HIGH_32 + CODE, "cr0": PE | PG, "cr3": directory, "cr4": PSE}
    run(mock, dom, {**memory, CODE: program(wide=False)}, registers)
    assert word(dom, RESULT) == VALUE
    assert word(dom, directory) == LINK | LARGE | ACCESSED | DIRTY
    assert word(dom, directory + 4 * (HIGH_32 >> 22)) == LINK | LARGE | ACCESSED


def test_64_bit(mock: MockBackend, dom: xa.Domain) -> None:
    root, middle, low = 0x1000, 0x2000, 0x3000
    entries = {root: middle | LINK, root + 8 * 256: middle | LINK, middle: low | LINK}
    entries[low] = LINK | LARGE
    memory = {at: struct.pack("<Q", entry) for at, entry in entries.items()}
    registers = {
        "rip": HIGH_64 + CODE, "cr0": PE | PG, "cr3": root, "cr4": PAE, "msr_efer": LONG_MODE,
    }  # fmt: skip
    run(mock, dom, {**memory, CODE: program(wide=True)}, registers)
    assert word(dom, RESULT, 8) == VALUE
    assert word(dom, low, 8) == LINK | LARGE | ACCESSED | DIRTY


def test_a_second_vcpu(mock: MockBackend, dom: xa.Domain) -> None:
    domid = int(dom.domid)
    dom.memory.write(CODE, program(wide=False))
    mock.execute(domid, {"rip": CODE + 10})
    mock.execute(domid, {"rip": CODE}, vcpu=1)
    mock.domain_unpause(domid)
    assert word(dom, RESULT) == VALUE
    assert [vcpu.register("rip") for vcpu in mock.domain(domid).vcpus] == [CODE + 11, CODE + 11]


def test_a_register_that_is_none(mock: MockBackend, dom: xa.Domain) -> None:
    with pytest.raises(xa.InvalidArgumentError, match="there is no register 'eip'"):
        mock.execute(int(dom.domid), {"eip": CODE})
