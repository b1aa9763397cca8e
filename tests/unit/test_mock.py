# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mock as a host: its log, its faults, its resources, and memory beside altp2m."""

from __future__ import annotations

import enum
import inspect
import itertools
import json
import select
from array import array
from collections.abc import Callable, Iterator
from errno import (
    EBADF,
    EBUSY,
    EEXIST,
    EINVAL,
    ENODATA,
    ENOENT,
    ENOMEM,
    ENOSYS,
    ENOTCONN,
    EPERM,
    ESRCH,
)
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend import Backend, arguments
from xenaltp2m.backend.mock import Call, MockBackend, Outcome
from xenaltp2m.backend.mock.p2m import (
    INVALID_MFN,
    ORDER_1G,
    ORDER_2M,
    ORDER_4K,
    P2m,
    PageType,
    Pool,
)
from xenaltp2m.errors import (
    BusyError,
    ClosedError,
    InvalidArgumentError,
    NotMappedError,
    OutOfMemoryError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.types import ALL_GFNS, PAGE_SIZE, Altp2mMode

A, B, HOLE = 0x100, 0x101, 0x2000
N, R, RX, RWX = 0, 1, 5, 7
OPERATIONS = sorted(
    name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if name[0] != "_"
)
CALLS = [op for op in OPERATIONS if op not in {"supports", "close"}]


def gfns(*numbers: int) -> array[int]:
    return array("Q", numbers)


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(XenError) as caught:
        call()
    return caught.value.errno


@pytest.fixture
def host() -> Iterator[MockBackend]:
    host = MockBackend((4, 20), memory_pages=1 << 14)
    yield host
    host.close()


@pytest.fixture
def domid(host: MockBackend) -> int:
    """A domain of 4 MiB in 4K entries, altp2m on."""
    domid = host.add_domain("guest", memory_kib=4096, max_kib=8192, superpages=False)
    host.altp2m_set_domain_state(domid, True)
    host.calls.clear()
    return domid


# The log and the faults.


def test_the_log_has_every_call_in_order(host: MockBackend, domid: int) -> None:
    view = host.altp2m_create_view(domid, default_access=RWX)
    host.altp2m_set_mem_access_multi(domid, view, bytes([RX, R]), gfns(A, B))
    with pytest.raises(NotMappedError):
        host.altp2m_get_mem_access(domid, view, HOLE)
    assert list(host.calls) == [
        Call("altp2m_create_view", (domid, RWX), 0),
        Call("altp2m_set_mem_access_multi", (domid, view, (RX, R), (A, B)), 0),
        Call("altp2m_get_mem_access", (domid, view, HOLE), ESRCH),
    ]


def test_the_log_shortens_bulk_arguments_and_keeps_no_reference(
    host: MockBackend, domid: int
) -> None:
    few, many = gfns(A), gfns(*range(65))
    host.altp2m_set_mem_access_multi(domid, 0, b"\7", few)
    few[0] = B
    host.altp2m_set_mem_access_multi(domid, 0, bytes([RWX] * 65), many)
    assert host.calls[0].arguments == (domid, 0, (7,), (A,))
    assert host.calls[1].arguments == (domid, 0, "<65 items>", "<65 items>")


def test_the_log_forgets_the_oldest(host: MockBackend) -> None:
    host.calls.extend(Call("old", (), 0) for _ in range(100_000))
    host.vm_event_get_version()
    assert len(host.calls) == 100_000
    assert host.calls[-1] == Call("vm_event_get_version", (), 0)


def test_the_log_has_no_call_that_never_reached_xen(domid: int, host: MockBackend) -> None:
    for call in (
        partial(host.altp2m_create_view, 65536 + domid, RWX),
        partial(host.altp2m_set_suppress_ve, domid, 0, ALL_GFNS, True),
        partial(host.foreignmemory_unmap, []),
    ):
        with pytest.raises(InvalidArgumentError):
            call()
    old = MockBackend((4, 16))
    with pytest.raises(UnsupportedError):
        old.get_paging_mempool_size(old.add_domain())
    assert not host.calls
    assert not old.calls


def test_the_nth_call_of_an_operation_fails_once_with_nothing_done(
    host: MockBackend, domid: int
) -> None:
    host.fail("altp2m_create_view", 2, ENOMEM)
    assert host.altp2m_create_view(domid, RWX) == 1
    host.altp2m_get_domain_state(domid)
    with pytest.raises(OutOfMemoryError) as caught:
        host.altp2m_create_view(domid, RWX)
    assert (caught.value.op, caught.value.domid) == ("altp2m_create_view", domid)
    assert host.calls[-1] == Call("altp2m_create_view", (domid, RWX), ENOMEM)
    assert host.altp2m_create_view(domid, RWX) == 2


def test_the_nth_call_of_any_operation_fails(host: MockBackend, domid: int) -> None:
    host.fail(None, 3, EBUSY)
    host.altp2m_get_domain_state(domid)
    host.altp2m_get_domain_state(domid)
    with pytest.raises(BusyError):
        host.altp2m_set_domain_state(domid, False)
    assert host.altp2m_get_domain_state(domid) is True


def test_of_faults_due_together_the_first_set_wins(host: MockBackend, domid: int) -> None:
    host.fail("domain_pause", 2, EBUSY)
    host.fail(None, 2, ENOMEM)
    pause = partial(host.domain_pause, domid)
    pause()
    assert errno_of(pause) == EBUSY
    pause()


def test_faults_count_for_themselves(host: MockBackend, domid: int) -> None:
    host.fail("domain_pause", 1, EBUSY)
    host.fail("domain_pause", 2, ENOMEM)
    host.fail("domain_unpause", 1, EPERM)
    pause, unpause = partial(host.domain_pause, domid), partial(host.domain_unpause, domid)
    assert [errno_of(call) for call in (pause, pause, unpause)] == [EBUSY, ENOMEM, EPERM]
    pause()


# Arguments.


def test_the_mock_has_every_operation_as_the_protocol_has_it() -> None:
    for op in OPERATIONS:
        ours = inspect.signature(getattr(MockBackend, op))
        assert ours.parameters.keys() == inspect.signature(getattr(Backend, op)).parameters.keys()


GOOD: dict[str, Any] = {"accesses": b"\7", "gfns": gfns(A), "pages": [], "ring": memoryview(b"")}
NUMBERS = [
    (op, name)
    for op in CALLS
    for name in inspect.signature(getattr(Backend, op)).parameters
    if name in arguments.LIMITS
]


def test_every_number_of_the_protocol_has_a_bound() -> None:
    others = {"self", "function", "name", "path", "gfns", "accesses", "stream", "pages", "ring"}
    for op in OPERATIONS:
        parameters = inspect.signature(getattr(Backend, op)).parameters
        flags = {name for name, one in parameters.items() if one.annotation == "bool"}
        assert flags == parameters.keys() & arguments.FLAGS, op
        assert parameters.keys() - flags <= others | set(arguments.LIMITS), op


def arguments_of(op: str) -> dict[str, Any]:
    """What an operation takes, each of its type."""
    parameters = inspect.signature(getattr(Backend, op)).parameters.keys() - {"self"}
    return {key: GOOD.get(key, True if key in arguments.FLAGS else 0) for key in parameters}


@pytest.mark.parametrize("op", [op for op in CALLS if arguments.FLAGS & arguments_of(op).keys()])
def test_what_is_no_flag_is_refused_as_by_libxc(host: MockBackend, op: str) -> None:
    values = arguments_of(op)
    for name in values.keys() & arguments.FLAGS:
        for bad in (0, 1, None, "yes"):
            with pytest.raises(InvalidArgumentError, match=f"^{op}: {name} must be a bool, not "):
                getattr(host, op)(**values | {name: bad})
    assert not host.calls


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids="-".join)
def test_a_number_c_would_truncate_is_refused(host: MockBackend, op: str, name: str) -> None:
    values = arguments_of(op)
    for bad in (-1, arguments.LIMITS[name], True, 1.0, "1", None):
        with pytest.raises(InvalidArgumentError) as caught:
            getattr(host, op)(**values | {name: bad})
        assert caught.value.errno is None
        assert f"{op}: {name} " in str(caught.value)
    assert not host.calls


