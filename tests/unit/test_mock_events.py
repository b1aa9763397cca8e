# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events of the mock: what its vCPUs do, what Xen tells of it, and what answers change.

What is expected is from Xen's sources: common/vm_event.c (the ring), common/monitor.c
(monitor_traps), arch/x86/vm_event.c (responses), arch/x86/hvm/vm_event.c (their effects),
arch/x86/hvm/monitor.c (what is told) and arch/x86/hvm/vmx/vmx.c (exits), 4.14.0 to 4.22.0.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable, Iterator
from errno import EBUSY, EINVAL, ENOENT, EPERM, ESRCH
from functools import partial
from typing import Any

import pytest

from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.abi.vm_event import HEAD, Flag, Reason, layout
from xenaltp2m.backend.mock import (
    Access,
    Cpuid,
    DebugException,
    DescriptorAccess,
    GuestRequest,
    Halt,
    Instruction,
    MockBackend,
    Outcome,
    PortIo,
    SetRegisters,
    WriteControlRegister,
    WriteMsr,
)
from xenaltp2m.backend.mock.machine import Livelock
from xenaltp2m.backend.mock.monitor import Monitor
from xenaltp2m.backend.mock.p2m import ORDER_4K, PageType
from xenaltp2m.backend.mock.vcpu import Vcpu
from xenaltp2m.errors import XenError
from xenaltp2m.types import ALL_GFNS, PAGE_SIZE

N, R, RW, X, RX, RWX, N2RWX = 0, 1, 3, 4, 5, 7, 9
CODE, DATA, OTHER, HOLE = 0x10, 0x20, 0x30, 0x2000
START = CODE * PAGE_SIZE
DATA_ADDRESS = DATA * PAGE_SIZE + 0x123
CR0, CR3, CR4, XCR0 = range(4)
LSTAR, FS_BASE = 0xC0000082, 0xC0000100
PAUSED, TOGGLE, FAST = Flag.VCPU_PAUSED, Flag.TOGGLE_SINGLESTEP, Flag.FAST_SINGLESTEP
SWITCH, EMULATE, DENY, SET = (
    Flag.ALTERNATE_P2M, Flag.EMULATE, Flag.DENY, Flag.SET_REGISTERS,
)  # fmt: skip
NO_ERROR_CODE = 0xFFFF_FFFF
LINEAR = 8 | 16
"""MEM_ACCESS_GLA_VALID and MEM_ACCESS_FAULT_WITH_GLA."""


class Request:
    """What Xen put into the ring."""

    def __init__(self, raw: bytes, version: int) -> None:
        self.raw = raw
        self.shape = layout(version)
        self.version, flags, self.reason, self.vcpu, self.view = HEAD.unpack_from(raw)
        self.flags = Flag(flags)

    def __getitem__(self, path: str) -> int:
        return self.shape.number(self.raw, f"u.{path}")

    def register(self, name: str) -> int:
        return self.shape.number(self.raw, f"data.regs.x86.{name}")


class Guest:
    """A domain that runs programs, and who listens to it, by hand."""

    def __init__(self, xen: tuple[int, int], vcpus: int = 1, *, listen: bool = True) -> None:
        self.host = MockBackend(xen, memory_pages=1 << 13)
        self.domid = self.host.add_domain(
            vcpus=vcpus, memory_kib=1024, superpages=False, max_kib=2048
        )
        self.model = self.host.domain(self.domid)
        self.vcpus = self.model.vcpus
        self.version = self.host.release.vm_event_version
        self.size = layout(self.version).size
        self.host.altp2m_set_domain_state(self.domid, True)
        self.host.domain_unpause(self.domid)
        self.ring: memoryview | None = None
        self.taken = self.answered = 0
        if listen:
            self.listen()

    @property
    def monitor(self) -> Monitor:
        return self.host._monitors[self.domid]

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    def listen(self) -> None:
        remote, self.ring = self.host.monitor_enable(self.domid)
        self.channel = self.host.evtchn_open()
        self.port = self.host.evtchn_bind_interdomain(self.channel, self.domid, remote)
        self.signalled()
        self.taken = self.answered = 0

    def close(self) -> None:
        if self.ring is not None:
            self.host.monitor_unmap_ring(self.ring)
            self.host.evtchn_close(self.channel)
            if self.model.listened and not self.monitor.queue:
                self.host.monitor_disable(self.domid)
        for vcpu in self.vcpus:
            vcpu.waiting = None
        if self.domid in self.host.machine.domains:
            self.host.destroy(self.domid)
        self.host.close()

    def switch(self, name: str, *arguments: Any) -> None:
        getattr(self.host, f"monitor_{name}")(self.domid, *arguments)

    def ctrlreg(
        self, index: int, *, sync: bool = True, bitmask: int = 0, onchangeonly: bool = True
    ) -> None:
        self.host.monitor_write_ctrlreg(self.domid, index, True, sync, bitmask, onchangeonly)

    def view(self, *protected: tuple[int, int], enter: bool = True) -> int:
        view = self.host.altp2m_create_view(self.domid, RWX)
        for gfn, access in protected:
            self.host.altp2m_set_mem_access(self.domid, view, gfn, access)
        if enter:
            self.host.altp2m_switch_to_view(self.domid, view)
        return view

    def load(self, *program: Instruction, vcpu: int = 0, loop: bool = False) -> None:
        self.host.load(self.domid, program, vcpu, loop=loop)

    def program(self) -> Instruction:
        return self.host._script(self.domid, 0).program[0]

    def run(self, steps: int = 100) -> int:
        return self.host.run(self.domid, steps)

    def page(self, gfn: int) -> memoryview:
        return self.host.machine.frames.page(self.model.host.lookup(gfn).mfn)

    def indices(self) -> tuple[int, ...]:
        assert self.ring is not None
        return struct.unpack_from("<IIII", self.ring)

    def signalled(self) -> bool:
        if not select.select([self.channel], [], [], 0)[0]:
            return False
        assert self.host.evtchn_pending(self.channel) == self.port
        self.host.evtchn_unmask(self.channel, self.port)
        return True

    def take(self) -> list[Request]:
        assert self.ring is not None
        found = []
        while self.taken != self.indices()[0]:
            start = 64 + self.taken % 8 * self.size
            found.append(Request(bytes(self.ring[start : start + self.size]), self.version))
            self.taken = (self.taken + 1) & 0xFFFF_FFFF
        return found

    def event(self, reason: Reason) -> Request:
        [request] = self.take()
        assert request.reason == reason
        return request

    def answer(
        self,
        request: Request,
        flags: int = 0,
        *,
        view: int = 0,
        data: bytes = b"",
        notify: bool = True,
        vcpu: int | None = None,
        **changed: int,
    ) -> None:
        """Echo a request with other flags; ``changed`` are fields of it, __ for a dot."""
        assert self.ring is not None
        response = bytearray(request.raw)
        number = request.vcpu if vcpu is None else vcpu
        flags |= request.flags & PAUSED
        HEAD.pack_into(response, 0, self.version, flags, request.reason, number, view)
        for path, value in changed.items():
            offset, width = request.shape.fields[path.replace("__", ".")]
            response[offset : offset + width] = value.to_bytes(width, "little")
        response[56 : 56 + len(data)] = data
        start = 64 + self.answered % 8 * self.size
        self.ring[start : start + self.size] = response
        self.answered = (self.answered + 1) & 0xFFFF_FFFF
        struct.pack_into("<I", self.ring, 8, self.answered)
        if notify:
            self.host.evtchn_notify(self.channel, self.port)

    def register(self, name: str) -> int:
        return self.vcpu.register(name)


def at(index: int) -> int:
    return START + 4 * index


def nops(count: int) -> list[Instruction]:
    return [Instruction(at(index), 4) for index in range(count)]


def one(effect: Any = None, *accesses: Any, emulated: bool = True) -> list[Instruction]:
    """An instruction that matters, and one behind it."""
    return [Instruction(at(0), 4, accesses, effect, emulated), Instruction(at(1), 4)]


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(XenError) as caught:
        call()
    return caught.value.errno


@pytest.fixture(params=[(4, 14), (4, 17), (4, 20)], ids="{0[0]}.{0[1]}".format)
def xen(request: pytest.FixtureRequest) -> tuple[int, int]:
    found: tuple[int, int] = request.param
    return found


