# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain is carried, and comes back with its views, breakpoints and watches; or with none."""

from __future__ import annotations

import json
import os
import random
import signal
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from errno import EINVAL, ENOSPC
from pathlib import Path

import pytest

import xenaltp2m as xa
from tests.contract.guests import GUESTS, MEMORY_KIB, RunningGuest, serve
from tests.thorough import THOROUGH
from xenaltp2m import cli
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.handles.memory import MappedPages
from xenaltp2m.testing import Failing
from xenaltp2m.tools.breakpoints.hooks import Hit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.rescue import diagnose, rescue
from xenaltp2m.values.state import MonitorState, State, diff

UNUSED = range(0x300, 0x310)


class Agent:
    """A guest at work, with views, breakpoints, a watch and a monitor."""

    def __init__(self, stack: ExitStack, mock: MockBackend | None = None) -> None:
        self.mock = mock or MockBackend()
        self.mock.steps_at_once = 1_500_000
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
    before, number = agent.guest.contents(), agent.view.id
    with xa.Migration(dom) as carried:
        assert not dom._backend.altp2m_get_domain_state(domid)
        assert dom.info().pages == agent.pages - 1  # which was the ring
        new = agent.mock.migrate(domid)
    assert dom.domid == new != domid
    assert agent.guest.contents().keys() == before.keys()
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
    own = xa.capture(agent.altp2m, contents=True)
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


def test_what_is_lost_on_the_way_is_told(agent: Agent) -> None:
    """On the far side it is looked at before the domain goes on."""
    told: list[tuple[xa.ViewReset, bool]] = []
    agent.altp2m.on_view_reset(lambda lost: told.append((lost, agent.dom.info().paused)))
    gone = UNUSED[12]
    agent.view.set_access(gone, xa.Access.R)
    agent.mock.domain_unpause(agent.dom.domid)
    agent.go(50)
    with xa.Migration(agent.dom):
        new = agent.mock.migrate(agent.dom.domid)
        agent.mock.domain_decrease_reservation_exact(new, array("Q", [gone]))
    [(lost, paused)] = told
    assert lost.view is agent.view
    assert [mismatch.gfn for mismatch in lost.mismatches] == [gone]
    assert isinstance(lost.failure, xa.NotMappedError)
    assert paused
    assert not agent.altp2m.closed
    agent.go(150)


def test_again_and_again(agent: Agent) -> None:
    agent.mock.domain_unpause(agent.dom.domid)
    states: list[State] = []
    for turn in range(1, 4):
        agent.go(60 * turn)
        with xa.Migration(agent.dom) as carried:
            agent.mock.migrate(agent.dom.domid)
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
    with pytest.raises(KeyError, match="xl"), xa.Migration(agent.dom):
        raise KeyError("xl")
    assert agent.dom.domid == domid
    agent.go(150)
    assert agent.guest.lines("noticed") == [0, 0]


def test_it_was_carried_behind_our_back(agent: Agent) -> None:
    told: list[xa.ViewReset] = []
    agent.altp2m.on_view_reset(told.append)
    new = agent.mock.migrate(agent.dom.domid)
    with pytest.raises(xa.DomainNotFoundError) as error:
        agent.altp2m.verify()
    assert error.value.hint[0].startswith(f"it is domain {new} now, with altp2m off")
    assert {lost.view for lost in told} == set(agent.altp2m.views)
    assert all(lost.failure is error.value and not lost.reapplied for lost in told)


def test_it_does_not_come_back(agent: Agent) -> None:
    with (
        pytest.raises(xa.DomainNotFoundError, match=r"has not come back within 0\.1 s"),
        xa.Migration(agent.dom, seconds=0.1) as carried,
    ):
        agent.mock.destroy(agent.dom.domid)
    assert agent.dom.closed
    assert agent.altp2m.closed
    assert agent.monitor.closed
    assert carried.state is not None


def test_what_is_refused(agent: Agent) -> None:
    with agent.dom.paused(), pytest.raises(xa.InvalidArgumentError, match="unpause it first"):
        xa.Migration(agent.dom).__enter__()
    with agent.xen.domain(agent.dom.domid) as other:
        other.add_pages()
        with pytest.raises(xa.BusyError, match="another handle of domain"):
            xa.Migration(agent.dom).__enter__()
    agent.mock.domain_unpause(agent.dom.domid)
    events = agent.monitor.events(timeout=5)
    next(events)
    with pytest.raises(xa.BusyError, match="is being iterated"):
        xa.Migration(agent.dom).__enter__()
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
        xa.Migration(dom).__enter__()


