# SPDX-License-Identifier: LGPL-2.1-or-later
"""Call callbacks for an event, and answer the event whatever they do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

from xenaltp2m.abi.x86 import Repeated
from xenaltp2m.tools.breakpoints.hooks import Breakpoint, Hit
from xenaltp2m.tools.breakpoints.repetitions import Repetitions
from xenaltp2m.values.events import Event
from xenaltp2m.values.responses import RESUME, Response

Calls: TypeAlias = list[tuple[Callable[[Any], object], object]]
"""Callbacks, each with its argument."""


def hits_of(
    breakpoints: Sequence[Breakpoint],
    event: Event,
    registers: dict[str, int],
    repetitions: Repetitions,
    again: Repeated | None,
) -> Calls:
    """Count an execution, or an iteration, and list the callbacks to call.

    Args:
        breakpoints: The breakpoints of the instruction.
        event: The event before its execution.
        registers: Collects the registers that callbacks set.
        repetitions: The executions of repeated instructions that have had iterations already.
        again: The instruction, if it is a repeated one.
    """
    if again is not None and repetitions.goes_on(breakpoints[0].address, again, event):
        breakpoints = [one for one in breakpoints if one.each_iteration]
    calls: Calls = []
    for one in breakpoints:
        one.hits += 1
        calls.append((one.callback, Hit(one, event, registers)))
    return calls


def call_all(
    calls: Calls,
    still: Collection[object],
    registers: dict[str, int],
    event: Event,
    over: Callable[[], Response],
    again: Callable[[], Response | None],
) -> Response:
    """Call all callbacks; if one raises, answer the event first, and raise then.

    Args:
        calls: The callbacks to call.
        still: If it is empty afterwards, all hooks were removed: the instruction is retried.
        registers: The registers that callbacks have set.
        event: The event to answer.
        over: Makes the response that executes the instruction.
        again: Makes the response that retries it; None once the breakpoints are closed.
    """
    failures: list[BaseException] = []
    for call, what in calls:
        try:
            call(what)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
    back = again()
    if back is None:
        response = RESUME
    elif not still or "rip" in registers:
        response = back
    else:
        response = over()
    if registers:
        response = response.with_registers(**registers)
    if failures:
        event.reply(response)
        for other in failures[1:]:
            failures[0].add_note(f"another callback failed, too: {other!r}")
        raise failures[0]
    return response