@pytest.fixture
def new(xen: tuple[int, int]) -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(*arguments: Any, **options: Any) -> Guest:
        made.append(Guest(xen, *arguments, **options))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


@pytest.fixture
def newest() -> Iterator[Guest]:
    guest = Guest((4, 20))
    yield guest
    guest.close()


# Requests.


def test_a_request_tells_all(new: Callable[..., Guest], xen: tuple[int, int]) -> None:
    """p2m_mem_access_check, monitor_traps, vm_event_fill_regs."""
    guest = new(2)
    view = guest.view((DATA, RX))
    guest.load(*one(None, ("w", DATA_ADDRESS)), vcpu=1)
    guest.vcpus[1].set_register("rbx", 0x1122334455667788)
    assert guest.run() == 0
    assert guest.signalled()
    request = guest.event(Reason.MEM_ACCESS)
    assert request.version == (6 if xen == (4, 14) else 7)
    assert (request.vcpu, request.view, request.flags) == (1, view, PAUSED | SWITCH)
    assert request["mem_access.gfn"] == DATA
    assert request["mem_access.offset"] == 0x123
    assert request["mem_access.gla"] == DATA_ADDRESS
    assert request["mem_access.flags"] == RW | LINEAR  # a write counts as a read
    assert request.register("rip") == START
    assert request.register("rbx") == 0x1122334455667788
    assert (request.register("cr0"), request.register("cs_sel")) == (0x11, 8)
    assert request.register("cs") == 0xFFFFF | 0xC9B << 20
    if xen > (4, 14):
        assert request.register("vmtrace_pos") == (1 << 64) - 1
    assert guest.indices()[0] == 1
    assert guest.vcpus[1].event_pauses == 1


