# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines of the simulator that run programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.symbols import Image

from .compare import Verdict, judge
from .machine import IMAGE, Machine
from .programs import Program, generate

_AT_ONCE = 4000
"""Instructions; a program executes fewer."""


class Simulated(Machine):
    """A machine whose vCPUs the mock executes."""

    halts = True

    def __init__(self, mock: MockBackend, dom: xa.Domain, vcpus: int) -> None:
        super().__init__(dom, _image(), vcpus)
        self._mock = mock

    def begin(self, vcpu: int, registers: dict[str, int]) -> None:
        self._mock.execute(self._domid, registers, vcpu)


@cache
def _image() -> Image:
    return Image.open(IMAGE)


@contextmanager
def simulated(program: Program, xen: tuple[int, int] = (4, 17)) -> Iterator[Machine]:
    """Make a machine for a program."""
    mock = MockBackend(xen, memory_pages=1 << 13, seed=program.seed)
    mock.steps_at_once = _AT_ONCE
    domid = mock.add_domain(
        "programs", memory_kib=16 << 10, max_kib=32 << 10, vcpus=len(program.parts)
    )
    mock.boot(domid, IMAGE)
    with xa.connect(mock) as host, host.domain(domid) as dom:
        yield Simulated(mock, dom, len(program.parts))


def judge_seed(seed: int, xen: tuple[int, int] = (4, 17)) -> Verdict:
    """Judge the program of a seed."""
    program = generate(seed)
    with simulated(program, xen) as machine:
        return judge(program, machine)
