# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hypercalls that a simulated guest may make: those that guests without drivers need.

Numbers are those of ``public/xen.h``, ``sched.h``, ``vcpu.h`` and ``hvm/hvm_op.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import EEXIST, EINVAL, ENOENT, ENOSYS, EOPNOTSUPP, EPERM
from typing import Any, NamedTuple, Protocol

from xenaltp2m.abi.vm_event import Reason
from xenaltp2m.abi.x86 import Segment
from xenaltp2m.backend.mock.machine import Domain, HypercallError
from xenaltp2m.backend.mock.monitor import Monitor
from xenaltp2m.backend.mock.vcpu import (
    DR6_DEFAULT,
    DR7_DEFAULT,
    FLAT_CODE_64,
    FLAT_DATA,
    FLAT_LIMIT,
    GENERAL_REGISTERS,
    Vcpu,
    Waits,
)
from xenaltp2m.types import Altp2mMode

_XEN_VERSION, _VCPU_OP, _SCHED_OP, _HVM_OP = 17, 24, 29, 34
_INITIALISE, _UP, _IS_UP = 0, 1, 3
_YIELD, _BLOCK, _SHUTDOWN, _POLL = 0, 1, 2, 3
_GET_PARAM, _GUEST_REQUEST, _ALTP2M = 1, 24, 25
_SELF = 0x7FF0
_U64 = (1 << 64) - 1
_MODE_32, _MODE_64 = 0, 1
_CONTEXT_32 = struct.Struct("<13I4xQ10I5H")
"""``struct vcpu_hvm_x86_32``."""
_CONTEXT_64 = struct.Struct("<14Q")
_ORDER = (*GENERAL_REGISTERS[:8], "rip", "rflags", "cr0", "cr3", "cr4", "msr_efer")
_SEGMENTS = ("cs", "ds", "ss", "es", "tr")
_ALTP2M_OP = struct.Struct("<IIHHI")
_ALTP2M_VERSION = 1
_ALTP2M_ARGUMENTS = 64
_SET_STATE, _ENABLE_NOTIFY = 2, 3


class Caller(Protocol):
    """What a hypercall needs of the vCPU that makes it."""

    monitor: Monitor
    vcpu: Vcpu

    @property
    def long(self) -> bool:
        """Whether it is in 64-bit mode."""

    @property
    def privilege(self) -> int:
        """The current privilege level."""

    def copy_from(self, linear: int, size: int) -> bytes:
        """Read the guest's memory; EFAULT where there is none."""

    def copy_to(self, linear: int, data: bytes) -> None:
        """Write the guest's memory; EFAULT where there is none."""


def hypercall(caller: Caller) -> Waits[None]:
    """``hvm_hypercall``: the number in rax, the result there, too."""
    vcpu = caller.vcpu
    wide = caller.long
    names = ("rdi", "rsi", "rdx") if wide else ("rbx", "rcx", "rdx")
    mask = _U64 if wide else 0xFFFF_FFFF
    number = vcpu.register("rax") & 0xFFFF_FFFF
    first, second, third = (vcpu.register(name) & mask for name in names)
    if caller.privilege:
        result = -EPERM
    elif number == _HVM_OP and first == _GUEST_REQUEST:
        result = 0
        yield from caller.monitor.report("guest_request", vcpu, Reason.GUEST_REQUEST, {})
    else:
        try:
            result = _dispatch(caller, number, first & 0xFFFF_FFFF, second, third)
        except HypercallError as refused:
            result = -refused.errno
    vcpu.set_register("rax", result & mask)


def _dispatch(caller: Caller, number: int, command: int, second: int, third: int) -> int:
    domain = caller.monitor.domain
    if number == _SCHED_OP:
        if command == _SHUTDOWN:
            domain.shut_down(int.from_bytes(caller.copy_from(second, 4), "little"))
            return 0
        # Nothing happens here that could be waited for: who blocks yields.
        return 0 if command in (_YIELD, _BLOCK, _POLL) else -ENOSYS
    if number == _VCPU_OP:
        return _vcpu_op(caller, command, second, third)
    if number == _XEN_VERSION and command == 0:
        major, minor = domain.release.version
        return major << 16 | minor
    if number == _HVM_OP and command == _GET_PARAM:
        return _get_param(caller, second)
    if number == _HVM_OP and command == _ALTP2M:
        return _altp2m_op(caller, second)
    return -ENOSYS


def _vcpu_op(caller: Caller, command: int, number: int, pointer: int) -> int:
    domain = caller.monitor.domain
    if number >= len(domain.vcpus):
        return -ENOENT
    target = domain.vcpus[number]
    if command == _INITIALISE:
        if target.initialised:
            return -EEXIST
        _initialise(target, caller.copy_from(pointer, 8 + _CONTEXT_32.size + 6))
        return 0
    if command == _UP:
        if not target.initialised:
            return -EINVAL
        target.online = True
        return 0
    if command == _IS_UP:
        return int(target.online)
    return -ENOSYS


