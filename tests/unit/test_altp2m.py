# SPDX-License-Identifier: LGPL-2.1-or-later
"""altp2m of a domain: on while it is needed, and afterwards as it was."""

from __future__ import annotations

import warnings
from errno import EPERM

import pytest

from xenaltp2m import (
    Access,
    AlreadyError,
    Altp2m,
    Altp2mMode,
    BusyError,
    DecorativeDefaultWarning,
    Domain,
    Gfn,
    InvalidArgumentError,
    LeftoverError,
    MemAccess,
    Mismatch,
    NotMappedError,
    OutOfMemoryError,
    SuperpageDefaultWarning,
    UnsupportedError,
    View,
    ViewId,
    ViewReset,
    Xen,
    XenError,
    connect,
)
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.mock import Livelock, MockBackend, Outcome
from xenaltp2m.backend.mock.machine import Domain as Model
from xenaltp2m.types import HOST_VIEW

from .effective import changes, every_release, state_of

GFNS = range(0x40)
R, RX, RWX = 1, 5, 7
"""Access numbers, the same in every release (public/memory.h)."""


def ops(mock: MockBackend, since: int) -> list[str]:
    return [call.op for call in list(mock.calls)[since:]]


@pytest.fixture
def foreign(mock: MockBackend, guest: Model) -> ViewId:
    """Another agent's view, with altp2m on and every vCPU in it."""
    mock.altp2m_set_domain_state(1, True)
    view = mock.altp2m_create_view(1, RX)
    mock.altp2m_set_mem_access(1, view, 5, R)
    mock.altp2m_change_gfn(1, view, 6, 7)
    mock.altp2m_switch_to_view(1, view)
    return ViewId(view)


# On and off.


@every_release
def test_open_switches_on_and_close_off(dom: Domain, mock: MockBackend, guest: Model) -> None:
    before = state_of(mock, 1, GFNS)
    with dom.altp2m() as altp2m:
        assert guest.active
        assert dom.altp2m_active
        altp2m.switch_to_view(altp2m.create_view())
        altp2m.create_view().set_access(GFNS, Access.R)
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    assert not dom.altp2m_active


def test_what_closing_takes_with_altp2m_is_one_call(
    dom: Domain, altp2m: Altp2m, mock: MockBackend
) -> None:
    altp2m.switch_to_view(altp2m.create_view())
    altp2m.enable_notify(0, 0x20)
    since = len(mock.calls)
    altp2m.close()
    changing = [op for op in ops(mock, since) if "get" not in op]
    assert changing == ["altp2m_set_domain_state"]


@every_release
def test_what_was_on_stays_on(
    foreign: ViewId, dom: Domain, mock: MockBackend, guest: Model
) -> None:
    before = state_of(mock, 1, GFNS)
    with dom.altp2m() as altp2m:
        view = altp2m.create_view()
        assert view.id not in (0, foreign)
        view.set_access(GFNS, Access.R)
        view.remap(5, 6)
        altp2m.switch_to_view(view)
        altp2m.enable_notify(1, 0x20)
        assert [vcpu.view for vcpu in guest.vcpus] == [view.id] * 2
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    assert [vcpu.view for vcpu in guest.vcpus] == [foreign] * 2


def test_teardown_moves_the_vcpus_out_before_it_destroys_views(
    foreign: ViewId, dom: Domain, mock: MockBackend
) -> None:
    altp2m = dom.altp2m()
    altp2m.switch_to_view(altp2m.create_view())
    altp2m.create_view()
    since = len(mock.calls)
    altp2m.close()
    assert [
        (call.op, call.arguments) for call in list(mock.calls)[since:] if "get" not in call.op
    ] == [
        ("altp2m_switch_to_view", (1, foreign)),
        ("altp2m_destroy_view", (1, 3)),
        ("altp2m_destroy_view", (1, 2)),
    ]


def test_vcpus_that_never_left_are_not_moved(
    foreign: ViewId, dom: Domain, mock: MockBackend
) -> None:
    since = len(mock.calls)
    with dom.altp2m() as altp2m:
        altp2m.create_view()
    assert "altp2m_switch_to_view" not in ops(mock, since)


def test_vcpus_that_an_event_moved_into_a_view_go_back_to_where_they_were(
    foreign: ViewId, dom: Domain, mock: MockBackend, guest: Model
) -> None:
    before = state_of(mock, 1, GFNS)
    with dom.altp2m() as altp2m:
        view = altp2m.create_view()
        for vcpu in guest.vcpus:
            guest.switch_vcpu(vcpu, view.id)  # as the response to an event does
    assert changes(before, state_of(mock, 1, GFNS)) == set()


