# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state that all handles of a domain share: its identity, journal, pauses and open children.

A connection makes a :class:`DomainContext` for each handle of a domain. Every child (memory, vCPUs,
altp2m, views, the monitor) takes the context, so that none of them needs the domain's class.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from xenaltp2m.abi.releases import Release
from xenaltp2m.backend.arguments import DOMID_LIMIT
from xenaltp2m.backend.protocol import Backend
from xenaltp2m.errors import (
    BusyError,
    ClosedError,
    DomainNotFoundError,
    InvalidArgumentError,
    LeftoverError,
    XenError,
    add_failure,
)
from xenaltp2m.handles.base import UndoList, in_words
from xenaltp2m.handles.journal import Journal, dead, find
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.types import DomainInfo, DomId, Gfn, ViewId
from xenaltp2m.values.events import Subscription

_LOG = logging.getLogger(__name__)
_DOMAINS_AT_ONCE = 256


class Closable(Protocol):
    """A handle, as its owner uses it."""

    closed: bool

    def close(self) -> None:
        """Undo what was done through it."""

    def abandon(self) -> None:
        """Close without undoing anything."""


class Connection(Closable, Protocol):
    """A connection to a host, as the layers below :class:`xenaltp2m.handles.xen.Xen` use it."""

    backend: Backend
    journals: Path | None

    @property
    def release(self) -> Release:
        """The hypervisor's release."""

    def domains(self) -> Iterator[DomainInfo]:
        """Yield every domain of the host."""

    def find(self, which: int | str | UUID) -> DomainInfo:
        """Return the hypervisor's information about a domain."""


class Detachable(Closable, Protocol):
    """A handle that is detached from its domain before a migration, and reattached after it."""

    def detach(self, later: UndoList) -> None:
        """Undo everything before a migration; steps put into ``later`` run after the views' own."""

    def reattach(self) -> None:
        """Restore everything after the migration."""


class TrackingView(Protocol):
    """A view that Xen resets when a certain page is removed."""

    @property
    def id(self) -> ViewId:
        """Its number."""


class ViewOwner(Closable, Protocol):
    """A domain's open altp2m, as the domain's other handles use it."""

    def tracking(self, gfn: int) -> Sequence[TrackingView]:
        """List the views that Xen would reset if ``gfn`` were removed from the domain."""

    def note_vcpus_moved(self) -> None:
        """Make closing move the vCPUs back, because a response to an event has moved some."""

    def move_vcpus_back(self) -> None:
        """Move the vCPUs back to the view that they were in."""


class EventListener(Closable, Protocol):
    """A domain's open monitor, as the domain's other handles use it."""

    access_required: bool

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        """The subscriptions that are enabled."""

    def note_page_removed(self) -> None:
        """Expect Xen to delay responses: a page was removed from one of the domain's p2m tables."""

    def forget_views(self) -> None:
        """Drop encoded responses: views have other numbers now."""


def domains_of(backend: Backend, first: int = 0) -> Iterator[DomainInfo]:
    """Yield every domain of a host, in order of domid. ``xc_domain_getinfolist``.

    Args:
        backend: The host's backend.
        first: The lowest domid.
    """
    while first < DOMID_LIMIT:
        found = backend.domain_getinfolist(first, _DOMAINS_AT_ONCE)
        yield from found
        if len(found) < _DOMAINS_AT_ONCE:
            return
        first = found[-1].domid + 1


class SharedDomain:
    """A domain within one connection: its journal, and the contexts of all its handles."""

    def __init__(self, directory: Path | None, info: DomainInfo) -> None:
        self.uuid = info.uuid
        self.journal = Journal(directory, info.domid, info.uuid)
        self.contexts: list[DomainContext] = []

    def open_contexts(self) -> list[DomainContext]:
        """List the contexts of handles that are open."""
        self.contexts = [one for one in self.contexts if not one.closed]
        return self.contexts

    def begin_journal(self, domid: int) -> None:
        """Close the journal as it is, and begin a new one."""
        self.journal.close()
        self.journal = Journal(self.journal.directory, domid, self.uuid)

    @uninterruptible
    def renumber(self, info: DomainInfo) -> None:
        """Set the domain's domid after a migration, before anything is restored."""
        self.begin_journal(info.domid)
        for context in self.contexts:
            context.domid = info.domid