def test_domain_65541_is_not_domain_5(host: MockBackend) -> None:
    for number in range(5):
        host.add_domain(f"d{number}", memory_kib=0)
    assert host.altp2m_get_domain_state(5) is False
    with pytest.raises(InvalidArgumentError, match="0x10005"):
        host.altp2m_get_domain_state(65541)


def test_a_number_of_another_name_is_a_number(host: MockBackend, domid: int) -> None:
    class Right(enum.IntEnum):
        RX = RX

    host.altp2m_set_mem_access(domid, 0, A, Right.RX)
    assert host.altp2m_get_mem_access(domid, 0, A) == RX


@pytest.mark.parametrize(
    ("accesses", "where"),
    [
        (b"\7\7", gfns(A)),
        (b"", gfns(A)),
        ([7], gfns(A)),
        (b"\7", [A]),
        (b"\7", array("L", [A])),
        (b"\7" * 8, memoryview(gfns(A)).cast("B")),
        (b"\7\7", memoryview(gfns(A, B, B + 1))[::2]),
    ],
    ids=["more accesses", "fewer", "a list", "a list of gfns", "array L", "bytes", "a stride"],
)
def test_bulk_arrays_must_be_what_c_can_read(
    host: MockBackend, domid: int, accesses: Any, where: Any
) -> None:
    for call in (
        partial(host.altp2m_set_mem_access_multi, domid, 0, accesses, where),
        partial(host.set_mem_access_multi, domid, accesses, where),
    ):
        assert errno_of(call) is None
    assert host.altp2m_get_mem_access(domid, 0, A) == RWX


def test_bulk_arrays_may_be_views(host: MockBackend, domid: int) -> None:
    numbers = memoryview(gfns(A, B, B + 1))[1:]
    host.altp2m_set_mem_access_multi(domid, 0, memoryview(bytearray([R, RX])), numbers)
    assert [host.altp2m_get_mem_access(domid, 0, gfn) for gfn in (A, B, B + 1)] == [RWX, R, RX]


# Closing, and what is open.


@pytest.mark.parametrize("op", CALLS)
def test_a_closed_backend_answers_nothing(op: str) -> None:
    host = MockBackend()
    host.close()
    host.close()
    count = len(inspect.signature(getattr(Backend, op)).parameters) - 1
    with pytest.raises(ClosedError):
        getattr(host, op)(*[0] * count)


def test_open_resources_lists_what_was_not_given_back(host: MockBackend, domid: int) -> None:
    assert host.open_resources() == []
    pages = host.foreignmemory_map(domid, False, [A, B])
    channel = host.evtchn_open()
    _, ring = host.monitor_enable(domid)
    assert host.open_resources() == [
        "mapping of 2 pages",
        "mapping of 1 pages",
        f"event channel {channel}",
        f"monitor of domain {domid}",
    ]
    host.foreignmemory_unmap(pages)
    host.monitor_unmap_ring(ring)
    host.evtchn_close(channel)
    host.monitor_disable(domid)
    assert host.open_resources() == []


def test_close_gives_back_what_is_the_process_s(host: MockBackend, domid: int) -> None:
    """A process that ends loses its mappings and channels; the monitor stays enabled in Xen."""
    pages = host.foreignmemory_map(domid, True, [A])
    channel = host.evtchn_open()
    port, ring = host.monitor_enable(domid)
    host.evtchn_bind_interdomain(channel, domid, port)
    host.close()
    assert host.open_resources() == [f"monitor of domain {domid}"]
    for view in (*pages, ring):
        with pytest.raises(ValueError, match="released"):
            view[0]
    with pytest.raises(OSError, match="Bad file descriptor"):
        select.select([channel], [], [], 0)
    host.domain(domid).machine.frames.page(1)  # the host lives on
    again = MockBackend((4, 20))
    again.machine = host.machine
    again._monitors = host._monitors
    again.monitor_disable(domid)


