# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares a program that runs free with the same program under breakpoints and watchpoints."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import xenaltp2m as xa
from xenaltp2m.types import PAGE_SIZE

from .machine import FIRST, Machine, Stuck, executions, log_of
from .programs import DATA, DATA_BYTES, DATA_PAGES, Program

MOST_BREAKPOINTS, MOST_WATCHES, MOST_PATCHES = 12, 3, 8
MOST_BYTES = 64
"""Of a patch: where instructions are further apart, data is between them."""
STEPPED_EACH = 4
"""Of how many programs one is stepped, which takes as long as all else."""
_SHOWN = 4


@dataclass
class Plan:
    """What is put into a program.

    Attributes:
        breakpoints: Guest-physical addresses.
        patches: Addresses and lengths; they have the bytes that are there.
        watches: Addresses and lengths.
        churns: Whether breakpoints come and go while it runs; their hits are not compared then.
    """

    fast: bool
    int3: bool
    breakpoints: list[int]
    watches: list[tuple[int, int, bool]]
    churns: bool
    patches: list[tuple[int, int]]


@dataclass
class Verdict:
    """How the runs differ: nothing, where they are the same.

    Attributes:
        differences: A line for each.
        hits: How often breakpoints were hit.
    """

    program: Program
    plan: Plan | None = None
    differences: list[str] = field(default_factory=list)
    hits: int = 0
    touches: int = 0
    ended: bool = True
    """Whether its machine can run another one."""


def plan(program: Program, executed: Counter[int] | None) -> Plan:
    """Choose breakpoints, mostly where the program comes by, and watchpoints in its data.

    None directly after an instruction that Xen completes: docs/breakpoints.md, "Missed
    breakpoints".
    """
    chance = random.Random(f"plan {program.seed}")
    starts = sorted(set(program.starts))
    behind = {after for at, after in pairwise(starts) if at in program.exits}
    offered = [at for at in starts if at not in behind]
    reached = [at for at in offered if executed is None or executed[at]]
    count = chance.randrange(1, MOST_BREAKPOINTS + 1)
    chosen = {chance.choice(reached if chance.random() < 0.9 else offered) for _ in range(count)}
    watches = []
    for _ in range(chance.choice([0, 0, 1, MOST_WATCHES])):
        at = DATA + chance.randrange(len(program.parts)) * DATA_BYTES
        at += chance.choice([chance.randrange(DATA_PAGES * PAGE_SIZE - 64), PAGE_SIZE - 4])
        watches.append((at, chance.choice([1, 4, 8, 64]), chance.random() < 0.3))
    fast, int3 = chance.choice([(True, True), (True, True), (False, True), (True, False)])
    churns = chance.random() < 0.1
    patches = [] if churns else _patches(program, starts, chosen, chance)
    return Plan(fast, int3, sorted(chosen), watches, churns, patches)


def _patches(
    program: Program, starts: list[int], breakpoints: set[int], chance: random.Random
) -> list[tuple[int, int]]:
    """Choose instructions that are executed from patches: none that the program may change."""
    changing = {at for some in program.changing for at in some}
    found: dict[int, int] = {}
    for _ in range(chance.choice([0, MOST_PATCHES])):
        first = chance.randrange(len(starts) - 1)
        last = min(first + chance.choice([1, 1, 2, 6]), len(starts) - 1)
        at, end = starts[first], starts[last]
        taken = {inside for one, size in found.items() for inside in range(one, one + size)}
        bytes_of_it = set(range(at, end))
        if end - at <= MOST_BYTES and not bytes_of_it & (changing | taken | breakpoints - {at}):
            found[at] = end - at
    return sorted(found.items())