def test_vcpus_in_several_views_can_only_go_to_view_0(
    foreign: ViewId, dom: Domain, guest: Model
) -> None:
    guest.switch_vcpu(guest.vcpus[1], 0)
    with dom.altp2m() as altp2m:
        view = altp2m.create_view()
        with pytest.warns(RuntimeWarning, match=r"in views \[0, 1\]; .* leave them in view 0"):
            altp2m.switch_to_view(view)
        altp2m.switch_to_view(view)  # says it once
    assert [vcpu.view for vcpu in guest.vcpus] == [0, 0]


def test_a_prior_view_that_was_destroyed_since_is_replaced_by_view_0(
    foreign: ViewId, dom: Domain, mock: MockBackend, guest: Model
) -> None:
    with dom.altp2m() as altp2m:
        altp2m.switch_to_view(altp2m.create_view())
        mock.altp2m_destroy_view(1, foreign)
    assert [vcpu.view for vcpu in guest.vcpus] == [0, 0]


def test_a_prior_view_that_was_hidden_since_is_told_of(
    foreign: ViewId, dom: Domain, mock: MockBackend, guest: Model
) -> None:
    altp2m = dom.altp2m()
    altp2m.switch_to_view(altp2m.create_view())
    mock.altp2m_set_visibility(1, foreign, False)
    with pytest.raises(LeftoverError) as caught:
        altp2m.close()
    assert caught.value.left == (f"vCPUs of domain 1 outside view {foreign}",)
    assert [view.exists for view in guest.views[:3]] == [True, True, False]
    mock.altp2m_set_visibility(1, foreign, True)
    altp2m.close()
    assert [vcpu.view for vcpu in guest.vcpus] == [foreign] * 2


@pytest.mark.parametrize("on_again", [False, True])
@pytest.mark.parametrize("was_on", [False, True])
def test_altp2m_that_somebody_switched_off_leaves_nothing_to_close(
    dom: Domain, mock: MockBackend, guest: Model, was_on: bool, on_again: bool
) -> None:
    mock.altp2m_set_domain_state(1, was_on)
    altp2m = dom.altp2m()
    view = altp2m.create_view()
    altp2m.switch_to_view(view)
    mock.altp2m_set_domain_state(1, False)
    if on_again:
        mock.altp2m_set_domain_state(1, True)
    view.close()
    altp2m.close()
    assert guest.active == (was_on and on_again)
    with dom.altp2m():
        assert guest.active


@every_release
def test_a_failed_open_leaves_altp2m_off(dom: Domain, mock: MockBackend, guest: Model) -> None:
    before = state_of(mock, 1, GFNS)
    mock.machine.xen_heap_exhausted = True  # up to 4.15 Xen says ENOMEM and leaves it on
    with pytest.raises(OutOfMemoryError):
        dom.altp2m()
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    mock.machine.xen_heap_exhausted = False
    with dom.altp2m() as altp2m:
        altp2m.switch_to_view(altp2m.create_view())


@pytest.mark.parametrize("xen_version", [(4, 14)])
def test_what_a_failed_open_could_not_switch_off_goes_with_the_domain(
    dom: Domain, mock: MockBackend, guest: Model
) -> None:
    mock.machine.xen_heap_exhausted = True
    mock.fail("altp2m_get_domain_state", 2, EPERM)
    with pytest.raises(LeftoverError) as caught:
        dom.altp2m()
    assert caught.value.left == ("altp2m of domain 1",)
    assert isinstance(caught.value.__cause__, OutOfMemoryError)
    assert guest.active
    dom.close()
    assert not guest.active


# Who may have it.


def test_a_domain_has_one_open_altp2m(dom: Domain, xen: Xen) -> None:
    with dom.altp2m(), pytest.raises(BusyError, match="open already"):
        dom.altp2m()
    with dom.altp2m(), xen.domain(1) as again, pytest.raises(BusyError, match="open already"):
        again.altp2m()  # closing either would end the other's views
    with xen.domain(1) as again, again.altp2m():
        pass