# What the library has.


@pytest.mark.parametrize("xen", SUPPORTED, ids="{0[0]}.{0[1]}".format)
def test_functions_come_with_their_release(xen: tuple[int, int]) -> None:
    host = MockBackend(xen)
    assert host.supports("xc_altp2m_create_view")
    newer = {
        "xc_get_paging_mempool_size": (4, 17),
        "xc_set_paging_mempool_size": (4, 17),
        "xc_monitor_vmexit": (4, 17),
        "xc_monitor_io": (4, 18),
    }
    domid = host.add_domain(memory_kib=0)
    calls: dict[str, Callable[[], object]] = {
        "xc_get_paging_mempool_size": partial(host.get_paging_mempool_size, domid),
        "xc_set_paging_mempool_size": partial(host.set_paging_mempool_size, domid, 1 << 24),
        "xc_monitor_vmexit": partial(host.monitor_vmexit, domid, True, True),
        "xc_monitor_io": partial(host.monitor_io, domid, True),
    }
    for symbol, since in newer.items():
        assert host.supports(symbol) is (xen >= since)
        if xen >= since:
            calls[symbol]()
        else:
            with pytest.raises(UnsupportedError, match=symbol):
                calls[symbol]()


def test_the_library_decides_not_the_hypervisor() -> None:
    assert not MockBackend((4, 20), library=(4, 16)).supports("xc_monitor_io")
    assert MockBackend((4, 16), library=(4, 20)).supports("xc_monitor_io")


def test_the_host_says_what_it_is() -> None:
    host = MockBackend((4, 14))
    assert (host.name, host.release.version, host.vm_event_get_version()) == ("mock", (4, 14), 6)
    assert MockBackend((4, 15)).vm_event_get_version() == 7
    assert "altp2m=1" in host.xen_commandline()
    assert "altp2m" not in MockBackend(altp2m=False).xen_commandline()
    assert host.xen_extraversion().startswith(".")


def test_only_the_control_domain_may_control(domid: int, host: MockBackend) -> None:
    host.machine.privileged = False
    calls: list[Callable[[], object]] = [
        partial(host.domain_pause, domid),
        partial(host.domain_getinfolist, 0, 10),
        partial(host.domain_maximum_gpfn, domid),
        partial(host.hvm_param_get, domid, 35),
        partial(host.hvm_param_set, domid, 1, 1),
        partial(host.set_mem_access, domid, RX, A, 1),
        partial(host.get_mem_access, domid, A),
        partial(host.foreignmemory_map, domid, False, [A]),
        partial(host.monitor_enable, domid),
    ]
    assert {errno_of(call) for call in calls} == {EPERM}
    # Xen does nothing, and the library makes its own errno of that.
    assert errno_of(partial(host.domain_populate_physmap_exact, domid, gfns(HOLE))) == EBUSY
    assert errno_of(partial(host.domain_decrease_reservation_exact, domid, gfns(A))) == EINVAL


# Domains.


def test_domains_are_listed_by_number(host: MockBackend) -> None:
    for name in "abcd":
        host.add_domain(name, memory_kib=0)
    host.machine.domains = dict(reversed(host.machine.domains.items()))
    assert [info.domid for info in host.domain_getinfolist(2, 2)] == [2, 3]
    assert [info.domid for info in host.domain_getinfolist(0, 99)] == [1, 2, 3, 4]
    assert host.domain_getinfolist(5, 9) == []
    assert host.domain_getinfolist(0, 0) == []


def test_what_is_listed_of_a_domain(host: MockBackend) -> None:
    domid = host.add_domain("guest", kind="hvm", memory_kib=4096, max_kib=8192, vcpus=3)
    pvh = host.add_domain("pvh", vcpus=3, memory_kib=0)
    other = host.add_domain("other", kind="pv", mode=Altp2mMode.DISABLED, memory_kib=0)
    info, late, pv = host.domain_getinfolist(0, 9)
    assert (info.domid, info.hvm, pv.hvm, pv.domid) == (domid, True, False, other)
    assert info.uuid != pv.uuid
    assert (info.pages, info.max_pages) == (1024 + 8, 2048 + 8)  # 8 are the toolstack's
    assert (info.vcpus, info.max_vcpu_id) == (3, 2)
    assert (late.domid, late.vcpus, late.max_vcpu_id) == (pvh, 1, 2)  # PVH brings the others up
    assert (info.paused, info.dying, info.shutdown, info.shutdown_reason) == (True, False, False, 0)
    host.domain_unpause(domid)
    host.domain(domid).crash("on purpose")
    info, *_ = host.domain_getinfolist(domid, 1)
    assert (info.paused, info.shutdown, info.shutdown_reason) == (False, True, 3)


def test_names_lead_to_numbers_and_back(host: MockBackend) -> None:
    domid = host.add_domain("win10", memory_kib=0)
    assert host.name_to_domid("win10") == domid
    assert host.domid_to_name(domid) == "win10"
    assert host.name_to_domid("win11") is None
    assert host.domid_to_name(domid + 1) is None


@pytest.mark.parametrize("xen", SUPPORTED, ids="{0[0]}.{0[1]}".format)
def test_the_configuration_says_how_the_domain_was_made(xen: tuple[int, int]) -> None:
    host = MockBackend(xen)
    domid = host.add_domain(
        "g",
        kind="hvm",
        vcpus=2,
        view_count=12,
        memory_kib=1024,
        max_kib=2048,
        mode=Altp2mMode.MIXED,
    )
    config = json.loads(host.domain_config_json(domid))
    assert config["c_info"]["name"] == "g"
    assert config["c_info"]["type"] == "hvm"
    assert config["c_info"]["uuid"] == str(host.domain_getinfolist(domid, 1)[0].uuid)
    build = config["b_info"]
    assert (build["max_vcpus"], build["target_memkb"], build["max_memkb"]) == (2, 1024, 2048)
    assert build["altp2m"] == "mixed"
    assert build.get("altp2m_count") == (12 if xen >= (4, 21) else None)
    off = host.add_domain("h", mode=Altp2mMode.DISABLED, memory_kib=0)
    assert (
        not {"altp2m", "altp2m_count"} & json.loads(host.domain_config_json(off))["b_info"].keys()
    )
    assert errno_of(partial(host.domain_config_json, 77)) == ESRCH


