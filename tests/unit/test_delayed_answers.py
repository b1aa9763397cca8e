# SPDX-License-Identifier: LGPL-2.1-or-later
"""From 4.15 a removed page has each vCPU's next resume do nothing else: no answer comes late."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

import xenaltp2m as xa
from tests.unit.ringhost import RingHost, finish, started
from xenaltp2m.abi.vm_event import encode_request
from xenaltp2m.backend.mock import Access, Cpuid, GuestRequest, Instruction, MockBackend
from xenaltp2m.values.responses import RESUME

RELEASES = [(4, 14), (4, 17), (4, 22)]
CODE, DATA = 0x10000, 0x20000
TRUTH = b"\x0d"


class Agent:
    """One that reverts a remap while an event waits for its answer."""

    def __init__(self, xen: tuple[int, int]) -> None:
        self.mock = MockBackend(xen)
        self.domid = self.mock.add_domain("guest", vcpus=2, max_kib=32 << 10)
        self.xen = xa.Xen(self.mock)
        self.dom = self.xen.domain("guest")
        self.altp2m = self.dom.altp2m()
        self.view = self.altp2m.create_view()
        [self.shadow] = self.dom.add_pages(1)
        self.heard: list[xa.Event] = []

    def hear(
        self,
        program: list[Instruction],
        answer: Callable[[xa.Event], xa.Response],
        *kinds: type[xa.Event],
    ) -> None:
        """Run the program; the first event is answered after a revert."""
        self.mock.load(self.domid, program)
        self.view.remap(0x30, self.shadow)
        self.altp2m.switch_to_view(self.view)
        with self.dom.monitor(xa.MemAccess, *kinds) as monitor:

            def handler(event: xa.Event) -> xa.Response:
                self.heard.append(event)
                if len(self.heard) == 1:
                    self.view.revert(0x30)
                return answer(event)

            self.mock.domain_unpause(self.domid)
            monitor.run(handler, timeout=0)

    def register(self, name: str) -> int:
        return self.mock.domain(self.domid).vcpus[0].register(name)


@pytest.fixture(params=RELEASES, ids="{0[0]}.{0[1]}".format)
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    made = Agent(request.param)
    yield made
    made.dom.close()
    made.xen.close()
    made.mock.close()


def test_the_mock_has_the_resume_that_does_nothing(agent: Agent) -> None:
    """Without which the other tests would show nothing."""
    agent.mock.domain_unpause(agent.domid)
    agent.view.remap(0x30, agent.shadow)
    agent.view.revert(0x30)
    delays = agent.xen.release.removal_delays_answers
    assert agent.mock.domain(agent.domid).vcpus[0].map_cache_stale is delays


def test_an_emulated_instruction_is_heard_of_once(agent: Agent) -> None:
    agent.view.set_access(DATA >> 12, xa.Access.N)
    read = Instruction(CODE, 4, [Access("r", DATA, b"\0", "rbx")])
    agent.hear([read], lambda event: xa.Response.emulate(read_data=TRUTH))
    assert [type(event) for event in agent.heard] == [xa.MemAccess]
    assert agent.register("rbx") == TRUTH[0]
    assert agent.register("rip") == CODE + 4


def test_registers_for_an_instruction_that_comes_again(agent: Agent) -> None:
    after = {"rip": CODE + 2, "rax": 0x77}
    agent.hear(
        [Instruction(CODE, 2, effect=Cpuid())],
        lambda event: xa.Response.resume().with_registers(**after),
        xa.Cpuid,
    )
    assert [type(event) for event in agent.heard] == [xa.Cpuid]
    assert (agent.register("rip"), agent.register("rax")) == (CODE + 2, 0x77)


def test_registers_for_one_that_does_not(agent: Agent) -> None:
    """It has been executed; the next event shows whether they came in time."""
    agent.view.set_access(DATA >> 12, xa.Access.N)
    program = [
        Instruction(CODE, 3, effect=GuestRequest()),
        Instruction(CODE + 3, 4, [Access("r", DATA)]),
    ]

    def answer(event: xa.Event) -> xa.Response:
        if isinstance(event, xa.GuestRequest):
            return xa.Response.resume().with_registers(rbx=0x99, rip=CODE + 3)
        return event.default_response

    agent.hear(program, answer, xa.GuestRequest)
    assert [type(event) for event in agent.heard] == [xa.GuestRequest, xa.MemAccess]
    assert agent.heard[1].registers.rbx == 0x99


def test_an_exception_that_is_given_back(agent: Agent) -> None:
    page = agent.dom.memory.read_page(CODE >> 12)
    agent.dom.memory.write_page(CODE >> 12, b"\xcc" + page[1:])
    agent.hear([Instruction(CODE, 1)], lambda event: xa.Response.reinject(), xa.SoftwareBreakpoint)
    assert [type(event) for event in agent.heard] == [xa.SoftwareBreakpoint]
    assert agent.mock.domain(agent.domid).vcpus[0].delivered == [(3, 6)]


def calls_of_events(idle_vcpus: int) -> int:
    """How many of the monitor's functions are called for 40 events of vCPU 0, and one at first."""
    host = RingHost(vcpus=1 + idle_vcpus)
    dom, monitor = started(host, xa.MemAccess)
    fields = {"mem_access.gfn": 0x101, "mem_access.flags": 4}
    raw = bytes(encode_request(7, 1, 0, flags=0x81, view=1, fields=fields))
    count = 0

    def note(frame: FrameType, what: str, _: object) -> None:
        nonlocal count
        ours = "xenaltp2m/handles/monitor/" in frame.f_code.co_filename
        count += what == "call" and ours

    host.put(raw)
    monitor.note_page_removed()
    monitor.run(lambda _: xa.Response.resume(), timeout=0)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        for _ in range(5):
            for _ in range(8):
                host.put(raw)
            monitor.run(lambda _: RESUME, timeout=0)
    finally:
        sys.setprofile(before)
    assert len(host.responses) == 41
    monitor.close()
    finish(dom)
    host.close()
    return count


def test_fault_31_a_vcpu_that_never_runs_slows_no_other_down() -> None:
    """Its answer stays delayed for as long as it does not come for one."""
    assert calls_of_events(idle_vcpus=1) == calls_of_events(idle_vcpus=0)


@pytest.mark.parametrize("nth", range(1, 6))
def test_fault_31_the_vcpu_concerned_gets_its_answer_in_time(agent: Agent, nth: int) -> None:
    """Also where the page goes while the fast loop has its event in hand, and one vCPU is idle."""
    program = [Instruction(CODE + 2 * number, 2, effect=Cpuid()) for number in range(5)]
    agent.mock.load(agent.domid, program)
    agent.view.remap(0x30, agent.shadow)
    heard: list[int] = []

    def handler(event: xa.Event) -> xa.Response:
        heard.append(event.registers.rip)
        if len(heard) == nth:
            agent.view.revert(0x30)
        following = event.registers.rip + 2
        return xa.Response.resume().with_registers(rip=following, rax=len(heard))

    with agent.dom.monitor(xa.Cpuid) as monitor:
        agent.mock.domain_unpause(agent.domid)
        monitor.run(handler, timeout=0)
    assert heard == [CODE + 2 * number for number in range(5)]
    assert (agent.register("rip"), agent.register("rax")) == (CODE + 10, 5)
