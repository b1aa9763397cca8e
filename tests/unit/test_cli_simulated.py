# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line on the mock, whose guest executes the image it is given."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xenaltp2m import cli
from xenaltp2m.cli import trace as cli_trace
from xenaltp2m.tools.symbols import Image
from xenaltp2m.tools.symbols.prototypes import Type

GUESTS = Path(__file__).parents[2] / "examples" / "guest"
CHECKER = GUESTS / "checker.elf"
CALLS, CALLS_OF_PATCHED = 16, 2
"""In a pass of checker.c."""


def watched(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[Any], Any]:
    watch = ["--connect", "mock", "watch", "guest", "--image", str(CHECKER), "--json", "--quiet"]
    assert cli.main([*watch, *arguments]) == cli.DONE
    *hits, summary = map(json.loads, capsys.readouterr().out.splitlines())
    return hits, summary["summary"]


def test_watch_hears_of_what_the_code_does(capsys: pytest.CaptureFixture[str]) -> None:
    instructions = 2 * CALLS + 2 * CALLS_OF_PATCHED  # each function has two
    hits, _ = watched(
        capsys, "--symbol", "target", "--access", "rw", "--count", str(2 * instructions)
    )
    entered = Counter(hit["symbol"] for hit in hits if "+" not in hit["symbol"])
    assert entered == {"target": 2 * CALLS, "patched": 2 * CALLS_OF_PATCHED}
    assert {(hit["vcpu"], hit["tried"]) for hit in hits} == {(0, "--x")}
    assert all(hit["rip"] == hit["gla"] for hit in hits)


def test_watch_hears_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    hits, _ = watched(capsys, "--symbol", "counter", "--count", "5")
    assert {(hit["symbol"], hit["tried"], hit["target"]) for hit in hits} == {
        ("target", "rw-", "counter")
    }


def test_protect_has_the_guest_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.open(CHECKER)
    protect = ["--connect", "mock", "protect", "guest", "--image", str(CHECKER)]
    assert cli.main([*protect, "--symbol", "target2", "--duration", "0", "--json"]) == cli.DONE
    document = json.loads(capsys.readouterr().out)
    assert document["symbols"][0]["matches"] is True
    [difference] = document["differences"]
    assert difference["first_gfn"] == image.gfns("target2").start