def test_without_altp2m_no_view_is_told(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.host.altp2m_set_domain_state(guest.domid, False)
    guest.host.set_mem_access(guest.domid, N, DATA, 1)
    assert guest.host.touch(guest.domid, DATA) is Outcome.EVENT
    request = guest.event(Reason.MEM_ACCESS)
    assert (request.flags, request.view) == (PAUSED, 0)
    assert request["mem_access.flags"] == R | LINEAR


@pytest.mark.parametrize(("kind", "flags"), [("r", R), ("w", RW), ("x", X)])
def test_what_was_tried(new: Callable[..., Guest], kind: str, flags: int) -> None:
    guest = new()
    guest.view((DATA, N))
    assert guest.host.touch(guest.domid, DATA, kind) is Outcome.EVENT
    assert guest.event(Reason.MEM_ACCESS)["mem_access.flags"] == flags | LINEAR


def test_a_promotion_is_told_and_nobody_waits(new: Callable[..., Guest]) -> None:
    """n2rwx: p2m_mem_access_check."""
    guest = new()
    guest.view((DATA, N2RWX))
    assert guest.host.touch(guest.domid, DATA, "w") is Outcome.DONE
    request = guest.event(Reason.MEM_ACCESS)
    assert request.flags == SWITCH
    assert guest.vcpu.event_pauses == 0


def test_reads_and_writes_go_to_what_the_view_shows(new: Callable[..., Guest]) -> None:
    guest = new()
    view = guest.view()
    guest.host.altp2m_change_gfn(guest.domid, view, DATA, OTHER)
    guest.page(OTHER)[0:4] = b"\1\2\3\4"
    address = DATA * PAGE_SIZE
    guest.load(
        Instruction(at(0), 4, [Access("r", address, bytes(4), "rcx")]),
        Instruction(at(1), 4, [("w", address + PAGE_SIZE - 1, b"ab")]),
    )
    assert guest.run() == 2
    assert guest.register("rcx") == 0x04030201
    assert guest.page(OTHER)[-1] == ord("a")
    assert guest.page(DATA + 1)[0] == ord("b")
    assert guest.page(DATA)[-1] == 0


def test_an_instruction_across_two_pages_is_fetched_from_both(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.view((CODE + 1, RW))
    guest.load(Instruction(START + PAGE_SIZE - 2, 4))
    guest.run()
    request = guest.event(Reason.MEM_ACCESS)
    assert (request["mem_access.gfn"], request["mem_access.offset"]) == (CODE + 1, 0)


def test_a_second_access_that_faults_leaves_the_first_undone(new: Callable[..., Guest]) -> None:
    guest = new()
    view = guest.view((OTHER, R))
    guest.load(*one(None, ("w", DATA_ADDRESS, b"x"), ("w", OTHER * PAGE_SIZE, b"y")))
    guest.run()
    assert guest.page(DATA)[0x123] == 0
    request = guest.event(Reason.MEM_ACCESS)
    guest.host.altp2m_set_mem_access(guest.domid, view, OTHER, RW)
    guest.answer(request)
    assert (guest.page(DATA)[0x123], guest.page(OTHER)[0]) == (ord("x"), ord("y"))


# The ring.


def fill(guest: Guest, count: int) -> None:
    """Let that many vCPUs fault, each in its turn."""
    for number in range(count):
        assert guest.host.touch(guest.domid, DATA, vcpu=number) is Outcome.EVENT


def test_a_ring_of_eight_and_twelve_vcpus(new: Callable[..., Guest]) -> None:
    """vm_event_wait_slot, vm_event_wake_queued: who is woken and finds no slot goes to the end."""
    guest = new(12)
    guest.view((DATA, N))
    fill(guest, 12)
    assert [vcpu.number for vcpu in guest.monitor.queue] == [8, 9, 10, 11]
    assert [vcpu.event_pauses for vcpu in guest.vcpus] == [1] * 8 + [0] * 4
    assert guest.indices()[0] == 8
    assert errno_of(partial(guest.host.monitor_disable, guest.domid)) == EBUSY
    first = guest.take()
    assert [request.vcpu for request in first] == list(range(8))
    for request in first[:2]:
        guest.answer(request, notify=False)
    guest.model.online_vcpus = 12
    guest.host.evtchn_notify(guest.channel, guest.port)
    # The first response woke vCPU 8, the second 9 and 10, the request of vCPU 8 the last one.
    assert [request.vcpu for request in guest.take()] == [8, 9]
    assert [vcpu.number for vcpu in guest.monitor.queue] == [10, 11]
    for request in first[2:]:
        guest.answer(request)
    assert [request.vcpu for request in guest.take()] == [10, 11]
    assert guest.monitor.available == 4
    assert not guest.monitor.queue


def test_the_queued_come_before_the_blocked(new: Callable[..., Guest]) -> None:
    """vm_event_wake."""
    guest = new(12)
    guest.view(*((gfn, N2RWX) for gfn in range(DATA, DATA + 8)), (OTHER, N))
    guest.model.online_vcpus = 12
    for number in range(8):
        guest.host.touch(guest.domid, DATA + number, vcpu=number)
    # Each was blocked, and let go by the next one's request while that left a slot.
    assert [vcpu.number for vcpu in guest.vcpus if vcpu.ring_blocked] == [6, 7]
    guest.host.touch(guest.domid, OTHER, vcpu=8)
    assert guest.vcpus[8].queued
    first = guest.take()
    guest.answer(first[0])
    assert guest.event(Reason.MEM_ACCESS).vcpu == 8
    assert guest.monitor.blocked == 2
    guest.answer(first[1])
    assert [vcpu.number for vcpu in guest.vcpus if vcpu.ring_blocked] == [7]
    guest.answer(first[2])
    assert guest.monitor.blocked == 0


def test_who_posts_without_waiting_is_blocked_when_slots_are_few(
    new: Callable[..., Guest],
) -> None:
    """vm_event_put_request: fewer free slots than vCPUs; apart from event_pauses."""
    guest = new(4)
    guest.ctrlreg(CR3, sync=False)
    writes = [
        Instruction(at(index), 4, (), WriteControlRegister(CR3, 0x1000 * (index + 1)))
        for index in range(8)
    ]
    guest.load(*writes)
    assert guest.run() == 5  # then 3 slots are left
    assert (guest.vcpu.ring_blocked, guest.vcpu.event_pauses) == (True, 0)
    requests = guest.take()
    assert [request["write_ctrlreg.new_value"] for request in requests] == [
        0x1000 * number for number in range(1, 6)
    ]
    assert not any(request.flags & PAUSED for request in requests)
    assert guest.register("cr3") == 0x5000
    guest.answer(requests[0])  # runs on by itself, to the next write
    assert guest.event(Reason.WRITE_CTRLREG)["write_ctrlreg.new_value"] == 0x6000
    assert guest.vcpu.ring_blocked


def test_disabling_unblocks_and_leaves_the_paused_paused(new: Callable[..., Guest]) -> None:
    """vm_event_disable."""
    guest = new(8)
    view = guest.view((DATA, N), (OTHER, N2RWX))
    guest.host.touch(guest.domid, DATA, vcpu=0)
    guest.host.touch(guest.domid, OTHER, vcpu=1)
    assert guest.vcpus[1].ring_blocked
    guest.host.monitor_disable(guest.domid)
    assert not guest.vcpus[1].ring_blocked
    assert guest.vcpus[0].event_pauses == 1
    assert guest.host.altp2m_get_mem_access(guest.domid, view, DATA) == N


def test_who_was_woken_finds_no_ring_any_more(new: Callable[..., Guest]) -> None:
    """vm_event_grab_slot: EOPNOTSUPP, and monitor_traps lets the vCPU go on."""
    guest = new(9)
    guest.view((DATA, N))
    fill(guest, 9)
    guest.answer(guest.take()[0])
    assert guest.vcpus[8].waiting is not None  # it is down: woken, and does not run
    guest.host.monitor_disable(guest.domid)
    guest.model.online_vcpus = 9
    guest.run()
    assert guest.vcpus[8].waiting is None
    assert guest.vcpus[8].event_pauses == 0
    assert guest.host.touch(guest.domid, DATA, vcpu=8) is Outcome.DONE


def test_indices_run_over_two_to_the_32(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.view((DATA, N))
    near = 0xFFFF_FFFD
    guest.monitor.produced = guest.monitor.taken = guest.taken = guest.answered = near
    assert guest.ring is not None
    struct.pack_into("<IIII", guest.ring, 0, near, near + 1, near, near + 1)
    for number in range(1, 7):
        guest.host.touch(guest.domid, DATA)
        assert guest.indices()[0] == (near + number) & 0xFFFF_FFFF
        guest.answer(guest.event(Reason.MEM_ACCESS))
        assert guest.indices()[2:] == (
            (near + number) & 0xFFFF_FFFF,
            (near + number + 1) & 0xFFFF_FFFF,
        )
        assert guest.vcpu.event_pauses == 0
        assert guest.monitor.available == 8


def test_a_response_to_no_request_makes_room(new: Callable[..., Guest]) -> None:
    """RING_FREE_REQUESTS counts what it is told."""
    guest = new(2)
    guest.view((DATA, N))
    guest.host.touch(guest.domid, DATA)
    request = guest.event(Reason.MEM_ACCESS)
    guest.answer(request)
    guest.answer(request)
    assert guest.monitor.available == 9


def test_garbage_in_the_index_keeps_xen_busy(new: Callable[..., Guest]) -> None:
    guest = new()
    assert guest.ring is not None
    struct.pack_into("<I", guest.ring, 8, 0x8000_0000)
    with pytest.raises(Livelock):
        guest.host.monitor_resume(guest.domid)
    struct.pack_into("<I", guest.ring, 8, 0)


# Responses.


def stopped(new: Callable[..., Guest], access: int = N) -> tuple[Guest, int, Request]:
    """A vCPU that waits for having read DATA, and would write x to it."""
    guest = new()
    view = guest.view((DATA, access))
    accesses = (("w", DATA_ADDRESS, b"x"), Access("r", DATA_ADDRESS + 1, bytes(2), "rdx"))
    guest.load(*one(None, *accesses), *nops(10)[2:])
    guest.run()
    return guest, view, guest.event(Reason.MEM_ACCESS)


def test_a_plain_answer_tries_again(new: Callable[..., Guest]) -> None:
    guest, _, request = stopped(new)
    guest.answer(request)
    again = guest.event(Reason.MEM_ACCESS)
    assert again.raw == request.raw


def test_the_view_of_an_answer_is_where_it_goes_on(new: Callable[..., Guest]) -> None:
    guest, _, request = stopped(new)
    guest.answer(request, SWITCH, view=0)
    assert guest.page(DATA)[0x123] == ord("x")
    assert not guest.take()
    assert guest.register("rip") == at(10)


def test_a_wrong_version_or_vcpu_is_dropped(new: Callable[..., Guest]) -> None:
    guest, _, request = stopped(new)
    guest.answer(request, SWITCH, version=guest.version + 1)
    guest.answer(request, SWITCH, vcpu=1)
    assert guest.vcpu.event_pauses == 1
    assert guest.vcpu.view == request.view


def test_a_running_vcpu_is_not_changed(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.ctrlreg(CR3, sync=False)
    guest.load(*one(WriteControlRegister(CR3, 0x1000)))
    guest.run()
    view = guest.view(enter=False)
    request = guest.event(Reason.WRITE_CTRLREG)
    guest.answer(request, SWITCH | TOGGLE | SET, view=view, data__regs__x86__rbx=1)
    assert (guest.vcpu.view, guest.vcpu.single_step, guest.register("rbx")) == (0, False, 0)


def test_registers_are_set_when_the_vcpu_runs(new: Callable[..., Guest]) -> None:
    """vm_event_set_registers, hvm_vm_event_set_registers: general ones, rflags and rip."""
    guest, _, request = stopped(new)
    guest.model.pauses = 1
    guest.answer(
        request,
        SET,
        data__regs__x86__rip=at(4),
        data__regs__x86__rsp=0x77,
        data__regs__x86__cr3=0x66,
    )
    assert guest.register("rip") == START
    guest.host.domain_unpause(guest.domid)
    assert (guest.register("rsp"), guest.register("cr3")) == (0x77, 0)
    assert guest.register("rip") == at(10)
    assert guest.page(DATA)[0x123] == 0


def test_an_answer_that_no_vcpu_ran_for_is_lost_with_the_monitor(
    new: Callable[..., Guest],
) -> None:
    """vm_event_cleanup_domain."""
    guest, _, request = stopped(new)
    guest.model.pauses = 1
    guest.answer(request, SET | TOGGLE, data__regs__x86__rip=at(4))
    guest.host.monitor_disable(guest.domid)
    assert guest.vcpu.deferred is None
    guest.host.domain_unpause(guest.domid)
    assert guest.page(DATA)[0x123] == ord("x")  # it went on where it was
    assert guest.vcpu.single_step  # not of struct arch_vm_event


def test_emulation_is_done_in_the_host(new: Callable[..., Guest]) -> None:
    """hvm_emulate_one_vm_event: no view is asked, and the shadow is not written."""
    guest, view, request = stopped(new)
    guest.host.altp2m_change_gfn(guest.domid, view, DATA, OTHER)
    guest.host.altp2m_set_mem_access(guest.domid, view, DATA, N)
    guest.page(DATA)[0x124:0x126] = b"\2\1"
    guest.answer(request, EMULATE)
    assert (guest.page(DATA)[0x123], guest.page(OTHER)[0x123]) == (ord("x"), 0)
    assert guest.register("rdx") == 0x102
    assert guest.register("rip") == at(10)
    assert not guest.take()


def test_emulation_without_writes(new: Callable[..., Guest]) -> None:
    guest, _, request = stopped(new)
    guest.answer(request, EMULATE | Flag.EMULATE_NOWRITE)
    assert guest.page(DATA)[0x123] == 0
    assert guest.register("rip") == at(10)


def test_emulation_with_data_to_read(new: Callable[..., Guest]) -> None:
    """set_context_data: cut or filled up with zeros; it wins over NOWRITE."""
    guest, _, request = stopped(new)
    flags = EMULATE | Flag.SET_EMUL_READ_DATA | Flag.EMULATE_NOWRITE
    guest.answer(request, flags, data=struct.pack("<I", 1) + b"\x55\x66")
    assert guest.register("rdx") == 0x55
    assert guest.page(DATA)[0x123] == ord("x")


def test_emulation_needs_a_violation_still(new: Callable[..., Guest]) -> None:
    """p2m_mem_access_emulate_check: in the vCPU's view, before the answer moves it."""
    guest, view, request = stopped(new, R)
    assert request["mem_access.flags"] == RW | LINEAR
    guest.host.altp2m_set_mem_access(guest.domid, view, DATA, RWX)
    guest.model.pauses = 1
    guest.answer(request, EMULATE)
    assert guest.vcpu.deferred is not None
    assert not guest.vcpu.deferred.emulate_flags

    guest, _, request = stopped(new, R)
    guest.model.pauses = 1
    guest.answer(request, EMULATE | SWITCH, view=0)
    assert guest.vcpu.deferred is not None
    assert guest.vcpu.deferred.emulate_flags & EMULATE

    guest, _, request = stopped(new, R)
    guest.model.pauses = 1
    guest.answer(request, EMULATE, u__mem_access__flags=R)  # reading is allowed
    assert guest.vcpu.deferred is not None
    assert not guest.vcpu.deferred.emulate_flags


@pytest.mark.parametrize(
    ("gfn", "emulated"), [(HOLE, True), (ALL_GFNS, False), (DATA, True), (OTHER, False)]
)
def test_emulation_looks_at_the_page_of_the_answer(
    new: Callable[..., Guest], gfn: int, emulated: bool
) -> None:
    """_p2m_get_mem_access: a hole violates; ~0 is the default access."""
    guest, view, request = stopped(new)
    guest.host.altp2m_set_mem_access(guest.domid, view, OTHER, RWX)
    guest.model.pauses = 1
    guest.answer(request, EMULATE, u__mem_access__gfn=gfn)
    assert guest.vcpu.deferred is not None
    assert bool(guest.vcpu.deferred.emulate_flags) is emulated


def test_an_answer_without_emulation_forgets_one_that_waits(new: Callable[..., Guest]) -> None:
    """vm_event_emulate_check; one that it does not take leaves it."""
    guest, _, request = stopped(new)
    guest.vcpu.event_pauses = 3
    deferred = guest.vcpu.deferred
    assert deferred is not None
    guest.answer(request, EMULATE)
    assert deferred.emulate_flags & EMULATE
    guest.answer(request, EMULATE, reason=Reason.CPUID)
    assert deferred.emulate_flags & EMULATE
    guest.vcpu.event_pauses = 2
    guest.answer(request)
    assert not deferred.emulate_flags


def test_what_the_emulator_cannot_do(new: Callable[..., Guest]) -> None:
    """hvm_monitor_emul_unimplemented, or #UD."""
    for heard in (True, False):
        guest = new()
        guest.view((DATA, N))
        if heard:
            guest.switch("emul_unimplemented", True)
        guest.load(*one(None, ("r", DATA_ADDRESS), emulated=False))
        guest.run()
        guest.answer(guest.event(Reason.MEM_ACCESS), EMULATE)
        if heard:
            request = guest.event(Reason.EMUL_UNIMPLEMENTED)
            assert request.flags & PAUSED
            guest.answer(request, SWITCH, view=0)
            assert guest.register("rip") == at(2)
        else:
            assert guest.vcpu.delivered == [(6, 3)]


EMULATED: list[tuple[Any, dict[str, int], list[tuple[int, int]]]] = [
    (None, {}, []),
    (SetRegisters({"rbx": 5}), {"rbx": 5}, []),
    (SetRegisters({"rip": at(2)}), {"rip": at(6)}, []),
    (WriteControlRegister(CR3, 0x5000), {"cr3": 0x5000}, []),
    (WriteControlRegister(CR3, 1 << 60), {"rip": START, "cr3": 0}, [(13, 3)]),
    (WriteControlRegister(XCR0, 3), {}, []),
    (WriteMsr(LSTAR, 7), {"msr_lstar": 7}, []),
    (Cpuid((1, 2, 3, 4)), {"rdx": 4}, []),
    (PortIo(0x80, is_in=True, value=9), {"rax": 9}, []),
    (DescriptorAccess(2), {}, []),
    (GuestRequest(), {"rip": START}, [(6, 3)]),
    (DebugException(3), {}, [(1, 3)]),
    (DebugException(5), {}, [(1, 5)]),
    (Halt(), {"rip": at(1)}, []),
]


@pytest.mark.parametrize(
    ("effect", "registers", "delivered"), EMULATED, ids=lambda value: type(value).__name__
)
def test_what_the_emulator_does(
    new: Callable[..., Guest],
    effect: Any,
    registers: dict[str, int],
    delivered: list[tuple[int, int]],
) -> None:
    """It exits for nothing, and tells of control registers and MSRs alone (hvmemul_write_cr)."""
    guest = new()
    guest.host.steps_at_once = 6
    for name, arguments in (
        ("cpuid", (True,)),
        ("descriptor_access", (True,)),
        ("guest_request", (True, True, False)),
        ("debug_exceptions", (True, True)),
    ):
        guest.switch(name, *arguments)
    view = guest.view((CODE, RW))
    guest.load(*one(effect), *nops(6)[2:])
    guest.run()
    request = guest.event(Reason.MEM_ACCESS)
    guest.vcpu.event_pauses += 1  # emulated when it runs, which is after the view is changed
    guest.answer(request, EMULATE)
    guest.host.altp2m_set_mem_access(guest.domid, view, CODE, RWX)
    guest.vcpu.event_pauses -= 1
    guest.run(1 if registers.get("rip") == START else 20)
    for name, value in ({"rip": at(6)} | registers).items():
        assert guest.register(name) == value, name
    assert guest.vcpu.delivered == delivered
    assert not guest.take()


def test_an_emulated_write_of_a_control_register_is_heard(new: Callable[..., Guest]) -> None:
    """hvmemul_write_cr; and hvm_vm_event_do_resume does it next, before anybody can deny it."""
    guest = new()
    guest.switch("control_registers")
    guest.ctrlreg(CR3)
    view = guest.view((CODE, RW))
    guest.load(*one(WriteControlRegister(CR3, 0x5000)))
    guest.run()
    guest.answer(guest.event(Reason.MEM_ACCESS), EMULATE)
    request = guest.event(Reason.WRITE_CTRLREG)
    assert (request.register("rip"), request.view) == (START, view)
    assert guest.register("cr3") == 0x5000


def test_emulation_of_nothing(new: Callable[..., Guest]) -> None:
    guest, _, request = stopped(new)
    guest.model.pauses = 1
    guest.answer(request, EMULATE | SET, data__regs__x86__rip=0x77)
    guest.model.pauses = 0
    assert guest.run(1) == 0
    assert guest.vcpu.delivered == [(6, 3)]
    guest = new()  # nor is there anything where no program is
    guest.view((DATA, N))
    guest.host.touch(guest.domid, DATA)
    guest.answer(guest.event(Reason.MEM_ACCESS), EMULATE)
    assert guest.vcpu.delivered == []
    assert guest.host.touch(guest.domid, DATA) is Outcome.EVENT


# Single steps.


def test_single_steps_stay_on(new: Callable[..., Guest]) -> None:
    """hvm_toggle_singlestep; the event names the next instruction's page."""
    guest, view, request = stopped(new)
    guest.switch("singlestep", True)
    guest.answer(request, TOGGLE | SWITCH, view=0)
    for index in (1, 2, 3):
        step = guest.event(Reason.SINGLESTEP)
        assert (step.register("rip"), step["singlestep.gfn"]) == (at(index), CODE)
        assert step.flags & PAUSED
        guest.answer(step)
    step = guest.event(Reason.SINGLESTEP)
    guest.answer(step, TOGGLE | SWITCH, view=view)
    assert not guest.take()
    assert guest.register("rip") == at(10)


def test_the_toggle_wins_over_a_fast_step(new: Callable[..., Guest]) -> None:
    guest, view, request = stopped(new)
    guest.model.pauses = 1
    guest.answer(request, TOGGLE | FAST, u__fast_singlestep__p2midx=view)
    assert (guest.vcpu.single_step, guest.vcpu.fast_step_view) == (True, None)


def test_a_step_nobody_hears_of(new: Callable[..., Guest]) -> None:
    """hvm_monitor_debug returns 0, and the vCPU steps on."""
    guest, _, request = stopped(new)
    guest.answer(request, TOGGLE | SWITCH, view=0)
    assert not guest.take()
    assert guest.vcpu.single_step
    assert guest.register("rip") == at(10)


def test_a_fast_step(new: Callable[..., Guest], xen: tuple[int, int]) -> None:
    """hvm_monitor_debug: 410ef33439 of 4.19 took it before the test for single-step events."""
    for heard in (True, False):
        guest, view, request = stopped(new)
        if heard:
            guest.switch("singlestep", True)
        guest.answer(request, FAST | SWITCH, view=0, u__fast_singlestep__p2midx=view)
        assert not guest.take()
        if heard or xen >= (4, 19):
            assert (guest.vcpu.view, guest.vcpu.single_step) == (view, False)
            assert guest.vcpu.fast_step_view is None
        else:
            assert (guest.vcpu.view, guest.vcpu.single_step) == (0, True)


def test_a_fast_step_to_no_view(new: Callable[..., Guest]) -> None:
    """hvm_fast_singlestep ignores 10; one that is not there ends the stepping all the same."""
    guest, _, request = stopped(new)
    guest.switch("singlestep", True)
    guest.answer(request, FAST, u__fast_singlestep__p2midx=10)
    assert not guest.vcpu.single_step
    guest, _, request = stopped(new)
    guest.switch("singlestep", True)
    guest.answer(request, FAST | SWITCH, view=0, u__fast_singlestep__p2midx=9)
    assert (guest.vcpu.view, guest.vcpu.single_step) == (0, False)


def test_an_instruction_that_exits_is_no_step(new: Callable[..., Guest]) -> None:
    """Xen completes it without a monitor trap; the one behind it traps."""
    guest = new()
    guest.switch("singlestep", True)
    guest.vcpu.single_step = True
    guest.load(Instruction(at(0), 4, (), Cpuid()), *nops(4)[1:])
    assert guest.run() == 2
    assert guest.event(Reason.SINGLESTEP).register("rip") == at(2)


def test_an_access_that_faults_is_no_step(new: Callable[..., Guest]) -> None:
    guest, view, request = stopped(new)
    guest.switch("singlestep", True)
    guest.answer(request, TOGGLE)
    again = guest.event(Reason.MEM_ACCESS)
    guest.host.altp2m_set_mem_access(guest.domid, view, DATA, RWX)
    guest.answer(again)
    assert guest.event(Reason.SINGLESTEP).register("rip") == at(1)


# Registers.


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("index", "value", "register"),
    [(CR0, 0x33, "cr0"), (CR3, 0x5000, "cr3"), (CR4, 0x30, "cr4")],
)
def test_a_write_that_is_heard(
    new: Callable[..., Guest], gated: bool, index: int, value: int, register: str
) -> None:
    """hvm_monitor_cr: done at once unless control_register_values is set."""
    for flags in (Flag(0), DENY):
        guest = new()
        if gated:
            guest.switch("control_registers")
        guest.ctrlreg(index)
        guest.load(*one(WriteControlRegister(index, value)))
        old = guest.register(register)
        guest.run()
        request = guest.event(Reason.WRITE_CTRLREG)
        assert request["write_ctrlreg.index"] == index
        assert request["write_ctrlreg.new_value"] == value
        assert request["write_ctrlreg.old_value"] == old
        assert (request.register("rip"), request.register(register)) == (START, old)
        assert guest.register("rip") == at(1)
        assert guest.register(register) == (old if gated else value)
        guest.answer(request, flags)
        assert guest.register(register) == (old if gated and flags else value)
        assert guest.register("rip") == at(2)


def test_xcr0_is_written_whatever_the_answer(new: Callable[..., Guest]) -> None:
    """hvm_handle_xsetbv."""
    guest = new()
    guest.switch("control_registers")
    guest.ctrlreg(XCR0)
    guest.load(*one(WriteControlRegister(XCR0, 7)))
    guest.run()
    request = guest.event(Reason.WRITE_CTRLREG)
    assert (request["write_ctrlreg.index"], request["write_ctrlreg.old_value"]) == (XCR0, 1)
    assert guest.vcpu.xcr0 == 7
    guest.answer(request, DENY)
    assert guest.vcpu.xcr0 == 7


def test_which_writes_are_told(new: Callable[..., Guest]) -> None:
    """hvm_monitor_cr: what changes no bit that counts is never told, onchangeonly or not."""
    for onchangeonly in (True, False):
        guest = new()
        guest.ctrlreg(CR3, bitmask=0xFF, onchangeonly=onchangeonly, sync=False)
        guest.load(
            *(
                Instruction(at(index), 4, (), WriteControlRegister(CR3, value))
                for index, value in enumerate((0x1000, 0x1000, 0x10FF, 0x1100))
            )
        )
        assert guest.run() == 4
        requests = guest.take()
        assert [request["write_ctrlreg.new_value"] for request in requests] == [0x1000, 0x1100]
        assert not any(request.flags & PAUSED for request in requests)


def test_a_deferred_write_is_lost_with_the_monitor(new: Callable[..., Guest]) -> None:
    """vm_event_cleanup_domain frees write_data: the guest has gone on without its write."""
    guest = new()
    guest.switch("control_registers")
    guest.ctrlreg(CR3)
    guest.load(*one(WriteControlRegister(CR3, 0x5000)))
    guest.run()
    request = guest.event(Reason.WRITE_CTRLREG)
    guest.model.pauses = 1
    guest.answer(request)
    guest.host.monitor_disable(guest.domid)
    guest.host.domain_unpause(guest.domid)
    assert (guest.register("cr3"), guest.register("rip")) == (0, at(2))


def test_a_write_that_faults_is_not_told(new: Callable[..., Guest]) -> None:
    """hvm_set_cr0, hvm_set_cr3, hvm_set_cr4: #GP."""
    for index, value in ((CR0, 1 << 32), (CR0, 1 << 31), (CR3, 1 << 60), (CR4, 1 << 60)):
        guest = new()
        guest.ctrlreg(index)
        guest.load(*one(WriteControlRegister(index, value)))
        assert guest.run(2) == 0
        assert not guest.take()
        assert guest.vcpu.delivered == [(13, 3)]
    guest = new()
    guest.load(*one(WriteControlRegister(XCR0, 2)))
    assert guest.run(2) == 0
    assert guest.vcpu.delivered == [(13, 3)]


def test_a_write_nobody_listens_to(new: Callable[..., Guest]) -> None:
    guest = new()
    writes = [(CR0, 0x33), (CR3, 0x1000), (CR4, 0x30), (CR4, 0x34)]
    guest.load(
        *(
            Instruction(at(number), 4, (), WriteControlRegister(*write))
            for number, write in enumerate(writes)
        )
    )
    assert guest.run() == 4
    assert [guest.register(name) for name in ("cr0", "cr3", "cr4")] == [0x33, 0x1000, 0x34]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("msr", [LSTAR, FS_BASE, 0x1234])
def test_an_msr(new: Callable[..., Guest], gated: bool, msr: int) -> None:
    """hvm_monitor_msr."""
    guest = new()
    if gated:
        guest.switch("control_registers")
    guest.switch("mov_to_msr", msr, True, True)
    guest.load(*one(WriteMsr(msr, 5)), Instruction(at(2), 4, (), WriteMsr(msr, 5)))
    guest.run()
    request = guest.event(Reason.MOV_TO_MSR)
    told = [request[f"mov_to_msr.{name}"] for name in ("msr", "new_value", "old_value")]
    assert told == [msr, 5, 0]
    guest.answer(request, DENY)
    if gated:
        assert guest.event(Reason.MOV_TO_MSR)["mov_to_msr.old_value"] == 0
    else:
        assert not guest.take()  # only changes are told
        assert guest.register("rip") == at(3)


def test_an_msr_that_is_not_denied(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.switch("control_registers")
    guest.switch("mov_to_msr", LSTAR, True, True)
    guest.load(*one(WriteMsr(LSTAR, 5)))
    guest.run()
    guest.answer(guest.event(Reason.MOV_TO_MSR))
    assert (guest.register("msr_lstar"), guest.register("rip")) == (5, at(2))


def test_an_msr_that_is_written_without_an_exit_steps(new: Callable[..., Guest]) -> None:
    """construct_vmcs lets FS_BASE through; once monitored it exits for ever."""
    guest = new()
    guest.switch("singlestep", True)
    guest.vcpu.single_step = True
    guest.load(*one(WriteMsr(FS_BASE, 5)), *nops(6)[2:])
    guest.run()
    step = guest.event(Reason.SINGLESTEP)
    assert step.register("rip") == at(1)
    assert step.register("fs_base") == 5
    guest.switch("mov_to_msr", FS_BASE, True, True)
    guest.switch("mov_to_msr", FS_BASE, False, True)
    guest.load(*one(WriteMsr(FS_BASE, 6)), *nops(6)[2:])
    guest.answer(step)
    assert guest.event(Reason.SINGLESTEP).register("rip") == at(2)


# What else an instruction can do.


def test_int3(new: Callable[..., Guest]) -> None:
    """hvm_monitor_debug, HVM_MONITOR_SOFTWARE_BREAKPOINT; else the guest gets its #BP."""
    guest = new()
    view = guest.view()
    guest.host.altp2m_change_gfn(guest.domid, view, CODE, OTHER)
    guest.page(OTHER)[0] = 0xCC
    guest.load(*nops(3))
    guest.switch("software_breakpoint", True)
    guest.run()
    request = guest.event(Reason.SOFTWARE_BREAKPOINT)
    assert request["software_breakpoint.gfn"] == CODE
    assert request["software_breakpoint.insn_length"] == 1
    assert request["software_breakpoint.type"] == 6
    assert request.register("rip") == START
    guest.answer(request)
    request = guest.event(Reason.SOFTWARE_BREAKPOINT)  # it is still there
    guest.answer(request, SWITCH, view=0)
    assert guest.register("rip") == at(3)
    assert guest.vcpu.delivered == []

    guest.switch("software_breakpoint", False)
    guest.load(Instruction(at(0), 1), Instruction(at(0) + 1, 3))
    guest.host.altp2m_switch_to_view(guest.domid, view)
    if guest.host.release.version >= (4, 17):
        guest.switch("vmexit", True, True)
    assert guest.run() == 2
    assert guest.vcpu.delivered == [(3, 6)]
    assert guest.register("rip") == at(1)
    assert guest.take() == []  # it does not even exit (vmx_update_debug_state)


def test_int3_is_emulated_as_the_instruction_that_is_given(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.switch("software_breakpoint", True)
    guest.page(CODE)[0] = 0xCC
    guest.load(*one(None, ("w", DATA_ADDRESS, b"x")))
    guest.run()
    request = guest.event(Reason.SOFTWARE_BREAKPOINT)
    guest.answer(request, EMULATE)  # not without the instruction: vm_event_emulate_check
    request = guest.event(Reason.SOFTWARE_BREAKPOINT)
    guest.answer(request, EMULATE | Flag.SET_EMUL_INSN_DATA, data=b"\x88\x03".ljust(16, b"\x90"))
    assert guest.page(DATA)[0x123] == ord("x")
    assert guest.register("rip") == at(2)
    assert guest.vcpu.delivered == []


def test_an_emulated_int3_is_the_guests(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.view((CODE, RW))
    guest.page(CODE)[0] = 0xCC
    guest.load(Instruction(at(0), 1), Instruction(at(0) + 1, 3))
    guest.run()
    request = guest.event(Reason.MEM_ACCESS)
    guest.answer(request, EMULATE)
    assert guest.vcpu.delivered == [(3, 6)]


def test_a_breakpoint_is_given_back(new: Callable[..., Guest]) -> None:
    """hvm_do_resume: an injected event is delivered when the vCPU runs."""
    guest = new()
    guest.switch("software_breakpoint", True)
    guest.page(CODE)[0] = 0xCC
    guest.load(Instruction(at(0), 1), Instruction(at(0) + 1, 3))
    guest.run()
    request = guest.event(Reason.SOFTWARE_BREAKPOINT)
    guest.host.hvm_inject_trap(guest.domid, 0, 3, 6, NO_ERROR_CODE, 1, 0)
    assert guest.vcpu.delivered == []
    guest.answer(request)
    assert guest.vcpu.delivered == [(3, 6)]
    assert guest.register("rip") == at(1)


def test_cpuid(new: Callable[..., Guest]) -> None:
    """hvm_vmexit_cpuid: the registers have the results, rip stays for the answer to move."""
    guest = new()
    guest.switch("cpuid", True)
    registers = SetRegisters({"rax": 7, "rcx": 2})
    guest.load(
        Instruction(at(0), 4, (), registers),
        Instruction(at(1), 2, (), Cpuid((1, 2, 3, 4))),
        Instruction(at(5), 4),
    )
    guest.run()
    request = guest.event(Reason.CPUID)
    told = [request[f"cpuid.{name}"] for name in ("insn_length", "leaf", "subleaf")]
    assert told == [2, 7, 2]
    assert [request.register(name) for name in ("rax", "rbx", "rcx", "rdx")] == [1, 2, 3, 4]
    assert request.register("rip") == at(1)
    guest.answer(request)
    request = guest.event(Reason.CPUID)
    assert (request["cpuid.leaf"], request["cpuid.subleaf"]) == (1, 3)  # of what is there now
    guest.answer(request, SET, data__regs__x86__rip=at(1) + 2, data__regs__x86__rbx=9)
    assert (guest.register("rip"), guest.register("rbx")) == (at(6), 9)


@pytest.mark.parametrize("kind", [3, 5])
@pytest.mark.parametrize("sync", [True, False])
def test_a_debug_exception(new: Callable[..., Guest], kind: int, sync: bool) -> None:
    """X86_EXC_DB of vmx_vmexit_handler: the guest gets it unless the vCPU waits."""
    guest = new()
    guest.switch("debug_exceptions", True, sync)
    guest.load(Instruction(at(0), 4, (), DebugException(kind)), *nops(3)[1:])
    guest.run()
    request = guest.event(Reason.DEBUG_EXCEPTION)
    assert request["debug_exception.type"] == kind
    assert request["debug_exception.insn_length"] == (4 if kind == 5 else 0)
    assert request["debug_exception.pending_dbg"] == 0
    assert request.register("rip") == (START if kind == 5 else at(1))
    assert request.register("dr6") == 0  # vm_event_fill_regs: vmx_save_cpu_ctxt leaves it out
    assert guest.register("dr6") == 0xFFFF0FF0 | (0x4000 if kind == 3 else 0)
    assert bool(request.flags & PAUSED) is sync
    if not sync:
        assert guest.vcpu.delivered == [(1, kind)]
        assert guest.register("rip") == at(3)
        return
    guest.answer(request)
    if kind == 3:
        assert (guest.vcpu.delivered, guest.register("rip")) == ([], at(3))
    else:
        assert guest.event(Reason.DEBUG_EXCEPTION).register("rip") == START  # executed again


def test_a_debug_exception_nobody_listens_to(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.load(Instruction(at(0), 4, (), DebugException()), *nops(3)[1:])
    assert guest.run() == 3
    assert guest.vcpu.delivered == [(1, 3)]


@pytest.mark.parametrize(("descriptor", "is_write"), [(1, True), (2, False), (3, True), (4, False)])
def test_a_descriptor_table(new: Callable[..., Guest], descriptor: int, is_write: bool) -> None:
    """hvm_monitor_descriptor_access: without emulation it comes again."""
    guest = new()
    guest.load(*one(DescriptorAccess(descriptor, is_write, 0x12, 0x34)), *nops(4)[2:])
    assert guest.run(1) == 1  # not intercepted
    guest.switch("descriptor_access", True)
    guest.load(*one(DescriptorAccess(descriptor, is_write, 0x12, 0x34)))
    guest.run()
    request = guest.event(Reason.DESCRIPTOR_ACCESS)
    assert request["desc_access.descriptor"] == descriptor
    assert request["desc_access.is_write"] == is_write
    assert request["desc_access.arch.vmx.instr_info"] == 0x12
    assert request["desc_access.arch.vmx.exit_qualification"] == 0x34
    guest.answer(request)
    request = guest.event(Reason.DESCRIPTOR_ACCESS)
    guest.answer(request, EMULATE)
    assert guest.register("rip") == at(2)


@pytest.mark.parametrize("sync", [True, False])
def test_a_guest_request(new: Callable[..., Guest], sync: bool) -> None:
    """monitor_guest_request; the hypercall has returned 0 by the time it is heard."""
    guest = new()
    guest.switch("guest_request", True, sync, False)
    guest.load(*one(GuestRequest()))
    guest.vcpu.set_register("rax", 34)
    guest.run()
    request = guest.event(Reason.GUEST_REQUEST)
    assert bool(request.flags & PAUSED) is sync
    assert (request.register("rip"), request.register("rax")) == (START, 34)
    assert guest.register("rax") == 0
    assert guest.register("rip") == (at(1) if sync else at(2))


def test_a_guest_request_nobody_listens_to(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.load(*one(GuestRequest()))
    assert guest.run() == 2
    assert not guest.take()


def test_port_io(newest: Guest) -> None:
    """hvm_monitor_io (4.18): not executed, whatever the answer."""
    newest.switch("io", True)
    newest.load(*one(PortIo(0x3F8, 2, is_in=True, value=0x55)))
    newest.run()
    request = newest.event(Reason.IO_INSTRUCTION)
    told = [request[f"io.{name}"] for name in ("bytes", "port", "in", "str")]
    assert told == [2, 0x3F8, 1, 0]
    assert newest.register("rax") == 0
    newest.answer(request)
    request = newest.event(Reason.IO_INSTRUCTION)
    newest.switch("io", False)
    newest.answer(request)
    assert (newest.register("rax"), newest.register("rip")) == (0x55, at(2))


def test_exits(new: Callable[..., Guest], xen: tuple[int, int]) -> None:
    """hvm_monitor_vmexit (4.17): if the vCPU waits, the exit is not handled and comes again."""
    guest = new()
    if xen < (4, 17):
        assert guest.monitor.capabilities() < 1 << 12
        return
    guest.view((DATA, R))
    program = [
        Instruction(at(0), 4, (), Cpuid()),
        Instruction(at(1), 4, (), WriteMsr(LSTAR, 1)),
        Instruction(at(2), 4, (), PortIo(0x80, 4, value=3)),
        Instruction(at(3), 4, (), WriteControlRegister(CR0, 0x33)),
        Instruction(at(4), 4, [("w", DATA_ADDRESS)]),
    ]
    guest.host.touch(guest.domid, CODE, "x")  # filled in before anybody looks
    guest.load(*program)
    guest.switch("vmexit", True, False)
    guest.run()
    told = [
        (request["vmexit.arch.vmx.reason"], request["vmexit.arch.vmx.qualification"])
        for request in guest.take()
        if request.reason == Reason.VMEXIT
    ]
    assert told == [(10, 0), (32, 0), (30, 3 | 0x80 << 16), (28, 0), (48, 2 | R << 3 | 3 << 7)]

    guest = new()
    guest.load(*program[:1])
    guest.host.touch(guest.domid, CODE, "x")
    guest.switch("vmexit", True, True)
    guest.run()
    request = guest.event(Reason.VMEXIT)
    assert request.flags & PAUSED
    guest.answer(request)
    request = guest.event(Reason.VMEXIT)
    assert guest.register("rip") == START
    guest.switch("vmexit", False, True)
    guest.answer(request)
    assert guest.register("rip") == at(1)


def test_exits_that_come_again(newest: Guest) -> None:
    """Whatever exits: with a sync vmexit nothing of it is done."""
    newest.page(OTHER)[0] = 0xCC
    newest.host.touch(newest.domid, OTHER, "x")
    newest.host.touch(newest.domid, CODE, "x")
    newest.switch("software_breakpoint", True)
    newest.switch("descriptor_access", True)
    newest.switch("mov_to_msr", FS_BASE, True, False)
    newest.switch("vmexit", True, True)
    for effect, reason in (
        (Cpuid((1, 2, 3, 4)), 10),
        (Halt(), 12),
        (GuestRequest(), 18),
        (WriteControlRegister(CR0, 0x33), 28),
        (WriteControlRegister(XCR0, 3), 55),
        (PortIo(1), 30),
        (WriteMsr(FS_BASE, 4), 32),
        (DescriptorAccess(1), 46),
        (DescriptorAccess(4), 47),
        (DebugException(5), 0),
        (None, 37),
        (None, 0),
    ):
        newest.vcpu.single_step = reason == 37
        newest.load(*one(effect))
        if effect is None and not reason:
            newest.load(Instruction(OTHER * PAGE_SIZE))
        newest.run()
        request = newest.event(Reason.VMEXIT)
        assert request["vmexit.arch.vmx.reason"] == reason
        assert newest.register("rip") == (at(1) if reason == 37 else newest.program().address)
        assert newest.vcpu.monitor_trap_flag is (reason == 37)
        newest.vcpu.monitor_trap_flag = newest.vcpu.single_step = False
        newest.load()
        newest.answer(request)
    assert newest.vcpu.delivered == []


def test_a_trap_whose_exit_is_not_handled_is_lost(newest: Guest) -> None:
    newest.host.touch(newest.domid, CODE, "x")
    newest.switch("vmexit", True, True)
    newest.load(Instruction(at(0), 4, (), DebugException(3)), *nops(3)[1:])
    newest.run()
    request = newest.event(Reason.VMEXIT)
    assert request.register("rip") == at(1)
    newest.answer(request)
    assert newest.register("rip") == at(3)
    assert newest.vcpu.delivered == []


def test_stepping_that_ended_before_its_trap_came(new: Callable[..., Guest]) -> None:
    """The execution control is set until the next trap, of which then nothing is told."""
    guest = new()
    guest.switch("singlestep", True)
    guest.vcpu.single_step = True
    guest.load(Instruction(at(0), 4, (), Cpuid()), *nops(3)[1:])
    guest.run(1)
    guest.host.domain_debug_control(guest.domid, 0, 0)
    assert guest.vcpu.monitor_trap_flag
    assert guest.run() == 2
    assert not guest.vcpu.monitor_trap_flag
    assert not guest.take()


def test_the_next_interrupt(new: Callable[..., Guest]) -> None:
    """hvm_do_resume, hvm_monitor_interrupt: one that is pending when the vCPU runs; once."""
    guest, _, request = stopped(new)
    guest.host.hvm_inject_trap(guest.domid, 0, 14, 3, 2, 0, 0x1234)
    guest.answer(request, Flag.GET_NEXT_INTERRUPT | SWITCH, view=0)
    told = guest.event(Reason.INTERRUPT)
    assert [told[f"interrupt.x86.{name}"] for name in ("vector", "type", "error_code", "cr2")] == [
        14,
        3,
        2,
        0x1234,
    ]
    assert told.register("rip") == START
    assert guest.vcpu.delivered == []
    guest.answer(told)
    assert guest.vcpu.delivered == [(14, 3)]
    assert not guest.vcpu.next_interrupt


def test_an_injected_event_is_a_step(new: Callable[..., Guest]) -> None:
    """Intel SDM 26.7.8: the monitor trap comes before the handler's first instruction."""
    guest = new()
    guest.switch("singlestep", True)
    guest.vcpu.map_cache_stale = False  # it has run since the ring's page was taken
    guest.vcpu.single_step = True
    guest.host.hvm_inject_trap(guest.domid, 0, 0x40, 0, NO_ERROR_CODE, 0, 0)
    guest.load(*nops(3))
    assert guest.run() == 0
    assert guest.event(Reason.SINGLESTEP).register("rip") == START
    assert guest.vcpu.delivered == [(0x40, 0)]


def test_mmio(new: Callable[..., Guest]) -> None:
    """handle_mmio: the instruction is emulated whole; a fetch there is a #GP."""
    guest = new()
    address = HOLE * PAGE_SIZE
    guest.load(*one(None, Access("r", address, bytes(2), "rbx"), ("w", address)))
    assert guest.run() == 2
    assert guest.register("rbx") == 0xFFFF
    guest.switch("emul_unimplemented", True)
    guest.load(*one(None, ("w", address), emulated=False))
    assert guest.run(3) == 0  # hvm_emulate_one_insn: for ever, and untold
    assert (guest.vcpu.delivered, guest.take()) == ([], [])
    guest.load(Instruction(address))
    assert guest.run(2) == 0
    assert guest.vcpu.delivered == [(13, 3)]


def test_a_virtualisation_exception(new: Callable[..., Guest]) -> None:
    guest = new()
    view = guest.view((DATA, RX))
    guest.host.altp2m_set_vcpu_enable_notify(guest.domid, 0, OTHER)
    guest.host.altp2m_set_suppress_ve(guest.domid, view, DATA, False)
    guest.load(*one(None, ("w", DATA_ADDRESS)))
    assert guest.run(2) == 0
    assert guest.vcpu.delivered == [(20, 3)]
    assert not guest.take()


# Who runs, and when.


def test_vcpus_take_turns(new: Callable[..., Guest]) -> None:
    guest = new(3)
    for number in range(3):
        guest.load(*nops(3), vcpu=number, loop=True)
    guest.vcpus[1].event_pauses = 1
    assert guest.run(8) == 8
    assert [vcpu.cpu_time for vcpu in guest.vcpus] == [4000, 0, 4000]
    assert [vcpu.register("rip") for vcpu in guest.vcpus] == [at(1), at(0), at(1)]


def test_a_call_that_lets_a_loop_go_on_returns(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.host.domain_pause(guest.domid)
    guest.load(*nops(3), loop=True)
    assert guest.run() == 0
    guest.host.steps_at_once = 50
    guest.host.domain_unpause(guest.domid)
    assert guest.vcpu.cpu_time == 50_000


def test_a_program_ends_halts_and_jumps(new: Callable[..., Guest]) -> None:
    guest = new()
    info = partial(guest.host.vcpu_getinfo, guest.domid, 0)
    guest.load(
        Instruction(at(0), 4, (), SetRegisters({"rip": at(2)})),
        Instruction(at(1), 4, [("w", DATA_ADDRESS, b"x")]),
        Instruction(at(2), 4, (), Halt()),
        Instruction(at(3), 4),
    )
    for where, blocked in ((at(2), False), (at(3), False), (at(3), True)):
        found = info()
        assert (found.blocked, found.running) == (blocked, not blocked)
        assert guest.register("rip") == where  # each time it runs a little
    guest.vcpu.halted = False
    for blocked in (False, True):
        found = info()
        assert (found.blocked, found.running) == (blocked, not blocked)
    assert (found.cpu_time, found.online) == (3000, True)
    assert guest.page(DATA)[0x123] == 0


def test_who_is_paused_neither_waits_nor_runs(new: Callable[..., Guest]) -> None:
    """VPF_blocked is for HLT alone."""
    guest, _, request = stopped(new)
    info = guest.host.vcpu_getinfo(guest.domid, 0)
    assert (info.blocked, info.running) == (False, False)
    guest.answer(request, SWITCH, view=0)
    info = guest.host.vcpu_getinfo(guest.domid, 0)
    assert (info.blocked, info.running) == (True, False)


def test_a_vcpu_that_goes_astray(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.load(Instruction(at(0), 4, (), SetRegisters({"rip": 0x77})), *nops(3)[1:])
    assert guest.run() == 1
    assert guest.vcpu.delivered == [(6, 3)]
    assert guest.vcpu.halted


def test_a_vcpu_that_faults_for_ever_burns_its_time(new: Callable[..., Guest]) -> None:
    guest = new(listen=False)
    guest.load(*one(None, ("r", DATA_ADDRESS)))
    guest.host.touch(guest.domid, CODE, "x")
    guest.vcpu.veinfo = None
    mfn = guest.model.host.lookup(DATA).mfn
    table = guest.model.views[0].table
    table.write(DATA, mfn, ORDER_4K, PageType.RAM_RW, N)

    def refill(*arguments: object) -> int:
        return 0

    table.write = refill  # type: ignore[method-assign, assignment]
    assert guest.run(3) == 0
    assert guest.vcpu.cpu_time == 3000


def test_after_a_crash_nothing_runs(new: Callable[..., Guest]) -> None:
    guest = new(2, listen=False)
    guest.host.domain_set_access_required(guest.domid, True)
    guest.view((DATA, N))
    guest.load(*one(None, ("r", DATA_ADDRESS)))
    guest.load(*nops(3), vcpu=1, loop=True)
    guest.run(3)
    assert guest.model.crashed
    assert guest.run() == 0
    info = guest.host.domain_getinfolist(guest.domid, 1)[0]
    assert (info.shutdown, info.shutdown_reason) == (True, 3)


def test_a_guest_that_shuts_down(new: Callable[..., Guest]) -> None:
    guest = new()
    guest.load(*nops(3), loop=True)
    guest.host.shut_down(guest.domid, 1)
    guest.host.shut_down(guest.domid, 3)
    assert guest.run() == 0
    info = guest.host.domain_getinfolist(guest.domid, 1)[0]
    assert (info.shutdown, info.shutdown_reason) == (True, 1)
    assert not guest.model.crashed


def test_a_domain_that_is_destroyed_lingers_while_it_is_mapped(new: Callable[..., Guest]) -> None:
    """domain_kill; vm_event_domctl does nothing on it, and says 0."""
    guest = new(9)
    guest.view((DATA, N))
    fill(guest, 9)
    host, domid = guest.host, guest.domid
    [first, *_] = guest.take()
    pages = host.foreignmemory_map(domid, True, [OTHER])
    host.destroy(domid)
    [info] = host.domain_getinfolist(domid, 1)
    assert info.dying
    assert host.domid_to_name(domid) is None
    assert host.name_to_domid("guest") is None
    guest.answer(first)  # silently dropped
    assert guest.vcpu.event_pauses == 1
    assert guest.run() == 0
    host.monitor_disable(domid)
    host.monitor_resume(domid)
    assert errno_of(partial(host.monitor_enable, domid)) == EBUSY
    assert errno_of(partial(host.domain_hvm_getcontext_partial, domid, 2, 0)) == EINVAL
    pages[0][0] = 1
    host.foreignmemory_unmap(pages)
    assert host.domain_getinfolist(domid, 1)
    assert guest.ring is not None
    host.monitor_unmap_ring(guest.ring)
    assert host.domain_getinfolist(domid, 1) == []
    assert errno_of(partial(host.monitor_disable, domid)) == ESRCH
    host.evtchn_close(guest.channel)
    guest.ring = None
    again = host.add_domain("guest", memory_kib=1024)
    assert again == domid
    assert not host.domain(again).listened
    host.destroy(again)


def test_destroyed_memory_comes_back() -> None:
    host = MockBackend((4, 17), memory_pages=1 << 11)
    for _ in range(5):
        domid = host.add_domain(memory_kib=2048, superpages=False)
        host.destroy(domid)
        assert host.machine.domains == {}
    host.close()


# The calls.


@pytest.mark.parametrize("xen", [SUPPORTED[0], SUPPORTED[-2], SUPPORTED[-1]], indirect=False)
def test_calls_for_a_vcpu(xen: tuple[int, int]) -> None:
    """XEN_DOMCTL_getvcpuinfo, dm.c:inject_event."""
    host = MockBackend(xen)
    domid = host.add_domain(vcpus=2, memory_kib=0)
    missing = EINVAL if xen < (4, 22) else ENOENT
    assert errno_of(partial(host.vcpu_getinfo, domid, 2)) == missing
    assert errno_of(partial(host.vcpu_getinfo, 9, 0)) == ESRCH
    assert [host.vcpu_getinfo(domid, vcpu).online for vcpu in (0, 1)] == [True, False]
    trap = (3, 6, NO_ERROR_CODE, 1, 0)
    assert errno_of(partial(host.hvm_inject_trap, domid, 2, *trap)) == EINVAL
    assert errno_of(partial(host.hvm_inject_trap, 9, 0, *trap)) == ESRCH
    host.hvm_inject_trap(domid, 1, *trap)
    assert errno_of(partial(host.hvm_inject_trap, domid, 1, *trap)) == EBUSY
    pv = host.add_domain("pv", kind="pv", mode=0, memory_kib=0)
    assert errno_of(partial(host.hvm_inject_trap, pv, 0, *trap)) == EINVAL
    host.machine.privileged = False
    assert errno_of(partial(host.hvm_inject_trap, domid, 0, *trap)) == EPERM
    assert errno_of(partial(host.vcpu_getinfo, domid, 0)) == EPERM
    host.close()


def test_nothing_that_an_agent_has_done_is_carried() -> None:
    """Xen saves no monitor, and none of what its vCPUs were told to do (``hvm/save.c``)."""
    host = MockBackend()
    domid = host.add_domain()
    host.load(domid, [Instruction(0x1000, effect=Cpuid()), Instruction(0x1001)])
    _, ring = host.monitor_enable(domid)
    host.monitor_cpuid(domid, True)
    host.domain_unpause(domid)
    assert host.domain(domid).vcpus[0].event_pauses
    host.domain_debug_control(domid, 1, 0)
    host.monitor_disable(domid)
    host.monitor_unmap_ring(ring)
    host.monitor_singlestep(domid, True)
    host.monitor_control_registers(domid)
    carried = host.migrate(domid)
    assert host.domain(carried).vcpus[0].register("rip") == 0x1002  # it was not kept from running
    _, ring = host.monitor_enable(carried)
    host.monitor_singlestep(carried, True)  # which was off
    host.load(carried, [Instruction(0x1000), Instruction(0x1001)])
    host.run(carried)
    assert not int.from_bytes(ring[:4], "little")  # nothing is stepped
    host.close()
