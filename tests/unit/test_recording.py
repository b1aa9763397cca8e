# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions that are recorded and replayed: to equal results, or to the first call that differs."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import xenaltp2m as xa
from tests.recorded.sessions import GUEST as HELLO
from tests.recorded.sessions import NAME, SESSIONS, Session, run, run_calls
from xenaltp2m import cli
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend import Backend, open_backend
from xenaltp2m.backend.mock import Access, Cpuid, Instruction, MockBackend, SetRegisters
from xenaltp2m.backend.session import format as session
from xenaltp2m.backend.session import recording, replay
from xenaltp2m.backend.session.recording import RecordingBackend
from xenaltp2m.backend.session.replay import ReplayBackend
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.doctor import Finding, Machine, examine_xen
from xenaltp2m.tools.symbols import Image

GUESTS = HELLO.parent


def simulated(version: tuple[int, int] = (4, 17), guest: str = NAME, vcpus: int = 1) -> MockBackend:
    """A host with an example guest that executes, its domid 1."""
    host = MockBackend(version)
    host.boot(host.add_domain(guest, memory_kib=16 << 10, vcpus=vcpus), GUESTS / f"{guest}.elf")
    return host


def replayed(path: Path) -> xa.Xen:
    return xa.connect(f"replay:{path}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "one.session"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# To equal results.


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.parametrize("version", [SUPPORTED[0], (4, 17), (4, 20), SUPPORTED[-1]])
def test_a_session_comes_to_the_same(name: str, version: tuple[int, int], path: Path) -> None:
    learned = run(SESSIONS[name], xa.connect(simulated(version), record=path))
    assert len(learned) > 3
    assert run(SESSIONS[name], replayed(path)) == learned


@pytest.mark.parametrize("version", [SUPPORTED[0], (4, 17), SUPPORTED[-1]])
def test_bare_calls_come_to_the_same(version: tuple[int, int], path: Path) -> None:
    learned = run_calls(recording.record(simulated(version), path))
    assert len(learned) >= 30
    assert run_calls(open_backend(f"replay:{path}")) == learned


@pytest.mark.parametrize(("guest", "vcpus"), [("checker", 1), ("racer", 4)])
@pytest.mark.parametrize("int3", [True, False])
def test_breakpoints_come_to_the_same(guest: str, vcpus: int, int3: bool, path: Path) -> None:
    image = Image.open(GUESTS / f"{guest}.elf")

    def hit(xen: xa.Xen) -> list[Any]:
        hits: list[Any] = []
        with xen, xen.domain(guest) as dom, dom.altp2m() as altp2m, dom.monitor() as monitor:
            with Breakpoints(altp2m, monitor, int3=int3) as breakpoints:
                name = "target" if guest == "checker" else "hit"
                breakpoints.insert(
                    image.physical(image.symbol(name)),
                    lambda hit: hits.append((hit.vcpu, hit.registers.as_dict())),
                )
                xen.backend.domain_unpause(1)

                def handler(event: xa.Event) -> xa.Response | None:
                    if len(hits) >= 40:
                        monitor.stop()
                    return breakpoints(event)

                monitor.run(handler, timeout=0.3)
            hits.append(dom.memory.read(image.segments[0].address, 0x2000))
        return hits

    learned = hit(xa.connect(simulated(guest=guest, vcpus=vcpus), record=path))
    assert len(learned) > 20
    assert hit(replayed(path)) == learned


def test_asynchronous_agents_come_to_the_same(path: Path) -> None:
    async def listen(xen: xa.Xen) -> list[int]:
        gfns: list[int] = []
        with (
            xen,
            xen.domain(1) as dom,
            dom.altp2m() as altp2m,
            dom.monitor(xa.MemAccess) as monitor,
        ):
            view = altp2m.create_view()
            view.set_access(range(0x100, 0x110), xa.Access.R)
            altp2m.switch_to_view(view)
            xen.backend.domain_unpause(1)
            async with aclosing(monitor.__aiter__()) as events:
                async for event in events:
                    assert isinstance(event, xa.MemAccess)
                    gfns.append(event.gfn)
                    event.reply(xa.Response.fast_singlestep(through=0, back_to=view))
                    if len(gfns) == 30:
                        break
        return gfns

    learned = asyncio.run(listen(xa.connect(simulated(), record=path)))
    assert asyncio.run(listen(replayed(path))) == learned


def test_events_of_two_domains_come_to_the_same(path: Path) -> None:
    """Also where one call finds requests in both rings."""
    host = MockBackend()
    for name, leaf in (("one", 1), ("other", 2)):
        program = [
            Instruction(0x1000, effect=SetRegisters({"rax": leaf})),
            *(Instruction(0x1000 + nth, effect=Cpuid()) for nth in range(1, 6)),
        ]
        host.load(host.add_domain(name), program)

    def start() -> None:
        for domid in (1, 2):
            host.domain(domid).unpause()
            host.run(domid)

    def listen(xen: xa.Xen, start: Callable[[], None]) -> list[tuple[str, int]]:
        heard: list[tuple[str, int]] = []
        with (
            xen,
            xen.domain("one") as one,
            xen.domain("other") as other,
            one.monitor(xa.Cpuid) as first,
            other.monitor(xa.Cpuid) as second,
        ):
            monitors = {"one": first, "other": second}
            start()
            for name in ("one", "other", "other", "one", "one"):
                for event in monitors[name].events(timeout=0.3):
                    assert isinstance(event, xa.Cpuid)
                    heard.append((name, event.leaf))
                    break
        return heard

    learned = listen(xa.connect(host, record=path), start)
    assert dict(learned[:2]) == {"one": 1, "other": 2}
    assert len(learned) == 5
    assert max(len(line.get("requests", ())) for line in lines(path)) == 2
    assert listen(replayed(path), lambda: None) == learned


def test_silence_passes_at_once(path: Path) -> None:
    """A second in which the domain is looked at takes none, and its end comes where it did."""

    def wait(xen: xa.Xen) -> list[xa.Event]:
        with xen, xen.domain(1) as dom, dom.monitor() as monitor:
            return list(monitor.events(timeout=1.2))

    host = simulated()
    assert wait(xa.connect(host, record=path)) == []
    looks = [line for line in lines(path) if line.get("call") == "domain_getinfolist"]
    assert len(looks) >= 3
    assert wait(replayed(path)) == []
    backend = open_backend(f"replay:{path}")
    before = backend.clock.monotonic()
    backend.clock.sleep(5.0)
    assert backend.clock.monotonic() == before + 5.0
    with pytest.raises(xa.ReplayError):
        backend.close()


def test_many_gfns_and_what_a_backend_refuses(path: Path) -> None:
    def much(xen: xa.Xen) -> list[Any]:
        with xen, xen.domain(1) as dom, dom.altp2m() as altp2m:
            view = altp2m.create_view()
            view.set_access(range(0, 3000, 2), xa.Access.R)
            told: list[Any] = [view.access(gfn) for gfn in (0, 1, 2998)]
            for wrong in (-1, 1 << 70, "gfn", 1.5):
                with pytest.raises(xa.InvalidArgumentError) as refused:
                    xen.backend.altp2m_get_mem_access(1, view.id, wrong)  # type: ignore[arg-type]
                told.append(str(refused.value))
            with pytest.raises(xa.InvalidArgumentError):
                xen.backend.foreignmemory_unmap([])
            backend = xen.backend
            told += [backend.supports("xc_monitor_io"), backend.xen_commandline()]
            told += [backend.domain_hvm_getcontext(1), backend.domain_config_json(1)]
            told += [
                backend.altp2m_set_suppress_ve_multi(1, 0, 0x100, gfn, True)
                for gfn in (0x101, 0x2000)
            ]
        return told

    learned = much(xa.connect(simulated(), record=path))
    assert much(replayed(path)) == learned


def test_every_kind_of_result_can_be_read() -> None:
    """Whoever adds one to the Protocol says in session.py how it is written."""
    kinds = {kind.removesuffix(" | None") for kind in session.RESULTS.values()}
    kinds = {kind[5:-1] if kind.startswith("list[") else kind for kind in kinds}
    assert kinds == session._READERS.keys()


def test_a_recording_may_be_older_than_a_fact(path: Path) -> None:
    backend = open_backend("mock")
    [info] = backend.domain_getinfolist(0, 1)
    backend.close()
    told = session.encode(info)
    assert session._decoded("list[DomainInfo]", [told]) == [info]
    del told["paged_pages"]
    assert session._decoded("list[DomainInfo]", [told]) == [info]
    del told["vcpus"]
    with pytest.raises(session._Unsound, match="is no DomainInfo"):
        session._decoded("list[DomainInfo]", [told])


def test_a_replay_has_every_operation_and_so_has_a_recording(path: Path) -> None:
    for kind in (RecordingBackend, ReplayBackend):
        for name, member in vars(Backend).items():
            if inspect.isfunction(member) and name[0] != "_":
                assert callable(getattr(kind, name))
    assert {"domain_pause", "evtchn_calls", "supports"} <= session.OPERATIONS.keys()
    backend = recording.record(MockBackend((4, 20)), path)
    assert (backend.name, backend.release.version) == ("mock", (4, 20))
    backend.close()
    backend.close()
    again = replayed(path)
    assert (again.backend.name, again.release.version) == ("replay", (4, 20))
    again.close()
    with pytest.raises(xa.ClosedError):
        again.backend.xen_commandline()


# What is shared.


def test_pages_read_are_as_they_were_at_a_call(path: Path) -> None:
    """A copy, brought up to date by each call; what is written is there at once."""
    host = MockBackend()
    host.add_domain()
    frames = host.foreignmemory_map(1, True, [7])

    def look(backend: Backend, change: Callable[[bytes], None]) -> list[bytes]:
        [page] = pages = backend.foreignmemory_map(1, False, [7])
        seen = [page[:4].tobytes()]
        change(b"more")
        seen.append(page[:4].tobytes())
        backend.xen_commandline()
        seen.append(page[:4].tobytes())
        with pytest.raises(TypeError):
            page[0] = 1
        part = page[8:]
        with pytest.raises(xa.BusyError):
            backend.foreignmemory_unmap(pages)
        part.release()
        backend.foreignmemory_unmap(pages)
        with pytest.raises(ValueError, match="released"):
            page[0]
        return seen

    def change(data: bytes) -> None:
        frames[0][:4] = data

    change(b"some")
    backend = recording.record(host, path)
    seen = look(backend, change)
    assert seen == [b"some", b"some", b"more"]
    [page] = pages = backend.foreignmemory_map(1, True, [7])
    page[:4] = b"mine"
    assert frames[0][:4].tobytes() == b"mine"
    change(b"your")
    backend.foreignmemory_unmap(pages)
    host.foreignmemory_unmap(frames)
    backend.close()

    again = open_backend(f"replay:{path}")
    assert look(again, lambda data: None) == seen
    [page] = pages = again.foreignmemory_map(1, True, [7])
    assert page[:4].tobytes() == b"more"
    page[1:4] = b"our"  # the rest is taken for the guest's
    again.foreignmemory_unmap(pages)
    again.close()


def test_several_requests_and_a_damaged_ring(path: Path) -> None:
    def listen(xen: xa.Xen, damage: Callable[[], None]) -> list[int]:
        vcpus: list[int] = []
        with (
            xen,
            xen.domain(1) as dom,
            dom.altp2m() as altp2m,
            dom.monitor(xa.MemAccess) as monitor,
        ):
            view = altp2m.create_view()
            view.set_access(7, xa.Access.R)
            altp2m.switch_to_view(view)
            xen.backend.domain_unpause(1)
            for event in monitor.events(timeout=0.2):
                vcpus.append(event.vcpu)
                if len(vcpus) == 20:
                    damage()
                    xen.backend.xen_commandline()
                    with pytest.raises(xa.RingError):
                        monitor._connection.ring.unread  # noqa: B018
                    break
        return vcpus

    host = MockBackend()
    domid = host.add_domain(vcpus=4)
    for vcpu in range(4):
        host.load(domid, [Instruction(0x2000, accesses=[Access("w", 7 << 12)])], vcpu, loop=True)

    def damage() -> None:
        frame = host._monitors[domid].ring_frame
        assert frame is not None
        host.machine.frames.page(frame)[:4] = (0x12345678).to_bytes(4, "little")

    learned = listen(xa.connect(host, record=path), damage)
    assert set(learned) == {0, 1, 2, 3}
    assert listen(replayed(path), lambda: None) == learned


# The first call that differs.


@pytest.fixture
def recorded(path: Path) -> Path:
    run(SESSIONS["events"], xa.connect(simulated(), record=path))
    return path


def differing(path: Path, agent: Session) -> xa.ReplayError:
    with pytest.raises(xa.ReplayError) as differs:
        run(agent, replayed(path))
    copy = pickle.loads(pickle.dumps(differs.value))
    assert (str(copy), copy.came) == (str(differs.value), differs.value.came)
    return differs.value


def restricting(access: xa.Access, answer: Callable[[xa.View], xa.Response]) -> Session:
    def agent(dom: xa.Domain) -> list[Any]:
        with dom.altp2m() as altp2m, dom.monitor(xa.MemAccess) as monitor:
            view = altp2m.create_view()
            view.set_access(Image.open(HELLO).gfns("counter"), access)
            altp2m.switch_to_view(view)
            dom.xen.backend.domain_unpause(int(dom.domid))
            for event in monitor.events(timeout=20.0):
                event.reply(answer(view))
        return []

    return agent


def test_another_argument_is_told(recorded: Path) -> None:
    agent = restricting(xa.Access.RX, lambda view: xa.Response.resume())
    differs = differing(recorded, agent)
    assert (
        differs.expected
        == "altp2m_set_mem_access_multi(domid=1, view=1, accesses=01, gfns=[0x103])"
    )
    assert differs.came == "altp2m_set_mem_access_multi(domid=1, view=1, accesses=05, gfns=[0x103])"
    assert lines(recorded)[differs.line - 1]["call"] == "altp2m_set_mem_access_multi"
    for part in (recorded.name, f"line {differs.line},", differs.expected, differs.came):
        assert part in str(differs)


def test_another_response_is_told(recorded: Path) -> None:
    agent = restricting(xa.Access.R, lambda view: xa.Response.fast_singlestep(through=0, back_to=0))
    differs = differing(recorded, agent)
    told = "before evtchn_notify a response to vCPU 0: VCPU_PAUSED | "
    assert str(differs.expected).startswith(told)
    assert differs.came.startswith(told)
    assert differs.came != differs.expected


def test_a_call_too_many_is_told(recorded: Path) -> None:
    def agent(dom: xa.Domain) -> list[Any]:
        return [SESSIONS["events"](dom), dom.maximum_gfn]

    differs = differing(recorded, agent)
    assert differs.came == "domain_maximum_gpfn(domid=1)"
    assert differs.expected is not None


def test_a_call_too_few_is_told(recorded: Path) -> None:
    differs = differing(recorded, lambda dom: [])
    assert differs.expected == "altp2m_get_domain_state(domid=1)"
    assert differs.came == "domain_getinfolist(first_domid=1, limit=1)"


def test_a_session_that_ends_too_early_is_told(recorded: Path) -> None:
    xen = replayed(recorded)
    with pytest.raises(xa.ReplayError, match=r"came: +the end"):
        xen.close()
    assert xen.closed
    xen.close()


@pytest.mark.parametrize("offset", [0x123, 0x124, 0xFFF])
def test_other_bytes_are_told(offset: int, path: Path) -> None:
    def agent(data: bytes, dom: xa.Domain) -> list[Any]:
        dom.memory.write((7 << 12) + offset, data)
        return []

    run(partial(agent, b"\x55"), xa.connect(simulated(), record=path))
    assert run(partial(agent, b"\x55"), replayed(path)) == []
    differs = differing(path, partial(agent, b"\x56"))
    assert f"gfn 0x7, offset {offset:#x}: 55" in str(differs.expected)
    assert f"gfn 0x7, offset {offset:#x}: 56" in differs.came


def test_who_copes_with_refusals_does_not_cope_with_a_difference(recorded: Path) -> None:
    def agent(dom: xa.Domain) -> list[Any]:
        with suppress(xa.XenError):
            dom.xen.backend.altp2m_create_view(1, 7)
        return []

    assert "altp2m_create_view" in differing(recorded, agent).came


@pytest.mark.parametrize("name", SESSIONS)
def test_everything_is_let_go_wherever_it_differs(name: str, path: Path) -> None:
    """Each call is missing in turn, also among those that take things back."""
    run(SESSIONS[name], xa.connect(simulated(), record=path))
    content = path.read_bytes().splitlines(keepends=True)
    differ = 0
    for missing in range(1, len(content), max(len(content) // 60, 1)):
        if b'{"clock"' in content[missing]:
            continue
        path.write_bytes(b"".join(content[:missing] + content[missing + 1 :]))
        xen = replayed(path)
        with pytest.raises(xa.ReplayError):
            run(SESSIONS[name], xen)
        differ += 1
        assert xen.closed
    assert differ > 30


def test_afterwards_the_domain_is_gone(recorded: Path) -> None:
    xen = replayed(recorded)
    dom = xen.domain(NAME)
    altp2m, monitor = dom.altp2m(), dom.monitor(xa.MemAccess)
    view = altp2m.create_view()
    with pytest.raises(xa.ReplayError) as first:
        view.set_access(1, xa.Access.R)
    with pytest.raises(xa.DomainNotFoundError, match="differs at line"):
        dom.maximum_gfn  # noqa: B018
    assert isinstance(next(monitor.events()), xa.DomainEnded)
    assert list(xen.domains()) == []
    dom.close()
    with pytest.raises(xa.ReplayError) as again:
        xen.close()
    assert again.value is first.value


# The file.


def test_only_the_user_may_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        xa.connect("mock", record=path).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_there_is_not_touched(path: Path) -> None:
    path.write_text("mine")
    other = path.with_name("link")
    other.symlink_to(path.with_name("nowhere"))
    for taken in (path, other):
        with pytest.raises(xa.RecordingError, match="is there already"):
            xa.connect("mock", record=taken)
    with pytest.raises(xa.RecordingError, match="cannot be recorded to: No such file"):
        xa.connect("mock", record=path / "below" if path.is_dir() else path.parent / "no" / "x")
    assert path.read_text() == "mine"


def test_it_does_not_end_the_session_that_there_is_no_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, 3000

    def full(file: int, data: bytes) -> int:
        nonlocal room
        if len(data) > 8 and not room:
            raise OSError(28, "No space left on device")
        data = data[:room] if len(data) > 8 else data
        room -= len(data) if len(data) > 8 else 0
        return write(file, data)

    host = simulated()
    monkeypatch.setattr("xenaltp2m.backend.session.recording.os.write", full)
    with pytest.warns(RuntimeWarning, match="not complete: there is no room left"):
        learned = run(SESSIONS["events"], xa.connect(host, record=path))
    assert len(learned) == 13
    assert path.read_bytes().endswith(b"}\n")
    assert differing(path, SESSIONS["events"]).expected is None


def test_it_does_not_end_the_session_that_it_would_be_too_large(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_FILE", 3000)
    with pytest.warns(RuntimeWarning, match="too large"):
        run(SESSIONS["events"], xa.connect(simulated(), record=path))
    assert path.stat().st_size <= 3000
    assert differing(path, SESSIONS["events"]).expected is None


def test_a_killed_process_leaves_what_it_has_done(path: Path) -> None:
    code = f"""
        import os, signal
        import xenaltp2m as xa
        with xa.connect("mock", record={str(path)!r}) as xen, xen.domain("guest") as dom:
            view = dom.altp2m().create_view()
            view.set_access(5, xa.Access.R)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL

    xen = replayed(path)
    view = xen.domain("guest").altp2m().create_view()
    view.set_access(5, xa.Access.R)
    with pytest.raises(xa.ReplayError, match="the recording ends") as differs:
        view.access(5)
    with pytest.raises(xa.ReplayError):
        xen.close()
    assert differs.value.expected is None
    assert "altp2m_get_mem_access" in differs.value.came


def test_a_line_that_was_not_finished_is_passed_over(recorded: Path) -> None:
    content = recorded.read_bytes()
    recorded.write_bytes(content[:-20])
    assert differing(recorded, SESSIONS["events"]).expected is None


def damaged() -> Iterator[Any]:
    """Changes of a line of a recording, each with what is said of it."""
    for name, change, why in [
        ("no-json", b"{", "not JSON"),
        ("deep", b"[" * 100_000, "not JSON"),
        ("number", b"7", "object should"),
        ("empty", b"{}", "text should"),
        ("unknown", {"call": "close"}, "no call"),
        ("more", {"beside": 1}, "or more beside it"),
        ("time", {"time": -1}, "no time"),
        ("endless", {"time": float("inf")}, "no time"),
        ("few", {"arguments": []}, "a list should"),
        ("result", {"result": "1"}, "no number"),
        ("large", {"result": 1 << 64}, "no number"),
        ("error", {"error": {"type": "SystemExit", "message": ""}}, "no error"),
        ("text", {"error": {"type": "BusyError"}}, "text should"),
        ("hex", {"requests": [{"raw": "xx"}]}, "hexadecimal"),
        ("many", {"requests": [{"raw": ""}] * 9}, "more events"),
        ("wide", {"responses": [{"raw": "00" * 4097}]}, "too long"),
        ("beyond", {"memory": [[0, 0, [[4095, "0000"]]]]}, "beyond it"),
        ("bomb", {"memory": [[0, 0, session._packed(bytes(1 << 24))]]}, "too large"),
        ("short", {"wrote": [[0, 0, session._packed(bytes(5))]]}, "not the size"),
        ("base64", {"wrote": [[0, 0, "%"]]}, "packed is damaged"),
        ("index", {"indices": [[8, 0]]}, "no number"),
        ("ring", {"requests": {"one": []}}, "told by its number"),
        ("negative", {"produced": {"-1": 0}}, "no number"),
        ("lists", b'{"beside":[%s[]]}' % (b"[]," * (1 << 18)), "too long"),
    ]:
        yield pytest.param(change, why, id=name)


@pytest.mark.parametrize(("change", "why"), list(damaged()))
def test_a_damaged_line_is_refused_at_once(change: Any, why: str, recorded: Path) -> None:
    content = recorded.read_bytes().splitlines()
    at = next(n for n, line in enumerate(content) if b'"altp2m_create_view"' in line)
    if isinstance(change, dict):
        change = json.dumps(json.loads(content[at]) | change).encode()
    content[at] = change
    recorded.write_bytes(b"\n".join(content) + b"\n")
    with pytest.raises(xa.RecordingError, match=rf"line {at + 1} of .* is damaged: .*{why}"):
        replayed(recorded)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("", "not the recording"),
        ("[]", "not the recording"),
        ('{"format": "xenaltp2m session", "version": 2}', "version 2"),
        ('{"format": "xenaltp2m session", "version": 1}', "line 1 .* a list should"),
        (
            '{"format": "xenaltp2m session", "version": 1, "release": [4, 6]}',
            "4.6 is not supported",
        ),
        ("\0" * 9_000_000, "not the recording"),
    ],
    ids=["empty", "list", "version", "release", "old", "long"],
)
def test_what_is_no_recording_is_refused(header: str, why: str, path: Path) -> None:
    path.write_text(header + "\n")
    with pytest.raises(xa.RecordingError, match=why):
        replayed(path)


def test_what_cannot_be_read_is_refused(path: Path) -> None:
    with pytest.raises(xa.RecordingError, match="cannot be read: No such file"):
        replayed(path)
    for other in (path.parent, Path("/dev/zero")):
        with pytest.raises(xa.RecordingError, match=r"cannot be read|is not a file"):
            replayed(other)
    os.mkfifo(path)
    with pytest.raises(xa.RecordingError, match="is not a file"):
        replayed(path)


@pytest.mark.parametrize(
    ("call", "change"),
    [
        ("foreignmemory_map", {"result": []}),
        ("foreignmemory_map", {"memory": [[7, 0, []]]}),
        ("foreignmemory_map", {"memory": [[0, 1, []]]}),
    ],
)
def test_what_does_not_fit_together_is_refused_where_it_comes(
    call: str, change: dict[str, Any], recorded: Path
) -> None:
    content = lines(recorded)
    at = next(n for n, line in enumerate(content) if line.get("call") == call)
    content[at] |= change
    recorded.write_bytes(b"".join(map(session.line, content)))
    with pytest.raises(xa.ReplayError, match=f"line {at + 1}, (.|\n)*does not fit"):
        run(SESSIONS["events"], replayed(recorded))


# How things are told.


@pytest.mark.parametrize("changed", [0, 1, 8, 9, 64])
def test_a_page_is_told_by_what_differs(changed: int) -> None:
    before = bytes(range(256)) * 16
    now = bytearray(before)
    for part in range(changed):
        now[64 * part + 3] ^= 0xFF
    told = session.difference(before, bytes(now))
    assert isinstance(told, str) == (changed > 8)
    assert session.applied(before, session.runs_of(told)) == now


def test_fault_17_many_packed_pages_in_a_line_stay_packed(recorded: Path) -> None:
    """A line of 4 MiB with 50 000 pages, 200 MiB when unpacked: read in a tenth of that."""
    page = session._packed(bytes(4096))
    memory = b",".join(b'[0,0,"%s"]' % page.encode() for _ in range(50_000))
    content = recorded.read_bytes().splitlines()
    at = next(n for n, line in enumerate(content) if b'"altp2m_create_view"' in line)
    content[at] = content[at][:-1] + b',"memory":[%s]}' % memory
    recorded.write_bytes(b"\n".join(content) + b"\n")
    tracemalloc.start()
    try:
        with recorded.open("rb") as stream:
            session.Reader(stream, "damaged")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000 * 4096 // 5


def test_fault_17_a_line_with_more_values_than_are_read_is_not_written(path: Path) -> None:
    file = recording._File(path)
    file.append({"numbers": [0] * ((1 << 18) - 1)})
    written = path.stat().st_size
    assert written > 1 << 19
    file.append({"numbers": [0] * (1 << 18)})
    assert path.stat().st_size == written
    with pytest.warns(RuntimeWarning, match="too large"):
        file.close()


def test_fault_17_more_pages_than_can_be_mapped_are_not_made(path: Path) -> None:
    mock = MockBackend()
    domid = mock.add_domain("guest")
    backend = recording.record(mock, path)
    backend.foreignmemory_unmap(backend.foreignmemory_map(domid, False, [0]))
    backend.close()
    header, mapped, unmapped = path.read_bytes().splitlines()
    document = json.loads(mapped)
    gfns = list(range((1 << 16) + 1))
    document["arguments"][2], document["result"] = session.encode(gfns), [[]] * len(gfns)
    path.write_bytes(b"\n".join([header, json.dumps(document).encode(), unmapped, b""]))
    replaying = replay.replay(path)
    tracemalloc.start()
    try:
        with pytest.raises(xa.ReplayError, match="too many pages"):
            replaying.foreignmemory_map(domid, False, gfns)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(xa.ReplayError):
        replaying.close()


def test_who_tells_and_who_hears_forget_together() -> None:
    teller, hearer = session.Contents(), session.Contents()
    for nth in range(3000):
        gfn = nth * 7 % 1500
        page = bytes([nth % 256]) * 4096 if nth % 3 else bytes(4096)
        told = session.runs_of(teller.tell(1, gfn, page))
        assert hearer.take(1, gfn, told) == page
    assert len(teller._known) <= 1024


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ([1, 2], range(1, 3), True),
        ([1, 2], array("Q", [1, 3]), False),
        (range(5000), array("Q", range(5000)), True),
        (range(5000), list(range(4999)), False),
        (b"\1" * 500, bytearray(b"\1" * 500), True),
        (b"\1" * 500, b"\1" * 501, False),
        ([-1], [-2], False),
        (5, xa.Access.RX.value, True),
    ],
)
def test_arguments_are_compared_by_what_they_are(one: Any, other: Any, equal: bool) -> None:
    first, second = session.encode(one), session.encode(other)
    assert session.same(first, second) is equal
    json.dumps([first, second])
    if isinstance(first, dict) and "numbers" in first:
        raw = session._unpacked(first["numbers"])
        import base64
        import zlib

        first = {"numbers": base64.b64encode(zlib.compress(raw, 9)).decode()}
        assert session.same(first, second) is equal


def test_what_is_packed_and_damaged_is_like_nothing_else() -> None:
    packed = session.encode(bytes(1000))
    assert isinstance(packed, dict)
    damaged = {"packed": packed["packed"][:-8]}
    assert not session.same(damaged, packed)
    assert not session.same(damaged, {"bytes": ""})


# The command line.


WATCH = ["watch", "guest", "--image", str(HELLO), "--symbol", "counter", "--count", "6"]
TRACE = ["trace", "guest", "--symbols", str(HELLO), "target", "--returns", "--count", "6"]


@pytest.mark.parametrize(
    "command", [["list"], ["doctor", "guest"], WATCH, TRACE], ids=lambda command: command[0]
)
def test_a_command_says_the_same(
    command: list[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> tuple[list[str], str]:
        out, err = capsys.readouterr()
        measured = ("in handlers", " through ")  # how busy this machine was; the backend's name
        return [line for line in out.splitlines() if not any(map(line.__contains__, measured))], err

    assert cli.main(["--connect", "mock", "--record", str(path), *command]) == cli.DONE
    first = told()
    assert "guest" in "".join(first[0]) + first[1]
    assert cli.main([*command, "--connect", f"replay:{path}"]) == cli.DONE
    assert told() == first


def test_what_doctor_asks_of_a_host_is_recorded(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(which: str, machine: Machine) -> list[Finding]:
        with machine.connect() as xen:
            return examine_xen(xen, which)

    with monkeypatch.context() as patch:
        mock = MockBackend()
        mock.add_domain("guest")
        patch.setattr("xenaltp2m.handles.xen.open_backend", {"libxc": mock}.__getitem__)
        patch.setattr("xenaltp2m.cli.doctor.examine", examine)
        assert cli.main(["--json", "--record", str(path), "doctor", "guest"]) == cli.DONE
    first = capsys.readouterr().out
    assert cli.main(["--json", "--connect", f"replay:{path}", "doctor", "guest"]) == cli.DONE
    assert capsys.readouterr().out.replace("through replay", "through mock") == first


def test_another_command_is_told_apart(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--connect", "mock", "--record", str(path), "list"]) == cli.DONE
    assert cli.main(["--connect", f"replay:{path}", *WATCH]) == cli.REFUSED
    headline, recorded, came = capsys.readouterr().err.splitlines()[-3:]
    assert headline.startswith(f"xenaltp2m: error: the replay of {path.name} differs at line 2, ")
    assert recorded == "  recorded: domain_getinfolist(first_domid=0, limit=256)"
    assert came == "  came:     name_to_domid(name='guest')"


def test_a_recording_that_cannot_be_used(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--connect", f"replay:{path}", "list"]) == cli.USAGE
    assert "cannot be read: No such file" in capsys.readouterr().err
    path.touch()
    assert cli.main(["--connect", "mock", "--record", str(path), "list"]) == cli.USAGE
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ends:
        cli.main(["--connect", f"replay:{path}", "--record", str(path), "list"])
    assert ends.value.code == cli.USAGE
    assert "recorded already" in capsys.readouterr().err


def test_nothing_goes_by_another_clock() -> None:
    """What decides by the machine's time could decide otherwise in a replay."""
    package = Path(xa.__file__).parent
    own = {"backend/clock.py", "backend/session/recording.py", "cli/console.py"}
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(f"time.{word}(" in path.read_text() for word in ("monotonic", "sleep"))
    }
    assert found == own
