# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dom0's side of tests/lab/guest/events.c: makes a vCPU of that guest do things."""

from __future__ import annotations

import struct
import time

import xenaltp2m as xa
from xenaltp2m.tools.symbols import Image

_SLOT = struct.Struct("<IIQIIII4IIIII32I64x")
_COMMAND, _ARGUMENT, _ANSWER, _FAULT, _HEARTBEAT, _ROUNDS, _RESULTS = 0, 4, 16, 20, 24, 28, 32
_INTERRUPTS, _LAST_EIP, _LAST_DR6, _UP, _EXCEPTIONS = 48, 52, 56, 60, 64
_WORD = 4

DB, BP, UD, GP = 1, 3, 6, 13


class GuestFault(Exception):
    """A command has ended in an exception of the CPU."""

    def __init__(self, vector: int) -> None:
        super().__init__(f"the command raised exception {vector}")
        self.vector = vector


class Mailbox:
    """One vCPU of the guest, told what to do; its answers and counters.

    Commands are the functions ``command_NAME`` of events.c.
    """

    def __init__(self, dom: xa.Domain, image: Image, vcpu: int = 0) -> None:
        self.image = image
        self.vcpu = vcpu
        self._memory = dom.memory
        self._slot = image.address("mailbox") + vcpu * _SLOT.size

    def gfn(self, symbol: str) -> int:
        """The page of something that has a page of its own."""
        [gfn] = self.image.gfns(symbol)
        return int(gfn)

    def command(
        self,
        name: str,
        arg: int | str = 0,
        value: int = 0,
        *,
        wait: bool = True,
        timeout: float = 5.0,
    ) -> int:
        """Make the vCPU do something, and return its answer; without ``wait`` return 0 at once.

        Args:
            name: What to do.
            arg: What with; a name stands for the address of that symbol.
            value: What more with: what to write, cpuid's subleaf.
            wait: Whether to wait until it is done.
            timeout: Seconds to wait.

        Raises:
            GuestFault: It raised an exception.
            TimeoutError: It is not done.
        """
        if self.busy():
            raise RuntimeError(f"vCPU {self.vcpu} has not done its last command")
        argument = self.image.address(arg) if isinstance(arg, str) else arg
        self._write(_ARGUMENT, struct.pack("<IQ", argument, value))
        self._write(_COMMAND, struct.pack("<I", self.image.address(f"command_{name}")))
        return self.answer(timeout) if wait else 0

    def answer(self, timeout: float = 5.0) -> int:
        """Wait for the answer of the last command.

        Raises:
            GuestFault: It raised an exception.
            TimeoutError: It is not done.
        """
        end = time.monotonic() + timeout
        while self.busy():
            if time.monotonic() > end:
                raise TimeoutError(f"vCPU {self.vcpu} has not answered within {timeout} s")
            time.sleep(0.001)
        if fault := self._word(_FAULT):
            raise GuestFault(fault - 1)
        return self._word(_ANSWER)

    def busy(self) -> bool:
        """Whether a command is not done yet."""
        return self._word(_COMMAND) != 0

    def storm(self, function: str | None = "target") -> None:
        """Have a function called for ever, or none any more; the vCPU goes on taking commands."""
        self.command("storm", function or 0)

    def up(self) -> bool:
        """Whether the vCPU has started."""
        return self._word(_UP) != 0

    def heartbeat(self) -> int:
        """How often the vCPU went round its loop."""
        return self._word(_HEARTBEAT)

    def alive(self, timeout: float = 5.0) -> bool:
        """Whether it goes round at least once more."""
        before, end = self.heartbeat(), time.monotonic() + timeout
        while self.heartbeat() == before:
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def rounds(self) -> int:
        """How often the function that storms was called."""
        return self._word(_ROUNDS)

    def results(self) -> tuple[int, ...]:
        """Four words: cpuid's registers; of rdmsr, wrmsr and xcr0 the low and the high one."""
        return struct.unpack("<4I", self._read(_RESULTS, 16))

    def interrupts(self) -> int:
        """How many interrupts came."""
        return self._word(_INTERRUPTS)

    def exceptions(self, vector: int) -> int:
        """How often an exception was raised, asked for or not."""
        return self._word(_EXCEPTIONS + _WORD * vector)

    def last_eip(self) -> int:
        """Where the latest exception returns to."""
        return self._word(_LAST_EIP)

    def last_dr6(self) -> int:
        """What was in dr6 at the latest exception."""
        return self._word(_LAST_DR6)

    def _word(self, offset: int) -> int:
        return int.from_bytes(self._read(offset, _WORD), "little")

    def _read(self, offset: int, length: int) -> bytes:
        return self._memory.read(self._slot + offset, length)

    def _write(self, offset: int, data: bytes) -> None:
        self._memory.write(self._slot + offset, data)
