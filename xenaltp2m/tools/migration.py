# SPDX-License-Identifier: LGPL-2.1-or-later
"""Save, restore or migrate a domain, with its views and pages detached meanwhile.

Xen saves none of them: views are not part of a saved domain, and added pages would be saved as the
guest's own. So everything is detached before, and recreated after, from the handles' state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from types import TracebackType
from typing import Self
from uuid import UUID

from xenaltp2m.errors import (
    BusyError,
    DomainNotFoundError,
    InvalidArgumentError,
    LeftoverError,
    StateError,
    XenError,
    add_failure,
)
from xenaltp2m.handles.altp2m import Altp2m
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.domain import Domain
from xenaltp2m.handles.hazards import check_names
from xenaltp2m.handles.xen import Xen
from xenaltp2m.tools.rescue import diagnose, rescue
from xenaltp2m.tools.state.capture import LOOKED_AT, capture, describe, monitor_state, restore
from xenaltp2m.types import DomainInfo
from xenaltp2m.values.arguments import check_kind, check_seconds
from xenaltp2m.values.state import MAX_FILE, State

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 0.05


class Migration:
    """Detaches everything for a ``with`` block in which the domain is migrated.

    ``with xa.Migration(dom): subprocess.run(["xl", "save", …])``, and ``xl restore``, or
    ``xl migrate`` to the same host. Breakpoints, watchpoints, the monitor, views and added pages
    are detached before, and recreated after, through the same handles. The views' numbers and the
    added pages' gfns may differ then. Events in between are not reported: restore the domain paused
    (``xl restore -p``) and unpause it after the block.

    On error everything is undone, and all handles of the domain but its own are closed.

    Attributes:
        state: The views, except those of breakpoints, with the content of added pages; None if
            altp2m was not open. Pass it to :func:`xenaltp2m.tools.state.capture.restore` if the
            domain goes to another host.
        gfns: The new gfns of added pages by their old ones; filled at the end.
    """

    def __init__(self, domain: Domain, *, seconds: float = 10.0) -> None:
        """Prepare to migrate a domain; entering the block detaches everything.

        Args:
            domain: The domain.
            seconds: How long to wait, at the end, for the domain to exist.

        Entering and leaving the block raise:

        Raises:
            BusyError: The monitor is being iterated, the domain is used through another handle,
                views were imported into it or left by a killed process, or some gfns of a view map
                each other's pages. Then nothing has changed.
            InvalidArgumentError: It is paused through this handle; or ``seconds`` is invalid.
            DomainNotFoundError: At the end: no domain has its uuid; then all its handles are
                closed.
        """
        check_kind("domain", domain, Domain, "a Domain")
        check_seconds("seconds", seconds)
        self._domain, self._seconds = domain, seconds
        self.state: State | None = None
        self.gfns: dict[int, int] = {}
        self._altp2m: Altp2m | None = None
        self._contents: list[tuple[range, list[bytes]]] = []
        self.reattach: list[Callable[[], None]] = []
        """The handles' ``reattach`` methods; the last detached comes first."""

    def __enter__(self) -> Self:
        self._check()
        try:
            self._detach_all()
            return self
        except BaseException as error:
            try:
                self._close_all(error)
            finally:
                self._let_go()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._domain.context.shared.renumber(self._await())
            self._take_all_up()
        except BaseException as failure:
            self._let_go()
            if error is None or not isinstance(failure, XenError):
                raise
            add_failure(error, failure)

    def _check(self) -> None:
        domain = self._domain
        context = domain.context
        context.check_open()
        context.check_nobody_was_killed()  # Xen would save its added pages as the guest's own
        for other in context.shared.open_contexts():
            if other is not context and other.is_used():
                raise BusyError(
                    f"another handle of domain {domain.domid} has altp2m, a monitor, pages or a "
                    "pause: close it first, or use one handle",
                    domid=domain.domid,
                )
        if context.pauses:
            raise InvalidArgumentError(
                f"{domain!r} is paused through this handle, and must run to be suspended: unpause "
                "it first",
                domid=domain.domid,
            )
        if (monitor := domain.open_monitor) is not None and monitor.iterating:
            raise BusyError(
                f"{monitor!r} is being iterated: end the iteration before the migration",
                domid=domain.domid,
            )
        if (altp2m := domain.open_altp2m) is None:
            return
        if not altp2m.switched_on:
            raise BusyError(
                f"altp2m of domain {domain.domid} was on before this process opened it: the views "
                "of another owner cannot be migrated",
                domid=domain.domid,
            )
        for view in altp2m.views:
            view.remaps_in_order()  # raises if gfns map each other's pages

    def _detach_all(self) -> None:
        domain = self._domain
        altp2m, monitor = domain.open_altp2m, domain.open_monitor
        if altp2m is not None:  # saved first: vCPUs leave once no event is reported
            self._altp2m, current, vcpu_views = altp2m, altp2m.current, altp2m.vcpu_views()
        heard = monitor_state(monitor)
        later = UndoList()
        domain.context.undo.push("", lambda: later.unwind(f"closing {domain!r}"))
        for handle in reversed(domain.context.detachables()):
            handle.detach(later)
            self.reattach.insert(0, handle.reattach)
        if monitor is not None:
            monitor.detach()
            self.reattach.insert(0, monitor.reattach)
        with domain.paused():
            if altp2m is not None:
                altp2m.detach()
                altp2m.current = current
                self.reattach.insert(0, lambda: altp2m.reattach(self.gfns))
            domain.context.undo.unwind(f"migrating {domain!r}")
            if altp2m is not None:
                self.state = describe(altp2m, heard, vcpu_views, contents=True)
            for gfns in list(domain.context.added):
                contents = list(map(domain.memory.read_page, gfns))
                domain.remove_pages(gfns)
                self._contents.append((gfns, contents))

    def _close_all(self, error: BaseException) -> None:
        """Undo everything, because something could not be detached or recreated."""
        undo = UndoList()
        undo.push("", self._domain.close_children)
        undo.roll_back(error, unless=self._domain.context.is_gone)

    def _let_go(self) -> None:
        """Close what is still detached, for good."""
        if self._altp2m is not None and self._altp2m.closed:
            self._altp2m.abandon()

    def _await(self) -> DomainInfo:
        """Wait for the domain, whatever its number is now, and return it."""
        domain = self._domain
        clock = domain.xen.backend.clock
        end = clock.monotonic() + self._seconds
        while True:
            with suppress(XenError):
                for info in domain.xen.domains():
                    if info.uuid == domain.uuid and not (info.dying or info.shutdown):
                        return info
            if clock.monotonic() > end:
                break
            clock.sleep(_LOOK_SECONDS)
        domain.abandon()
        raise DomainNotFoundError(
            f"domain {domain.uuid} has not come back within {self._seconds:g} s: its views are not "
            "recreated",
            hint=("pass Migration.state to xenaltp2m.tools.state.capture.restore",),
        )

    def _take_all_up(self) -> None:
        """Recreate everything, or nothing."""
        domain = self._domain
        with domain.paused():
            try:
                for gfns, contents in self._contents:
                    added = domain.add_pages(len(gfns))
                    self.gfns |= zip(gfns, added, strict=True)
                    for gfn, content in zip(added, contents, strict=True):
                        domain.memory.write_page(gfn, content)
                for take_up in self.reattach:
                    take_up()
                if self._altp2m is not None:
                    self._altp2m.verify(sample=LOOKED_AT)
            except BaseException as error:
                self._close_all(error)
                raise