@pytest.mark.parametrize(
    ("options", "error", "cause"),
    [
        ({"kind": "pv", "mode": Altp2mMode.DISABLED}, UnsupportedError, "PV"),
        ({"mode": Altp2mMode.DISABLED}, InvalidArgumentError, "created without altp2m"),
        ({"nested": True}, InvalidArgumentError, "nested"),
    ],
)
def test_domains_that_cannot_have_altp2m(
    xen: Xen,
    mock: MockBackend,
    options: dict[str, object],
    error: type[Exception],
    cause: str,
) -> None:
    domid = mock.add_domain("unable", **options)
    with pytest.raises(error) as caught:
        xen.domain(domid).altp2m()
    assert cause in str(caught.value)
    assert not mock.domain(domid).active


def test_hosts_that_cannot_have_altp2m() -> None:
    mock = MockBackend(altp2m=False, memory_pages=1 << 13)
    mock.add_domain("guest")
    with connect(mock) as xen, pytest.raises(UnsupportedError, match="add altp2m=1"):
        xen.domain(1).altp2m()


# Views.


@every_release
def test_views_are_numbered_from_the_lowest_free(
    altp2m: Altp2m, guest: Model, xen_version: tuple[int, int]
) -> None:
    views = [altp2m.create_view() for _ in range(9)]  # 10 with view 0
    assert [view.id for view in views] == list(range(1, 10))
    assert altp2m.views == tuple(views)
    with pytest.raises(InvalidArgumentError, match="no view is left"):
        altp2m.create_view()
    views[3].close()
    assert [view.id for view in altp2m.views] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert altp2m.create_view().id == 4


@pytest.mark.parametrize(("xen_version", "count"), [((4, 20), 10), ((4, 21), 3), ((4, 22), 3)])
def test_the_number_of_views_is_a_setting_from_4_21(
    xen: Xen, mock: MockBackend, count: int
) -> None:
    with xen.domain(mock.add_domain("few", view_count=3)).altp2m() as altp2m:
        for _ in range(count - 1):
            altp2m.create_view()
        with pytest.raises(InvalidArgumentError):
            altp2m.create_view()


def test_a_view_says_what_it_is(altp2m: Altp2m) -> None:
    view = altp2m.create_view(label="hooks")
    assert (view.id, view.label, view.visible) == (1, "hooks", True)
    assert view.default_access is Access.RWX
    assert repr(view) == "<View 1 'hooks' of domain 1>"
    assert repr(altp2m.create_view()) == "<View 2 of domain 1>"


@pytest.mark.parametrize("xen_version", [v for v in SUPPORTED if v >= (4, 19)], ids=str)
@pytest.mark.parametrize("access", [Access.N, Access.RX, Access.RX2RW, Access.N2RWX])
@pytest.mark.filterwarnings("ignore::xenaltp2m.SuperpageDefaultWarning")
def test_a_default_is_given_to_xen(
    altp2m: Altp2m, mock: MockBackend, guest: Model, access: Access
) -> None:
    view = altp2m.create_view(access)
    assert view.default_access is access
    number = {Access.N: 0, Access.RX: 5, Access.RX2RW: 8, Access.N2RWX: 9}[access]
    assert guest.views[view.id].default_access == number


@every_release
@pytest.mark.filterwarnings("ignore::xenaltp2m.DecorativeDefaultWarning")
def test_default_means_the_host_s_at_that_time(altp2m: Altp2m, guest: Model) -> None:
    guest.host_default_access = RX
    view = altp2m.create_view(Access.DEFAULT)
    guest.host_default_access = RWX
    assert view.default_access is Access.RX
    assert guest.views[view.id].default_access == RX


@every_release
def test_a_default_without_effect_is_warned_of(
    altp2m: Altp2m, xen_version: tuple[int, int]
) -> None:
    if xen_version >= (4, 19):  # 7e5b662b28
        altp2m.create_view(Access.RX)
    else:
        with pytest.warns(DecorativeDefaultWarning, match="the host's access, not .* r-x"):
            altp2m.create_view(Access.RX)
    altp2m.create_view(Access.RWX)
    altp2m.create_view(Access.DEFAULT)


