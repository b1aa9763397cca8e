# SPDX-License-Identifier: LGPL-2.1-or-later
"""Effects: what an instruction does besides its memory accesses, where Xen may take part in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from xenaltp2m.backend.mock.vcpu import HARDWARE_EXCEPTION


@dataclass(frozen=True)
class SetRegisters:
    """Load registers; ``rip`` is a jump."""

    values: Mapping[str, int]


@dataclass(frozen=True)
class WriteControlRegister:
    """MOV to CR0 (index 0), CR3 (1), CR4 (2), or XSETBV of XCR0 (3)."""

    index: int
    value: int


@dataclass(frozen=True)
class WriteMsr:
    """WRMSR."""

    msr: int
    value: int


@dataclass(frozen=True)
class Cpuid:
    """CPUID of what is in eax and ecx, with the results for eax, ebx, ecx and edx."""

    results: tuple[int, int, int, int] = (0xD, 0x756E6547, 0x6C65746E, 0x49656E69)

    @property
    def registers(self) -> dict[str, int]:
        """The results by their registers."""
        return dict(zip(("rax", "rbx", "rcx", "rdx"), self.results, strict=True))


@dataclass(frozen=True)
class DescriptorAccess:
    """SIDT (descriptor 1), SGDT (2), SLDT (3), STR (4), or where it is a write LIDT to LTR."""

    descriptor: int
    is_write: bool = False
    instr_info: int = 0
    exit_qualification: int = 0


@dataclass(frozen=True)
class PortIo:
    """IN or OUT; what comes in goes to rax."""

    port: int
    size: int = 1
    is_in: bool = False
    is_string: bool = False
    value: int = 0


@dataclass(frozen=True)
class GuestRequest:
    """VMCALL of ``HVMOP_guest_request_vm_event``."""


@dataclass(frozen=True)
class DebugException:
    """A #DB: of kind 3 after the instruction, as of the trap flag; of kind 5 INT1 itself."""

    kind: int = HARDWARE_EXCEPTION


@dataclass(frozen=True)
class Halt:
    """HLT: the vCPU waits until ``Vcpu.halted`` is False again."""


Effect: TypeAlias = (
    SetRegisters
    | WriteControlRegister
    | WriteMsr
    | Cpuid
    | DescriptorAccess
    | PortIo
    | GuestRequest
    | DebugException
    | Halt
)


class Done(Enum):
    """How far an instruction came."""

    NATIVE = auto()
    """The CPU completed it."""
    EXITED = auto()
    """Xen completed it, after an exit."""
    HELD = auto()
    """It is not completed, and comes again."""


def moves_itself(effect: Effect | None) -> bool:
    """Whether an effect has set rip, or left it to Xen."""
    if isinstance(effect, SetRegisters):
        return "rip" in effect.values
    return isinstance(effect, DebugException) and effect.kind == HARDWARE_EXCEPTION
