# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains: found, asked, paused, and given pages; and the host they are on."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from errno import EACCES, EINVAL, EPERM
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import xenaltp2m as xa
from xenaltp2m import (
    Access,
    Altp2mMode,
    BusyError,
    Domain,
    DomainNotFoundError,
    InvalidArgumentError,
    LeftoverError,
    View,
    Xen,
    XenError,
    connect,
)
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Domain as Model
from xenaltp2m.backend.mock.p2m import PageType

from .effective import changes, every_release, state_of

RAM = 6 << 10 >> 2
SPECIAL_PAGES = 8
HIGHEST = 0xFEFFF
"""The last of the special pages: ring, store, console and others, below 4 GiB."""
FIRST_NEW = HIGHEST + 1


def ops(mock: MockBackend, since: int) -> list[str]:
    return [call.op for call in list(mock.calls)[since:]]


# The host.


def test_connect_takes_a_backend_or_its_name(mock: MockBackend) -> None:
    with connect("mock") as xen:
        assert [info.domid for info in xen.domains()] == [1]
        assert xen.domain("guest").name == "guest"
    with connect(mock) as xen:
        assert xen.backend is mock
        assert xen.release.version == (4, 17)
        assert repr(xen) == "<Xen 4.17 through mock>"
    with pytest.raises(InvalidArgumentError, match='"libxc", "mock" or "replay:FILE"'):
        connect("kvm")


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 513])
def test_every_domain_is_listed(count: int) -> None:
    mock = MockBackend(memory_pages=1 << 14)
    for at in range(count):
        mock.add_domain(f"d{at}", memory_kib=0)
    with connect(mock) as xen:
        assert [info.domid for info in xen.domains()] == list(range(1, count + 1))
        assert len(mock.calls) == count // 256 + 1


def test_the_highest_domid_ends_the_list(mock: MockBackend, xen: Xen) -> None:
    for domid in (0, 0x7FEF):
        mock.machine.domains[domid] = mock.machine.domains[
            mock.add_domain(f"d{domid}", memory_kib=0)
        ]
        del mock.machine.domains[max(d for d in mock.machine.domains if 0 < d < 0x7FEF)]
        mock.machine.domains[domid].domid = domid
    assert [info.domid for info in xen.domains()] == [0, 1, 0x7FEF]


def test_a_domain_is_found_by_name_domid_and_uuid(mock: MockBackend, xen: Xen) -> None:
    for at in range(300):
        mock.add_domain(f"d{at}", memory_kib=0)
    mock.add_domain("7", memory_kib=0)  # xl, too, takes digits for a domid
    uuid = mock.domain(290).uuid
    which: list[tuple[int | str | UUID, int]] = [
        ("guest", 1), (1, 1), ("1", 1), ("d0", 2), (290, 290), (uuid, 290), (str(uuid), 290),
        (uuid.hex, 290), (str(uuid).upper(), 290), ("7", 7),
    ]  # fmt: skip
    for asked, domid in which:
        with xen.domain(asked) as dom:
            assert (dom.domid, dom.uuid) == (domid, mock.domain(domid).uuid)
            assert repr(dom) == f"<Domain {domid}>"


@pytest.mark.parametrize(
    ("which", "says"),
    [
        (5, "no domain 5"), ("5", "no domain 5"), ("nobody", "no domain is called 'nobody'"),
        ("", "no domain is called ''"), (UUID(int=5), "no domain has the uuid 0"),
        (str(UUID(int=5)), "no domain has the uuid 0"),
    ],
)  # fmt: skip
def test_a_domain_that_is_not_there(xen: Xen, which: int | str | UUID, says: str) -> None:
    with pytest.raises(DomainNotFoundError, match=says):
        xen.domain(which)


