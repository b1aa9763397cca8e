# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain: its facts, its memory, pages added to it, and its altp2m."""

from __future__ import annotations

import errno
import json
import logging
from array import array
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Unpack
from uuid import UUID

from xenaltp2m.altp2m import Altp2m
from xenaltp2m.arguments import check_flag, check_kind, check_number, check_seconds
from xenaltp2m.errors import (
    BusyError,
    DomainNotFoundError,
    InvalidArgumentError,
    LeftoverError,
    XenError,
    add_failure,
    not_known,
)
from xenaltp2m.events import Event, Registers, Subscription, shutdown_words
from xenaltp2m.handle import Handle, UndoList, in_words
from xenaltp2m.journal import Pages, dead, find
from xenaltp2m.memory import Memory
from xenaltp2m.monitor import Monitor, subscription
from xenaltp2m.signals import uninterruptible
from xenaltp2m.types import (
    ALL_GFNS,
    GFN_LIMIT,
    HOST_VIEW,
    HVM_PARAM_ALTP2M,
    PAGE_SHIFT,
    PAGE_SIZE,
    Access,
    Altp2mMode,
    DomainInfo,
    DomId,
    Gfn,
    ViewInfo,
)
from xenaltp2m.vcpu import Vcpu
from xenaltp2m.view import View, check_gfn, existing_views, own_access

if TYPE_CHECKING:
    from xenaltp2m.carrying import Carried
    from xenaltp2m.hazards import Hazard
    from xenaltp2m.tracing import Trace, TraceOptions
    from xenaltp2m.xen import Xen

_LOG = logging.getLogger(__name__)
_KIB_PER_PAGE = PAGE_SIZE // 1024
_UNLIMITED = (1 << 32) - 1
"""What ``xc_domain_setmaxmem`` makes of any more pages (``XEN_DOMCTL_max_mem``)."""


class _CarriedAlong(Protocol):
    """What can be laid down while its domain is carried."""

    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...
    def _lay_down(self, later: UndoList) -> None: ...
    def _take_up(self) -> None: ...


