# SPDX-License-Identifier: LGPL-2.1-or-later
"""A view: access, remaps, suppress-#VE, and what it knows of itself."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Sequence, Sized
from errno import EINVAL, ENOMEM, EPERM
from typing import Any

import pytest

from xenaltp2m import (
    Access,
    Altp2m,
    Difference,
    Domain,
    Gfn,
    InvalidArgumentError,
    LeftoverError,
    Mismatch,
    NotMappedError,
    OutOfMemoryError,
    SuppressVeFailure,
    UnsupportedError,
    View,
    Xen,
)
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Domain as Model
from xenaltp2m.backend.mock.p2m import INVALID_MFN, PageType
from xenaltp2m.handles import view as view_module
from xenaltp2m.handles import view_entries as entries_module
from xenaltp2m.values import gfns as gfns_module

from .effective import changes, every_release, met, state_of

BLOCK = 512
"""The gfns of a host superpage; the guest's memory is three of them."""
GFNS = [*range(16), *range(510, 514), 600, 601, *range(696, 706), 800, 1023]
"""Those that tests touch, and neighbours."""
RAM_END = 3 * BLOCK
HOLE, DIRECT_MMIO = 0x2000, 0xFEE00
ANY_ACCESS = {
    Access.N: 0, Access.R: 1, Access.RW: 3, Access.X: 4, Access.RX: 5, Access.RWX: 7,
    Access.RX2RW: 8, Access.N2RWX: 9,
}  # fmt: skip
"""``xenmem_access_t`` (public/memory.h), as it is in every release."""
LAZY_DEFAULT = [version for version in SUPPORTED if version >= (4, 19)]