def judge(program: Program, machine: Machine) -> Verdict:
    """Run a program free and under a plan's breakpoints, and compare what is left.

    Some are run by single steps, too, which tell how often each breakpoint is to be hit.
    """
    verdict = Verdict(program)
    free = machine.run_free(program)
    executed: Counter[int] | None = None
    if program.seed % STEPPED_EACH == 0:
        stepped = machine.run_stepped(program)
        lines = _differences(free.memory, stepped.memory)
        verdict.differences += [f"stepped: {line}" for line in lines]
        executed = executions(program, stepped, machine.image)
    verdict.plan = chosen = plan(program, executed)
    try:
        memory = _run_hooked(program, machine, chosen, executed, verdict)
    except Stuck as error:
        verdict.differences.append(str(error))
        verdict.ended = False
    else:
        verdict.differences += _differences(free.memory, memory)
    return verdict


def _run_hooked(
    program: Program,
    machine: Machine,
    chosen: Plan,
    executed: Counter[int] | None,
    verdict: Verdict,
) -> bytes:
    """Run a program under a plan; note hits that are not as they should be."""
    chance = random.Random(f"churn {program.seed}")
    machine.put(program)
    dom = machine.dom
    with (
        dom.altp2m() as altp2m,
        dom.monitor(xa.GuestRequest) as monitor,
        xa.Breakpoints(altp2m, monitor, fast=chosen.fast, int3=chosen.int3) as breakpoints,
    ):
        made: dict[int, xa.Breakpoint] = {}

        def hit(hit: xa.Hit) -> None:
            verdict.hits += 1
            at = chance.choice(chosen.breakpoints)
            if chosen.churns and at in made:
                made.pop(at).remove()
            elif chosen.churns:
                made[at] = breakpoints.insert(at, hit_callback)

        def touch(touch: xa.WatchpointHit) -> None:
            verdict.touches += 1

        hit_callback = hit
        for at in chosen.breakpoints:
            made[at] = breakpoints.insert(at, hit)
        for at, length in chosen.patches:
            breakpoints.patch(at, dom.memory.read(at, length))
        for at, length, reads in chosen.watches:
            breakpoints.watch(at, length, after=touch, reads=reads)
        memory = machine.run(program, monitor, breakpoints)
        for at, one in made.items():
            if executed is not None and not chosen.churns and one.hits != executed[at]:
                verdict.differences.append(
                    f"breakpoint at {at:#x}: {one.hits} hits of {executed[at]}"
                )
    return memory


def _differences(free: bytes, other: bytes) -> list[str]:
    """Name the bytes that differ, and what was raised otherwise."""
    if free == other:
        return []
    lines = []
    for vcpu in range(2):
        for expected, found in zip(log_of(free, vcpu), log_of(other, vcpu), strict=False):
            if expected != found:
                lines.append(f"vCPU {vcpu} raised {_words(found)}, free {_words(expected)}")
                break
    places = [at for at in range(len(free)) if free[at] != other[at]]
    lines += [
        f"{FIRST + at:#x} is {other[at]:#04x}, free {free[at]:#04x}" for at in places[:_SHOWN]
    ]
    if len(places) > _SHOWN:
        lines.append(f"and {len(places) - _SHOWN} more, up to {FIRST + places[-1]:#x}")
    return lines


def describe(verdict: Verdict) -> str:
    """Say how the runs of a program differ, and under which plan."""
    program, plan = verdict.program, verdict.plan
    head = f"seed {program.seed}: {program.mode.name}, {len(program.parts)} vCPUs"
    if plan is not None:
        ways = [name for name in ("fast", "int3", "churns") if getattr(plan, name)]
        places = ", ".join(f"{at:#x}" for at in plan.breakpoints)
        watched = ", ".join(f"{at:#x}:{length}" for at, length, _ in plan.watches)
        patched = ", ".join(f"{at:#x}:{length}" for at, length in plan.patches)
        head += f", {' '.join(ways)}, breakpoints at {places}, watchpoints {watched or 'none'}"
        head += f", patches {patched or 'none'}"
    return "\n    ".join([head, *verdict.differences])


def _words(entry: tuple[int, ...]) -> str:
    names = ("vector", "error", "ip", "cs", "flags", "stack", "dr6", "cr2")
    return " ".join(f"{name} {value:#x}" for name, value in zip(names, entry, strict=True))
