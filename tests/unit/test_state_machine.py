# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any sequence of operations, with failures and with changes behind the handles' back.

Before and after each operation the machine reads what a guest would meet in every view, by Xen's
rules (``effective.met``), and holds the difference against what the operation is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
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
    AlreadyError,
    Altp2m,
    BusyError,
    DecorativeDefaultWarning,
    Domain,
    InvalidArgumentError,
    LeftoverError,
    NotMappedError,
    OutOfMemoryError,
    SuperpageDefaultWarning,
    View,
    XenError,
    connect,
)
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.mock.p2m import PageType
from xenaltp2m.backend.mock.vcpu import INVALID_VIEW
from xenaltp2m.testing import Failing, Plan

from .effective import State, changes, met, state_of

RAM = [0, 1, 2, 3, 0x1FE, 0x1FF, 0x200, 0x201, 0x202]
"""Six gfns of a superpage, and three of pages that the host maps alone."""
HOLE, DIRECT_MMIO = 0x300, 0xFEE00
FIRST_NEW = 0xFF000
GFNS = [*RAM, HOLE, DIRECT_MMIO, *range(FIRST_NEW, FIRST_NEW + 4)]
MAX_VIEWS = 4
NUMBERS = {
    Access.N: 0, Access.R: 1, Access.RW: 3, Access.X: 4, Access.RX: 5, Access.RWX: 7,
    Access.RX2RW: 8, Access.N2RWX: 9,
}  # fmt: skip
HOST_DEFAULT = 7
RIGHTS = {0: "", 1: "r", 3: "rw", 4: "x", 5: "rx", 7: "rwx", 8: "rx", 9: ""}

Page: TypeAlias = tuple[int, int]
"""A frame and an access number."""
Met: TypeAlias = dict[tuple[int, int], Page | None]
"""What is met in each view at each gfn."""
Gfns: TypeAlias = int | list[int] | range