@pytest.fixture
def small_batch(monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (view_module, gfns_module, entries_module):
        monkeypatch.setattr(module, "BATCH", 4)
    return 4


def own(guest: Model, view: View, gfn: int) -> int | None:
    """The access number of a view's own entry."""
    found = guest.views[view.id].table.lookup(gfn)
    return found.access if found.mapped else None


def frame(guest: Model, view: View, gfn: int) -> int:
    found = met(guest, view.id, gfn)
    assert found is not None
    return found[0]


def host_frame(guest: Model, gfn: int) -> int:
    return guest.host.lookup(gfn).mfn


def calls(mock: MockBackend, since: int) -> list[tuple[str, tuple[object, ...]]]:
    return [(call.op.removeprefix("altp2m_"), call.arguments) for call in list(mock.calls)[since:]]


def changing(mock: MockBackend, since: int) -> list[tuple[str, tuple[object, ...]]]:
    """The calls that change something, without domid and view."""
    return [(op, arguments[2:]) for op, arguments in calls(mock, since) if "get" not in op]


# Setting access.


@every_release
def test_one_gfn_is_set_by_one_call(view: View, mock: MockBackend, guest: Model) -> None:
    for access, number in ANY_ACCESS.items():
        since = len(mock.calls)
        view.set_access(5, access)
        assert calls(mock, since) == [("set_mem_access", (1, view.id, 5, number))]
        assert own(guest, view, 5) == number
        assert view.access(5) is access
    assert own(guest, view, 6) == 7  # Xen copies the superpage along, with the host's access


@every_release
def test_many_gfns_are_set_by_one_call(view: View, mock: MockBackend, guest: Model) -> None:
    for access, number in ANY_ACCESS.items():
        since = len(mock.calls)
        view.set_access(range(5, 9), access)
        assert calls(mock, since) == [
            ("set_mem_access_multi", (1, view.id, (number,) * 4, (5, 6, 7, 8)))
        ]
        assert [own(guest, view, gfn) for gfn in range(4, 10)] == [7, *[number] * 4, 7]


@pytest.mark.parametrize(
    "gfns",
    [
        range(8, 4, -1),
        range(5, 12, 3),
        [5, 700, 6, 5],
        (gfn for gfn in (9, 5)),
        {5, 6},
        dict.fromkeys([5, 1023]),
        [],
        range(0),
        iter(()),
    ],
    ids=lambda gfns: f"{type(gfns).__name__} {gfns if isinstance(gfns, Sized) else ''}",
)
def test_any_iterable_will_do(view: View, guest: Model, gfns: Iterable[int]) -> None:
    gfns = list(gfns) if not isinstance(gfns, list | range | set | dict) else gfns
    view.set_access(iter(gfns), Access.R)
    meant = set(gfns)
    for gfn in range(2 * BLOCK):
        assert met(guest, view.id, gfn) == (host_frame(guest, gfn), 1 if gfn in meant else 7)
    assert {
        gfn for run in view.differences() for gfn in range(run.first, run.first + run.count)
    } == meant


def test_nothing_to_set_is_no_call(view: View, mock: MockBackend) -> None:
    since, seen = len(mock.calls), []
    view.set_access([], Access.R, progress=lambda *at: seen.append(at))
    assert calls(mock, since) == []
    assert seen == []
    assert view.differences() == []


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_bulk_is_one_call_for_thousands_of_gfns(view: View, mock: MockBackend, extra: int) -> None:
    assert gfns_module.BATCH >= 4096
    total = 2 * gfns_module.BATCH + extra
    since, seen = len(mock.calls), []
    view.set_access(range(total), Access.RX, progress=lambda *at: seen.append(at))
    made = calls(mock, since)
    assert len(made) == (3 if extra == 1 else 2)
    assert {op for op, _ in made} == {"set_mem_access_multi"}
    assert seen[0] == (gfns_module.BATCH, total)
    assert seen[-1] == (total, total)
    assert len(seen) == len(made)


@pytest.mark.parametrize(
    "gfns",
    [
        -1, True, 1 << 36, (1 << 64) - 1, 1 << 64, 1.0, None, "5",
        [5, -1], [5, True], [5, 1 << 36], [5, (1 << 64) - 1], [5, 1 << 64], [5, 1.0], [5, None],
        range(-1, 3), range((1 << 36) - 1, (1 << 36) + 1), range(1 << 40),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["set_access", "set_suppress_ve"])
def test_what_is_no_gfn_is_refused(view: View, mock: MockBackend, gfns: Any, method: str) -> None:
    since = len(mock.calls)
    with pytest.raises(InvalidArgumentError):
        getattr(view, method)(gfns, Access.R if method == "set_access" else True)
    assert calls(mock, since) == []
    assert view.differences() == []


@pytest.mark.parametrize("gfn", [-1, True, 1 << 36, (1 << 64) - 1, 1 << 64, 1.0, None, "5"])
def test_what_is_no_gfn_is_refused_by_every_method(view: View, mock: MockBackend, gfn: Any) -> None:
    since = len(mock.calls)
    uses: list[Callable[[], object]] = [
        lambda: view.access(gfn),
        lambda: view.effective_access(gfn),
        lambda: view.remap(gfn, 5),
        lambda: view.remap(5, gfn),
        lambda: view.revert(gfn),
        lambda: view.suppress_ve(gfn),
    ]
    for use in uses:
        with pytest.raises(InvalidArgumentError):
            use()
    assert calls(mock, since) == []


@pytest.mark.parametrize("gfn", [0, (1 << 36) - 1])
@pytest.mark.filterwarnings("ignore::xenaltp2m.handles.view.HoleWarning")
def test_the_lowest_and_the_highest_gfn_are_gfns(view: View, gfn: int) -> None:
    view.set_access(gfn, Access.R)
    view.set_access([gfn], Access.R)
    view.access(gfn)


@pytest.mark.parametrize("gfns", [0x101000, [0x100, 0x101000], range(0x101000, 0x101002)])
def test_fault_15_an_address_in_place_of_a_gfn(view: View, gfns: int | Sequence[int]) -> None:
    with pytest.warns(view_module.HoleWarning, match=r"the highest gfn is 0x.*its gfn is 0x101"):
        view.set_access(gfns, Access.R)


@every_release
@pytest.mark.parametrize("access", [Access.W, Access.WX])
def test_what_would_crash_the_guest_is_refused(
    view: View, mock: MockBackend, access: Access
) -> None:
    since = len(mock.calls)
    refused: list[Callable[[], None]] = [
        lambda: view.set_access(5, access),
        lambda: view.set_access([5], access),
        lambda: view.set_access([], access),
        lambda: view.remap(5, 6, access=access),
    ]
    for refuse in refused:
        with pytest.raises(InvalidArgumentError, match="the guest would crash"):
            refuse()
    assert changing(mock, since) == []


@pytest.mark.parametrize(
    "access", [Access.N2RWX | Access.X, Access.DEFAULT | Access.R, Access.RX2RW | Access.W, 5, "r"]
)
def test_what_is_no_access_is_refused(view: View, mock: MockBackend, access: Any) -> None:
    since = len(mock.calls)
    for gfns in (5, [5]):
        with pytest.raises(InvalidArgumentError):
            view.set_access(gfns, access)
    assert changing(mock, since) == []


@every_release
def test_r_pw_came_with_4_20(view: View, guest: Model, xen_version: tuple[int, int]) -> None:
    if xen_version < (4, 20):
        with pytest.raises(UnsupportedError, match=r"4\.20"):
            view.set_access(5, Access.R_PW)
    else:
        view.set_access(5, Access.R_PW)
        assert own(guest, view, 5) == 10
        assert view.access(5) is Access.R_PW


@every_release
def test_default_is_the_host_s_and_is_kept_as_what_it_was(view: View, guest: Model) -> None:
    guest.host_default_access = 5
    view.set_access(5, Access.DEFAULT)
    view.set_access([6], Access.DEFAULT)
    view.remap(7, 8, access=Access.DEFAULT)
    guest.host_default_access = 7
    assert [own(guest, view, gfn) for gfn in (5, 6, 7)] == [5, 5, 5]
    assert view.access(5) is Access.RX
    assert {run.access for run in view.differences()} == {Access.RX}
    assert view.verify() == []


# A bulk operation that fails.


@pytest.mark.parametrize("had", [Access.N, Access.X, None], ids=str)
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_bulk_operation_that_fails_has_changed_nothing(
    view: View, mock: MockBackend, small_batch: int, had: Access | None, nth: int
) -> None:
    if had is not None:
        view.set_access([5, 700], had)
    before, asked = state_of(mock, 1, GFNS), view.differences()
    mock.fail("altp2m_set_mem_access_multi", nth, EPERM)
    with pytest.raises(PermissionError):
        view.set_access([*range(2, 8), *range(698, 704)], Access.R)
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    assert view.differences() == asked
    assert view.verify() == []


@every_release
def test_what_was_set_before_is_set_back_where_memory_runs_out(
    dom: Domain, mock: MockBackend, guest: Model
) -> None:
    """Xen stops at the gfn that needs a page of the pool that is not there."""
    plenty, done = guest.pool.pages, []
    for spare in range(4):
        with dom.altp2m() as altp2m:
            view = altp2m.create_view()
            view.set_access(3, Access.X)
            guest.pool.pages = guest.pool.used + spare
            before, asked = state_of(mock, 1, GFNS), view.differences()
            try:
                view.set_access([1, 2, 3, 600, 601, 1100, 1101], Access.N)
            except OutOfMemoryError:
                done.append(False)
                assert changes(before, state_of(mock, 1, GFNS)) == set()
                assert view.differences() == asked
                assert view.access(3) is Access.X
            else:
                done.append(True)
                assert {own(guest, view, gfn) for gfn in (1, 2, 3, 600, 601, 1101)} == {0}
        guest.pool.pages = plenty
    assert done == [False, False, True, True]  # it takes two pages, to split two superpages


def test_what_cannot_be_set_back_is_told(
    view: View, mock: MockBackend, guest: Model, small_batch: int
) -> None:
    view.set_access(3, Access.X)
    mock.fail("altp2m_set_mem_access_multi", 2, ENOMEM)
    mock.fail("altp2m_get_mem_access", 1, EPERM)  # as it finds out what to set back
    with pytest.raises(LeftoverError) as caught:
        view.set_access([2, 3, 4, HOLE, 700, 701], Access.N)
    assert caught.value.left == ("access of 3 gfns from 0x2 to 0x4 in view 1 of domain 1",)
    assert isinstance(caught.value.__cause__, OutOfMemoryError)
    assert [own(guest, view, gfn) for gfn in (2, 3, 4, 700)] == [0, 0, 0, None]
    view.set_access([2, 4], Access.RWX)
    view.set_access([3], Access.X)
    assert view.verify() == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_progress_may_end_a_bulk_operation(
    view: View, mock: MockBackend, small_batch: int, error: type[BaseException]
) -> None:
    view.set_access(3, Access.X)
    before = state_of(mock, 1, GFNS)

    def enough(done: int, total: int) -> None:
        assert total == 12
        if done == 8:
            raise error

    with pytest.raises(error):
        view.set_access(range(12), Access.N, progress=enough)
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    assert [(run.first, run.access) for run in view.differences()] == [(3, Access.X)]


# Asking for access.


@every_release
def test_a_fresh_view_has_no_access_of_its_own(view: View) -> None:
    assert view.access(5) is None
    assert view.access(HOLE) is None
    assert view.effective_access(5) is Access.RWX
    assert view.effective_access(HOLE) is None


@every_release
@pytest.mark.filterwarnings("ignore::xenaltp2m.DecorativeDefaultWarning")
def test_what_a_vcpu_meets_before_its_first_access(
    altp2m: Altp2m, guest: Model, mock: MockBackend, xen_version: tuple[int, int]
) -> None:
    view = altp2m.create_view(Access.RX)
    guest.set_mem_access(0, 5, 1)  # the host p2m lets 5 only be read
    lazy_default = xen_version >= (4, 19)  # 7e5b662b28
    assert view.effective_access(5) is (Access.RX if lazy_default else Access.R)
    assert view.effective_access(700) is (Access.RX if lazy_default else Access.RWX)
    altp2m.switch_to_view(view)
    for gfn in (5, 700):
        promised = view.effective_access(gfn)
        mock.touch(1, gfn)
        assert view.access(gfn) is promised


@every_release
@pytest.mark.filterwarnings("ignore::xenaltp2m.DecorativeDefaultWarning")
def test_a_superpage_copied_along_takes_the_default_only_from_4_22(
    altp2m: Altp2m, xen_version: tuple[int, int]
) -> None:
    view = altp2m.create_view(Access.RX)
    view.set_access(5, Access.R)
    copied = Access.RX if xen_version >= (4, 22) else Access.RWX  # 38a5bfc7f2
    assert [view.effective_access(gfn) for gfn in (4, 5, 6)] == [copied, Access.R, copied]
    assert view.effective_access(5 + BLOCK) is (Access.RX if xen_version >= (4, 19) else Access.RWX)


def test_a_view_that_is_gone_has_no_access(view: View, mock: MockBackend) -> None:
    mock.altp2m_destroy_view(1, view.id)
    with pytest.raises(InvalidArgumentError, match="no such view"):
        view.access(5)
    with pytest.raises(InvalidArgumentError, match="no such view"):
        view.set_access(5, Access.R)
    assert view.differences() == []


# Remaps.


@every_release
@pytest.mark.parametrize("access", [None, Access.N, Access.X, Access.RX2RW], ids=str)
@pytest.mark.parametrize(("had", "host_has"), [(None, 7), (None, 1), (Access.N, 7)], ids=str)
def test_a_remapped_gfn_has_the_right_page_and_access(
    view: View, guest: Model, access: Access | None, had: Access | None, host_has: int,
    xen_version: tuple[int, int],
) -> None:  # fmt: skip
    guest.set_mem_access(0, 5, host_has)
    if had is not None:
        view.set_access(5, had)
    view.remap(5, 700, access=access)
    kept = 7 if xen_version >= (4, 19) else host_has
    wanted = kept if had is None else ANY_ACCESS[had]
    if access is not None:
        wanted = ANY_ACCESS[access]
    assert met(guest, view.id, 5) == (host_frame(guest, 700), wanted)
    assert met(guest, view.id, 6) == (host_frame(guest, 6), 7)
    assert met(guest, view.id, 700) == (host_frame(guest, 700), 7)
    assert view.remaps == {5: 700}
    assert view.verify() == []


def test_access_is_set_before_and_after_the_remap(view: View, mock: MockBackend) -> None:
    since = len(mock.calls)
    view.remap(5, 700, access=Access.X)
    assert changing(mock, since) == [
        ("set_mem_access", (5, 4)),  # makes a 4K entry, so that the remap needs no memory
        ("change_gfn", (5, 700)),
        ("set_mem_access", (5, 4)),  # for the remap brings the new gfn's access
    ]


def test_a_remap_of_a_remap_shows_what_that_shows(view: View, guest: Model) -> None:
    view.remap(6, 700)
    view.remap(5, 6)
    assert frame(guest, view, 5) == host_frame(guest, 700)
    assert view.remaps == {5: 700, 6: 700}
    view.revert(6)
    assert frame(guest, view, 5) == host_frame(guest, 700)
    assert view.remaps == {5: 700}
    assert view.tracks(6)  # Xen counts the gfns named, not the pages shown
    assert view.tracks(700)


def test_a_gfn_can_be_remapped_again(view: View, guest: Model) -> None:
    view.remap(5, 700, access=Access.X)
    view.remap(5, 701)
    assert met(guest, view.id, 5) == (host_frame(guest, 701), 4)
    assert view.remaps == {5: 701}


def test_a_gfn_remapped_to_its_own_page_is_not_remapped(view: View, guest: Model) -> None:
    view.remap(5, 5, access=Access.R)
    assert met(guest, view.id, 5) == (host_frame(guest, 5), 1)
    view.remap(700, 6)
    view.remap(6, 701)
    view.remap(6, 700)  # which shows the page of 6
    assert frame(guest, view, 6) == host_frame(guest, 6)
    assert view.remaps == {700: 6}
    for gfn in (5, 6):
        with pytest.raises(InvalidArgumentError, match="does not remap"):
            view.revert(gfn)
        assert guest.m2p[host_frame(guest, gfn)] == gfn


@every_release
@pytest.mark.parametrize(
    ("gfn", "new_gfn"),
    [(HOLE, 5), (5, HOLE), (DIRECT_MMIO, 5), (5, DIRECT_MMIO), (0x20, 5), (5, 0x20)],
)
def test_only_ordinary_ram_can_be_remapped(
    view: View, guest: Model, mock: MockBackend, gfn: int, new_gfn: int
) -> None:
    guest.host_write(0x20, host_frame(guest, 0x20), 0, PageType.RAM_LOGDIRTY, 7)
    view.set_access(6, Access.R)
    watched = [*range(0x40), HOLE, DIRECT_MMIO]
    before, asked = state_of(mock, 1, watched), view.differences()
    with pytest.raises(NotMappedError, match="not ordinary RAM"):
        view.remap(gfn, new_gfn, access=Access.X)
    assert changes(before, state_of(mock, 1, watched)) == set()
    assert view.differences() == asked
    assert view.remaps == {}


@every_release
@pytest.mark.parametrize("had", [None, "access", "remap"])
@pytest.mark.parametrize("superpages", [True, False])
def test_a_remap_is_done_or_fails_whatever_memory_is_left(
    mock: MockBackend, xen: Xen, superpages: bool, had: str | None
) -> None:
    """Xen calls it success where its last write failed; the library must not."""
    domid = mock.add_domain("poor", memory_kib=6 << 10, superpages=superpages)
    poor = mock.domain(domid)
    plenty, done = poor.pool.pages, []
    for spare in range(6):
        with xen.domain(domid) as dom, dom.altp2m() as altp2m:
            view = altp2m.create_view()
            if had == "access":
                view.set_access(5, Access.RX)
            elif had == "remap":
                view.remap(5, 1100, access=Access.RX)
            poor.pool.pages = poor.pool.used + spare
            before = state_of(mock, domid, GFNS)
            asked, remaps = view.differences(), view.remaps
            try:
                view.remap(5, 700, access=Access.X)
            except OutOfMemoryError:
                done.append(False)
                assert changes(before, state_of(mock, domid, GFNS)) == set()
                assert (view.differences(), view.remaps) == (asked, remaps)
            else:
                done.append(True)
                assert met(poor, view.id, 5) == (host_frame(poor, 700), 4)
                assert changes(before, state_of(mock, domid, GFNS)) == {
                    f"gfn 0x5 in view 1 of domain {domid}"
                }
        poor.pool.pages = plenty
    assert done == ([True] * 6 if had else [False] * 3 + [True] * 3)  # a table for each level


@every_release
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("had", [None, "access", "remap", "suppress"])
def test_a_remap_that_fails_half_way_is_taken_back(
    view: View, mock: MockBackend, guest: Model, nth: int, had: str | None
) -> None:
    if had == "access":
        view.set_access(5, Access.N)
    elif had == "remap":
        view.remap(5, 800, access=Access.N)
    elif had == "suppress":
        view.set_suppress_ve(5, False)
    view.set_access(6, Access.N)
    before = state_of(mock, 1, GFNS)
    asked, remaps = view.differences(), view.remaps
    mock.fail("altp2m_set_mem_access", nth, EPERM)
    with pytest.raises(PermissionError):
        view.remap(5, 700, access=Access.X)
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    assert (view.differences(), view.remaps) == (asked, remaps)
    assert view.suppress_ve(5) is (had != "suppress") or view.suppress_ve(5) is None
    assert view.tracks(700) == (nth == 2)  # Xen does not forget that it was a target
    view.set_access(5, Access.R)
    view.remap(5, 701)
    assert own(guest, view, 6) == 0


def test_what_of_a_remap_cannot_be_taken_back_is_told(
    view: View, mock: MockBackend, guest: Model
) -> None:
    mock.fail("altp2m_set_mem_access", 2, EPERM)
    mock.fail("altp2m_change_gfn", 2, EINVAL)
    with pytest.raises(LeftoverError) as caught:
        view.remap(5, 700, access=Access.X)
    assert caught.value.left == ("remap of gfn 0x5 in view 1 of domain 1",)
    assert isinstance(caught.value.__cause__, PermissionError)
    assert frame(guest, view, 5) == host_frame(guest, 700)


def test_a_page_that_is_hidden_by_now_cannot_be_shown_again(
    view: View, mock: MockBackend, guest: Model
) -> None:
    view.remap(5, 6)
    view.remap(6, 700)
    mock.fail("altp2m_set_mem_access", 2, EPERM)
    with pytest.raises(LeftoverError, match="itself remapped now") as caught:
        view.remap(5, 800)
    assert caught.value.left == ("remap of gfn 0x5 in view 1 of domain 1",)
    assert frame(guest, view, 5) == host_frame(guest, 800)


def test_tracks_is_the_range_of_targets(view: View, guest: Model) -> None:
    assert not any(view.tracks(gfn) for gfn in (0, 5, 1 << 35))
    view.remap(5, 700)
    view.remap(6, 720)
    view.revert(6)
    assert [gfn for gfn in range(RAM_END) if view.tracks(gfn)] == list(range(700, 721))
    model = guest.views[view.id]
    assert (model.min_remapped, model.max_remapped) == (700, 720)


# Reverts.


@every_release
def test_a_reverted_gfn_shows_its_own_page(view: View, guest: Model, mock: MockBackend) -> None:
    before = state_of(mock, 1, GFNS)
    view.remap(5, 700, access=Access.X)
    view.set_suppress_ve(5, False)
    view.revert(5)
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    assert view.suppress_ve(5) is True
    assert view.remaps == {}
    assert view.differences() == []


@pytest.mark.parametrize("xen_version", LAZY_DEFAULT, ids=str)
def test_a_reverted_gfn_has_the_default_access(altp2m: Altp2m, guest: Model) -> None:
    view = altp2m.create_view(Access.RX)
    view.remap(5, 700, access=Access.X)
    view.revert(5)
    assert met(guest, view.id, 5) == (host_frame(guest, 5), 5)


@pytest.mark.parametrize("why", ["never remapped", "access set", "reverted", "closed elsewhere"])
def test_only_what_was_remapped_is_reverted(
    altp2m: Altp2m, view: View, guest: Model, mock: MockBackend, why: str
) -> None:
    if why == "access set":
        view.set_access(5, Access.R)
    elif why == "reverted":
        view.remap(5, 700)
        view.revert(5)
    elif why == "closed elsewhere":
        altp2m.create_view().remap(5, 700)
    since = len(mock.calls)
    with pytest.raises(InvalidArgumentError, match="nothing to revert"):
        view.revert(5)
    assert calls(mock, since) == []
    assert guest.m2p[host_frame(guest, 5)] == 5


@every_release
def test_after_a_revert_its_neighbours_keep_what_they_have(view: View, guest: Model) -> None:
    """Else Xen copies the host's superpage over them when the gfn is next set or remapped."""
    view.remap(6, 700, access=Access.X)
    view.set_access(7, Access.N)
    for again in (
        lambda: view.set_access(5, Access.R),
        lambda: view.remap(5, 702),
        lambda: view.set_suppress_ve(5, False),
    ):
        view.remap(5, 701)
        view.revert(5)
        again()
        assert met(guest, view.id, 6) == (host_frame(guest, 700), 4)
        assert met(guest, view.id, 7) == (host_frame(guest, 7), 0)


@every_release
def test_after_a_revert_the_guest_may_use_the_page(
    altp2m: Altp2m, view: View, guest: Model, mock: MockBackend
) -> None:
    """Up to 4.16 a first use copies the host's superpage, too."""
    view.remap(6, 700, access=Access.X)
    view.remap(5, 701)
    view.revert(5)
    altp2m.switch_to_view(view)
    mock.touch(1, 5, "w")
    assert met(guest, view.id, 6) == (host_frame(guest, 700), 4)


def test_a_revert_after_xen_wiped_the_view_leaves_the_page_alone(
    view: View, guest: Model, dom: Domain
) -> None:
    view.remap(5, 700)
    guest.remove_page(700)  # the guest gives it back: Xen resets the view
    assert view.access(5) is None
    view.revert(5)
    assert view.remaps == {}
    assert guest.m2p[host_frame(guest, 5)] == 5


def test_a_revert_that_leaves_a_hole_says_so(view: View, guest: Model, mock: MockBackend) -> None:
    view.remap(5, 700)
    mock.fail("altp2m_set_suppress_ve", 1, EPERM)
    with pytest.raises(LeftoverError) as caught:
        view.revert(5)
    assert caught.value.left == ("missing entry of gfn 0x5 in view 1 of domain 1",)
    assert frame(guest, view, 5) == host_frame(guest, 5)
    assert view.remaps == {}


# Suppress #VE.


@every_release
def test_suppress_ve_of_one_gfn(view: View, guest: Model) -> None:
    assert view.suppress_ve(5) is None
    assert view.set_suppress_ve(5, False) == []
    assert view.suppress_ve(5) is False
    assert met(guest, view.id, 5) == (host_frame(guest, 5), 7)
    view.set_access(5, Access.R)
    assert view.suppress_ve(5) is False
    view.set_suppress_ve(5)
    assert view.suppress_ve(5) is True
    with pytest.raises(NotMappedError):
        view.set_suppress_ve(HOLE)


@every_release
def test_suppress_ve_of_many_is_one_call_for_each_run(
    view: View, guest: Model, mock: MockBackend
) -> None:
    view.set_access([5, 700], Access.R)
    since = len(mock.calls)
    assert view.set_suppress_ve([6, 700, 5, 7, 5, 701], False) == []
    assert [call for call in changing(mock, since) if call[0].startswith("set_suppress")] == [
        ("set_suppress_ve_multi", (5, 7, False)),
        ("set_suppress_ve_multi", (700, 701, False)),
    ]
    for gfn in GFNS:
        assert guest.views[view.id].table.lookup(gfn).suppress_ve is (
            gfn not in {5, 6, 7, 700, 701}
        )
    assert (own(guest, view, 5), own(guest, view, 6)) == (1, 7)


@every_release
def test_suppress_ve_tells_the_first_failure_of_each_run(view: View) -> None:
    failures = view.set_suppress_ve([RAM_END - 1, RAM_END, RAM_END + 1, HOLE, 5], False)
    assert failures == [
        SuppressVeFailure(Gfn(RAM_END), 3),  # ESRCH
        SuppressVeFailure(Gfn(HOLE), 3),
    ]
    assert [view.suppress_ve(gfn) for gfn in (5, RAM_END - 1, RAM_END)] == [False, False, None]


@every_release
@pytest.mark.parametrize("bulk", [False, True])
def test_after_suppress_ve_neighbours_can_be_set(view: View, guest: Model, bulk: bool) -> None:
    """Else Xen copies the host's superpage over the gfn when its neighbour is set."""
    view.set_suppress_ve(range(5, 600) if bulk else 5, False)
    view.set_access(5, Access.N)
    view.set_access([4, 511, 512, 700], Access.R)
    assert (own(guest, view, 5), view.suppress_ve(5)) == (0, False)
    if bulk:
        assert [view.suppress_ve(gfn) for gfn in (511, 512, 599)] == [False] * 3


def test_a_remap_sets_suppress_ve(view: View) -> None:
    view.set_suppress_ve(5, False)
    view.remap(5, 700)  # from outside the domain Xen sets it
    assert view.suppress_ve(5) is True
    assert [run.suppress_ve for run in view.differences()] == [None]


# Visibility.


def test_visibility(altp2m: Altp2m, view: View, guest: Model) -> None:
    assert guest.views[view.id].visible
    view.set_visibility(False)
    assert not guest.views[view.id].visible
    assert not view.visible
    view.set_visibility(True)
    assert guest.views[view.id].visible
    assert view.visible


def test_visibility_that_could_not_be_changed_is_as_before(view: View, mock: MockBackend) -> None:
    mock.fail("altp2m_set_visibility", 1, EPERM)
    with pytest.raises(PermissionError):
        view.set_visibility(False)
    assert view.visible


# What it knows of itself.


def runs(view: View) -> list[tuple[int, int, Access | None, int | None, bool | None]]:
    return [
        (run.first, run.count, run.access, run.remapped_to, run.suppress_ve)
        for run in view.differences()
    ]


def test_differences_join_neighbours_that_go_on_alike(view: View, mock: MockBackend) -> None:
    view.set_access(range(0x10, 0x20), Access.RX)
    view.set_access(range(0x20, 0x30), Access.RX)
    view.set_access([0x40, 0x42], Access.R)
    view.set_access(0x41, Access.R)
    for gfn in range(0x50, 0x53):
        view.remap(gfn, gfn + 0x200, access=Access.X)
    view.remap(0x53, 0x300, access=Access.X)
    view.set_suppress_ve(range(0x2E, 0x31), False)
    since = len(mock.calls)
    assert runs(view) == [
        (0x10, 0x1E, Access.RX, None, None),
        (0x2E, 2, Access.RX, None, False),
        (0x30, 1, None, None, False),
        (0x40, 3, Access.R, None, None),
        (0x50, 3, Access.X, 0x250, None),
        (0x53, 1, Access.X, 0x300, None),
    ]
    assert calls(mock, since) == []
    first = view.differences()[0]
    assert (first.first, first.last) == (0x10, 0x2D)


def test_a_remap_parts_a_run(view: View) -> None:
    view.set_access(range(4, 8), Access.X)
    view.remap(5, 700)
    assert runs(view) == [
        (4, 1, Access.X, None, None),
        (5, 1, Access.X, 700, None),
        (6, 2, Access.X, None, None),
    ]


def test_a_difference_goes_on_only_where_the_target_does() -> None:
    run = Difference(Gfn(5), 2, Access.X, Gfn(100), None)
    on = Difference(Gfn(7), 1, Access.X, Gfn(102), None)
    assert run.goes_on_in(on)
    for other in (
        Difference(Gfn(8), 1, Access.X, Gfn(102), None),
        Difference(Gfn(7), 1, Access.X, Gfn(103), None),
        Difference(Gfn(7), 1, Access.X, None, None),
        Difference(Gfn(7), 1, Access.R, Gfn(102), None),
        Difference(Gfn(7), 1, Access.X, Gfn(102), True),
    ):
        assert not run.goes_on_in(other)


def test_verify_finds_nothing_where_nothing_happened(view: View, mock: MockBackend) -> None:
    assert view.verify() == []
    view.set_access(range(0x10, 0x20), Access.N)
    view.remap(0x18, 700, access=Access.X)
    seen: list[tuple[int, int]] = []
    since = len(mock.calls)
    assert view.verify(progress=lambda *at: seen.append(at)) == []
    assert seen == [(16, 16)]
    assert changing(mock, since) == []


def test_verify_tells_its_progress(view: View, small_batch: int) -> None:
    view.set_access(range(10), Access.R)
    seen: list[tuple[int, int]] = []
    view.verify(progress=lambda *at: seen.append(at))
    assert seen == [(4, 10), (8, 10), (10, 10)]


@every_release
def test_verify_finds_what_xen_wiped(view: View, guest: Model, altp2m: Altp2m) -> None:
    other = altp2m.create_view()
    other.set_access(5, Access.N)
    view.set_access([5, 6], Access.N)
    view.remap(7, 700, access=Access.X)
    assert guest.remove_page(700)  # the target's page goes: Xen resets the view
    assert view.verify() == [
        Mismatch(Gfn(5), Access.N, None),
        Mismatch(Gfn(6), Access.N, None),
        Mismatch(Gfn(7), Access.X, None),
    ]
    assert other.verify() == []


@every_release
def test_verify_finds_what_the_host_overwrote(view: View, guest: Model) -> None:
    view.set_access([5, 6], Access.X)
    view.remap(7, 700, access=Access.X)
    for gfn in (5, 7):
        guest.set_mem_access(0, gfn, 1)  # the host p2m's access of 5 and 7
    assert view.verify() == [
        Mismatch(Gfn(5), Access.X, Access.R),
        Mismatch(Gfn(7), Access.X, Access.R),
    ]
    assert frame(guest, view, 7) == host_frame(guest, 7)
    view.set_access(5, Access.X)
    view.remap(7, 700, access=Access.X)
    assert view.verify() == []


def test_verify_finds_what_xen_passed_over(view: View, guest: Model) -> None:
    guest.host_write(0x20, host_frame(guest, 0x20), 0, PageType.RAM_LOGDIRTY, 7)
    view.set_access([5, 0x20, HOLE, DIRECT_MMIO], Access.R)
    assert [mismatch.gfn for mismatch in view.verify()] == [0x20, HOLE, DIRECT_MMIO]


def test_verify_of_a_view_that_is_gone(view: View, mock: MockBackend) -> None:
    mock.altp2m_destroy_view(1, view.id)
    with pytest.raises(InvalidArgumentError, match="no such view"):
        view.verify()


def test_a_page_dropped_outside_the_targets_leaves_the_rest(view: View, guest: Model) -> None:
    view.set_access([5, 6], Access.N)
    view.remap(7, 700, access=Access.X)
    guest.host_write(6, INVALID_MFN, 0, PageType.INVALID, 7)
    assert view.verify() == [Mismatch(Gfn(6), Access.N, None)]


@pytest.mark.parametrize(
    "gfns",
    [
        range(10),
        range(gfns_module.BATCH),
        range(1, gfns_module.BATCH + 1),
        range(0xFFFF, 0x100001),
        range(0x12345, 0x12345 + 600_000),
        range((1 << 36) - 300_000, 1 << 36),
        range(0xFFFFFF - 265_536, 0x1010101),
        range(0, 1_000_000, 3),
        range(300_000, 0, -1),
        array("Q", range(0, 3_000_000, 7)),
    ],
)
def test_batches_are_what_python_counts(gfns: range | array[int]) -> None:
    found = array("Q")
    for batch in gfns_module.batches(gfns):
        assert 0 < len(batch) <= gfns_module.BATCH
        found.frombytes(batch.tobytes())
    assert found == array("Q", gfns)


@every_release
@pytest.mark.parametrize("seed", range(12))
def test_reapplied_it_is_as_it_was_whatever_the_host_did(
    view: View, guest: Model, mock: MockBackend, seed: int
) -> None:
    """Remaps of remaps, and the host's writes to some gfns, or the loss of a page among them."""
    chance = random.Random(seed)
    gfns = range(500, 530)
    for gfn in chance.sample(gfns, 12):
        view.remap(gfn, chance.choice([one for one in gfns if one != gfn]), access=Access.X)
    view.set_access(range(508, 516), Access.RX)
    asked = {gfn for run in view.differences() for gfn in range(run.first, run.last + 1)}
    before = {gfn: met(guest, view.id, gfn) for gfn in gfns}
    if seed % 2:
        guest.remove_page(chance.choice(sorted(set(gfns) - set(view.remaps.values()))))
        asked &= {gfn for gfn in asked if guest.host.lookup(gfn).mapped}
    for gfn in chance.sample(sorted(asked), min(4, len(asked))):
        guest.set_mem_access(0, gfn, 1)
    view.reapply()
    assert view.verify() == [
        mismatch for mismatch in view.verify() if not guest.host.lookup(mismatch.gfn).mapped
    ]
    assert {gfn: met(guest, view.id, gfn) for gfn in asked} == {gfn: before[gfn] for gfn in asked}
