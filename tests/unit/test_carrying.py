# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain is carried, and comes back with its views, breakpoints and watches; or with none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EINVAL

import pytest

import xenaltp2m as xa
from tests.contract.guests import GUESTS, MEMORY_KIB, RunningGuest, serve
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.breakpoints import Breakpoints, Hit
from xenaltp2m.viewstate import State, diff

from .faults import Failing

UNUSED = range(0x300, 0x310)


class Agent:
    """A guest at work, with views, breakpoints, a watch and a monitor."""

    def __init__(self, stack: ExitStack, mock: MockBackend | None = None) -> None:
        self.mock = mock or MockBackend()
        self.mock.steps_at_once = 3000
        domid = self.mock.add_domain("racer", vcpus=2, memory_kib=MEMORY_KIB)
        self.mock.boot(domid, GUESTS / "racer.elf")
        self.xen = stack.enter_context(xa.connect(self.mock))
        self.guest = RunningGuest(self.xen, domid, "racer", 2, lambda: None)
        self.dom = stack.enter_context(self.guest.dom)
        self.altp2m = stack.enter_context(self.dom.altp2m())
        self.view = self.altp2m.create_view(label="own")
        self.monitor = stack.enter_context(
            self.dom.monitor(xa.WriteCtrlreg.on(xa.ControlRegister.CR3), access_required=True)
        )
        self.pages = self.dom.info().pages
        self.breakpoints = stack.enter_context(Breakpoints(self.altp2m, self.monitor))
        self.hook = self.breakpoints.insert(self.guest.address("hit"), self.heard)
        self.watch = self.breakpoints.watch(self.guest.address("total"), 4)
        self.shadows = self.dom.add_pages(2)
        self.dom.memory.write_page(self.shadows[1], b"shadow" + bytes(4090))
        self.view.remap(UNUSED[0], self.shadows[1], access=xa.Access.X)
        self.view.remap(UNUSED[1], UNUSED[0], access=xa.Access.R)
        self.view.set_access(UNUSED[2:9], xa.Access.RX)
        self.view.set_access(self.shadows[0], xa.Access.N)
        self.view.set_suppress_ve(UNUSED[3], False)
        self.view.set_visibility(False)
        self.altp2m.enable_notify(1, UNUSED[9])

    def heard(self, hit: Hit) -> None:
        if hit.breakpoint.hits % 50 == 0:
            self.monitor.stop()

    def go(self, hits: int) -> None:
        serve(self.monitor, self.breakpoints, lambda: self.hook.hits >= hits)


@pytest.fixture
def agent() -> Iterator[Agent]:
    with ExitStack() as stack:
        yield Agent(stack)


def test_it_comes_back_with_all_there_was(agent: Agent) -> None:
    dom, domid = agent.dom, agent.dom.domid
    agent.mock.domain_unpause(domid)
    agent.go(50)
    before, number = agent.guest.sums(), agent.view.id
    with dom.carried() as carried:
        assert not dom._backend.altp2m_get_domain_state(domid)
        assert dom.info().pages == agent.pages - 1  # which was the ring
        new = agent.mock.carry(domid)
    assert dom.domid == new != domid
    assert agent.guest.sums().keys() == before.keys()
    assert not agent.view.closed
    assert agent.view.verify() == []
    assert (agent.view.id, agent.view.label, agent.view.visible) == (number, "own", False)
    content = dom.memory.read_page(carried.gfns[agent.shadows[1]])
    assert content.startswith(b"shadow")
    assert agent.view.remaps == {
        UNUSED[0]: carried.gfns[agent.shadows[1]],
        UNUSED[1]: carried.gfns[agent.shadows[1]],
    }
    assert carried.state is not None
    assert [view.label for view in carried.state.views] == ["own"]
    assert carried.state.monitor is not None
    assert carried.state.monitor.access_required
    own = agent.altp2m.capture(contents=True)
    assert own.views[0] == carried.state.views[0]
    assert own.notify == carried.state.notify == ((1, UNUSED[9]),)
    assert own.monitor == carried.state.monitor
    hits, written = agent.hook.hits, agent.watch.hits
    done = agent.guest.words("total")[0]
    agent.go(hits + 200)
    assert agent.watch.hits > written
    # Each call since was heard of, but for those in flight.
    assert 0 <= (agent.hook.hits - hits) - (agent.guest.words("total")[0] - done) <= 4
    assert agent.guest.lines("noticed") == [0, 0]
    assert agent.breakpoints.verify() == []
    assert agent.altp2m.verify() == []


