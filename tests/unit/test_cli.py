# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: in this process on a mock that is looked into, and as its users start it."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from errno import EINVAL
from pathlib import Path
from typing import Any

import pytest

import xenaltp2m as xa
from tests.unit.test_symbols import Sym, elf64
from xenaltp2m import cli
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend import mock
from xenaltp2m.backend.mock import MockBackend, Outcome
from xenaltp2m.cli import console, domains, host
from xenaltp2m.errors import add_failure
from xenaltp2m.types import Altp2mMode
from xenaltp2m.values.intervals import Intervals
from xenaltp2m.values.state import State, ViewState

ROOT = Path(__file__).parents[2]
IMAGE = str(ROOT / "examples" / "guest" / "hello.elf")
TARGET = 0x101
TARGET_CODE = "a100301000"
COPY = 0xFF000
LIST = ["--connect", "mock", "list"]
PROTECT = ["--connect", "mock", "protect", "guest", "--image", IMAGE, "--symbol", "target"]
NOW = [*PROTECT, "--duration", "0"]


class WatchedMock(MockBackend):
    """The mock that the command line opens, kept to be looked into."""

    made: list[WatchedMock]
    options: dict[str, Any]
    """Of every domain, over what the command line asks for."""
    fault: int | None
    """Which call from the start fails."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **(keywords | {"memory_pages": 1 << 14}))
        self.target = b""
        self.made.append(self)
        if self.fault is not None:
            self.fail(None, self.fault, EINVAL)

    def add_domain(self, name: str = "guest", **options: Any) -> int:
        return super().add_domain(name, **(options | self.options))

    def boot(self, *_: object) -> None:
        raise ImportError("as without the simulator; with it: test_cli_simulated.py")

    def close(self) -> None:
        self._faults.clear()
        self.target = self.read(TARGET)
        super().close()

    def read(self, gfn: int) -> bytes:
        pages = self.foreignmemory_map(1, False, [gfn])
        content = bytes(pages[0])
        self.foreignmemory_unmap(pages)
        return content

    def write(self, gfn: int, offset: int, content: bytes) -> None:
        pages = self.foreignmemory_map(1, True, [gfn])
        pages[0][offset : offset + len(content)] = content
        self.foreignmemory_unmap(pages)

    def assert_as_before(self) -> None:
        """The guest runs as if nothing had been done to it."""
        guest, fresh = self.domain(1), MockBackend(self.release_version)
        untouched = fresh.domain(fresh.add_domain(vcpus=2))
        fresh.close()
        assert not guest.active
        assert not any(view.exists for view in guest.views)
        assert (guest.pages, guest.max_pages) == (untouched.pages, untouched.max_pages)
        assert guest.pauses == 0
        assert not guest.crashed

    @property
    def release_version(self) -> tuple[int, int]:
        return self.release.major, self.release.minor


@pytest.fixture(autouse=True)
def mocks(monkeypatch: pytest.MonkeyPatch) -> list[WatchedMock]:
    made: list[WatchedMock] = []
    for name, value in (("made", made), ("options", {}), ("fault", None)):
        monkeypatch.setattr(WatchedMock, name, value, raising=False)
    monkeypatch.setattr(mock, "MockBackend", WatchedMock)
    return made


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[WatchedMock], None]], None]:
    """Let something happen during the hold, once; then the user presses Ctrl-C."""

    def arrange(act: Callable[[WatchedMock], None]) -> None:
        answers: Iterator[bool] = iter((False, True))

        def arrived(signals: object, seconds: float) -> bool:
            if not seconds:
                return False
            if not (over := next(answers)):
                act(WatchedMock.made[-1])
            return over

        monkeypatch.setattr(host.BlockedSignals, "arrived", arrived)

    return arrange


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


# Hazards.

OPENING: dict[str, list[str]] = {
    "protect": NOW,
    "watch": ["--connect", "mock", "watch", "guest", "--gfn", "5", "--duration", "0.01"],
    "trace": [
        "--connect", "mock", "trace", "guest", "--symbols", IMAGE, "--duration", "0.01", "target",
    ],
}  # fmt: skip
"""Commands that open altp2m."""


@pytest.mark.parametrize("command", [*OPENING, "state"])
def test_a_hazard_is_told_and_can_be_accepted(
    command: str,
    mocks: list[WatchedMock],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "state":
        with xa.connect("mock") as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
            (tmp_path / "state").write_bytes(xa.capture(altp2m).to_bytes())
        file = str(tmp_path / "state")
        arguments = ["--connect", "mock", "state", "restore", file, "guest", "--duration", "0"]
    else:
        arguments = OPENING[command]
    monkeypatch.setattr(WatchedMock, "options", {"mode": Altp2mMode.MIXED})
    assert cli.main(arguments) == cli.REFUSED
    err = capsys.readouterr().err
    assert "mixed: the domain's altp2m mode is mixed" in err
    assert "--accept mixed" in err
    mocks[-1].assert_as_before()
    assert cli.main([*arguments, "--accept", "mixed"]) == cli.DONE
    assert not mocks[-1].domain(1).active


def test_only_hazards_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice" in usage_error(capsys, *NOW, "--accept", "everything")


# Arguments.


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"xenaltp2m {xa.__version__}\n"


@pytest.mark.parametrize("command", ["list", "protect"])
def test_help_tells_of_json_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    told = capsys.readouterr().out
    arguments = LIST if command == "list" else [*NOW, "--quiet"]
    assert cli.main([*arguments, "--json"]) == cli.DONE
    document = json.loads(capsys.readouterr().out)
    keys = set(document) | {
        key
        for part in document.values()
        for inner in (part if isinstance(part, list) else [part])
        if isinstance(inner, dict)
        for key in inner
        if not key.isdecimal()
    }
    assert {key for key in keys if key not in told} == set()


def test_help_tells_of_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    for code in (cli.DONE, cli.REFUSED, cli.USAGE, cli.LEFTOVER, cli.INTERRUPTED):
        assert f"\n  {code} " in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["lisst"], "invalid choice: 'lisst'"),
        (["--connect", "kvm", "list"], "'kvm' is not libxc, mock or replay:FILE"),
        ([*LIST, "--xen", "4.13"], "'4.13' is not one of 4.14 to 4.22"),
        (["list", "--xen", "4.17"], "add --connect mock"),
        (["protect"], "DOMAIN, --image, --symbol"),
        ([*PROTECT, "--access", "w"], "'w' is not one of n, r, x, rw, rx, rwx"),
        ([*PROTECT, "--duration", "-1"], "'-1' is not a number of seconds"),
        ([*PROTECT, "--duration", "nan"], "'nan' is not a number of seconds"),
        ([*PROTECT, "--duration", "for ever"], "'for ever' is not a number of seconds"),
        ([*PROTECT, "--sha"], "unrecognized arguments: --sha"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    assert message in usage_error(capsys, *arguments)
    assert mocks == []


def test_common_options_stand_before_and_after_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--connect", "mock", "--json", "--xen", "4.20", "list"]) == cli.DONE
    before = capsys.readouterr().out
    assert cli.main(["list", "--connect", "mock", "--json", "--xen", "4.20"]) == cli.DONE
    assert capsys.readouterr().out == before
    assert json.loads(before)["xen"] == "4.20"


# list


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(LIST) == cli.DONE
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "id  name   type  state    memory  vCPUs  altp2m    active",
        " 1  guest  hvm   running  16 MiB  1/2    external  no",
    ]
    assert err == ""


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"kind": "pv"}, {"type": "pv", "altp2m_mode": None, "altp2m_active": None}),
        ({"mode": Altp2mMode.DISABLED}, {"altp2m_mode": "disabled", "altp2m_active": None}),
        ({"vcpus": 4}, {"max_vcpus": 4, "state": "running", "domid": 1, "name": "guest"}),
        ({"kind": "hvm"}, {"vcpus": 2, "max_vcpus": 2, "altp2m_mode": "external"}),
    ],
)
def test_list_as_json(
    options: dict[str, Any],
    shown: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(WatchedMock, "options", options)
    assert cli.main([*LIST, "--json"]) == cli.DONE
    [domain] = json.loads(capsys.readouterr().out)["domains"]
    assert domain | shown == domain


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"paused": True}, "paused"),
        ({"dying": True, "shutdown": True}, "dying"),
        ({"shutdown": True}, "shut down"),
        ({"shutdown": True, "shutdown_reason": 3}, "crashed"),
    ],
)
def test_states_of_a_domain(facts: dict[str, Any], state: str) -> None:
    with xa.connect(MockBackend()) as xen:
        assert isinstance(xen.backend, MockBackend)
        xen.backend.domain_unpause(xen.backend.add_domain("other"))
        [info] = xen.domains()
    assert domains._state(info) == "running"
    fields = {name: getattr(info, name) for name in info.__slots__}
    assert domains._state(xa.DomainInfo(**(fields | facts))) == state


def test_list_where_there_is_no_xen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(backend: str, journal: str, record: str | None) -> xa.Xen:
        assert (backend, journal, record) == ("libxc", "", None)
        raise xa.LibraryError(
            "no usable libxenctrl; tried:\n  libxenctrl.so.4.22: no such file",
            hint=['use the mock backend, connect("mock")'],
        )

    monkeypatch.setattr(xa, "connect", refuse)
    assert cli.main(["list"]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "xenaltp2m: error: no usable libxenctrl",
        "  hint: use the mock backend, --connect mock",
    ]


def test_where_this_is_no_dom0_other_ways_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(backend: str, **_: object) -> xa.Xen:
        raise xa.XenError("interface_open: ENOENT", op="interface_open", errno=2)

    monkeypatch.setattr(xa, "connect", refuse)
    assert cli.main(["list"]) == cli.REFUSED
    assert "  hint: without Xen: --connect mock, or xenaltp2m demo\n" in capsys.readouterr().err


# protect


@pytest.mark.parametrize("version", SUPPORTED, ids="{0[0]}.{0[1]}".format)
def test_protect(
    version: tuple[int, int], capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    release = "{}.{}".format(*version)
    assert cli.main([*NOW, "--xen", release]) == cli.DONE
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"View 1 of domain 1 (guest) on Xen {release} (mock): what differs from the host p2m",
        "",
        "gfns   pages  host  view  shows            symbols",
        "0x101      1  rwx   r-x   copy at 0xff000  target",
    ]
    assert err == ("Undone: vCPUs moved back, view 1 destroyed, 1 page removed, altp2m off.\n")
    [backend] = mocks
    backend.assert_as_before()
    assert backend.target.hex().startswith(TARGET_CODE)


def test_what_the_guest_runs_in(
    meanwhile: Callable[[Callable[[WatchedMock], None]], None], mocks: list[WatchedMock]
) -> None:
    def look(backend: WatchedMock) -> None:
        guest = backend.domain(1)
        assert guest.pauses == 0, "it runs on"
        assert {vcpu.view for vcpu in guest.vcpus} == {1}
        assert backend.read(COPY) == backend.read(TARGET), "real bytes are shown"
        assert backend.touch(1, TARGET, "x") is Outcome.DONE
        assert backend.touch(1, TARGET, "r") is Outcome.DONE
        entry = guest.views[1].table.lookup(TARGET)
        assert entry.mfn == guest.host.lookup(COPY).mfn

    meanwhile(look)
    assert cli.main(PROTECT) == cli.DONE
    mocks[0].assert_as_before()


def test_protect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*NOW, "--symbol", "data", "--symbol", "counter", "--symbol", "data", "--json"]
    assert cli.main(arguments) == cli.DONE
    document = json.loads(capsys.readouterr().out)
    assert {key: document[key] for key in ("xen", "backend", "domid", "name", "image")} == {
        "xen": "4.17",
        "backend": "mock",
        "domid": 1,
        "name": "guest",
        "image": IMAGE,
    }
    assert [symbol["name"] for symbol in document["symbols"]] == ["target", "data", "counter"]
    assert [symbol["matches"] for symbol in document["symbols"]] == [True, True, None]
    assert document["symbols"][1] == {
        "name": "data",
        "address": 0x102000,
        "physical": 0x102000,
        "size": 24,
        "first_gfn": 0x102,
        "count": 1,
        "matches": True,
    }
    assert document["view"] == {"id": 1, "label": "protect"}
    assert document["vcpus"] == {"0": 1, "1": 1}
    assert document["differences"] == [
        {
            "first_gfn": TARGET,
            "count": 3,
            "host_access": "rwx",
            "access": "r-x",
            "remapped_to": COPY,
            "suppress_ve": None,
        }
    ]


def test_protect_without_a_shadow_page(
    capsys: pytest.CaptureFixture[str], mocks: list[WatchedMock]
) -> None:
    assert cli.main([*NOW, "--no-shadow", "--access", "x", "--symbol", "data"]) == cli.DONE
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split() == [
        "0x101..0x102", "2", "rwx", "--x", "its", "own", "pages", "target,", "data",
    ]  # fmt: skip
    assert "removed" not in err
    assert "domain_populate_physmap_exact" not in {call.op for call in mocks[0].calls}
    mocks[0].assert_as_before()


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*NOW, "--quiet"]) == cli.DONE
    assert capsys.readouterr().err == ""


def test_altp2m_that_was_on_stays_on(
    monkeypatch: pytest.MonkeyPatch, mocks: list[WatchedMock], capsys: pytest.CaptureFixture[str]
) -> None:
    unpause = WatchedMock.domain_unpause

    def unpause_with_an_agent_at_work(backend: WatchedMock, domid: int) -> None:
        unpause(backend, domid)
        if not backend.domain(domid).active:
            backend.altp2m_set_domain_state(domid, True)
            backend.altp2m_switch_to_view(domid, backend.altp2m_create_view(domid, 0))

    monkeypatch.setattr(WatchedMock, "domain_unpause", unpause_with_an_agent_at_work)
    assert cli.main(NOW) == cli.DONE
    guest = mocks[0].domain(1)
    assert guest.active
    assert {vcpu.view for vcpu in guest.vcpus} == {1}
    assert [view.exists for view in guest.views][:3] == [True, True, False]
    err = capsys.readouterr().err
    assert "warning: altp2m is on already" in err
    assert "Undone: vCPUs moved back, view 2 destroyed, 1 page removed.\n" in err


def test_a_violation_is_told_once(
    meanwhile: Callable[[Callable[[WatchedMock], None]], None],
    capsys: pytest.CaptureFixture[str],
    mocks: list[WatchedMock],
) -> None:
    def violate(backend: WatchedMock) -> None:
        assert backend.touch(1, TARGET, "w") is Outcome.DONE

    meanwhile(violate)
    assert cli.main([*PROTECT, "--quiet"]) == cli.DONE
    assert capsys.readouterr().err == (
        "xenaltp2m: warning: gfn 0x101 is no longer r-x: now rwx: the guest has violated the view\n"
    )
    mocks[0].assert_as_before()


def test_what_the_guest_wrote_to_a_copy_is_kept(
    meanwhile: Callable[[Callable[[WatchedMock], None]], None],
    capsys: pytest.CaptureFixture[str],
    mocks: list[WatchedMock],
) -> None:
    def write(backend: WatchedMock) -> None:
        backend.write(COPY, 1, b"guest")
        backend.write(TARGET, 100, b"device")

    meanwhile(write)
    assert cli.main([*PROTECT, "--access", "rwx"]) == cli.DONE
    assert "The guest's writes to the copy of gfn 0x101 are kept.\n" in capsys.readouterr().err
    assert mocks[0].target[:6] == bytes.fromhex(TARGET_CODE)[:1] + b"guest"
    assert mocks[0].target[100:106] == b"device"


def test_a_domain_that_goes_meanwhile(
    meanwhile: Callable[[Callable[[WatchedMock], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def destroy(backend: WatchedMock) -> None:
        del backend.machine.domains[1]
        monkeypatch.setattr(backend, "read", lambda gfn: b"")

    meanwhile(destroy)
    assert cli.main(PROTECT) == cli.REFUSED
    err = capsys.readouterr().err
    assert "hint: the domain is gone" in err
    assert "Undone" not in err


def test_an_image_that_is_not_what_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "_load", lambda *_: None)
    assert cli.main([*NOW, "--json"]) == cli.DONE
    out, err = capsys.readouterr()
    assert json.loads(out)["symbols"][0]["matches"] is False
    assert f"warning: the memory of target in the guest differs from {IMAGE}" in err


def test_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated = tmp_path / "truncated.elf"
    truncated.write_bytes(Path(IMAGE).read_bytes()[:500])

    def error_of(code: int, *arguments: str) -> list[str]:
        assert cli.main(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        first, *rest = err.splitlines()
        assert first.startswith("xenaltp2m: error: ")
        return [first.removeprefix("xenaltp2m: error: "), *rest]

    assert error_of(1, "--connect", "mock", "protect", "nobody", *PROTECT[4:]) == [
        "no domain is called 'nobody'",
        "  hint: it was not created, or has ended: xenaltp2m list shows the domains",
    ]
    assert error_of(1, "--connect", "mock", "protect", "7", *PROTECT[4:]) == [
        "there is no domain 7",
        "  hint: it was not created, or has ended: xenaltp2m list shows the domains",
    ]
    assert error_of(2, *PROTECT, "--symbol", "tarjet") == [
        f"{IMAGE} has no symbol 'tarjet'; did you mean target or _start?"
    ]
    [message] = error_of(2, *PROTECT[:4], "--image", str(truncated), *PROTECT[6:])
    assert message.startswith(f"{truncated}: a header table ends ")
    assert error_of(2, *PROTECT[:4], "--image", str(tmp_path / "absent"), *PROTECT[6:]) == [
        f"{tmp_path / 'absent'}: No such file or directory"
    ]
    monkeypatch.setattr(WatchedMock, "options", {"mode": Altp2mMode.DISABLED})
    message, *hints = error_of(1, *PROTECT)
    assert message == "altp2m_get_domain_state (domain 1): EINVAL, Invalid argument"
    assert hints[0].startswith("  hint: the domain was created without altp2m")


def test_a_symbol_of_absurd_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "absurd.elf"
    image.write_bytes(elf64([Sym("all", 0, 1 << 47)], virtual=0, physical=0, size=1 << 47))
    arguments = ["--connect", "mock", "protect", "guest", "--image", str(image), "--symbol", "all"]
    assert cli.main(arguments) == cli.USAGE
    assert "'all' has 34359738368 pages; at most 65536" in capsys.readouterr().err


def test_an_image_too_large_for_the_mock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "_MOCK_MEMORY_LIMIT", 1 << 20)
    assert cli.main(NOW) == cli.USAGE
    assert "the mock's guest has at most 1 MiB" in capsys.readouterr().err


@pytest.mark.parametrize("shadow", ["--shadow", "--no-shadow"])
def test_each_call_may_fail(
    shadow: str, monkeypatch: pytest.MonkeyPatch, mocks: list[WatchedMock]
) -> None:
    assert cli.main([*NOW, shadow, "--quiet"]) == cli.DONE
    first = next(
        at for at, call in enumerate(mocks[0].calls) if call.op == "altp2m_set_domain_state"
    )
    codes = set()
    for nth in range(first + 1, len(mocks[0].calls) + 1):
        monkeypatch.setattr(WatchedMock, "fault", nth)
        code = cli.main([*NOW, shadow, "--quiet"])
        codes.add(code)
        # Handles try again what could not be undone, so that nothing is left even then.
        mocks[-1].assert_as_before()
        assert mocks[-1].target.hex().startswith(TARGET_CODE)
    assert {cli.REFUSED, cli.LEFTOVER} <= codes <= {cli.DONE, cli.REFUSED, cli.LEFTOVER}


# Output.


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main([*NOW, "--quiet"]) == cli.DONE
    assert isinstance(sys.stdout, Terminal)
    shown = sys.stdout.getvalue()
    assert "─────" in shown
    assert "copy at 0xff000" in shown


def test_tables_on_a_terminal_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(LIST) == cli.DONE
    assert isinstance(sys.stdout, Terminal)
    assert sys.stdout.getvalue().startswith("id  name ")


def test_progress_is_for_terminals_and_for_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = console.Console(as_json=False, quiet=False)
    out.progress("counting")(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    out.progress("counting")(1, 2)
    assert isinstance(sys.stderr, Terminal)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(console, "_QUICK_SECONDS", 0)
    progress = out.progress("counting")
    for done in (1, 1, 2):
        progress(done, 2)
    assert sys.stderr.getvalue() == "\rcounting  50 %\rcounting 100 %\r\033[K"
    console.Console(as_json=False, quiet=True).progress("counting")(1, 2)
    assert sys.stderr.getvalue().count("50 %") == 1


def test_control_characters_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MockBackend, "domid_to_name", lambda *_: "a\033[31mb\nc")
    assert cli.main(LIST) == cli.DONE
    assert r"a\x1b[31mb\nc" in capsys.readouterr().out


def test_an_interrupt_before_anything_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "_load", interrupted)
    assert cli.main(PROTECT) == cli.INTERRUPTED


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_hold_and_all_is_undone(
    number: signal.Signals, mocks: list[WatchedMock], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = host.BlockedSignals.arrived

    def send(signals: host.BlockedSignals, seconds: float) -> bool:
        if seconds:
            signal.raise_signal(number)  # to this thread alone, which holds it back
        return arrived(signals, seconds)

    monkeypatch.setattr(host.BlockedSignals, "arrived", send)
    assert cli.main(PROTECT) == cli.DONE
    mocks[0].assert_as_before()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_fault_30_a_signal_that_is_ignored_ends_no_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with host.BlockedSignals() as signals:
            signals.hold_back()
            signal.raise_signal(signal.SIGHUP)
            assert not signals.arrived(0.01)
            signal.raise_signal(signal.SIGTERM)
            assert signals.arrived(60)
    finally:
        signal.signal(signal.SIGHUP, before)


# As a program.


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "xenaltp2m", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_as_a_program() -> None:
    with start(*NOW, "--json") as program:
        out, err = program.communicate(timeout=60)
    assert program.returncode == 0
    assert json.loads(out)["view"]["id"] == 1
    assert err.startswith("Undone: ")


def test_a_wrong_argument_as_a_program() -> None:
    with start("protect") as program:
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (cli.USAGE, "")
    assert err.splitlines()[-1].startswith("xenaltp2m protect: error: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_stopped_undoes_everything(number: signal.Signals) -> None:
    with start(*PROTECT) as program:
        assert program.stdout is not None
        while not program.stdout.readline().startswith("0x101"):
            assert program.poll() is None
        program.send_signal(signal.SIGSTOP)
        for also in (number, signal.SIGINT, signal.SIGTERM):  # people press Ctrl-C again and again
            program.send_signal(also)
        program.send_signal(signal.SIGCONT)
        _, err = program.communicate(timeout=60)
    assert program.returncode == 0
    assert err.splitlines() == [
        "The guest runs in view 1 until Ctrl-C.",
        "Undone: vCPUs moved back, view 1 destroyed, 1 page removed, altp2m off.",
    ]


def test_a_reader_that_goes_away() -> None:
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        [sys.executable, "-m", "xenaltp2m", *NOW],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=write,
        stderr=subprocess.PIPE,
    ) as program:
        os.close(write)
        _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (cli.REFUSED, "")


def refusing(error: BaseException) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise error

    return refuse


LEFT = xa.LeftoverError("closing: not everything could be undone", left=["view 1"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (xa.XenError("refused", errno=2), 1),
        (xa.StateError("altp2m of domain 1 is off"), 1),
        (xa.JournalError("somebody else may write there"), 1),
        (xa.InvalidArgumentError("EINVAL", errno=22), 1),
        (xa.InvalidArgumentError("a domain is a domid, a name or a uuid"), 2),
        (xa.SymbolError("no symbol"), 2),
        (xa.RecordingError("damaged"), 2),
        (LEFT, 3),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_fault_18_exit_codes_are_the_documented_ones(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    left: bool,
) -> None:
    """Whatever notes say; and 3 wherever something is left, whatever else has ended it."""
    error = copy.copy(error)
    error.add_note("the guest is called:  still in place: nothing")
    if left:
        add_failure(error, LEFT)
    monkeypatch.setattr("xenaltp2m.cli.domains.connect", refusing(error))
    assert cli.main(["--connect", "mock", "list"]) == (3 if left else code)
    assert ("still in place: view 1" in capsys.readouterr().err) is (
        left or error.args == LEFT.args
    )


NAMES = ("víews \U0001f600 \ud800", "gäst")
"""A label, and a domain's name."""


