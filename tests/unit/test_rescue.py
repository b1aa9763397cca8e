# SPDX-License-Identifier: LGPL-2.1-or-later
"""Agents killed at every call to the hypervisor, and what is left of them when they are rescued."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from errno import ENOSPC, EPERM
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xenaltp2m as xa
from tests.thorough import THOROUGH
from xenaltp2m import cli
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.handles import journal
from xenaltp2m.handles.base import Handle
from xenaltp2m.handles.journal import Journal, Pages, Record, find
from xenaltp2m.handles.probe import existing_views
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.rescue import diagnose, rescue

from .hooked import INC_ECX, NOP, RET, call, store_byte
from .machinecode import CODE, DATA, HALT, OTHER, Computer
from .test_breakpoints import SELF_MODIFYING, THERE


class Killed(BaseException):
    """The process is no more: nothing it does has an effect from here on."""


class Mortal(MockBackend):
    """A host whose caller is killed at a call, before it or once it was made."""

    at = made = vanishes_at = 0
    dead = after = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ops: list[str] = []

    def _inject(self, op: str) -> None:
        super()._inject(op)
        if self.dead:
            raise Killed
        self.made += 1
        self.ops.append(op)
        if self.made == self.at:
            self.die()
            if not self.after:
                raise Killed
        if self.made == self.vanishes_at:  # somebody else destroys the domain
            self.destroy(next(iter(self.machine.domains)))

    def die(self) -> None:
        self.dead = True
        self.on_death()

    def on_death(self) -> None: ...

    def close(self) -> None:
        """It outlives its caller."""


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


class Processes:
    """Whose journals are written: of processes that are no more."""

    def __init__(self, pid: int) -> None:
        self.pid, self.started = pid, 1

    def __call__(self) -> dict[str, int]:
        return {"pid": self.pid, "started": self.started}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, gone: int) -> Processes:
    made = Processes(gone)
    monkeypatch.setattr(journal, "_this_process", made)
    return made


@pytest.fixture
def journals(tmp_path: Path, process: Processes) -> Path:
    """A directory for them."""
    return tmp_path / "journals"


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """All that are made."""
    made: list[Handle] = []
    make = Handle.__init__

    def noting(self: Handle) -> None:
        make(self)
        made.append(self)

    monkeypatch.setattr(Handle, "__init__", noting)
    return made


def work(host: MockBackend, domid: int, journals: Path) -> None:
    """Views, pages, a pause, breakpoints, a patch, a watch: all that leaves something."""
    xen = xa.connect(host, journal=journals)
    dom = xen.domain(domid)
    dom.pause()
    dom.add_pages(2)
    altp2m, monitor = dom.altp2m(), dom.monitor(xa.MemAccess, access_required=True)
    view = altp2m.create_view()
    view.set_access(OTHER >> 12, xa.Access.R)
    breakpoints = Breakpoints(altp2m, monitor, fast=False)
    breakpoints.insert(CODE, lambda hit: None)
    breakpoints.insert(THERE, lambda hit: None)
    breakpoints.patch(CODE, SELF_MODIFYING[:7])
    breakpoints.watch(OTHER, 4, after=lambda touch: None)
    dom.unpause()
    host.steps_at_once = 30_000
    monitor.run(breakpoints, timeout=0.01)
    dom.pause()
    xen.close()


def machine() -> tuple[Mortal, Computer]:
    host = Mortal(memory_pages=1 << 13)
    computer = Computer(SELF_MODIFYING, host=host)
    computer.set(rax=0, rcx=0)
    computer.describe()
    return host, computer


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> int:
    """A call in the midst of :func:`work`: there are views, pages, a ring, vCPUs in shadows."""
    host, computer = machine()
    host.ops.clear()
    work(host, computer.domid, tmp_path_factory.mktemp("tried") / "journals")
    return [number for number, op in enumerate(host.ops, 1) if op == "evtchn_notify"][4]


class Scene:
    """A machine whose agent may be killed."""

    def __init__(
        self, journals: Path, handles: list[Handle], process: Processes, busy: int
    ) -> None:
        self.journals, self.process = journals, process
        self._handles, self._busy = handles, busy
        self.anew()

    def anew(self) -> None:
        """Have another machine."""
        self.host, self.computer = machine()
        self.domid = self.computer.domid
        self.before = self.host.domain_getinfolist(self.domid, 1)[0]

    def kill(self, act: Callable[[], object] | None = None, call: int | None = None) -> bool:
        """Have a process do something, and kill it at a call; tell whether it came to that."""
        host = self.host
        host.made, host.at = 0, call or self._busy
        self.process.started += 1
        with suppress(Killed):
            (act or (lambda: work(host, self.domid, self.journals)))()
        died = host.dead
        host.at, host.dead, host.steps_at_once = 0, False, 0
        kept = self.journals.with_name("kept")
        if died:
            kept.mkdir(mode=0o700)
            for path in self.journals.iterdir():
                shutil.copy(path, kept)
        end_process(host, self._handles)
        if died:
            shutil.rmtree(self.journals)
            kept.rename(self.journals)
        self.process.started += 1
        return died

    def ends_well(self) -> None:
        """The guest goes on, to its end."""
        self.host.run(self.domid, 1000)
        assert self.computer.vector is None
        assert (self.computer.register("rax"), self.computer.register("rcx")) == (1, 1)


@pytest.fixture
def scene(journals: Path, handles: list[Handle], process: Processes, busy: int) -> Scene:
    return Scene(journals, handles, process, busy)


def test_a_rescue_that_is_killed_is_rescued(scene: Scene, handles: list[Handle]) -> None:
    """At each of its own calls."""
    call, died = 0, True
    while died:
        call += 1
        if call > 1:
            scene.anew()
        assert scene.kill()
        rescuing = partial(rescue, xa.Xen(scene.host, scene.journals), scene.domid)
        died = scene.kill(rescuing, call)
        is_rescued(scene.host, scene.computer, scene.before, scene.journals, call)
        end_process(scene.host, handles)
    assert call > 20


def test_without_a_journal(scene: Scene) -> None:
    scene.kill()
    with xa.Xen(scene.host) as xen:
        outcome = rescue(xen, scene.domid)
        assert outcome.failed == ()
        assert outcome.unknown == (
            "which pages an agent had added, and by how much it had raised the limit",
            "whether altp2m was on before the agent",
        )
        assert diagnose(xen, scene.domid).healthy
    scene.ends_well()


def test_the_next_agent_is_told(scene: Scene) -> None:
    scene.kill()
    with xa.Xen(scene.host, scene.journals) as xen, xen.domain(scene.domid) as dom:
        for begin in (dom.altp2m, dom.monitor):
            with pytest.raises(xa.BusyError, match="killed while it worked on domain 1") as told:
                begin()
            assert told.value.hint == ("xenaltp2m rescue 1 undoes them",)
    with xa.Xen(scene.host) as xen, xen.domain(scene.domid) as dom:
        with pytest.raises(xa.BusyError) as told:
            dom.monitor()
        assert "if its agent was killed: xenaltp2m rescue 1" in told.value.hint
        rescue(xen, scene.domid)


def test_views_of_others_stay(scene: Scene) -> None:
    """altp2m was on already, and its vCPUs in a view of somebody's."""
    scene.host.altp2m_set_domain_state(scene.domid, True)
    other = scene.host.altp2m_create_view(scene.domid, 7)
    scene.host.altp2m_switch_to_view(scene.domid, other)
    scene.kill()
    with xa.Xen(scene.host, scene.journals) as xen:
        done = [step.what for step in rescue(xen, scene.domid).steps]
        assert f"vCPUs return to view {other}" in done
        assert any("is destroyed" in what for what in done)
        assert scene.host.altp2m_get_domain_state(scene.domid)
        assert scene.computer.vcpu.view == other
        with xen.domain(scene.domid) as dom, dom.altp2m():
            assert existing_views(scene.host, dom.domid) == [0, other]
    scene.ends_well()


