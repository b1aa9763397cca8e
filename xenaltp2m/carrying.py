# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that is saved, restored or migrated, with all that is done to it laid down meanwhile.

Xen carries none of it: views are not part of what is saved, and pages that were added would be
saved as the guest's own. So everything is taken back before, and made again after, from what the
handles know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Self

from xenaltp2m.arguments import check_kind
from xenaltp2m.capturing import LOOKED_AT, describe, heard_by, restore
from xenaltp2m.errors import (
    BusyError,
    DomainNotFoundError,
    InvalidArgumentError,
    LeftoverError,
    StateError,
    XenError,
    add_failure,
)
from xenaltp2m.handle import UndoList
from xenaltp2m.hazards import check_names
from xenaltp2m.rescue import diagnose, rescue
from xenaltp2m.viewstate import MAX_FILE, State
from xenaltp2m.xen import Xen

if TYPE_CHECKING:
    from uuid import UUID

    from xenaltp2m.altp2m import Altp2m
    from xenaltp2m.domain import Domain
    from xenaltp2m.types import DomainInfo

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 0.05


class Carried:
    """A domain on its way. Made by :meth:`xenaltp2m.domain.Domain.carried`.

    Attributes:
        state: The views there were, those of breakpoints excepted, with the content of added pages;
            None where altp2m was not open. For :func:`xenaltp2m.capturing.restore`, where the
            domain goes to another host.
        gfns: Where pages that were added are now, by where they were; filled at the end.
    """

    def __init__(self, domain: Domain, seconds: float) -> None:
        self._domain, self._seconds = domain, seconds
        self.state: State | None = None
        self.gfns: dict[int, int] = {}
        self._altp2m: Altp2m | None = None
        self._contents: list[tuple[range, list[bytes]]] = []
        self._take_up: list[Callable[[], None]] = []
        """Last laid down first."""

    def __enter__(self) -> Self:
        self._check()
        try:
            self._lay_down()
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
            self._domain.xen._moved(self._await())
            self._take_all_up()
        except BaseException as failure:
            self._let_go()
            if error is None or not isinstance(failure, XenError):
                raise
            add_failure(error, failure)

    def _check(self) -> None:
        domain = self._domain
        domain._check_open()
        domain._check_nobody_was_killed()  # Xen would save pages that were added as the guest's own
        for other in domain.xen._domains:
            if other.uuid == domain.uuid and other is not domain and other._is_used():
                raise BusyError(
                    f"another handle of domain {domain.domid} has altp2m, a monitor, pages or a "
                    "pause: close it first, or use one handle",
                    domid=domain.domid,
                )
        if domain._pauses:
            raise InvalidArgumentError(
                f"{domain!r} is paused through this handle, and must run to be suspended: unpause "
                "it first",
                domid=domain.domid,
            )
        if (monitor := domain._open_monitor) is not None and monitor._iterating:
            raise BusyError(
                f"{monitor!r} is being iterated: end that before the domain is carried",
                domid=domain.domid,
            )
        if (altp2m := domain._open_altp2m) is None:
            return
        if not altp2m._switched_on:
            raise BusyError(
                f"altp2m of domain {domain.domid} was on before it was opened here: Xen could not "
                "carry the views of somebody else",
                domid=domain.domid,
            )
        for view in altp2m.views:
            view._remaps_in_order()  # raises where gfns show each other's pages

    def _lay_down(self) -> None:
        domain = self._domain
        altp2m, monitor = domain._open_altp2m, domain._open_monitor
        if altp2m is not None:  # vCPUs leave as soon as nobody would hear them
            self._altp2m, current, vcpu_views = altp2m, altp2m._current, altp2m.vcpu_views()
        heard = heard_by(monitor)
        later = UndoList()
        domain._undo.push("", lambda: later.unwind(f"closing {domain!r}"))
        for handle in reversed(domain._carried_along()):
            handle._lay_down(later)
            self._take_up.insert(0, handle._take_up)
        if monitor is not None:
            monitor._lay_down()
            self._take_up.insert(0, monitor._take_up)
        with domain.paused():
            if altp2m is not None:
                altp2m._lay_down()
                altp2m._current = current
                self._take_up.insert(0, lambda: altp2m._take_up(self.gfns))
            domain._undo.unwind(f"carrying {domain!r}")
            if altp2m is not None:
                self.state = describe(altp2m, heard, vcpu_views, contents=True)
            for gfns in list(domain._added):
                contents = list(map(domain.memory.read_page, gfns))
                domain.remove_pages(gfns)
                self._contents.append((gfns, contents))

    def _close_all(self, error: BaseException) -> None:
        """Take everything back, because something of it could not be laid down or made again."""
        undo = UndoList()
        undo.push("", self._domain._close_what_is_open)
        self._domain._roll_back(undo, error)

    def _let_go(self) -> None:
        """Close what is laid down, still, for good."""
        if self._altp2m is not None and self._altp2m.closed:
            self._altp2m.abandon()

    def _await(self) -> DomainInfo:
        """Return the domain, wherever it is now, once it is there."""
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
            "made again",
            hint=("the state of what carried() returned has them, for capturing.restore()",),
        )

    def _take_all_up(self) -> None:
        """Make all of it again, or nothing."""
        domain = self._domain
        with domain.paused():
            try:
                for gfns, contents in self._contents:
                    added = domain.add_pages(len(gfns))
                    self.gfns |= zip(gfns, added, strict=True)
                    for gfn, content in zip(added, contents, strict=True):
                        domain.memory.write_page(gfn, content)
                for take_up in self._take_up:
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
    """Make the views of a state, and leave them there when this process ends.

    Nobody answers what the guest does against them: Xen then lifts it, page by page.

    Args:
        xen: The host, with a directory for journals, which tells of them.
        which: The domain, as :meth:`Xen.domain`.
        state: What to make; it may be of another domain, or release.
        accept: See :meth:`Domain.altp2m`.

    Returns:
        The state as it is there, with what else ``state`` has: nobody hears of anything.

    Raises:
        UnsupportedError: :func:`xenaltp2m.capturing.obstacles` has some.
        BusyError: Somebody works on the domain, or altp2m is on.
        JournalError: The journal cannot be written. On any error nothing is left.
    """
    check_kind("xen", xen, Xen, "a connection")
    check_kind("state", state, State, "a State")
    check_names(accept)
    with xen.domain(which) as domain:
        if domain.altp2m_active:
            raise BusyError(
                f"altp2m of domain {domain.domid} is on: somebody has views there",
                domid=domain.domid,
            )
        altp2m = domain.altp2m(accept=accept)
        restore(altp2m, state)
        made = _with_more(altp2m.capture(contents=True), state)
        domain._leave_as_it_is(made.to_bytes())
    _LOG.info("domain %d: %d views imported, and left there", domain.domid, len(made.views))
    return made


