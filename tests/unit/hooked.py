# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated machine with breakpoints, and a few of its instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.breakpoints.hooks import Hit
from xenaltp2m.tools.breakpoints.manager import Breakpoints

from .machinecode import Computer

WAYS = pytest.mark.parametrize(
    ("fast", "int3"), [(True, True), (False, True), (True, False)], ids=["fast", "toggle", "page"]
)
STEPS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
NOP, INC_EAX, INC_ECX, RET = b"\x90", b"\x40", b"\x41", b"\xc3"


def store_byte(address: int, value: int) -> bytes:
    return b"\xc6\x05" + address.to_bytes(4, "little") + bytes([value])


def call(at: int, target: int) -> bytes:
    """CALL, of which the first byte is at an address."""
    return b"\xe8" + (target - at - 5).to_bytes(4, "little", signed=True)


class Hooked:
    """A machine with breakpoints, that has not begun."""

    def __init__(
        self,
        code: bytes,
        memory: Mapping[int, bytes] | None = None,
        *,
        fast: bool = True,
        int3: bool = True,
        stack: ExitStack,
        xen: tuple[int, int] = (4, 17),
        **registers: int,
    ) -> None:
        self.host = MockBackend(xen, memory_pages=1 << 13)
        self.computer = Computer(code, memory, host=self.host)
        self.computer.set(**registers)
        self.computer.describe()
        self.domid = self.computer.domid
        self.xen = stack.enter_context(xa.connect(self.host))
        self.dom = stack.enter_context(self.xen.domain(self.domid))
        self.altp2m = stack.enter_context(self.dom.altp2m())
        self.monitor = stack.enter_context(self.dom.monitor())
        self.breakpoints = stack.enter_context(
            Breakpoints(self.altp2m, self.monitor, fast=fast, int3=int3)
        )
        self.seen: list[int] = []

    def note(self, hit: Hit) -> None:
        """A callback."""
        self.seen.append(hit.registers.rip)

    def go(self) -> Hooked:
        """Run until nothing happens."""
        self.host.steps_at_once = 200
        self.monitor.run(self.breakpoints, timeout=0.01)
        return self

    def register(self, name: str) -> int:
        return self.computer.register(name)

    @property
    def halted(self) -> bool:
        """Whether it came to its end, with no exception."""
        info = self.dom.info()
        return info.shutdown and self.computer.vector is None

    def read(self, address: int, size: int) -> bytes:
        return self.dom.memory.read(address, size)


Make = Callable[..., Hooked]
