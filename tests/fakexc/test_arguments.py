# SPDX-License-Identifier: LGPL-2.1-or-later
"""What C would truncate, or misread, never gets there."""

from __future__ import annotations

import enum
import inspect
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rows import Rows
from xenaltp2m.backend import Backend
from xenaltp2m.backend.libxc import LibxcBackend
from xenaltp2m.errors import InvalidArgumentError

from .fake import Fake

U16, U32, U64 = 1 << 16, 1 << 32, 1 << 64

BOUNDS = {
    "domid": 0x7FF0,
    "first_domid": 0x7FF0,
    "limit": U32,
    "view": U16,
    "vcpu": U32,
    "gfn": U64,
    "first_gfn": U64,
    "last_gfn": U64,
    "old_gfn": U64,
    "new_gfn": U64,
    "access": U16,
    "default_access": U16,
    "count": U32,
    "max_kib": U64,
    "order": 32,
    "param": U32,
    "value": U64,
    "typecode": U16,
    "instance": U16,
    "op": U32,
    "size": U64,
    "index": 1 << 8,  # uint8_t in domctl.h, uint16_t in C's prototype
    "bitmask": U64,
    "msr": U32,
    "vector": 1 << 8,
    "kind": 1 << 8,
    "error_code": U32,
    "length": 1 << 8,
    "cr2": U64,
    "port": U32,
    "remote_port": U32,
}
"""Exclusive; written down here anew, so that a changed table is noticed."""

SAMPLES: dict[str, object] = {
    "accesses": b"\1",
    "gfns": array("Q", [1]),
    "stream": b"\1",
    "name": "guest",
    "path": "/local/domain/1/name",
    "channel": 1,
}


NARROWER = {
    ("set_mem_access", "access"): 1 << 8,  # uint8_t in memory.h
    ("vcpu_getinfo", "vcpu"): U16,  # a cast in xc_domain.c
}


def bound_of(method: str, name: str) -> int:
    return NARROWER.get((method, name), BOUNDS[name])


def methods() -> Iterator[tuple[str, inspect.Signature]]:
    for method, member in vars(Backend).items():
        if callable(member) and not method.startswith("_"):
            yield method, inspect.signature(member)


NUMBERS = [
    (method, name)
    for method, signature in methods()
    for name, parameter in signature.parameters.items()
    if parameter.annotation == "int" and name != "channel"
]
FLAGS = [
    (method, name)
    for method, signature in methods()
    for name, parameter in signature.parameters.items()
    if parameter.annotation == "bool"
]


def sample(name: str, annotation: str) -> object:
    if annotation == "bool":
        return True
    return SAMPLES.get(name, 1)


def call_with(backend: LibxcBackend, method: str, name: str, value: object) -> object:
    """Call a method with good arguments but one."""
    signature = inspect.signature(getattr(Backend, method))
    args = {
        key: sample(key, parameter.annotation)
        for key, parameter in signature.parameters.items()
        if key != "self"
    }
    return getattr(backend, method)(**{**args, name: value})


@pytest.fixture
def ready(backend: LibxcBackend, fake: Fake) -> LibxcBackend:
    assert backend.evtchn_open() == SAMPLES["channel"]
    fake.reset()
    return backend


def test_all_numbers_of_the_protocol_are_known() -> None:
    assert {name for _, name in NUMBERS} <= set(BOUNDS)
    assert {name for _, name in NUMBERS} == set(BOUNDS)


@pytest.mark.parametrize("beyond", [-1, 0, 1 << 16, 1 << 64, -(1 << 63)])
def test_out_of_range(beyond: int, ready: LibxcBackend, fake: Fake) -> None:
    rows = Rows()
    for method, name in rows.each(NUMBERS):
        bound = bound_of(method, name)
        value = beyond if beyond < 0 else bound + beyond
        with rows.row(f"{method}, {name}"):
            with pytest.raises(InvalidArgumentError) as caught:
                call_with(ready, method, name, value)
            text = str(caught.value)
            assert text.startswith(f"{method}: {name} is {value:#x}")
            assert f"0..{bound - 1:#x}" in text
            assert caught.value.op == method
            assert fake.names() == []


@pytest.mark.parametrize("value", [None, 1.0, "1", b"1", True, [1]], ids=repr)
def test_not_an_integer(value: object, ready: LibxcBackend, fake: Fake) -> None:
    rows = Rows()
    for method, name in rows.each(NUMBERS):
        wanted = rf"^{method}: {name} must be an integer, not "
        with rows.row(f"{method}, {name}"):
            with pytest.raises(InvalidArgumentError, match=wanted):
                call_with(ready, method, name, value)
            assert fake.names() == []


@pytest.mark.parametrize("value", [None, 0, 1, 2, "yes"], ids=repr)
def test_not_a_flag(value: object, ready: LibxcBackend, fake: Fake) -> None:
    rows = Rows()
    for method, name in rows.each(FLAGS):
        with rows.row(f"{method}, {name}"):
            with pytest.raises(InvalidArgumentError, match=rf"^{method}: {name} must be a bool, "):
                call_with(ready, method, name, value)
            assert fake.names() == []