@every_release
@pytest.mark.filterwarnings("ignore::xenaltp2m.DecorativeDefaultWarning")
def test_a_default_that_leaves_nothing_of_a_superpage_is_warned_of(
    altp2m: Altp2m, mock: MockBackend, guest: Model, xen_version: tuple[int, int]
) -> None:
    for access in (Access.R, Access.RX2RW):
        altp2m.create_view(access).close()
    for access in (Access.N, Access.N2RWX, Access.X):
        if xen_version < (4, 19):
            view = altp2m.create_view(access)
            altp2m.switch_to_view(view)
            assert mock.touch(1, 600) is Outcome.DONE
        else:
            with pytest.warns(SuperpageDefaultWarning, match="faults for ever"):
                view = altp2m.create_view(access)
            altp2m.switch_to_view(view)
            with pytest.raises(Livelock):
                mock.touch(1, 600)
        view.close()


@pytest.mark.parametrize("xen_version", [(4, 18)])
def test_a_warning_taken_as_an_error_creates_no_view(altp2m: Altp2m, guest: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DecorativeDefaultWarning):
            altp2m.create_view(Access.RX)
    assert altp2m.views == ()
    assert not guest.views[1].exists


@every_release
@pytest.mark.parametrize(
    "access", [Access.W, Access.WX, Access.N2RWX | Access.R, Access.DEFAULT | Access.X, 7, "rwx"]
)
def test_defaults_that_are_refused(altp2m: Altp2m, mock: MockBackend, access: Access) -> None:
    since = len(mock.calls)
    with pytest.raises(InvalidArgumentError):
        altp2m.create_view(access)
    assert ops(mock, since) == []


@every_release
def test_r_pw_came_with_4_20(altp2m: Altp2m, guest: Model, xen_version: tuple[int, int]) -> None:
    if xen_version < (4, 20):
        with pytest.raises(UnsupportedError, match=r"4\.20"):
            altp2m.create_view(Access.R_PW)
    else:
        assert guest.views[altp2m.create_view(Access.R_PW).id].default_access == 10


# vCPUs.


def test_every_vcpu_switches(altp2m: Altp2m, view: View, guest: Model) -> None:
    assert altp2m.vcpu_views() == {0: 0, 1: 0}
    altp2m.switch_to_view(view)
    assert altp2m.vcpu_views() == {0: view.id, 1: view.id}
    guest.switch_vcpu(guest.vcpus[1], 0)
    assert altp2m.vcpu_views() == {0: view.id, 1: 0}
    assert altp2m.vcpu_view(0) == view.id
    altp2m.switch_to_view(None)
    assert altp2m.vcpu_views() == {0: 0, 1: 0}
    with pytest.raises(InvalidArgumentError, match="no such vCPU"):
        altp2m.vcpu_view(2)


def test_a_hidden_view_cannot_be_switched_to(altp2m: Altp2m, view: View, guest: Model) -> None:
    view.set_visibility(False)
    with pytest.raises(InvalidArgumentError, match="hidden"):
        altp2m.switch_to_view(view)
    assert [vcpu.view for vcpu in guest.vcpus] == [0, 0]
    view.set_visibility(True)
    altp2m.switch_to_view(view)
    assert [vcpu.view for vcpu in guest.vcpus] == [view.id] * 2
    view.set_visibility(False)  # those inside stay
    assert [vcpu.view for vcpu in guest.vcpus] == [view.id] * 2


def test_only_an_open_view_of_this_domain_can_be_switched_to(
    altp2m: Altp2m, view: View, xen: Xen, mock: MockBackend
) -> None:
    mock.add_domain("other")
    foreign = xen.domain("other").altp2m().create_view()
    with pytest.raises(InvalidArgumentError, match="not an open view"):
        altp2m.switch_to_view(foreign)
    view.close()
    with pytest.raises(InvalidArgumentError, match="not an open view"):
        altp2m.switch_to_view(view)
    again = altp2m.create_view()
    assert again.id == view.id
    with pytest.raises(InvalidArgumentError, match="not an open view"):
        altp2m.switch_to_view(view)


def test_a_view_with_vcpus_in_it_can_be_closed(altp2m: Altp2m, view: View, guest: Model) -> None:
    altp2m.switch_to_view(view)
    view.close()
    assert [vcpu.view for vcpu in guest.vcpus] == [0, 0]
    assert not guest.views[view.id].exists


def test_a_view_that_is_gone_is_closed_without_moving_anybody(
    altp2m: Altp2m, view: View, mock: MockBackend, guest: Model
) -> None:
    other = altp2m.create_view()
    altp2m.switch_to_view(other)
    mock.altp2m_destroy_view(1, view.id)
    view.close()  # Xen says EBUSY for it
    assert [vcpu.view for vcpu in guest.vcpus] == [other.id] * 2


