# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any sequence of operations, with failures and with changes behind the handles' back.

Before and after each operation the machine reads what a guest would meet in every view, by Xen's
rules (``effective.met``), and holds the difference against what the operation is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, ENOMEM, EPERM
from typing import TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from xenaltp2m import (
    Access,
    Altp2m,
    BusyError,
    DecorativeDefaultWarning,
    Domain,
    InvalidArgumentError,
    LeftoverError,
    NotMappedError,
    OutOfMemoryError,
    View,
    XenError,
    connect,
)
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.mock.machine import INVALID_VIEW
from xenaltp2m.backend.mock.p2m import PageType

from .effective import State, changes, met, state_of
from .faults import Failing, Plan

RAM = [0, 1, 2, 3, 0x1FE, 0x1FF, 0x200, 0x201, 0x202]
"""Six gfns of a superpage, and three of pages that the host maps alone."""
HOLE, DIRECT_MMIO = 0x300, 0xFEE00
FIRST_NEW = 0xFF000
GFNS = [*RAM, HOLE, DIRECT_MMIO, *range(FIRST_NEW, FIRST_NEW + 4)]
NUMBERS = {
    Access.N: 0, Access.R: 1, Access.RW: 3, Access.X: 4, Access.RX: 5, Access.RWX: 7,
    Access.RX2RW: 8, Access.N2RWX: 9,
}  # fmt: skip
ACCESSES = st.sampled_from([*NUMBERS, Access.DEFAULT])
RIGHTS = {0: "", 1: "r", 3: "rw", 4: "x", 5: "rx", 7: "rwx", 8: "rx", 9: ""}

Page: TypeAlias = tuple[int, int]
"""A frame and an access number."""
Met: TypeAlias = dict[tuple[int, int], Page | None]
"""What is met in each view at each gfn."""

gfns = st.sampled_from(GFNS)
some_gfns = st.one_of(
    gfns,
    st.lists(gfns, max_size=6),
    st.sampled_from([range(4), range(0x1FE, 0x203), range(FIRST_NEW, FIRST_NEW + 4)]),
)


failures = st.sampled_from([EPERM, ENOMEM, EACCES])
plans: st.SearchStrategy[Plan] = st.one_of(
    st.just({}),
    st.just({}),
    st.builds(lambda first, errno: {first: errno}, st.integers(1, 6), failures),
    st.builds(
        lambda first, then, errno: {first: errno, first + then: errno},
        st.integers(1, 5),
        st.integers(1, 3),
        failures,
    ),
)
"""Mostly nothing fails; or a call does; or what takes back what was done before it fails, too."""
which = st.integers(0, 8)
"""Which of the open views, or of the pages added: modulo their number."""
has_views = precondition(lambda machine: bool(machine.open))
is_open = precondition(lambda machine: machine.altp2m is not None)