def test_pauses_count(host: MockBackend) -> None:
    domid = host.add_domain(memory_kib=0)  # paused once, by whoever made it
    host.domain_pause(domid)
    host.domain_unpause(domid)
    assert host.domain_getinfolist(domid, 1)[0].paused
    host.domain_unpause(domid)
    assert not host.domain_getinfolist(domid, 1)[0].paused
    assert errno_of(partial(host.domain_unpause, domid)) == EINVAL


def test_the_memory_limit_is_clamped_not_wrapped(host: MockBackend, domid: int) -> None:
    host.domain_setmaxmem(domid, ALL_GFNS)
    assert host.domain_getinfolist(domid, 1)[0].max_pages == 0xFFFFFFFF
    host.domain_setmaxmem(domid, 4095)
    assert host.domain_getinfolist(domid, 1)[0].max_pages == 1023


def test_parameters(host: MockBackend, domid: int) -> None:
    host.hvm_param_set(domid, 1, 0x1234)
    assert host.hvm_param_get(domid, 1) == 0x1234
    assert host.hvm_param_get(domid, 2) == 0
    assert errno_of(partial(host.hvm_param_get, domid, 39)) == EINVAL
    assert errno_of(partial(host.hvm_param_set, domid, 39, 0)) == EINVAL
    assert errno_of(partial(host.hvm_param_get, 77, 1)) == ESRCH
    pv = host.add_domain("pv", kind="pv", mode=Altp2mMode.DISABLED, memory_kib=0)
    assert errno_of(partial(host.hvm_param_get, pv, 1)) == EINVAL


def test_cpu_state_makes_the_round_trip(host: MockBackend) -> None:
    domid = host.add_domain(vcpus=2, memory_kib=0)
    assert errno_of(partial(host.domain_hvm_getcontext_partial, domid, 2, 1)) == ENODATA  # is down
    host.domain(domid).online_vcpus = 2
    rip = HVM_CPU.fields["rip"].offset
    for vcpu in host.domain(domid).vcpus:
        vcpu.context[rip] = 0x10 + vcpu.number
    saved = host.domain_hvm_getcontext(domid)
    one = host.domain_hvm_getcontext_partial(domid, 2, 1)
    assert (len(one), one[rip]) == (HVM_CPU.size, 0x11)
    assert one in saved
    changed = bytearray(saved)
    changed[32 + 8 + rip] = 0x20  # vCPU 0's record comes behind the header, and its descriptor
    host.domain_hvm_setcontext(domid, changed)
    assert host.domain_hvm_getcontext_partial(domid, 2, 0)[rip] == 0x20
    host.domain_hvm_setcontext(domid, memoryview(saved))
    assert host.domain_hvm_getcontext(domid) == saved
    host.domain_hvm_setcontext(domid, saved[: 32 + 8 + HVM_CPU.size] + bytes(8))
    assert [vcpu.online for vcpu in host.domain(domid).vcpus] == [True, False]


def test_cpu_state_that_does_not_fit_changes_nothing(host: MockBackend) -> None:
    domid = host.add_domain(memory_kib=0)
    two = host.add_domain("two", memory_kib=0, vcpus=2)
    host.domain(two).online_vcpus = 2
    saved = host.domain_hvm_getcontext(domid)
    changed = bytearray(saved)
    changed[40] = 1
    for stream, expected in (
        (changed[32:], ENODATA),  # no header
        (host.domain_hvm_getcontext(two), EINVAL),
        (changed[:-8], ENODATA),  # no end marker
        (changed[:100], EINVAL),
        (b"", ENODATA),
        (b"\2\0\0\0", ENODATA),
    ):
        assert errno_of(partial(host.domain_hvm_setcontext, domid, stream)) == expected
    assert host.domain_hvm_getcontext(domid) == saved


def test_cpu_state_that_is_not_there(host: MockBackend) -> None:
    domid = host.add_domain(memory_kib=0)
    assert errno_of(partial(host.domain_hvm_getcontext_partial, domid, 2, 1)) == ENOENT
    assert errno_of(partial(host.domain_hvm_getcontext_partial, domid, 99, 0)) == EINVAL
    pv = host.add_domain("pv", kind="pv", mode=Altp2mMode.DISABLED, memory_kib=0)
    for call in (
        partial(host.domain_hvm_getcontext, pv),
        partial(host.domain_hvm_getcontext_partial, pv, 2, 0),
        partial(host.domain_hvm_setcontext, pv, b""),
    ):
        assert errno_of(call) == EINVAL


@pytest.mark.parametrize("xen", [(4, 16), (4, 17)], ids="{0[0]}.{0[1]}".format)
def test_debug_control(xen: tuple[int, int]) -> None:
    host = MockBackend(xen)
    domid = host.add_domain(memory_kib=0, vcpus=2)
    vcpu = host.domain(domid).vcpus[1]
    host.domain_debug_control(domid, 1, 1)
    assert vcpu.single_step is True
    vcpu.fast_step_view = 3
    host.domain_debug_control(domid, 0, 1)
    assert vcpu.single_step is False
    assert vcpu.fast_step_view == (None if xen >= (4, 17) else 3)
    assert errno_of(partial(host.domain_debug_control, domid, 2, 2)) == EINVAL
    assert errno_of(partial(host.domain_debug_control, domid, 2, 1)) == ENOSYS
    pv = host.add_domain("pv", kind="pv", mode=Altp2mMode.DISABLED, memory_kib=0)
    assert errno_of(partial(host.domain_debug_control, pv, 1, 0)) == EINVAL


