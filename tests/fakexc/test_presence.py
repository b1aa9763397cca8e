# SPDX-License-Identifier: LGPL-2.1-or-later
"""A library decides what can be called; what it lacks is named, and the release that brought it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xenaltp2m.abi.releases import SYMBOL_SINCE
from xenaltp2m.backend.libxc import LibxcBackend, clib
from xenaltp2m.backend.libxc.loader import Library
from xenaltp2m.errors import LibraryError, UnsupportedError

from . import fake as fakexc
from .cases import CASES, DOMID, ELSEWHERE, EVTCHN, XENCTRL, Case
from .fake import Fake

ESSENTIAL = {
    "xc_interface_open",
    "xc_interface_close",
    "xc_version",
    "xtl_createlogger_stdiostream",
    "xtl_logger_destroy",
}
OPENERS = {
    "xenevtchn_open",
    "xenforeignmemory_open",
    "xenforeignmemory_close",
    "xenforeignmemory_map",
    "xs_open",
    "xs_close",
    "libxl_ctx_alloc",
    "libxl_ctx_free",
    "xc_domain_getinfolist",
}
EVERYTHING = {case.function for case in CASES} | ELSEWHERE

OTHERS: list[tuple[str, Callable[[LibxcBackend], object]]] = [
    ("xc_domain_getinfolist", lambda b: b.domain_getinfolist(0, 1)),
    ("xc_domain_hvm_getcontext", lambda b: b.domain_hvm_getcontext(DOMID)),
    ("xc_domain_hvm_getcontext_partial", lambda b: b.domain_hvm_getcontext_partial(DOMID, 2, 0)),
    ("xc_vcpu_getinfo", lambda b: b.vcpu_getinfo(DOMID, 0)),
    ("xc_monitor_enable", lambda b: b.monitor_enable(DOMID)),
    ("xencall_open", lambda b: b.monitor_control_registers(DOMID)),
    ("xenevtchn_open", lambda b: b.evtchn_open()),
    ("xenforeignmemory_open", lambda b: b.foreignmemory_map(DOMID, True, [1])),
    ("xs_open", lambda b: b.domid_to_name(DOMID)),
]


def bare_backend(
    factory: pytest.TempPathFactory, keep: set[str]
) -> Iterator[tuple[LibxcBackend, Fake]]:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    library = fakexc.build(factory.mktemp("bare"), without=EVERYTHING - keep)
    backend = fakexc.connect(library)
    yield backend, Fake(library)
    backend.close()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LibxcBackend, Fake]]:
    """Libraries with nothing in them but what it takes to connect."""
    yield from bare_backend(tmp_path_factory, ESSENTIAL)


@pytest.fixture(scope="module")
def openers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LibxcBackend, Fake]]:
    """Libraries that open, but can do nothing then."""
    yield from bare_backend(tmp_path_factory, ESSENTIAL | OPENERS)


def check(error: UnsupportedError, function: str, op: str) -> None:
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert error.op == op
    assert error.errno is None
    assert function in text
    assert "libxenctrl.so.4.17" in text or not function.startswith("xc_")
    since = SYMBOL_SINCE.get(function)
    assert ("4.14 or older" if since is None else f"Xen {since[0]}.{since[1]}") in text


@pytest.mark.parametrize("case", XENCTRL, ids=str)
def test_absent(case: Case, bare: tuple[LibxcBackend, Fake]) -> None:
    backend, _ = bare
    for _ in range(2):
        with pytest.raises(UnsupportedError) as caught:
            case.call(backend)
        check(caught.value, case.function, case.operation)
    assert not backend.supports(case.function)


@pytest.mark.parametrize(("function", "call"), OTHERS, ids=[name for name, _ in OTHERS])
def test_absent_others(
    function: str, call: Callable[[LibxcBackend], object], bare: tuple[LibxcBackend, Fake]
) -> None:
    backend, _ = bare
    with pytest.raises(UnsupportedError) as caught:
        call(backend)
    check(caught.value, function, function.removeprefix("xc_").removeprefix("xen"))
    assert not backend.supports(function)


@pytest.mark.parametrize("case", EVTCHN, ids=str)
def test_absent_of_a_channel(case: Case, openers: tuple[LibxcBackend, Fake]) -> None:
    backend, _ = openers
    channel = backend.evtchn_open()
    try:
        with pytest.raises(UnsupportedError) as caught:
            case.call(backend)
        check(caught.value, case.function, case.operation)
    finally:
        backend._channels.pop(channel, None)


def test_absent_unmap_and_read(openers: tuple[LibxcBackend, Fake]) -> None:
    backend, fake = openers
    pages = backend.foreignmemory_map(DOMID, True, [1])
    with pytest.raises(UnsupportedError) as caught:
        backend.foreignmemory_unmap(pages)
    check(caught.value, "xenforeignmemory_unmap", "foreignmemory_unmap")
    backend._mappings.clear()
    with pytest.raises(UnsupportedError, match="xs_read"):
        backend.domid_to_name(DOMID)
    info = bytearray(112)
    info[:2] = DOMID.to_bytes(2, "little")
    fake.answer("xc_domain_getinfolist", 1, data=bytes(info))
    with pytest.raises(UnsupportedError, match="libxl_userdata_retrieve"):
        backend.domain_config_json(DOMID)


CLOSERS = {"xc_interface_close", "xtl_logger_destroy"}


@pytest.mark.parametrize("missing", sorted(ESSENTIAL - CLOSERS))
def test_nothing_to_connect_with(missing: str, tmp_path: Path) -> None:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    library = fakexc.build(tmp_path / "lib", without={missing})
    with pytest.raises(UnsupportedError, match=missing):
        fakexc.connect(library)


@pytest.mark.parametrize("missing", sorted(CLOSERS))
def test_nothing_to_close_with(missing: str, tmp_path: Path) -> None:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    backend = fakexc.connect(fakexc.build(tmp_path / "lib", without={missing}))
    with pytest.raises(UnsupportedError, match=missing):
        backend.close()


def test_supports(backend: LibxcBackend) -> None:
    for function in EVERYTHING:
        assert backend.supports(function) != function.startswith("xtl_"), function
    assert not backend.supports("xc_altp2m_set_suppress_ve_multi"), "that spelling never existed"
    assert not backend.supports("xc_no_such_thing")
    assert not backend.supports("printf")
    assert not backend.supports("")


def test_a_library_is_opened_once_and_never_unloaded() -> None:
    """cffi unloads a library with its last reference, and under the feet of its handles."""

    class Handle:
        xs_open = "bound"

    opened = []

    def open_library() -> Library:
        opened.append(Handle())
        return Library("tests/only-here.so", opened[-1])

    functions = clib.Functions("xs_", open_library)
    assert opened == []
    assert functions.xs_open == functions.xs_open == "bound"
    assert not hasattr(functions, "xs_no_such_thing")
    handle = weakref.ref(opened.pop())
    assert opened == []
    del functions
    gc.collect()
    assert handle() is not None


def test_a_companion_that_is_not_there(tmp_path: Path) -> None:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    library = fakexc.build(tmp_path / "lib", release="4.95")  # which no system has
    (library.parent / "libxenlight.so.4.95").unlink()
    fake = Fake(library)
    fake.answer("xc_version", 4 << 16 | 95)
    backend = fakexc.connect(library)
    try:
        assert not backend.supports("libxl_ctx_alloc")
        info = bytearray(112)
        info[:2] = (1).to_bytes(2, "little")
        fake.answer("xc_domain_getinfolist", 1, data=bytes(info))
        with pytest.raises(LibraryError) as caught:
            backend.domain_config_json(1)
        assert "libxenlight.so.4.95: " in str(caught.value)
        assert backend.altp2m_create_view(1, 7) == 0, "what does not need it goes on"
    finally:
        backend.close()
