# SPDX-License-Identifier: LGPL-2.1-or-later
"""The views that implement breakpoints: ``hooks``, ``step``, ``write`` and ``used``."""

from __future__ import annotations

from contextlib import suppress

from xenaltp2m.handles.altp2m import Altp2m
from xenaltp2m.handles.monitor import Monitor
from xenaltp2m.handles.view import View
from xenaltp2m.types import Access
from xenaltp2m.values.events import Event
from xenaltp2m.values.responses import RESUME, STEP, Response


class HookViews:
    """The views of one session.

    Attributes:
        every: All views; the shadows are hidden in each.
        ids: Their numbers.
        hooks: The view that the vCPUs run in.
        step: The view for an instruction that reads a page with breakpoints.
        write: The view for an instruction that writes to such a page.
        used: The view for an instruction that uses watched memory, or is patched; None until
            something is watched or patched.
        back: The response that resumes a vCPU in ``hooks``.
    """

    def __init__(self, altp2m: Altp2m, monitor: Monitor) -> None:
        """Prepare an empty set of views; :meth:`open` creates them."""
        self._altp2m, self._monitor = altp2m, monitor
        self.every: list[View] = []
        self.ids: set[int] = set()
        self.used: View | None = None
        self._responses: dict[tuple[View, bool], Response] = {}

    def __repr__(self) -> str:
        return f"<HookViews of domain {self._altp2m.context.domid}>"

    def open(self) -> None:
        """Create ``hooks``, ``step`` and ``write``."""
        self.hooks, self.step, self.write = map(self.create, ("hooks", "step", "write"))
        self.back = RESUME.in_view(self.hooks)

    def create(self, label: str) -> View:
        """Create another view."""
        view = self._altp2m.create_view(label=label)
        self.every.append(view)
        self.ids.add(int(view.id))
        return view

    def destroy(self, view: View) -> None:
        """Destroy a view."""
        view.close()
        with suppress(ValueError):
            self.every.remove(view)
        self.ids.discard(int(view.id))

    def renumber(self) -> None:
        """Update the views' numbers: Xen gives new ones to views that are created again."""
        self.ids = {int(view.id) for view in self.every}

    def of(self, event: Event) -> View:
        """Return the view that an event came from; ``hooks`` if it is none of these."""
        return next((view for view in self.every if view.id == event.view), self.hooks)

    def is_in_used(self, event: Event) -> bool:
        """Return whether an event came from ``used``."""
        return self.used is not None and event.view == self.used.id

    def is_where(self, vcpu: int, view: View) -> bool:
        """Return whether a vCPU is in a view, after it has taken its response."""
        self._monitor.flush()
        return self._altp2m.vcpu_view(vcpu) == view.id

    def step_in(self, view: View, *, reported: bool) -> Response:
        """Return the response that executes one instruction in a view.

        Args:
            view: The view.
            reported: Whether the step's end is to be an event; else the vCPU returns to ``hooks``
                without one.
        """
        found = self._responses.get((view, reported))
        if found is None:
            found = STEP.in_view(view)
            if not reported:
                found = Response.fast_singlestep(through=view, back_to=self.hooks)
            self._responses[view, reported] = found
        return found

    def make_it_so_again(self, gfn: int, tried: Access, view: View, allowed: Access) -> bool:
        """Return whether a view denied an access that it is to allow; restore its rights then.

        Xen has reset the entry to the host's rights; else the instruction would trap for ever.

        Args:
            gfn: The gfn of the violation.
            tried: The access that the vCPU tried.
            view: The view that it was in.
            allowed: The rights that the view is to have.
        """
        if tried & allowed != tried:
            return False
        self._altp2m.verify(self.every)
        if view.access(gfn) != allowed:  # these rights were never set
            view.set_access(gfn, allowed)
        return True

    def check_armed(self, gfn: int) -> None:
        """Verify the views if a page's shadow is not executable in ``hooks`` any more."""
        if self.hooks.access(gfn) != Access.X:
            self._altp2m.verify(self.every)


class Writers:
    """vCPUs that may still be writing to pages with breakpoints in ``write``."""

    def __init__(self, views: HookViews) -> None:
        self._views = views
        self._gfns: dict[int, set[int]] = {}

    def add(self, vcpu: int, gfns: set[int]) -> None:
        """Note that a vCPU may be writing to some more pages."""
        self._gfns[vcpu] = self._gfns.get(vcpu, set()) | gfns

    def discard(self, vcpu: int) -> None:
        """Note that a vCPU has finished its writes; calling it again is harmless."""
        self._gfns.pop(vcpu, None)

    def is_being_written(self, gfn: int, beside: int | None = None) -> bool:
        """Return whether a vCPU, except ``beside``, may still be writing to a page."""
        for vcpu, written in list(self._gfns.items()):
            if gfn in written and vcpu != beside:
                if not self._views.is_where(vcpu, self._views.hooks):
                    return True
                del self._gfns[vcpu]
        return False


class UsedTurn:
    """The lock on ``used``: one vCPU at a time may be in it.

    No vCPU waits for ever: after a bounded number of attempts by others, the next vCPU enters
    beside one that does not finish its step. Then an access of both to one page may be reported
    for one of them only.
    """

    MOST_REFUSALS, MOST_PASSED_OVER = 1000, 16

    def __init__(self, views: HookViews) -> None:
        self._views = views
        self._holder: int | None = None
        self._refusals = self._passed_over = 0
        self._refused: dict[int, None] = {}
        """The waiting vCPUs in order: else one that never rests would keep the others out."""

    def take(self, vcpu: int) -> bool:
        """Take the turn if it is free; return whether it is this vCPU's. If not, it must retry."""
        holder, is_held, used = self._holder, False, self._views.used
        if holder is not None and holder != vcpu and self._refusals < self.MOST_REFUSALS:
            assert used is not None
            is_held = self._views.is_where(holder, used)
        first = next(iter(self._refused), vcpu)
        if is_held or (first != vcpu and self._passed_over < self.MOST_PASSED_OVER):
            self._refused.setdefault(vcpu)
            self._refusals += is_held
            self._passed_over += not is_held
            return False
        for one in (first, vcpu):  # the first has given up, if it is another one
            self._refused.pop(one, None)
        self._holder, self._refusals, self._passed_over = vcpu, 0, 0
        return True

    def end(self, vcpu: int) -> None:
        """End a vCPU's turn, if it has one."""
        if self._holder == vcpu:
            self._holder = None
