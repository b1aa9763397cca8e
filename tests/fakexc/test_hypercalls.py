# SPDX-License-Identifier: LGPL-2.1-or-later
"""The domctl that no function of libxenctrl makes: what is put to Xen, and what is given back."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from xenaltp2m import errors
from xenaltp2m.abi.releases import SUPPORTED, release
from xenaltp2m.backend.libxc import LibxcBackend
from xenaltp2m.errors import InvalidArgumentError, LibraryMismatchWarning, UnsupportedError

from . import fake as fakexc
from .cases import DOMID
from .fake import Fake

DOMCTL, MONITOR_OP, CONTROL_REGISTERS = 36, 77, 4


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
