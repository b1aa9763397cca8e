# SPDX-License-Identifier: LGPL-2.1-or-later
"""Register writes that wait for their answers: what is denied does not happen, all else does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from tests.unit.ringhost import RingHost, finish, started
from xenaltp2m.abi.vm_event import encode_request
from xenaltp2m.backend.mock import (
    Instruction,
    MockBackend,
    SetRegisters,
    WriteControlRegister,
    WriteMsr,
)

CR0, CR3, CR4, XCR0 = xa.ControlRegister
LSTAR = 0xC0000082
START = 0x10000
GATE = "monitor_control_registers"
PAUSED, DENY = 1, 1 << 6

REGISTERS = pytest.mark.parametrize(
    ("effect", "register", "new", "wanted"),
    [
        (WriteControlRegister(CR0, 0x33), "cr0", 0x33, xa.WriteCtrlreg.on(CR0, deniable=True)),
        (WriteControlRegister(CR3, 0x5000), "cr3", 0x5000, xa.WriteCtrlreg.on(CR3, deniable=True)),
        (WriteControlRegister(CR4, 0x30), "cr4", 0x30, xa.WriteCtrlreg.on(CR4, deniable=True)),
        (WriteMsr(LSTAR, 5), "msr_lstar", 5, xa.MovToMsr.on(LSTAR, deniable=True)),
    ],
    ids=["cr0", "cr3", "cr4", "msr"],
)


class Machine:
    """A mock's domain whose only vCPU writes a register."""

    def __init__(self) -> None:
        self.host = MockBackend()
        self.domid = self.host.add_domain("guest", vcpus=1)
        self.xen = xa.Xen(self.host)
        self.dom = self.xen.domain("guest")

    def load(self, effect: WriteControlRegister | WriteMsr) -> None:
        then = Instruction(START + 4, 4, effect=SetRegisters({"rbx": 7}))
        self.host.load(self.domid, [Instruction(START, 4, effect=effect), then])

    def register(self, name: str) -> int:
        return self.host.domain(self.domid).vcpus[0].register(name)

    def close(self) -> None:
        self.dom.close()
        self.xen.close()
        assert self.host.open_resources() == []
        self.host.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


@REGISTERS
@pytest.mark.parametrize("response", [None, xa.Response.resume(), xa.Response.deny()], ids=str)
def test_a_write_happens_when_it_is_allowed(
    machine: Machine,
    effect: WriteControlRegister | WriteMsr,
    register: str,
    new: int,
    wanted: xa.Subscription,
    response: xa.Response | None,
) -> None:
    machine.load(effect)
    old = machine.register(register)
    with machine.dom.monitor(wanted) as monitor:
        machine.host.domain_unpause(machine.domid)
        for event in monitor.events(timeout=0.1):
            assert isinstance(event, xa.WriteCtrlreg | xa.MovToMsr)
            assert (event.old_value, event.new_value) == (old, new)
            assert machine.register(register) == old
            if response is not None:
                event.reply(response)
        assert machine.register(register) == (old if response == xa.Response.deny() else new)
        assert machine.register("rbx") == 7


@REGISTERS
@pytest.mark.parametrize("answered", [True, False])
def test_a_write_happens_though_the_monitor_is_closed(
    machine: Machine,
    effect: WriteControlRegister | WriteMsr,
    register: str,
    new: int,
    wanted: xa.Subscription,
    answered: bool,
) -> None:
    machine.load(effect)
    with machine.dom.monitor(wanted) as monitor:
        machine.host.domain_unpause(machine.domid)
        for event in monitor.events(timeout=0.1):
            if answered:
                event.reply(xa.Response.resume())
            break
    assert machine.register(register) == new
    assert machine.register("rbx") == 7


@REGISTERS
def test_without_the_option_it_has_happened(
    machine: Machine,
    effect: WriteControlRegister | WriteMsr,
    register: str,
    new: int,
    wanted: xa.Subscription,
) -> None:
    machine.load(effect)
    old = machine.register(register)
    kind = xa.Subscription(wanted.event, wanted.switch, wanted.options)
    with machine.dom.monitor(kind) as monitor:
        machine.host.domain_unpause(machine.domid)
        for event in monitor.events(timeout=0.1):
            if register in event.registers:
                assert getattr(event.registers, register) == old
            assert machine.register(register) == new
            with pytest.raises(xa.InvalidArgumentError, match=r"on\(\w+, deniable=True\)"):
                event.reply(xa.Response.deny())
    assert GATE not in [call.op for call in machine.host.calls]


