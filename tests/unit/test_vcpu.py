# SPDX-License-Identifier: LGPL-2.1-or-later
"""vCPUs on the mock: their registers, their view, their pauses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend


@pytest.fixture
def mock() -> MockBackend:
    return MockBackend((4, 17))


@pytest.fixture
def dom(mock: MockBackend) -> Iterator[xa.Domain]:
    domid = mock.add_domain("guest", vcpus=2)
    mock.domain(domid).vcpus[1].online = True
    with xa.connect(mock) as xen, xen.domain("guest") as dom:
        yield dom


def test_registers_that_are_set_are_read_back_and_the_others_stay(dom: xa.Domain) -> None:
    before = dom.vcpu(0).registers().as_dict()
    dom.vcpu(0).set_registers(rip=0x1234, cr3=0x5000, cs_sel=8)
    after = dom.vcpu(0).registers().as_dict()
    assert after == before | {"rip": 0x1234, "cr3": 0x5000, "cs_sel": 8}


def test_the_other_vcpus_are_left_alone(mock: MockBackend, dom: xa.Domain) -> None:
    dom.vcpu(1).set_registers(rax=7)
    assert dom.vcpu(0).registers().rax == 0
    assert dom.vcpu(1).registers().rax == 7
    assert all(vcpu.online for vcpu in mock.domain(int(dom.domid)).vcpus)


def test_setting_registers_leaves_the_pause_count(mock: MockBackend, dom: xa.Domain) -> None:
    before = mock.domain(int(dom.domid)).pauses
    dom.vcpu(0).set_registers(rax=1)
    with pytest.raises(xa.InvalidArgumentError):
        dom.vcpu(0).set_registers(rax=1 << 64)
    assert mock.domain(int(dom.domid)).pauses == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eax": 1}, "no register 'eax'"),
        ({"rax": -1}, "8 bytes"),
        ({"cs_sel": 1 << 32}, "4 bytes"),
        ({"rax": "1"}, "8 bytes"),
    ],
)
def test_what_no_register_holds_is_refused(
    mock: MockBackend, dom: xa.Domain, values: dict[str, int], words: str
) -> None:
    calls = len(mock.calls)
    with pytest.raises(xa.InvalidArgumentError, match=words):
        dom.vcpu(0).set_registers(**values)
    assert not [call for call in list(mock.calls)[calls:] if "setcontext" in call.op]


@pytest.mark.parametrize("number", [2, -1, True, "0"])
def test_a_vcpu_that_is_not_there(dom: xa.Domain, number: int) -> None:
    with pytest.raises(xa.InvalidArgumentError, match="no vCPU"):
        dom.vcpu(number)


def test_its_view_is_altp2m_s(dom: xa.Domain) -> None:
    with dom.altp2m() as altp2m:
        view = altp2m.create_view()
        assert [vcpu.view for vcpu in dom.vcpus()] == [0, 0]
        altp2m.switch_to_view(view)
        assert [vcpu.view for vcpu in dom.vcpus()] == [view.id, view.id]


def test_whether_it_runs(dom: xa.Domain) -> None:
    info = dom.vcpu(0).info()
    assert info.online
    assert info.cpu_time == 0


def test_a_vcpu_that_runs_without_cr0_s_fixed_bit_can_be_set(
    mock: MockBackend, dom: xa.Domain
) -> None:
    """A guest can start one so; Xen then refuses to load what it has saved."""
    mock.domain(int(dom.domid)).vcpus[1].set_register("cr0", 1)
    dom.vcpu(0).set_registers(rax=7)
    assert [vcpu.info().online for vcpu in dom.vcpus()] == [True, True]
    assert dom.vcpu(1).registers().cr0 == 0x11


def test_what_xen_refuses_leaves_every_vcpu_up(dom: xa.Domain) -> None:
    before = [vcpu.registers().as_dict() for vcpu in dom.vcpus()]
    with pytest.raises(xa.InvalidArgumentError):
        dom.vcpu(1).set_registers(cr0=1 << 40, rax=7)
    assert [vcpu.registers().as_dict() for vcpu in dom.vcpus()] == before
    assert all(vcpu.info().online for vcpu in dom.vcpus())
