# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's memory, read and written across pages, and given back each time."""

from __future__ import annotations

from array import array
from errno import EPERM
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xenaltp2m import (
    PAGE_SIZE,
    Access,
    ClosedError,
    Domain,
    InvalidArgumentError,
    LeftoverError,
    View,
    Xen,
    connect,
)
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Domain as Model

RAM_END = 6 << 20
HOLE = 0x2000_0000
APIC_PAGE = 0xFEE0_0000
AT_ONCE = 256
"""Pages mapped at a time: a megabyte."""


def mapped(mock: MockBackend, since: int) -> list[Any]:
    """The gfns of each mapping made, and that each was undone before the next."""
    made = list(mock.calls)[since:]
    assert [call.op for call in made] == [
        "foreignmemory_map",
        "foreignmemory_unmap",
    ] * (len(made) // 2)
    return [call.arguments[2] for call in made[::2]]


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 4 * PAGE_SIZE), st.binary(max_size=3 * PAGE_SIZE)), max_size=5
    ),
    reads=st.lists(
        st.tuples(st.integers(0, 4 * PAGE_SIZE), st.integers(0, 3 * PAGE_SIZE)), max_size=5
    ),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_memory_is_one_long_string(
    dom: Domain, writes: list[tuple[int, bytes]], reads: list[tuple[int, int]]
) -> None:
    """Pages of the middle of two superpages, so that neighbours are not all in one frame block."""
    base, size = (1 << 21) - 3 * PAGE_SIZE, 7 * PAGE_SIZE
    model = bytearray(size)
    dom.memory.write(base, model)
    for at, data in writes:
        dom.memory.write(base + at, data)
        model[at : at + len(data)] = data
    for at, length in reads:
        assert dom.memory.read(base + at, length) == model[at : at + length]
    assert dom.memory.read(base, size) == model


def test_gfns_are_not_frames(dom: Domain, guest: Model, mock: MockBackend) -> None:
    a, b = guest.host.lookup(5).mfn, guest.host.lookup(6).mfn
    guest.host_write(5, b, 0, guest.host.lookup(5).type, 7)
    guest.host_write(6, a, 0, guest.host.lookup(6).type, 7)
    dom.memory.write(5 * PAGE_SIZE + 4090, b"behind the p2m")
    assert bytes(mock.machine.frames.page(b)[4090:]) == b"behind"
    assert bytes(mock.machine.frames.page(a)[:8]) == b" the p2m"