def test_a_guest_that_uses_altp2m_itself_is_left_alone(tmp_path: Path) -> None:
    host = MockBackend(memory_pages=1 << 13)
    domid = host.add_domain(mode=xa.Altp2mMode.MIXED, memory_kib=2048)
    host.altp2m_set_domain_state(domid, True)
    host.domain_unpause(domid)
    with xa.Xen(host, tmp_path / "journals") as xen:
        assert diagnose(xen, domid).healthy
        outcome = rescue(xen, domid)
        assert outcome.steps == ()
        assert outcome.unknown == (
            "whether the guest has switched altp2m on itself: --force switches it off",
        )
        assert host.altp2m_get_domain_state(domid)
        rescue(xen, domid, force=True)
        assert not host.altp2m_get_domain_state(domid)


def test_of_a_domain_that_is_gone_nothing_stays(tmp_path: Path) -> None:
    host, computer = machine()
    journals = tmp_path / "journals"
    with xa.Xen(host, journals) as xen, xen.domain(computer.domid) as dom:
        dom.pause()
        dom.altp2m()
        host.destroy(computer.domid)
        assert len(list(journals.iterdir())) == 1
    assert list(journals.iterdir()) == []


def test_an_agent_that_runs_is_left_alone(tmp_path: Path) -> None:
    host, computer = machine()
    journals = tmp_path / "journals"
    with xa.Xen(host, journals) as xen, xen.domain(computer.domid) as dom, dom.altp2m():
        with pytest.raises(xa.BusyError, match=f"process {os.getpid()} works on domain 1"):
            rescue(xen, computer.domid)
        assert diagnose(xen, computer.domid).healthy
        assert stat.S_IMODE(journals.stat().st_mode) == 0o700
        [path] = journals.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(journals.iterdir()) == []


