# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answer the events of breakpoints: int3, violations of a view, the end of a single-step."""

from __future__ import annotations

import logging
from collections.abc import Callable

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.abi.x86 import GP, Repeated
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.view import View
from xenaltp2m.tools.breakpoints.calls import Calls, call_all, hits_of
from xenaltp2m.tools.breakpoints.executions import Execution
from xenaltp2m.tools.breakpoints.fetching import Fetching
from xenaltp2m.tools.breakpoints.guarded_pages import GuardedPages
from xenaltp2m.tools.breakpoints.hooks import Breakpoint, Watchpoint
from xenaltp2m.tools.breakpoints.operand_size import LONGEST_ACCESS
from xenaltp2m.tools.breakpoints.pages import BEFORE, Page
from xenaltp2m.tools.breakpoints.patching import Patching
from xenaltp2m.tools.breakpoints.repetitions import Repetitions
from xenaltp2m.tools.breakpoints.shadow_pages import Shadows
from xenaltp2m.tools.breakpoints.views import HookViews, UsedTurn, Writers
from xenaltp2m.tools.breakpoints.watching import Watching
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE, Access
from xenaltp2m.values.events import Event, MemAccess, Singlestep, SoftwareBreakpoint, TrapType
from xenaltp2m.values.responses import REINJECT, RESUME, Response

_LOG = logging.getLogger("xenaltp2m.tools.breakpoints")
_OFFSET = PAGE_SIZE - 1
_W, _X = AccessFlag.W, AccessFlag.X
_READ_ONES, _WRITE_NOWHERE = (
    Response.emulate(read_data=b"\xff" * 64),
    Response.emulate(write=False),
)


