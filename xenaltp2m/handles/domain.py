# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handle of a domain: its state, memory, added pages, altp2m and monitor."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from uuid import UUID

from xenaltp2m.errors import BusyError, InvalidArgumentError, not_known
from xenaltp2m.handles.altp2m import Altp2m
from xenaltp2m.handles.base import Handle, UndoList
from xenaltp2m.handles.context import Connection, DomainContext
from xenaltp2m.handles.hazards import Hazard, check_names, survey
from xenaltp2m.handles.memory import Memory
from xenaltp2m.handles.monitor import Monitor, subscription
from xenaltp2m.handles.pages import AddedPages
from xenaltp2m.handles.probe import existing_views, own_access
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.handles.vcpu import Vcpu, registers_of, vcpus_of
from xenaltp2m.types import (
    ALL_GFNS,
    HOST_VIEW,
    HVM_PARAM_ALTP2M,
    Access,
    Altp2mMode,
    DomainInfo,
    DomId,
    Gfn,
    ViewInfo,
)
from xenaltp2m.values.arguments import check_bytes, check_flag
from xenaltp2m.values.events import Event, Registers, Subscription
from xenaltp2m.values.gfns import check_gfn


class Domain(Handle):
    """A guest. Made by :meth:`xenaltp2m.handles.xen.Xen.domain`.

    Closing it closes its altp2m, removes the pages added through it and undoes its pauses, in this
    order, and nothing else.

    Attributes:
        xen: The host that it runs on.
        context: The state that its children share.
        uuid: Its uuid.
        memory: Its memory, as the host p2m maps it.
    """

    def __init__(self, xen: Connection, context: DomainContext) -> None:
        super().__init__()
        self.xen = xen
        self.context = context
        self.uuid: UUID = context.uuid
        self.memory = Memory(context)
        self._backend = context.backend
        self._undo = context.undo
        self._pages = AddedPages(context)

    def __repr__(self) -> str:
        return repr(self.context)

    @property
    def domid(self) -> DomId:
        """The domain's number; a migration changes it."""
        return self.context.domid

    # Facts.

    def info(self) -> DomainInfo:
        """Read the domain's current state from the hypervisor.

        Raises:
            DomainNotFoundError: The domain was destroyed.

        ``xc_domain_getinfolist``.
        """
        return self.context.info()

    @property
    def name(self) -> str | None:
        """The domain's name in xenstore, if the toolstack gave it one, as xl does. ``xs_read``."""
        return self.context.name

    def config(self) -> dict[str, Any]:
        """Return the configuration that libxl keeps: memory, devices, altp2m mode and count.

        It may still list devices that were unplugged since. ``libxl_userdata_retrieve``.
        """
        return self.context.config()

    @property
    def altp2m_mode(self) -> Altp2mMode:
        """Who may use the domain's altp2m. ``xc_hvm_param_get(HVM_PARAM_ALTP2M)``."""
        self.check_open()
        mode = self._backend.hvm_param_get(self.domid, HVM_PARAM_ALTP2M)
        try:
            return Altp2mMode(mode)
        except ValueError:
            raise not_known("the altp2m mode", mode, "hvm_param_get", self.domid) from None

    @property
    def altp2m_active(self) -> bool:
        """Whether altp2m is on now, whoever switched it on. ``xc_altp2m_get_domain_state``."""
        return self.context.altp2m_active

    @property
    def maximum_gfn(self) -> Gfn:
        """The highest gfn ever mapped; it never decreases. ``xc_domain_maximum_gpfn``."""
        return self.context.maximum_gfn

    def host_access(self, gfn: int) -> Access | None:
        """Return a gfn's access in the host p2m, or None for a hole; needs altp2m to be on.

        ``xc_altp2m_get_mem_access`` with view 0.
        """
        self.check_open()
        check_gfn(gfn)
        found = own_access(self._backend, self.domid, HOST_VIEW, gfn)
        if found is None:
            self._backend.altp2m_get_domain_state(self.domid)  # ESRCH if the domain is gone
        return found

    def existing_views(self) -> list[ViewInfo]:
        """List all views of the domain, whoever made them; empty if altp2m is off.

        View 0 is included, and nothing is changed. Xen has no call for this, so each possible
        number is probed: 10 numbers before Xen 4.21, 512 from then on. Xen does not report which
        views are hidden.

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
        """List the hazards to the domain's views, those that are refused by default first.

        :func:`xenaltp2m.handles.hazards.survey` also lists what could not be checked.

        Args:
            views: The number of views besides view 0 that the p2m pool must suffice for.
        """
        self.check_open()
        return list(survey(self.context, views).hazards)

    @uninterruptible
    def altp2m(self, *, accept: Collection[str] = ()) -> Altp2m:
        """Switch altp2m on, unless it is on, for as long as the result is open.

        Args:
            accept: Names of hazards to accept, such as ``("passthrough",)``. They are not
                checked for.

        Raises:
            HazardError: A view might be bypassed, and nothing would report it: see
                :meth:`hazards`.
            UnsupportedError: Xen was not booted with ``altp2m=1``, or the domain is PV.
            InvalidArgumentError: The domain was created without altp2m.
            BusyError: altp2m is open already, through this handle of the domain or another; or a
                process that had it open was killed.
        """
        check_names(accept)
        self.check_open()
        self.context.check_nobody_was_killed()
        if (other := self.context.anybodys_altp2m()) is not None:
            raise BusyError(
                f"{other!r} is open already: use it, or close it first", domid=self.domid
            )
        opened = self.context.altp2m = Altp2m(self.context, accept)
        return opened

    @uninterruptible
    def monitor(
        self, *subscriptions: Subscription | type[Event], access_required: bool = False
    ) -> Monitor:
        """Subscribe to events of the domain's vCPUs, for as long as the result is open.

        Open the monitor before remapping: Xen removes the ring's page from the guest, which resets
        every view whose range of remap targets contains it.

        Args:
            *subscriptions: Kinds of events, such as :class:`~xenaltp2m.values.events.MemAccess`,
                or the results of their ``on``, with options.
            access_required: Whether the domain crashes if a violation finds no monitor. It
                applies to the views only if altp2m is on already.

        Raises:
            BusyError: A monitor is or was active, in this process or another.
            UnsupportedError: This Xen or its library cannot report an event.

        ``xc_monitor_enable``, ``xc_monitor_*``.
        """
        self.check_open()
        check_flag("access_required", access_required)
        wanted = tuple(map(subscription, subscriptions))
        self.context.check_nobody_was_killed(imported=True)
        if (other := self.context.open_monitor) is not None:
            raise BusyError(
                f"{other!r} is open already: use it, or close it first", domid=self.domid
            )
        opened = self.context.monitor = Monitor(self.context, wanted, access_required)
        return opened

    @property
    def open_altp2m(self) -> Altp2m | None:
        """The open altp2m of this handle."""
        found = self.context.open_altp2m
        return found if isinstance(found, Altp2m) else None

    @property
    def open_monitor(self) -> Monitor | None:
        """The open monitor of this handle."""
        found = self.context.open_monitor
        return found if isinstance(found, Monitor) else None

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
        return Vcpu(self.context, number)

    def vcpus(self) -> list[Vcpu]:
        """List the domain's vCPUs."""
        return vcpus_of(self.context)

    def registers(self) -> Registers:
        """Read the registers of the first vCPU that is online.

        Raises:
            XenError: No vCPU is online.

        ``xc_domain_hvm_getcontext_partial``.
        """
        return registers_of(self.context)

    def pause(self) -> None:
        """Pause the domain; each pause needs its own :meth:`unpause`. ``xc_domain_pause``."""
        self.context.pause()

    def unpause(self) -> None:
        """Undo one :meth:`pause` of this handle, or one of the toolstack's.

        If ``xl create -p`` or ``xl pause`` has left the domain paused, it runs from then on:
        closing the handle does not pause it again.

        Raises:
            InvalidArgumentError: The domain is not paused.
            BusyError: The pause belongs to another agent, or to another handle.

        ``xc_domain_unpause``.
        """
        self.context.unpause()

    def paused(self) -> AbstractContextManager[None]:
        """Keep the domain paused within a ``with`` block.

        Raises:
            LeftoverError: It is still paused; closing the domain tries again.
        """
        return self.context.paused()

    # Added pages.

    def add_pages(self, count: int = 1) -> range:
        """Add pages to the domain, above the highest gfn it ever had, for shadow pages.

        The domain's memory limit is raised for them. Closing removes the pages and lowers the
        limit, after the views are destroyed. On error nothing is left.

        Args:
            count: The number of pages.

        Returns:
            Their gfns. They are consecutive, to keep the range of remap targets that Xen tracks
            small.

        Raises:
            BusyError: The host has no memory left.

        ``xc_domain_setmaxmem``, ``xc_domain_populate_physmap_exact``.
        """
        return self._pages.add(count)

    def remove_pages(self, gfns: range) -> None:
        """Remove pages that :meth:`add_pages` added, without waiting for the close.

        Args:
            gfns: The range that :meth:`add_pages` returned, unchanged.

        Raises:
            InvalidArgumentError: They were not added through this handle.
            BusyError: A view has remapped something to them, or around them: Xen would reset
                that view. Destroy it first.
            LeftoverError: Some could not be removed; a second call tries only those.
        """
        self._pages.remove(gfns)

    # Closing.

    @uninterruptible
    def leave_as_it_is(self, content: bytes) -> None:
        """Close, but leave all changes in the domain, to be undone later.

        Args:
            content: The description of these changes, for the journal.
        """
        self.check_open()
        check_bytes("content", content)
        self.context.journal.keep(content)
        self.context.shared.begin_journal(self.domid)
        if self.context.altp2m is not None:
            self.context.altp2m.abandon()
        self._end()

    @uninterruptible
    def abandon(self) -> None:
        """Close without undoing anything: the domain, with its altp2m, is gone."""
        context = self.context
        self._end()
        if not context.shared.open_contexts():
            context.journal.forget()
        for opened in (context.altp2m, context.monitor, *context.detachables()):
            if opened is not None:
                opened.abandon()

    def _end(self) -> None:
        self.context.closed = True
        super().abandon()

    def _take_back(self) -> None:
        """Close its altp2m and its monitor, then remove added pages, then undo its pauses."""
        doing = f"closing {self!r}"
        undo = UndoList()
        undo.push("", lambda: self.context.pauses.unwind(doing))
        undo.push("", self.close_children)
        undo.unwind(doing)

    def close_children(self) -> None:
        """Close everything that is open through this handle, and remove added pages."""
        context, doing = self.context, f"closing {self!r}"
        undo = UndoList()
        for gfns in context.added:
            undo.push("", partial(self._pages.remove_at_end, gfns))
        undo.push("", lambda: self._undo.unwind(doing))
        for opened in (context.open_monitor, context.open_altp2m, *context.detachables()):
            if opened is not None:
                undo.push("", opened.close)
        undo.unwind(doing)

    def _orphaned(self) -> bool:
        return self.context.is_gone()