@pytest.mark.parametrize("there", [True, False], ids=["before", "after"])
def test_all_of_it_or_nothing(there: bool) -> None:
    """Whichever call fails, while it is laid down or made again; what is left is told of."""
    chance = random.Random(7)
    number, calls = 0, 1 << 30
    while number <= calls:
        with ExitStack() as stack:
            mock = Failing()
            agent = Agent(stack, mock)
            mock.steps_at_once = 50_000
            dom, shadows, domid = agent.dom, agent.shadows, int(agent.dom.domid)
            carried = xa.Migration(dom)
            failed = False
            try:
                if there:
                    mock.start({number: EINVAL})
                with carried:
                    made = mock.made
                    mock.start({})
                    domid = mock.migrate(dom.domid)
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
        number += 1 if there else chance.randrange(1, 8 if THOROUGH else 16)
    assert calls > 40


# Without an agent: imported, and taken out.


class Lasting(MockBackend):
    """A host that outlives its callers."""

    def close(self) -> None: ...


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lasting]:
    """One with a domain, that commands work on; journals are in tmp_path."""
    mock = Lasting(memory_pages=1 << 13)
    mock.add_domain("guest", vcpus=2, memory_kib=4096, superpages=False)

    @contextmanager
    def connect(*_: object) -> Iterator[xa.Xen]:
        with xa.connect(mock, journal=tmp_path / "journals") as xen:
            yield xen

    monkeypatch.setattr("xenaltp2m.cli.state.connect", connect)
    yield mock
    MockBackend.close(mock)


def saved(path: Path) -> State:
    """Views of another domain, in a file, its vCPUs in the first."""
    mock = MockBackend()
    mock.add_domain("other", vcpus=2)
    with xa.connect(mock) as xen, xen.domain("other") as dom, dom.altp2m() as altp2m:
        view = altp2m.create_view(label="one")
        view.set_access(range(0x10, 0x20), xa.Access.RX)
        [shadow] = dom.add_pages()
        dom.memory.write_page(shadow, b"\x5a" * xa.PAGE_SIZE)
        view.remap(0x12, shadow, access=xa.Access.X)
        altp2m.create_view(label="two").set_access(0x30, xa.Access.R)
        altp2m.switch_to_view(view)
        state = xa.capture(altp2m, contents=True)
    path.write_bytes(state.to_bytes())
    return state


def run(*words: object) -> int:
    return cli.main(["state", *map(str, words)])