def _initialise(vcpu: Vcpu, raw: bytes) -> None:
    """``arch_set_info_hvm_guest``."""
    mode = int.from_bytes(raw[:4], "little")
    for name in ("fs", "gs"):  # construct_vmcs
        vcpu.set_segment(name, Segment(0, FLAT_LIMIT, FLAT_DATA))
    if mode == _MODE_32:
        values = _CONTEXT_32.unpack_from(raw, 8)
        for name, *hidden in zip(_SEGMENTS, values[14:19], values[19:24], values[24:], strict=True):
            vcpu.set_segment(name, Segment(*hidden))
    elif mode == _MODE_64:
        values = _CONTEXT_64.unpack_from(raw, 8)
        vcpu.set_flat_segments(FLAT_CODE_64)
    else:
        raise HypercallError(EINVAL)
    vcpu.set_registers(dict(zip(_ORDER, values, strict=False)))
    vcpu.set_registers({"dr6": DR6_DEFAULT, "dr7": DR7_DEFAULT})
    vcpu.initialised = True


def _get_param(caller: Caller, pointer: int) -> int:
    """``HVMOP_get_param``: struct xen_hvm_param."""
    domid, index = struct.unpack("<HxxI", caller.copy_from(pointer, 8))
    if domid != _SELF:
        return -EPERM
    value = caller.monitor.domain.get_param(index)
    caller.copy_to(pointer + 8, value.to_bytes(8, "little"))
    return 0


class _Operation(NamedTuple):
    """One of altp2m's: how its arguments lie, which of them must be 0, what it answers where."""

    shape: str
    call: Callable[..., Any]
    padding: tuple[int, ...] = ()
    answer: str = ""
    answer_at: int = 0


_ALTP2M_OPERATIONS = {
    1: _Operation("<", lambda domain: domain.active, answer="<B"),
    2: _Operation("<B", lambda domain, state: domain.set_active(bool(state))),
    _ENABLE_NOTIFY: _Operation("<IIQ", Domain.enable_notify, (1,)),
    4: _Operation("<2xH", Domain.create_view, answer="<H"),
    5: _Operation("<H", Domain.destroy_view),
    6: _Operation("<H", Domain.switch_to_view),
    7: _Operation(
        "<HHIQ", lambda domain, view, access, gfn: domain.set_mem_access(view, gfn, access), (2,)
    ),
    8: _Operation("<HHIQQ", Domain.change_gfn, (1, 2)),
    10: _Operation(
        "<HBBIQ",
        lambda domain, view, suppress, gfn: domain.set_suppress_ve(view, gfn, bool(suppress)),
        (2, 3),
    ),
    11: _Operation("<HxBIQ", Domain.get_suppress_ve, (1, 2), "<B", 2),
    12: _Operation("<HxxIQ", Domain.get_mem_access, (1,), "<H", 2),
    13: _Operation("<I", Domain.disable_notify),
    14: _Operation("<I", Domain.vcpu_view, answer="<H", answer_at=4),
    16: _Operation(
        "<HBB", lambda domain, view, visible: domain.set_visibility(view, bool(visible)), (2,)
    ),
}
"""By ``HVMOP_altp2m_*``."""
_LEFT_OUT = {9, 15}
"""Those on many gfns, which guests here do without."""


def _altp2m_op(caller: Caller, pointer: int) -> int:
    """``do_altp2m_op``, of a guest."""
    domain = caller.monitor.domain
    if not domain.machine.altp2m_supported:
        return -EOPNOTSUPP
    raw = caller.copy_from(pointer, _ALTP2M_OP.size + _ALTP2M_ARGUMENTS)
    version, command, domid, *padding = _ALTP2M_OP.unpack_from(raw)
    if any(padding) or version != _ALTP2M_VERSION:
        return -EINVAL
    operation = _ALTP2M_OPERATIONS.get(command)
    if operation is None:
        return -ENOSYS if command in _LEFT_OUT else -EOPNOTSUPP
    target = domain if domid == _SELF else domain.machine.domain(domid)
    if not target.hvm or (command > _SET_STATE and not target.active):
        return -EOPNOTSUPP
    if target.mode == Altp2mMode.DISABLED:
        return -EINVAL
    if not target.views:
        return -EOPNOTSUPP
    mixed = target.mode == Altp2mMode.MIXED
    limited = target.mode == Altp2mMode.LIMITED and command == _ENABLE_NOTIFY
    if target is not domain or not (mixed or limited):  # xsm_hvm_altp2mhvm_op
        return -EPERM
    values = struct.unpack_from(operation.shape, raw, _ALTP2M_OP.size)
    if any(values[at] for at in operation.padding):
        return -EINVAL
    arguments = [value for at, value in enumerate(values) if at not in operation.padding]
    answer = operation.call(target, *arguments)
    if operation.answer:
        place = pointer + _ALTP2M_OP.size + operation.answer_at
        caller.copy_to(place, struct.pack(operation.answer, answer))
    return 0