def test_more_vcpus_than_the_ring_has_room_for() -> None:
    """Those that wait for room when the monitor is closed have their writes done, too."""
    host = MockBackend()
    domid = host.add_domain("guest", vcpus=20)
    for vcpu in range(20):
        effect = WriteControlRegister(CR3, 0x1000 * (vcpu + 1))
        host.load(domid, [Instruction(START, 4, effect=effect)], vcpu)
    with xa.connect(host) as xen, xen.domain("guest") as dom:
        with dom.monitor(xa.WriteCtrlreg.on(CR3, deniable=True)) as monitor:
            host.domain_unpause(domid)
            next(monitor.events(timeout=1))
            assert host.domain(domid).vcpus[19].queued
        vcpus = host.domain(domid).vcpus
        assert [each.register("cr3") >> 12 for each in vcpus] == list(range(1, 21))
    host.close()


# What is asked of Xen.


@pytest.fixture
def host() -> Iterator[RingHost]:
    host = RingHost()
    yield host
    host.close()


def wrote(reason: int = xa.Reason.WRITE_CTRLREG, flags: int = PAUSED, **fields: int) -> bytes:
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return bytes(encode_request(7, reason, 0, flags=flags, fields=named))


def test_the_gate_is_closed_before_the_switch_is_on(host: RingHost) -> None:
    dom, monitor = started(host, xa.WriteCtrlreg.on(CR4), xa.MovToMsr.on(1, deniable=True))
    asked = [name for name in host.calls if name.startswith(("monitor_w", "monitor_m", GATE))]
    assert asked == ["monitor_write_ctrlreg", GATE, "monitor_mov_to_msr"]
    monitor.close()
    finish(dom)


def test_one_deniable_subscription_makes_all_deniable(host: RingHost) -> None:
    dom, monitor = started(host, xa.WriteCtrlreg.on(CR4, deniable=True), xa.MovToMsr.on(1))
    host.put(wrote(xa.Reason.MOV_TO_MSR))
    monitor.run(lambda _: xa.Response.deny(), timeout=0)
    assert host.responses[0][4] == PAUSED | DENY
    monitor.disable(xa.WriteCtrlreg.on(CR4))
    host.put(wrote(xa.Reason.MOV_TO_MSR))
    monitor.run(lambda _: xa.Response.deny(), timeout=0)
    assert host.responses[1][4] == PAUSED | DENY
    host.put(wrote(write_ctrlreg__index=XCR0))
    with pytest.raises(xa.InvalidArgumentError, match="CR0, CR3 and CR4 only"):
        monitor.run(lambda _: xa.Response.deny(), timeout=0)
    monitor.close()
    finish(dom)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (xa.Reason.WRITE_CTRLREG, r"WriteCtrlreg.on\(register, deniable=True\)"),
        (xa.Reason.MOV_TO_MSR, r"MovToMsr.on\(msr, deniable=True\)"),
    ],
)
def test_a_denial_without_effect_is_refused(host: RingHost, reason: int, words: str) -> None:
    dom, monitor = started(host, xa.WriteCtrlreg.on(CR0), xa.MovToMsr.on(1))
    host.put(wrote(reason))
    [event] = monitor.events(timeout=0)
    host.put(wrote(reason))
    for event in monitor.events(timeout=0):
        with pytest.raises(xa.InvalidArgumentError, match=f"open the monitor with {words}"):
            event.reply(xa.Response.deny())
    assert GATE not in host.calls
    monitor.close()
    finish(dom)


def test_what_does_not_wait_does_not_go_with_what_does(host: RingHost) -> None:
    """hvm_set_cr3 puts the write off whether the vCPU waits or not."""
    deniable, loose = xa.MovToMsr.on(1, deniable=True), xa.WriteCtrlreg.on(CR3, sync=False)
    dom, monitor = started(host, deniable, xa.WriteCtrlreg.on(XCR0, sync=False))
    with pytest.raises(xa.InvalidArgumentError, match="write_ctrlreg 1 with sync=False"):
        monitor.enable(loose)
    monitor.disable(deniable)
    with pytest.raises(xa.InvalidArgumentError, match="sync=False"):
        monitor.enable(loose)  # Xen goes on putting writes off
    monitor.close()
    with dom.monitor(loose) as monitor:
        host.calls.clear()
        with pytest.raises(xa.InvalidArgumentError, match="sync=False"):
            monitor.enable(deniable)
        assert host.calls == []
        monitor.disable(loose)
        monitor.enable(deniable)
        assert host.calls[-2:] == [GATE, "monitor_mov_to_msr"]
    finish(dom)