# #VE pages.


def test_a_notify_page_is_named_and_taken_back(altp2m: Altp2m, guest: Model) -> None:
    altp2m.enable_notify(1, 0x20)
    assert [vcpu.veinfo for vcpu in guest.vcpus] == [None, guest.host.lookup(0x20).mfn]
    with pytest.raises(AlreadyError, match="disable it first"):
        altp2m.enable_notify(1, 0x21)
    altp2m.disable_notify(1)
    assert guest.vcpus[1].veinfo is None
    altp2m.enable_notify(1, 0x21)
    assert guest.vcpus[1].veinfo == guest.host.lookup(0x21).mfn


@pytest.mark.parametrize("was_on", [False, True])
def test_notify_pages_go_with_the_close(
    mock: MockBackend, dom: Domain, guest: Model, was_on: bool
) -> None:
    mock.altp2m_set_domain_state(1, was_on)
    if was_on:
        mock.altp2m_set_vcpu_enable_notify(1, 0, 0x22)
    with dom.altp2m() as altp2m:
        altp2m.enable_notify(1, 0x20)
        if was_on:  # another agent's is not ours
            with pytest.raises(AlreadyError):
                altp2m.enable_notify(0, 0x20)
    assert guest.vcpus[1].veinfo is None
    assert guest.vcpus[0].veinfo == (guest.host.lookup(0x22).mfn if was_on else None)


@pytest.mark.parametrize(
    ("vcpu", "gfn"), [(2, 0x20), (0, 0x5000), (0, -1), (0, 1 << 36), (0, True)]
)
def test_notify_pages_that_cannot_be(altp2m: Altp2m, guest: Model, vcpu: int, gfn: int) -> None:
    with pytest.raises(InvalidArgumentError):
        altp2m.enable_notify(vcpu, gfn)
    assert [vcpu.veinfo for vcpu in guest.vcpus] == [None, None]


def test_a_cpu_without_virtualisation_exceptions() -> None:
    mock = MockBackend(has_virtualisation_exceptions=False, memory_pages=1 << 13)
    mock.add_domain("guest")
    with connect(mock) as xen:
        altp2m = xen.domain(1).altp2m()
        with pytest.raises(UnsupportedError, match="the CPU has no #VE"):
            altp2m.enable_notify(0, 0x20)


def test_views_that_track_a_gfn(dom: Domain, altp2m: Altp2m, view: View) -> None:
    other = altp2m.create_view()
    gfns = dom.add_pages(3)
    view.remap(5, gfns[0])
    other.remap(5, gfns[1])
    other.remap(6, gfns[2])
    assert [altp2m.tracking(gfn) for gfn in gfns] == [[view], [other], [other]]
    other.close()
    assert [altp2m.tracking(gfn) for gfn in gfns] == [[view], [], []]


# What gets lost.


def make_much(altp2m: Altp2m) -> None:
    """Views with all there is, a #VE page, and the vCPUs in one of them."""
    view = altp2m.create_view(label="one")
    view.set_access(range(4, 12), Access.RX)
    view.remap(20, 21, access=Access.X)
    view.remap(21, 22, access=Access.R)
    view.set_suppress_ve(9, False)
    hidden = altp2m.create_view(label="two")
    hidden.set_access(30, Access.N)
    hidden.set_visibility(False)
    altp2m.switch_to_view(view)
    altp2m.enable_notify(0, 8)


@every_release
def test_altp2m_that_somebody_switched_off_is_made_again(
    altp2m: Altp2m, mock: MockBackend, guest: Model
) -> None:
    make_much(altp2m)
    before = state_of(mock, 1, GFNS)
    told: list[ViewReset] = []
    altp2m.on_view_reset(told.append)
    assert altp2m.verify() == []
    mock.altp2m_set_domain_state(1, False)
    found = altp2m.verify()
    assert found == told == [ViewReset(view, (), reapplied=True) for view in altp2m.views]
    assert changes(before, state_of(mock, 1, GFNS)) == set()
    assert altp2m.verify() == []


