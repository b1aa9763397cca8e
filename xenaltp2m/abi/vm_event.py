# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbers and encodings of vm_event, the requests and responses of a monitor's ring.

Requests and responses share one structure (``struct vm_event_st``, public/vm_event.h). All of it
but the registers lies at the same place in interface versions 6 and 7, see
:data:`xenaltp2m.abi.layouts.VM_EVENT`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import Any, Final

from xenaltp2m.abi.layouts import VM_EVENT, Layout

__all__ = [
    "HEAD",
    "REGISTER_PREFIX",
    "RESPONSE_HEAD",
    "SETTABLE_REGISTERS",
    "AccessFlag",
    "Flag",
    "Reason",
    "as_line",
    "encode_request",
    "layout",
    "patch_registers",
    "read_data_room",
    "words_of",
]


class Reason(enum.IntEnum):
    """``VM_EVENT_REASON_*``: why a request was sent."""

    UNKNOWN = 0
    MEM_ACCESS = 1
    MEM_SHARING = 2
    MEM_PAGING = 3
    WRITE_CTRLREG = 4
    MOV_TO_MSR = 5
    SOFTWARE_BREAKPOINT = 6
    SINGLESTEP = 7
    GUEST_REQUEST = 8
    DEBUG_EXCEPTION = 9
    CPUID = 10
    PRIVILEGED_CALL = 11
    INTERRUPT = 12
    DESCRIPTOR_ACCESS = 13
    EMUL_UNIMPLEMENTED = 14
    VMEXIT = 15
    IO_INSTRUCTION = 16


class Flag(enum.IntFlag):
    """``VM_EVENT_FLAG_*``: what a request tells beside its reason, what a response asks for."""

    VCPU_PAUSED = 1 << 0
    FOREIGN = 1 << 1
    EMULATE = 1 << 2
    EMULATE_NOWRITE = 1 << 3
    TOGGLE_SINGLESTEP = 1 << 4
    SET_EMUL_READ_DATA = 1 << 5
    DENY = 1 << 6
    ALTERNATE_P2M = 1 << 7
    SET_REGISTERS = 1 << 8
    SET_EMUL_INSN_DATA = 1 << 9
    GET_NEXT_INTERRUPT = 1 << 10
    FAST_SINGLESTEP = 1 << 11
    NESTED_P2M = 1 << 12
    RESET_VMTRACE = 1 << 13
    RESET_FORK_STATE = 1 << 14
    RESET_FORK_MEMORY = 1 << 15


class AccessFlag(enum.IntFlag):
    """``MEM_ACCESS_*``: what a guest tried, and how the fault came about."""

    R = 1 << 0
    W = 1 << 1
    X = 1 << 2
    GLA_VALID = 1 << 3
    FAULT_WITH_GLA = 1 << 4
    FAULT_IN_GPT = 1 << 5


HEAD: Final = struct.Struct("<IIIIH")
"""version, flags, reason, vcpu_id, altp2m_idx: the same in every version of the interface."""

RESPONSE_HEAD: Final = struct.Struct("<IIIIH6x32s")
"""The same and ``u``: all of a response but its registers or data for the emulator."""

SETTABLE_REGISTERS: Final = frozenset(
    {"rflags", "rip", "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"}
    | {f"r{number}" for number in range(8, 16)}
)
"""What ``VM_EVENT_FLAG_SET_REGISTERS`` sets (``hvm_vm_event_do_resume``, all releases)."""

REGISTER_PREFIX = "data.regs.x86."
"""Before a register's name in a layout's field."""


def layout(version: int) -> Layout:
    """Return the structure of an interface version.

    Raises:
        LookupError: This package does not know the version.
    """
    try:
        return VM_EVENT[version]
    except KeyError:
        known = " and ".join(map(str, VM_EVENT))
        raise LookupError(
            f"vm_event interface version {version} is not known: {known} are"
        ) from None


def as_line(raw: bytes, *, response: bool = False) -> dict[str, Any]:
    """Describe a request or a response as a JSON object: its kind, its vCPU and its bytes."""
    _, flags, reason, vcpu, _ = HEAD.unpack_from(raw)
    if response:
        return {"response": words_of(flags), "vcpu": vcpu, "raw": raw.hex()}
    known = reason in Reason._value2member_map_
    return {"request": Reason(reason).name if known else reason, "vcpu": vcpu, "raw": raw.hex()}


def words_of(flags: int) -> list[str]:
    """Name the flags of a request or a response."""
    return [str(flag.name) for flag in Flag if flag & flags]


def read_data_room(version: int) -> int:
    """Return how many bytes a response can give the emulator to read."""
    return layout(version).fields["data.emul.read.data"].width


def encode_request(
    version: int,
    reason: int,
    vcpu: int,
    *,
    flags: int = 0,
    view: int = 0,
    fields: Mapping[str, int] | None = None,
    registers: Mapping[str, int] | None = None,
) -> bytearray:
    """Write a request as Xen would.

    Args:
        version: The interface version.
        reason: A :class:`Reason`, or a number no release knows.
        vcpu: The vCPU.
        flags: :class:`Flag` bits.
        view: The vCPU's view.
        fields: Fields of ``u`` by their path in C without ``u.``, such as ``mem_access.gfn``.
        registers: Registers by name; the others are 0.
    """
    shape = layout(version)
    request = bytearray(shape.size)
    HEAD.pack_into(request, 0, version, flags, reason, vcpu, view)
    for name, value in (fields or {}).items():
        shape.put(request, f"u.{name}", value)
    for name, value in (registers or {}).items():
        shape.put(request, REGISTER_PREFIX + name, value)
    return request


def patch_registers(version: int, raw: bytes, values: Mapping[str, int]) -> bytearray:
    """Return the registers of a request with some replaced, as a response carries them."""
    shape = layout(version)
    start = shape.fields["data"].offset
    patched = bytearray(raw)
    for name, value in values.items():
        shape.put(patched, REGISTER_PREFIX + name, value)
    return patched[start : shape.fields[f"{REGISTER_PREFIX}rip"].offset + 8]
