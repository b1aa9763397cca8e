# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xenaltp2m views``, ``demo``, ``lab``; what all commands have in common; the manual."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import xenaltp2m as xa
from xenaltp2m import cli
from xenaltp2m.backend import mock
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.cli import demo, lab
from xenaltp2m.types import Altp2mMode, ViewId, ViewInfo

ROOT = Path(__file__).parents[2]
CALLS = 16
"""Of target(), in a pass of checker.c."""
VIEWS = ["--connect", "mock", "views", "guest"]


class Prepared(MockBackend):
    """The mock that the command line opens, with somebody's views in it."""

    options: dict[str, Any]
    views: int
    made: list[Prepared]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.made.append(self)

    def add_domain(self, name: str = "guest", **options: Any) -> int:
        return super().add_domain(name, **(options | self.options))

    def domain_unpause(self, domid: int) -> None:
        super().domain_unpause(domid)
        if self.views and not self.domain(domid).active:
            self.altp2m_set_domain_state(domid, True)
            for _ in range(self.views):
                last = self.altp2m_create_view(domid, self.release.access_numbers[xa.Access.RX])
            self.altp2m_switch_to_view(domid, last)
            self.altp2m_set_visibility(domid, 1, False)
            self.calls.clear()


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> type[Prepared]:
    for name, value in (("made", []), ("options", {}), ("views", 0)):
        monkeypatch.setattr(Prepared, name, value, raising=False)
    monkeypatch.setattr(mock, "MockBackend", Prepared)
    return Prepared


# views


def test_views_of_a_domain_without_any(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(VIEWS) == cli.DONE
    assert capsys.readouterr() == ("Domain 1 (guest): altp2m external, off\n", "")


def test_views_of_somebody(
    prepared: type[Prepared],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepared, "views", 2)
    assert cli.main([*VIEWS, "--xen", "4.20"]) == cli.DONE
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Domain 1 (guest): altp2m external, on",
        "",
        "view  default access  vCPUs in it",
        "   0  rwx",
        "   1  r-x",
        "   2  r-x             0, 1",
    ]
    assert err == "Xen does not report which views are hidden from the guest.\n"


def test_views_as_json(
    prepared: type[Prepared],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepared, "views", 1)
    assert cli.main([*VIEWS, "--json", "--quiet"]) == cli.DONE
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "xen": "4.17",
        "backend": "mock",
        "domid": 1,
        "name": "guest",
        "altp2m_mode": "external",
        "altp2m_active": True,
        "views": [
            {"id": 0, "default_access": "rwx", "vcpus": [], "visible": None},
            {"id": 1, "default_access": "r-x", "vcpus": [0, 1], "visible": None},
        ],
        "agents": [],
    }


def test_views_changes_nothing(prepared: type[Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "views", 3)
    assert cli.main(VIEWS) == cli.DONE
    changing = re.compile("_(set|create|destroy|switch|change|enable|disable|pause|populate)")
    operations = {call.op for call in prepared.made[-1].calls}
    assert "altp2m_get_mem_access" in operations
    assert not {op for op in operations if changing.search(op)}


def test_views_tells_of_agents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MockBackend()
    backend.add_domain("guest", vcpus=1)
    with (
        xa.connect(backend, journal=tmp_path) as xen,
        xen.domain("guest") as dom,
        dom.altp2m() as altp2m,
    ):
        altp2m.create_view(label="hooks")
        connect = xa.connect
        with monkeypatch.context() as patch:
            patch.setattr(xa, "connect", lambda *_, **__: connect(backend, journal=tmp_path))
            patch.setattr(backend, "close", lambda: None)
            assert cli.main(["views", "guest"]) == cli.DONE
            assert f"on, process {os.getpid()} works on it" in capsys.readouterr().out
            assert cli.main(["views", "guest", "--json"]) == cli.DONE
        document = json.loads(capsys.readouterr().out)
        assert document["agents"] == [{"pid": os.getpid(), "running": True, "imported": False}]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ({"kind": "pv"}, cli.REFUSED, "error: domain 1 is PV, and has no altp2m"),
        ({"mode": Altp2mMode.DISABLED}, cli.DONE, "Domain 1 (guest): altp2m disabled, off"),
    ],
)
def test_views_where_there_can_be_none(
    options: dict[str, Any],
    code: int,
    told: str,
    prepared: type[Prepared],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepared, "options", options)
    assert cli.main(VIEWS) == code
    assert told in "".join(capsys.readouterr())


