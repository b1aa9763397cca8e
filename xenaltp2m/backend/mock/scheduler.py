# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running of the modelled host's vCPUs, and each domain's monitor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from errno import EACCES, EINVAL
from random import Random

from xenaltp2m import errors
from xenaltp2m.abi import releases
from xenaltp2m.abi.releases import Release
from xenaltp2m.backend.mock.calls import CallLog
from xenaltp2m.backend.mock.machine import Domain, HypercallError, Machine
from xenaltp2m.backend.mock.monitor import Monitor
from xenaltp2m.backend.mock.processor import Processor
from xenaltp2m.backend.mock.script import Script

_STEPS_AT_ONCE, _STEPS_OF_CODE_AT_ONCE, _TURNS_AT_ONCE = 256, 250_000, 256
_SLICE = 1000
"""The most instructions of machine code in a turn."""


class Scheduler(CallLog):
    """The machine, its domains' monitors and processors, and when the vCPUs run."""

    def __init__(self, machine: Machine, seed: int) -> None:
        """Model a host; ``seed`` decides how the vCPUs take turns."""
        super().__init__()
        self.machine = machine
        self._chance = Random(seed)  # noqa: S311 - chance, not secrets
        self.steps_at_once: int | None = _STEPS_AT_ONCE
        self._monitors: dict[int, Monitor] = {}
        self._processors: dict[int, list[Processor]] = {}

    @property
    def release(self) -> Release:
        """The modelled hypervisor's release."""
        return self.machine.release

    def supports(self, function: str) -> bool:
        """Tell whether the modelled library has ``function``."""
        return releases.since(function) <= self.machine.library.version

    def _check_skew(self) -> None:
        """Refuse a domctl from a library of another release."""
        if self.machine.library.domctl_version != self.release.domctl_version:
            raise HypercallError(EACCES)

    def _domctl(self, domid: int) -> Domain:
        """Return the domain of a domctl."""
        self._check_skew()
        return self.machine.controlled(domid)

    def _hvm_domctl(self, domid: int) -> Domain:
        domain = self._domctl(domid)
        if not domain.hvm:
            raise HypercallError(EINVAL)
        return domain

    def _require(self, op: str) -> None:
        symbol = f"xc_{op}"
        if not self.supports(symbol):
            raise errors.missing_symbol(op, symbol, releases.since(symbol))

    def _monitor_of(self, domid: int) -> Monitor:
        monitor = self._monitors.get(domid)
        if monitor is None:
            monitor = self._monitors[domid] = Monitor(self.machine.domains[domid])
        return monitor

    def _processors_of(self, domid: int) -> list[Processor]:
        if domid not in self._processors:
            monitor = self._monitor_of(domid)
            self._processors[domid] = [Script(monitor, vcpu) for vcpu in monitor.domain.vcpus]
        return self._processors[domid]

    def _go_on(self, domid: int) -> None:
        """Let the vCPUs run for a while, now that something let them."""
        processors = self._processors_of(domid)
        steps, turns = self.steps_at_once, math.inf
        if steps is not None and self._simulates(domid):
            turns = _TURNS_AT_ONCE
            if steps == _STEPS_AT_ONCE:
                steps = _STEPS_OF_CODE_AT_ONCE
        run(processors, steps, self._chance, turns)
        if self._simulates(domid) and any(one.ready for one in processors):
            self._monitor_of(domid).wake()  # so that it goes on when the agent looks

    def _simulate(self, domid: int, processors: list[Processor]) -> None:
        """Have a domain's vCPUs execute machine code."""
        self._processors[domid] = processors

    def _simulates(self, domid: int) -> bool:
        """Whether a domain executes machine code."""
        return self._processors_of(domid)[0].executes_code


def run(
    processors: Sequence[Processor], steps: int | None, chance: Random, turns: float = math.inf
) -> int:
    """Let vCPUs run in turn, until none can or there were so many steps (None: however many).

    A step is an instruction, or an attempt of one that executes none. A turn of machine code has
    several; where several vCPUs can run, how many is a matter of chance. Where one can, and steps
    are not counted, it goes on without an end: it is then several times as fast. What leaves guest
    mode ends a turn and takes as long as a thousand instructions: so turns have a limit, too.

    Returns:
        How many instructions were executed, of those that were counted.
    """
    executed = 0
    left = math.inf if steps is None else steps
    while left > 0 and turns > 0:
        ready = [processor for processor in processors if processor.ready]
        if not ready:
            break
        for processor in ready:
            if left <= 0 or not processor.ready:
                continue
            limit = _SLICE if len(ready) == 1 else chance.randint(1, _SLICE)
            alone = steps is None and len(ready) == 1
            count = processor.step(0 if alone else int(min(limit, left)))
            executed += count
            left -= max(count, 1)
        turns -= len(ready)
    return executed
