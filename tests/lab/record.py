# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records what real Xen answers to random programs of calls. Runs in dom0, as root.

    record.py --seed 1000 --steps 100000 --output traces.jsonl

Each batch of programs gets a fresh domain, made by xl and paused, of a kind that its number
chooses. The same seed makes the same programs, whatever the answers; replay.py compares them with
the mock's. ``--backend mock`` records the mock, to try a change of the generator.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from replay import DECREASE, POPULATE, Player, Program, Setup, mock_player, open_text

from xenaltp2m.backend import Backend, open_backend
from xenaltp2m.types import ALL_GFNS

PROGRAMS_IN_BATCH = 40
STEPS_IN_PROGRAM = 120

SMALL: list[int] = [*range(0x100, 0x108)]
"""RAM that the warm-up maps in 4K entries."""
LARGE: list[int] = [*range(0x400, 0x406), 0x5FF, 0x600, 0x7FE, 0xA00]
"""RAM that stays in 2M entries until a program touches it in the host p2m."""
HOLES: list[int] = [0x2000, 0x7FFFF, *range(0x100000, 0x100006)]
SPECIAL: list[int] = [0xFEE00, 0xFEFF9, 0xFEFFC, 0xFEFFF]
"""The APIC's page, which is direct MMIO, and pages of the toolstack's."""
ODD = [0, ALL_GFNS, ALL_GFNS - 1, 1 << 36, 1 << 52, 0xFFFFF, 0x1FF, 0x200]
DROPS = [*HOLES, *SMALL[4:], *LARGE[4:]]

ALTP2M_OPS = {
    "altp2m_get_mem_access": 22,
    "altp2m_set_mem_access": 18,
    "altp2m_change_gfn": 15,
    "altp2m_get_suppress_ve": 8,
    "altp2m_set_suppress_ve": 5,
    "altp2m_create_view": 7,
    "altp2m_switch_to_view": 5,
    "altp2m_set_mem_access_multi": 5,
    "altp2m_get_vcpu_p2m_idx": 3,
    "altp2m_set_visibility": 4,
    "altp2m_destroy_view": 3,
    "altp2m_set_suppress_ve_multi": 3,
    "altp2m_set_domain_state": 1,
    "altp2m_get_domain_state": 1,
    "altp2m_set_vcpu_enable_notify": 2,
    "altp2m_set_vcpu_disable_notify": 1,
}
HOST_OPS = {
    POPULATE: 4,
    DECREASE: 4,
    "set_mem_access": 2,
    "set_mem_access_multi": 1,
    "get_mem_access": 2,
    "domain_maximum_gpfn": 1,
    "hvm_param_get": 1,
}
OPS = ALTP2M_OPS | HOST_OPS


class Generator:
    """Makes the calls of one program."""

    def __init__(self, seed: int, setup: Setup) -> None:
        self._random: random.Random = random.Random(seed)
        self._vcpus: int = setup.vcpus
        # A program stays with few gfns and views, so that its calls meet each other's traces.
        pools = [SMALL, SMALL, LARGE, [*SMALL, *LARGE, *HOLES], [*SMALL, *HOLES, *SPECIAL]]
        self._gfns = self._random.choice(pools)
        self._views = self._random.choice([2, 3, 5, 10])

    def calls(self, count: int) -> Iterator[tuple[str, list[Any]]]:
        """Yield calls: (operation, arguments behind the domid)."""
        for _ in range(self._random.choice([2, 4, self._views])):
            yield "altp2m_create_view", [self.access()]
        for op in self._random.choices([*OPS], [*OPS.values()], k=count):
            yield op, self.arguments(op)

    def arguments(self, op: str) -> list[Any]:
        """Make arguments: mostly ones that Xen takes."""
        chance = self._random.random
        match op:
            case "altp2m_get_domain_state" | "domain_maximum_gpfn":
                return []
            case "altp2m_set_domain_state":
                return [chance() < 0.7]
            case "altp2m_create_view":
                return [self.access()]
            case "altp2m_destroy_view" | "altp2m_switch_to_view":
                return [self.view()]
            case "altp2m_set_visibility":
                return [self.view(), chance() < 0.6]
            case "altp2m_get_vcpu_p2m_idx" | "altp2m_set_vcpu_disable_notify":
                return [self.vcpu()]
            case "altp2m_set_vcpu_enable_notify":
                return [self.vcpu(), self.gfn()]
            case "altp2m_set_mem_access":
                return [self.view(), self.gfn(), self.access()]
            case "altp2m_get_mem_access" | "altp2m_get_suppress_ve":
                return [self.view(), self.gfn()]
            case "altp2m_change_gfn":
                new = ALL_GFNS if chance() < 0.2 else self.gfn()
                return [self.view(), self.gfn(), new]
            case "altp2m_set_suppress_ve":
                gfn = self.gfn()
                return [self.view(), 0x100 if gfn == ALL_GFNS else gfn, chance() < 0.5]
            case "altp2m_set_suppress_ve_multi":
                first = self.gfn()
                last = first + self._random.choice([-1, 0, 0, 1, 2, 3, 9])
                return [self.view(), first, max(0, min(last, ALL_GFNS)), chance() < 0.5]
            case "altp2m_set_mem_access_multi":
                gfns = self.gfns()
                return [self.view(), [self.access(byte=True) for _ in gfns], gfns]
            case "set_mem_access_multi":
                gfns = self.gfns()
                return [[self.access(byte=True) for _ in gfns], gfns]
            case "set_mem_access":
                return [self.access(byte=True), self.gfn(), self._random.choice([0, 1, 1, 2, 3])]
            case "get_mem_access":
                return [self.gfn()]
            case "hvm_param_get":
                return [35]
            case _:
                gfns = self._random.sample(DROPS, self._random.choice([1, 1, 1, 2]))
                return [gfns, 0]

    def gfn(self) -> int:
        """Choose a gfn."""
        if self._random.random() < 0.04:
            return self._random.choice(ODD)
        if self._random.random() < 0.15:
            return self._random.choice([*HOLES, *SPECIAL, *LARGE, *SMALL])
        return self._random.choice(self._gfns)

    def gfns(self) -> list[int]:
        """Choose up to six gfns, any of them perhaps twice."""
        return [self.gfn() for _ in range(self._random.choice([0, 1, 2, 3, 6]))]

    def view(self) -> int:
        """Choose a view: mostly one that may exist."""
        if self._random.random() < 0.03:
            return self._random.choice([10, 11, 40, 511, 512, 0xFFFE, 0xFFFF])
        return self._random.randrange(self._views)

    def access(self, *, byte: bool = False) -> int:
        """Choose an access number: mostly one that every release knows."""
        if self._random.random() < 0.06:
            return self._random.choice([10, 11, 12, 99, 255] + [256, 0xFFFF] * (not byte))
        return self._random.choice([7, 7, 5, 3, 4, 1, 0, 2, 6, 8, 9])

    def vcpu(self) -> int:
        """Choose a vCPU, perhaps one too many."""
        numbers: list[int] = [*range(self._vcpus), self._vcpus, 0xFFFFFFFF]
        return self._random.choice(numbers)