def test_again_and_again(agent: Agent) -> None:
    agent.mock.domain_unpause(agent.dom.domid)
    states: list[State] = []
    for turn in range(1, 4):
        agent.go(60 * turn)
        with agent.dom.carried() as carried:
            agent.mock.carry(agent.dom.domid)
        assert carried.state is not None
        states.append(carried.state)
    assert diff(states[0], states[1]) == diff(states[1], states[2]) == []
    assert len(states[0].pages) == len(agent.shadows)
    assert agent.guest.lines("noticed") == [0, 0]


def test_it_did_not_leave(agent: Agent) -> None:
    """The body has failed, and the domain is where it was."""
    domid = agent.dom.domid
    agent.mock.domain_unpause(domid)
    agent.go(50)
    with pytest.raises(KeyError, match="xl"), agent.dom.carried():
        raise KeyError("xl")
    assert agent.dom.domid == domid
    agent.go(150)
    assert agent.guest.lines("noticed") == [0, 0]


def test_it_does_not_come_back(agent: Agent) -> None:
    with (
        pytest.raises(xa.DomainNotFoundError, match=r"has not come back within 0\.1 s"),
        agent.dom.carried(seconds=0.1) as carried,
    ):
        agent.mock.destroy(agent.dom.domid)
    assert agent.dom.closed
    assert agent.altp2m.closed
    assert agent.monitor.closed
    assert carried.state is not None


def test_what_is_refused(agent: Agent) -> None:
    with agent.dom.paused(), pytest.raises(xa.InvalidArgumentError, match="unpause it first"):
        agent.dom.carried().__enter__()
    with agent.xen.domain(agent.dom.domid) as other:
        other.add_pages()
        with pytest.raises(xa.BusyError, match="another handle of domain"):
            agent.dom.carried().__enter__()
    agent.mock.domain_unpause(agent.dom.domid)
    events = agent.monitor.events(timeout=5)
    next(events)
    with pytest.raises(xa.BusyError, match="is being iterated"):
        agent.dom.carried().__enter__()
    events.close()
    assert agent.view.verify() == []


def test_altp2m_of_somebody_else(agent: Agent) -> None:
    domid = agent.mock.add_domain("other")
    agent.mock.altp2m_set_domain_state(domid, True)
    with (
        agent.xen.domain("other") as dom,
        dom.altp2m(),
        pytest.raises(xa.BusyError, match="was on before"),
    ):
        dom.carried().__enter__()


@pytest.mark.parametrize("there", [True, False], ids=["before", "after"])
def test_all_of_it_or_nothing(there: bool) -> None:
    """Whichever call fails, while it is laid down or made again; what is left is told of."""
    chance = random.Random(7)
    number, calls = 0, 1 << 30
    while number <= calls:
        with ExitStack() as stack:
            mock = Failing()
            agent = Agent(stack, mock)
            mock.steps_at_once = 100
            dom, shadows, domid = agent.dom, agent.shadows, int(agent.dom.domid)
            carried = dom.carried()
            failed = False
            try:
                if there:
                    mock.start({number: EINVAL})
                with carried:
                    made = mock.made
                    mock.start({})
                    domid = mock.carry(dom.domid)
                    if not there:
                        mock.start({number: EINVAL})
                made = made if there else mock.made
            except xa.XenError as error:
                failed = "unpausing" not in error.message or agent.altp2m.closed
            mock.start({})
            if not number:
                assert not failed
                calls = made
            assert failed == agent.altp2m.closed == agent.monitor.closed
            assert failed == agent.breakpoints.closed
            if not failed:
                assert agent.view.verify() == []
                assert agent.breakpoints.verify() == []
                assert agent.view.remaps[xa.Gfn(UNUSED[0])] == carried.gfns[shadows[1]]
        domain = mock.domain(domid)
        assert (domain.active, domain.listened) == (False, False)
        assert domain.pauses == (0 if domid > 1 else 1)  # as the mock began it
        number += 1 if there else chance.randrange(1, 8)
    assert calls > 40