accesses = st.sampled_from([*NUMBERS, Access.DEFAULT])
ram = st.sampled_from(RAM)
gfns = st.one_of(ram, ram, st.sampled_from(GFNS))
some_gfns: st.SearchStrategy[Gfns] = st.one_of(
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
"""Mostly nothing fails; or a call does; or what takes back what was done fails, too."""
which = st.integers(0, 8)
"""Which of the open views, or of the pages added: modulo their number."""


def listed(where: Gfns) -> list[int]:
    return [where] if isinstance(where, int) else list(where)


def is_open(machine: Altp2mMachine) -> bool:
    return machine.altp2m is not None


def has_views(machine: Altp2mMachine) -> bool:
    return bool(machine.open)


class Altp2mMachine(RuleBasedStateMachine):
    # The host and its guest.

    @initialize(
        version=st.sampled_from(SUPPORTED),
        superpages=st.booleans(),
        foreign=st.sampled_from([None, "a view", "a view with the vCPUs in it"]),
        views=st.integers(1, 2),
        remapped=st.lists(st.tuples(ram, ram, st.none() | accesses), min_size=1, max_size=4),
    )
    def start(
        self,
        version: tuple[int, int],
        superpages: bool,
        foreign: str | None,
        views: int,
        remapped: list[tuple[int, int, Access | None]],
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
        self.xen = connect(self.mock)
        self.dom: Domain = self.xen.domain(1)
        self.altp2m: Altp2m | None = None
        self.open: dict[int, View] = {}
        self.remaps: dict[int, dict[int, int]] = {}
        """For each open view, which gfn's page each remapped gfn shows."""
        self.touched: dict[int, set[int]] = {}
        """For each open view, the gfns that were changed behind its back."""
        self.targets: dict[int, list[int]] = {}
        """For each open view, the ends that Xen's range of remap targets ever had."""
        self.ever_targets = {2}  # the other agent's
        """What a revert, which takes the page that is shown out of Xen's reverse map, may hit."""
        self.added: list[range] = []
        self.pauses = 0
        self.vcpus_moved = False
        self.mock.domain_pause(1)  # its first unpausing maps the page of the APIC, for good
        self.mock.domain_unpause(1)
        self.mock.domain_unpause(1)
        self.mock.domain_pause(1)
        self.origin = self.before_open = self.state()
        self.open_altp2m({})
        for _ in range(views):
            self.create_view({}, Access.RWX)
        for gfn, new_gfn, access in remapped:
            self.remap({}, 0, gfn, new_gfn, access)

    def teardown(self) -> None:
        if hasattr(self, "xen"):
            self.close_altp2m({})
            self.xen.close()
            assert changes(self.origin, self.state()) == set()
            assert self.mock.open_resources() == []

    def state(self) -> State:
        return state_of(self.mock, 1, [*GFNS, *range(FIRST_NEW + 4, FIRST_NEW + 8)])

    def vcpus_are_to_stay(self) -> None:
        """Where vCPUs are now is where they are to be in the end."""
        for name, value in self.state().items():
            if name.startswith("vCPU "):
                self.origin[name] = value

    def view(self, at: int) -> View:
        return sorted(self.open.items())[at % len(self.open)][1]

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

    def can_be_set(self, view: View, gfn: int) -> bool:
        """``altp2m_get_effective_entry``: an entry of the view's own, or plain RAM."""
        host = self.guest.host.lookup(gfn)
        return self.guest.views[view.id].table.lookup(gfn).valid or (
            host.valid and host.type == PageType.RAM_RW
        )

    # How an operation is watched.

    @contextmanager
    def doing(
        self,
        plan: Plan,
        effect: Callable[[Met], None] = lambda _: None,
        *,
        view: View | None = None,
        refused: type[XenError] | None = None,
        unsure: AbstractSet[int] = frozenset(),
    ) -> Iterator[list[XenError]]:
        """Hold what an operation does to the views against what it should do.

        Args:
            plan: Which of its calls fail.
            effect: Changes what is met as the operation does if it succeeds.
            view: Closed, if the operation leaves something of it behind.
            refused: The error that it must end with, if no call fails before.
            unsure: Gfns that a failure sets back to what the view was asked for, which is not
                what it had, for others have changed that.

        Yields:
            A list that has the error after the block, if there was one.
        """
        before, errors = self.met(), list[XenError]()
        self.mock.start(plan)
        try:
            yield errors
        except XenError as error:
            errors.append(error)
        self.mock.start({})
        if not errors:
            assert refused is None
            effect(before)
        elif isinstance(errors[0], LeftoverError):
            assert plan
            if view is not None:
                view.close()
                del self.open[view.id]
            return
        elif errors[0].errno not in plan.values():
            # The p2m pool may be at its end, whatever else is amiss.
            assert isinstance(errors[0], (refused or OutOfMemoryError, OutOfMemoryError))
        after = self.met()
        for page in before.keys() & after.keys() if errors else ():
            if view is not None and page[0] == view.id and page[1] in unsure:
                after[page] = before[page]
        assert after == before

    # altp2m and its views.

    @precondition(lambda machine: machine.altp2m is None)
    @rule(plan=plans)
    def open_altp2m(self, plan: Plan) -> None:
        before = self.state()
        self.mock.start(plan)
        try:
            self.altp2m = self.dom.altp2m()
        except LeftoverError:
            self.close_the_domain({})
        except XenError:
            assert plan
            assert changes(before, self.state()) == set()
        else:
            assert self.guest.active
            self.before_open = before
            self.vcpus_moved = False
        self.mock.start({})

    @precondition(is_open)
    @rule(own=st.booleans())
    def open_altp2m_again(self, own: bool) -> None:
        with self.xen.domain(1) as other, pytest.raises(BusyError):
            (self.dom if own else other).altp2m()

    @precondition(is_open)
    @rule(plan=plans)
    def close_altp2m(self, plan: Plan) -> None:
        if self.altp2m is None:
            return
        self.mock.start(plan)
        with suppress(LeftoverError):
            self.altp2m.close()
        self.mock.start({})
        self.altp2m.close()
        assert all(view.closed for view in self.open.values())
        self.altp2m = None
        self.open.clear()
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

    @precondition(is_open)
    @rule(
        plan=plans,
        access=st.sampled_from([Access.RWX, Access.DEFAULT, Access.RX, Access.R, Access.N]),
    )
    def create_view(self, plan: Plan, access: Access) -> None:
        assert self.altp2m is not None
        version = self.guest.release.version
        if len(self.open) == MAX_VIEWS:
            return
        if self.superpages and (
            (access is Access.N and version >= (4, 19))  # SuperpageDefaultWarning
            or (access in {Access.R, Access.RX} and (4, 19) <= version < (4, 22))
        ):
            return  # what is copied along in a superpage is not simple, and documented
        before = self.met()
        self.mock.start(plan)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DecorativeDefaultWarning)
                warnings.simplefilter("ignore", SuperpageDefaultWarning)
                view = self.altp2m.create_view(access)
        except XenError:
            assert plan
            assert self.met() == before
        else:
            assert view.id not in self.foreign | self.open.keys()
            for gfn in GFNS:
                before[view.id, gfn] = self.lazy(view.id, gfn)
            assert self.met() == before
            self.open[view.id] = view
            self.remaps[view.id], self.targets[view.id] = {}, []
            self.touched[view.id] = set()
        self.mock.start({})

    @precondition(has_views)
    @rule(plan=plans, at=which)
    def close_view(self, plan: Plan, at: int) -> None:
        view = self.view(at)
        self.mock.start(plan)
        with suppress(LeftoverError):
            view.close()
        self.mock.start({})
        view.close()
        del self.open[view.id]
        assert not self.guest.views[view.id].exists

    @precondition(has_views)
    @rule(plan=plans, at=which, where=some_gfns, access=accesses)
    def set_access(self, plan: Plan, at: int, where: Gfns, access: Access) -> None:
        view, meant = self.view(at), set(listed(where))
        settable = {gfn for gfn in meant if self.can_be_set(view, gfn)}

        def effect(all_met: Met) -> None:
            for gfn in settable:
                page = all_met[view.id, gfn]
                assert page is not None
                all_met[view.id, gfn] = page[0], NUMBERS.get(access, HOST_DEFAULT)

        touched = self.touched[view.id]
        unsure = touched & meant
        with self.doing(plan, effect, view=view, unsure=unsure) as errors:
            view.set_access(where, access)
        if not errors:
            touched -= settable - self.remaps[view.id].keys()
            touched |= meant - settable

    @precondition(has_views)
    @rule(plan=plans, at=which, gfn=gfns, new_gfn=gfns, access=st.none() | accesses)
    def remap(self, plan: Plan, at: int, gfn: int, new_gfn: int, access: Access | None) -> None:
        view = self.view(at)
        possible = self.can_be_set(view, gfn) and self.can_be_set(view, new_gfn)
        remaps, touched = self.remaps[view.id], self.touched[view.id]

        def effect(all_met: Met) -> None:
            was, new = all_met[view.id, gfn], all_met[view.id, new_gfn]
            assert was is not None
            assert new is not None
            number = was[1] if access is None else NUMBERS.get(access, HOST_DEFAULT)
            all_met[view.id, gfn] = new[0], number

        self.ever_targets |= {new_gfn, *remaps.values()}
        refused = None if possible else NotMappedError
        with self.doing(plan, effect, view=view, refused=refused) as errors:
            view.remap(gfn, new_gfn, access=access)
        if not errors:
            shown = remaps.get(new_gfn, new_gfn)
            remaps[gfn] = shown
            if shown == gfn:
                del remaps[gfn]
            touched.discard(gfn)
            touched |= {gfn} if new_gfn in touched else set()
        model = self.guest.views[view.id]
        if not view.closed and model.min_remapped <= model.max_remapped:
            self.targets[view.id] += [model.min_remapped, model.max_remapped]
            assert all(map(view.tracks, self.targets[view.id]))

    @precondition(has_views)
    @rule(plan=plans, at=which, of=which, gfn=gfns)
    def revert(self, plan: Plan, at: int, of: int, gfn: int) -> None:
        view = self.view(at)
        remaps = self.remaps[view.id]
        if of and remaps:
            gfn = sorted(remaps)[of % len(remaps)]
        had_entry = self.guest.views[view.id].table.lookup(gfn).mapped

        def effect(all_met: Met) -> None:
            if had_entry:
                all_met[view.id, gfn] = self.lazy(view.id, gfn)

        if gfn in self.touched[view.id]:  # a host write may have put its own page back
            self.ever_targets.add(gfn)
        refused = None if gfn in remaps else InvalidArgumentError
        with self.doing(plan, effect, view=view, refused=refused) as errors:
            view.revert(gfn)
        if not errors:
            del remaps[gfn]

    @precondition(has_views)
    @rule(plan=plans, at=which, where=some_gfns, suppress_ve=st.booleans())
    def set_suppress_ve(self, plan: Plan, at: int, where: Gfns, suppress_ve: bool) -> None:
        view = self.view(at)
        table = self.guest.views[view.id].table
        fresh = [gfn for gfn in listed(where) if not table.lookup(gfn).mapped]

        def effect(all_met: Met) -> None:
            for gfn in fresh:  # Xen makes entries with the host's access, not the view's default
                own, host = table.lookup(gfn), self.guest.host.lookup(gfn)
                if own.mapped and own.access == host.access:
                    all_met[view.id, gfn] = host.mfn, host.access

        possible = not isinstance(where, int) or self.can_be_set(view, where)
        refused = None if possible else NotMappedError
        with self.doing(plan, effect, view=view, refused=refused):
            for failure in view.set_suppress_ve(where, suppress_ve):
                # It was asked for, and Xen does not tell of the others that failed.
                self.touched[view.id] |= {gfn for gfn in listed(where) if gfn >= failure.gfn}

    @precondition(has_views)
    @rule(plan=plans, at=which, visible=st.booleans())
    def set_visibility(self, plan: Plan, at: int, visible: bool) -> None:
        with self.doing(plan):
            self.view(at).set_visibility(visible)

    @precondition(is_open)
    @rule(plan=plans, at=st.none() | which)
    def switch_to_view(self, plan: Plan, at: int | None) -> None:
        assert self.altp2m is not None
        view = None if at is None or not self.open else self.view(at)
        hidden = view is not None and not view.visible
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with self.doing(plan, refused=InvalidArgumentError if hidden else None) as errors:
                self.altp2m.switch_to_view(view)
        if not errors:
            number = 0 if view is None else view.id
            assert [vcpu.view for vcpu in self.guest.vcpus] == [number] * 2
            prior = {self.before_open[f"vCPU {vcpu} of domain 1"] for vcpu in (0, 1)}
            self.vcpus_moved |= len(prior) > 1  # they cannot go back each to its own

    @precondition(is_open)
    @rule(plan=plans, vcpu=st.integers(0, 1), gfn=ram)
    def notify(self, plan: Plan, vcpu: int, gfn: int) -> None:
        assert self.altp2m is not None
        frame, had = self.guest.host.lookup(gfn).mfn, self.guest.vcpus[vcpu].veinfo
        refused = AlreadyError if had is not None else InvalidArgumentError
        fine = had is None and self.guest.host.lookup(gfn).mapped
        with self.doing(plan, refused=None if fine else refused) as errors:
            self.altp2m.enable_notify(vcpu, gfn)
        assert self.guest.vcpus[vcpu].veinfo == (had if errors else frame)

    @precondition(is_open)
    @rule(plan=plans, vcpu=st.integers(0, 1))
    def stop_notifying(self, plan: Plan, vcpu: int) -> None:
        assert self.altp2m is not None
        had = self.guest.vcpus[vcpu].veinfo
        with self.doing(plan) as errors:
            self.altp2m.disable_notify(vcpu)
        assert self.guest.vcpus[vcpu].veinfo == (had if errors else None)

    # The domain.

    @precondition(lambda machine: len(machine.added) < 2)
    @rule(plan=plans, count=st.integers(1, 2))
    def add_pages(self, plan: Plan, count: int) -> None:
        before = self.state()
        self.mock.start(plan)
        try:
            with self.with_memory():  # without, Xen would lose a page that it has taken
                added = self.dom.add_pages(count)
        except LeftoverError:
            self.close_the_domain({})
        except XenError:
            assert plan
            assert changes(before, self.state()) == set()
        else:
            assert self.guest.pages == before["pages of domain 1"] + count
            assert self.guest.max_pages == before["memory limit of domain 1"] + count
            self.added.append(added)
        self.mock.start({})

    @precondition(lambda machine: bool(machine.added))
    @rule(plan=plans, of=which)
    def remove_pages(self, plan: Plan, of: int) -> None:
        gone = self.added[of % len(self.added)]
        tracked = any(
            min(ends) <= gfn <= max(ends)
            for number, ends in self.targets.items()
            if number in self.open and ends
            for gfn in gone
        )
        before = self.state()
        self.mock.start(plan)
        try:
            self.dom.remove_pages(gone)
        except BusyError:
            assert tracked
            assert changes(before, self.state()) == set()
            return
        except LeftoverError:
            self.mock.start({})
            self.dom.remove_pages(gone)
        finally:
            self.mock.start({})
        assert not tracked
        self.added.remove(gone)
        self.changed_behind(gone)

    @rule(plan=plans)
    def pause(self, plan: Plan) -> None:
        with self.doing(plan) as errors:
            self.dom.pause()
        self.pauses += not errors

    @rule(plan=plans)
    def unpause(self, plan: Plan) -> None:
        refused = None if self.guest.pauses else InvalidArgumentError
        with self.doing(plan, refused=refused) as errors:
            self.dom.unpause()
        if self.pauses:
            self.pauses -= not errors
        elif not errors:
            self.guest.pauses += 1  # xl pause

    @rule(plan=plans, gfn=gfns, data=st.binary(max_size=16))
    def use_memory(self, plan: Plan, gfn: int, data: bytes) -> None:
        address = (gfn << 12) + 4090
        pages = range(gfn, ((address + len(data) - 1) >> 12) + 1) if data else ()
        fine = all(self.guest.host.lookup(page).type == PageType.RAM_RW for page in pages)
        with self.doing(plan, refused=None if fine else InvalidArgumentError) as errors:
            self.dom.memory.write(address, data)
            assert self.dom.memory.read(address, len(data)) == data
        if errors and isinstance(errors[0], LeftoverError):
            self.close_the_domain({})

    @rule(plan=plans)
    def close_the_domain(self, plan: Plan) -> None:
        self.mock.start({})
        self.close_altp2m({})
        self.mock.start(plan)
        with suppress(LeftoverError):
            self.dom.close()
        self.mock.start({})
        self.dom.close()
        assert changes(self.origin, self.state()) == set()
        self.dom = self.xen.domain(1)
        self.added.clear()
        self.pauses = 0

    # What others do.

    @rule(spare=st.sampled_from([0, 1, 2, 3, 5, 4096]))
    def memory_runs_out(self, spare: int) -> None:
        """Just so much is left of the p2m pool; what others do finds enough all the same."""
        self.guest.pool.pages = self.guest.pool.used + spare

    @contextmanager
    def with_memory(self) -> Iterator[None]:
        pages, self.guest.pool.pages = self.guest.pool.pages, 4096
        try:
            yield
        finally:
            self.guest.pool.pages = max(pages, self.guest.pool.used)

    def changed_behind(self, changed: range | list[int]) -> None:
        for touched in self.touched.values():
            touched.update(changed)

    @rule(gfn=ram, number=st.sampled_from([0, 1, 5, 7]))
    def host_access_changes(self, gfn: int, number: int) -> None:
        if self.guest.host.lookup(gfn).mapped:
            with self.with_memory():
                self.guest.set_mem_access(0, gfn, number)
            self.host_changed(gfn)
            self.changed_behind([gfn])

    @rule(gfn=ram)
    def guest_gives_a_page_back(self, gfn: int) -> None:
        host = self.guest.host.lookup(gfn)
        if host.mapped and all(vcpu.veinfo != host.mfn for vcpu in self.guest.vcpus):
            with self.with_memory():
                assert self.guest.remove_page(gfn)
            self.host_changed(gfn)
            self.changed_behind(GFNS)  # it may have reset views

    def host_changed(self, gfn: int) -> None:
        """From now on this is how it is to be again, in the other agent's view, too."""
        now = self.state()
        for state in (self.origin, self.before_open):
            for name in state.keys() & now.keys():
                if name.startswith((f"page {gfn:#x} of", *(f"gfn {at:#x} in" for at in RAM))):
                    state[name] = now[name]
        self.origin["pages of domain 1"] = self.guest.pages - sum(map(len, self.added))

    @precondition(lambda machine: machine.guest.active)
    @rule(vcpu=st.integers(0, 1), number=st.integers(0, 9))
    def a_response_moves_a_vcpu(self, vcpu: int, number: int) -> None:
        self.guest.switch_vcpu(self.guest.vcpus[vcpu], number)
        self.vcpus_moved = True
        if self.altp2m is None:
            self.vcpus_are_to_stay()

    @precondition(lambda machine: machine.guest.active)
    @rule(vcpu=st.integers(0, 1), gfn=ram)
    def guest_uses_a_page(self, vcpu: int, gfn: int) -> None:
        page = met(self.guest, self.guest.vcpus[vcpu].view, gfn)
        rights = "" if page is None else RIGHTS[page[1]]
        if "r" in rights:
            with self.with_memory(), self.doing({}):
                for kind in rights:
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
        for gfn in set(RAM) - self.ever_targets:
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
                if run.suppress_ve is not None and self.can_be_set(view, gfn):
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
