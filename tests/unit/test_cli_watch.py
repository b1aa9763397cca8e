# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xenaltp2m watch``: on a mock whose guest touches what is watched."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from errno import EINVAL
from pathlib import Path
from typing import Any

import pytest

import xenaltp2m as xa
from xenaltp2m import cli
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend import mock
from xenaltp2m.backend.clock import Clock, Poll
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.cli import host, watch
from xenaltp2m.types import Altp2mMode

ROOT = Path(__file__).parents[2]
IMAGE = str(ROOT / "examples" / "guest" / "hello.elf")
TARGET, DATA, COUNTER = 0x101, 0x102, 0x103
WATCH = ["--connect", "mock", "watch", "guest"]
PAGE = [*WATCH, "--gfn", "0x101"]
SYMBOL = [*WATCH, "--image", IMAGE, "--symbol", "target"]
WATCHING = "Watching gfn 0x101 of domain 1 (guest) in view 1, with access r--"
UNDONE = "Undone: monitor closed, vCPUs moved back, view 1 destroyed, altp2m off."


class WatchedMock(MockBackend):
    """The mock that the command line opens; it looks after itself when it is closed."""

    made: list[WatchedMock]
    options: dict[str, Any]
    ring_of_another: memoryview
    fault: tuple[str, int] | None
    """Which call of an operation fails, from the start."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **(keywords | {"memory_pages": 1 << 14}))
        self.made.append(self)
        self.ran_on: int | None = None
        self.left: list[str] = []
        if self.fault is not None:
            self.fail(*self.fault, EINVAL)

    def add_domain(self, name: str = "guest", **options: Any) -> int:
        return super().add_domain(name, **(options | self.options))

    def boot(self, *_: object) -> None:
        raise ImportError("as without the simulator; with it: test_cli_simulated.py")

    def close(self) -> None:
        self._faults.clear()
        if 1 in self.machine.domains:
            self.ran_on = self.run(1, 50)
        self.left = [str(thing) for thing in self.open_resources()]
        super().close()

    def assert_as_before(self) -> None:
        """The guest runs, and nobody watches."""
        guest = self.domain(1)
        assert self.left == []
        assert self.ran_on == 50
        assert not guest.active
        assert not guest.listened
        assert not any(view.exists for view in guest.views)
        assert guest.pauses == 0
        assert not guest.crashed
        assert not any(vcpu.single_step for vcpu in guest.vcpus)
        assert not any(vcpu.event_pauses for vcpu in guest.vcpus)


@pytest.fixture(autouse=True)
def mocks(monkeypatch: pytest.MonkeyPatch) -> list[WatchedMock]:
    made: list[WatchedMock] = []
    monkeypatch.setattr(WatchedMock, "made", made, raising=False)
    monkeypatch.setattr(WatchedMock, "options", {}, raising=False)
    monkeypatch.setattr(WatchedMock, "fault", None, raising=False)
    monkeypatch.setattr(mock, "MockBackend", WatchedMock)
    return made


@pytest.fixture
def at_hit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Let something happen when a hit is told."""

    def arrange(number: int, act: Callable[[], object]) -> None:
        told = watch._Watch._text
        hits = 0

        def text(self: watch._Watch, event: xa.Event, passed: float) -> str:
            nonlocal hits
            hits += 1
            if hits == number:
                act()
            return told(self, event, passed)

        monkeypatch.setattr(watch._Watch, "_text", text)

    return arrange


