# SPDX-License-Identifier: LGPL-2.1-or-later
"""Executions of repeated string instructions that have had some of their iterations.

The monitor trap flag ends a step after each iteration (SDM 3C, 26.5.2), so an int3 at REP MOVS is
hit once for each. An execution may pause in between, for an interrupt, a page fault or another
thread, and may continue on another vCPU.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from xenaltp2m.abi.x86 import FRAME, Repeated

if TYPE_CHECKING:
    from xenaltp2m.values.events import Event, Registers

_MOST_UNFINISHED = 1 << 12
"""Bounds the executions that may continue: some never do."""
_USER = 3

_State: TypeAlias = tuple[int, ...]


class _Step(NamedTuple):
    """A step of a vCPU, which executes one iteration."""

    execution: tuple[int, int, int]
    """The instruction's physical address; the stack, by page tables and address."""
    next_rip: int
    mask: int
    """The mask of the address size."""


class Repetitions:
    """The executions of a domain that have not reached their last iteration."""

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}
        """The steps by vCPU."""
        self._unfinished: Counter[_State] = Counter()
        """The number of executions in each state: several processes may be in the same one."""

    def goes_on(self, physical: int, found: Repeated, event: Event) -> bool:
        """Note that an iteration is stepped; return whether the execution had one before.

        Args:
            physical: The instruction's physical address.
            found: The decoded instruction.
            event: The event before its execution.
        """
        registers = event.registers
        # A kernel's stacks have the same addresses in all page tables.
        cr3 = registers.cr3 & FRAME if registers.privilege == _USER else 0
        step = _Step((physical, cr3, registers.rsp_va), registers.rip + found.length, found.mask)
        self._steps[int(event.vcpu)] = step
        state = _state(step, registers)
        if state not in self._unfinished:
            return False
        self._unfinished[state] -= 1
        if not self._unfinished[state]:
            del self._unfinished[state]
        return True

    def forget(self, vcpu: int) -> None:
        """Drop a vCPU's step, because it begins another one."""
        self._steps.pop(vcpu, None)

    def stepped(self, event: Event) -> None:
        """End a step: of the instruction, of one of its iterations, or of neither.

        If an interrupt or a fault is delivered, rip and rsp are the handler's, and the other
        registers are still the instruction's.
        """
        step = self._steps.pop(int(event.vcpu), None)
        registers = event.registers
        if step is None or registers.rip == step.next_rip or not registers.rcx & step.mask:
            return
        if len(self._unfinished) >= _MOST_UNFINISHED:
            del self._unfinished[next(iter(self._unfinished))]
        self._unfinished[_state(step, registers)] += 1


def _state(step: _Step, registers: Registers) -> _State:
    return *step.execution, registers.rcx, registers.rsi, registers.rdi