def test_the_command(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.kill()

    @contextmanager
    def there(*_: object) -> Iterator[xa.Xen]:
        with xa.Xen(scene.host, scene.journals) as xen:
            yield xen

    monkeypatch.setattr("xenaltp2m.cli.rescue.connect", there)
    assert cli.main(["rescue", "1", "--dry-run"]) == cli.DONE
    told = capsys.readouterr().out
    assert "was killed and has left: a monitor, altp2m switched on" in told
    assert "what would be done:\n  vCPUs go to view 0\n  altp2m is switched off" in told
    assert cli.main(["rescue", "1", "--json"]) == cli.DONE
    document = json.loads(capsys.readouterr().out)
    assert all(step["error"] is None for step in document["steps"])
    assert document["unknown"] == []
    assert cli.main(["rescue", "1"]) == cli.DONE
    assert "no agent has left anything" in capsys.readouterr().out
    assert cli.main(["rescue", "9"]) == cli.REFUSED
    assert "there is no domain 9" in capsys.readouterr().err
    scene.ends_well()


# Journals.


def test_what_lies_about_is_tidied(scene: Scene) -> None:
    """Of a process that was killed with nothing to be undone; of another domain; damaged."""
    empty = Journal(scene.journals, scene.domid, scene.computer.model.uuid)
    empty.write(pauses=1)
    empty.write(pauses=0)
    scene.process.started += 1
    other = Journal(scene.journals, scene.domid, UUID(int=7))
    other.write(pauses=1)
    (scene.journals / f"{scene.domid}-{scene.process.pid}-99-0.journal").write_bytes(b"nothing\n")
    with xa.Xen(scene.host, scene.journals) as xen:
        found = diagnose(xen, scene.domid)
        assert found.healthy
        assert (len(found.empty), len(found.unreadable)) == (1, 2)
        assert rescue(xen, scene.domid).steps == ()
    assert list(scene.journals.iterdir()) == []
    scene.ends_well()
    for made in (empty, other):
        made.close()


def written(directory: Path, **changes: Any) -> Path:
    made = Journal(directory, 1, UUID(int=5))
    made.write(**changes)
    made.close()
    return directory / made.name


def test_a_journal_that_was_cut_off_says_what_the_line_before_says(tmp_path: Path) -> None:
    made = Journal(tmp_path / "j", 1, UUID(int=5))
    made.write(pauses=1)
    path = tmp_path / "j" / made.name
    first = path.read_bytes()
    made.write(pauses=2, pages=(Pages(9, 2, 2, 100),))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        [found] = find(tmp_path / "j", 1, UUID(int=5))
        expected = None if length < len(first) - 1 else Record(pauses=1)
        if length >= len(whole) - 1:
            expected = Record(pauses=2, pages=(Pages(9, 2, 2, 100),))
        assert found.record == expected, length
        assert found.alive
    made.close()


def test_journals_of_others_are_not_acted_upon(tmp_path: Path) -> None:
    path = written(tmp_path / "j", pauses=1)
    [found] = find(tmp_path / "j", 1, UUID(int=6))
    assert found.why_not == f"it belongs to another domain, {UUID(int=5)}"
    assert find(tmp_path / "j", 2, UUID(int=5)) == []
    text = path.read_bytes().partition(b" ")[2].rstrip(b"\n")
    older = text.replace(journal._boot().encode(), b"an older boot")
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(older), older))
    [found] = find(tmp_path / "j", 1, UUID(int=5))
    assert found.why_not == "it is from before this boot"
    assert not found.alive


