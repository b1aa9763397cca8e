# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hypercalls of simulated guests. What is expected is from Xen's ``do_altp2m_op`` and the like."""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import EEXIST, EFAULT, EINVAL, ENOENT, ENOSYS, EOPNOTSUPP, EPERM, ESRCH

import pytest

from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.types import Altp2mMode

from .machinecode import (
    CODE,
    DATA,
    HOLE,
    OTHER,
    PRESENT,
    STOP,
    USER,
    WRITABLE,
    Computer,
)

VMCALL = b"\x0f\x01\xc1"
XEN_VERSION, VCPU_OP, SCHED_OP, HVM_OP = 17, 24, 29, 34
GET_PARAM, ALTP2M = 1, 25
SELF = 0x7FF0
(
    GET_STATE, SET_STATE, ENABLE_NOTIFY, CREATE, DESTROY, SWITCH, SET_ACCESS, CHANGE_GFN,
    SET_ACCESS_MULTI, SET_SUPPRESS, GET_SUPPRESS, GET_ACCESS, DISABLE_NOTIFY, GET_VIEW,
    SET_SUPPRESS_MULTI, SET_VISIBILITY,
) = range(1, 17)  # fmt: skip
R, RWX = 1, 7
GFN, PAGE = 0x50, 0x51


class Caller(Computer):
    """A guest that makes one hypercall at a time."""

    def __init__(self, mode: Altp2mMode = Altp2mMode.MIXED, **options: object) -> None:
        super().__init__(VMCALL + STOP, mode=mode, **options)  # type: ignore[arg-type]

    def call(self, number: int, *arguments: int) -> int:
        """Make one; a negative result is an errno's."""
        names = ("rdi", "rsi", "rdx") if self.wide else ("rbx", "rcx", "rdx")
        self.set(rax=number, rip=CODE, **dict(zip(names, arguments, strict=False)))
        self.vcpu.halted = False
        self.run()
        bits = 64 if self.wide else 32
        result = self.register("rax")
        assert result < 1 << bits
        return result - (1 << bits) if result >> bits - 1 else result

    def altp2m(
        self, command: int, body: bytes = b"", *, version: int = 1, domid: int = SELF, pads: int = 0
    ) -> int:
        """HVMOP_altp2m; its answer is in memory."""
        self.write(
            DATA, struct.pack("<IIHHI", version, command, domid, 0, pads) + body.ljust(64, b"\0")
        )
        return self.call(HVM_OP, ALTP2M, DATA)

    def result(self, shape: str, at: int = 0) -> int:
        size = struct.calcsize(shape)
        [value] = struct.unpack(shape, self.read(DATA + 16 + at, size))
        return int(value)


@pytest.fixture(params=["32", "64"])
def caller(request: pytest.FixtureRequest) -> Caller:
    guest = Caller()
    if request.param == "64":
        guest.go_long()
    return guest


def test_a_guest_makes_use_of_altp2m(caller: Caller) -> None:
    """Every operation of one page, by a guest in mixed mode."""
    model = caller.model
    assert caller.altp2m(GET_STATE) == 0
    assert caller.result("<B") == 0
    assert caller.altp2m(SET_STATE, b"\1") == 0
    assert caller.altp2m(GET_STATE) == 0
    assert caller.result("<B") == 1
    assert caller.altp2m(CREATE, struct.pack("<HH", 0, RWX)) == 0
    assert caller.result("<H") == 1
    assert caller.altp2m(SET_ACCESS, struct.pack("<HHIQ", 1, R, 0, GFN)) == 0
    assert model.views[1].table.lookup(GFN).access == R
    assert caller.altp2m(GET_ACCESS, struct.pack("<HHIQ", 1, 0, 0, GFN)) == 0
    assert caller.result("<H", 2) == R
    assert caller.altp2m(SET_SUPPRESS, struct.pack("<HBBIQ", 1, 0, 0, 0, GFN)) == 0
    assert model.views[1].table.lookup(GFN).suppress_ve is False
    assert caller.altp2m(GET_SUPPRESS, struct.pack("<HBBIQ", 1, 1, 0, 0, GFN)) == 0
    assert caller.result("<B", 2) == 0
    assert caller.altp2m(CHANGE_GFN, struct.pack("<HHIQQ", 1, 0, 0, GFN, PAGE)) == 0
    assert model.views[1].table.lookup(GFN).mfn == model.host.lookup(PAGE).mfn
    assert caller.altp2m(ENABLE_NOTIFY, struct.pack("<IIQ", 0, 0, PAGE)) == 0
    assert caller.vcpu.veinfo == model.host.lookup(PAGE).mfn
    assert caller.altp2m(DISABLE_NOTIFY, struct.pack("<I", 0)) == 0
    assert caller.vcpu.veinfo is None
    assert caller.altp2m(SWITCH, struct.pack("<H", 1)) == 0
    assert caller.vcpu.view == 1
    assert caller.altp2m(GET_VIEW, struct.pack("<I", 0)) == 0
    assert caller.result("<H", 4) == 1
    assert caller.altp2m(SET_VISIBILITY, struct.pack("<HBB", 1, 0, 0)) == 0
    assert model.views[1].visible is False
    assert caller.altp2m(SWITCH, struct.pack("<H", 0)) == 0
    assert caller.altp2m(DESTROY, struct.pack("<H", 1)) == 0
    assert caller.altp2m(SET_STATE, b"\0") == 0
    assert model.active is False