# Without an agent: for toolstacks.


def import_views(
    xen: Xen, which: int | str | UUID, state: State, *, accept: Collection[str] = ()
) -> State:
    """Create the views of a state, and leave them in the domain when this process ends.

    No process answers violations of these views: Xen then lifts the restriction, page by page.

    Args:
        xen: The host, with a directory for journals, which record the views.
        which: The domain, as for :meth:`Xen.domain`.
        state: The state to create; it may come from another domain, or release.
        accept: See :meth:`Domain.altp2m`.

    Returns:
        The state as it was created, with the unused parts of ``state``; no event is subscribed to.

    Raises:
        UnsupportedError: :func:`xenaltp2m.tools.state.capture.obstacles` finds some.
        BusyError: A process works on the domain, or altp2m is on.
        JournalError: The journal cannot be written. After any error nothing is left.
    """
    check_kind("xen", xen, Xen, "a connection")
    check_kind("state", state, State, "a State")
    check_names(accept)
    with xen.domain(which) as domain:
        if domain.altp2m_active:
            raise BusyError(
                f"altp2m of domain {domain.domid} is on: another owner has views in it",
                domid=domain.domid,
            )
        altp2m = domain.altp2m(accept=accept)
        restore(altp2m, state)
        made = _with_more(capture(altp2m, contents=True), state)
        domain.leave_as_it_is(made.to_bytes())
    _LOG.info("domain %d: %d views imported, and left in it", domain.domid, len(made.views))
    return made


def _with_more(made: State, asked: State) -> State:
    """Add the unused parts of a state."""
    views = zip(made.views, asked.views, strict=True)
    pages = zip(made.pages, asked.pages, strict=True)
    return replace(
        made,
        views=tuple(replace(view, more=one.more) for view, one in views),
        pages=tuple(replace(page, more=one.more) for page, one in pages),
        monitor=asked.monitor,
        more=asked.more,
    )


def imported_views(xen: Xen, which: int | str | UUID) -> State:
    """Return the views imported into a domain, with the current content of added pages.

    Raises:
        StateError: None were imported, or their record is damaged.
        BusyError: A process works on the domain.
    """
    found = diagnose(xen, which)
    domid = int(found.domain.domid)
    if found.working:
        raise BusyError(
            f"process {found.working[0].pid} works on domain {domid}, and is running",
            domid=domid,
            hint=("that process has to migrate its views itself, with xa.Migration",),
        )
    if not found.imported:
        raise StateError(
            f"no views were imported into domain {domid}",
            domid=domid,
            hint=("xenaltp2m state save writes what Xen reports of other views",),
        )
    [journal, *_] = found.imported
    try:
        state = State.from_bytes(journal.state(MAX_FILE))
        added = [int(gfn) for gfn in state.origin["added"]]
        with xen.domain(domid) as domain:
            contents = map(domain.memory.read_page, added)
            pages = tuple(
                replace(page, sha256=sha256(content).hexdigest(), content=content)
                for page, content in zip(state.pages, contents, strict=True)
            )
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise StateError(
            f"the record of the views imported into domain {domid} is damaged: {error}",
            domid=domid,
            hint=(f"xenaltp2m rescue --force {domid} removes them",),
        ) from error
    return replace(state, pages=pages)


def take_out_views(xen: Xen, which: int | str | UUID) -> None:
    """Remove imported views: vCPUs leave them, altp2m is switched off, added pages are removed.

    Raises:
        LeftoverError: Some of it could not be removed; a second call tries again.
    """
    outcome = rescue(xen, which, imported=True)
    if outcome.failed:
        raise LeftoverError(
            f"not everything imported was removed from domain {outcome.before.domain.domid}",
            left=[step.what for step in outcome.failed],
            domid=int(outcome.before.domain.domid),
        )
