# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hypercalls made without libxenctrl: what is put to Xen, and what is given back."""

from __future__ import annotations

import errno
import struct
from array import array
from pathlib import Path

import pytest

from xenaltp2m import errors
from xenaltp2m.abi._ffi import ffi
from xenaltp2m.abi.releases import SUPPORTED, release
from xenaltp2m.backend.libxc import LibxcBackend
from xenaltp2m.backend.libxc.loader import ENVIRONMENT, Loader
from xenaltp2m.errors import InvalidArgumentError, LibraryMismatchWarning, UnsupportedError
from xenaltp2m.types import MemoryType

from . import fake as fakexc
from .cases import DOMID
from .fake import Fake

DOMCTL, MONITOR_OP, CONTROL_REGISTERS = 36, 77, 4
HVM_OP, ALTP2M, SET_MEM_ACCESS_MULTI, GET_MEM_TYPE = 34, 25, 9, 15
VIEW, MANY = 3, 511
"""One gfn more than libxenctrl is trusted with."""


def domctl(version: int, domid: int = DOMID) -> bytes:
    """``struct xen_domctl``, laid out by hand from public/domctl.h."""
    return struct.pack("<IIH6xI", MONITOR_OP, version, domid, CONTROL_REGISTERS).ljust(144, b"\0")


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_is_put_to_xen(version: tuple[int, int], tmp_path: Path) -> None:
    """With the hypervisor's number, whose library however is always 4.17's."""
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    fake = Fake(fakexc.build(tmp_path / "lib"))
    fake.answer("xc_version", version[0] << 16 | version[1])
    if version == (4, 17):
        backend = fakexc.connect(fake.library)
    else:
        with pytest.warns(LibraryMismatchWarning):
            backend = fakexc.connect(fake.library)
    fake.reset()
    backend.monitor_control_registers(DOMID)
    opened, allocated, called, freed = fake.calls
    assert (opened.name, opened.args) == ("xencall_open", (1, 0))
    assert (allocated.name, allocated.handle, allocated.args) == (
        "xencall_alloc_buffer", "h", (144,),
    )  # fmt: skip
    assert (called.name, called.handle, called.args[0]) == ("xencall1", "h", DOMCTL)
    assert called.data == domctl(release(*version).domctl_version)
    assert (freed.name, freed.handle, freed.args) == ("xencall_free_buffer", "h", called.args[1:])
    fake.reset()
    backend.close()
    assert fake.names().count("xencall_close") == 1


def test_the_library_is_opened_once(backend: LibxcBackend, fake: Fake) -> None:
    for _ in range(2):
        backend.monitor_control_registers(1)
    assert fake.names().count("xencall_open") == 1
    assert fake.calls[-2].data == domctl(0x15, 1)