def test_an_import_tells_what_xen_has_passed_over(
    host: Lasting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a")
    host.domain_decrease_reservation_exact(1, array("Q", [0x30]))
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    told = capsys.readouterr().err
    assert "Xen has skipped some of it: view 2: gfn 0x30 has no entry, not r--" in told


def test_imported_views_stay_and_are_taken_out(
    host: Lasting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, domid = saved(tmp_path / "a"), 1
    before = host.domain_getinfolist(domid, 1)
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    assert host.altp2m_get_domain_state(domid)
    assert [host.altp2m_get_vcpu_p2m_idx(domid, vcpu) for vcpu in range(2)] == [1, 1]
    assert run("verify", tmp_path / "a", "guest") == cli.REFUSED  # of another domain
    assert "skipped" not in capsys.readouterr().err
    with xa.connect(host, journal=tmp_path / "journals") as xen, xen.domain("guest") as dom:
        with pytest.raises(xa.BusyError, match="were imported") as told:
            dom.altp2m()
        assert told.value.hint == ("xenaltp2m state export FILE 1 removes them",)
        dom.monitor().close()  # to hear of them
        shadow = dom.maximum_gfn
        assert dom.memory.read_page(shadow) == b"\x5a" * xa.PAGE_SIZE
        dom.memory.write(shadow << 12, b"changed")
    assert run("import", tmp_path / "a", "guest") == cli.REFUSED
    assert run("export", tmp_path / "b", "guest") == cli.DONE
    exported = State.from_bytes((tmp_path / "b").read_bytes())
    assert exported.views == state.views
    assert exported.vcpus == state.vcpus
    assert exported.pages[0].content is not None
    assert exported.pages[0].content.startswith(b"changed\x5a")
    assert not host.altp2m_get_domain_state(domid)
    assert list((tmp_path / "journals").iterdir()) == []
    [after] = host.domain_getinfolist(domid, 1)
    assert replace(after, pages=before[0].pages) == before[0]
    assert after.pages == before[0].pages - 1  # the monitor's ring had been one of them
    assert run("export", tmp_path / "c", "guest") == cli.REFUSED
    assert run("import", tmp_path / "b", "guest") == cli.DONE


def test_what_was_imported_is_rescued_only_by_force(host: Lasting, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    with xa.connect(host, journal=tmp_path / "journals") as xen:
        assert "views were imported" in diagnose(xen, "guest").lines()[0]
        assert rescue(xen, "guest").steps == ()
        assert host.altp2m_get_domain_state(1)
        assert not rescue(xen, "guest", force=True).failed
        assert not host.altp2m_get_domain_state(1)
    assert list((tmp_path / "journals").iterdir()) == []


def test_a_killed_monitor_beside_imported_views(host: Lasting, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    _, ring = host.monitor_enable(1)
    host.monitor_unmap_ring(ring)  # whose owner is no more
    with xa.connect(host, journal=tmp_path / "journals") as xen:
        steps = [step.what for step in rescue(xen, "guest").steps]
        assert steps[-1] == "each waiting vCPU gets a response, and the ring is disabled"
        assert diagnose(xen, "guest").healthy
    assert host.altp2m_get_domain_state(1)
    assert host.altp2m_get_vcpu_p2m_idx(1, 0) == 1


def test_an_import_that_fails_leaves_nothing(host: Lasting, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    before = host.domain_getinfolist(1, 1)
    for nth in range(1, 80, 3):
        host.fail(None, nth, EINVAL)
        done = run("import", tmp_path / "a", "guest")
        host._faults.clear()
        if done == cli.DONE:
            assert run("export", tmp_path / f"out-{nth}", "guest") == cli.DONE
        assert host.domain_getinfolist(1, 1) == before
        assert not host.altp2m_get_domain_state(1)
        assert list((tmp_path / "journals").glob("*")) == []


def test_a_damaged_record_of_what_was_imported(host: Lasting, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    [path] = (tmp_path / "journals").glob("*.state")
    path.write_bytes(path.read_bytes()[:-9])
    assert run("export", tmp_path / "b", "guest") == cli.REFUSED
    assert not (tmp_path / "b").exists()
    assert host.altp2m_get_domain_state(1)


def test_an_agent_that_runs_carries_its_views_itself(
    host: Lasting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        xa.connect(host, journal=tmp_path / "journals") as xen,
        xen.domain("guest") as dom,
        dom.altp2m(),
    ):
        assert run("export", tmp_path / "b", "guest") == cli.REFUSED
    assert "that process has to migrate its views itself" in capsys.readouterr().err


def test_others_views_are_saved_and_verified(
    host: Lasting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("save", tmp_path / "none", "guest") == cli.REFUSED
    with xa.connect(host) as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
        view = altp2m.create_view(label="theirs")
        view.set_access(range(0x10, 0x20), xa.Access.RX)
        view.set_suppress_ve(0x14, False)
        altp2m.switch_to_view(view)
        assert run("save", tmp_path / "s", "guest") == cli.DONE
        assert "does not report remaps" in capsys.readouterr().err
        state = State.from_bytes((tmp_path / "s").read_bytes())
        own = xa.capture(altp2m)
        assert diff(replace(own, views=(replace(own.views[0], label=""),)), state) == []
        assert run("verify", tmp_path / "s", "guest") == cli.DONE
        assert run("verify", tmp_path / "s", "guest", "--sample", 3) == cli.DONE
        (tmp_path / "own").write_bytes(own.to_bytes())
        host.altp2m_set_mem_access(1, int(view.id), 0x15, 7)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="1"):
            run("verify", tmp_path / "own", "guest", "--json")
        assert json.loads(capsys.readouterr().out) == {
            "differences": [
                {
                    "words": "view 1: gfn 0x15 has rwx, not r-x",
                    "what": "access",
                    "view": 1,
                    "gfn": 0x15,
                    "count": 1,
                    "before": "r-x",
                    "after": "rwx",
                }
            ]
        }
        altp2m.switch_to_view(None)
        view.close()
        with pytest.raises(SystemExit, match="1"):
            run("verify", tmp_path / "own", "guest")
        assert "view 1 is gone" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        run("verify", tmp_path / "own", "guest")
    assert "altp2m is off" in capsys.readouterr().out


def test_files_that_cannot_be_written(host: Lasting, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    assert run("export", tmp_path / "a", "guest") == cli.USAGE  # it is there already
    assert run("export", tmp_path / "none" / "b", "guest") == cli.USAGE
    assert host.altp2m_get_domain_state(1)
    assert run("export", tmp_path / "b", "guest") == cli.DONE


# In odd states.


@pytest.fixture
def plain(mock: MockBackend, dom: xa.Domain) -> xa.Domain:
    """A domain that runs, and does nothing."""
    mock.domain_unpause(dom.domid)
    return dom


def test_where_vcpus_were(mock: MockBackend, plain: xa.Domain) -> None:
    """Those that nobody would hear leave first."""
    with plain.altp2m() as altp2m, plain.monitor(xa.MemAccess):
        altp2m.create_view()
        view = altp2m.create_view()
        altp2m.switch_to_view(view)
        with xa.Migration(plain) as carried:
            mock.migrate(plain.domid)
        assert carried.state is not None
        assert carried.state.vcpus == (1, 1)
        assert set(altp2m.vcpu_views().values()) == {view.id}


def test_vcpus_that_have_left_their_view(mock: MockBackend, plain: xa.Domain) -> None:
    with plain.altp2m() as altp2m:
        view = altp2m.create_view()
        with plain.monitor(xa.MemAccess):
            altp2m.switch_to_view(view)
        with xa.Migration(plain) as carried:
            mock.migrate(plain.domid)
        assert carried.state is not None
        assert carried.state.vcpus == (None, None)
        assert set(altp2m.vcpu_views().values()) == {0}


@pytest.mark.parametrize("what", ["nothing", "monitor", "pages", "altp2m", "closed"])
def test_with_some_of_it_only(mock: MockBackend, plain: xa.Domain, what: str) -> None:
    with ExitStack() as stack:
        monitor = altp2m = None
        if what in ("monitor", "closed"):
            monitor = stack.enter_context(plain.monitor(xa.MemAccess))
        if what in ("altp2m", "closed"):
            altp2m = stack.enter_context(plain.altp2m())
            altp2m.create_view().close()
        if what == "closed":
            assert altp2m is not None
            assert monitor is not None
            Breakpoints(altp2m, monitor).close()
            altp2m.close()
            monitor.close()
        [gfn] = plain.add_pages()
        plain.memory.write_page(gfn, bytes(range(256)) * 16)
        with xa.Migration(plain) as carried:
            mock.migrate(plain.domid)
        assert plain.memory.read_page(carried.gfns[gfn]) == bytes(range(256)) * 16
        model = mock.domain(plain.domid)
        assert (model.active, model.listened) == (what == "altp2m", what == "monitor")
    plain.close()
    assert (model.active, model.listened, model.pauses) == (False, False, 0)


def test_gfns_that_show_each_others_pages_cannot_be_carried(plain: xa.Domain) -> None:
    with plain.altp2m() as altp2m:
        view = altp2m.create_view()
        for gfn, new in (1, 2), (2, 3), (3, 1):
            view.remap(gfn, new)
        with pytest.raises(xa.BusyError, match="each other's pages"):
            xa.Migration(plain).__enter__()
        assert not altp2m.closed
        assert view.access(1) is not None


@pytest.mark.parametrize("how", ["pause", "map"])
def test_another_handle_is_in_the_way(xen: xa.Xen, plain: xa.Domain, how: str) -> None:
    with xen.domain(plain.domid) as other, MappedPages(other.context) as mapped:
        if how == "pause":
            mapped.close()
            other.pause()
        with pytest.raises(xa.BusyError, match="another handle of domain"):
            xa.Migration(plain).__enter__()


def test_somebody_else_has_views_there_by_then(mock: MockBackend, plain: xa.Domain) -> None:
    """They have our views' numbers, and stay."""
    altp2m = plain.altp2m()
    view = altp2m.create_view()
    altp2m.enable_notify(0, 9)
    carried = xa.Migration(plain)
    carried.__enter__()
    mock.altp2m_set_domain_state(plain.domid, True)
    theirs = mock.altp2m_create_view(plain.domid, 7)
    mock.altp2m_set_vcpu_enable_notify(plain.domid, 0, 8)
    with pytest.raises(xa.XenError, match="altp2m is on already"):
        carried.__exit__(None, None, None)
    assert theirs == view.id
    assert altp2m.closed
    assert view.closed
    plain.close()
    model = mock.domain(plain.domid)
    assert model.active
    assert model.views[theirs].exists
    with pytest.raises(xa.AlreadyError):
        mock.altp2m_set_vcpu_enable_notify(plain.domid, 0, 8)


def test_others_are_opened_and_closed_in_between(mock: MockBackend, plain: xa.Domain) -> None:
    altp2m, monitor = plain.altp2m(), plain.monitor()
    view = altp2m.create_view()
    with xa.Migration(plain):
        plain.altp2m().close()
        plain.monitor().close()
    assert view.verify() == []
    plain.close()
    assert altp2m.closed
    assert monitor.closed
    assert not mock.domain(1).active
    assert not mock.domain(1).listened


@pytest.mark.parametrize("when", ["laying down", "waiting", "taking up"])
def test_an_interrupt_closes_all(
    mock: MockBackend, plain: xa.Domain, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    altp2m, monitor = plain.altp2m(), plain.monitor()
    view = altp2m.create_view()
    plain.add_pages()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    where: dict[str, tuple[object, str]] = {
        "laying down": (plain.memory, "read_page"),
        "waiting": (plain.xen, "domains"),
        "taking up": (plain.memory, "write_page"),
    }
    monkeypatch.setattr(*where[when], interrupt)
    with pytest.raises(KeyboardInterrupt), xa.Migration(plain):
        pass
    monkeypatch.undo()
    assert altp2m.closed
    assert view.closed
    assert monitor.closed
    model = mock.domain(plain.domid)
    assert (model.active, model.listened, model.pauses) == (False, False, 0)
    assert plain.context.added == {}


def test_imported_views_are_in_the_way(host: Lasting, tmp_path: Path) -> None:
    """Of an agent that has a monitor beside them: Xen would save their pages as the guest's."""
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    with (
        xa.connect(host, journal=tmp_path / "journals") as xen,
        xen.domain("guest") as dom,
        dom.monitor(),
        pytest.raises(xa.BusyError, match="views were imported"),
    ):
        xa.Migration(dom).__enter__()


def test_what_import_does_not_use_is_exported_again(host: Lasting, tmp_path: Path) -> None:
    heard = MonitorState((xa.MemAccess.on(),), True)
    state = replace(saved(tmp_path / "a"), monitor=heard, more={"hints": [1]})
    views = (state.views[0], replace(state.views[1], more={"hints": [2]}))
    state = replace(state, views=views, pages=(replace(state.pages[0], more={"hints": [3]}),))
    (tmp_path / "b").write_bytes(state.to_bytes())
    assert run("import", tmp_path / "b", "guest") == cli.DONE
    assert run("export", tmp_path / "c", "guest") == cli.DONE
    exported = State.from_bytes((tmp_path / "c").read_bytes())
    assert (exported.monitor, exported.more) == (state.monitor, state.more)
    assert [view.more for view in exported.views] == [{}, {"hints": [2]}]
    assert exported.pages[0].more == {"hints": [3]}


def test_a_record_that_somebody_else_may_have_put_there(host: Lasting, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    [path] = (tmp_path / "journals").glob("*.state")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert run("export", tmp_path / "b", "guest") == cli.REFUSED
    assert host.altp2m_get_domain_state(1)


def test_nothing_stays_of_what_was_imported_into_a_domain_that_is_gone(
    host: Lasting, tmp_path: Path
) -> None:
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    host.destroy(1)
    assert host.add_domain("another", memory_kib=4096, superpages=False) == 1
    with xa.connect(host, journal=tmp_path / "journals") as xen:
        rescue(xen, 1)
    assert list((tmp_path / "journals").iterdir()) == []


class Full:
    """Standard output where there is no room."""

    def __init__(self) -> None:
        self.buffer = self

    def write(self, data: bytes | str) -> int:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    def flush(self) -> None: ...


def test_standard_output_that_cannot_be_written(
    host: Lasting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "a")
    assert run("import", tmp_path / "a", "guest") == cli.DONE
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Full())
        assert run("export", "-", "guest") == cli.USAGE
    assert host.altp2m_get_domain_state(1)
    assert run("export", tmp_path / "b", "guest") == cli.DONE


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_save_that_is_ended_leaves_the_domain_running(
    host: Lasting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    host.domain_unpause(1)
    host.altp2m_set_domain_state(1, True)
    host.altp2m_create_view(1, 7)
    monkeypatch.setattr(host, "altp2m_get_suppress_ve", lambda *_: signal.raise_signal(number))
    with pytest.raises(SystemExit):
        run("save", tmp_path / "s", "guest")
    assert host.domain(1).pauses == 0
    assert signal.getsignal(number) is signal.SIG_DFL