@pytest.mark.parametrize("address", [0, 1, PAGE_SIZE - 1])
@pytest.mark.parametrize("pages", [AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE])
def test_a_megabyte_is_mapped_at_a_time(
    dom: Domain, mock: MockBackend, address: int, pages: int
) -> None:
    length = pages * PAGE_SIZE
    data = bytes(at % 251 for at in range(length))
    since = len(mock.calls)
    dom.memory.write(address, data)
    assert dom.memory.read(address, length) == data
    made = mapped(mock, since)
    for half in (made[: len(made) // 2], made[len(made) // 2 :]):
        gfns = [gfn for span in half for gfn in span]
        assert gfns == list(range((address + length - 1) // PAGE_SIZE + 1))
        assert all(len(span) == AT_ONCE for span in half[:-1])
        assert len(half) == -(-len(gfns) // AT_ONCE)


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_is_mapped_for_nothing(dom: Domain, mock: MockBackend, length: int) -> None:
    since = len(mock.calls)
    assert dom.memory.read(0x1234, length) == bytes(length)
    dom.memory.write(0x1234, bytes(length))
    assert len(mapped(mock, since)) == 2 * length


def test_what_is_read_is_mapped_for_reading_only(dom: Domain, mock: MockBackend) -> None:
    since = len(mock.calls)
    dom.memory.read(0x1234, 1)
    dom.memory.write(0x1234, b"x")
    assert [call.arguments[1] for call in list(mock.calls)[since:][::2]] == [False, True]


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (HOLE, 1), (RAM_END - 1, 2), (RAM_END, 1), (APIC_PAGE, 4),
        (-1, 1), (-5, 3), (0, -1), (1 << 48, 1), ((1 << 48) - 1, 2), ((1 << 48) + 1, 0),
    ],
)  # fmt: skip
def test_what_is_not_memory(dom: Domain, address: int, length: int) -> None:
    with pytest.raises(InvalidArgumentError):
        dom.memory.read(address, length)
    if length >= 0:
        with pytest.raises(InvalidArgumentError):
            dom.memory.write(address, bytes(length))


def test_what_was_written_before_a_hole_stays(dom: Domain) -> None:
    data = bytes([7]) * (AT_ONCE + 1) * PAGE_SIZE
    with pytest.raises(InvalidArgumentError):
        dom.memory.write(RAM_END - AT_ONCE * PAGE_SIZE, data)
    assert dom.memory.read(RAM_END - 1, 1) == b"\7"
    with pytest.raises(InvalidArgumentError):
        dom.memory.write(RAM_END - PAGE_SIZE, bytes(2 * PAGE_SIZE))  # one mapping: all or none
    assert dom.memory.read(RAM_END - 1, 1) == b"\7"


@pytest.mark.parametrize(
    "data",
    [
        b"abcdefgh", bytearray(b"abcdefgh"), memoryview(b"abcdefgh"),
        memoryview(array("H", [0x6261, 0x6463, 0x6665, 0x6867])),
    ],
)  # fmt: skip
def test_whatever_has_bytes_can_be_written(dom: Domain, data: Any) -> None:
    dom.memory.write(PAGE_SIZE - 3, data)
    assert dom.memory.read(PAGE_SIZE - 3, 8) == b"abcdefgh"


def test_a_page_is_a_page(dom: Domain) -> None:
    page = bytes(range(256)) * 16
    dom.memory.write_page(5, page)
    assert dom.memory.read_page(5) == page
    assert dom.memory.read(5 * PAGE_SIZE - 1, PAGE_SIZE + 2) == b"\0" + page + b"\0"
    for data in (b"", page[1:], page + b"x"):
        with pytest.raises(InvalidArgumentError, match="a page is 4096 bytes"):
            dom.memory.write_page(5, data)
    for gfn in (-1, 1 << 36, True, (1 << 64) - 1):
        with pytest.raises(InvalidArgumentError):
            dom.memory.read_page(gfn)
        with pytest.raises(InvalidArgumentError):
            dom.memory.write_page(gfn, page)


def test_views_and_remaps_do_not_show(dom: Domain, view: View) -> None:
    (shadow,) = dom.add_pages()
    dom.memory.write(5 * PAGE_SIZE, b"original")
    dom.memory.write(shadow * PAGE_SIZE, b"shadowed")
    view.remap(5, shadow, access=Access.N)
    assert dom.memory.read(5 * PAGE_SIZE, 8) == b"original"
    assert dom.memory.read(shadow * PAGE_SIZE, 8) == b"shadowed"


def test_a_mapping_that_cannot_be_undone_is_undone_by_the_close(
    dom: Domain, mock: MockBackend
) -> None:
    mock.fail("foreignmemory_unmap", 1, EPERM)
    with pytest.raises(LeftoverError) as caught:
        dom.memory.read(PAGE_SIZE, 2 * PAGE_SIZE)
    assert caught.value.left == ("mapping of gfns 0x1..0x2 of domain 1",)
    assert mock.open_resources() == ["mapping of 2 pages"]
    assert dom.memory.read(PAGE_SIZE, 1) == b"\0"
    dom.close()
    assert mock.open_resources() == []


def test_memory_of_a_closed_domain(dom: Domain, mock: MockBackend) -> None:
    memory = dom.memory
    dom.close()
    since = len(mock.calls)
    for length in (0, 1):
        with pytest.raises(ClosedError):
            memory.read(0, length)
        with pytest.raises(ClosedError):
            memory.write(0, bytes(length))
    assert len(mock.calls) == since


def test_domains_do_not_share_memory(mock: MockBackend, xen: Xen, dom: Domain) -> None:
    mock.add_domain("other", memory_kib=4 << 10)
    dom.memory.write(0x1000, b"mine")
    assert xen.domain("other").memory.read(0x1000, 4) == bytes(4)


def test_a_closed_connection_maps_nothing() -> None:
    with connect("mock") as xen:
        memory = xen.domain("guest").memory
    with pytest.raises(ClosedError):
        memory.read(0, 1)
