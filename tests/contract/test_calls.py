# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every altp2m call answers, on the mock and on Xen alike."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from xenaltp2m.types import ALL_GFNS, Altp2mMode

from .hosts import Host

Answer: TypeAlias = Callable[..., Any]

RWX, RX, RW, R, X, N = 7, 5, 3, 1, 4, 0
SMALL = 0x104  # 4K-backed once the host access of it has been set
LARGE = 0x600  # in a 2M entry of the host, on a host with superpages
HOLE = 0x3000
APIC_PAGE = 0xFEE00
SPECIAL_PAGE = 0xFEFFC


def default_access(host: Host) -> int:
    """``XENMEM_access_default``, which moved in 4.20."""
    return 10 if host.release.minor < 20 else 11


@pytest.fixture
def domid(host: Host) -> Iterator[int]:
    """A shared domain with altp2m on and its own host access rwx."""
    domid = host.shared_domain()
    host.backend.altp2m_set_domain_state(domid, True)
    host.backend.altp2m_set_mem_access(domid, 0, SMALL, RWX)
    host.backend.altp2m_set_mem_access(domid, 0, SMALL + 1, RWX)
    yield domid
    host.backend.altp2m_set_mem_access(domid, 0, ALL_GFNS, RWX)


def test_off_by_default(host: Host, answer: Answer) -> None:
    domid = host.shared_domain()
    xen = host.backend
    assert xen.altp2m_get_domain_state(domid) is False
    assert answer(xen.altp2m_create_view, domid, RWX) == "EOPNOTSUPP"
    assert answer(xen.altp2m_get_mem_access, domid, 0, SMALL) == "EOPNOTSUPP"
    assert answer(xen.altp2m_get_vcpu_p2m_idx, domid, 0) == "EOPNOTSUPP"
    assert answer(xen.altp2m_set_vcpu_enable_notify, domid, 0, SMALL) == "EOPNOTSUPP"


def test_on_twice_is_on_and_keeps_views(host: Host, domid: int) -> None:
    xen = host.backend
    assert xen.altp2m_get_domain_state(domid) is True
    view = xen.altp2m_create_view(domid, RWX)
    xen.altp2m_set_domain_state(domid, True)
    xen.altp2m_switch_to_view(domid, view)
    assert xen.altp2m_get_vcpu_p2m_idx(domid, 0) == view