def commands_that_show_names(path: Path) -> list[list[str]]:
    view = ViewState("víews \U0001f600", xa.Access.RWX, True, Intervals(), Intervals(), ())
    for name, state in {
        "a": State((view,), origin={"name": NAMES[0], "xen": "4.17", "domain": "ü"}),
        "b": State(()),
    }.items():
        (path / name).write_bytes(state.to_bytes())
    a, b = str(path / "a"), str(path / "b")
    return [
        ["list"], ["list", "--json"], ["views", "gäst"], ["protect", "ünbekannt", *PROTECT[4:]],
        ["state", "show", a], ["state", "show", a, "--json"], ["state", "diff", a, b],
        ["state", "show", a, "--html", str(path / "html"), "--svg", str(path / "svg")],
        ["state", "restore", a, "gäst", "--duration", "0"], ["rescue", "gäst", "--dry-run"],
        ["rescue", NAMES[0]], ["state", "show", "ü"], ["doctor", "gäst"],
        ["watch", "gäst", "--gfn", "5", "--count", "ü"], ["--help"], ["state", "--help"],
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_fault_18_names_that_the_encoding_lacks_are_shown_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr(host, "MOCK_DOMAIN", "gäst")
    for command in commands_that_show_names(tmp_path):
        raws = [io.BytesIO(), io.BytesIO()]
        streams = [io.TextIOWrapper(raw, encoding) for raw in raws]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            try:
                code: object = cli.main(["--connect", "mock", *command])
            except SystemExit as error:
                code = error.code
        assert code in (0, 1, 2), command
        for stream in streams:
            stream.flush()
        text = b"".join(raw.getvalue() for raw in raws)
        assert b"Traceback" not in text, command
        if command[:2] == ["list"]:
            assert ("gäst".encode(encoding, errors="backslashreplace")) in text


def test_fault_18_as_a_program(tmp_path: Path) -> None:
    commands_that_show_names(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "xenaltp2m", "state", "show", str(tmp_path / "a")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert b"v\\xedews \\U0001f600" in done.stdout
    assert done.stderr == b""


def test_fault_18_views_are_imported_into_the_mock_and_taken_out_by_later_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mocked = MockBackend()
    mocked.add_domain("there", memory_kib=16 << 10, vcpus=2)
    with xa.connect(mocked) as xen, xen.domain(1) as dom, dom.altp2m() as altp2m:
        view = altp2m.create_view(label="hooks")
        [shadow] = dom.add_pages()
        dom.memory.write(int(shadow) << 12, b"shadow")
        view.set_access(range(0x20, 0x30), xa.Access.RX)
        view.remap(0x40, shadow, access=xa.Access.X)
        altp2m.switch_to_view(view)
        state = xa.capture(altp2m, contents=True)
    (tmp_path / "a").write_bytes(state.to_bytes())

    def run(*arguments: object) -> int:
        options = ["--connect", "mock", "--journal", str(tmp_path / "journals")]
        return cli.main([*options, *map(str, arguments)])

    assert run("state", "save", tmp_path / "no", "guest") == cli.REFUSED
    assert run("state", "import", tmp_path / "a", "guest") == cli.DONE
    assert run("state", "import", tmp_path / "a", "guest") == cli.REFUSED  # it is there
    capsys.readouterr()
    assert run("views", "guest", "--json") == cli.DONE
    told = json.loads(capsys.readouterr().out)
    assert told["views"][1]["vcpus"] == [0, 1]
    assert [agent["imported"] for agent in told["agents"]] == [True]
    assert run("state", "save", tmp_path / "seen", "guest") == cli.DONE
    [seen] = State.from_bytes((tmp_path / "seen").read_bytes()).views
    assert (0x20, 16, xa.Access.RX) in list(seen.access)
    assert run("state", "verify", tmp_path / "seen", "guest") == cli.DONE
    assert run("state", "export", tmp_path / "b", "guest") == cli.DONE
    assert State.from_bytes((tmp_path / "b").read_bytes()) == state
    assert run("state", "export", tmp_path / "c", "guest") == cli.REFUSED
    assert list((tmp_path / "journals").iterdir()) == []