@pytest.mark.parametrize("number", range(1, 134))
def test_every_errno_becomes_its_error(number: int, backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xencall1", number)
    with pytest.raises(errors.XenError) as caught:
        backend.monitor_control_registers(DOMID)
    expected = errors.from_errno("monitor_control_registers", number, domid=DOMID)
    assert type(caught.value) is type(expected)
    assert str(caught.value) == str(expected)
    assert caught.value.context() == expected.context()
    assert fake.names()[-2:] == ["xencall1", "xencall_free_buffer"]
    backend.monitor_control_registers(DOMID)


@pytest.mark.parametrize("function", ["xencall_open", "xencall_alloc_buffer"])
def test_nothing_is_put_to_xen_without_a_buffer(
    function: str, backend: LibxcBackend, fake: Fake
) -> None:
    fake.fail(function, errno.ENOMEM)
    with pytest.raises(errors.OutOfMemoryError) as caught:
        backend.monitor_control_registers(DOMID)
    assert caught.value.op == function.removeprefix("xen")
    assert not {"xencall1", "xencall_free_buffer"} & set(fake.names())
    backend.monitor_control_registers(DOMID)


@pytest.mark.parametrize("missing", ["xencall_alloc_buffer", "xencall1"])
def test_a_library_without_it(missing: str, tmp_path: Path) -> None:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    library = fakexc.build(tmp_path / "lib", without={missing})
    fake = Fake(library)
    backend = fakexc.connect(library)
    with pytest.raises(UnsupportedError, match=missing):
        backend.monitor_control_registers(DOMID)
    names = fake.names()
    assert names.count("xencall_alloc_buffer") == names.count("xencall_free_buffer")
    assert not backend.supports(missing)
    backend.close()


def test_a_bad_domid_opens_nothing(backend: LibxcBackend, fake: Fake) -> None:
    with pytest.raises(InvalidArgumentError):
        backend.monitor_control_registers(0x7FF0)
    assert fake.names() == []


# The type of a gfn.


def test_what_is_asked_about_a_gfn(backend: LibxcBackend, fake: Fake) -> None:
    """``struct xen_hvm_get_mem_type``, laid out by hand from public/hvm/hvm_op.h."""
    fake.answer("xencall2", outs=(4, 0))
    assert backend.hvm_get_mem_type(DOMID, 0xFEDC_BA98_7654_3210) is MemoryType.IOREQ_SERVER
    opened, allocated, called, freed = fake.calls
    assert (opened.name, allocated.name, allocated.args) == (
        "xencall_open", "xencall_alloc_buffer", (16,),
    )  # fmt: skip
    assert (called.name, called.args[:2]) == ("xencall2", (HVM_OP, GET_MEM_TYPE))
    assert called.data == struct.pack("<HHIQ", DOMID, 0, 0, 0xFEDC_BA98_7654_3210)
    assert (freed.name, freed.args) == ("xencall_free_buffer", called.args[2:])
    for number in range(3):
        fake.answer("xencall2", outs=(number, 0))
        assert backend.hvm_get_mem_type(1, 2) == number


@pytest.mark.parametrize("number", range(1, 134))
def test_every_errno_about_a_gfn(number: int, backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xencall2", number)
    with pytest.raises(errors.XenError) as caught:
        backend.hvm_get_mem_type(DOMID, 5)
    expected = errors.from_errno("hvm_get_mem_type", number, domid=DOMID)
    assert (type(caught.value), str(caught.value)) == (type(expected), str(expected))
    assert fake.names()[-1] == "xencall_free_buffer"
    assert backend.hvm_get_mem_type(DOMID, 5) is MemoryType.RAM


# Bulk access.


def gfns(count: int) -> array[int]:
    return array("Q", range(1 << 35, (1 << 35) + count))


def accesses(count: int) -> bytes:
    return bytes(gfn % 7 for gfn in range(count))


def set_many(backend: LibxcBackend, count: int = MANY) -> None:
    backend.altp2m_set_mem_access_multi(DOMID, VIEW, accesses(count), gfns(count))


def test_what_a_bulk_access_puts_to_xen(backend: LibxcBackend, fake: Fake) -> None:
    """``struct xen_hvm_altp2m_op``, laid out by hand from public/hvm/hvm_op.h."""
    set_many(backend, 600)
    set_many(backend)
    opened, allocated, first, second = fake.calls
    assert (opened.name, opened.args) == ("xencall_open", (1, 0))
    assert (allocated.name, allocated.handle, allocated.args) == (
        "xencall_alloc_buffer", "h", (80 + 9 * 65536,),
    )  # fmt: skip
    for call, count in ((first, 600), (second, MANY)):
        assert (call.name, call.handle, call.args[:2]) == ("xencall2", "h", (HVM_OP, ALTP2M))
        address = call.args[2]
        lists = address + 80, address + 80 + 8 * count
        head = struct.pack("<IIH6xHHI", 1, SET_MEM_ACCESS_MULTI, DOMID, VIEW, 0, count)
        op = (head + struct.pack("<QQQ", 0, *lists)).ljust(80, b"\0")
        assert call.data == op + gfns(count).tobytes() + accesses(count)
    assert first.args == second.args, "one buffer"
    fake.reset()
    backend.close()
    names = fake.names()
    assert names.index("xencall_free_buffer") < names.index("xencall_close")
    with pytest.raises(errors.ClosedError) as caught:
        set_many(backend)
    assert caught.value.op == "altp2m_set_mem_access_multi"


@pytest.mark.parametrize("count", [0, 1, MANY - 1, 65537])
def test_the_others_are_libxenctrls(count: int, backend: LibxcBackend, fake: Fake) -> None:
    set_many(backend, count)
    assert fake.names() == ["xc_altp2m_set_mem_access_multi"]


def test_the_most_at_a_time(backend: LibxcBackend, fake: Fake) -> None:
    set_many(backend, 65536)
    assert fake.names()[-1] == "xencall2"


@pytest.mark.parametrize("number", range(1, 134))
def test_every_errno_of_a_bulk_access(number: int, backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xencall2", number)
    with pytest.raises(errors.XenError) as caught:
        set_many(backend)
    expected = errors.from_errno("altp2m_set_mem_access_multi", number, domid=DOMID, view=VIEW)
    assert type(caught.value) is type(expected)
    assert str(caught.value) == str(expected)
    assert caught.value.context() == expected.context()
    set_many(backend)
    assert fake.names()[-2:] == ["xencall2", "xencall2"], "with the same buffer"


@pytest.mark.parametrize("function", ["xencall_open", "xencall_alloc_buffer"])
def test_without_a_buffer_libxenctrl_tries(
    function: str, backend: LibxcBackend, fake: Fake
) -> None:
    fake.fail(function, errno.ENOMEM)
    fake.fail("xc_altp2m_set_mem_access_multi", errno.ENOMEM)
    with pytest.raises(errors.OutOfMemoryError) as caught:
        set_many(backend)
    assert caught.value.op == "altp2m_set_mem_access_multi"
    set_many(backend)
    assert fake.names()[-1] == "xencall2"


@pytest.mark.parametrize("missing", ["xencall_open", "xencall_alloc_buffer", "xencall2"])
def test_without_a_function_libxenctrl_does_it(missing: str, tmp_path: Path) -> None:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    library = fakexc.build(tmp_path / "lib", without={missing})
    fake = Fake(library)
    backend = fakexc.connect(library)
    set_many(backend)
    call = fake.calls[-1]
    assert (call.name, call.args[:3]) == ("xc_altp2m_set_mem_access_multi", (DOMID, VIEW, MANY))
    backend.close()


def test_without_libxencall_libxenctrl_does_it(library: Path, fake: Fake) -> None:
    def dlopen(name: str) -> object:
        if "xencall" in name:
            raise OSError(f"cannot load library '{name}'")
        return ffi.dlopen(name)

    environ = {ENVIRONMENT: str(library)}
    backend = LibxcBackend(Loader(dlopen, environ, library.parent / "no-sysfs"))
    fake.reset()
    set_many(backend)
    assert fake.names() == ["xc_altp2m_set_mem_access_multi"]
    backend.close()


def test_a_bulk_access_checks_its_arguments(backend: LibxcBackend, fake: Fake) -> None:
    for domid, view in ((0x7FF0, VIEW), (DOMID, 1 << 16)):
        with pytest.raises(InvalidArgumentError, match=r"^altp2m_set_mem_access_multi: "):
            backend.altp2m_set_mem_access_multi(domid, view, accesses(MANY), gfns(MANY))
    assert fake.names() == []


def test_a_buffer_is_one_calls_at_a_time(backend: LibxcBackend, fake: Fake) -> None:
    fake.quiet()
    failures: list[Exception] = []

    def run(number: int) -> None:
        marks, like = array("Q", [0x8000 | number]) * 20000, bytes([number]) * 20000
        try:
            for _ in range(100):
                backend.altp2m_set_mem_access_multi(DOMID, 0x8000 | number, like, marks)
        except errors.XenError as error:
            failures.append(error)

    numbers = range(1, 9)
    fakexc.race(run, numbers)
    assert failures == []
    assert 1 <= len(backend._buffers) <= len(numbers)