COUNTS = st.integers(0, (1 << 48) - 1)
RECORDS = st.builds(
    Record,
    pauses=COUNTS,
    pages=st.lists(
        st.builds(Pages, first=st.integers(0, 1 << 35), count=st.integers(0, 1 << 35),
                  raised=COUNTS, limit=COUNTS),
        max_size=4,
    ).map(tuple),
    monitor=st.booleans(),
    access_required=st.booleans(),
    altp2m=st.booleans(),
    used=st.booleans(),
    prior_views=st.lists(COUNTS, max_size=4).map(tuple),
    prior_view=COUNTS,
    kept=st.booleans(),
)  # fmt: skip


@given(RECORDS)
def test_fault_17_every_record_that_is_written_is_read(record: Record) -> None:
    head = {"uuid": str(UUID(int=7)), "boot": "here", "pid": 1, "started": 2}
    line = journal._line({"format": 1, **head, **asdict(record)})
    assert journal._parse(line.removesuffix(b"\n")) == (head, record)


def test_fault_17_the_largest_record_is_read_and_a_larger_one_is_not_written(
    tmp_path: Path,
) -> None:
    uuid = UUID(int=7)
    written = Journal(tmp_path, 5, uuid)
    largest = Pages((1 << 36) - 1, 1, (1 << 48) - 1, (1 << 48) - 1)
    written.write(pages=(largest,) * 4096, prior_views=(1023,) * 1024)
    [found] = find(tmp_path, 5, uuid)
    assert found.record == written.record
    for change in ({"pages": (largest,) * 4097}, {"prior_views": (0,) * 1025}):
        with pytest.raises(xa.JournalError, match="can record at most 4096"):
            written.write(**change)
    assert find(tmp_path, 5, uuid) == [found]
    written.forget()
    written.close()


def test_fault_17_a_journal_is_not_parsed_where_it_has_too_many_values(tmp_path: Path) -> None:
    """2^20 bytes of empty objects, which would take 28 MB; and of empty lines, 34 MB."""
    uuid = UUID(int=7)
    journal_of_it = Journal(tmp_path, 5, uuid)
    journal_of_it.write(pauses=1)
    [path] = tmp_path.iterdir()
    sound = path.read_bytes()
    text = b"[%s{}]" % (b"{}," * 340_000)
    for content in (b"%08x %s\n" % (zlib.crc32(text), text), b"\n" * 1_000_000):
        path.write_bytes(sound + content)
        tracemalloc.start()
        try:
            [found] = find(tmp_path, 5, uuid)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
        assert found.record == journal_of_it.record
    path.write_bytes(sound + b"\n" * (1 << 20))
    assert find(tmp_path, 5, uuid)[0].why_not == "it has no valid line"
    journal_of_it.forget()
    journal_of_it.close()


def test_directories_that_others_may_write_to_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "j", pauses=1)
    (tmp_path / "j").chmod(0o777)
    with pytest.raises(xa.JournalError, match="not a directory that only this user"):
        find(tmp_path / "j", 1, UUID(int=5))
    with pytest.raises(xa.JournalError, match="not a directory that only this user"):
        written(tmp_path / "j", pauses=2)
    (tmp_path / "link").symlink_to("j")
    with pytest.raises(xa.JournalError, match="not a directory that only this user"):
        written(tmp_path / "link", pauses=2)


