# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which executions of repeated string instructions have had iterations already.

The monitor trap flag ends a step after each iteration (SDM 3C, 26.5.2), so an int3 at REP MOVS is
hit once for each. An execution may pause in between: for an interrupt, a page fault, another
thread; and it may go on by another vCPU.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from xenaltp2m.abi.x86 import FRAME, Repeated

if TYPE_CHECKING:
    from xenaltp2m.events import Event, Registers

_MOST_UNFINISHED = 1 << 12
"""Executions that may go on: some never do."""
_USER = 3

_State: TypeAlias = tuple[int, ...]


class _Step(NamedTuple):
    """A vCPU executes one iteration."""

    execution: tuple[int, int, int]
    """Where the instruction is, physically; whose stack it has: page tables and address."""
    next_rip: int
    mask: int
    """Of the address size."""


class Repetitions:
    """The executions of a domain that have not come to their last iteration."""

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}
        """By vCPU."""
        self._unfinished: Counter[_State] = Counter()
        """How many have this state: several processes may."""

    def goes_on(self, physical: int, found: Repeated, event: Event) -> bool:
        """Note that an iteration is stepped; return whether it is not the execution's first.

        Args:
            physical: Where the instruction is.
            found: What it is.
            event: The vCPU is about to execute it.
        """
        registers = event.registers
        # A kernel's stacks are at the same addresses by all page tables.
        cr3 = registers.cr3 & FRAME if registers.privilege == _USER else 0
        step = _Step(
            (physical, cr3, registers.linear_rsp), registers.rip + found.length, found.mask
        )
        self._steps[int(event.vcpu)] = step
        state = _state(step, registers)
        if state not in self._unfinished:
            return False
        self._unfinished[state] -= 1
        if not self._unfinished[state]:
            del self._unfinished[state]
        return True

    def forget(self, vcpu: int) -> None:
        """A vCPU begins another step."""
        self._steps.pop(vcpu, None)

    def stepped(self, event: Event) -> None:
        """A step is over: with the instruction, with one of its iterations, or with neither.

        Where an interrupt or a fault is delivered, rip and rsp are its handler's, and the other
        registers still the instruction's.
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