def test_off_takes_views_in_use(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    xen.altp2m_switch_to_view(domid, view)
    xen.altp2m_set_domain_state(domid, False)
    xen.altp2m_set_domain_state(domid, True)
    assert xen.altp2m_get_vcpu_p2m_idx(domid, 0) == 0
    assert answer(xen.altp2m_switch_to_view, domid, view) == "EINVAL"


def test_unknown_domain(host: Host, answer: Answer) -> None:
    xen = host.backend
    gone = 0x7FE0
    calls: list[tuple[Callable[..., Any], tuple[int, ...]]] = [
        (xen.altp2m_get_domain_state, ()),
        (xen.altp2m_set_domain_state, (True,)),
        (xen.altp2m_set_vcpu_enable_notify, (0, SMALL)),
        (xen.altp2m_set_vcpu_disable_notify, (0,)),
        (xen.altp2m_create_view, (RWX,)),
        (xen.altp2m_destroy_view, (1,)),
        (xen.altp2m_switch_to_view, (1,)),
        (xen.altp2m_set_mem_access, (1, SMALL, RWX)),
        (xen.altp2m_get_mem_access, (1, SMALL)),
        (xen.altp2m_change_gfn, (1, SMALL, SMALL + 1)),
        (xen.altp2m_set_suppress_ve, (1, SMALL, True)),
        (xen.altp2m_set_suppress_ve_multi, (1, SMALL, SMALL + 1, True)),
        (xen.altp2m_get_suppress_ve, (1, SMALL)),
        (xen.altp2m_get_vcpu_p2m_idx, (0,)),
        (xen.altp2m_set_visibility, (1, True)),
    ]
    for call, arguments in calls:
        assert answer(call, gone, *arguments) == "ESRCH", call
    assert answer(xen.altp2m_set_mem_access_multi, gone, 1, b"\7", array("Q", [1])) == "ESRCH"


@pytest.mark.parametrize("mode", [Altp2mMode.MIXED, Altp2mMode.EXTERNAL, Altp2mMode.LIMITED])
def test_every_mode_serves_the_control_domain(host: Host, mode: Altp2mMode) -> None:
    domid = host.shared_domain(mode)
    xen = host.backend
    assert xen.hvm_param_get(domid, 35) == mode
    xen.altp2m_set_domain_state(domid, True)
    assert xen.altp2m_create_view(domid, RWX) == 1


def test_disabled_mode(host: Host, answer: Answer) -> None:
    domid = host.shared_domain(Altp2mMode.DISABLED)
    xen = host.backend
    assert xen.hvm_param_get(domid, 35) == 0
    assert answer(xen.altp2m_get_domain_state, domid) == "EINVAL"
    assert answer(xen.altp2m_set_domain_state, domid, True) == "EINVAL"
    assert answer(xen.altp2m_create_view, domid, RWX) == "EOPNOTSUPP"


def test_the_mode_is_set_once(host: Host, answer: Answer) -> None:
    domid = host.shared_domain(Altp2mMode.MIXED)
    xen = host.backend
    assert answer(xen.hvm_param_set, domid, 35, Altp2mMode.EXTERNAL.value) == "EEXIST"
    again = answer(xen.hvm_param_set, domid, 35, Altp2mMode.MIXED.value)
    assert again == (None if host.release.minor < 19 else "EEXIST")


def test_views_are_numbered_from_the_lowest_free(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    assert [xen.altp2m_create_view(domid, RWX) for _ in range(9)] == list(range(1, 10))
    assert answer(xen.altp2m_create_view, domid, RWX) == "EINVAL"
    xen.altp2m_destroy_view(domid, 4)
    assert xen.altp2m_create_view(domid, RWX) == 4


def test_default_access_of_a_view(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    default = default_access(host)
    for number in range(default):
        view = xen.altp2m_create_view(domid, number)
        assert xen.altp2m_get_mem_access(domid, view, ALL_GFNS) == number
        xen.altp2m_destroy_view(domid, view)
    for number in (default + 1, 99, 0xFFFF):
        assert answer(xen.altp2m_create_view, domid, number) == "EINVAL"
    xen.altp2m_set_mem_access(domid, 0, ALL_GFNS, RX)
    view = xen.altp2m_create_view(domid, default)
    assert xen.altp2m_get_mem_access(domid, view, ALL_GFNS) == RX


def test_destroy_refuses_with_ebusy(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    xen.altp2m_switch_to_view(domid, view)
    for refused in (0, view, view + 1, 10, 11, 0xFFFF):
        assert answer(xen.altp2m_destroy_view, domid, refused) == "EBUSY", refused
    xen.altp2m_switch_to_view(domid, 0)
    assert answer(xen.altp2m_destroy_view, domid, view) is None


def test_switch_and_visibility(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    for refused in (view + 1, 10, 0xFFFF):
        assert answer(xen.altp2m_switch_to_view, domid, refused) == "EINVAL"
        assert answer(xen.altp2m_set_visibility, domid, refused, True) == "EINVAL"
    xen.altp2m_switch_to_view(domid, view)
    xen.altp2m_set_visibility(domid, view, False)  # in use: its vCPU stays
    assert xen.altp2m_get_vcpu_p2m_idx(domid, 0) == view
    assert answer(xen.altp2m_switch_to_view, domid, view) == "EINVAL"
    xen.altp2m_set_visibility(domid, 0, False)
    assert answer(xen.altp2m_switch_to_view, domid, 0) == "EINVAL"
    xen.altp2m_set_visibility(domid, 0, True)
    assert answer(xen.altp2m_switch_to_view, domid, 0) is None


def test_every_vcpu_switches(host: Host, answer: Answer) -> None:
    domid = host.shared_domain(vcpus=4)
    xen = host.backend
    xen.altp2m_set_domain_state(domid, True)
    view = xen.altp2m_create_view(domid, RWX)
    xen.altp2m_switch_to_view(domid, view)
    assert [xen.altp2m_get_vcpu_p2m_idx(domid, vcpu) for vcpu in range(4)] == [view] * 4
    for missing in (4, 0xFFFFFFFF):
        assert answer(xen.altp2m_get_vcpu_p2m_idx, domid, missing) == "EINVAL"


def test_a_view_starts_empty(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    assert xen.altp2m_get_mem_access(domid, 0, SMALL) == RWX
    assert answer(xen.altp2m_get_mem_access, domid, view, SMALL) == "ESRCH"
    assert answer(xen.altp2m_get_suppress_ve, domid, view, SMALL) == "ESRCH"


def test_access_round_trips(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    default = default_access(host)
    for number in range(default):
        xen.altp2m_set_mem_access(domid, view, SMALL, number)
        assert xen.altp2m_get_mem_access(domid, view, SMALL) == number
    xen.altp2m_set_mem_access(domid, 0, ALL_GFNS, RX)
    xen.altp2m_set_mem_access(domid, view, SMALL, default)
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == RX  # the host's, not the view's
    for number in (default + 1, 99):
        assert answer(xen.altp2m_set_mem_access, domid, view, SMALL, number) == "EINVAL"


def test_access_of_unknown_views(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    for view in (1, 10, 0xFFFF):
        assert answer(xen.altp2m_set_mem_access, domid, view, SMALL, RX) == "EINVAL"
        assert answer(xen.altp2m_get_mem_access, domid, view, SMALL) == "EINVAL"
        assert answer(xen.altp2m_get_mem_access, domid, view, ALL_GFNS) == "EINVAL"
        assert answer(xen.altp2m_change_gfn, domid, view, SMALL, SMALL + 1) == "EINVAL"
        assert answer(xen.altp2m_set_suppress_ve, domid, view, SMALL, True) == "EINVAL"
        assert answer(xen.altp2m_get_suppress_ve, domid, view, SMALL) == "EINVAL"
        nothing = xen.altp2m_set_mem_access_multi
        assert answer(nothing, domid, view, b"", array("Q")) == "EINVAL"


def test_access_of_holes_and_devices_is_ignored(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    for gfn in (HOLE, APIC_PAGE, 1 << 36, ALL_GFNS - 1):
        assert answer(xen.altp2m_set_mem_access, domid, view, gfn, RX) is None, hex(gfn)
        assert answer(xen.altp2m_get_mem_access, domid, view, gfn) == "ESRCH", hex(gfn)
    assert answer(xen.altp2m_set_mem_access, domid, 0, 1 << 36, RX) == "EINVAL"


def test_a_superpage_comes_whole(host: Host, own_domain: int, answer: Answer) -> None:
    xen = host.backend
    xen.altp2m_set_domain_state(own_domain, True)
    view = xen.altp2m_create_view(own_domain, RWX)
    assert answer(xen.altp2m_get_mem_access, own_domain, view, LARGE + 1) == "ESRCH"
    xen.altp2m_set_mem_access(own_domain, view, LARGE, R)
    assert xen.altp2m_get_mem_access(own_domain, view, LARGE) == R
    assert xen.altp2m_get_mem_access(own_domain, view, LARGE + 1) == RWX
    assert answer(xen.altp2m_get_mem_access, own_domain, view, LARGE + 0x200) == "ESRCH"


def test_a_copied_superpage_takes_the_default_from_4_22(host: Host, own_domain: int) -> None:
    xen = host.backend
    xen.altp2m_set_domain_state(own_domain, True)
    view = xen.altp2m_create_view(own_domain, R)
    xen.altp2m_set_mem_access(own_domain, view, LARGE, RW)
    expected = R if host.release.minor >= 22 else RWX
    assert xen.altp2m_get_mem_access(own_domain, view, LARGE + 1) == expected


def test_bulk_access(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    gfns = array("Q", [SMALL, HOLE, ALL_GFNS, SMALL + 1])
    xen.altp2m_set_mem_access_multi(domid, view, bytes([R, RX, RX, X]), gfns)
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == R
    assert xen.altp2m_get_mem_access(domid, view, SMALL + 1) == X
    assert xen.altp2m_get_mem_access(domid, view, ALL_GFNS) == RWX
    assert xen.altp2m_get_mem_access(domid, 0, ALL_GFNS) == RWX
    stopped = array("Q", [SMALL, SMALL + 1, SMALL])
    bad = bytes([RW, 99, RWX])
    assert answer(xen.altp2m_set_mem_access_multi, domid, view, bad, stopped) == "EINVAL"
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == RW
    assert xen.altp2m_get_mem_access(domid, view, SMALL + 1) == X


def test_bulk_access_of_many(host: Host, domid: int, answer: Answer) -> None:
    """Long arrays reach Xen by another way than short ones, and fare no different."""
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    gfns, numbers = array("Q", [SMALL, HOLE, SMALL + 1]) * 10000, bytes([R, RX, X]) * 10000
    call = xen.altp2m_set_mem_access_multi
    assert answer(call, domid, view, numbers, gfns) is None
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == R
    assert xen.altp2m_get_mem_access(domid, view, SMALL + 1) == X
    numbers = bytes([RW, RX, RX]) * 9000 + bytes([99]) + bytes([RWX]) * 2999
    assert answer(call, domid, view, numbers, gfns) == "EINVAL"
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == RW
    assert xen.altp2m_get_mem_access(domid, view, SMALL + 1) == RX
    assert answer(call, domid, view + 1, numbers, gfns) == "EINVAL"
    assert answer(call, 0x7FE0, view, numbers, gfns) == "ESRCH"


def test_all_gfns_sets_the_default_of_the_host(host: Host, domid: int) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RX)
    xen.altp2m_set_mem_access(domid, view, ALL_GFNS, RW)
    assert xen.altp2m_get_mem_access(domid, view, ALL_GFNS) == RX
    assert xen.altp2m_get_mem_access(domid, 0, ALL_GFNS) == RW


def test_a_remap_takes_the_access_of_the_new_gfn(host: Host, domid: int) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    xen.altp2m_set_mem_access(domid, view, SMALL, X)
    xen.altp2m_change_gfn(domid, view, SMALL, SMALL + 1)
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == RWX
    xen.altp2m_set_mem_access(domid, view, SMALL + 1, RX)
    xen.altp2m_change_gfn(domid, view, SMALL, SMALL + 1)
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == RX


def test_a_remap_needs_ram(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    for gfn in (HOLE, APIC_PAGE):
        assert answer(xen.altp2m_change_gfn, domid, view, gfn, SMALL) == "ESRCH"
        assert answer(xen.altp2m_change_gfn, domid, view, SMALL, gfn) == "ESRCH"


def test_a_revert_forgets_the_access(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    assert answer(xen.altp2m_change_gfn, domid, view, SMALL, ALL_GFNS) is None  # no entry: nothing
    xen.altp2m_change_gfn(domid, view, SMALL, SMALL + 1)
    xen.altp2m_set_mem_access(domid, view, SMALL, X)
    xen.altp2m_change_gfn(domid, view, SMALL, ALL_GFNS)
    assert answer(xen.altp2m_get_mem_access, domid, view, SMALL) == "ESRCH"


def test_a_drop_among_the_targets_resets_the_view(
    host: Host, own_domain: int, answer: Answer
) -> None:
    xen = host.backend
    xen.altp2m_set_domain_state(own_domain, True)
    xen.domain_setmaxmem(own_domain, 64 << 10)
    first = xen.domain_maximum_gpfn(own_domain) + 1
    pages = array("Q", [first, first + 1, first + 2])
    xen.domain_populate_physmap_exact(own_domain, pages)
    one, two, bystander = (xen.altp2m_create_view(own_domain, RWX) for _ in range(3))

    def remap_and_protect(*views: int) -> None:
        for view in views:
            xen.altp2m_change_gfn(own_domain, view, SMALL, first)
            xen.altp2m_change_gfn(own_domain, view, SMALL + 1, first + 2)
        for view in (one, two, bystander):
            xen.altp2m_set_mem_access(own_domain, view, SMALL + 2, R)

    def held() -> list[Any]:
        views = (one, two, bystander)
        return [answer(xen.altp2m_get_mem_access, own_domain, view, SMALL + 2) for view in views]

    remap_and_protect(one)
    xen.domain_decrease_reservation_exact(own_domain, array("Q", [first + 1]))
    assert held() == ["ESRCH", R, R]  # just the view whose range it lay in
    xen.domain_populate_physmap_exact(own_domain, array("Q", [first + 1]))
    remap_and_protect(one, two)
    xen.domain_decrease_reservation_exact(own_domain, array("Q", [first + 1]))
    assert held() == ["ESRCH", "ESRCH", "ESRCH"]  # the second hit resets them all


def test_host_access_overwrites_the_entries_of_views(
    host: Host, domid: int, answer: Answer
) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    xen.altp2m_set_mem_access(domid, view, SMALL, X)
    xen.altp2m_set_mem_access(domid, 0, SMALL, RX)
    xen.altp2m_set_mem_access(domid, 0, SMALL + 1, RX)
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == RX
    assert answer(xen.altp2m_get_mem_access, domid, view, SMALL + 1) == "ESRCH"


def test_suppress_ve(host: Host, domid: int, answer: Answer) -> None:
    xen = host.backend
    view = xen.altp2m_create_view(domid, RWX)
    xen.altp2m_set_mem_access(domid, 0, SMALL, RX)
    xen.altp2m_set_suppress_ve(domid, view, SMALL, False)
    assert xen.altp2m_get_suppress_ve(domid, view, SMALL) is False
    assert xen.altp2m_get_mem_access(domid, view, SMALL) == RX  # the host's access came along
    xen.altp2m_set_mem_access(domid, view, SMALL, R)
    assert xen.altp2m_get_suppress_ve(domid, view, SMALL) is False
    xen.altp2m_change_gfn(domid, view, SMALL, SMALL + 1)
    assert xen.altp2m_get_suppress_ve(domid, view, SMALL) is True
    assert answer(xen.altp2m_set_suppress_ve, domid, view, HOLE, False) == "ESRCH"
    multi = xen.altp2m_set_suppress_ve_multi
    assert multi(domid, view, SMALL, SMALL + 1, False) is None
    assert xen.altp2m_get_suppress_ve(domid, view, SMALL + 1) is False
    assert multi(domid, view, HOLE - 1, HOLE + 1, False) == (HOLE - 1, 3)
    assert answer(multi, domid, view, SMALL + 1, SMALL, True) == "EINVAL"


def test_notify_pages(host: Host, answer: Answer) -> None:
    domid = host.shared_domain(vcpus=4)
    xen = host.backend
    xen.altp2m_set_domain_state(domid, True)
    enable, disable = xen.altp2m_set_vcpu_enable_notify, xen.altp2m_set_vcpu_disable_notify
    assert answer(enable, domid, 4, SMALL) == "EINVAL"
    assert answer(disable, domid, 4) == "EINVAL"
    assert answer(enable, domid, 0, HOLE) == "EINVAL"
    assert answer(enable, domid, 0, SMALL) is None
    assert answer(enable, domid, 0, SMALL) == "EEXIST"
    assert answer(enable, domid, 3, SMALL + 1) is None
    assert answer(disable, domid, 1) is None  # never enabled
    assert answer(disable, domid, 0) is None
    assert answer(enable, domid, 0, SMALL) is None