def test_a_host_too_small_for_a_domain() -> None:
    with pytest.raises(MemoryError):
        MockBackend(memory_pages=1024).add_domain(memory_kib=4096)


# Foreign mappings.


def test_mappings_show_the_guest_s_pages(host: MockBackend, domid: int) -> None:
    first, second = host.foreignmemory_map(domid, True, [A, B])
    assert (len(first), first.readonly) == (PAGE_SIZE, False)
    first[:4] = b"here"
    assert bytes(second[:4]) == bytes(4)
    again = host.foreignmemory_map(domid, False, [B, A, A])
    assert [bytes(page[:4]) for page in again] == [bytes(4), b"here", b"here"]
    assert all(page.readonly for page in again)


def test_mappings_show_the_host_s_page_not_a_view_s(host: MockBackend, domid: int) -> None:
    view = host.altp2m_create_view(domid, RWX)
    host.altp2m_change_gfn(domid, view, A, B)
    host.altp2m_switch_to_view(domid, view)
    old, new = host.foreignmemory_map(domid, True, [A, B])
    new[0] = 1
    assert old[0] == 0


def test_mappings_are_all_or_none(host: MockBackend, domid: int) -> None:
    host.domain_unpause(domid)  # upon which the APIC's page is there
    for bad in (HOLE, 0xFEE00, 1 << 40):
        assert errno_of(partial(host.foreignmemory_map, domid, False, [A, bad])) == EINVAL
    assert host.open_resources() == []
    assert errno_of(partial(host.foreignmemory_map, 77, False, [A])) == ESRCH


def test_a_mapped_page_stays_until_it_is_unmapped(host: MockBackend, domid: int) -> None:
    model = host.domain(domid)
    used = model.pages
    mapped = host.foreignmemory_map(domid, True, [A])
    twice = host.foreignmemory_map(domid, True, [A])
    mapped[0][:4] = b"here"
    frame = model.host.lookup(A).mfn
    host.domain_decrease_reservation_exact(domid, gfns(A))
    assert bytes(mapped[0][:4]) == b"here"
    assert model.pages == used  # still the domain's, as Xen counts
    host.domain_populate_physmap_exact(domid, gfns(A))
    assert model.host.lookup(A).mfn != frame
    host.foreignmemory_unmap(mapped)
    assert bytes(twice[0][:4]) == b"here"
    host.foreignmemory_unmap(twice)
    assert model.pages == used
    host.domain_populate_physmap_exact(domid, gfns(HOLE))
    assert model.host.lookup(HOLE).mfn == frame  # free again, and scrubbed
    assert bytes(host.foreignmemory_map(domid, False, [HOLE])[0]) == bytes(PAGE_SIZE)


def test_an_unmapped_view_is_dead(host: MockBackend, domid: int) -> None:
    pages = host.foreignmemory_map(domid, True, [A, B])
    kept = list(pages)
    host.foreignmemory_unmap(pages)
    for page in kept:
        with pytest.raises(ValueError, match="released"):
            page[0] = 1


def test_unmap_takes_the_very_list_and_once(host: MockBackend, domid: int) -> None:
    pages = host.foreignmemory_map(domid, True, [A])
    with pytest.raises(InvalidArgumentError, match="not a mapping"):
        host.foreignmemory_unmap(list(pages))
    with pytest.raises(InvalidArgumentError, match="not a mapping"):
        host.monitor_unmap_ring(pages[0])
    host.foreignmemory_unmap(pages)
    with pytest.raises(InvalidArgumentError, match="unmapped already"):
        host.foreignmemory_unmap(pages)


def test_the_ring_is_a_mapping_of_its_own(host: MockBackend, domid: int) -> None:
    model = host.domain(domid)
    used = model.pages
    _, ring = host.monitor_enable(domid)
    ring[100] = 1
    host.monitor_disable(domid)
    assert ring[100] == 1
    assert model.pages == used
    host.monitor_unmap_ring(ring)
    assert model.pages == used - 1
    with pytest.raises(ValueError, match="released"):
        ring[0]
    _, ring = host.monitor_enable(domid)
    assert (ring[100], model.pages) == (0, used)
    host.monitor_unmap_ring(ring)
    host.monitor_disable(domid)


# Event channels.


def wake(host: MockBackend, domid: int) -> None:
    """What Xen does when it put a request into the ring."""
    host._monitors[domid].wake()


def ready(channel: int) -> bool:
    return bool(select.select([channel], [], [], 0)[0])


@pytest.fixture
def channel(host: MockBackend, domid: int) -> Iterator[tuple[int, int]]:
    """A channel bound to a monitor, and the local port; its first event has been taken."""
    remote, ring = host.monitor_enable(domid)
    channel = host.evtchn_open()
    port = host.evtchn_bind_interdomain(channel, domid, remote)
    assert ready(channel), "binding fires once, for what may have been missed"
    assert host.evtchn_pending(channel) == port
    host.evtchn_unmask(channel, port)
    yield channel, port
    host.monitor_unmap_ring(ring)
    if host.domain(domid).listened:
        host.monitor_disable(domid)


def test_a_port_fires_once_until_it_is_unmasked(
    host: MockBackend, domid: int, channel: tuple[int, int]
) -> None:
    handle, port = channel
    assert host.evtchn_fd(handle) == handle
    assert not ready(handle)
    wake(host, domid)
    wake(host, domid)
    assert host.evtchn_pending(handle) == port
    assert not ready(handle)
    host.evtchn_unmask(handle, port)
    assert host.evtchn_pending(handle) == port  # the second, which came while it was masked
    host.evtchn_unmask(handle, port)
    assert not ready(handle)


