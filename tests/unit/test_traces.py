# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mock gives every answer that real Xen gave, and a mock that does not is found out."""

from __future__ import annotations

import dataclasses
import json
import lzma
import sys
from errno import EBUSY, EINVAL, ENODEV, EOPNOTSUPP, ESRCH
from pathlib import Path
from typing import Any

import pytest

from xenaltp2m.backend.mock.machine import Domain, HypercallError
from xenaltp2m.backend.mock.p2m import P2m

LAB = Path(__file__).resolve().parents[1] / "lab"
sys.path.insert(0, str(LAB))

import replay  # noqa: E402 - a program of the lab, not of the package

TRACES = sorted((LAB / "traces").glob("*.jsonl.xz"))


def test_there_are_traces() -> None:
    assert TRACES
    assert sum(trace.stat().st_size for trace in TRACES) <= 2 << 20


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_the_mock_answers_as_xen_did(trace: Path) -> None:
    result = replay.replay(replay.read(trace))
    assert result.steps > 1000
    assert not result.differences, "\n".join(map(str, result.differences))
    assert result.agree == result.steps


def programs(count: int = 60) -> list[replay.Program]:
    """Some recorded programs."""
    return list(replay.read(LAB / "traces" / "xen-4.22.0-random.jsonl.xz"))[:count]


def test_a_wrong_errno_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Domain.destroy_view

    def wrong(self: Domain, index: int) -> None:
        try:
            right(self, index)
        except HypercallError:
            raise HypercallError(EINVAL) from None

    monkeypatch.setattr(Domain, "destroy_view", wrong)
    result = replay.replay(programs())
    first = result.differences[0]
    assert (first.op, first.xen, first.mock) == (
        "altp2m_destroy_view",
        replay.Answer(-1, EBUSY, None),
        replay.Answer(-1, EINVAL, None),
    )
    assert result.agree < result.steps


def test_a_lost_propagation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Domain, *change: object) -> int:
        return 0

    monkeypatch.setattr(Domain, "_propagate", nothing)
    assert replay.replay(programs()).differences


def test_a_reset_of_one_view_too_few_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = P2m.flush
    seen: list[P2m] = []

    def wrong(self: P2m) -> None:
        """Flush all but every tenth time."""
        seen.append(self)
        if len(seen) % 10:
            right(self)

    monkeypatch.setattr(P2m, "flush", wrong)
    assert replay.replay(programs()).differences


def test_another_release_answers_differently() -> None:
    """The programs tell releases apart: what 4.22 said is not what 4.20 says."""
    older = [dataclasses.replace(program, xen="4.20") for program in programs(count=266)]
    assert replay.replay(older).differences


def test_a_changed_setup_answers_differently() -> None:
    """They tell CPUs apart: one where a superpage keeps its execute right hides fewer of them."""
    recorded = programs(count=266)
    setup = dataclasses.replace(recorded[0].setup, executable_superpages=True)
    changed = [dataclasses.replace(program, setup=setup) for program in recorded]
    assert replay.replay(changed).differences


def write(path: Path, *lines: str) -> Path:
    with lzma.open(path, "wt") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def test_the_program_says_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = programs(count=1)[0]
    steps = [
        ("altp2m_create_view", [7], replay.Answer(0, 0, 1)),
        ("altp2m_destroy_view", [1], replay.Answer(-1, EBUSY, None)),
        ("altp2m_destroy_view", [1], replay.Answer(0, 0, None)),
    ]
    bad = replay.Program("4.22", 7, 1, replay.Setup(), steps)
    trace = write(tmp_path / "t.jsonl.xz", good.line(), bad.line())
    total = len(good.steps) + 3

    monkeypatch.setattr(sys, "argv", ["replay.py", str(trace)])
    assert replay.main() == 1
    report = capsys.readouterr().out
    assert report.startswith(f"agree {total - 2} of {total} ")
    assert "seed 7 step 1: altp2m_destroy_view(1): Xen (-1, 16, None), mock (0, 0, None)" in report

    monkeypatch.setattr(sys, "argv", ["replay.py", "--json", str(trace)])
    assert replay.main() == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["agree"], report["steps"], report["programs"]) == (total - 2, total, 2)
    assert [d["seed"] for d in report["differences"]] == [7]

    monkeypatch.setattr(sys, "argv", ["replay.py", str(write(tmp_path / "g.xz", good.line()))])
    assert replay.main() == 0