class Domain(Handle):
    """A guest. Made by :meth:`xenaltp2m.xen.Xen.domain`.

    Closing it closes its altp2m, takes back the pages added through it and its pauses, in this
    order, and nothing else.

    Attributes:
        xen: The host it is on.
        domid: Its number.
        uuid: Its uuid.
        memory: Its memory, as the host p2m has it.
    """

    def __init__(self, xen: Xen, info: DomainInfo) -> None:
        super().__init__()
        self.xen = xen
        self.domid: DomId = info.domid
        self.uuid: UUID = info.uuid
        self.memory = Memory(self)
        self._journal = xen._journal_of(info)
        self._backend = xen.backend
        self._altp2m: Altp2m | None = None
        self._monitor: Monitor | None = None
        self._added: dict[range, UndoList] = {}
        self._pauses = UndoList()
        self._along: list[_CarriedAlong] = []

    def __repr__(self) -> str:
        return f"<Domain {self.domid}>"

    # Facts.

    def info(self) -> DomainInfo:
        """Ask what the hypervisor knows of the domain now.

        Raises:
            DomainNotFoundError: It was destroyed.

        ``xc_domain_getinfolist``.
        """
        self._check_open()
        found = self._find()
        if found is None:
            raise DomainNotFoundError(
                f"domain {self.domid} ({self.uuid}) is gone", domid=self.domid
            )
        return found

    @property
    def name(self) -> str | None:
        """Its name in xenstore, if the toolstack gave it one, as for xl. ``xs_read``."""
        self._check_open()
        return self._backend.domid_to_name(self.domid)

    def config(self) -> dict[str, Any]:
        """Return the configuration that libxl keeps: memory, devices, altp2m mode and count.

        Devices that were unplugged since may still be in it. ``libxl_userdata_retrieve``.
        """
        self._check_open()
        found = json.loads(self._backend.domain_config_json(self.domid))
        if not isinstance(found, dict):
            raise XenError(
                f"libxl's configuration of domain {self.domid} is not a JSON object",
                op="domain_config_json",
                domid=self.domid,
            )
        return found

    @property
    def altp2m_mode(self) -> Altp2mMode:
        """Who may use the domain's altp2m. ``xc_hvm_param_get(HVM_PARAM_ALTP2M)``."""
        self._check_open()
        mode = self._backend.hvm_param_get(self.domid, HVM_PARAM_ALTP2M)
        try:
            return Altp2mMode(mode)
        except ValueError:
            raise not_known("the altp2m mode", mode, "hvm_param_get", self.domid) from None

    @property
    def altp2m_active(self) -> bool:
        """Whether altp2m is on now, through whichever handle. ``xc_altp2m_get_domain_state``."""
        self._check_open()
        return self._backend.altp2m_get_domain_state(self.domid)

    @property
    def maximum_gfn(self) -> Gfn:
        """The highest gfn ever mapped; it never shrinks. ``xc_domain_maximum_gpfn``."""
        self._check_open()
        return Gfn(self._backend.domain_maximum_gpfn(self.domid))

    def host_access(self, gfn: int) -> Access | None:
        """Return a gfn's access in the host p2m, or None for a hole; needs altp2m to be on.

        ``xc_altp2m_get_mem_access`` with view 0.
        """
        self._check_open()
        check_gfn(gfn)
        found = own_access(self._backend, self.domid, HOST_VIEW, gfn)
        if found is None:
            self._backend.altp2m_get_domain_state(self.domid)  # ESRCH where the domain is gone
        return found

    def _view_count(self) -> int | None:
        """How many views it can have, with view 0; None where nobody tells."""
        release = self._backend.release
        if not release.view_count_is_setting:
            return release.most_views
        with suppress(XenError, ValueError, KeyError, TypeError, AttributeError):
            return int(self.config()["b_info"]["altp2m_count"])
        return None

    def existing_views(self) -> list[ViewInfo]:
        """List the views there are, whoever made them, view 0 among them; none if altp2m is off.

        Nothing is changed. Xen has no such call: each number that a view may have is asked for,
        10 before Xen 4.21 and 512 from then on. Which views are hidden, it does not tell.

        ``xc_altp2m_get_suppress_ve``, ``xc_altp2m_get_mem_access`` of gfn ~0,
        ``xc_altp2m_get_vcpu_p2m_idx``.
        """
        if not self.altp2m_active:
            return []
        places = {vcpu.number: vcpu.view for vcpu in self.vcpus()}
        found = []
        for view in existing_views(self._backend, self.domid):
            number = self._backend.altp2m_get_mem_access(self.domid, view, ALL_GFNS)
            inside = tuple(vcpu for vcpu, where in places.items() if where == view)
            access = self._backend.release.access_by_number[number]
            found.append(ViewInfo(view, access, inside))
        return found

    # Control.

    def hazards(self, views: int = 1) -> list[Hazard]:
        """List what undermines views of the domain, what is refused by default first.

        :func:`xenaltp2m.hazards.survey` tells, too, what could not be found out.

        Args:
            views: For how many views besides view 0 the p2m pool is to suffice.
        """
        from xenaltp2m.hazards import survey

        self._check_open()
        check_number("views", views)
        return list(survey(self, views).hazards)

    @uninterruptible
    def altp2m(self, *, accept: Collection[str] = ()) -> Altp2m:
        """Switch altp2m on, unless it is on, for as long as the result is open.

        Args:
            accept: Names of hazards with which it is opened all the same, such as
                ``("passthrough",)``. They are not looked for.

        Raises:
            HazardError: A view might fail to hold and nobody would be told: see :meth:`hazards`.
            UnsupportedError: Xen was not booted with ``altp2m=1``, or the domain is PV.
            InvalidArgumentError: The domain was created without altp2m.
            BusyError: It is open already, through this handle of the domain or another; or a
                process was killed that had it open.
        """
        from xenaltp2m.hazards import check_names

        check_names(accept)
        self._check_open()
        self._check_nobody_was_killed()
        if (other := self._anybody_s_altp2m()) is not None:
            raise BusyError(
                f"{other!r} is open already: use it, or close it first", domid=self.domid
            )
        self._altp2m = Altp2m(self, accept)
        return self._altp2m

    @uninterruptible
    def monitor(
        self, *subscriptions: Subscription | type[Event], access_required: bool = False
    ) -> Monitor:
        """Listen to what the domain's vCPUs do, for as long as the result is open.

        Open it before remapping: taking the ring's page from the guest resets a view whose remap
        targets lie around it.

        Args:
            *subscriptions: Kinds of events, such as :class:`~xenaltp2m.events.MemAccess`, or what
                their ``on`` returns, with options.
            access_required: Whether the domain crashes rather than violate a view unheard. It
                reaches the views only if altp2m is on already.

        Raises:
            BusyError: A monitor is or was active, here or in another process.
            UnsupportedError: This Xen or its library cannot tell of an event.

        ``xc_monitor_enable``, ``xc_monitor_*``.
        """
        self._check_open()
        check_flag("access_required", access_required)
        wanted = tuple(map(subscription, subscriptions))
        self._check_nobody_was_killed(imported=True)
        if self._open_monitor is not None:
            raise BusyError(
                f"{self._monitor!r} is open already: use it, or close it first", domid=self.domid
            )
        self._monitor = Monitor(self, wanted, access_required)
        return self._monitor

    def trace(self, *functions: str, **options: Unpack[TraceOptions]) -> Trace:
        """Trace calls of functions.

        Args:
            *functions: Their names.
            **options: Those of :class:`xenaltp2m.tracing.Trace`, ``symbols`` among them.
        """
        from xenaltp2m.tracing import Trace

        self._check_open()
        return Trace(self, *functions, **options)

    def vcpu(self, number: int) -> Vcpu:
        """Return a vCPU.

        Raises:
            InvalidArgumentError: There is no such vCPU.
        """
        last = self.info().max_vcpu_id
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= last:
            raise InvalidArgumentError(
                f"domain {self.domid} has no vCPU {number!r}: 0 to {last}", domid=self.domid
            )
        return Vcpu(self, number)

    def vcpus(self) -> list[Vcpu]:
        """List its vCPUs."""
        return [Vcpu(self, number) for number in range(self.info().max_vcpu_id + 1)]

    def registers(self) -> Registers:
        """Read the registers of the first vCPU that is up.

        Raises:
            XenError: No vCPU is up.

        ``xc_domain_hvm_getcontext_partial``.
        """
        info = self.info()
        for number in range(info.max_vcpu_id + 1):
            try:
                return Vcpu(self, number).registers()
            except XenError as error:
                if error.errno != errno.ENODATA:  # hvm_save_one: VPF_down
                    raise
        why = f"it {shutdown_words(info.shutdown_reason)}" if info.shutdown else "all are offline"
        raise XenError(
            f"domain {self.domid} has no vCPU that is up: {why}",
            op="domain_hvm_getcontext_partial",
            errno=errno.ENODATA,
            domid=self.domid,
            hint=("start the guest, or bring a vCPU online, and try again",),
        )

    @uninterruptible
    def pause(self) -> None:
        """Stop the domain's vCPUs until as many :meth:`unpause`. ``xc_domain_pause``."""
        self._check_open()
        with self._journal.about_to(pauses=self._journal.record.pauses + 1):
            self._backend.domain_pause(self.domid)
        self._pauses.push(self._pause_words, self._unpause)

    @uninterruptible
    def unpause(self) -> None:
        """Take back one :meth:`pause` of this handle, or one of the toolstack's.

        A domain that ``xl create -p`` or ``xl pause`` has left paused runs then, for good: closing
        the handle does not pause it again.

        Raises:
            InvalidArgumentError: The domain is not paused.
            BusyError: The pause is another agent's, or another handle's, and not ours to take.

        ``xc_domain_unpause``.
        """
        self._check_open()
        if self._pauses:
            self._end_pause()
            return
        about: dict[str, Any] = {"op": "domain_unpause", "domid": int(self.domid)}
        if not self.info().paused:
            raise InvalidArgumentError(f"{self!r} is not paused", **about)
        if self._journal.record.pauses:
            raise BusyError(f"{self!r} is paused through another handle: unpause it there", **about)
        directory = self.xen.journals
        for found in () if directory is None else find(directory, int(self.domid), self.uuid):
            if found.record and found.record.pauses and not found.why_not:
                raise BusyError(
                    f"process {found.pid} has paused {self!r}",
                    hint=(f"if it was killed: xenaltp2m rescue {self.domid}",),
                    **about,
                )
        self._backend.domain_unpause(self.domid)
        _LOG.info("%r: the toolstack's pause is taken back", self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the domain paused within a ``with`` block.

        Raises:
            LeftoverError: It is still paused; closing the domain tries again.
        """
        undo = UndoList()
        try:
            undo.do(self._pause_words, self.pause, lambda _: self._end_pause())
            yield
        except BaseException as error:
            try:
                undo.unwind(in_words(error))
            except LeftoverError as failure:
                add_failure(error, failure)
            raise
        undo.unwind(f"unpausing {self!r}")

    def _end_pause(self) -> None:
        if not self.closed and self._pauses:  # closing, or unpausing, took the pause back
            self._unpause()
            self._pauses.drop()

    @property
    def _pause_words(self) -> str:
        return f"pause of domain {self.domid}"

    def _unpause(self) -> None:
        try:
            self._backend.domain_unpause(self.domid)
        except InvalidArgumentError:
            if self.info().paused:
                raise
            # Somebody else has taken our pause back.
        self._journal.undone(pauses=max(self._journal.record.pauses - 1, 0))

    def carried(self, *, seconds: float = 10.0) -> Carried:
        """Lay everything down for as long as a ``with`` block, in which the domain is carried.

        ``with dom.carried(): subprocess.run(["xl", "save", …])``, and ``xl restore``, or
        ``xl migrate`` to this very host. Breakpoints, watches, the monitor, views and added pages
        are taken back before, and made again after, through the same handles. Views' numbers and
        added pages' gfns may be others then. What the guest does in between, nobody hears of:
        restore it paused (``xl restore -p``) and unpause it after the block.

        Args:
            seconds: How long the domain may take, at the end, to be there.

        Returns:
            A context manager; what it yields has the views as a value.

        On error everything is taken back, and its handles are closed, but for the domain's own.

        Raises:
            BusyError: Somebody iterates over its monitor, it is used through another handle, views
                were imported into it or left by a process that was killed, or some gfns of a view
                show each other's pages. Then nothing has changed.
            InvalidArgumentError: It is paused through this handle.
            DomainNotFoundError: At the end: it is not there, by its uuid; all its handles are
                closed then.
        """
        check_seconds("seconds", seconds)
        from xenaltp2m.carrying import Carried

        return Carried(self, seconds)

    def _carry_along(self, handle: _CarriedAlong) -> None:
        """Have something laid down, too, before the domain is carried."""
        self._along = [*self._carried_along(), handle]

    def _carried_along(self) -> list[_CarriedAlong]:
        return [handle for handle in self._along if not handle.closed]

    @uninterruptible
    def _leave_as_it_is(self, content: bytes) -> None:
        """Close, with all that is made staying; what that is, for the journal."""
        self._journal.keep(content)
        self.xen._journals.pop(self.uuid).close()
        if self._altp2m is not None:
            self._altp2m.abandon()
        super().abandon()

    def _is_used(self) -> bool:
        """Whether the domain cannot be carried without this handle's knowing."""
        return not self.closed and bool(
            self._open_altp2m
            or self._open_monitor
            or self._added
            or self._pauses
            or self._carried_along()
        )

    # Pages of our own.

    @uninterruptible
    def add_pages(self, count: int = 1) -> range:
        """Give the domain new pages right above everything it ever had, for shadow pages.

        The memory limit is raised for them. Both are taken back on close, after the views.
        On error nothing is left.

        Args:
            count: How many.

        Returns:
            Their gfns, neighbours, so that the range of remap targets Xen keeps stays small.

        Raises:
            BusyError: The host has no memory left.

        ``xc_domain_setmaxmem``, ``xc_domain_populate_physmap_exact``.
        """
        self._check_open()
        check_number("count", count, least=1, most=GFN_LIMIT)
        first = self._backend.domain_maximum_gpfn(self.domid) + 1
        if first + count > GFN_LIMIT:
            raise InvalidArgumentError(f"{count} pages do not fit below gfn {GFN_LIMIT:#x}")
        gfns = range(first, first + count)
        limit = self.info().max_pages
        raised = min(count, _UNLIMITED - limit)
        undo = UndoList()
        noted = Pages(first, count, raised, limit)
        self._journal.write(pages=(*self._journal.record.pages, noted))
        undo.push("", partial(self._forget_pages, noted), needs_rest=True)
        try:
            self._set_limit(limit + raised)
            undo.push(
                f"memory limit of domain {self.domid}, raised for gfns {gfns.start:#x} and up",
                lambda: self._set_limit(self.info().max_pages - raised),
            )
            # Before the call, for one that fails may have given some.
            undo.push(_pages_words(self.domid, gfns), partial(self._take_pages, list(gfns)))
            self._backend.domain_populate_physmap_exact(self.domid, array("Q", gfns))
        except BaseException as error:
            self._roll_back(undo, error, heir=self._undo)
            raise
        self._added[gfns] = undo
        _LOG.info("%r: pages %#x..%#x added", self, gfns.start, gfns.stop - 1)
        return gfns

    @uninterruptible
    def remove_pages(self, gfns: range) -> None:
        """Take back pages that :meth:`add_pages` gave, before the close does.

        Args:
            gfns: Just what :meth:`add_pages` returned.

        Raises:
            InvalidArgumentError: They were not added through this handle.
            BusyError: A view has remapped something to them, or around them: Xen would reset
                that view. Destroy it first.
            LeftoverError: Some could not be taken back; again tries just those.
        """
        self._check_open()
        check_kind("gfns", gfns, range, "the range that add_pages returned")
        added = self._added.get(gfns)
        if added is None:
            raise InvalidArgumentError(
                f"gfns {gfns.start:#x}..{gfns.stop - 1:#x} are not pages this handle added",
                domid=self.domid,
            )
        self._check_untracked(gfns)
        added.unwind(f"removing pages of {self!r}")
        _LOG.info("%r: pages %#x..%#x removed", self, gfns.start, gfns.stop - 1)
        del self._added[gfns]

    def _check_untracked(self, gfns: range) -> None:
        for gfn in gfns:
            if views := self._tracking(gfn):
                raise BusyError(
                    f"gfn {gfn:#x} lies among the remap targets of {views[0]!r}, which Xen "
                    "would reset: destroy the view first",
                    domid=self.domid,
                    gfn=gfn,
                    view=views[0].id,
                )

    def _tracking(self, gfn: int) -> list[View]:
        altp2m = self._anybody_s_altp2m()
        return [] if altp2m is None else altp2m.tracking(gfn)

    def _take_pages(self, gfns: list[int]) -> None:
        """Take pages back, and out of ``gfns``; those that are gone already are passed over."""
        self._removed()
        try:
            self._backend.domain_decrease_reservation_exact(self.domid, array("Q", gfns))
        except XenError:
            for gfn in list(gfns):  # Xen has stopped at the first that is gone
                try:
                    self._backend.domain_decrease_reservation_exact(self.domid, array("Q", [gfn]))
                except XenError:
                    if self._is_memory(gfn):
                        raise
                gfns.remove(gfn)
        gfns.clear()

    def _forget_pages(self, noted: Pages) -> None:
        left = [pages for pages in self._journal.record.pages if pages != noted]
        self._journal.undone(pages=tuple(left))

    def _is_memory(self, gfn: int) -> bool:
        try:
            self.memory.read(gfn << PAGE_SHIFT, 1)
        except InvalidArgumentError:
            return False
        return True

    def _set_limit(self, pages: int) -> None:
        self._backend.domain_setmaxmem(self.domid, pages * _KIB_PER_PAGE)

    # Its end.

    def _finish(self, undo: UndoList) -> None:
        """Take back what was needed for a while; what fails is for the close to try again."""
        undo.unwind(f"reading or writing the memory of {self!r}", heir=self._undo)

    def _check_nobody_was_killed(self, *, imported: bool = False) -> None:
        """Refuse to begin where a process was killed and has left something.

        Args:
            imported: Whether it may be there that has left views on purpose.
        """
        for found in dead(self.xen.journals, int(self.domid), self.uuid):
            if found.path.name == self._journal.name or (imported and found.kept):
                continue
            if found.kept:
                raise BusyError(
                    f"views were imported into domain {self.domid}",
                    domid=self.domid,
                    hint=(f"xenaltp2m state export FILE {self.domid} takes them out",),
                )
            raise BusyError(
                f"process {found.pid} was killed while it worked on domain {self.domid}, and has "
                "left things behind",
                domid=self.domid,
                hint=(f"xenaltp2m rescue {self.domid} brings it back",),
            )

    @property
    def _open_altp2m(self) -> Altp2m | None:
        if self._altp2m is None or self._altp2m.closed:
            return None
        return self._altp2m

    @property
    def _open_monitor(self) -> Monitor | None:
        if self._monitor is None or self._monitor.closed:
            return None
        return self._monitor

    def _removed(self) -> None:
        """A page was taken from a p2m table of the domain."""
        for monitor in self._open_monitors():
            monitor.expect_delays()

    def _open_monitors(self) -> Iterator[Monitor]:
        """The domain's open monitor, through whichever handle of this connection."""
        for domain in self.xen._domains:
            if domain.uuid == self.uuid and (monitor := domain._open_monitor) is not None:
                yield monitor

    def _anybody_s_altp2m(self) -> Altp2m | None:
        """The domain's open altp2m, through whichever handle of this connection."""
        for domain in self.xen._domains:
            if domain.uuid == self.uuid and domain._open_altp2m is not None:
                return domain._open_altp2m
        return None

    @uninterruptible
    def abandon(self) -> None:
        """Close without undoing anything: the domain, with its altp2m, is gone."""
        super().abandon()
        if not any(other.uuid == self.uuid and not other.closed for other in self.xen._domains):
            self._journal.forget()
        if self._altp2m is not None:
            self._altp2m.abandon()
        if self._monitor is not None:
            self._monitor.abandon()
        for handle in self._carried_along():
            handle.abandon()

    def _take_back(self) -> None:
        """Close its altp2m and its monitor, then take back added pages, then pauses."""
        doing = f"closing {self!r}"
        undo = UndoList()
        undo.push("", lambda: self._pauses.unwind(doing))
        undo.push("", self._close_what_is_open)
        undo.unwind(doing)

    def _close_what_is_open(self) -> None:
        doing = f"closing {self!r}"
        undo = UndoList()
        for gfns in self._added:
            undo.push("", partial(self._remove_or_tell, gfns))
        undo.push("", lambda: self._undo.unwind(doing))
        if self._open_monitor is not None:
            undo.push("", self._open_monitor.close)
        if self._open_altp2m is not None:
            undo.push("", self._open_altp2m.close)
        for handle in self._carried_along():
            undo.push("", handle.close)
        undo.unwind(doing)

    def _remove_or_tell(self, gfns: range) -> None:
        if gfns not in self._added:
            return  # who had them added has taken them back, when the monitor was closed
        try:
            self.remove_pages(gfns)
        except BusyError as error:
            left = self._added[gfns].left
            raise LeftoverError(error.message, left=left, **error.context()) from error

    def _find(self) -> DomainInfo | None:
        for found in self._backend.domain_getinfolist(self.domid, 1):
            if found.domid == self.domid and found.uuid == self.uuid:
                return found
        return None

    def _orphaned(self) -> bool:
        try:
            found = self._find()
        except XenError:
            return False  # not known
        return found is None or found.dying


def _pages_words(domid: int, gfns: range) -> str:
    return f"pages {gfns.start:#x}..{gfns.stop - 1:#x} added to domain {domid}"