def test_pending_names_the_port_that_fired(host: MockBackend) -> None:
    guests = [host.add_domain(f"d{number}", memory_kib=1024) for number in range(3)]
    handle = host.evtchn_open()
    ports, rings = {}, []
    for domid in guests:
        remote, ring = host.monitor_enable(domid)
        rings.append(ring)
        ports[domid] = host.evtchn_bind_interdomain(handle, domid, remote)
    assert [host.evtchn_pending(handle) for _ in guests] == list(ports.values())
    for port in ports.values():
        host.evtchn_unmask(handle, port)
    for domid in (guests[2], guests[0]):
        wake(host, domid)
    assert [host.evtchn_pending(handle) for _ in range(2)] == [ports[guests[2]], ports[guests[0]]]
    assert not ready(handle)
    for domid, ring in zip(guests, rings, strict=True):
        host.monitor_disable(domid)
        host.monitor_unmap_ring(ring)


def test_a_port_that_is_not_bound(host: MockBackend, channel: tuple[int, int]) -> None:
    handle, port = channel
    assert errno_of(partial(host.evtchn_notify, handle, port + 1)) == ENOTCONN
    host.evtchn_unmask(handle, port + 1)  # passed over


def test_a_port_of_a_monitor_that_ended_is_silent(
    host: MockBackend, domid: int, channel: tuple[int, int]
) -> None:
    handle, port = channel
    host.monitor_disable(domid)
    remote, ring = host.monitor_enable(domid)
    host.evtchn_notify(handle, port)  # dropped: it is not the new ring's
    another = host.evtchn_open()
    other = host.evtchn_bind_interdomain(another, domid, remote)
    assert host.evtchn_pending(another) == other
    host.evtchn_close(handle)
    host.evtchn_unmask(another, other)
    wake(host, domid)
    assert host.evtchn_pending(another) == other
    host.monitor_unmap_ring(ring)


def test_a_port_has_one_end(host: MockBackend, domid: int, channel: tuple[int, int]) -> None:
    handle, _ = channel
    remote = host._monitors[domid].port
    for bad in (0, remote + 1):
        assert errno_of(partial(host.evtchn_bind_interdomain, handle, domid, bad)) == EINVAL
    assert errno_of(partial(host.evtchn_bind_interdomain, handle, 77, remote)) == EINVAL
    assert errno_of(partial(host.evtchn_bind_interdomain, handle, domid, remote)) == EINVAL
    host.evtchn_close(handle)
    host.evtchn_bind_interdomain(host.evtchn_open(), domid, remote)


def test_a_closed_channel_is_gone(host: MockBackend, domid: int, channel: tuple[int, int]) -> None:
    handle, port = channel
    host.evtchn_close(handle)
    for call in (
        partial(host.evtchn_fd, handle),
        partial(host.evtchn_pending, handle),
        partial(host.evtchn_notify, handle, port),
        partial(host.evtchn_close, handle),
    ):
        assert errno_of(call) == EBADF
    wake(host, domid)  # nobody listens


# The p2m pool.


def test_tables_come_from_the_pool_and_go_back(host: MockBackend, domid: int) -> None:
    pool = host.domain(domid).pool
    before = pool.used
    view = host.altp2m_create_view(domid, RWX)
    assert pool.used == before
    host.altp2m_set_mem_access(domid, view, A, RX)
    assert pool.used == before + 3  # one for each level below the root
    host.altp2m_set_mem_access(domid, view, B, RX)
    host.altp2m_set_mem_access(domid, view, 0x300, RX)
    assert pool.used == before + 4
    host.altp2m_destroy_view(domid, view)
    assert pool.used == before
    host.altp2m_change_gfn(domid, 0, A, B)
    host.altp2m_set_domain_state(domid, False)
    assert pool.used == before


def test_splitting_takes_one_table_and_joining_gives_it_back(host: MockBackend) -> None:
    domid = host.add_domain(memory_kib=4096, max_kib=65536)
    pool = host.domain(domid).pool
    host.altp2m_set_domain_state(domid, True)
    before = pool.used
    host.altp2m_set_mem_access(domid, 0, A, R)
    assert pool.used == before + 1
    host.domain_populate_physmap_exact(domid, gfns(0), order=ORDER_2M)
    assert pool.used == before


def test_an_exhausted_pool_is_enomem_until_it_grows(host: MockBackend) -> None:
    domid = host.add_domain(memory_kib=4096, pool_pages=30, superpages=False)
    host.altp2m_set_domain_state(domid, True)
    for _ in range(9):
        host.altp2m_create_view(domid, RWX)

    def fill() -> None:
        for view in range(1, 10):
            host.altp2m_set_mem_access(domid, view, A, RX)

    assert errno_of(fill) == ENOMEM
    size = host.get_paging_mempool_size(domid)
    assert size == 30 * PAGE_SIZE
    host.set_paging_mempool_size(domid, 2 * size)
    fill()
    assert errno_of(partial(host.set_paging_mempool_size, domid, size + 1)) == EINVAL
    host.set_paging_mempool_size(domid, 0)  # what is in use stays
    assert host.get_paging_mempool_size(domid) == host.domain(domid).pool.used * PAGE_SIZE


# Kinds of pages.


def make_pod(host: MockBackend, domid: int, gfn: int, order: int) -> None:
    model = host.domain(domid)
    kind = PageType.POPULATE_ON_DEMAND
    assert model.host_write(gfn, INVALID_MFN, order, kind, model.host_default_access) == 0


def is_pod(host: MockBackend, domid: int, gfn: int) -> bool:
    return host.domain(domid).host.lookup(gfn).type == PageType.POPULATE_ON_DEMAND


POPULATES: dict[str, Callable[[MockBackend, int], object]] = {
    "touch": lambda host, domid: host.touch(domid, 0x401, "r"),
    "map": lambda host, domid: host.foreignmemory_map(domid, False, [0x401]),
    "change_gfn": lambda host, domid: host.altp2m_change_gfn(domid, 0, 0x401, A),
    "host access": lambda host, domid: host.altp2m_set_mem_access(domid, 0, 0x401, RWX),
    "notify": lambda host, domid: host.altp2m_set_vcpu_enable_notify(domid, 0, 0x401),
}