def test_existing_views() -> None:
    backend = MockBackend((4, 20))
    backend.add_domain("guest", vcpus=2)
    with xa.connect(backend) as xen, xen.domain("guest") as dom:
        assert dom.existing_views() == []
        with dom.altp2m() as altp2m:
            views = [altp2m.create_view(xa.Access.RX) for _ in range(3)]
            views[1].close()
            altp2m.switch_to_view(views[2])
            assert dom.existing_views() == [
                ViewInfo(ViewId(0), xa.Access.RWX, ()),
                ViewInfo(ViewId(1), xa.Access.RX, ()),
                ViewInfo(ViewId(3), xa.Access.RX, (0, 1)),  # type: ignore[arg-type]
            ]


# demo


def test_the_demo(capsys: pytest.CaptureFixture[str], prepared: type[Prepared]) -> None:
    count = 2 * CALLS + 8
    assert cli.main(["demo", "--count", str(count)]) == cli.DONE
    out, err = capsys.readouterr()
    head, first, *_, more, last = out.splitlines()
    assert head.split()[:3] == ["call", "vCPU", "rip"]
    assert first.split()[0] == "1"
    assert more == f"and {count - 10} more"
    assert last == "The guest's self-check noticed nothing in 2 passes."
    assert err.endswith(
        "Undone: breakpoint removed, vCPUs moved back, monitor closed, altp2m off.\n"
    )
    guest = prepared.made[-1].domain(1)
    assert not guest.active
    assert not guest.listened


def test_the_demo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--count", "3", "--json", "--quiet", "--xen", "4.20"]) == cli.DONE
    document = json.loads(capsys.readouterr().out)
    assert document["xen"] == "4.20"
    assert document["image"] == str(demo.IMAGE)
    assert [call["number"] for call in document["calls"]] == [1, 2, 3]
    # From the first call on: rbx counts down, rsi is what was called before this pass.
    assert [(call["rbx"], call["rsi"]) for call in document["calls"]] == [
        (CALLS - number, 0) for number in range(3)
    ]
    assert {call["caller_symbol"].partition("+")[0] for call in document["calls"]} == {"run"}
    assert document["noticed"] == 0


def test_fault_15_the_demo_waits_for_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--count", "3"]) == cli.DONE
    *calls, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in calls] == ["call", "1", "2", "3"]
    assert last == "The guest's self-check noticed nothing in 1 pass."


def test_the_demo_s_guest_is_the_example() -> None:
    example = ROOT / "examples" / "guest" / "checker.elf"
    assert demo.IMAGE.read_bytes() == example.read_bytes(), "make guest copies it"


