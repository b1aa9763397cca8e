# SPDX-License-Identifier: LGPL-2.1-or-later
"""The performance report: what is drawn is what was measured; what became worse is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import bench_xen  # noqa: E402 - programs, not of the package
import report  # noqa: E402


def document(*runs: float, what: str = "ours", benchmark: str = "calls") -> dict[str, Any]:
    """A report with one ratio."""
    ratios = [{"what": what, "peer": "theirs", "runs": list(runs)}]
    return {benchmark: {"measured": "2026-01-01", "load": 0.0, "with": {}, "ratios": ratios}}


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The first word of each line behind the head, and how many are bad."""
    lines, bad = report.compare(old, new)
    return [line[:6].strip() for line in lines[1:]] + [str(bad)]


def test_what_is_committed_is_drawn_from_what_was_measured() -> None:
    kept = report.load(report.REPORT)
    assert list(kept) == list(report.BENCHMARKS)
    assert report.REPORT.with_suffix(".md").read_text() == report.as_markdown(kept)
    assert report.picture_of(report.REPORT).read_text() == report.as_svg(kept)
    assert all(len(row.runs) >= report.LEAST_RUNS for row in report.rows(kept))
    assert {row.what for row in report.rows(kept) if row.benchmark == "xen"} == set(
        bench_xen.TITLES.values()
    )


def test_the_picture_has_each_ratio_in_its_place() -> None:
    root = ET.fromstring(report.as_svg(document(0.1, 1.0, 10.0)))
    [circle] = root.iter("{http://www.w3.org/2000/svg}circle")
    lines = {
        line.get("class"): line.attrib for line in root.iter("{http://www.w3.org/2000/svg}line")
    }
    # The median is 1, which is the line for as fast; the spread reaches a decade each way.
    middle = float(lines["even"]["x1"])
    assert float(circle.attrib["cx"]) == middle
    left, right = float(lines["spread"]["x1"]), float(lines["spread"]["x2"])
    assert middle - left == pytest.approx(right - middle, abs=0.2)
    assert left < middle


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((0.98, 1.00, 1.02), (0.98, 1.00, 1.02), ""),
        ((0.98, 1.00, 1.02), (0.92, 0.94, 0.95), ""),  # 0.06 apart, the runs 0.07
        ((0.98, 1.00, 1.02), (0.90, 0.92, 0.93), "WORSE"),
        ((0.98, 1.00, 1.02), (1.06, 1.08, 1.09), "better"),
        ((2.0, 2.0, 2.0), (1.995, 1.995, 1.995), ""),
        ((2.0, 2.0, 2.0), (1.98, 1.98, 1.98), "WORSE"),
    ],
)
def test_worse_is_what_noise_does_not_explain(
    old: tuple[float, ...], new: tuple[float, ...], verdict: str
) -> None:
    assert verdicts(document(*old), document(*new)) == [verdict, str(int(verdict == "WORSE"))]


def test_ratios_that_are_gone_or_new_are_told() -> None:
    old, new = document(1, 1, 1, what="before"), document(1, 1, 1, what="after")
    assert verdicts(old, new) == ["GONE", "new", "1"]
    assert verdicts(old, document(1, 1, 1, what="before", benchmark="xen")) == ["GONE", "new", "1"]


def test_two_runs_do_not_tell_the_noise() -> None:
    with pytest.raises(report.ReportError, match="2 runs, 3 are needed"):
        report.compare(document(1, 1), document(1, 1, 1))


@pytest.mark.parametrize("content", ["", "[1]", '{"calls": {"ratios": [{}]}}', '{"calls": 1}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(report.ReportError, match="is no report"):
        report.load(path)


def test_the_command_line_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, value in zip(paths, (2.0, 1.0), strict=True):
        path.write_text(json.dumps(document(value, value, value)))
    monkeypatch.setattr(sys, "argv", ["report.py", "--compare", *map(str, paths)])
    assert report.main() == 1
    assert "WORSE" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report.py", "--compare", *map(str, reversed(paths))])
    assert report.main() == 0
    assert "-50.0%" not in capsys.readouterr().out


def test_each_row_of_xen_is_compared_with_its_own_peers() -> None:
    def row(hits: int) -> dict[str, Any]:
        return {"hits": hits, "seconds": 2.0}

    figures: dict[str, dict[str, dict[str, Any]]] = {
        "hits": {"xen-access": row(100), "C, toggle": row(200), "xenaltp2m, toggle": row(50)},
        "breakpoints": {"C, toggle": row(400), "Breakpoints, toggle": row(100)},
        "protecting": {
            "C, one call": {"gfns": 10, "seconds": 1.0},
            "xenaltp2m": {"gfns": 10, "seconds": 2.0},
        },
    }
    for kind, name in bench_xen.TITLES:
        figures[kind].setdefault(name, {"error": "was not measured"})
    found = {(ratio.what, ratio.peer): ratio.value for ratio in bench_xen.ratios(figures)}
    assert found == {
        ("C loop, toggle", "xen-access"): 2.0,
        ("Monitor.run, toggle", "xen-access"): 0.5,
        ("Monitor.run, toggle", "C loop, toggle"): 0.25,
        ("C loop at an int3, toggle", "xen-access"): 4.0,
        ("Breakpoints, toggle", "xen-access"): 1.0,
        ("Breakpoints, toggle", "C loop at an int3, toggle"): 0.25,
        ("View.set_access, every gfn protected", "C, every gfn protected in one call"): 0.5,
    }