def test_what_cannot_be_made_again_is_told_and_tried_again(
    altp2m: Altp2m, mock: MockBackend, guest: Model
) -> None:
    make_much(altp2m)
    before, off, pauses = state_of(mock, 1, GFNS), None, guest.pauses
    calls = 0
    while True:
        mock.altp2m_set_domain_state(1, False)
        off = off or state_of(mock, 1, GFNS)
        calls += 1
        mock.fail(None, calls + 3, EPERM)  # after those that look
        try:
            found = altp2m.verify()
        except XenError:
            found = []  # pausing, or unpausing, has failed
            if guest.pauses > pauses:
                altp2m.context.unpause()
        if not mock._faults:
            if all(lost.reapplied for lost in found) and found:
                assert changes(before, state_of(mock, 1, GFNS)) == set()
            elif found:
                assert all(isinstance(lost.failure, XenError) for lost in found)
                assert changes(off, state_of(mock, 1, GFNS)) == set()
                altp2m.verify()
                assert changes(before, state_of(mock, 1, GFNS)) == set()
        else:
            break
    mock._faults.clear()
    assert calls > 15
    assert altp2m.verify() == []
    assert changes(before, state_of(mock, 1, GFNS)) == set()


def test_what_is_only_looked_for_stays_as_it_is(
    altp2m: Altp2m, mock: MockBackend, guest: Model
) -> None:
    make_much(altp2m)
    [one, two] = altp2m.views
    guest.set_mem_access(0, 30, RX)
    [lost] = altp2m.verify(reapply=False)
    assert lost == ViewReset(two, (Mismatch(Gfn(30), Access.N, Access.RX),), reapplied=False)
    assert altp2m.verify([one]) == []
    assert two.access(30) == Access.RX
    assert [each.view for each in altp2m.verify()] == [two]
    assert two.access(30) == Access.N


def test_all_who_want_to_know_are_told_even_if_one_fails(
    dom: Domain, altp2m: Altp2m, view: View, mock: MockBackend
) -> None:
    told: list[ViewReset] = []

    def fail(lost: ViewReset) -> None:
        raise KeyError(lost.view.id)

    altp2m.on_view_reset(fail)
    altp2m.on_view_reset(told.append)
    view.set_access(5, Access.R)
    mock.altp2m_set_mem_access(1, HOST_VIEW, 5, RWX)
    with pytest.raises(KeyError):
        altp2m.verify()
    assert [(lost.view, lost.reapplied) for lost in told] == [(view, True)]
    assert view.access(5) == Access.R
    assert dom.context.pauses.left == []


@every_release
def test_what_can_be_made_again_is_though_a_page_is_gone(
    altp2m: Altp2m, view: View, guest: Model
) -> None:
    """Else the remaps before it would show their pages with these pages' rights."""
    for gfn in (0x10, 0x11, 0x12):
        view.remap(gfn, gfn + 0x10, access=Access.X)
    view.set_access(0x13, Access.R)
    guest.remove_page(0x11)
    guest.set_mem_access(HOST_VIEW, 0x10, RWX)
    [lost] = altp2m.verify()
    assert isinstance(lost.failure, NotMappedError)
    assert not lost.reapplied
    assert [view.access(gfn) for gfn in (0x10, 0x12, 0x13)] == [Access.X, Access.X, Access.R]
    assert [mismatch.gfn for mismatch in view.verify()] == [0x11]


def test_what_xen_passes_over_is_told_of(altp2m: Altp2m, view: View, guest: Model) -> None:
    view.set_access(range(0x10, 0x14), Access.R)
    guest.remove_page(0x11)
    [lost] = altp2m.verify()
    assert not lost.reapplied
    assert lost.failure is not None
    assert lost.failure.gfn == 0x11


def test_vcpus_that_have_left_do_not_come_back(
    dom: Domain, altp2m: Altp2m, view: View, mock: MockBackend
) -> None:
    with dom.monitor(MemAccess):
        altp2m.switch_to_view(view)
    assert set(altp2m.vcpu_views().values()) == {HOST_VIEW}  # nobody would hear them
    mock.altp2m_set_domain_state(1, False)
    altp2m.verify()
    assert set(altp2m.vcpu_views().values()) == {HOST_VIEW}
    altp2m.switch_to_view(view)
    mock.altp2m_set_domain_state(1, False)
    altp2m.verify()
    assert set(altp2m.vcpu_views().values()) == {view.id}


def test_a_monitor_is_closed_though_altp2m_is_off(
    dom: Domain, altp2m: Altp2m, view: View, mock: MockBackend, guest: Model
) -> None:
    monitor = dom.monitor(MemAccess)
    altp2m.switch_to_view(view)
    mock.altp2m_set_domain_state(1, False)
    monitor.close()
    assert not guest.listened