def test_the_demo_notices_what_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a guest whose counter runs backwards its self-check has much to say."""
    content = demo.IMAGE.read_bytes()
    increments, decrements = bytes.fromhex("ff0500701000"), bytes.fromhex("ff0d00701000")
    assert content.count(increments) == 1
    changed = tmp_path / "checker.elf"
    changed.write_bytes(content.replace(increments, decrements))
    monkeypatch.setattr(demo, "IMAGE", changed)
    assert cli.main(["demo", "--count", "33", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["noticed"] > 0


def test_the_demo_without_the_simulator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    assert cli.main(["demo"]) == cli.REFUSED
    assert capsys.readouterr().err.splitlines() == [
        "xenaltp2m: error: the guest is simulated by unicorn, which is not installed",
        "  hint: pip install 'xenaltp2m[sim]'",
    ]


def test_the_demo_on_xen_without_its_guest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect = xa.connect
    monkeypatch.setattr(xa, "connect", lambda *_, **__: connect(MockBackend()))
    assert cli.main(["demo", "--connect", "libxc"]) == cli.REFUSED
    error, start, otherwise = capsys.readouterr().err.splitlines()
    assert error == "xenaltp2m: error: there is no domain 'checker', the demo's guest"
    assert start.startswith("  hint: start it: xl create -p /dev/null 'name=\"checker\"'")
    assert f"'kernel=\"{demo.IMAGE}\"'" in start
    assert otherwise == "  hint: without Xen: omit --connect"


# lab


def test_the_lab_of_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: ran.append(arguments))
    assert cli.main(["lab", "shell", "--xen", "4.20"]) == cli.DONE
    assert cli.main(["lab", "test"]) == cli.DONE
    programs = ROOT / "tests" / "lab"
    assert ran == [
        [sys.executable, str(programs / "shell.py"), "--install", "--xen", "4.20"],
        [sys.executable, str(programs / "suite.py"), "--xen", "4.17"],
    ]
    for _, program, *_ in ran:
        help_text = subprocess.run(
            [sys.executable, program, "--help"], capture_output=True, text=True, check=True
        )
        assert "--xen" in help_text.stdout


def test_the_lab_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab, "_TREE", tmp_path)
    assert cli.main(["lab", "shell"]) == cli.REFUSED
    told = capsys.readouterr().err
    assert "the lab is part of the source tree" in told
    assert f"hint: in a source tree of {xa.__version__}: make lab-shell, make test-xen" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lab"], "required: action"),
        (["lab", "shell", "--connect", "mock"], "lab takes none of --connect, --record and --json"),
        (["lab", "shell", "--xen", "4.15"], "the lab has Xen 4.14, 4.17 and 4.20"),
        (["views"], "required: DOMAIN"),
        (["demo", "--connect", "replay:x"], "the demo runs on libxc or mock"),
        (["demo", "--count", "0"], "'0' is not a number of calls"),
        (["demo", "--connect", "libxc", "--xen", "4.17"], "add --connect mock"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.USAGE
    assert message in capsys.readouterr().err.splitlines()[-1]


# What all commands have in common.


def parsers() -> dict[str, argparse.ArgumentParser]:
    for action in cli.parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError


@pytest.mark.parametrize("name", parsers())
def test_options_of_one_name_mean_one_thing(name: str) -> None:
    """And each has its help; no other name for what one of these is."""
    parser = parsers()[name]
    options = {option: action for action in parser._actions for option in action.option_strings}
    assert {"--connect", "--xen", "--json", "--quiet", "--help"} <= set(options)
    assert not {"--hold", "--timeout", "--time", "--verbose", "--silent"} & set(options)
    assert all(action.help for action in parser._actions)
    others = [other for other in parsers().values() if other is not parser]
    for option, action in options.items():
        for other in others:
            twin = other._option_string_actions.get(option)
            assert twin is None or (twin.metavar, twin.nargs) == (action.metavar, action.nargs)


def test_colours_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("TERM", "xterm-256color")
    for no_colour, expected in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        with monkeypatch.context() as patch:
            patch.setattr(sys.stderr, "isatty", lambda: True)
            assert cli.main(["views", "nobody", "--connect", "mock"]) == cli.REFUSED
        told = capsys.readouterr().err
        assert ("\x1b[1;31mxenaltp2m: error\x1b[0m" in told) is expected
        assert "xenaltp2m: error: " in re.sub(r"\x1b\[[\d;]*m", "", told)
    assert cli.main(["views", "nobody", "--connect", "mock"]) == cli.REFUSED
    assert "\x1b" not in capsys.readouterr().err


# The manual page, and what shells complete.

MANUAL = ROOT / "docs" / "manual"


def test_the_manual_is_up_to_date() -> None:
    made = subprocess.run(
        [sys.executable, str(MANUAL / "make.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, f"make manual\n{made.stdout}{made.stderr}"


def test_the_manual_has_everything() -> None:
    page = (MANUAL / "xenaltp2m.1").read_text().replace("\\-", "-")
    for name, parser in parsers().items():
        section = page.partition(f"\n.SS {name}\n")[2].partition("\n.SS ")[0]
        common = set(cli.parser()._option_string_actions)
        for option in set(parser._option_string_actions) - common:
            assert option in section, f"{name} {option}"
    for code in (cli.DONE, cli.REFUSED, cli.USAGE, cli.LEFTOVER, cli.INTERRUPTED):
        assert f"\n.TP\n{code}\n" in page.partition(".SH EXIT STATUS")[2]
    assert str(ROOT) not in page


def test_the_manual_is_sound_troff() -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    shown = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(MANUAL / "xenaltp2m.1")],
        capture_output=True, text=True, check=True, env=os.environ | {"MANWIDTH": "100"},
    )  # fmt: skip
    assert shown.stderr == ""
    assert "EXIT STATUS" in shown.stdout


def completed(line: str) -> list[str]:
    """What bash offers."""
    script = f"""
        source {MANUAL / "xenaltp2m"}
        COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
        _shtab_xenaltp2m; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("xenaltp2m vi", {"views"}),
        ("xenaltp2m --connect ''", {"libxc", "mock", "replay:"}),
        ("xenaltp2m lab ''", {"shell", "test"}),
        ("xenaltp2m watch --dur", {"--duration"}),
        ("xenaltp2m watch guest --image READ", {"README.md"}),
        ("xenaltp2m state show READ", {"README.md"}),
    ],
)
def test_bash_completes(line: str, offered: set[str]) -> None:
    assert set(completed(line)) == offered


def test_bash_completes_every_command_and_option() -> None:
    assert set(parsers()) <= set(completed("xenaltp2m ''"))
    for name, parser in parsers().items():
        assert set(parser._option_string_actions) == set(completed(f"xenaltp2m {name} -"))


@pytest.mark.parametrize(("shell", "name"), [("zsh", "_xenaltp2m"), ("fish", "xenaltp2m.fish")])
def test_other_shells_read_theirs(shell: str, name: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(MANUAL / name)], check=True)