def test_without_room_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, computer = machine()

    def full(file: int, data: bytes) -> int:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with xa.Xen(host, tmp_path / "j") as xen, xen.domain(computer.domid) as dom:
        monkeypatch.setattr(os, "write", full)
        for change in (dom.pause, dom.add_pages, dom.altp2m, dom.monitor):
            with pytest.raises(xa.JournalError, match="nothing was changed: No space left"):
                change()
        monkeypatch.undo()
        assert not dom.info().paused
        assert not dom.altp2m_active


def test_two_connections_of_a_process_have_two(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / "j", 1, UUID(int=5)) for _ in range(2))
    first.write(pauses=1)
    second.write(pauses=2)
    found = find(tmp_path / "j", 1, UUID(int=5))
    assert {one.record for one in found} == {Record(pauses=1), Record(pauses=2)}
    first.close()
    second.close()


def test_a_long_life_makes_no_long_journal(tmp_path: Path) -> None:
    made = Journal(tmp_path / "j", 1, UUID(int=5))
    for number in range(5000):
        made.write(pauses=number)
    assert (tmp_path / "j" / made.name).stat().st_size <= 1 << 16
    [found] = find(tmp_path / "j", 1, UUID(int=5))
    assert found.record == Record(pauses=4999)
    made.close()


def test_fault_28_pages_and_settings_that_stay_are_in_the_journal(tmp_path: Path) -> None:
    """What was not taken back is still to be rescued."""
    host = MockBackend(memory_pages=1 << 12)
    domid = host.add_domain(memory_kib=2048, max_kib=4096)
    with xa.connect(host, journal=tmp_path / "j") as xen, xen.domain(domid) as dom:

        def record() -> Record:
            [found] = find(tmp_path / "j", domid, dom.uuid)
            assert found.record is not None
            return found.record

        gfns, monitor = dom.add_pages(2), dom.monitor(access_required=True)
        for nth in (1, 2):
            host.fail("domain_decrease_reservation_exact", nth, EPERM)
        with pytest.raises(xa.LeftoverError):
            dom.remove_pages(gfns)
        assert [(one.first, one.count) for one in record().pages] == [(gfns[0], 2)]
        host.fail("domain_set_access_required", 1, EPERM)
        with pytest.raises(xa.LeftoverError):
            monitor.close()
        assert record().access_required
        monitor.close()
        dom.remove_pages(gfns)
        assert record() == Record()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_call(
    tmp_path: Path, journals: Path, handles: list[Handle], after: bool
) -> None:
    calls, number, frozen, tried = 1 << 30, 0, 0, 0
    while number <= calls:
        host, computer = machine()
        before = host.domain_getinfolist(computer.domid, 1)[0]
        seen = tmp_path / f"as it was {number}"

        def freeze(seen: Path = seen) -> None:
            if journals.exists():
                shutil.copytree(journals, seen)
            else:
                seen.mkdir(mode=0o700)

        host.on_death = freeze  # type: ignore[method-assign]
        host.made, host.at, host.after = 0, number, after
        with suppress(Killed):
            work(host, computer.domid, journals)
        if not number:
            calls = host.made
            assert not list(journals.iterdir())
        assert host.dead == bool(number)
        host.at, host.dead, host.steps_at_once = 0, False, 0
        end_process(host, handles)
        shutil.rmtree(journals, ignore_errors=True)
        if number:
            frozen += is_rescued(host, computer, before, seen, number)
        # Before the next call or after this one: much the same.
        number += 1 if THOROUGH else 2 if number else 1 + after
        tried += 1
    assert frozen > tried // 3


def patch(host: MockBackend, domid: int, journals: Path) -> None:
    """Have other code executed, of a guest that does not run."""
    xen = xa.connect(host, journal=journals)
    dom = xen.domain(domid)
    dom.pause()
    breakpoints = Breakpoints(dom.altp2m(), dom.monitor())
    breakpoints.patch(CODE, store_byte(THERE, NOP[0]))
    breakpoints.patch(OTHER, NOP).remove()
    dom.memory.write(DATA, b"changed")  # whose page is mapped when all else is there
    xen.close()


def test_fault_28_killed_with_a_patch_in_the_original_is_executed(
    scene: Scene, handles: list[Handle]
) -> None:
    """At each call."""
    call, died = 0, True
    while died:
        call += 1
        scene.anew()
        scene.journals.mkdir(mode=0o700, exist_ok=True)
        died = scene.kill(partial(patch, scene.host, scene.domid, scene.journals), call)
        is_rescued(scene.host, scene.computer, scene.before, scene.journals, call)
        end_process(scene.host, handles)
    assert call > 50


