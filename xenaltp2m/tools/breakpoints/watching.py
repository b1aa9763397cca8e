# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watchpoints: execute instructions that use watched bytes in ``used``, and report each once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenaltp2m.handles.memory import MappedPages, Memory
from xenaltp2m.tools.breakpoints.calls import Calls
from xenaltp2m.tools.breakpoints.executions import Execution
from xenaltp2m.tools.breakpoints.fetching import Fetching
from xenaltp2m.tools.breakpoints.guarded_pages import GuardedPages
from xenaltp2m.tools.breakpoints.hooks import Watchpoint, WatchpointHit
from xenaltp2m.tools.breakpoints.views import HookViews
from xenaltp2m.values.events import Event, MemAccess

if TYPE_CHECKING:
    from xenaltp2m.tools.breakpoints.executions import Use

_MOST_REPEATING = 64


class Watching:
    """The watchpoints of one session, and the executions that use what they watch.

    Attributes:
        executions: The executions of vCPUs in ``used``, by vCPU.
        reported: The vCPUs whose step ends with an event.
        afters: The number of watchpoints with an ``after``.
    """

    def __init__(
        self,
        views: HookViews,
        guarded: GuardedPages,
        fetching: Fetching,
        memory: Memory,
        mapped: MappedPages,
    ) -> None:
        self._views, self._guarded, self._fetching = views, guarded, fetching
        self._memory, self._mapped = memory, mapped
        self.executions: dict[int, Execution] = {}
        self.reported: set[int] = set()
        self.afters = 0
        self._repeating: list[Execution] = []
        """Executions between two iterations of a string instruction that uses watched memory."""

    def add(self, made: Watchpoint) -> None:
        """Guard the pages of a watchpoint."""
        for gfn in made.gfns:
            self._guarded.watched.setdefault(gfn, []).append(made)
        self._guarded.set_rights(made.gfns)
        self.count_afters()

    def discard(self, watch: Watchpoint) -> None:
        """Stop guarding the pages of a watchpoint; calling it again is harmless."""
        watched = self._guarded.watched
        for gfn in watch.gfns:
            watches = watched.get(gfn, [])
            if watch in watches:
                watches.remove(watch)
            if not watches:
                watched.pop(gfn, None)
            self._guarded.opened.pop(gfn, None)
        self._guarded.set_rights(watch.gfns)

    def count_afters(self) -> None:
        """Count the watchpoints that have an ``after``."""
        watches = {watch for some in self._guarded.watched.values() for watch in some}
        self.afters = sum(watch.after is not None for watch in watches)

    # An instruction that uses watched memory.

    def begin(
        self, event: MemAccess, registers: dict[str, int], *, is_patched: bool
    ) -> tuple[Execution, Calls]:
        """Return the execution that an instruction belongs to, and the calls for an ended one.

        An execution that the guest has abandoned between two iterations never continues.
        """
        code = self._fetching.code(event.registers) if is_patched else None
        for execution in self._repeating:
            if execution.goes_on_at(event.registers):
                self._repeating.remove(execution)
                execution.begin(event.registers, code)
                return execution, []
        ended: Calls = []
        if len(self._repeating) > _MOST_REPEATING:
            ended = self._end(self._repeating.pop(0), event, registers)
        return Execution(self._memory, self._mapped, event.registers, code), ended

    def hits_of(
        self, uses: list[Use], event: Event, registers: dict[str, int], *, is_reported: bool
    ) -> Calls:
        """Count the new uses of watched bytes, and list the ``before`` callbacks to call.

        Args:
            uses: The instruction's uses of watched bytes.
            event: The event before its execution.
            registers: Collects the registers that callbacks set.
            is_reported: Whether the step's end is an event, at which more is known.
        """
        calls: Calls = []
        for use in uses:
            watch = use.watchpoint
            if use.certain or watch.before is not None or not is_reported:
                watch.hits += 1
                use.reported = True
            if watch.before is not None:
                calls.append((watch.before, WatchpointHit(use, event, registers)))
        return calls

    def stepped(self, event: Event, registers: dict[str, int]) -> Calls | None:
        """End a vCPU's execution, or iteration; list the calls. None if the vCPU had none."""
        execution = self.executions.pop(int(event.vcpu), None)
        if execution is None or not self._views.is_in_used(event):
            return None
        watched = self._guarded.watched
        execution.compare(event.registers, watched)
        goes_on = execution.is_repeated_in(event.registers, watched)
        if goes_on:
            self._repeating.append(execution)
        return self._end(execution, event, registers, goes_on=goes_on)

    def _end(
        self,
        execution: Execution,
        event: Event,
        registers: dict[str, int],
        *,
        goes_on: bool = False,
    ) -> Calls:
        """End an execution, or only an iteration if it ``goes_on``; list the calls."""
        calls: Calls = []
        for use in list(execution.uses.values()):
            watch = use.watchpoint
            if goes_on and not watch.each_iteration:
                continue
            del execution.uses[watch]
            call = watch.after
            if not use.reported:
                call = call or watch.before
                watch.hits += 1
            if call is not None and watch.inserted:
                calls.append((call, WatchpointHit(use, event, registers, execution.now(use))))
        self.count_passed(execution, goes_on=goes_on)
        return calls

    @staticmethod
    def count_passed(execution: Execution, *, goes_on: bool = False) -> None:
        """Count an execution's accesses to the pages of watchpoints beside the watched bytes."""
        over = {watch for watch in execution.beside if watch.each_iteration or not goes_on}
        for watch in over:
            watch.passed += 1
        execution.beside -= over