class DomainContext:
    """One handle of a domain, as its children see it.

    Attributes:
        backend: The host's backend.
        journals: The directory for journals, or None.
        shared: The state that all handles of the domain share.
        domid: The domain's number; a migration changes it.
        uuid: The domain's uuid.
        undo: Steps that children could not undo: closing the domain tries them again.
        altp2m: The altp2m opened last through this handle.
        monitor: The monitor opened last through this handle.
        added: Pages that were added through this handle, and how to remove them.
        pauses: Pauses made through this handle.
        closed: Whether the domain's handle is closed.
    """

    def __init__(
        self, backend: Backend, journals: Path | None, info: DomainInfo, shared: SharedDomain
    ) -> None:
        self.backend, self.journals, self.shared = backend, journals, shared
        self.domid: DomId = info.domid
        self.uuid: UUID = info.uuid
        self.undo = UndoList()
        self.altp2m: ViewOwner | None = None
        self.monitor: EventListener | None = None
        self.added: dict[range, UndoList] = {}
        self.pauses = UndoList()
        self.closed = False
        self._detachables: list[Detachable] = []
        shared.contexts = [*shared.open_contexts(), self]

    def __repr__(self) -> str:
        return f"<Domain {self.domid}>"

    @property
    def release(self) -> Release:
        """The hypervisor's release."""
        return self.backend.release

    @property
    def journal(self) -> Journal:
        """The domain's journal."""
        return self.shared.journal

    def check_open(self) -> None:
        """Raise if the domain's handle is closed.

        Raises:
            ClosedError: It is closed.
        """
        if self.closed:
            raise ClosedError(f"{self!r} is closed")

    # Facts.

    def info(self) -> DomainInfo:
        """Read the domain's current state from the hypervisor.

        Raises:
            DomainNotFoundError: The domain was destroyed.

        ``xc_domain_getinfolist``.
        """
        self.check_open()
        found = self.find()
        if found is None:
            raise DomainNotFoundError(
                f"domain {self.domid} ({self.uuid}) is gone", domid=self.domid
            )
        return found

    def find(self) -> DomainInfo | None:
        """Do as :meth:`info`, but return None if the domain was destroyed."""
        for found in self.backend.domain_getinfolist(self.domid, 1):
            if found.domid == self.domid and found.uuid == self.uuid:
                return found
        return None

    def is_gone(self) -> bool:
        """Check whether the domain is destroyed or dying: its domid may belong to another now."""
        try:
            found = self.find()
        except XenError:
            return False  # unknown
        return found is None or found.dying

    @property
    def name(self) -> str | None:
        """The domain's name in xenstore, if the toolstack gave it one. ``xs_read``."""
        self.check_open()
        return self.backend.domid_to_name(self.domid)

    @property
    def maximum_gfn(self) -> Gfn:
        """The highest gfn ever mapped; it never decreases. ``xc_domain_maximum_gpfn``."""
        self.check_open()
        return Gfn(self.backend.domain_maximum_gpfn(self.domid))

    @property
    def altp2m_active(self) -> bool:
        """Whether altp2m is switched on now. ``xc_altp2m_get_domain_state``."""
        self.check_open()
        return self.backend.altp2m_get_domain_state(self.domid)

    def config(self) -> dict[str, Any]:
        """Return the configuration that libxl keeps. ``libxl_userdata_retrieve``."""
        self.check_open()
        found = json.loads(self.backend.domain_config_json(self.domid))
        if not isinstance(found, dict):
            raise XenError(
                f"libxl's configuration of domain {self.domid} is not a JSON object",
                op="domain_config_json",
                domid=self.domid,
            )
        return found

    def view_count(self) -> int | None:
        """Return how many views the domain can have, view 0 included; None if that is unknown."""
        if not self.release.view_count_is_setting:
            return self.release.most_views
        with suppress(XenError, ValueError, KeyError, TypeError, AttributeError):
            return int(self.config()["b_info"]["altp2m_count"])
        return None

    # Open children, of this handle or of another handle of the same connection.

    @property
    def open_altp2m(self) -> ViewOwner | None:
        """The open altp2m of this handle."""
        return None if self.altp2m is None or self.altp2m.closed else self.altp2m

    @property
    def open_monitor(self) -> EventListener | None:
        """The open monitor of this handle."""
        return None if self.monitor is None or self.monitor.closed else self.monitor

    def anybodys_altp2m(self) -> ViewOwner | None:
        """Return the domain's open altp2m, whichever handle opened it."""
        for context in self.shared.open_contexts():
            if (found := context.open_altp2m) is not None:
                return found
        return None

    def tracking(self, gfn: int) -> Sequence[TrackingView]:
        """List the views that Xen would reset if ``gfn`` were removed from the domain."""
        altp2m = self.anybodys_altp2m()
        return [] if altp2m is None else altp2m.tracking(gfn)

    def note_page_removed(self) -> None:
        """Notify every monitor that a page was removed from one of the domain's p2m tables."""
        for monitor in self._monitors():
            monitor.note_page_removed()

    def note_views_renumbered(self) -> None:
        """Notify every monitor that views have other numbers now."""
        for monitor in self._monitors():
            monitor.forget_views()

    def _monitors(self) -> Iterator[EventListener]:
        for context in self.shared.open_contexts():
            if (found := context.open_monitor) is not None:
                yield found

    def register_for_migration(self, handle: Detachable) -> None:
        """Register a handle to be detached before a migration, and closed with the domain."""
        self._detachables = [*self.detachables(), handle]

    def detachables(self) -> list[Detachable]:
        """List the open handles that were registered for migration, in order of registration."""
        return [handle for handle in self._detachables if not handle.closed]

    def is_used(self) -> bool:
        """Check whether this handle holds anything that a migration must include."""
        return not self.closed and bool(
            self.open_altp2m or self.open_monitor or self.added or self.pauses or self.detachables()
        )

    def check_nobody_was_killed(self, *, imported: bool = False) -> None:
        """Raise if a killed process has left changes in the domain.

        Args:
            imported: Whether views that an import has left on purpose are allowed.

        Raises:
            BusyError: Changes were left; the hint says how to remove them.
        """
        for found in dead(self.journals, int(self.domid), self.uuid):
            if found.path.name == self.journal.name or (imported and found.kept):
                continue
            if found.kept:
                raise BusyError(
                    f"views were imported into domain {self.domid}",
                    domid=self.domid,
                    hint=(f"xenaltp2m state export FILE {self.domid} removes them",),
                )
            raise BusyError(
                f"process {found.pid} was killed while it worked on domain {self.domid}, and its "
                "changes are still in place",
                domid=self.domid,
                hint=(f"xenaltp2m rescue {self.domid} undoes them",),
            )

    # Pauses.

    @uninterruptible
    def pause(self) -> None:
        """Pause the domain; each pause needs its own :meth:`unpause`. ``xc_domain_pause``."""
        self.check_open()
        with self.journal.about_to(pauses=self.journal.record.pauses + 1):
            self.backend.domain_pause(self.domid)
        self.pauses.push(self._pause_words, self._unpause)

    @uninterruptible
    def unpause(self) -> None:
        """Undo one pause of this handle, or one of the toolstack's.

        Raises:
            InvalidArgumentError: The domain is not paused.
            BusyError: The pause belongs to another agent, or to another handle.

        ``xc_domain_unpause``.
        """
        self.check_open()
        if self.pauses:
            self._end_pause()
            return
        about: dict[str, Any] = {"op": "domain_unpause", "domid": int(self.domid)}
        if not self.info().paused:
            raise InvalidArgumentError(f"{self!r} is not paused", **about)
        if self.journal.record.pauses:
            raise BusyError(
                f"{self!r} is paused through another handle: unpause it through that one", **about
            )
        directory = self.journals
        for found in () if directory is None else find(directory, int(self.domid), self.uuid):
            if found.record and found.record.pauses and not found.why_not:
                raise BusyError(
                    f"process {found.pid} has paused {self!r}",
                    hint=(f"if it was killed: xenaltp2m rescue {self.domid}",),
                    **about,
                )
        self.backend.domain_unpause(self.domid)
        _LOG.info("%r: the toolstack's pause is undone", self)

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
        if not self.closed and self.pauses:  # else closing, or unpausing, has undone the pause
            self._unpause()
            self.pauses.drop()

    @property
    def _pause_words(self) -> str:
        return f"pause of domain {self.domid}"

    def _unpause(self) -> None:
        try:
            self.backend.domain_unpause(self.domid)
        except InvalidArgumentError:
            if self.info().paused:
                raise
            # Another agent has undone our pause.
        self.journal.undone(pauses=max(self.journal.record.pauses - 1, 0))