def _with_more(made: State, asked: State) -> State:
    """Add what of a state is not used."""
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
    """Return what was imported into a domain, with the content that added pages have now.

    Raises:
        StateError: Nothing was, or what is known of it is damaged.
        BusyError: Somebody works on the domain.
    """
    found = diagnose(xen, which)
    domid = int(found.domain.domid)
    if found.working:
        raise BusyError(
            f"process {found.working[0].pid} works on domain {domid}, and runs",
            domid=domid,
            hint=("it has to carry its views itself, by Domain.carried()",),
        )
    if not found.imported:
        raise StateError(
            f"no views were imported into domain {domid}",
            domid=domid,
            hint=("state save writes what Xen tells of others' views",),
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
            f"what was imported into domain {domid} is not known any more: {error}",
            domid=domid,
            hint=(f"xenaltp2m rescue --force {domid} takes it out",),
        ) from error
    return replace(state, pages=pages)


def take_out_views(xen: Xen, which: int | str | UUID) -> None:
    """Take out what was imported: vCPUs leave the views, altp2m goes off, added pages go.

    Raises:
        LeftoverError: Some of it could not be taken out; a second call tries it again.
    """
    outcome = rescue(xen, which, imported=True)
    if outcome.failed:
        raise LeftoverError(
            f"not everything was taken out of domain {outcome.before.domain.domid}",
            left=[step.what for step in outcome.failed],
            domid=int(outcome.before.domain.domid),
        )