def test_a_limit_a_kill_within_a_patched_step_loses_what_it_writes(scene: Scene) -> None:
    """The patch adds 1 to a number in its own page, the code below it 2: killed at each call."""
    place = CODE + 0x200
    code = call(CODE, CODE + 0x100) + INC_ECX + HALT
    below, patched = (b"\x83\x05" + place.to_bytes(4, "little") + bytes([n]) for n in (2, 1))
    during: list[int] = []

    def work() -> None:
        dom = xa.connect(scene.host, journal=scene.journals).domain(scene.domid)
        monitor = dom.monitor()
        breakpoints = Breakpoints(dom.altp2m(), monitor)
        breakpoints.patch(CODE + 0x100, patched)
        during.append(scene.host.made)
        scene.host.steps_at_once = 1
        monitor.run(breakpoints, timeout=0.01)
        during.append(scene.host.made)

    def added(number: int) -> int:
        scene.host = Mortal(memory_pages=1 << 13)
        scene.computer = Computer(code.ljust(0x100, NOP) + below + RET, host=scene.host)
        scene.computer.set(rcx=0)
        scene.domid = scene.computer.domid
        before = scene.computer.read(place, 1)[0]
        scene.journals.mkdir(mode=0o700, exist_ok=True)
        scene.kill(work, number)
        with xa.Xen(scene.host, scene.journals) as xen:
            rescue(xen, scene.domid)
        scene.host.run(scene.domid, 1000)
        assert scene.computer.register("rcx") == 1, number
        return scene.computer.read(place, 1)[0] - before

    never = 1 << 30
    assert added(never) == 1
    assert {added(number) for number in range(*during[:2])} == {0, 1, 2}


def end_process(host: Mortal, handles: list[Handle]) -> None:
    """Its end of rings and event channels goes with a process, and its mappings."""
    while handles:
        handle = handles.pop()
        if not handle.closed:
            handle.abandon()
    for channel in list(host._channels):
        host.evtchn_close(channel)
    for mapping, _ in host._mappings.values():
        mapping.release()
        mapping._unmap()  # whoever still has a slice is dead
    host._mappings.clear()


def is_rescued(
    host: Mortal, computer: Computer, before: xa.DomainInfo, journals: Path, number: int
) -> bool:
    """Whether something was wrong; afterwards nothing is."""
    with xa.Xen(host, journals) as xen:
        return is_rescued_by(xen, host, computer, before, number)


def is_rescued_by(
    xen: xa.Xen, host: Mortal, computer: Computer, before: xa.DomainInfo, number: int
) -> bool:
    diagnose(xen, computer.domid)  # has answers that are in the ring take effect
    found = diagnose(xen, computer.domid)
    planned = rescue(xen, computer.domid, dry_run=True)
    assert diagnose(xen, computer.domid) == found
    outcome = rescue(xen, computer.domid)
    assert outcome.failed == (), number
    assert [step.what for step in outcome.steps] == [step.what for step in planned.steps]
    assert outcome.unknown == ()
    again = diagnose(xen, computer.domid)
    assert again.healthy, (number, again.lines())
    assert again.lines() == [], number
    assert rescue(xen, computer.domid).steps == ()
    host.run(computer.domid, 1000)
    assert computer.vector is None, number
    assert (computer.register("rax"), computer.register("rcx")) == (1, 1), number
    assert not any(vcpu.event_pauses for vcpu in computer.vcpus), number
    assert not any(vcpu.monitor_trap_flag for vcpu in computer.vcpus), number
    after = host.domain_getinfolist(computer.domid, 1)[0]
    assert (after.max_pages, after.paused) == (before.max_pages, False), number
    assert after.pages in (before.pages, before.pages - 1), number  # the ring's page
    assert xen.journals is not None
    assert list(xen.journals.iterdir()) == [], number
    return bool(outcome.steps)


