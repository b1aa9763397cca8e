# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls and returns, as a trace yields them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from xenaltp2m.types import VcpuId
from xenaltp2m.values.events import Registers


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function; the vCPU is about to execute the function's first instruction."""

    name: str
    vcpu: VcpuId
    time: float
    """Seconds since the start of the trace."""
    cr3: int
    stack: int
    """The virtual address of the top of the stack, which contains the return address."""
    caller: int | None
    """The virtual return address; None if the stack cannot be read."""
    arguments: tuple[int, ...]
    """As many as were requested."""
    registers: Registers = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Return:
    """The return of a call."""

    call: Call
    vcpu: VcpuId
    time: float
    value: int
    """rax in 64-bit code, else eax."""
    registers: Registers = field(repr=False, compare=False)


Seen: TypeAlias = Call | Return