def test_programs_survive_a_round_trip() -> None:
    for program in programs(count=3):
        assert replay.Program.parse(program.line()) == program


def test_an_unknown_condition_is_refused() -> None:
    """A trace recorded under a condition this replay does not know proves nothing."""
    fields = json.loads(programs(count=1)[0].line())
    fields["setup"]["nested"] = True
    with pytest.raises(TypeError, match="nested"):
        replay.Program.parse(json.dumps(fields))


@pytest.mark.parametrize(
    ("setup", "call", "answers"),
    [
        ({"listened": True}, ("get_mem_access", [0x100]), ((-1, ENODEV, None), (0, 0, 7))),
        (
            {"started": True},
            ("altp2m_get_mem_access", [0, 0xFEE00]),
            ((-1, ESRCH, None), (0, 0, 7)),
        ),
        ({"vcpus": 4}, ("altp2m_get_vcpu_p2m_idx", [3]), ((-1, EINVAL, None), (0, 0, 0))),
        ({"mode": "mixed"}, ("hvm_param_get", [35]), ((0, 0, 2), (0, 0, 1))),
        ({"view_count": 1}, ("altp2m_create_view", [7]), ((0, 0, 1), (-1, EINVAL, None))),
        (
            {"virtualisation_exceptions": True},
            ("altp2m_set_vcpu_disable_notify", [0]),
            ((-1, EOPNOTSUPP, None), (0, 0, None)),
        ),
        (
            {"physical_address_bits": 36},
            ("altp2m_set_suppress_ve_multi", [0, 1 << 36, (1 << 36) + 1, True]),
            ((0, 0, [1 << 36, EINVAL]), (-1, EINVAL, None)),
        ),
        (
            {"max_kib": 0},
            ("domain_populate_physmap_exact", [[0x2000], 0]),
            ((0, 0, None), (-1, EBUSY, None)),
        ),
        (
            {"memory_kib": 1024},
            ("altp2m_get_mem_access", [0, 0x100]),
            ((0, 0, 7), (-1, ESRCH, None)),
        ),
    ],
    ids=lambda part: "-".join(part) if isinstance(part, dict) else "",
)
def test_every_condition_reaches_the_mock(
    setup: dict[str, Any],
    call: tuple[str, list[Any]],
    answers: tuple[tuple[Any, ...], tuple[Any, ...]],
) -> None:
    op, args = call
    usual, changed = (replay.Answer(*answer) for answer in answers)
    for condition, expected in (({}, usual), (setup, changed)):
        steps = [(op, args, expected)]
        result = replay.replay([replay.Program("4.22", 1, 0, replay.Setup(**condition), steps)])
        assert not result.differences, result.differences[0]


def test_a_batch_shares_a_domain_and_the_next_does_not() -> None:
    """What a program leaves in the host p2m, the next of its batch finds: here a split 2M entry."""
    probe = ("altp2m_get_mem_access", [1, 0x401], replay.Answer(0, 0, 7))
    steps = [
        ("altp2m_create_view", [0], replay.Answer(0, 0, 1)),
        ("altp2m_set_mem_access", [1, 0x400, 5], replay.Answer(0, 0, None)),
        probe,
    ]
    split = [("altp2m_set_mem_access", [0, 0x400, 7], replay.Answer(0, 0, None))]

    def answer(*batches: int) -> replay.Answer:
        setup = replay.Setup()
        first = replay.Program("4.17", 1, batches[0], setup, split)
        second = replay.Program("4.17", 2, batches[1], setup, steps)
        differences = replay.replay([first, second]).differences
        return differences[0].mock if differences else probe[2]

    assert answer(0, 1) == replay.Answer(0, 0, 7)  # the view took the whole 2M entry along
    assert answer(0, 0) == replay.Answer(-1, 3, None)  # the host has 4K entries by now
