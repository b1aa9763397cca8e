# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plays recorded programs of calls on the mock, and compares every answer with real Xen's.

    replay.py FILE... [--json]

prints ``agree A of B`` and, for each program, the first answer that differs; exit status 1 if any
does. Files are JSON lines, xz-compressed where the name ends in .xz, one program a line:

    {"xen": "4.17.7", "seed": 7, "batch": 0, "setup": {...}, "steps": [[op, args, rc, errno, out]]}

``op`` is a method of the Backend Protocol and ``args`` what it takes behind the domid, arrays as
lists; access numbers are the running release's. ``rc`` is 0 or -1, ``errno`` Linux's number or 0,
``out`` what the method returns, null after a failure. ``seed`` only names the program.

``setup`` says all that the answers depend on, see :class:`Setup`. Consecutive programs of one
``batch`` ran on one domain, one after the other; the first found it freshly created,
still paused.
:class:`Player` is what brings the domain to a known state before and after each program. It speaks
the Protocol alone: a recorder plays with it on the real backend, the replay on the mock.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import lzma
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from xenaltp2m.backend import Backend
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.errors import XenError
from xenaltp2m.types import ALL_GFNS, Access, Altp2mMode

POPULATE = "domain_populate_physmap_exact"
DECREASE = "domain_decrease_reservation_exact"


@dataclass(frozen=True)
class Setup:
    """The host and the domain a program ran on: all that its answers depend on."""

    type: str = "pvh"
    memory_kib: int = 16 << 10
    """RAM from gfn 0 on, in 2M entries as far as they fit."""
    max_kib: int = 64 << 10
    """What ``domain_setmaxmem`` was given before the first program of a batch."""
    vcpus: int = 1
    mode: str = "external"
    """``altp2m=`` in xl.cfg."""
    view_count: int = 10
    """``altp2m_count=``, which Xen knows from 4.21 on."""
    executable_superpages: bool = False
    """What Xen says at boot: "VMX: Disabling executable EPT superpages" makes it false."""
    virtualisation_exceptions: bool = False
    """Whether the CPU has #VE."""
    physical_address_bits: int = 39
    """The CPU's ``maxphysaddr``."""
    started: bool = False
    """Whether the domain ran for a moment, upon which Xen maps the APIC's page."""
    listened: bool = False
    """Whether a monitor is enabled all along, as host access calls need."""
    warm_up: tuple[int, ...] = ()
    """gfns whose host entries are made 4K ones, RAM or empty, before the first program."""


class Answer(NamedTuple):
    """What a call gave."""

    rc: int
    errno: int
    out: Any


@dataclass(frozen=True)
class Program:
    """A line of a trace."""

    xen: str
    seed: int
    batch: int
    setup: Setup
    steps: list[tuple[str, list[Any], Answer]]

    @property
    def release(self) -> tuple[int, int]:
        """The release, without its point."""
        major, minor = self.xen.split(".")[:2]
        return int(major), int(minor)

    @classmethod
    def parse(cls, line: str) -> Program:
        """Read a line; what is missing, or unknown, is an error."""
        fields = json.loads(line)
        setup = fields.pop("setup")
        steps = fields.pop("steps")
        return cls(
            setup=Setup(**setup | {"warm_up": tuple(setup.get("warm_up", ()))}),
            steps=[(op, args, Answer(rc, errno, out)) for op, args, rc, errno, out in steps],
            **fields,
        )

    def line(self) -> str:
        """Return the line that :meth:`parse` reads."""
        fields = dataclasses.asdict(self)
        fields["steps"] = [[op, args, *answer] for op, args, answer in self.steps]
        return json.dumps(fields, separators=(",", ":"))


class Player:
    """Plays the programs of one batch on one domain."""

    def __init__(self, backend: Backend, domid: int, setup: Setup) -> None:
        """Warm the domain up: it must be freshly created."""
        self._backend = backend
        self._domid = domid
        self._warm_up = setup.warm_up
        self._populated: set[int] = set()
        if setup.started:
            backend.domain_unpause(domid)
            backend.domain_pause(domid)
        self._ring = backend.monitor_enable(domid)[1] if setup.listened else None
        backend.domain_setmaxmem(domid, setup.max_kib)
        self._switch(True)
        for gfn in setup.warm_up:
            self._allow(gfn)
        self._switch(False)

    def play(self, calls: Iterable[tuple[str, Sequence[Any]]]) -> Iterator[Answer]:
        """Switch altp2m on, make the calls, and clear up behind them."""
        self._switch(True)
        for op, args in calls:
            answer = perform(self._backend, self._domid, op, args)
            if op in {POPULATE, DECREASE} and not answer.rc:
                gfns = set(args[0])
                self._populated = (
                    self._populated | gfns if op == POPULATE else self._populated - gfns
                )
            yield answer
        self._clear_up()

    def close(self) -> None:
        """Give the monitor back, if there is one."""
        if self._ring is not None:
            self._backend.monitor_unmap_ring(self._ring)
            self._backend.monitor_disable(self._domid)

    def _clear_up(self) -> None:
        """Drop what was populated; give the host its default and the warm gfns their access."""
        self._switch(False)
        for gfn in sorted(self._populated):
            perform(self._backend, self._domid, DECREASE, [[gfn], 0])
        self._populated.clear()
        self._switch(True)
        self._allow(ALL_GFNS)
        for gfn in self._warm_up:
            self._allow(gfn)
            self._backend.altp2m_set_suppress_ve(self._domid, 0, gfn, True)
        self._switch(False)

    def _switch(self, state: bool) -> None:
        self._backend.altp2m_set_domain_state(self._domid, state)

    def _allow(self, gfn: int) -> None:
        rwx = self._backend.release.access_numbers[Access.RWX]
        self._backend.altp2m_set_mem_access(self._domid, 0, gfn, rwx)


