# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line on the mock, whose guest executes the image it is given."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xenaltp2m import cli
from xenaltp2m.symbols import Image

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
    assert cli.main([*protect, "--symbol", "target2", "--hold", "0", "--json"]) == cli.DONE
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
    assert cli.main([*protect, "--symbol", "target", "--hold", "0", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["symbols"][0]["matches"] is True