@pytest.mark.parametrize("populate", POPULATES.values(), ids=POPULATES)
def test_populate_on_demand(
    host: MockBackend, domid: int, populate: Callable[[MockBackend, int], object]
) -> None:
    make_pod(host, domid, 0x400, ORDER_2M)
    assert errno_of(partial(host.altp2m_get_mem_access, domid, 0, 0x401)) == ESRCH
    populate(host, domid)
    assert not is_pod(host, domid, 0x401)
    assert host.altp2m_get_mem_access(domid, 0, 0x5FF) == RWX  # the whole 2M came


def test_populate_on_demand_is_not_asked_for_by_looking(host: MockBackend, domid: int) -> None:
    make_pod(host, domid, 0x400, ORDER_2M)
    assert errno_of(partial(host.altp2m_get_suppress_ve, domid, 0, 0x401)) == ESRCH
    host.altp2m_set_suppress_ve(domid, 0, 0x401, False)  # splits the entry, and leaves it PoD
    assert is_pod(host, domid, 0x401)
    assert is_pod(host, domid, 0x402)
    assert host.touch(domid, 0x402, "r") is Outcome.DONE
    assert is_pod(host, domid, 0x401)
    assert is_pod(host, domid, 0x403)


def test_populate_on_demand_entries_can_be_taken_back(host: MockBackend, domid: int) -> None:
    make_pod(host, domid, 0x400, ORDER_2M)
    used = host.domain(domid).pages
    host.domain_decrease_reservation_exact(domid, gfns(0x401))
    assert host.domain(domid).pages == used
    assert host.touch(domid, 0x401, "r") is Outcome.EMULATED
    assert is_pod(host, domid, 0x402)


def test_populate_on_demand_without_memory_crashes_the_domain() -> None:
    host = MockBackend(memory_pages=512 + 1100)
    domid = host.add_domain(memory_kib=4096, superpages=False)
    make_pod(host, domid, 0x400, ORDER_2M)
    assert host.touch(domid, 0x400, "r") is Outcome.CRASH


@pytest.mark.parametrize(
    "kind", [k for k in PageType if k not in {PageType.INVALID, PageType.POPULATE_ON_DEMAND}]
)
def test_views_take_plain_ram_and_nothing_else(
    host: MockBackend, domid: int, kind: PageType
) -> None:
    view = host.altp2m_create_view(domid, RWX)
    model = host.domain(domid)
    mfn = INVALID_MFN if kind == PageType.MMIO_DM else model.host.lookup(A).mfn
    assert model.host.write(A, mfn, ORDER_4K, kind, RWX) == 0
    host.altp2m_set_mem_access(domid, view, A, RX)
    plain = kind in {PageType.RAM_RW, PageType.SHARED}  # shared pages are unshared first
    if plain:
        assert host.altp2m_get_mem_access(domid, view, A) == RX
        host.altp2m_change_gfn(domid, view, A, B)
    else:
        assert errno_of(partial(host.altp2m_get_mem_access, domid, view, A)) == ESRCH
        assert errno_of(partial(host.altp2m_change_gfn, domid, view, A, B)) == ESRCH
    assert model.crashed is (kind == PageType.BROKEN)


# The dump.


def test_the_dump_shows_runs_defaults_and_marks(host: MockBackend, domid: int) -> None:
    view = host.altp2m_create_view(domid, RX)
    first = host.domain(domid).host.lookup(0).mfn
    assert host.dump(domid).splitlines()[:2] == [
        f"domain {domid} guest: host p2m, default 7",
        f"  0x0..0x3ff -> frame {first:#x} ram_rw access 7",
    ]
    assert host.dump(domid, view) == f"domain {domid} guest: view 1, default 5"
    host.altp2m_set_mem_access(domid, view, A, R)
    host.altp2m_set_mem_access(domid, view, B, R)
    host.altp2m_set_suppress_ve(domid, view, 0x300, False)
    host.altp2m_change_gfn(domid, view, 0x200, 0x208)
    host.altp2m_set_visibility(domid, view, False)
    assert host.dump(domid, view).splitlines() == [
        f"domain {domid} guest: view 1, default 5, hidden, remaps to 0x208..0x208",
        f"  0x100..0x101 -> frame {first + A:#x} ram_rw access 1",
        f"  0x200..0x200 -> frame {first + 0x208:#x} ram_rw access 7",
        f"  0x300..0x300 -> frame {first + 0x300:#x} ram_rw access 7 #VE",
    ]
    host.altp2m_destroy_view(domid, view)
    assert host.dump(domid, view) == f"domain {domid} guest: view 1 does not exist"


# The table.


def new_table(pages: int = 1 << 20, *, executable: bool = True) -> P2m:
    return P2m(Pool(pages), executable_superpages=executable)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2047),
            st.sampled_from([ORDER_4K, ORDER_4K, ORDER_2M]),
            st.integers(1, 6),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_the_tree_is_a_map_from_gfns_to_entries(
    writes: list[tuple[int, int, int, bool]],
) -> None:
    """Whatever its shape; access 1, 3, 5 and 7 keep superpages visible."""
    table = new_table()
    flat: dict[int, tuple[int, int]] = {}
    for number, (gfn, order, access, drop) in enumerate(writes, 1):
        base, rights = gfn >> order << order, access | 1
        mfn = INVALID_MFN if drop else number << 12
        kind = PageType.INVALID if drop else PageType.RAM_RW
        assert table.write(base, mfn, order, kind, rights) == 0
        for offset in range(1 << order):
            flat.pop(base + offset, None)
            if not drop:
                flat[base + offset] = mfn + offset, rights
    got = {}
    for gfn in range(2048):
        found = table.lookup(gfn)
        if found.mapped:
            got[gfn] = found.mfn, found.access
    assert got == flat
    listed = {
        first + offset: (entry.mfn + offset, entry.access)
        for first, order, entry in table.entries()
        for offset in range(1 << order)
    }
    assert listed == flat