def test_killed_while_libxc_has_paused_the_domain(scene: Scene, tmp_path: Path) -> None:
    """``xc_vm_event_enable`` pauses it for as long as it sets the ring up."""
    before, since, seen = scene.before, len(scene.host.ops), tmp_path / "seen"
    assert not scene.kill(call=1 << 30)
    number = scene.host.ops[since:].index("monitor_enable") + 1
    scene.anew()
    freeze = partial(shutil.copytree, scene.journals, seen)
    scene.host.on_death = freeze  # type: ignore[method-assign, assignment]
    assert scene.kill(call=number)
    shutil.rmtree(scene.journals)
    seen.rename(scene.journals)
    scene.host.domain(scene.domid).pauses += 1
    with xa.Xen(scene.host, scene.journals) as xen:
        assert not rescue(xen, scene.domid).failed
        assert diagnose(xen, scene.domid).paused == before.paused
    assert not list(scene.journals.iterdir())
    scene.ends_well()


def test_fault_09_a_domain_that_goes_away_while_it_is_rescued(
    scene: Scene, handles: list[Handle]
) -> None:
    """Before each call: what was to be undone went with it, or the error says that it is gone."""
    ways = set()
    for number in range(1, 1000):
        if number > 1:
            scene.anew()
        scene.kill()
        host = scene.host
        host.made, host.vanishes_at = 0, number
        xen = xa.Xen(host, scene.journals)
        try:
            outcome = rescue(xen, scene.domid)
        except xa.DomainNotFoundError:
            ways.add("while it was diagnosed")
        else:
            ways.add("while steps were taken")
            assert outcome.failed == ()
            assert list(scene.journals.glob("*.journal")) == []
        vanished = host.made >= number
        host.vanishes_at = 0
        end_process(host, [*handles, xen])
        for path in scene.journals.iterdir():
            path.unlink()
        if not vanished:
            break
    assert number > 20
    assert ways == {"while it was diagnosed", "while steps were taken"}


def test_fault_09_a_newer_interface_is_unsupported_to_rescue(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.kill()
    with xa.Xen(scene.host, scene.journals) as xen:
        with monkeypatch.context() as patch:
            patch.setattr(scene.host, "vm_event_get_version", lambda: 99)
            [failed] = rescue(xen, scene.domid).failed
        assert rescue(xen, scene.domid).failed == ()
    assert isinstance(failed.error, xa.UnsupportedError)
    assert "99" in failed.error.message


def test_fault_07_views_with_high_numbers_are_destroyed(
    journals: Path, process: Processes, handles: list[Handle]
) -> None:
    """Up to 512 from Xen 4.21 (``MAX_NR_ALTP2M``); altp2m was on before, so it stays on."""
    host = Mortal(xen=(4, 22), memory_pages=1 << 13)
    domid = host.add_domain(vcpus=1, memory_kib=2048, view_count=512)
    host.altp2m_set_domain_state(domid, True)
    xen = xa.connect(host, journal=journals)
    altp2m = xen.domain(domid).altp2m()
    made = [altp2m.create_view() for _ in range(511)]
    assert made[-1].id == 511
    process.started += 1  # it is another process from here on
    with xa.connect(host, journal=journals) as other:
        assert len(other.domain(domid).existing_views()) == 512
        outcome = rescue(other, domid)
        assert outcome.failed == ()
        assert [int(view.id) for view in other.domain(domid).existing_views()] == [0]
    assert list(journals.glob("*.journal")) == []
    end_process(host, handles)


def test_fault_07_a_journal_stays_while_views_do(
    journals: Path,
    process: Processes,
    handles: list[Handle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Mortal(memory_pages=1 << 13)
    domid = host.add_domain(vcpus=1, memory_kib=2048)
    host.altp2m_set_domain_state(domid, True)
    xen = xa.connect(host, journal=journals)
    xen.domain(domid).altp2m().create_view()
    process.started += 1

    def refuse(*_: object) -> None:
        raise xa.XenError("no", op="altp2m_get_suppress_ve")

    with monkeypatch.context() as patch:
        patch.setattr(host, "altp2m_get_suppress_ve", refuse)
        with xa.Xen(host, journals) as other:
            [failed] = rescue(other, domid).failed
    assert failed.what == "the views that an agent created are destroyed"
    assert list(journals.glob("*.journal"))
    end_process(host, handles)