def test_arguments_are_read_and_answered_whatever_the_view(caller: Caller) -> None:
    """copy_from_guest goes through the host p2m."""
    caller.altp2m(SET_STATE, b"\1")
    caller.view((DATA >> 12, 0))
    assert caller.altp2m(GET_STATE) == 0
    assert caller.result("<B") == 1


Refusal = Callable[[Caller], int]
REFUSALS: list[tuple[Refusal, int]] = [
    (lambda guest: guest.altp2m(GET_STATE, version=2), EINVAL),
    (lambda guest: guest.altp2m(GET_STATE, pads=1), EINVAL),
    (lambda guest: guest.altp2m(17), EOPNOTSUPP),
    (lambda guest: guest.altp2m(0), EOPNOTSUPP),
    (lambda guest: guest.altp2m(GET_STATE, domid=77), ESRCH),
    (lambda guest: guest.call(HVM_OP, ALTP2M, HOLE), EFAULT),
    (lambda guest: guest.altp2m(ENABLE_NOTIFY, struct.pack("<IIQ", 1, 0, PAGE)), EINVAL),
    (lambda guest: guest.altp2m(ENABLE_NOTIFY, struct.pack("<IIQ", 0, 1, PAGE)), EINVAL),
    (lambda guest: guest.altp2m(DISABLE_NOTIFY, struct.pack("<I", 1)), EINVAL),
    (lambda guest: guest.altp2m(GET_VIEW, struct.pack("<I", 1)), EINVAL),
    (lambda guest: guest.altp2m(SET_ACCESS, struct.pack("<HHIQ", 0, R, 1, GFN)), EINVAL),
    (lambda guest: guest.altp2m(GET_ACCESS, struct.pack("<HHIQ", 0, 0, 1, GFN)), EINVAL),
    (lambda guest: guest.altp2m(SET_SUPPRESS, struct.pack("<HBBIQ", 0, 0, 1, 0, GFN)), EINVAL),
    (lambda guest: guest.altp2m(GET_SUPPRESS, struct.pack("<HBBIQ", 0, 0, 0, 1, GFN)), EINVAL),
    (lambda guest: guest.altp2m(CHANGE_GFN, struct.pack("<HHIQQ", 0, 1, 0, GFN, PAGE)), EINVAL),
    (lambda guest: guest.altp2m(CHANGE_GFN, struct.pack("<HHIQQ", 0, 0, 1, GFN, PAGE)), EINVAL),
    (lambda guest: guest.altp2m(SET_VISIBILITY, struct.pack("<HBB", 0, 1, 1)), EINVAL),
    (lambda guest: guest.altp2m(SWITCH, struct.pack("<H", 5)), EINVAL),
]  # fmt: skip


@pytest.mark.parametrize(("call", "errno"), REFUSALS)
def test_what_altp2m_refuses(call: Refusal, errno: int) -> None:
    caller = Caller(views=True)
    assert call(caller) == -errno


def test_a_page_is_enabled_once() -> None:
    caller = Caller(views=True)
    body = struct.pack("<IIQ", 0, 0, PAGE)
    assert caller.altp2m(ENABLE_NOTIFY, body) == 0
    assert caller.altp2m(ENABLE_NOTIFY, body) == -EEXIST


ONE_PAGE = [*range(1, 9), *range(10, 15), 16]


@pytest.mark.parametrize("mode", [Altp2mMode.EXTERNAL, Altp2mMode.LIMITED])
@pytest.mark.parametrize("command", ONE_PAGE)
def test_who_may_use_altp2m(mode: Altp2mMode, command: int) -> None:
    """xsm_hvm_altp2mhvm_op: a guest in limited mode may ask for #VE, in external mode nothing."""
    caller = Caller(mode, views=True)
    permitted = mode == Altp2mMode.LIMITED and command == ENABLE_NOTIFY
    assert caller.altp2m(command, struct.pack("<IIQ", 0, 0, PAGE)) == (0 if permitted else -EPERM)


@pytest.mark.parametrize("command", ONE_PAGE)
def test_without_a_mode_there_is_no_altp2m(command: int) -> None:
    caller = Caller(Altp2mMode.DISABLED)
    expected = EINVAL if command in (GET_STATE, SET_STATE) else EOPNOTSUPP  # it is not active
    assert caller.altp2m(command) == -expected


@pytest.mark.parametrize("command", ONE_PAGE[2:])
def test_views_want_altp2m_to_be_on(command: int) -> None:
    assert Caller().altp2m(command) == -EOPNOTSUPP


def test_without_altp2m_in_xen_there_is_none() -> None:
    host = MockBackend(memory_pages=1 << 13, altp2m=False)
    assert Caller(host=host).altp2m(GET_STATE) == -EOPNOTSUPP


