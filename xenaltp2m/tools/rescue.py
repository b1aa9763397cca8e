# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recover a domain whose agent was killed, at any instruction.

First a diagnosis is made, from Xen and from the journals of processes that have ended. Then vCPUs
leave all views, altp2m is switched off, single-steps end, each waiting vCPU gets a response, the
ring is disabled, added pages are removed, the memory limit is restored, and pauses end. Each step
can be repeated: a step that fails is reported, and the others are still taken.

Without a journal, the rescue undoes what Xen reports. What Xen does not report is listed as
unknown: which pages an agent had added, how often it had paused the domain, whether altp2m was on
before.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from xenaltp2m.abi.ring import Ring
from xenaltp2m.abi.vm_event import Flag, layout
from xenaltp2m.errors import (
    BusyError,
    DomainNotFoundError,
    InvalidArgumentError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handles.context import Connection
from xenaltp2m.handles.journal import Found, Journal, Pages, Record, find
from xenaltp2m.handles.probe import existing_views, has_ring
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.handles.xen import Xen
from xenaltp2m.types import (
    HOST_VIEW,
    HVM_PARAM_ALTP2M,
    PAGE_SIZE,
    SINGLE_STEP_OFF,
    Altp2mMode,
    DomainInfo,
)
from xenaltp2m.values.arguments import check_flag, check_kind

_LOG = logging.getLogger(__name__)
_KIB_PER_PAGE = PAGE_SIZE // 1024
_TRIES = 20
_SETTLE = 0.01
"""Seconds in which vCPUs that wait for space in a ring leave it."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The diagnosis of a domain.

    Attributes:
        domain: The domain.
        paused: Whether it is paused.
        altp2m: Whether altp2m is on.
        mixed: Whether the guest may have switched it on itself.
        views: The views that vCPUs are in, by vCPU; empty if altp2m is off.
        ring: Whether a monitor's ring is enabled.
        killed: Journals of killed processes, with changes to undo.
        imported: Journals of processes that left views on purpose.
        working: Journals of running processes.
        unreadable: Journals that cannot be read, or belong to another domain, and why.
        empty: Journals of killed processes without changes to undo.
    """

    domain: DomainInfo
    paused: bool
    altp2m: bool
    mixed: bool
    views: dict[int, int]
    ring: bool
    killed: tuple[Found, ...]
    imported: tuple[Found, ...]
    working: tuple[Found, ...]
    unreadable: tuple[Found, ...]
    empty: tuple[Found, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing needs to be done: no agent was killed, and none has left anything."""
        ours = self.altp2m and not (self.mixed or self.imported)
        return not self.killed and (bool(self.working) or not (ours or self.ring))

    def lines(self) -> list[str]:
        """Describe the diagnosis, a line for each finding."""
        found = [
            f"process {one.pid} was killed and has left: {_left(one.record)}" for one in self.killed
        ]
        found += [
            f"views were imported by process {one.pid}: {_left(one.record)}"
            for one in self.imported
        ]
        found += [f"process {one.pid} works on it, and is running" for one in self.working]
        for one in self.unreadable:
            found.append(f"{one.path} is of no use: {one.why_not}")
        if self.ring:
            found.append("a monitor's ring is enabled")
        if self.altp2m:
            inside = sorted(vcpu for vcpu, view in self.views.items() if view != HOST_VIEW)
            where = f", and vCPUs {inside} are in views" if inside else ""
            found.append(f"altp2m is on{where}")
        if self.paused:
            found.append("the domain is paused")
        return found


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a rescue, taken or planned."""

    what: str
    error: XenError | None = None
    """Why it failed; None if it did not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a rescue.

    Attributes:
        before: The diagnosis before it.
        steps: The steps taken, or planned with ``dry_run``, in order.
        unknown: What could not be determined.
    """

    before: Diagnosis
    steps: tuple[Step, ...]
    unknown: tuple[str, ...]

    @property
    def failed(self) -> tuple[Step, ...]:
        """The steps that failed; another rescue tries them again."""
        return tuple(step for step in self.steps if step.error is not None)


def diagnose(xen: Connection, which: int | str | UUID) -> Diagnosis:
    """Diagnose a domain without changing it.

    One exception: responses that a killed process had put into its ring, without notifying Xen,
    take effect now, because the check for a ring makes Xen read it.

    Args:
        xen: The host; its ``journals`` are read.
        which: The domain, as for :meth:`Xen.domain`.

    Raises:
        DomainNotFoundError: There is no such domain.
        JournalError: The journals' directory cannot be trusted.
    """
    check_kind("xen", xen, Xen, "a connection")
    info, backend = xen.find(which), xen.backend
    domid = int(info.domid)
    active = False
    with suppress(XenError):
        active = backend.altp2m_get_domain_state(domid)
    views = {}
    if active:
        for vcpu in range(info.max_vcpu_id + 1):
            with suppress(XenError):
                views[vcpu] = int(backend.altp2m_get_vcpu_p2m_idx(domid, vcpu))
    journals = [] if xen.journals is None else find(xen.journals, domid, info.uuid)
    useful = [found for found in journals if found.record is not None and not found.why_not]
    return Diagnosis(
        info,
        info.paused,
        active,
        active and backend.hvm_param_get(domid, HVM_PARAM_ALTP2M) == Altp2mMode.MIXED,
        views,
        has_ring(backend, domid),
        tuple(one for one in useful if not (one.alive or one.kept) and one.record),
        tuple(found for found in useful if found.kept),
        tuple(found for found in useful if found.alive),
        tuple(found for found in journals if found not in useful),
        tuple(found for found in useful if not found.alive and not found.record),
    )


def rescue(
    xen: Connection,
    which: int | str | UUID,
    *,
    dry_run: bool = False,
    force: bool = False,
    imported: bool = False,
) -> Outcome:
    """Recover a domain whose agent was killed.

    Args:
        xen: The host.
        which: The domain, as for :meth:`Xen.domain`.
        dry_run: Change nothing, and return the planned steps.
        force: Proceed even if a process that works on the domain is running, or nothing is found
            to be wrong: a vCPU may wait for a response all the same. Imported views are removed.
        imported: Remove imported views, whatever else is found.

    Raises:
        BusyError: A process that works on the domain is running.
        DomainNotFoundError: There is no such domain.
    """
    for name, flag in ("dry_run", dry_run), ("force", force), ("imported", imported):
        check_flag(name, flag)
    before = diagnose(xen, which)
    if before.working and not force:
        pids = ", ".join(str(found.pid) for found in before.working)
        raise BusyError(
            f"process {pids} works on domain {before.domain.domid}, and is running",
            domid=int(before.domain.domid),
            hint=("end that process first, by SIGTERM; --force rescues the domain while it runs",),
        )
    return _Rescuer(xen, before, dry_run, force, imported or force).run()


class _Rescuer:
    """Takes the steps of one rescue."""

    def __init__(
        self, xen: Connection, before: Diagnosis, dry_run: bool, force: bool, imported: bool
    ) -> None:
        self._backend = xen.backend
        self._before = before
        self._domid = int(before.domain.domid)
        self._vcpus = range(before.domain.max_vcpu_id + 1)
        self._dry, self._force = dry_run, force
        self._journals = before.killed + (before.imported if imported else ())
        # A rescue may be killed, too, so it keeps a journal.
        self._journal = Journal(xen.journals, self._domid, before.domain.uuid)
        self._steps: list[Step] = []

    @uninterruptible  # a part of it would leave the domain paused, or without responses
    def run(self) -> Outcome:
        """Take the steps."""
        try:
            return self._run()
        finally:
            if self._is_gone():
                self._journal.forget()
            self._journal.close()

    def _run(self) -> Outcome:
        before = self._before
        for found in (*before.empty, *before.unreadable):
            if not (found.alive or self._dry):
                with suppress(OSError):
                    found.remove()
        if before.healthy and not (self._journals or self._force):
            return Outcome(before, (), self._unknown())
        records = [found.record for found in self._journals if found.record is not None]
        # Without a ring a vCPU may still wait, because an earlier rescue was killed.
        has_ring = before.ring or self._force or any(record.monitor for record in records)
        with self._standing_still():
            if self._may_leave_views(records):
                self._leave_views(records)
            if has_ring:
                self._take("single-steps end", self._end_steps)
        if has_ring:
            # vCPUs that wait for space in the ring must run to notice that the ring is gone.
            self._take(
                "each waiting vCPU gets a response, and the ring is disabled", self._end_ring
            )
        for record in records:
            self._take_back(record)
        for found in self._journals:
            if not any(step.error for step in self._steps):
                self._take(f"{found.path} is removed", found.remove)
        return Outcome(before, tuple(self._steps), self._unknown())

    def _may_leave_views(self, records: list[Record]) -> bool:
        """Return whether there are views of an agent, not the guest's own or imported ones."""
        before = self._before
        if set(before.imported) - set(self._journals):
            return False
        return before.altp2m and bool(records or self._force or not before.mixed)

    def _take(self, what: str, act: Callable[[], object]) -> None:
        error = None
        if not self._dry:
            try:
                act()
            except XenError as raised:
                if not self._is_gone():  # else the state went with the domain
                    error = raised
            except OSError as raised:
                error = XenError(f"{what}: {raised}", errno=raised.errno)
            if error is None:
                _LOG.warning("domain %d: %s", self._domid, what)
            else:
                _LOG.error("domain %d: %s: %s", self._domid, what, error.message)
        self._steps.append(Step(what, error))

    def _is_gone(self) -> bool:
        """Return whether the domain is gone; its number may belong to another one by now."""
        try:
            found = self._info()
        except XenError:
            return False  # unknown
        return found is None or found.dying

    def _info(self) -> DomainInfo | None:
        for info in self._backend.domain_getinfolist(self._domid, 1):
            if (info.domid, info.uuid) == (self._domid, self._before.domain.uuid):
                return info
        return None

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Pause the domain in a ``with`` block."""
        if self._dry:
            yield
            return
        with self._unless_gone(), self._journal.about_to(pauses=1):
            self._backend.domain_pause(self._domid)
        try:
            yield
        finally:
            with self._unless_gone():
                self._backend.domain_unpause(self._domid)
            self._journal.undone(pauses=0)

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Ignore failures to change a domain that is gone."""
        try:
            yield
        except XenError:
            if not self._is_gone():
                raise

    def _leave_views(self, records: list[Record]) -> None:
        """Leave all views, except earlier ones if a journal says that altp2m was on before."""
        kept = [record for record in records if record.used]
        if not kept or any(record.altp2m for record in records):
            self._take("vCPUs go to view 0", self._switch_to(HOST_VIEW))
            self._take("altp2m is switched off, which destroys all views", self._switch_off)
            return
        prior = set.intersection(*(set(record.prior_views) for record in kept))
        where = kept[0].prior_view if kept[0].prior_view in prior else HOST_VIEW
        self._take(f"vCPUs return to view {where}", self._switch_to(where))
        try:
            existing = existing_views(self._backend, self._before.domain.domid)
        except XenError as error:
            self._steps.append(Step("the views that an agent created are destroyed", error))
            return
        for view in existing:
            if view not in {HOST_VIEW, *prior}:
                self._take(f"view {view} is destroyed", partial(self._destroy, view))

    def _switch_to(self, view: int) -> Callable[[], object]:
        return lambda: self._backend.altp2m_switch_to_view(self._domid, view)

    def _switch_off(self) -> None:
        self._backend.altp2m_set_domain_state(self._domid, False)

    def _destroy(self, view: int) -> None:
        self._backend.altp2m_destroy_view(self._domid, view)

    def _end_steps(self) -> None:
        for vcpu in self._vcpus:
            self._backend.domain_debug_control(self._domid, SINGLE_STEP_OFF, vcpu)

    def _end_ring(self) -> None:
        """Disable the old ring, and answer all vCPUs through a new one."""
        version = self._backend.vm_event_get_version()
        try:
            size = layout(version).size
        except LookupError as error:
            raise UnsupportedError(str(error), op="vm_event_get_version") from None
        self._journal.write(monitor=True)
        self._disable()
        with self._standing_still():
            self._journal.write(pauses=2)  # libxc pauses the domain, too (xc_vm_event_enable)
            remote, page = self._backend.monitor_enable(self._domid)
            self._journal.undone(pauses=1)
            try:
                self._answer_all(remote, page, version, size)
            finally:
                self._backend.monitor_unmap_ring(page)
        self._disable()
        self._journal.undone(monitor=False)

    def _disable(self) -> None:
        for attempt in range(_TRIES):
            try:
                self._backend.monitor_disable(self._domid)
            except BusyError:
                if attempt == _TRIES - 1:
                    raise
                self._backend.clock.sleep(_SETTLE)
            except InvalidArgumentError:
                return  # no ring is enabled
            else:
                return

    def _answer_all(self, remote: int, page: memoryview, version: int, size: int) -> None:
        ring = Ring(page, size)
        channel = self._backend.evtchn_open()
        try:
            ring.clear()
            port = self._backend.evtchn_bind_interdomain(channel, self._domid, remote)
            _, _, notify = self._backend.evtchn_calls(channel, port)
            for vcpu in self._vcpus:  # one that does not wait ignores it (vm_event_resume)
                ring.force(version, vcpu, int(Flag.VCPU_PAUSED))
                notify()
        finally:
            ring.release()
            self._backend.evtchn_close(channel)

    def _take_back(self, record: Record) -> None:
        for pages in reversed(record.pages):
            gfns = range(pages.first, pages.first + pages.count)
            what = f"added gfns {gfns.start:#x}..{gfns.stop - 1:#x} are removed"
            self._take(what, partial(self._remove, gfns))
            self._take("the memory limit is restored", partial(self._lower, pages))
        if record.access_required:
            self._take(
                "access_required is cleared",
                lambda: self._backend.domain_set_access_required(self._domid, False),
            )
        for _ in range(record.pauses):
            self._take("one pause ends", self._unpause)

    def _remove(self, gfns: range) -> None:
        for gfn in gfns:  # some may not have been added yet, or are gone already
            with suppress(InvalidArgumentError, BusyError):
                self._backend.domain_decrease_reservation_exact(self._domid, array("Q", [gfn]))

    def _lower(self, pages: Pages) -> None:
        info = self._info()
        if info is None:
            raise DomainNotFoundError(f"domain {self._domid} is gone", domid=self._domid)
        if info.max_pages >= pages.limit + pages.raised:  # else the agent had not raised it yet
            limit = info.max_pages - pages.raised
            self._backend.domain_setmaxmem(self._domid, limit * _KIB_PER_PAGE)

    def _unpause(self) -> None:
        with suppress(InvalidArgumentError):  # the agent had not paused it yet
            self._backend.domain_unpause(self._domid)

    def _unknown(self) -> tuple[str, ...]:
        """List what neither Xen nor a journal reports."""
        before = self._before
        if before.killed or before.working or before.imported:
            return ()
        found = []
        if (before.altp2m and not before.mixed) or before.ring:
            found.append("which pages an agent had added, and by how much it had raised the limit")
            found.append("whether altp2m was on before the agent")
        if before.mixed:
            found.append("whether the guest has switched altp2m on itself: --force switches it off")
        if before.paused:
            found.append("whether an agent or an administrator has paused it: xl unpause ends one")
        return tuple(found)


def _left(record: Record | None) -> str:
    if record is None:
        return "nothing known"
    parts = []
    if record.monitor:
        parts.append("a monitor")
    if record.altp2m:
        parts.append("altp2m switched on")
    if record.used:
        parts.append("views")
    if record.pages:
        parts.append(f"{sum(pages.count for pages in record.pages)} added pages")
    if record.pauses:
        parts.append(f"{record.pauses} pauses")
    if record.access_required:
        parts.append("access_required set")
    return ", ".join(parts)