def setup_of(batch: int, cpu: Setup) -> Setup:
    """Choose the kind of domain for a batch: they take turns."""
    modes = ["external", "external", "mixed", "limited"]
    return dataclasses.replace(
        cpu,
        vcpus=4 if batch % 3 == 1 else 1,
        mode=modes[batch % len(modes)],
        started=batch % 2 == 1,
        listened=batch % 4 == 3,
        warm_up=(*SMALL, *HOLES),
    )


def create(backend: Backend, setup: Setup) -> tuple[int, Callable[[], None]]:
    """Make a domain with xl; return its domid and what destroys it."""
    name = "recorded"
    config = f"/lab/{setup.mode}-{setup.vcpus}.cfg"
    subprocess.run(["xl", "create", "-p", "-q", "-e", config, f'name="{name}"'], check=True)
    domid = backend.name_to_domid(name)
    if domid is None:
        raise SystemExit("xl made a domain that has no name")

    def destroy() -> None:
        subprocess.run(["xl", "destroy", str(domid)], check=True)

    return domid, destroy


def record(kind: str, seed: int, steps: int) -> Iterator[Program]:
    """Yield recorded programs until at least ``steps`` calls have been made."""
    backend = open_backend(kind)
    xen = f"{backend.release}{backend.xen_extraversion()}" if kind == "libxc" else "4.17.0"
    done = 0
    for batch in itertools.count():
        setup = setup_of(batch, Setup(virtualisation_exceptions=True))
        player, destroy = _player(kind, backend, xen, setup)
        for number in range(PROGRAMS_IN_BATCH):
            program = seed + batch * PROGRAMS_IN_BATCH + number
            calls = list(Generator(program, setup).calls(STEPS_IN_PROGRAM))
            answers = player.play(calls)
            played = [(op, args, answer) for (op, args), answer in zip(calls, answers, strict=True)]
            yield Program(xen, program, batch, setup, played)
            done += len(calls)
            if done >= steps:
                break
        player.close()
        destroy()
        if done >= steps:
            backend.close()
            return


def _player(
    kind: str, backend: Backend, xen: str, setup: Setup
) -> tuple[Player, Callable[[], None]]:
    if kind == "mock":
        return mock_player(Program(xen, 0, 0, setup, [])), lambda: None
    domid, destroy = create(backend, setup)
    return Player(backend, domid, setup), destroy


def main() -> int:
    """Record into a file, with progress on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="number of the first program")
    parser.add_argument("--steps", type=int, default=10_000, help="calls to record, at least")
    parser.add_argument("--output", type=Path, required=True, help="file, .xz for compressed")
    parser.add_argument("--backend", choices=["libxc", "mock"], default="libxc")
    arguments = parser.parse_args()
    done = 0
    with open_text(arguments.output, "w") as out:
        for number, program in enumerate(
            record(arguments.backend, arguments.seed, arguments.steps), 1
        ):
            print(program.line(), file=out)
            done += len(program.steps)
            if number % 50 == 0:
                print(f"{done} of {arguments.steps} calls", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