def test_of_another_domain() -> None:
    host = MockBackend(memory_pages=1 << 13)
    caller = Caller(host=host)
    other = Caller(host=host)
    assert caller.altp2m(GET_STATE, domid=other.domid) == -EPERM
    assert caller.altp2m(GET_STATE, domid=caller.domid) == 0


def test_parameters(caller: Caller) -> None:
    caller.write(DATA, struct.pack("<HxxIQ", SELF, 35, 0))
    assert caller.call(HVM_OP, GET_PARAM, DATA) == 0
    assert caller.result("<Q", -8) == Altp2mMode.MIXED
    caller.write(DATA, struct.pack("<HxxIQ", SELF, 39, 0))
    assert caller.call(HVM_OP, GET_PARAM, DATA) == -EINVAL
    assert caller.call(HVM_OP, GET_PARAM, HOLE & ~0xFFF) == -EFAULT


def test_the_version(caller: Caller) -> None:
    assert caller.call(XEN_VERSION, 0) == 4 << 16 | 17


@pytest.mark.parametrize("number", [0, 63, 64, 0xFFFF_FFFF])
def test_no_such_hypercall(caller: Caller, number: int) -> None:
    assert caller.call(number) == -ENOSYS


def test_yielding_goes_on(caller: Caller) -> None:
    assert [caller.call(SCHED_OP, command) for command in (0, 1)] == [0, 0]


@pytest.mark.parametrize("reason", [0, 1, 3])
def test_shutting_down(caller: Caller, reason: int) -> None:
    caller.write(DATA, struct.pack("<I", reason))
    caller.set(rax=SCHED_OP, rbx=2, rdi=2, rcx=DATA, rsi=DATA, rip=CODE)
    caller.run()
    assert caller.model.shutdown_code == reason


def test_ring_3_may_not() -> None:
    """hvm_hypercall: -EPERM, wherever it points."""
    caller = Caller()
    caller.go_long(PRESENT | WRITABLE | USER)
    caller.describe(ring=3)
    caller.set(rax=XEN_VERSION, rdi=0)
    caller.run()
    assert caller.register("rax") == (1 << 64) - EPERM
    assert caller.words(caller.register("rsp"), 3)[1:] == [CODE + 3, 0x23]  # STI faults


def test_an_unmapped_argument_is_no_fault_of_the_guest() -> None:
    caller = Caller()
    caller.go_long()
    caller.describe()
    caller.map(OTHER, 0)
    assert caller.call(HVM_OP, ALTP2M, OTHER) == -EFAULT
    assert caller.call(HVM_OP, ALTP2M, OTHER - 8) == -EFAULT
    caller.map(OTHER, OTHER | PRESENT)
    caller.set(cr0=caller.register("cr0") | 1 << 16)
    caller.write(OTHER, struct.pack("<HxxIQ", SELF, 35, 0))
    assert caller.call(HVM_OP, GET_PARAM, OTHER) == -EFAULT  # it cannot be written to
    assert caller.vcpu.delivered == []


def context_32(entry: int) -> bytes:
    """struct vcpu_hvm_context with struct vcpu_hvm_x86_32, flat."""
    general = [0] * 8 + [entry, 2, 0x11, 0, 0]
    segments = [0] * 5 + [0xFFFF_FFFF] * 4 + [0x67] + [0xC9B, 0xC93, 0xC93, 0xC93, 0x8B]
    return struct.pack("<II", 0, 0) + struct.pack("<14IQ10I5H", *general, 0, 0, *segments)


def test_bringing_vcpus_up() -> None:
    caller = Caller(vcpus=2)
    caller.write(OTHER, b"\xb0A\xe6\xe9\xfb\xf4")
    caller.write(DATA, context_32(OTHER))
    assert caller.call(VCPU_OP, 3, 1, 0) == 0
    assert caller.call(VCPU_OP, 1, 1, 0) == -EINVAL
    assert caller.call(VCPU_OP, 0, 1, DATA) == 0
    assert caller.call(VCPU_OP, 0, 1, DATA) == -EEXIST
    assert caller.call(VCPU_OP, 0, 2, DATA) == -ENOENT
    assert caller.call(VCPU_OP, 1, 1, 0) == 0
    assert caller.call(VCPU_OP, 3, 1, 0) == 1
    assert caller.host.console(caller.domid) == "A"
    assert caller.vcpus[1].register("rip") == OTHER + 6
    assert caller.vcpus[1].halted


def test_a_context_of_no_kind() -> None:
    caller = Caller(vcpus=2)
    caller.write(DATA, struct.pack("<I", 7))
    assert caller.call(VCPU_OP, 0, 1, DATA) == -EINVAL
    assert caller.call(VCPU_OP, 0, 1, HOLE) == -EFAULT


def test_what_is_not_simulated() -> None:
    """The operations on many pages."""
    caller = Caller(views=True)
    assert caller.altp2m(SET_ACCESS_MULTI) == caller.altp2m(SET_SUPPRESS_MULTI) == -ENOSYS