class Answering:
    """Answers the events of one session's views."""

    def __init__(
        self,
        context: DomainContext,
        views: HookViews,
        shadows: Shadows,
        guarded: GuardedPages,
        fetching: Fetching,
        watching: Watching,
        patching: Patching,
        repetitions: Repetitions,
        *,
        fast: bool,
    ) -> None:
        self._views, self._shadows, self._guarded = views, shadows, guarded
        self._fetching, self._watching, self._patching = fetching, watching, patching
        self._repetitions, self._fast = repetitions, fast
        self._backend, self._domid = context.backend, int(context.domid)
        self._writers, self._turn = Writers(views), UsedTurn(views)

    def answer(self, event: Event, back: Callable[[], Response | None]) -> Response | None:
        """Answer an event caused by a breakpoint or its page; return None for any other.

        Args:
            event: The event.
            back: Returns the response that resumes a vCPU in ``hooks``; None once all is closed.
        """
        if isinstance(event, SoftwareBreakpoint):
            return self._breakpoint(event, back)
        if isinstance(event, MemAccess):
            return self._violation(event, back)
        if isinstance(event, Singlestep):
            return self._stepped(event, back)
        return None

    # An int3.

    def _breakpoint(
        self, event: SoftwareBreakpoint, back: Callable[[], Response | None]
    ) -> Response:
        gfn, offset = self._fetching.int3_of(event)
        page = self._guarded.pages.get(gfn)
        if event.view == self._views.hooks.id and page is not None and offset in page.hooks:
            self._writers.discard(int(event.vcpu))
            again = None
            if self._fetching.may_repeat(page, offset):
                again = self._fetching.repetition(page, offset, event.registers)
            # The guest's own int3 comes again, too, in another view, each time its delivery leaves
            # guest mode, for example because Xen fills a view (hvm_event_needs_reinjection).
            over = self._over(event, tell=again is not None)
            if over is None:
                return self._views.back
            return self._hit(page.hooks[offset], event, over, again, back)
        if self._fetching.is_guests_own(event):
            return REINJECT
        last_gfn, offset = self._fetching.last_byte_of(event)
        page = self._guarded.pages.get(last_gfn)
        if event.view == self._views.hooks.id and page is not None and offset in page.hooks:
            self._found_inside(page, last_gfn, {offset})
            return self._over(event) or self._views.back
        return RESUME  # the breakpoint was removed since: the guest executes the instruction again

    def answer_late(self, event: Event) -> Response | None:
        """Answer an event from before the close: the guest executes the instruction again."""
        if isinstance(event, SoftwareBreakpoint):
            return REINJECT if self._fetching.is_guests_own(event) else RESUME
        return None

    def _found_inside(self, page: Page, gfn: int, offsets: set[int]) -> None:
        """Put no int3 into a page any more, because a breakpoint is inside an instruction."""
        for offset in offsets - page.inside:
            page.inside.add(offset)
            _LOG.warning(
                "the breakpoint at %#x is inside an instruction: every fetch from its page traps",
                gfn << PAGE_SHIFT | offset,
            )
        self._guarded.invalidate_shadow(gfn)

    def _hit(
        self,
        breakpoints: list[Breakpoint],
        event: Event,
        over: Response,
        again: Repeated | None,
        back: Callable[[], Response | None],
    ) -> Response:
        """Call the callbacks of the breakpoints that were hit."""
        registers: dict[str, int] = {}
        calls = hits_of(breakpoints, event, registers, self._repetitions, again)
        patches = list(self._patching.patches)

        def over_now() -> Response:
            if patches == self._patching.patches:
                return over
            return self._over(event, waits=False) or over  # a callback has changed the patches

        return call_all(calls, breakpoints, registers, event, over_now, back)

    # Single-steps.

    def _over(self, event: Event, *, tell: bool = False, waits: bool = True) -> Response | None:
        """Step the next instruction; return None if it is patched, and has to be retried.

        Args:
            event: The event before the instruction's execution.
            tell: As for :meth:`_step_in`.
            waits: Whether the instruction is retried while another vCPU is in ``used``.
        """
        if not self._patching.parts_of(event):
            return self._step_in(self._views.step, event, tell=tell)
        assert self._views.used is not None
        if waits and not self._turn.take(int(event.vcpu)):
            return None
        self._guarded.open_in_used({})
        self._patching.show(event)
        return self._step_in(self._views.used, event, tell=True)

    def _step_in(
        self, view: View, event: Event, *, tell: bool = False, plain: bool = False
    ) -> Response:
        """Return the response that executes an instruction in a view.

        The first step of an instruction decides whether its end is reported: Xen reports no step
        once it has begun a fast one.

        Args:
            view: The view.
            event: The event before the instruction's execution.
            tell: Whether the end of the step is to be reported in any case.
            plain: Whether it need not be reported, although memory is watched.
        """
        watching, watched = self._watching, self._guarded.watched
        reported = False
        if watching.reported or watched or not self._fast or tell:
            vcpu = int(event.vcpu)
            if event.view == self._views.hooks.id:
                self._repetitions.forget(vcpu)
                watching.executions.pop(vcpu, None)
                watching.reported.discard(vcpu)
                if tell or not self._fast or (watched and not plain):
                    watching.reported.add(vcpu)
            reported = vcpu in watching.reported
        return self._views.step_in(view, reported=reported)

    def _retry(self, event: Event) -> Response:
        """Retry an instruction in the view it was in, because it may have been a hit already."""
        view = self._views.of(event)
        return self._views.back if view is self._views.hooks else self._step_in(view, event)

    def _stepped(self, event: Singlestep, back: Callable[[], Response | None]) -> Response | None:
        if event.view not in self._views.ids or event.view == self._views.hooks.id:
            return None
        self._repetitions.stepped(event)
        vcpu = int(event.vcpu)
        self._writers.discard(vcpu)
        self._watching.reported.discard(vcpu)
        self._patching.stepped(vcpu)
        self._turn.end(vcpu)
        registers: dict[str, int] = {}
        calls = self._watching.stepped(event, registers)
        if calls is None:
            return self._views.back
        return call_all(calls, calls, registers, event, lambda: self._views.back, back)

    # A violation.

    def _violation(self, event: MemAccess, back: Callable[[], Response | None]) -> Response | None:
        gfn, flags, vcpu = int(event.gfn), event.access_flags, int(event.vcpu)
        guarded, views = self._guarded, self._views
        page, watches = guarded.pages.get(gfn), guarded.watched.get(gfn)
        is_code = page is not None or gfn in guarded.leads
        if not is_code and watches is None:
            is_shadow = gfn in self._shadows
            return self._emulate_hole(event) if is_shadow else self._unowned_violation(event)
        if event.view == views.hooks.id:
            self._writers.discard(vcpu)
            if page is not None and flags & _X and not flags & _W:
                return self._fetched(page, event, back)
        elif event.view not in views.ids:
            return None  # another owner's view
        else:
            view, tried = views.of(event), Access(flags & Access.RWX.value)
            allowed = guarded.rights(gfn).get(view, Access.RWX)
            if views.make_it_so_again(gfn, tried, view, allowed):
                return RESUME
        if watches or views.is_in_used(event) or self._patching.parts_of(event):
            return self._used(watches or [], event, back)
        if is_code and flags & _W:
            if self._patching.is_copy_being_written(gfn, vcpu):
                return self._retry(event)
            self._note_written(vcpu, self._written_with(gfn, event.offset))
        return self._step_in(views.write if flags & _W else views.step, event)

    def _written_with(self, gfn: int, offset: int) -> set[int]:
        """Return the pages with breakpoints that a write may change that is reported for one page.

        In ``write``, it continues unreported into another page, which the guest may have mapped
        next to this one.
        """
        if not LONGEST_ACCESS <= offset <= PAGE_SIZE - LONGEST_ACCESS:
            return set(self._guarded.pages)
        return self._guarded.written_with(gfn)

    def _note_written(self, vcpu: int, gfns: set[int]) -> None:
        if gfns:
            self._writers.add(vcpu, gfns)
            for one in gfns:
                self._guarded.invalidate_shadow(one)

    def _used(
        self, watches: list[Watchpoint], event: MemAccess, back: Callable[[], Response | None]
    ) -> Response:
        """Execute an instruction that uses watched memory, and call its callbacks.

        One vCPU at a time, with only those pages open that its instruction is known to use: no
        other access of it, and none of another vCPU, is missed meanwhile.
        """
        used, watching, vcpu = self._views.used, self._watching, int(event.vcpu)
        assert used is not None
        gfn, is_written = int(event.gfn), bool(event.access_flags & _W)
        registers: dict[str, int] = {}
        calls: Calls = []
        is_in_used = self._views.is_in_used(event)
        execution = watching.executions.get(vcpu) if is_in_used else None
        begins = execution is None
        if begins and not is_in_used and not self._turn.take(vcpu):
            return self._retry(event)
        patched = (
            self._patching.steps.get(vcpu, {}) if is_in_used else self._patching.parts_of(event)
        )
        writes_to_copy = is_written and gfn in patched
        if writes_to_copy and self._writers.is_being_written(gfn, beside=vcpu):
            return self._retry(event)
        if begins or writes_to_copy:
            self._patching.show(event)
        if execution is None:
            execution, calls = watching.begin(event, registers, is_patched=bool(patched))
        if is_written:
            self._note_written(vcpu, self._guarded.written_with(gfn))
        found, again = self._being_fetched(event)
        uses = execution.access(event, watches)
        plain = not (watching.afters or found) and execution.is_plain(event)
        tell = vcpu in self._patching.steps
        over = self._step_in(used, event, tell=tell, plain=plain)
        self._open(execution, event, begins=begins)
        is_reported = vcpu in watching.reported
        calls += watching.hits_of(uses, event, registers, is_reported=is_reported)
        calls += hits_of(found, event, registers, self._repetitions, again)
        still = [event] if found or not watches else watches  # a hit is not reported twice
        return call_all(calls, still, registers, event, lambda: over, back)

    def _open(self, execution: Execution, event: MemAccess, *, begins: bool) -> None:
        """Open a page in ``used`` for an instruction; pages that it opened before stay open."""
        gfn, vcpu = int(event.gfn), int(event.vcpu)
        is_written = bool(event.access_flags & _W)
        self._watching.executions[vcpu] = execution
        opened = {} if begins else dict(self._guarded.opened)
        access = Access.RWX if is_written else Access.RX
        self._guarded.open_in_used(opened | {gfn: access})
        if vcpu not in self._watching.reported:
            self._watching.count_passed(execution)
        elif is_written:
            execution.may_write(gfn)

    def _being_fetched(self, event: MemAccess) -> tuple[list[Breakpoint], Repeated | None]:
        """Return the breakpoints of an instruction about to execute, and what it repeats."""
        if event.view != self._views.hooks.id:
            return [], None
        found = self._fetching.being_fetched(event)
        if not found:
            return [], None
        gfn, offset = divmod(found[0].address, PAGE_SIZE)
        page = self._guarded.pages[gfn]
        return found, self._fetching.repetition(page, offset, event.registers)

    def _unowned_violation(self, event: MemAccess) -> Response | None:
        """Resume if the page is not restricted any more; None if the page is another owner's."""
        views = self._views
        if event.view not in views.ids or views.hooks.access(int(event.gfn)) != Access.RWX:
            return None
        return RESUME

    def _fetched(
        self, page: Page, event: MemAccess, back: Callable[[], Response | None]
    ) -> Response:
        """Execute a page from its shadow, or step the instruction on the page itself."""
        gfn, offset = int(event.gfn), event.registers.rip_va & _OFFSET
        if page.armed:  # the fetch is allowed by now; or Xen has reset the view
            self._views.check_armed(gfn)
            return RESUME
        if page.shadow_gfn and self._knows_before(gfn, event) and page.can_be_armed():
            covered = self._fetching.covered(page, event)
            if covered:
                self._found_inside(page, gfn, covered)
            else:
                if not self._writers.is_being_written(gfn):
                    self._guarded.arm(gfn)
                return RESUME
        found = page.hooks.get(offset) if event.offset == offset else None
        again = None
        if found is not None:
            again = self._fetching.repetition(page, offset, event.registers)
        over = self._over(event, tell=again is not None)
        if over is None:
            return self._views.back
        return over if found is None else self._hit(found, event, over, again, back)

    def _knows_before(self, gfn: int, event: MemAccess) -> bool:
        """Note which page the current page tables map before one that is to be executed."""
        if self._guarded.first_hook(gfn) >= BEFORE:
            return True
        before = self._fetching.page_before(event)
        return before is None or self._guarded.knows_lead(gfn, before)

    def _emulate_hole(self, event: MemAccess) -> Response:
        """Answer an access to a shadow's own gfn as Xen answers one to a hole in memory."""
        if event.access_flags & _W:
            return _WRITE_NOWHERE
        if event.access_flags & _X:
            self._backend.hvm_inject_trap(
                self._domid, int(event.vcpu), GP, int(TrapType.HARDWARE_EXCEPTION), 0, 0, 0
            )
            return RESUME
        return _READ_ONES