def test_an_image_of_no_pvh_guest_is_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "other.elf"
    image.write_bytes(CHECKER.read_bytes().replace(b"Xen\0", b"Not\0"))  # the note's owner
    protect = ["--connect", "mock", "protect", "guest", "--image", str(image)]
    assert cli.main([*protect, "--symbol", "target", "--duration", "0", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["symbols"][0]["matches"] is True


RACER = GUESTS / "racer.elf"


def traced(
    capsys: pytest.CaptureFixture[str], *arguments: str, image: Path = RACER
) -> tuple[list[Any], Any]:
    trace = ["--connect", "mock", "trace", "guest", "--symbols", str(image), "--json", "--quiet"]
    assert cli.main([*trace, *arguments]) == cli.DONE
    *told, summary = map(json.loads, capsys.readouterr().out.splitlines())
    return told, summary["summary"]


def test_trace_tells_calls_and_returns(capsys: pytest.CaptureFixture[str]) -> None:
    told, summary = traced(capsys, "hit:u", "--returns", "--count", "40")
    calls = [one for one in told if one["event"] == "call"]
    assert len(calls) == 40
    assert {one["caller_symbol"] for one in calls} == {"wrong_after_hit+0x2e"}
    for vcpu in (0, 1):
        own = [one for one in told if one["vcpu"] == vcpu]
        passed = [one["arguments"]["0"] for one in own if one["event"] == "call"]
        assert passed == list(range(passed[0], passed[0] + len(passed)))
        came_back = [one["value"] for one in own if one["event"] == "return"]
        assert came_back == [3 * n + 1 for n in passed][: len(came_back)]
    assert summary["by_function"] == {"hit": summary["calls"]}
    assert (summary["dropped"], summary["unfinished"], summary["reapplied"]) == (0, 0, 0)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_fault_15_trace_counts_what_it_tells(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two vCPUs call at once: what is beyond the count is no part of the trace."""
    told, summary = traced(capsys, "hit", "--count", str(count))
    assert len(told) == summary["calls"] == summary["by_function"]["hit"] == count
    trace = ["--connect", "mock", "trace", "guest", "--symbols", str(RACER), "hit"]
    assert cli.main([*trace, "--count", str(count)]) == cli.DONE
    out = capsys.readouterr().out
    assert out.count(" hit(?)") == count
    assert re.search(rf"^{count} calls? in ", out, re.MULTILINE)


def test_trace_leaves_out_what_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    told, summary = traced(capsys, "hit", "--rate", "0.001", "--duration", "0.3")
    assert len(told) == 1
    assert summary["dropped"] == summary["calls"] - 1 > 0
    told, summary = traced(capsys, "hit", "--only-cr3", "0x1000", "--duration", "0.3")
    assert told == []
    assert summary["calls"] > 0


def test_trace_in_a_64_bit_guest(capsys: pytest.CaptureFixture[str]) -> None:
    """target64(a, b, c) returns a + 2b + 3c."""
    told, _ = traced(
        capsys, "target64:u,u,u", "--returns", "--count", "9", image=GUESTS / "paged.elf"
    )
    calls = [list(one["arguments"].values()) for one in told if one["event"] == "call"]
    values = [one["value"] for one in told if one["event"] == "return"]
    assert values == [a + 2 * b + 3 * c for a, b, c in calls][: len(values)]
    assert len(calls) == 9


DESCRIBED = r"""
__asm__(".section .note.pvh, \"a\"; .long 4, 4, 18; .asciz \"Xen\"; .long _start; .text");
__attribute__((noinline)) int said(const char *text, int number, char letter)
{ __asm__ volatile(""); return number - 2; }
char stack[256];
void again(void) { for (;;) said("hello\n", -3, 'x'); }
__asm__(".globl _start; _start: mov $stack + 256, %esp; jmp again");
"""


def test_trace_shows_what_the_image_says_of_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "guest.elf"
    subprocess.run(
        ["gcc", "-m32", "-g", "-O1", "-ffreestanding", "-fno-pie", "-no-pie", "-nostdlib",
         "-static", "-fno-stack-protector", "-fcf-protection=none",
         "-Wl,-Ttext=0x100000,--build-id=none", "-x", "c", "-", "-o", str(image)],
        input=DESCRIBED, text=True, check=True,
    )  # fmt: skip
    told, _ = traced(capsys, "said", "--count", "2", image=image)
    assert [one["arguments"] for one in told] == [
        {"text": "hello\n", "number": -3, "letter": ord("x")}
    ] * 2
    trace = ["--connect", "mock", "trace", "guest", "--symbols", str(image), "said", "--returns"]
    assert cli.main([*trace, "--count", "2"]) == cli.DONE
    shown = capsys.readouterr()
    assert r'said(text="hello\n", number=-3, letter=120)  from again+' in shown.out
    assert "said returned = -5" in shown.out
    assert "int said(const char * text, int number, char letter)" in shown.err
    assert re.search(r"^said +\d+ +\d+$", shown.out, re.MULTILINE)


CLONED = r"""
__asm__(".section .note.pvh, \"a\"; .long 4, 4, 18; .asciz \"Xen\"; .long _start; .text");
#define APART __attribute__((noinline))
static APART int cloned(int a, int seven, const char *text)
{ __asm__ volatile("" :: "r"(text)); return a * seven; }
APART long long wide(int a, long long b) { __asm__ volatile(""); return a - b; }
APART float half(float of) { __asm__ volatile(""); return of / 2; }
static APART int unused(int a) { __asm__ volatile("" :: "r"(a)); return a; }
extern int plain(int); __asm__(".type plain, @function; plain: ret; .size plain, . - plain");
char stack[256];
const char *volatile text = "hey\n"; volatile int sum;
void again(void)
{
    for (;;) { sum += cloned(wide(-1, 5LL << 32) != 1, 7, text); half(3.5); plain(1); unused(2); }
}
__asm__(".globl _start; _start: mov $stack + 256, %esp; fninit; jmp again");
"""


@pytest.mark.parametrize("flags", ["", "-mregparm=3"])
def test_fault_13_trace_shows_what_was_passed(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "guest.elf"
    subprocess.run(
        ["gcc", "-m32", "-g", "-O2", "-ffreestanding", "-fno-pie", "-no-pie", "-nostdlib",
         "-static", "-fno-stack-protector", "-fcf-protection=none", *flags.split(),
         "-Wl,-Ttext=0x100000,--build-id=none", "-x", "c", "-", "-o", str(image)],
        input=CLONED, text=True, check=True,
    )  # fmt: skip
    [name] = [one.name for one in Image.open(image).symbols if one.name.startswith("cloned")]
    assert name != "cloned"
    [unused] = [one.name for one in Image.open(image).symbols if one.name.startswith("unused")]
    assert ".isra" in unused
    functions = (name, "wide", "half", "plain", unused)
    trace = ["--connect", "mock", "trace", "guest", "--symbols", str(image), *functions]
    assert cli.main([*trace, "--returns", "--count", "10"]) == cli.DONE
    shown = capsys.readouterr()
    for text in (
        rf'{name}(a=1, seven=7, text="hey\n")', f"{name} returned = 7", "wide(a=-1, b=21474836480)",
        "wide returned = -21474836481", "half(of=3.5)", "half returned = ?", "plain(?)",
        f"{unused}(a=2)", f"{unused} returned = ?",
    ):  # fmt: skip
        assert text in shown.out
    assert "plain(void)" not in shown.err
    told, _ = traced(capsys, *functions, "--returns", "--count", "10", image=image)
    by_name = {one["function"]: one for one in told if one["event"] == "call"}
    assert by_name[name]["arguments"] == {"a": 1, "seven": 7, "text": "hey\n"}
    assert by_name["wide"]["arguments"] == {"a": -1, "b": 5 << 32}
    assert by_name["half"]["arguments"] == {"of": 3.5}
    values = {one["function"]: one["value"] for one in told if one["event"] == "return"}
    assert (values[name], values["wide"], values["half"]) == (7, -1 - (5 << 32), None)


def test_fault_13_numbers_of_a_32_bit_guest() -> None:
    """They have 4 bytes where the argument says no more."""
    assert cli_trace._number(0xFFFF_FFFE, Type("", 0, "signed"), 4) == -2
    assert cli_trace._number(0xFFFF_FFFE, Type("", 0, "signed"), 8) == 0xFFFF_FFFE
    assert cli_trace._number(0xFFFF_FFFE, Type("", 0, "word"), 4) == -2


def test_trace_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    trace = ["--connect", "mock", "trace", "guest", "--symbols", str(RACER)]
    assert cli.main([*trace, "hit", "--count", "1"]) == cli.DONE
    assert f"Arguments are not shown: {RACER} has no debugging information." in (
        capsys.readouterr().err
    )
    assert cli.main([*trace, "hot"]) == cli.USAGE
    assert "did you mean hit?" in capsys.readouterr().err
    for wrong in ("hit:q", "hit:99", ":3", "hit:"):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*trace, wrong])
        assert "after the name, give" in capsys.readouterr().err
    for options in (["--top", "--json"], ["--rate", "0"], ["--count", "0"], ["--only-cr3", "x"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*trace, "hit", *options])
    assert capsys.readouterr().out == ""


def test_watch_of_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a page with counters of all vCPUs, the second one's."""
    image = Image.open(RACER)
    made = image.physical(image.symbol("made"))
    watch = ["--connect", "mock", "watch", "guest", "--image", str(RACER)]
    options = ["--bytes", f"{made + 64:#x}:4", "--count", "20"]
    assert cli.main([*watch, *options, "--json", "--quiet"]) == cli.DONE
    *hits, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert {(hit["vcpu"], hit["tried"], hit["offset"]) for hit in hits} == {(1, "rw-", 64)}
    assert {hit["target"] for hit in hits} == {"made+0x40"}
    assert len(hits) == 20
    assert summary["summary"]["passed"] >= 18
    assert cli.main([*watch, *options, "--access", "n"]) == cli.DONE
    out, err = capsys.readouterr()
    assert "4 bytes at" in err
    assert "views destroyed, altp2m off" in err
    assert "r--" in out
    assert "other accesses to the same pages" in out


def test_watch_of_a_symbol_s_own_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ["--connect", "mock", "watch", "guest", "--image", str(CHECKER), "--symbol", "counter"]
    assert cli.main([*watch, "--exact", "--count", "3", "--json", "--quiet"]) == cli.DONE
    *hits, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert {hit["symbol"] for hit in hits} == {"target"}
    assert summary["summary"]["passed"] == 0
    for wrong, why in (
        (["--exact", "--gfn", "1"], "either bytes or whole pages"),
        (["--exact", "--access", "rx"], "for bytes, use --access r"),
        (["--bytes", "12"], "is not ADDRESS:LENGTH"),
        (["--bytes", "0:0"], "is not ADDRESS:LENGTH"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*watch, *wrong])
        assert why in capsys.readouterr().err


def ending(tmp_path: Path) -> Path:
    """The racer, which has a CLI and a HLT as its first instructions."""
    image = Image.open(RACER)
    start = image.address("_start")
    code = next(
        part.data[start - part.address :][:16]
        for part in image.segments
        if 0 <= start - part.address < len(part.data)
    )
    content = RACER.read_bytes()
    assert content.count(code) == 1
    path = tmp_path / "ends.elf"
    path.write_bytes(content.replace(code, b"\xfa\xf4" + code[2:]))
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["trace", "guest", "hit", "--symbols"],
        ["watch", "guest", "--symbol", "hit", "--access", "rw", "--image"],
        ["protect", "guest", "--symbol", "hit", "--duration", "0", "--image"],
    ],
    ids=lambda command: command[0],
)
def test_fault_33_a_guest_that_ends_at_once_begins_when_the_agent_is_ready(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["--connect", "mock", *command, str(ending(tmp_path)), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert status == cli.DONE
    if command[0] != "protect":
        ended, _ = map(json.loads, lines)
        assert (ended["event"], ended["shutdown_reason"]) == ("DomainEnded", 0)