def perform(backend: Backend, domid: int, op: str, args: Sequence[Any]) -> Answer:
    """Make one call of a program."""
    values = [decode(name, value) for name, value in zip(parameters(op), args, strict=True)]
    try:
        out = getattr(backend, op)(domid, *values)
    except XenError as error:
        if error.errno is None:  # no call was made: nothing to compare
            raise
        return Answer(-1, error.errno, None)
    return Answer(0, 0, list(out) if isinstance(out, tuple) else out)


@functools.cache
def parameters(op: str) -> list[str]:
    """Name what an operation takes behind the domid."""
    return list(inspect.signature(getattr(Backend, op)).parameters)[2:]


def decode(name: str, value: Any) -> Any:
    """Make of a JSON value what the Protocol takes for the parameter of that name."""
    if name == "gfns":
        return array("Q", value)
    return bytes(value) if name == "accesses" else value


class Difference(NamedTuple):
    """The first answer of a program in which the mock and Xen differ."""

    seed: int
    step: int
    op: str
    args: list[Any]
    xen: Answer
    mock: Answer

    def __str__(self) -> str:
        args = ", ".join(map(str, self.args))
        return (
            f"seed {self.seed} step {self.step}: {self.op}({args}): "
            f"Xen {tuple(self.xen)}, mock {tuple(self.mock)}"
        )


@dataclass
class Result:
    """How well the mock and the traces agree."""

    programs: int = 0
    steps: int = 0
    agree: int = 0
    differences: list[Difference] = dataclasses.field(default_factory=list)

    def add(self, program: Program, answers: Iterable[Answer]) -> None:
        """Compare a program's answers; after a difference the states are no longer comparable."""
        self.programs += 1
        self.steps += len(program.steps)
        first = None
        for number, ((op, args, xen), mock) in enumerate(zip(program.steps, answers, strict=True)):
            if xen == mock:
                self.agree += 1
            elif first is None:
                first = Difference(program.seed, number, op, args, xen, mock)
        if first is not None:
            self.differences.append(first)


def replay(programs: Iterable[Program]) -> Result:
    """Play programs on the mock."""
    result = Result()
    for _, batch in itertools.groupby(programs, lambda p: (p.xen, p.setup, p.batch)):
        player = None
        for program in batch:
            player = player or mock_player(program)
            result.add(program, player.play((op, args) for op, args, _ in program.steps))
        if player is not None:
            player.close()
    return result


def mock_player(program: Program) -> Player:
    """Make the host and the domain that a program's setup describes, as the mock has them."""
    setup = program.setup
    backend = MockBackend(
        program.release,
        executable_superpages=setup.executable_superpages,
        has_virtualisation_exceptions=setup.virtualisation_exceptions,
        physical_address_bits=setup.physical_address_bits,
    )
    domid = backend.add_domain(
        kind=setup.type,
        mode=Altp2mMode[setup.mode.upper()],
        view_count=setup.view_count,
        vcpus=setup.vcpus,
        memory_kib=setup.memory_kib,
    )
    return Player(backend, domid, setup)


def read(path: Path) -> Iterator[Program]:
    """Read a trace file."""
    with open_text(path) as lines:
        yield from map(Program.parse, lines)


def open_text(path: Path, mode: str = "r") -> TextIO:
    """Open a text file, compressed where its name says so."""
    opener = lzma.open if path.suffix == ".xz" else open
    return opener(path, f"{mode}t", encoding="utf-8")  # type: ignore[return-value]


def main() -> int:
    """Replay the files named."""
    parser = argparse.ArgumentParser(description="Compare the mock's answers with recorded ones.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    result = replay(itertools.chain.from_iterable(map(read, arguments.files)))
    if arguments.json:
        differences = [
            difference._asdict() | {"xen": list(difference.xen), "mock": list(difference.mock)}
            for difference in result.differences
        ]
        print(json.dumps(dataclasses.asdict(result) | {"differences": differences}, indent=2))
    else:
        print(f"agree {result.agree} of {result.steps} in {result.programs} programs")
        for difference in result.differences:
            print(f"  {difference}")
    return 1 if result.differences else 0


if __name__ == "__main__":
    sys.exit(main())