class Altp2mMachine(RuleBasedStateMachine):
    # The host and its guest.

    @initialize(
        version=st.sampled_from(SUPPORTED),
        superpages=st.booleans(),
        spare=st.sampled_from([0, 2, 5, 4096]),
        foreign=st.sampled_from([None, "a view", "a view with the vCPUs in it"]),
    )
    def start(
        self, version: tuple[int, int], superpages: bool, spare: int, foreign: str | None
    ) -> None:
        self.mock = Failing(version, memory_pages=1 << 11)
        self.mock.add_domain("guest", vcpus=2, memory_kib=(2 << 10) + 12, superpages=superpages)
        self.guest = self.mock.domain(1)
        self.superpages = superpages
        self.foreign: set[int] = set()
        if foreign is not None:  # another agent's
            self.mock.altp2m_set_domain_state(1, True)
            self.foreign.add(self.mock.altp2m_create_view(1, 7))
            self.mock.altp2m_set_mem_access(1, 1, 0, 1)
            self.mock.altp2m_change_gfn(1, 1, 1, 2)
            if foreign != "a view":
                self.mock.altp2m_switch_to_view(1, 1)
        self.guest.pool.pages = self.guest.pool.used + spare
        self.xen = connect(self.mock)
        self.dom: Domain = self.xen.domain(1)
        self.altp2m: Altp2m | None = None
        self.open: dict[int, View] = {}
        self.remaps: dict[int, dict[int, int]] = {}
        """For each open view, which gfn's page each remapped gfn shows."""
        self.targets: dict[int, list[int]] = {}
        self.touched: dict[int, set[int]] = {}
        """For each open view, the gfns that were changed behind its back."""
        self.added: list[range] = []
        self.was_target: set[int] = set()
        self.pauses = 0
        self.vcpus_moved = False
        self.origin = self.state()
        self.before_open = self.origin

    def teardown(self) -> None:
        if not hasattr(self, "xen"):
            return
        self.mock.start({})
        self.close_altp2m_now()
        self.xen.close()
        assert changes(self.origin, self.state()) == set()
        assert self.mock.open_resources() == []

    def state(self) -> State:
        return state_of(self.mock, 1, [*GFNS, *(range(FIRST_NEW + 4, FIRST_NEW + 8))])

    def vcpus_are_to_stay(self) -> None:
        """Where vCPUs are now is where they are to be in the end."""
        for name, value in self.state().items():
            if name.startswith("vCPU "):
                self.origin[name] = value

    def met(self) -> Met:
        return {
            (number, gfn): met(self.guest, number, gfn)
            for number, view in enumerate(self.guest.views)
            if view.exists
            for gfn in GFNS
        }

    def lazy(self, number: int, gfn: int) -> Page | None:
        """What a gfn without an entry gets."""
        host = self.guest.host.lookup(gfn)
        if not host.mapped:
            return None
        if self.guest.release.version >= (4, 19):
            return host.mfn, self.guest.views[number].default_access
        return host.mfn, host.access

    def has_entry(self, number: int, gfn: int) -> bool:
        return self.guest.views[number].table.lookup(gfn).mapped

    def can_be_set(self, number: int, gfn: int) -> bool:
        """``altp2m_get_effective_entry``: an entry of the view's own, or plain RAM."""
        host = self.guest.host.lookup(gfn)
        return self.guest.views[number].table.lookup(gfn).valid or (
            host.valid and host.type == PageType.RAM_RW
        )

    # How an operation is watched.

    @contextmanager
    def doing(
        self, effect: Callable[[Met], None], done: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Hold what an operation did to the views against its effect; nothing, if it failed.

        Args:
            effect: Changes what is met as the operation should.
            done: Takes note of what was done.
        """
        before = self.met()
        try:
            yield
        except LeftoverError:
            raise
        except XenError:
            assert self.met() == before
            raise
        finally:
            self.mock.start({})
        effect(before)
        assert self.met() == before
        done()

    @contextmanager
    def allowed_to_fail(self, view: View | None = None) -> Iterator[None]:
        """Pass over an injected failure; what is left then must go with the next close."""
        failing = bool(self.mock.plan)
        try:
            yield
        except OutOfMemoryError:
            pass
        except LeftoverError:
            if view is not None:
                view.close()
                self.forget(view.id)
        except XenError as error:
            if not failing or error.errno not in (EPERM, EACCES):
                raise

    def forget(self, number: int) -> None:
        self.open.pop(number)

    # altp2m and its views.

    @precondition(lambda self: self.altp2m is None)
    @rule()
    def open_altp2m(self) -> None:
        before = self.state()
        with self.allowed_to_fail():
            try:
                self.altp2m = self.dom.altp2m()
            finally:
                self.mock.start({})
        if self.altp2m is None:
            assert changes(before, self.state()) == set()
        else:
            assert self.guest.active
            self.before_open = before
            self.vcpus_moved = False

    @precondition(lambda self: self.altp2m is not None)
    @rule(again=st.booleans())
    def open_altp2m_again(self, again: bool) -> None:
        self.mock.start({})
        with self.xen.domain(1) as other, pytest.raises(BusyError):
            (other if again else self.dom).altp2m()

    @precondition(lambda self: self.altp2m is not None)
    @rule()
    def close_altp2m(self) -> None:
        self.close_altp2m_now()

    def close_altp2m_now(self) -> None:
        if self.altp2m is None:
            return
        with suppress(LeftoverError):
            self.altp2m.close()
        self.mock.start({})
        self.altp2m.close()
        assert all(view.closed for view in self.open.values())
        amiss = {
            change
            for change in changes(self.before_open, self.state())
            if change.startswith(("altp2m", "view", "vCPU", "#VE"))
        }
        if self.vcpus_moved:
            views = {vcpu.view for vcpu in self.guest.vcpus}
            assert views <= ({0, *self.foreign} if self.foreign else {INVALID_VIEW})
            amiss -= {change for change in amiss if change.startswith("vCPU ")}
            self.vcpus_are_to_stay()
        assert amiss == set()
        self.altp2m = None
        self.open.clear()

    def default_accesses(self) -> list[Access]:
        if (4, 19) <= self.guest.release.version < (4, 22) and self.superpages:
            # A superpage copied along has the host's access: documented, and hard to foretell.
            return [Access.RWX, Access.DEFAULT]
        return [Access.RWX, Access.DEFAULT, Access.RX, Access.R, Access.N]

    @precondition(lambda self: self.altp2m is not None)
    @rule(target=views, data=st.data())
    def create_view(self, data: st.DataObject) -> object:
        assert self.altp2m is not None
        access = data.draw(st.sampled_from(self.default_accesses()))
        full = len(self.open) + len(self.foreign) == 9
        view = None
        before = self.met()
        with self.allowed_to_fail(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DecorativeDefaultWarning)
            try:
                view = self.altp2m.create_view(access)
            except InvalidArgumentError:
                assert full
            finally:
                self.mock.start({})
        if view is None:
            assert self.met() == before
            return multiple()
        assert not full
        assert view.id not in self.foreign | self.open.keys()
        for gfn in GFNS:
            before[view.id, gfn] = self.lazy(view.id, gfn)
        assert self.met() == before
        self.open[view.id] = view
        self.remaps[view.id] = {}
        self.targets[view.id] = []
        self.touched[view.id] = set()
        return view

    @rule(view=consumes(views))
    def close_view(self, view: View) -> None:
        if view.closed:
            return
        with suppress(LeftoverError):
            view.close()
        self.mock.start({})
        view.close()
        self.forget(view.id)
        assert not self.guest.views[view.id].exists

    @rule(view=views, where=some_gfns, access=ACCESSES, shown=st.booleans())
    def set_access(
        self, view: View, where: int | list[int] | range, access: Access, shown: bool
    ) -> None:
        if view.closed:
            return
        number = NUMBERS.get(access, 7)
        meant = [where] if isinstance(where, int) else list(where)
        settable = [gfn for gfn in meant if self.can_be_set(view.id, gfn)]

        def effect(all_met: Met) -> None:
            for gfn in settable:
                page = all_met[view.id, gfn]
                assert page is not None
                all_met[view.id, gfn] = page[0], number

        def done() -> None:
            self.touched[view.id] -= set(settable)
            self.touched[view.id] |= set(meant) - set(settable)

        with self.allowed_to_fail(view), self.doing(effect, done):
            if shown:
                view.set_access(where, access, progress=lambda done, total: None)
            else:
                view.set_access(where, access)

    @rule(view=views, gfn=gfns, new_gfn=gfns, access=st.none() | ACCESSES)
    def remap(self, view: View, gfn: int, new_gfn: int, access: Access | None) -> None:
        if view.closed:
            return
        possible = self.can_be_set(view.id, gfn) and self.can_be_set(view.id, new_gfn)

        def effect(all_met: Met) -> None:
            assert possible
            was, new = all_met[view.id, gfn], all_met[view.id, new_gfn]
            assert was is not None
            assert new is not None
            number = was[1] if access is None else NUMBERS.get(access, 7)
            all_met[view.id, gfn] = new[0], number

        def done() -> None:
            remaps = self.remaps[view.id]
            shown = remaps.get(new_gfn, new_gfn)
            if shown == gfn:
                remaps.pop(gfn, None)
            else:
                remaps[gfn] = shown
            if new_gfn in self.touched[view.id]:
                self.touched[view.id].add(gfn)
            else:
                self.touched[view.id].discard(gfn)

        self.was_target.add(new_gfn)
        self.was_target.update(self.remaps[view.id].values())
        with self.allowed_to_fail(view):
            try:
                with self.doing(effect, done):
                    view.remap(gfn, new_gfn, access=access)
            except NotMappedError:
                assert not possible
        if not view.closed:
            model = self.guest.views[view.id]
            if model.min_remapped <= model.max_remapped:
                assert view.tracks(model.min_remapped)
                assert view.tracks(model.max_remapped)
                self.targets[view.id] += [model.min_remapped, model.max_remapped]

    @rule(view=views, gfn=gfns)
    def revert(self, view: View, gfn: int) -> None:
        if view.closed:
            return
        remapped = gfn in self.remaps[view.id]
        had_entry = self.has_entry(view.id, gfn)

        def effect(all_met: Met) -> None:
            assert remapped
            if had_entry:
                all_met[view.id, gfn] = self.lazy(view.id, gfn)

        def done() -> None:
            del self.remaps[view.id][gfn]

        with self.allowed_to_fail(view):
            try:
                with self.doing(effect, done):
                    view.revert(gfn)
            except InvalidArgumentError:
                assert not remapped

    @rule(view=views, where=some_gfns, suppress_ve=st.booleans())
    def set_suppress_ve(
        self, view: View, where: int | list[int] | range, suppress_ve: bool
    ) -> None:
        if view.closed:
            return
        meant = [where] if isinstance(where, int) else list(where)
        fresh = [gfn for gfn in meant if not self.has_entry(view.id, gfn)]

        def effect(all_met: Met) -> None:
            for gfn in fresh:
                # Xen makes an entry with the host's access; the view's default counts no more.
                host = self.guest.host.lookup(gfn)
                own = self.guest.views[view.id].table.lookup(gfn)
                if own.mapped and own.access == host.access:
                    all_met[view.id, gfn] = host.mfn, host.access

        with self.allowed_to_fail(view):
            try:
                with self.doing(effect):
                    view.set_suppress_ve(where, suppress_ve)
            except NotMappedError:
                assert isinstance(where, int)
                assert not self.can_be_set(view.id, where)

    @rule(view=views, visible=st.booleans())
    def set_visibility(self, view: View, visible: bool) -> None:
        if view.closed:
            return
        with self.allowed_to_fail(), self.doing(lambda _: None):
            view.set_visibility(visible)

    @precondition(lambda self: self.altp2m is not None)
    @rule(view=views | st.none())
    def switch_to_view(self, view: View | None) -> None:
        assert self.altp2m is not None
        hidden = view is not None and not view.closed and not view.visible
        with self.allowed_to_fail(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                with self.doing(lambda _: None):
                    self.altp2m.switch_to_view(view)
            except InvalidArgumentError:
                assert view is not None
                assert view.closed or hidden
            else:
                number = 0 if view is None else view.id
                assert [vcpu.view for vcpu in self.guest.vcpus] == [number] * 2
                if self.before_open["vCPU 0 of domain 1"] != self.before_open["vCPU 1 of domain 1"]:
                    self.vcpus_moved = True  # they cannot go back each to its own

    @precondition(lambda self: self.altp2m is not None)
    @rule(vcpu=st.integers(0, 1), gfn=st.sampled_from(RAM))
    def notify(self, vcpu: int, gfn: int) -> None:
        assert self.altp2m is not None
        with self.allowed_to_fail(), suppress(FileExistsError), self.doing(lambda _: None):
            if self.guest.vcpus[vcpu].veinfo is None and self.guest.host.lookup(gfn).mapped:
                self.altp2m.enable_notify(vcpu, gfn)
                assert self.guest.vcpus[vcpu].veinfo == self.guest.host.lookup(gfn).mfn
            else:
                self.altp2m.disable_notify(vcpu)
                assert self.guest.vcpus[vcpu].veinfo is None

    # The domain.

    @precondition(lambda self: len(self.added) < 3)
    @rule(count=st.integers(1, 2), target=pages)
    def add_pages(self, count: int) -> object:
        self.guest.pool.pages = 4096  # without, Xen would lose a page it has taken
        before, gfns = self.state(), None
        with self.allowed_to_fail():
            try:
                gfns = self.dom.add_pages(count)
            except LeftoverError:
                self.close_all_and_reopen()
            finally:
                self.mock.start({})
        if gfns is None:
            return multiple()
        assert self.guest.pages == before["pages of domain 1"] + count
        assert self.guest.max_pages == before["memory limit of domain 1"] + count
        self.added.append(gfns)
        return gfns

    @rule(gfns=consumes(pages))
    def remove_pages(self, gfns: range) -> None:
        if gfns not in self.added:
            return
        tracked = any(
            min(targets) <= gfn <= max(targets)
            for number, targets in self.targets.items()
            if number in self.open and targets
            for gfn in gfns
        )
        with self.allowed_to_fail():
            try:
                self.dom.remove_pages(gfns)
            except BusyError:
                assert tracked
                return
            except LeftoverError:
                self.mock.start({})
                self.dom.remove_pages(gfns)
            finally:
                self.mock.start({})
            assert not tracked
            self.added.remove(gfns)
            self.changed_behind(gfns)

    @rule()
    def pause(self) -> None:
        with self.allowed_to_fail(), self.doing(lambda _: None):
            self.dom.pause()
            self.pauses += 1

    @rule()
    def unpause(self) -> None:
        with self.allowed_to_fail(), self.doing(lambda _: None):
            try:
                self.dom.unpause()
            except InvalidArgumentError:
                assert not self.pauses
            else:
                self.pauses -= 1

    @rule(gfn=st.sampled_from([*RAM, HOLE]), data=st.binary(max_size=16))
    def memory(self, gfn: int, data: bytes) -> None:
        address = (gfn << 12) + 4090
        with self.allowed_to_fail():
            try:
                with self.doing(lambda _: None):
                    self.dom.memory.write(address, data)
                    assert self.dom.memory.read(address, len(data)) == data
            except InvalidArgumentError:
                pages = {address >> 12, (address + len(data) - 1) >> 12}
                assert not all(self.guest.host.lookup(page).valid for page in pages)
            except LeftoverError:
                self.close_all_and_reopen()

    @rule()
    def close_all_and_reopen(self) -> None:
        self.mock.start({})
        self.close_altp2m_now()
        self.dom.close()
        assert changes(self.origin, self.state()) == set()
        self.dom = self.xen.domain(1)
        self.added.clear()
        self.pauses = 0

    # What others do.

    def changed_behind(self, gfns: range | list[int]) -> None:
        for touched in self.touched.values():
            touched.update(gfns)

    @rule(gfn=st.sampled_from(RAM), number=st.sampled_from([0, 1, 5, 7]))
    def host_access_changes(self, gfn: int, number: int) -> None:
        if not self.guest.host.lookup(gfn).mapped:
            return
        self.guest.pool.pages = 4096
        self.guest.set_mem_access(0, gfn, number)
        self.host_changed(gfn)

    @rule(gfn=st.sampled_from(RAM))
    def guest_gives_a_page_back(self, gfn: int) -> None:
        host = self.guest.host.lookup(gfn)
        if not host.mapped or any(vcpu.veinfo == host.mfn for vcpu in self.guest.vcpus):
            return
        self.guest.pool.pages = 4096
        assert self.guest.remove_page(gfn)
        self.host_changed(gfn)
        self.changed_behind(GFNS)  # it may have reset views

    def host_changed(self, gfn: int) -> None:
        """From now on this is how it is to be again, in the other agent's view, too."""
        self.changed_behind([gfn])
        now = self.state()
        for state in (self.origin, self.before_open):
            for name in state.keys() & now.keys():
                if name.startswith((f"page {gfn:#x} of", *(f"gfn {at:#x} in" for at in RAM))):
                    state[name] = now[name]
        self.origin["pages of domain 1"] = self.guest.pages - sum(map(len, self.added))

    @precondition(lambda self: self.guest.active)
    @rule(vcpu=st.integers(0, 1), number=st.integers(0, 9))
    def a_response_moves_a_vcpu(self, vcpu: int, number: int) -> None:
        self.guest.switch_vcpu(self.guest.vcpus[vcpu], number)
        if self.altp2m is None:
            self.vcpus_are_to_stay()
        self.vcpus_moved = True

    @rule(vcpu=st.integers(0, 1), gfn=st.sampled_from(RAM))
    def guest_uses_a_page(self, vcpu: int, gfn: int) -> None:
        number = self.guest.vcpus[vcpu].view
        page = met(self.guest, number, gfn) if self.guest.active else None
        if page is None or "r" not in RIGHTS[page[1]]:
            return
        self.guest.pool.pages = 4096
        with self.doing(lambda _: None):
            for kind in RIGHTS[page[1]]:
                self.mock.touch(1, gfn, kind, vcpu)

    # What always holds.

    @invariant()
    def what_always_holds(self) -> None:
        if not hasattr(self, "xen"):
            return
        guest = self.guest
        assert not guest.crashed
        assert guest.pauses == 1 + self.pauses
        assert self.mock.open_resources() == []
        existing = {number for number, view in enumerate(guest.views) if view.exists}
        assert existing - {0} == self.foreign | self.open.keys()
        for number, view in self.open.items():
            assert guest.views[number].visible == view.visible
            self.check_model(number, view)
        for gfn in set(RAM) - self.was_target - {2}:  # the other agent has remapped to 2
            host = guest.host.lookup(gfn)
            assert not host.mapped or guest.m2p[host.mfn] == gfn

    def check_model(self, number: int, view: View) -> None:
        """What a view says of itself is what it is, where nobody else has touched it."""
        assert view.remaps == self.remaps[number]
        table, told = self.guest.views[number].table, set()
        for run in view.differences():
            for at in range(run.count):
                gfn = run.first + at
                told.add(gfn)
                if gfn in self.touched[number]:
                    continue
                entry = table.lookup(gfn)
                if run.access is not None:
                    assert entry.access == NUMBERS[run.access]
                if run.suppress_ve is not None and self.can_be_set(number, gfn):
                    assert entry.suppress_ve == run.suppress_ve
                if run.remapped_to is not None:
                    target = run.remapped_to + at
                    if target not in self.touched[number]:
                        assert entry.mfn == self.guest.host.lookup(target).mfn
        for gfn in set(GFNS) - told - self.touched[number]:
            entry = table.lookup(gfn)
            if entry.mapped:
                assert entry.mfn == self.guest.host.lookup(gfn).mfn
                assert entry.suppress_ve


TestAltp2m = Altp2mMachine.TestCase
TestAltp2m.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
