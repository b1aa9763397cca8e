# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is opened is closed, once, in order and whatever fails; nothing dead is ever touched."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import threading
import traceback
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xenaltp2m.backend.libxc import LibxcBackend
from xenaltp2m.errors import (
    AccessDeniedError,
    BusyError,
    ClosedError,
    InvalidArgumentError,
    LibraryMismatchWarning,
    OutOfMemoryError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.types import PAGE_SIZE

from . import fake as fakexc
from .cases import CASES
from .fake import Fake


def descriptors() -> set[str]:
    gc.collect()
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


# Opening.


def test_what_connecting_does(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    created, opened, asked = fake.calls
    assert (created.name, created.args) == ("xtl_createlogger_stdiostream", (8, 4))
    assert (opened.name, opened.args) == ("xc_interface_open", (1, 1, 0)), "our logger, twice"
    assert (asked.name, asked.args) == ("xc_version", (0, 0))
    assert (backend.name, backend.release.version) == ("libxc", (4, 17))
    backend.close()


@pytest.mark.parametrize(
    "failing", ["xtl_createlogger_stdiostream", "xc_interface_open", "xc_version"]
)
def test_a_failed_connection_leaves_nothing_open(failing: str, library: Path, fake: Fake) -> None:
    before = descriptors()
    fake.fail(failing, errno.EACCES)
    with pytest.raises(AccessDeniedError) as caught:
        fakexc.connect(library)
    assert caught.value.errno == errno.EACCES
    names = fake.names()
    assert names.count("xc_interface_open") == names.count("xc_interface_close") + (
        failing == "xc_interface_open"
    )
    assert names.count("xtl_logger_destroy") == (failing != "xtl_createlogger_stdiostream")
    assert descriptors() == before


def test_an_old_hypervisor(library: Path, fake: Fake) -> None:
    fake.answer("xc_version", 4 << 16 | 13)
    with pytest.raises(UnsupportedError, match=r"Xen 4\.13 is not supported"):
        fakexc.connect(library)
    assert fake.names()[-2:] == ["xc_interface_close", "xtl_logger_destroy"]


@pytest.mark.parametrize(
    ("minor", "words"),
    [(16, "EACCES"), (20, "EACCES"), (23, "EACCES")],
)
def test_a_library_of_another_release(minor: int, words: str, library: Path, fake: Fake) -> None:
    fake.answer("xc_version", 4 << 16 | minor)
    with pytest.warns(LibraryMismatchWarning, match=words) as caught:
        backend = fakexc.connect(library)
    assert f"Xen 4.{minor} is running" in str(caught[0].message)
    assert backend.release.version == (4, minor)
    backend.close()


def test_a_mismatch_made_an_error_closes_everything(library: Path, fake: Fake) -> None:
    fake.answer("xc_version", 4 << 16 | 18)
    with pytest.raises(LibraryMismatchWarning):  # pytest.ini makes warnings errors
        fakexc.connect(library)
    assert fake.names()[-2:] == ["xc_interface_close", "xtl_logger_destroy"]


def test_the_librarys_words_go_into_the_error_and_not_to_stderr(
    library: Path, fake: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.say("xencall: error: Could not obtain handle")
    fake.fail("xc_interface_open", errno.ENOENT)
    with pytest.raises(XenError, match="control domain") as caught:
        fakexc.connect(library)
    assert caught.value.__notes__ == ["xencall: error: Could not obtain handle"]
    assert capfd.readouterr() == ("", "")


def test_the_real_library_where_there_may_be_no_xen(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever is installed here: a backend, or an error that says why not, and no noise."""
    with contextlib.suppress(XenError):
        LibxcBackend().close()
    assert capfd.readouterr() == ("", "")


# Closing.


def open_everything(backend: LibxcBackend, fake: Fake) -> None:
    backend.evtchn_open()
    backend.evtchn_open()
    backend.foreignmemory_map(1, True, [1, 2])
    backend.foreignmemory_map(1, False, [3])
    backend.monitor_enable(1)
    backend.monitor_control_registers(1)
    backend.altp2m_set_mem_access_multi(1, 1, bytes(1000), array("Q", range(1000)))
    backend.domid_to_name(1)
    info = bytearray(112)
    info[:2] = b"\1\0"
    fake.answer("xc_domain_getinfolist", 1, data=bytes(info))
    fake.answer("libxl_userdata_retrieve", data=b"{}")
    backend.domain_config_json(1)


def test_close_gives_everything_back(library: Path, fake: Fake) -> None:
    before = descriptors()
    backend = fakexc.connect(library)
    open_everything(backend, fake)
    addresses = [address_of(view) for view in backend._mappings.popitem()[1].pages]
    gc.collect()
    fake.reset()

    backend.close()

    assert addresses
    assert sorted(fake.names()) == sorted(
        [
            "xenevtchn_close",
            "xenevtchn_close",
            "xenforeignmemory_unmap",
            "xenforeignmemory_unmap",
            "libxl_ctx_free",
            "xs_close",
            "xenforeignmemory_close",
            "xencall_free_buffer",
            "xencall_close",
            "xc_interface_close",
            "xtl_logger_destroy",
        ]
    )
    names = fake.names()
    assert names.index("xencall_free_buffer") < names.index("xencall_close")
    assert names[-2:] == ["xc_interface_close", "xtl_logger_destroy"]
    assert names.index("xenforeignmemory_unmap") < names.index("xenforeignmemory_close")
    assert descriptors() == before

    fake.reset()
    backend.close()
    assert fake.names() == []


def test_close_unmaps_the_ring(backend: LibxcBackend, fake: Fake) -> None:
    _, ring = backend.monitor_enable(1)
    address = address_of(ring)
    assert fake.mapped(address)
    backend.close()
    assert not fake.mapped(address)
    with pytest.raises(ValueError, match="released"):
        ring[0]


CLOSERS = [
    "xenevtchn_close",
    "xenforeignmemory_unmap",
    "xenforeignmemory_close",
    "xencall_close",
    "xc_interface_close",
]


@pytest.mark.parametrize("failing", CLOSERS)
def test_close_goes_on_past_a_failure(failing: str, library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    open_everything(backend, fake)
    fake.reset()
    fake.fail(failing, errno.EIO)
    with pytest.raises(XenError) as caught:
        backend.close()
    assert caught.value.errno == errno.EIO
    assert caught.value.op == failing.removeprefix("xc_").removeprefix("xen")
    assert len(fake.names()) == 11
    backend.close()


def test_close_tells_of_every_failure(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    open_everything(backend, fake)
    fake.reset()
    for failing in CLOSERS:
        fake.fail(failing, errno.EIO)
    with pytest.raises(XenError) as caught:
        backend.close()
    text = "".join(traceback.format_exception(caught.value))
    for failing in CLOSERS:
        assert f"{failing.removeprefix('xc_').removeprefix('xen')}: EIO" in text
    assert len(fake.names()) == 11


def every_call() -> list[tuple[str, Callable[[LibxcBackend], object]]]:
    others: list[tuple[str, Callable[[LibxcBackend], object]]] = [
        ("domain_getinfolist", lambda b: b.domain_getinfolist(0, 1)),
        ("xen_commandline", lambda b: b.xen_commandline()),
        ("xen_extraversion", lambda b: b.xen_extraversion()),
        ("domain_hvm_getcontext", lambda b: b.domain_hvm_getcontext(1)),
        ("domain_hvm_getcontext_partial", lambda b: b.domain_hvm_getcontext_partial(1, 2, 0)),
        ("monitor_enable", lambda b: b.monitor_enable(1)),
        ("monitor_unmap_ring", lambda b: b.monitor_unmap_ring(memoryview(b""))),
        ("monitor_control_registers", lambda b: b.monitor_control_registers(1)),
        ("evtchn_open", lambda b: b.evtchn_open()),
        ("evtchn_close", lambda b: b.evtchn_close(1)),
        ("evtchn_fd", lambda b: b.evtchn_fd(1)),
        ("evtchn_pending", lambda b: b.evtchn_pending(1)),
        ("evtchn_notify", lambda b: b.evtchn_notify(1, 1)),
        ("foreignmemory_map", lambda b: b.foreignmemory_map(1, True, [1])),
        ("foreignmemory_unmap", lambda b: b.foreignmemory_unmap([])),
        ("name_to_domid", lambda b: b.name_to_domid("x")),
        ("domid_to_name", lambda b: b.domid_to_name(1)),
        (
            "altp2m_set_mem_access_multi, long",
            lambda b: b.altp2m_set_mem_access_multi(1, 1, bytes(1000), array("Q", range(1000))),
        ),
        ("domain_config_json", lambda b: b.domain_config_json(1)),
        ("supports", lambda b: b.supports("xc_domain_pause")),
    ]
    return others + [
        (case.operation, case.call) for case in CASES if not case.function.startswith("xenevtchn")
    ]


@pytest.mark.parametrize(("name", "call"), every_call(), ids=[name for name, _ in every_call()])
def test_use_after_close(
    name: str, call: Callable[[LibxcBackend], object], library: Path, fake: Fake
) -> None:
    backend = fakexc.connect(library)
    open_everything(backend, fake)
    backend.close()
    fake.reset()
    with pytest.raises(ClosedError, match="the backend is closed"):
        call(backend)
    assert fake.names() == []
    assert backend.release.version == (4, 17), "what is known stays known"


# Mappings.


def test_pages(backend: LibxcBackend, fake: Fake) -> None:
    gfns = [(1 << 64) - 1, 5, 1 << 40]
    pages = backend.foreignmemory_map(0x7EDC, True, gfns)
    call = fake.calls[-1]
    assert (call.name, call.handle) == ("xenforeignmemory_map", "f")
    assert call.args == (0x7EDC, 3, 3, 1), "readable and writable, all or nothing"
    assert call.data == array("Q", gfns).tobytes()
    assert [len(page) for page in pages] == [PAGE_SIZE] * 3
    assert [int.from_bytes(page[:8], "little") for page in pages] == gfns
    assert {page.format for page in pages} == {"B"}
    pages[1][:] = b"\xcc" * PAGE_SIZE
    address = address_of(pages[0])
    assert fake.mapped(address)

    fake.reset()
    backend.foreignmemory_unmap(pages)

    assert fake.only_call().args == (address, 3)
    assert not fake.mapped(address)
    for page in pages:
        with pytest.raises(ValueError, match="released"):
            page[0]


def test_read_only_pages_cannot_be_written(backend: LibxcBackend, fake: Fake) -> None:
    pages = backend.foreignmemory_map(1, False, [7])
    assert fake.calls[-1].args[1] == 1
    assert pages[0][0] == 7
    with pytest.raises(TypeError, match="read-only"):
        pages[0][0] = 1
    backend.foreignmemory_unmap(pages)


def test_mapping_opens_foreignmemory_once(backend: LibxcBackend, fake: Fake) -> None:
    for _ in range(3):
        backend.foreignmemory_unmap(backend.foreignmemory_map(1, True, [1]))
    assert fake.names().count("xenforeignmemory_open") == 1
    (opened,) = (call for call in fake.calls if call.name == "xenforeignmemory_open")
    assert opened.args == (1, 0)


@pytest.mark.parametrize("function", ["xenforeignmemory_open", "xenforeignmemory_map"])
def test_mapping_fails(function: str, backend: LibxcBackend, fake: Fake) -> None:
    fake.fail(function, errno.ENOMEM)
    with pytest.raises(OutOfMemoryError) as caught:
        backend.foreignmemory_map(1, True, [0x1234])
    assert caught.value.op == function.removeprefix("xen")
    assert caught.value.domid == (1 if function == "xenforeignmemory_map" else None)
    backend.foreignmemory_unmap(backend.foreignmemory_map(1, True, [1, 2]))


def test_unmapping_fails(backend: LibxcBackend, fake: Fake) -> None:
    pages = backend.foreignmemory_map(1, True, [1])
    fake.fail("xenforeignmemory_unmap", errno.EINVAL)
    with pytest.raises(InvalidArgumentError):
        backend.foreignmemory_unmap(pages)
    backend.foreignmemory_unmap(pages)


STRANGERS: list[Any] = [None, 5, [], [memoryview(b"x")], memoryview(bytes(PAGE_SIZE))]


@pytest.mark.parametrize("stranger", STRANGERS)
def test_unmapping_what_was_not_mapped(stranger: Any, backend: LibxcBackend, fake: Fake) -> None:
    pages = backend.foreignmemory_map(1, True, [1])
    fake.reset()
    for unmap in (backend.foreignmemory_unmap, backend.monitor_unmap_ring):
        with pytest.raises(InvalidArgumentError, match="not a mapping"):
            unmap(stranger)
    with pytest.raises(InvalidArgumentError, match="not a mapping"):
        backend.foreignmemory_unmap(list(pages))
    assert fake.names() == []
    backend.foreignmemory_unmap(pages)
    with pytest.raises(InvalidArgumentError, match="unmapped already"):
        backend.foreignmemory_unmap(pages)


def test_a_list_the_caller_changed_is_unmapped_all_the_same(
    backend: LibxcBackend, fake: Fake
) -> None:
    pages = backend.foreignmemory_map(1, True, [1, 2])
    first = pages.pop(0)
    fake.reset()
    backend.foreignmemory_unmap(pages)
    assert fake.only_call().args[1] == 2
    with pytest.raises(ValueError, match="released"):
        first[0]


@pytest.mark.parametrize("what", ["slice", "cast", "nested", "array"])
def test_pages_in_use_are_not_unmapped(what: str, backend: LibxcBackend, fake: Fake) -> None:
    pages = backend.foreignmemory_map(1, True, [1])
    ways: dict[str, Callable[[], Any]] = {
        "slice": lambda: pages[0][8:16],
        "cast": lambda: pages[0].cast("I"),
        "nested": lambda: memoryview(pages[0])[1:][1:],
        "array": lambda: ctypes.c_char.from_buffer(pages[0]),
    }
    made = ways[what]()
    fake.reset()
    for _ in range(2):
        with pytest.raises(BusyError, match="still in use") as caught:
            backend.foreignmemory_unmap(pages)
        assert caught.value.errno == errno.EBUSY
        assert caught.value.op == "foreignmemory_unmap"
    assert fake.names() == []
    if what != "array":
        assert made[0] is not None, "it can still be read"
    del made
    gc.collect()
    backend.foreignmemory_unmap(pages)
    assert fake.names() == ["xenforeignmemory_unmap"]


def test_close_does_not_unmap_pages_in_use(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    pages = backend.foreignmemory_map(1, True, [0xABCDEF])
    part = pages[0][:8]
    fake.reset()
    with pytest.raises(BusyError):
        backend.close()
    assert bytes(part) == (0xABCDEF).to_bytes(8, "little")
    assert fake.names() == ["xenforeignmemory_close", "xc_interface_close", "xtl_logger_destroy"]


def test_the_ring(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_monitor_enable", outs=(0xFEDC_BA98, 0))
    port, ring = backend.monitor_enable(0x7EDC)
    assert (fake.only_call().args, fake.only_call().handle) == ((0x7EDC,), "c")
    assert port == 0xFEDC_BA98
    assert (len(ring), ring.readonly, ring.format) == (PAGE_SIZE, False, "B")
    ring[:4] = b"ring"
    address = address_of(ring)
    indices = ring.cast("I")
    with pytest.raises(BusyError):
        backend.monitor_unmap_ring(ring)
    assert fake.mapped(address)
    indices.release()
    backend.monitor_unmap_ring(ring)
    assert not fake.mapped(address)
    with pytest.raises(ValueError, match="released"):
        ring[0]


def test_the_ring_is_refused(backend: LibxcBackend, fake: Fake) -> None:
    fake.say("an older message")
    fake.fail("xc_domain_pause", errno.EIO)
    with pytest.raises(XenError):
        backend.domain_pause(1)
    fake.say("xc: error: Failed to enable vm_event\n (16 = Device or resource busy)")
    fake.fail("xc_monitor_enable", errno.EBUSY)
    with pytest.raises(BusyError, match="another agent") as caught:
        backend.monitor_enable(3)
    assert (caught.value.domid, caught.value.op) == (3, "monitor_enable")
    assert caught.value.__notes__ == [
        "xc: error: Failed to enable vm_event (16 = Device or resource busy)"
    ]
    assert backend._mappings == {}


# Event channels.


def test_channels(backend: LibxcBackend, fake: Fake) -> None:
    first, second = backend.evtchn_open(), backend.evtchn_open()
    assert first != second
    assert [call.args for call in fake.calls] == [(1, 0), (1, 0)]
    backend.evtchn_close(first)
    for use in (backend.evtchn_close, backend.evtchn_fd, backend.evtchn_pending):
        with pytest.raises(XenError) as caught:
            use(first)
        assert caught.value.errno == errno.EBADF
    assert backend.evtchn_open() not in (first, second)


def test_opening_a_channel_fails(backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xenevtchn_open", errno.EACCES)
    with pytest.raises(AccessDeniedError) as caught:
        backend.evtchn_open()
    assert caught.value.op == "evtchn_open"
    assert backend._channels == {}


def test_pending_goes_on_after_a_signal(backend: LibxcBackend, fake: Fake) -> None:
    channel = backend.evtchn_open()
    fake.fail("xenevtchn_pending", errno.EINTR)
    fake.fail("xenevtchn_pending", errno.EINTR)
    fake.answer("xenevtchn_pending", 9)
    assert backend.evtchn_pending(channel) == 9


# Fork.


def in_child(run: Callable[[], None]) -> None:
    """Run something in a forked child; what it raises fails the test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            run()
            status = 0
        except BaseException:  # noqa: BLE001 - the child ends here whatever it was
            os.write(writer, traceback.format_exc().encode()[-60000:])
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        words = file.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, words or f"signal {signal.Signals(os.WTERMSIG(status)).name}"


def test_fork(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    pages = backend.foreignmemory_map(1, True, [1])
    _, ring = backend.monitor_enable(1)
    channel = backend.evtchn_open()
    backend.altp2m_set_mem_access_multi(1, 1, bytes(1000), array("Q", range(1000)))
    fake.reset()

    def child() -> None:
        for _, call in every_call():
            with pytest.raises(ClosedError, match="forked"):
                call(backend)
        for view in (pages[0], ring):
            with pytest.raises(ValueError, match="released"):
                view[0]
        backend.close()
        assert fake.names() == [], "the handles are the parent's"
        fresh = fakexc.connect(library)
        fresh.domain_pause(1)
        fresh.close()

    in_child(child)

    assert pages[0][0] == 1, "nothing happened to the parent's"
    backend.evtchn_notify(channel, 1)
    backend.domain_pause(1)
    backend.close()


def test_fork_while_another_thread_holds_the_lock(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    with backend._lock:
        in_child(backend.close)
    backend.close()


def test_fork_after_close(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    backend.close()

    def child() -> None:
        with pytest.raises(ClosedError, match="the backend is closed"):
            backend.domain_pause(1)

    in_child(child)


def test_a_collected_backend_does_not_disturb_a_fork(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    backend.close()
    del backend
    gc.collect()
    in_child(lambda: None)


# Threads.


def test_threads_share_one_lazy_handle(backend: LibxcBackend, fake: Fake) -> None:
    barrier = threading.Barrier(8)

    def run() -> None:
        barrier.wait()
        backend._foreignmemory_handle()
        backend._xenstore_handle()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fake.names()) == ["xenforeignmemory_open", "xs_open"]


def test_errno_is_the_threads_own(backend: LibxcBackend, fake: Fake) -> None:
    fake.quiet()
    seen: dict[int, set[int | None]] = {errno.EPERM: set(), errno.EBUSY: set()}

    def run(number: int) -> None:
        for _ in range(2000):
            try:
                backend.hvm_param_get(1, 1 << 31 | number)
            except XenError as error:
                seen[number].add(error.errno)

    fakexc.race(run, seen)
    assert seen == {number: {number} for number in seen}