@pytest.fixture
def at_wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Let something happen when events are waited for: the guest has done all that it can then."""

    def arrange(number: int, act: Callable[[], object]) -> None:
        waits = 0

        def polling(_: Clock, poller: select.epoll) -> Poll:
            def poll(seconds: float) -> list[tuple[int, int]]:
                nonlocal waits
                waits += seconds > 0
                if waits == number and seconds:
                    act()
                return poller.poll(seconds)

            return poll

        monkeypatch.setattr(Clock, "polling", polling)

    return arrange


def documents(out: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    *hits, last = map(json.loads, out.splitlines())
    assert list(last) == ["summary"]
    return hits, last["summary"]


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            WATCH,
            "nothing to watch: give --gfn, --symbol, --bytes, --cr3, --msr, --cpuid, --breakpoints",
        ),
        (WATCH[:3], "required: DOMAIN"),
        ([*WATCH, "--symbol", "target"], "--symbol needs --image"),
        ([*WATCH, "--gfn", "page"], "'page' is neither a gfn nor a range A-B"),
        ([*WATCH, "--gfn", "5-4"], "'5-4' is neither a gfn nor a range A-B"),
        ([*WATCH, "--gfn", "1-2-3"], "'1-2-3' is neither a gfn nor a range A-B"),
        ([*WATCH, "--gfn=-1"], "'-1' is neither a gfn nor a range A-B"),
        ([*WATCH, "--gfn", "0x1000000000"], "below 0x1000000000"),
        ([*WATCH, "--gfn", "0-0xfffffffff"], "is more than 1048576 pages"),
        (
            [*WATCH, "--gfn", "0-0xfffff", "--gfn", "0x100000"],
            "1048577 pages: at most 1048576 can be watched",
        ),
        ([*PAGE, "--access", "rwx"], "'rwx' is not one of n, r, x, rw, rx, n2rwx, r_pw"),
        ([*PAGE, "--access", "w"], "'w' is not one of n, r, x"),
        ([*PAGE, "--duration", "-1"], "'-1' is not a number of seconds"),
        ([*PAGE, "--count", "0"], "'0' is not a number of hits"),
        ([*PAGE, "--count", "many"], "'many' is not a number of hits"),
        ([*WATCH, "--msr", "0x100000000"], "'0x100000000' is not the number of an MSR"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert mocks == []


def test_help_tells_of_json_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["watch", "--help"])
    told = capsys.readouterr().out
    assert cli.main([*SYMBOL, "--json", "--registers", "--count", "2"]) == cli.DONE
    hits, summary = documents(capsys.readouterr().out)
    assert [key for key in {**hits[0], **summary} if key not in told] == []


# What is told.


@pytest.mark.parametrize("version", SUPPORTED, ids="{0[0]}.{0[1]}".format)
def test_hits_in_lines(
    version: tuple[int, int], capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    release = "{}.{}".format(*version)
    assert cli.main([*PAGE, "--count", "4", "--xen", release]) == cli.DONE
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert sorted(line[13:] for line in lines[:4]) == [
        "vCPU 0  view 1  MemAccess  gfn 0x101  offset 0x000  --x  rip 0x101000  gla 0x101000",
        "vCPU 0  view 1  MemAccess  gfn 0x101  offset 0x000  rw-  rip 0x10004  gla 0x101000",
        "vCPU 1  view 1  MemAccess  gfn 0x101  offset 0x000  --x  rip 0x101000  gla 0x101000",
        "vCPU 1  view 1  MemAccess  gfn 0x101  offset 0x000  rw-  rip 0x10004  gla 0x101000",
    ]
    assert lines[4] == ""
    assert lines[5].startswith("4 hits in 0.")
    assert lines[6:] == [
        "",
        "what       hits  tried         vCPUs",
        "gfn 0x101     4  --x 2, rw- 2  0: 2, 1: 2",
    ]
    assert err.splitlines() == [
        f"{WATCHING}, until Ctrl-C, or 4 hits.",
        UNDONE,
    ]
    mocks[0].assert_as_before()


@pytest.mark.parametrize(
    ("access", "tried"),
    [
        ("n", {"--x", "r--", "rw-"}),
        ("r", {"--x", "rw-"}),
        ("x", {"r--", "rw-"}),
        ("rw", {"--x"}),
        ("rx", {"rw-"}),
    ],
)
def test_what_each_access_tells(
    access: str, tried: set[str], capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    assert cli.main([*PAGE, "--access", access, "--count", "12", "--json"]) == cli.DONE
    hits, summary = documents(capsys.readouterr().out)
    assert len(hits) == 12
    assert {hit["tried"] for hit in hits} == tried
    assert summary["hits"] == 12
    assert summary["by_event"] == {"MemAccess": 12}
    assert set(summary["by_gfn"]["257"]) == tried
    assert sum(summary["by_vcpu"].values()) == 12
    mocks[0].assert_as_before()


def test_the_first_access_alone(
    capsys: pytest.CaptureFixture[str], at_wait: Callable[[int, Callable[[], object]], None]
) -> None:
    at_wait(5, lambda: signal.raise_signal(signal.SIGINT))
    arguments = [*WATCH, "--gfn", "0x100-0x101", "--access", "n2rwx", "--json"]
    assert cli.main(arguments) == cli.DONE
    hits, _ = documents(capsys.readouterr().out)
    assert sorted(hit["gfn"] for hit in hits) == [0x100, 0x101]


def test_an_access_of_a_later_release(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PAGE, "--access", "r_pw", "--count", "1"]) == cli.REFUSED
    assert "r_pw" in capsys.readouterr().err
    assert cli.main([*PAGE, "--access", "r_pw", "--count", "1", "--xen", "4.20"]) == cli.DONE


def test_hits_as_json_with_symbols_and_registers(
    capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    arguments = [*SYMBOL, "--symbol", "counter", "--count", "8", "--json", "--registers"]
    assert cli.main(arguments) == cli.DONE
    hits, summary = documents(capsys.readouterr().out)
    fetch = next(hit for hit in hits if hit["gfn"] == TARGET)
    assert (fetch["event"], fetch["tried"], fetch["view"]) == ("MemAccess", "--x", 1)
    assert (fetch["symbol"], fetch["target"]) == ("target", "target")
    assert fetch["registers"]["rip"] == fetch["rip"] == fetch["gla"] == 0x101000
    write = next(hit for hit in hits if hit["gfn"] == COUNTER)
    assert (write["tried"], write["target"]) == ("rw-", "counter")
    assert write["symbol"].startswith("_start+")
    assert set(summary["by_gfn"]) == {str(TARGET), str(COUNTER)}
    mocks[0].assert_as_before()


def test_registers_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SYMBOL, "--count", "1", "--registers"]) == cli.DONE
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("rip 0x101000 (target)  gla 0x101000 (target)")
    assert second.strip().startswith("rax=0x")


def test_registers_without_a_view(
    capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    arguments = [*WATCH, "--cr3", "--cpuid", "--msr", "0xc0000082", "--msr", "0xc0000082"]
    assert cli.main([*arguments, "--count", "40", "--json"]) == cli.DONE
    out, err = capsys.readouterr()
    hits, summary = documents(out)
    assert set(summary["by_event"]) == {"WriteCtrlreg", "MovToMsr", "Cpuid"}
    assert summary["by_gfn"] == {}
    assert all(hit["view"] is None for hit in hits)
    switch = next(hit for hit in hits if hit["event"] == "WriteCtrlreg")
    assert (switch["index"], {switch["new_value"], switch["old_value"]}) == (
        "CR3",
        {0x1000, 0x2000},
    )
    assert err.splitlines()[-1] == "Undone: monitor closed."
    assert "altp2m_set_domain_state" not in {call.op for call in mocks[0].calls}
    mocks[0].assert_as_before()


def test_other_events_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WATCH, "--msr", "0xc0000082", "--count", "3", "--breakpoints"]) == cli.DONE
    assert (
        "MovToMsr  msr 0xc0000082  new_value 0x1000  old_value 0x2000  rip"
        in capsys.readouterr().out
    )


def test_many_pages(capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]) -> None:
    arguments = [*WATCH, *(f"--gfn={2 * gfn}" for gfn in range(0x20, 0x26)), "--gfn", "0-0xfff"]
    assert cli.main([*arguments, "--count", "100"]) == cli.DONE
    out, err = capsys.readouterr()
    assert "Watching gfn 0x0..0xfff of domain 1 (guest)" in err
    assert "gfn 0x10 " in out
    mocks[0].assert_as_before()


def test_scattered_pages_are_named_in_short(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*WATCH, *(f"--gfn={2 * gfn}" for gfn in range(0x20, 0x26)), "--duration", "0"]
    assert cli.main(arguments) == cli.DONE
    out, err = capsys.readouterr()
    assert "Watching gfn 0x40, 0x42, 0x44, 0x46, ... of domain 1" in err
    assert out.startswith("0 hits in 0.0 s")


def test_rows_of_the_summary_are_few(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_MOST_ROWS", 1)
    assert cli.main([*WATCH, "--gfn", "0x100-0x102", "--count", "60"]) == cli.DONE
    *_, first, rest = capsys.readouterr().out.splitlines()
    assert first.startswith("gfn 0x10")
    assert rest.startswith("2 more")


def test_pages_that_cannot_be_watched(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PAGE, "--gfn", "0x2000", "--duration", "0"]) == cli.DONE
    assert "gfn 0x2000 is not watched: it is not ordinary memory" in capsys.readouterr().err


def test_fault_15_an_address_in_place_of_a_gfn(
    capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    assert cli.main([*PAGE, "--gfn", "0x101000-0x101001", "--duration", "0"]) == cli.USAGE
    assert capsys.readouterr().err.splitlines() == [
        "xenaltp2m: error: gfn 0x101000..0x101001: the highest gfn of domain 1 is 0xfefff",
        "  hint: was the address 0x101000 meant? its gfn is 0x101",
    ]
    mocks[0].assert_as_before()


def test_fault_15_pages_that_are_no_memory_are_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*PAGE, "--gfn", "0x2000-0x201f", "--duration", "0"]) == cli.DONE
    told = [line for line in capsys.readouterr().err.splitlines() if "ordinary" in line]
    [line] = told
    assert line.endswith("gfn 0x2000..0x201f is not watched: it is not ordinary memory")


def test_fault_15_watching_nothing(
    capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    for access in ("r", "n2rwx"):
        nothing = [*WATCH, "--gfn", "0x2000-0x201f", "--access", access, "--duration", "0"]
        assert cli.main(nothing) == cli.REFUSED
        [error, hint] = capsys.readouterr().err.splitlines()
        assert error.endswith(
            "there is nothing to watch: gfn 0x2000..0x201f is not ordinary memory"
        )
        assert hint == "  hint: was the address 0x2000 meant? its gfn is 0x2"
        mocks[-1].assert_as_before()
    assert cli.main([*nothing, "--cr3"]) == cli.DONE


def test_a_page_that_xen_resets_is_watched_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mocks: list[WatchedMock],
    at_hit: Callable[[int, Callable[[], object]], None],
    at_wait: Callable[[int, Callable[[], object]], None],
) -> None:
    monkeypatch.setattr(watch, "_VERIFY_SECONDS", 0)
    monkeypatch.setattr(watch, "_TICK_SECONDS", 0.01)

    def wipe() -> None:
        mocks[0].altp2m_set_mem_access(1, 1, TARGET, 7)

    at_hit(3, wipe)
    at_wait(10, lambda: signal.raise_signal(signal.SIGINT))
    assert cli.main(PAGE) == cli.DONE
    err = capsys.readouterr().err
    assert err.count("gfn 0x101 was not watched for a while") == 1
    assert "it is watched again" in err
    mocks[0].assert_as_before()


# Its end.


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_all_is_undone(
    number: signal.Signals,
    mocks: list[WatchedMock],
    capsys: pytest.CaptureFixture[str],
    at_hit: Callable[[int, Callable[[], object]], None],
) -> None:
    before = signal.getsignal(number)
    at_hit(3, lambda: signal.raise_signal(number))
    assert cli.main(PAGE) == cli.DONE
    out, err = capsys.readouterr()
    assert "gfn 0x101  " in out.splitlines()[-1]
    assert err.splitlines()[-1] == UNDONE
    mocks[0].assert_as_before()
    assert signal.getsignal(number) is before


def test_a_signal_where_nothing_happens(
    mocks: list[WatchedMock], at_wait: Callable[[int, Callable[[], object]], None]
) -> None:
    at_wait(1, lambda: signal.raise_signal(signal.SIGINT))
    assert cli.main([*WATCH, "--breakpoints"]) == cli.DONE
    mocks[0].assert_as_before()


def test_a_signal_before_anything_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "_load", interrupted)
    assert cli.main(SYMBOL) == cli.INTERRUPTED


def test_a_signal_while_it_is_set_up(
    monkeypatch: pytest.MonkeyPatch, mocks: list[WatchedMock], capsys: pytest.CaptureFixture[str]
) -> None:
    def create(self: MockBackend, *arguments: Any) -> int:
        signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    original = MockBackend.altp2m_create_view
    monkeypatch.setattr(MockBackend, "altp2m_create_view", create)
    assert cli.main(PAGE) == cli.DONE
    assert capsys.readouterr().out.startswith("0 hits in 0.0 s")
    mocks[0].assert_as_before()


def test_signals_break_off_output_and_nothing_else() -> None:
    with host.StopRequest() as stop:
        stop.hold_back()
        signal.raise_signal(signal.SIGINT)
        assert stop.came
        stop.printing(lambda: pytest.fail("there is no point in it"))
    done = []
    with host.StopRequest() as stop:
        stop.hold_back()

        def act() -> None:
            signal.raise_signal(signal.SIGTERM)
            done.append("not reached")

        stop.printing(act)
        assert stop.came
    assert done == []


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with host.StopRequest() as stop:
            stop.hold_back()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("end", "words", "reason"),
    [
        (lambda backend: backend.destroy(1), "the domain was destroyed", None),
        (lambda backend: backend.shut_down(1, 3), "the domain crashed", 3),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_the_domain_ends(
    end: Callable[[WatchedMock], None],
    words: str,
    reason: int | None,
    as_json: bool,
    mocks: list[WatchedMock],
    capsys: pytest.CaptureFixture[str],
    at_wait: Callable[[int, Callable[[], object]], None],
) -> None:
    at_wait(1, lambda: end(mocks[0]))
    code = cli.main([*WATCH, "--breakpoints", *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    assert code == cli.DONE
    if as_json:
        [last], summary = documents(out)
        assert (last["event"], last["shutdown_reason"]) == ("DomainEnded", reason)
        assert summary["hits"] == 0
    else:
        assert out.splitlines()[0].endswith(words)
    assert err.splitlines()[-1].startswith("Undone: ")


def test_an_error_while_it_is_set_up(
    mocks: list[WatchedMock], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WatchedMock, "options", {"mode": Altp2mMode.DISABLED})
    assert cli.main(PAGE) == cli.REFUSED
    assert "the domain was created without altp2m" in capsys.readouterr().err


def test_somebody_else_has_the_monitor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    def add(self: WatchedMock, name: str, **options: Any) -> int:
        domid = MockBackend.add_domain(self, name, **options)
        _, self.ring_of_another = self.monitor_enable(domid)
        return domid

    def close(self: WatchedMock) -> None:
        self.monitor_unmap_ring(self.ring_of_another)
        self.monitor_disable(1)
        MockBackend.close(self)

    monkeypatch.setattr(WatchedMock, "add_domain", add)
    monkeypatch.setattr(WatchedMock, "close", close)
    assert cli.main(PAGE) == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert "a monitor is, or was, active" in err
    assert not mocks[0].domain(1).active


def failing(
    operation: str | None, monkeypatch: pytest.MonkeyPatch, mocks: list[WatchedMock]
) -> set[int]:
    """Let calls fail once each: those of `domain_unpause`, or all others."""
    arguments = [*PAGE, "--cr3", "--count", "2", "--quiet"]
    assert cli.main(arguments) == cli.DONE
    made = [call.op for call in mocks[0].calls]
    first = made.index("altp2m_set_domain_state")
    before = Counter(made[:first])
    codes = set()
    for op, times in Counter(made[first:]).items():
        if (op == "domain_unpause") != (operation == "domain_unpause"):
            continue
        for nth in range(1, min(times, 4) + 1):
            monkeypatch.setattr(WatchedMock, "fault", (op, before[op] + nth))
            codes.add(cli.main(arguments))
            mocks[-1].assert_as_before()
    return codes


def test_each_call_may_fail(monkeypatch: pytest.MonkeyPatch, mocks: list[WatchedMock]) -> None:
    codes = failing(None, monkeypatch, mocks)
    assert {cli.REFUSED, cli.LEFTOVER} <= codes <= {cli.DONE, cli.REFUSED, cli.LEFTOVER}


def test_each_unpause_may_fail(monkeypatch: pytest.MonkeyPatch, mocks: list[WatchedMock]) -> None:
    assert failing("domain_unpause", monkeypatch, mocks) <= {cli.DONE, cli.LEFTOVER}


# On a terminal.


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_counters_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(watch, "_TICK_SECONDS", 0)
    both = Terminal()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert cli.main([*PAGE, "--count", "3"]) == cli.DONE
    shown = both.getvalue()
    assert "\r\033[K2 hits, " in shown
    assert " per second, 0 s\r\033[K" in shown
    assert shown.count("\033[K   0.") + shown.count("\n   0.") == 3, "a hit begins its own line"


def test_no_counters_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*PAGE, "--count", "3"]) == cli.DONE
    assert "\033" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main([*PAGE, "--count", "3", "--quiet"]) == cli.DONE
    assert isinstance(sys.stderr, Terminal)
    assert sys.stderr.getvalue() == ""


# As a program.


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "xenaltp2m", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_stopped_undoes_everything(number: signal.Signals) -> None:
    with start(*PAGE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.readline()
        program.send_signal(number)
        program.send_signal(signal.SIGINT if number != signal.SIGINT else signal.SIGTERM)
        _, err = program.communicate(timeout=60)
    assert program.returncode == 0
    assert err.splitlines()[-1] == UNDONE


def test_a_reader_that_does_not_read_holds_nothing_up() -> None:
    """Output that blocks is broken off by a signal: the guest would wait as long."""
    with start(*PAGE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(1)  # by now the pipe is full
        program.send_signal(signal.SIGTERM)
        assert program.stderr.readline().startswith("Watching ")
        assert program.stderr.readline().strip() == UNDONE
        program.communicate(timeout=60)


def test_a_reader_that_goes_away() -> None:
    with start(*PAGE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.readline()
        program.stdout.close()
        program.stdout = None
        err = program.stderr.read()
        program.wait(60)
    assert program.returncode == cli.REFUSED
    assert [line for line in err.splitlines() if not line.startswith("Watching ")] == []
