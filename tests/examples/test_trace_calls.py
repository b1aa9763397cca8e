# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demonstration in the simulator: what it shows is what the guests' sources make them do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xenaltp2m.tools.symbols import Image

from .test_examples import EXAMPLES, run

CHECKER, PAGED = (EXAMPLES / "guest" / f"{name}.elf" for name in ("checker", "paged"))
CALLS, SELDOM = 16, 16  # of checker.c
SPACES, CALLS_IN_SPACE = 2, 8  # of paged.c
CALL, CALL_LENGTH = 0xE8, 5


def calls_of(image: Path, symbol: str) -> set[int]:
    """Where the calls of a function return to: behind each `call` of it in the image's code."""
    content = Image.open(image)
    target = content.address(symbol)
    found = set()
    for segment in content.segments:
        for at in range(len(segment.data) - CALL_LENGTH):
            after = segment.virtual + at + CALL_LENGTH
            offset = int.from_bytes(segment.data[at + 1 : at + CALL_LENGTH], "little", signed=True)
            if segment.data[at] == CALL and after + offset == target:
                found.add(after)
    return found


def traced(*arguments: str) -> Any:
    done = run("trace_calls.py", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_checker() -> None:
    image = Image.open(CHECKER)
    count = (SELDOM + 1) * CALLS + 1  # into the second pass that checks everything
    found = traced("--count", str(count))
    calls = found["calls"]
    assert len(calls) == count
    assert {call["rip"] for call in calls} == {image.address("target")}
    assert {call["return"] for call in calls} == calls_of(CHECKER, "target")
    [stack] = {call["rsp"] for call in calls}
    assert any(segment.writable and segment.holds(stack, 4) for segment in image.segments)
    for number, call in enumerate(calls):  # the loop's counter, and `before` of pass()
        assert (call["rbx"], call["rsi"]) == (CALLS - number % CALLS, number // CALLS * CALLS)
    assert (found["noticed"], found["passes"]) == (0, SELDOM + 1)


def test_paged() -> None:
    passes = 3
    count = passes * SPACES * CALLS_IN_SPACE + 1
    found = traced("--image", str(PAGED), "--symbol", "target64", "--count", str(count))
    assert [(call["rdi"], call["rsi"], call["rdx"]) for call in found["calls"]] == [
        (number, space, made)
        for made in range(passes + 1)
        for space in range(SPACES)
        for number in range(CALLS_IN_SPACE)
    ][:count]
    [back] = {call["return"] for call in found["calls"]}
    assert str(Image.open(PAGED).locate(back)).startswith("run+")
    assert (found["noticed"], found["passes"]) == (0, passes)


def test_the_table() -> None:
    done = run("trace_calls.py", "--count", str(2 * CALLS))
    assert done.returncode == 0, done.stderr
    head, first, *_, more, last = done.stdout.splitlines()
    assert head.split() == ["call", "rip", "rsp", "rbx", "rdi", "rsi", "rdx", "returns", "to"]
    [back] = calls_of(CHECKER, "target")
    image = Image.open(CHECKER)
    assert first.split()[:2] == ["1", f"{image.address('target'):#x}"]
    assert first.split()[-2:] == [f"{back:#x}", str(image.locate(back))]
    assert more == f"and {2 * CALLS - 10} more"
    assert last == "The guest's self-check noticed nothing in 1 passes."


def test_the_self_check_checks(tmp_path: Path) -> None:
    content = CHECKER.read_bytes()
    increments, decrements = bytes.fromhex("ff0500701000"), bytes.fromhex("ff0d00701000")
    assert content.count(increments) == 1
    image = tmp_path / "changed.elf"
    image.write_bytes(content.replace(increments, decrements))
    found = traced("--image", str(image), "--count", str(2 * CALLS + 1))
    assert (found["noticed"], found["passes"]) == (4, 2)  # what it reads, and what it counts