@pytest.mark.parametrize("order", range(1, 11))
def test_populating_any_order_maps_every_page(order: int) -> None:
    host = MockBackend(memory_pages=1 << 14)
    domid = host.add_domain(memory_kib=0, max_kib=64 << 10)
    model = host.domain(domid)
    for base in (HOLE, HOLE + 0x1000 + 3):  # aligned, and not
        host.domain_populate_physmap_exact(domid, gfns(base), order=order)
        frames = [model.host.lookup(gfn).mfn for gfn in range(base, base + (1 << order))]
        assert frames == list(range(frames[0], frames[0] + (1 << order)))
        assert not model.host.lookup(base - 1).mapped
        assert not model.host.lookup(base + (1 << order)).mapped
        assert [model.m2p[mfn] - base for mfn in frames] == list(range(1 << order))
    host.domain_decrease_reservation_exact(domid, gfns(HOLE), order=order)
    assert not any(model.host.lookup(HOLE + offset).mapped for offset in range(1 << order))


def test_a_superpage_without_rights_is_a_hole_and_a_4k_entry_is_not() -> None:
    for executable, access in ((True, N), (False, N), (False, 4)):
        table = new_table(executable=executable)
        table.write(0x200, 0x200, ORDER_2M, PageType.RAM_RW, access)
        found = table.lookup(0x2FF)
        assert (found.mapped, found.order) == (False, ORDER_2M)
        table.write(0x2FF, 0x999, ORDER_4K, PageType.RAM_RW, access)
        assert table.lookup(0x2FF).mfn == 0x999
        assert not table.lookup(0x2FE).mapped  # the superpage is lost with the first write to it
    table = new_table(executable=True)
    table.write(0x200, 0x200, ORDER_2M, PageType.RAM_RW, 4)
    assert table.lookup(0x2FF).mapped


def test_a_hole_is_as_large_as_the_table_makes_it() -> None:
    table = new_table()
    assert table.lookup(0x1FF).order == ORDER_4K  # not beyond gfn 0, the highest mapped
    assert table.lookup(0x200).order == ORDER_2M
    assert table.lookup(1 << 18).order == 18
    assert table.lookup(1 << 40).order == 27
    table.write(0x400, 1, ORDER_4K, PageType.RAM_RW, RWX)
    assert table.lookup(0x401).order == ORDER_4K
    assert table.lookup(0x200).order == ORDER_2M


def test_a_split_loses_the_suppress_bit_of_the_gfn_written_only() -> None:
    table = new_table()
    table.write(0, 0x200, ORDER_2M, PageType.RAM_RW, RWX, suppress_ve=False)
    table.write(5, 0x205, ORDER_4K, PageType.RAM_RW, RX)
    assert [table.lookup(gfn).suppress_ve for gfn in (4, 5, 6)] == [False, True, False]
    table.write(6, 0x206, ORDER_4K, PageType.RAM_RW, RX)
    assert table.lookup(6).suppress_ve is False


def test_a_write_that_finds_no_table_changes_nothing_visible() -> None:
    table = new_table(pages=3)
    assert table.write(0x200, 0x200, ORDER_2M, PageType.RAM_RW, RWX) == 0
    assert table.write(0x201, 0x999, ORDER_4K, PageType.RAM_RW, R) == 0
    assert table.write(0x400, 0x400, ORDER_4K, PageType.RAM_RW, RWX) == ENOMEM
    assert [table.lookup(gfn).mfn for gfn in (0x201, 0x202, 0x400)] == [0x999, 0x202, INVALID_MFN]


def test_a_split_that_runs_out_of_tables_gives_back_what_it_took() -> None:
    pool = Pool(100)
    table = P2m(pool, executable_superpages=True)
    assert table.write(1 << 18, 1 << 18, ORDER_1G, PageType.RAM_RW, RWX) == 0
    used = pool.used
    # One 4K entry makes 512 tables of a 1G one: Xen splits every 2M of it.
    assert table.write((1 << 18) + 5, 7, ORDER_4K, PageType.RAM_RW, R) == ENOMEM
    assert pool.used == used
    assert table.lookup((1 << 18) + 5).order == ORDER_1G
    pool.pages = used + 513
    assert table.write((1 << 18) + 5, 7, ORDER_4K, PageType.RAM_RW, R) == 0
    assert pool.used == pool.pages
    assert table.lookup((2 << 18) - 1) == ((2 << 18) - 1, PageType.RAM_RW, RWX, True, ORDER_4K)


def test_misaligned_writes_are_einval() -> None:
    table = new_table()
    for gfn, mfn in itertools.product((0x200, 0x201), repeat=2):
        expected = 0 if (gfn, mfn) == (0x200, 0x200) else EINVAL
        assert table.write(gfn, mfn, ORDER_2M, PageType.RAM_RW, RWX) == expected
    assert table.write(1 << 36, 1, ORDER_4K, PageType.RAM_RW, RWX) == EINVAL


def test_host_modes_can_be_set_once(host: MockBackend) -> None:
    """The mode a domain was made with, seen where the mock keeps it."""
    domid = host.add_domain(mode=Altp2mMode.LIMITED, memory_kib=0)
    assert host.domain(domid).mode == host.hvm_param_get(domid, 35) == 3
    assert errno_of(partial(host.hvm_param_set, domid, 35, 0)) == EEXIST


@pytest.mark.parametrize(("gfn", "count"), [(0, 1), (0, 512), (500, 600), (0x3FF00, 0x300)])
def test_entries_written_in_bulk_are_those_written_one_by_one(gfn: int, count: int) -> None:
    bulk, single = (P2m(Pool(100), executable_superpages=True) for _ in range(2))
    mfns = list(range(1000, 1000 + count))
    assert bulk.fill(gfn, mfns, PageType.RAM_RW, 7) == 0
    for offset, mfn in enumerate(mfns):
        assert single.write(gfn + offset, mfn, ORDER_4K, PageType.RAM_RW, 7) == 0
    assert list(bulk.entries()) == list(single.entries())
    assert bulk.max_mapped == single.max_mapped == gfn + count - 1
    assert bulk._pool.used == single._pool.used


def test_entries_written_in_bulk_need_tables() -> None:
    assert P2m(Pool(3), executable_superpages=True).fill(0, [1] * 513, PageType.RAM_RW, 7) == ENOMEM