@pytest.mark.parametrize("which", [True, 1.0, None, b"guest", -1, 0x7FF0, "99999", "9" * 5000])
def test_what_names_no_domain(xen: Xen, which: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        xen.domain(which)


def test_a_library_of_another_release_cannot_list_domains() -> None:
    mock = MockBackend((4, 17), library=(4, 16), memory_pages=1 << 13)
    mock.add_domain("guest")
    with connect(mock) as xen, pytest.raises(PermissionError, match="install the matching library"):
        xen.domain("guest")


# Facts.


def test_facts_of_a_domain(dom: Domain, guest: Model) -> None:
    info = dom.info()
    assert (info.domid, info.uuid, info.hvm) == (1, guest.uuid, True)
    assert info.max_vcpu_id == 1
    assert (info.paused, info.dying, info.shutdown) == (True, False, False)
    assert info.pages == RAM + SPECIAL_PAGES
    guest.crash("testing")
    assert (dom.info().shutdown, dom.info().shutdown_reason) == (True, 3)
    assert dom.name == "guest"
    assert dom.maximum_gfn == HIGHEST
    assert not dom.altp2m_active


def test_a_domid_that_is_another_domain_s_is_not_ours(
    dom: Domain, mock: MockBackend, xen: Xen
) -> None:
    del mock.machine.domains[1]
    mock.add_domain("successor", memory_kib=0)
    with pytest.raises(DomainNotFoundError, match="is gone"):
        dom.info()
    assert xen.domain(1).name == "successor"


def test_configuration_is_libxl_s(dom: Domain) -> None:
    config = dom.config()
    assert config["c_info"]["name"] == "guest"
    assert config["b_info"]["max_vcpus"] == 2
    assert config["b_info"]["altp2m"] == "external"


def test_a_configuration_that_is_no_object(
    dom: Domain, monkeypatch: pytest.MonkeyPatch, mock: MockBackend
) -> None:
    monkeypatch.setattr(mock, "domain_config_json", lambda domid: "[1]")
    with pytest.raises(XenError, match="not a JSON object"):
        dom.config()


@pytest.mark.parametrize("mode", Altp2mMode)
def test_altp2m_mode(mock: MockBackend, xen: Xen, mode: Altp2mMode) -> None:
    domid = mock.add_domain("other", mode=mode, memory_kib=0)
    assert xen.domain(domid).altp2m_mode is mode


@every_release
def test_host_access(dom: Domain, guest: Model, xen_version: tuple[int, int]) -> None:
    with dom.altp2m():
        assert dom.host_access(5) is Access.RWX
        guest.set_mem_access(0, 5, 4)
        assert dom.host_access(5) is Access.X
        assert dom.host_access(RAM) is None
        if xen_version >= (4, 20):
            guest.set_mem_access(0, 5, 10)
            assert dom.host_access(5) is Access.R_PW
        for gfn in (-1, 1 << 36, True, (1 << 64) - 1):
            with pytest.raises(InvalidArgumentError):
                dom.host_access(gfn)


# Pauses.


def test_pauses_are_counted_and_taken_back(dom: Domain, guest: Model) -> None:
    prior = guest.pauses
    dom.pause()
    dom.pause()
    assert guest.pauses == prior + 2
    dom.unpause()
    assert guest.pauses == prior + 1
    dom.close()
    assert guest.pauses == prior


def test_another_handle_s_pause_is_not_ours_to_take(dom: Domain, xen: Xen, guest: Model) -> None:
    with xen.domain(1) as other:
        other.pause()
        with pytest.raises(BusyError, match="paused through another handle"):
            dom.unpause()
        assert guest.pauses == 2
    dom.pause()
    dom.unpause()
    assert guest.pauses == 1


def test_fault_28_a_domain_that_was_created_paused_is_unpaused(
    dom: Domain, guest: Model, mock: MockBackend
) -> None:
    """As ``xl create -p`` leaves it: XEN_DOMCTL_unpausedomain takes the toolstack's pause."""
    assert guest.pauses == 1
    dom.unpause()
    assert guest.pauses == 0
    with pytest.raises(InvalidArgumentError, match="is not paused"):
        dom.unpause()
    dom.close()
    assert guest.pauses == 0


def test_fault_28_a_paused_block_ends_its_own_pause_only(dom: Domain, guest: Model) -> None:
    with dom.paused():
        assert guest.pauses == 2
        dom.unpause()
        assert guest.pauses == 1
    assert guest.pauses == 1


def test_fault_28_a_pause_of_another_agent_is_not_ours_to_take(tmp_path: Path) -> None:
    mock = MockBackend()
    mock.add_domain("guest")
    with (
        xa.connect(mock, journal=tmp_path) as one,
        xa.connect(mock, journal=tmp_path) as other,
        one.domain(1) as theirs,
        other.domain(1) as ours,
    ):
        theirs.pause()
        with pytest.raises(BusyError, match=f"process {os.getpid()} has paused"):
            ours.unpause()
        assert mock.domain(1).pauses == 2
        theirs.unpause()
        ours.unpause()
        assert mock.domain(1).pauses == 0


def test_a_pause_that_somebody_took_back_is_not_missed(
    dom: Domain, guest: Model, mock: MockBackend
) -> None:
    dom.pause()
    dom.pause()
    guest.pauses = 0  # xl unpause, often enough
    dom.unpause()
    dom.close()
    assert guest.pauses == 0


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_paused_lasts_as_long_as_the_block(
    dom: Domain, guest: Model, error: type[BaseException] | None
) -> None:
    prior = guest.pauses

    def block() -> None:
        with dom.paused(), dom.paused():
            assert guest.pauses == prior + 2
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(error):
            block()
    assert guest.pauses == prior


def test_paused_keeps_the_error_of_its_block(dom: Domain, guest: Model, mock: MockBackend) -> None:
    mock.fail("domain_unpause", 1, EPERM)
    with pytest.raises(ZeroDivisionError) as caught, dom.paused():
        _ = 1 / 0
    (note,) = caught.value.__notes__
    assert "still in place: pause of domain 1" in note
    assert guest.pauses == 2
    dom.close()
    assert guest.pauses == 1


def test_what_paused_could_not_take_back_the_close_does(
    dom: Domain, guest: Model, mock: MockBackend
) -> None:
    mock.fail("domain_unpause", 1, EPERM)
    with pytest.raises(LeftoverError) as caught, dom.paused():
        pass
    assert caught.value.left == ("pause of domain 1",)
    assert guest.pauses == 2
    dom.close()
    assert guest.pauses == 1


# Pages.


@every_release
def test_pages_are_added_above_all_others(dom: Domain, guest: Model, mock: MockBackend) -> None:
    before = state_of(mock, 1, range(FIRST_NEW - 2, FIRST_NEW + 6))
    gfns = dom.add_pages(3)
    assert gfns == range(HIGHEST + 1, HIGHEST + 4)
    for gfn in gfns:
        assert guest.host.lookup(gfn).type == PageType.RAM_RW
        assert dom.memory.read_page(gfn) == bytes(4096)
    assert guest.pages == RAM + SPECIAL_PAGES + 3
    assert guest.max_pages == before["memory limit of domain 1"] + 3
    assert dom.add_pages() == range(gfns.stop, gfns.stop + 1)
    dom.close()
    assert changes(before, state_of(mock, 1, range(FIRST_NEW - 2, FIRST_NEW + 6))) == set()


@pytest.mark.parametrize("count", [0, -1, 1 << 36])
def test_how_many_pages_cannot_be_added(dom: Domain, count: int, guest: Model) -> None:
    limit = guest.max_pages
    with pytest.raises(InvalidArgumentError):
        dom.add_pages(count)
    assert guest.max_pages == limit


@pytest.mark.parametrize("there", [0, 1, 3])
def test_pages_that_do_not_all_fit_are_not_added(
    dom: Domain, guest: Model, mock: MockBackend, there: int
) -> None:
    """Xen keeps what it could populate, and says EBUSY."""
    frames = mock.machine.frames
    taken = []
    while (frame := frames.allocate()) is not None:
        taken.append(frame)
    for frame in taken[:there]:
        frames.release(frame, guest)
        guest.pages += 1
    before = state_of(mock, 1, range(FIRST_NEW, FIRST_NEW + 6))
    with pytest.raises(BusyError, match="no memory left"):
        dom.add_pages(4)
    assert changes(before, state_of(mock, 1, range(FIRST_NEW, FIRST_NEW + 6))) == set()
    if there:
        assert len(dom.add_pages(there)) == there


def test_pages_are_removed_before_the_close(dom: Domain, guest: Model, mock: MockBackend) -> None:
    before = state_of(mock, 1, range(FIRST_NEW, FIRST_NEW + 6))
    first, second = dom.add_pages(2), dom.add_pages(1)
    dom.remove_pages(first)
    assert guest.max_pages == before["memory limit of domain 1"] + 1
    assert not guest.host.lookup(first[0]).mapped
    assert guest.host.lookup(second[0]).mapped
    with pytest.raises(InvalidArgumentError, match="not pages this handle added"):
        dom.remove_pages(first)
    dom.remove_pages(second)
    assert changes(before, state_of(mock, 1, range(FIRST_NEW, FIRST_NEW + 6))) == set()


@pytest.mark.parametrize("gfns", [range(5, 6), range(FIRST_NEW, FIRST_NEW + 1), range(0)])
def test_only_what_was_added_is_removed(dom: Domain, guest: Model, gfns: range) -> None:
    dom.add_pages(2)
    with pytest.raises(InvalidArgumentError, match="not pages this handle added"):
        dom.remove_pages(gfns)
    assert guest.pages == RAM + SPECIAL_PAGES + 2


def test_pages_that_a_view_tracks_are_not_removed(dom: Domain, view: View, guest: Model) -> None:
    low, middle, high = (dom.add_pages() for _ in range(3))
    view.remap(5, low[0])
    view.remap(6, high[0])
    view.set_access(7, Access.N)
    view.revert(5)
    view.revert(6)
    for gfns in (low, middle, high):  # Xen's range does not shrink
        with pytest.raises(BusyError, match="destroy the view first") as caught:
            dom.remove_pages(gfns)
        assert (caught.value.gfn, caught.value.view) == (gfns[0], view.id)
    assert view.access(7) is Access.N
    view.close()
    for gfns in (low, middle, high):
        dom.remove_pages(gfns)
    assert guest.pages == RAM + SPECIAL_PAGES


def test_pages_that_another_handle_s_view_tracks_are_not_removed(
    xen: Xen, dom: Domain, view: View, guest: Model
) -> None:
    other = xen.domain(1)
    gfns = other.add_pages()
    view.remap(5, gfns[0])
    with pytest.raises(BusyError, match="destroy the view first"):
        other.remove_pages(gfns)
    with pytest.raises(LeftoverError):
        other.close()
    assert guest.views[view.id].table.lookup(5).mfn == guest.host.lookup(gfns[0]).mfn
    xen.close()  # views first, whichever handle they are of
    assert guest.pages == RAM + SPECIAL_PAGES


def test_closing_frees_pages_once_no_view_tracks_them(
    dom: Domain, view: View, mock: MockBackend
) -> None:
    view.remap(5, dom.add_pages()[0])
    dom.pause()
    since = len(mock.calls)
    dom.close()
    made = [op for op in ops(mock, since) if "get" not in op]
    assert made == [
        "altp2m_set_domain_state",
        "domain_decrease_reservation_exact",
        "domain_setmaxmem",
        "domain_unpause",
    ]


@pytest.mark.parametrize("paused_first", [True, False])
def test_the_guest_stands_still_until_its_pages_are_gone(
    dom: Domain, mock: MockBackend, paused_first: bool
) -> None:
    steps: list[Callable[[], object]] = [dom.pause, dom.add_pages]
    for step in steps if paused_first else reversed(steps):
        step()
    since = len(mock.calls)
    dom.close()
    made = ops(mock, since)
    assert made.index("domain_decrease_reservation_exact") < made.index("domain_unpause")


def test_pages_stay_where_altp2m_cannot_be_closed(
    dom: Domain, view: View, guest: Model, mock: MockBackend
) -> None:
    gfns, free = dom.add_pages(), dom.add_pages()
    view.remap(5, gfns[0])
    dom.pause()
    mock.fail("altp2m_set_domain_state", 1, EPERM)
    with pytest.raises(LeftoverError) as caught:
        dom.close()
    assert caught.value.left == (
        "altp2m of domain 1",
        f"pages {gfns[0]:#x}..{gfns[0]:#x} added to domain 1",
        f"memory limit of domain 1, raised for gfns {gfns[0]:#x} and up",
    )
    assert guest.views[view.id].table.lookup(5).mfn == guest.host.lookup(gfns[0]).mfn
    assert not guest.host.lookup(free[0]).mapped
    assert guest.pauses == 1
    dom.close()
    assert guest.pages == RAM + SPECIAL_PAGES
    assert not guest.active


@pytest.mark.parametrize("ballooned", [0, 1, 2])
def test_pages_that_the_guest_gave_back_itself_are_not_missed(
    dom: Domain, guest: Model, ballooned: int
) -> None:
    limit = guest.max_pages
    gfns = dom.add_pages(3)
    assert guest.remove_page(gfns[ballooned])
    dom.remove_pages(gfns)
    assert guest.pages == RAM + SPECIAL_PAGES
    assert guest.max_pages == limit


def test_a_page_that_cannot_be_taken_back_is_told(
    dom: Domain, guest: Model, mock: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gfns = dom.add_pages(3)
    right = mock.domain_decrease_reservation_exact

    def stuck(domid: int, taken: array[int], order: int = 0) -> None:
        """As Xen does where a page is still somebody's: up to it, and EINVAL."""
        for gfn in taken:
            if gfn == gfns[1]:
                raise InvalidArgumentError("stuck", errno=EINVAL)
            right(domid, array("Q", [gfn]), order)

    monkeypatch.setattr(mock, "domain_decrease_reservation_exact", stuck)
    with pytest.raises(LeftoverError) as caught:
        dom.remove_pages(gfns)
    assert caught.value.left == (f"pages {gfns[0]:#x}..{gfns[-1]:#x} added to domain 1",)
    monkeypatch.undo()
    dom.remove_pages(gfns)
    assert guest.pages == RAM + SPECIAL_PAGES


def test_a_limit_that_others_changed_is_lowered_by_what_was_raised(
    dom: Domain, guest: Model
) -> None:
    dom.add_pages(2)
    guest.max_pages += 100
    limit = guest.max_pages
    dom.close()
    assert guest.max_pages == limit - 2


def test_an_unlimited_domain_stays_so(dom: Domain, mock: MockBackend, guest: Model) -> None:
    mock.domain_setmaxmem(1, (1 << 64) - 1)
    limit = guest.max_pages
    gfns = dom.add_pages(2)
    dom.remove_pages(gfns)
    assert guest.max_pages == limit


def test_a_limit_that_cannot_be_raised(dom: Domain, mock: MockBackend, guest: Model) -> None:
    limit = guest.max_pages
    mock.fail("domain_setmaxmem", 1, EACCES)
    with pytest.raises(PermissionError):
        dom.add_pages()
    assert (guest.max_pages, guest.pages) == (limit, RAM + SPECIAL_PAGES)


def test_fault_14_two_domains_of_one_name(mock: MockBackend) -> None:
    first, second = (mock.add_domain(name) for name in ("twin", "other"))
    mock.domain(second).name = "twin"  # as `xenstore-write` can
    with connect(mock) as xen:
        with pytest.raises(
            InvalidArgumentError, match=f"2 domains are called 'twin': {first}, {second}"
        ):
            xen.domain("twin")
        assert xen.domain(second).name == "twin"


@pytest.mark.parametrize(("release", "most"), [((4, 17), 10), ((4, 20), 10), ((4, 22), 512)])
def test_fault_07_as_many_views_are_looked_for_as_the_release_may_have(
    release: tuple[int, int], most: int
) -> None:
    host = MockBackend(release, memory_pages=1 << 12)
    domid = host.add_domain(memory_kib=1024)
    with xa.connect(host) as xen, xen.domain(domid) as dom, dom.altp2m():
        assert len(dom.existing_views()) == 1
        asked = {call.arguments[1] for call in host.calls if call.op == "altp2m_get_suppress_ve"}
    assert asked == set(range(most))


def test_fault_09_numbers_of_a_newer_xen_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    host = MockBackend(memory_pages=1 << 12)
    domid = host.add_domain(memory_kib=1024)
    with xa.connect(host) as xen, xen.domain(domid) as dom, dom.altp2m() as altp2m:
        view = altp2m.create_view()
        with monkeypatch.context() as patch:
            patch.setattr(host, "hvm_param_get", lambda *_: 7)
            patch.setattr(host, "altp2m_get_mem_access", lambda *_: 12)
            for ask in (
                lambda: dom.altp2m_mode,
                lambda: dom.host_access(3),
                lambda: view.access(3),
                lambda: altp2m.create_view(xa.Access.DEFAULT),
                dom.existing_views,
            ):
                with pytest.raises(xa.UnsupportedError, match=r"reports .* as (7|12), which"):
                    ask()