class Number(enum.IntEnum):
    FIVE = 5


def test_enums_are_integers(backend: LibxcBackend, fake: Fake) -> None:
    backend.altp2m_set_mem_access(Number.FIVE, Number.FIVE, Number.FIVE, Number.FIVE)
    assert fake.only_call().args == (5, 5, 5, 5)


def test_a_number_xen_would_refuse_is_put_to_xen(backend: LibxcBackend, fake: Fake) -> None:
    backend.altp2m_set_mem_access(0x7FEF, 0xFFFF, U64 - 1, 0xFFFF)
    assert fake.only_call().args == (0x7FEF, 0xFFFF, U64 - 1, 0xFFFF)


def test_the_livelock_of_suppress_ve(backend: LibxcBackend, fake: Fake) -> None:
    with pytest.raises(InvalidArgumentError, match="never returns"):
        backend.altp2m_set_suppress_ve(1, 1, U64 - 1, True)
    assert fake.names() == []
    backend.altp2m_set_suppress_ve_multi(1, 1, 0, U64 - 1, True)  # Xen clamps that one


BAD_ARRAYS: list[tuple[Any, Any]] = [
    (b"\1", array("Q", [1, 2])),
    (b"\1\2", array("Q", [1])),
    (b"\1", array("L", [1])),
    (b"\1", array("I", [1])),
    (b"\1", [1]),
    (b"\1", None),
    (b"\1", memoryview(b"\1")),
    (b"\1\2", memoryview(array("Q", range(8)))[::4]),
    (memoryview(bytes(8))[::4], array("Q", [1, 2])),
    ([1], array("Q", [1])),
    ("r", array("Q", [1])),
    (None, array("Q", [1])),
]


@pytest.mark.parametrize(("accesses", "gfns"), BAD_ARRAYS)
def test_bad_arrays(accesses: Any, gfns: Any, backend: LibxcBackend, fake: Fake) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^altp2m_set_mem_access_multi: "):
        backend.altp2m_set_mem_access_multi(1, 1, accesses, gfns)
    with pytest.raises(InvalidArgumentError, match=r"^set_mem_access_multi: "):
        backend.set_mem_access_multi(1, accesses, gfns)
    assert fake.names() == []


def test_empty_arrays_are_put_to_xen(backend: LibxcBackend, fake: Fake) -> None:
    backend.altp2m_set_mem_access_multi(1, 2, b"", array("Q"))
    assert fake.only_call().args[:3] == (1, 2, 0)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_arrays_are_lent_and_not_copied(kind: Any, backend: LibxcBackend, fake: Fake) -> None:
    accesses, gfns = kind(b"\7" * 100), array("Q", range(100))
    backend.altp2m_set_mem_access_multi(1, 2, accesses, gfns)
    backend.altp2m_set_mem_access_multi(1, 2, accesses, memoryview(gfns))
    address, _ = gfns.buffer_info()
    assert [call.args[4] for call in fake.calls] == [address, address]
    assert len({call.args[3] for call in fake.calls}) == 1


def test_extents_are_copied(backend: LibxcBackend, fake: Fake) -> None:
    """The stand-in writes over the list it is given, as the real one may."""
    gfns = array("Q", [7, 8])
    frozen = memoryview(gfns).toreadonly()
    backend.domain_populate_physmap_exact(1, gfns)
    backend.domain_decrease_reservation_exact(1, frozen)
    assert list(gfns) == [7, 8]
    assert [call.data for call in fake.calls] == [gfns.tobytes()] * 2


@pytest.mark.parametrize("gfns", [[-1], [1 << 64], ["1"], [1.0], 5, None], ids=repr)
def test_bad_gfn_lists(gfns: Any, backend: LibxcBackend, fake: Fake) -> None:
    for method in ("domain_populate_physmap_exact", "domain_decrease_reservation_exact"):
        with pytest.raises(InvalidArgumentError, match=rf"^{method}: gfns: "):
            getattr(backend, method)(1, gfns)
    with pytest.raises(InvalidArgumentError, match=r"^foreignmemory_map: gfns: "):
        backend.foreignmemory_map(1, True, gfns)
    assert fake.names() == []


@pytest.mark.parametrize("stream", [None, "text", 5, memoryview(bytes(8))[::2]])
def test_bad_stream(stream: Any, backend: LibxcBackend, fake: Fake) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^domain_hvm_setcontext: stream: "):
        backend.domain_hvm_setcontext(1, stream)
    assert fake.names() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    domid=st.integers(0, 0x7FEF),
    view=st.integers(0, U16 - 1),
    old=st.integers(0, U64 - 1),
    new=st.integers(0, U64 - 1),
)
def test_any_number_in_range_arrives_as_it_is(
    backend: LibxcBackend, fake: Fake, domid: int, view: int, old: int, new: int
) -> None:
    fake.reset()
    backend.altp2m_change_gfn(domid, view, old, new)
    assert fake.only_call().args == (domid, view, old, new)
