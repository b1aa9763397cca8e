# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every ratio of the benchmarks in one table and one picture, and what became worse since another.

    python tests/bench/report.py [--only NAME]... [--runs N]
    python tests/bench/report.py --compare OLD.json NEW.json

The first runs the benchmarks in turn, several times, and writes docs/performance-report.json and
.md, and the picture in docs/pictures; with --only, what the report has of the others stays. The
second exits with 1 if a ratio became worse by more than the runs of both reports differ by.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plot import Bar, draw, number

HERE = Path(__file__).resolve().parent
REPORT = HERE.parents[1] / "docs" / "performance-report.json"
LEAST_RUNS = 3
"""Fewer do not tell how much a ratio varies."""
LEAST_CHANGE = 0.005
"""Of a ratio: less is not told. In the lab runs repeat better than that, and programs do not."""


class Benchmark(NamedTuple):
    """A program that prints ratios, and how often it is run."""

    program: str
    title: str
    runs: int


BENCHMARKS = {
    "calls": Benchmark("bench.py", "Calls, with a library that does nothing", 9),
    "simulator": Benchmark("bench_sim.py", "Simulated guests", 9),
    "recording": Benchmark("bench_recording.py", "Sessions that are recorded", 9),
    "xen": Benchmark("bench_xen.py", "Events and bulk changes on real Xen in the lab", 3),
}


class Row(NamedTuple):
    """A ratio, and what it was in each run."""

    benchmark: str
    what: str
    peer: str
    runs: tuple[float, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others."""
        return self[:3]

    @property
    def median(self) -> float:
        """What the report says it is."""
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """How far its runs lie apart."""
        return max(self.runs) - min(self.runs)


class ReportError(Exception):
    """A benchmark has failed, or a report cannot be used."""


def measure(names: Sequence[str], runs: int | None, xen: str) -> dict[str, Any]:
    """Run benchmarks in turn; return what a report has of each.

    Raises:
        ReportError: One of them failed.
    """
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load > cpus / 2:
        print(f"bench-report: other things run here (load {load:.1f})", file=sys.stderr)
    counts = {name: runs or BENCHMARKS[name].runs for name in names}
    found: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(max(counts.values())):
        for name in names:
            if turn < counts[name]:
                print(f"bench-report: {name}, {turn + 1} of {counts[name]}", file=sys.stderr)
                found[name].append(run(name, xen))
    return {name: section(results, load) for name, results in found.items()}


def run(name: str, xen: str) -> Any:
    """Run one benchmark once and return its figures.

    Raises:
        ReportError: It failed, or has measured nothing.
    """
    command = [sys.executable, str(HERE / BENCHMARKS[name].program), "--json"]
    if name == "xen":
        command += ["--xen", xen]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode or not done.stdout:
        raise ReportError(f"{BENCHMARKS[name].program} ended with {done.returncode}")
    figures = json.loads(done.stdout)
    if name == "xen":
        figures["xen"] = xen
    return figures


def section(results: Sequence[Any], load: float) -> dict[str, Any]:
    """What a report has of a benchmark: its ratios, each as it was in each run."""
    versions = ("python", "unicorn", "xen")
    table: dict[tuple[str, str], list[float]] = {}
    for figures in results:
        for ratio in figures["ratios"]:
            # More digits than any run repeats would only make differences of reports long.
            value = float(f"{ratio['value']:.5g}")
            table.setdefault((ratio["what"], ratio["peer"]), []).append(value)
    return {
        "measured": dt.datetime.now(dt.UTC).date().isoformat(),
        "load": round(load, 1),
        "with": {name: results[0][name] for name in versions if name in results[0]},
        "ratios": [
            {"what": what, "peer": peer, "runs": values} for (what, peer), values in table.items()
        ],
    }


def load(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        ReportError: It cannot be read, or is none.
    """
    try:
        document = dict(json.loads(path.read_text()))
        list(rows(document))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ReportError(f"{path} is no report: {error}") from error
    return document


def rows(document: dict[str, Any]) -> Iterator[Row]:
    """All ratios of a report."""
    for name in BENCHMARKS:
        for ratio in document[name]["ratios"] if name in document else ():
            yield Row(name, ratio["what"], ratio["peer"], tuple(ratio["runs"]))


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], int]:
    """Compare two reports ratio by ratio.

    Returns:
        Lines to print, and how many ratios became worse or are gone.

    Raises:
        ReportError: One has too few runs to tell how much its ratios vary.
    """
    before = {row.key: row for row in rows(old)}
    after = {row.key: row for row in rows(new)}
    for row in (*before.values(), *after.values()):
        if len(row.runs) < LEAST_RUNS:
            raise ReportError(f"{row.what}: {len(row.runs)} runs, {LEAST_RUNS} are needed")
    lines, bad = [f"{'':6}  {'old':>7}  {'new':>7}  {'change':>7}  {'noise':>6}"], 0
    for key in dict.fromkeys([*before, *after]):
        verdict, one, other = "", before.get(key), after.get(key)
        figures = ["", "", "", ""]
        if one is not None:
            figures[0] = number(one.median)
        if other is not None:
            figures[1] = number(other.median)
        if one is None or other is None:
            verdict = "GONE" if other is None else "new"
        else:
            change = other.median - one.median
            noise = max(one.spread + other.spread, LEAST_CHANGE * one.median)
            figures[2:] = f"{change / one.median:+.1%}", f"{noise / one.median:.1%}"
            verdict = "" if abs(change) <= noise else "better" if change > 0 else "WORSE"
        bad += verdict.isupper()
        old_text, new_text, changed, noisy = figures
        lines.append(
            f"{verdict:6}  {old_text:>7}  {new_text:>7}  {changed:>7}  {noisy:>6}"
            f"  {key[1]} / {key[2]}"
        )
    return lines, bad


HEAD = """\
# Performance report

Written by `make bench-report`. Each ratio says how fast something is, compared with something else
in the same run: 2 is twice as fast, and more is better. It is the median of several runs; the
spread is from the lowest of them to the highest. What is compared, and why:
[performance.md](performance.md), [breakpoints.md](breakpoints.md#cost-of-a-hit),
[simulator.md](simulator.md#speed).

![The ratios below, each with its spread](pictures/performance-report.svg)

| | of | ratio | spread |
|---|---|---|---|"""
FOOT = """
Of calls and simulated guests processor time is measured. On Xen in the lab time is a count of
instructions, of hypervisor, dom0 and guest together, and says nothing of silicon.
"""


def as_markdown(document: dict[str, Any]) -> str:
    """The report to read."""
    lines = [HEAD]
    for name, benchmark in BENCHMARKS.items():
        if name not in document:
            continue
        lines.append(f"| **{benchmark.title}** | | | |")
        lines += [
            f"| {row.what} | {row.peer} | {number(row.median)} | "
            f"{number(min(row.runs))} to {number(max(row.runs))} |"
            for row in rows({name: document[name]})
        ]
    lines.append("")
    for name, benchmark in BENCHMARKS.items():
        if name in document:
            found = document[name]
            versions = "".join(
                f", {label.capitalize()} {version}" for label, version in found["with"].items()
            )
            runs = len(found["ratios"][0]["runs"])
            lines.append(f"- {benchmark.title}: {runs} runs on {found['measured']}{versions}.")
    lines.append(FOOT)
    return "\n".join(lines)


def as_svg(document: dict[str, Any]) -> str:
    """The report to look at."""
    panels = {
        benchmark.title: [
            Bar(f"{row.what} / {row.peer}", min(row.runs), row.median, max(row.runs))
            for row in rows({name: document[name]})
        ]
        for name, benchmark in BENCHMARKS.items()
        if name in document
    }
    return draw(panels)


def picture_of(report: Path) -> Path:
    """Where a report's picture is."""
    return report.parent / "pictures" / f"{report.stem}.svg"


def write(document: dict[str, Any], path: Path) -> None:
    """Write a report, as data, to read and to look at."""
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(document))
    picture = picture_of(path)
    picture.parent.mkdir(exist_ok=True)
    picture.write_text(as_svg(document))


def main() -> int:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=[*BENCHMARKS], help="not all of them")
    parser.add_argument("--runs", type=int, metavar="N", help="of each, at least 3")
    parser.add_argument("--xen", default="4.17", metavar="RELEASE", help="to boot in the lab")
    parser.add_argument(
        "--output", type=Path, default=REPORT, metavar="FILE", help="report to write"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="and no more")
    options = parser.parse_args()
    if options.runs is not None and options.runs < LEAST_RUNS:
        parser.error(f"fewer than {LEAST_RUNS} runs do not tell how much a ratio varies")
    try:
        if options.compare:
            lines, bad = compare(*map(load, options.compare))
            print("\n".join(lines))
            return int(bad > 0)
        kept = load(options.output) if options.only and options.output.exists() else {}
        found = measure(options.only or [*BENCHMARKS], options.runs, options.xen)
        merged = kept | found
        write({name: merged[name] for name in BENCHMARKS if name in merged}, options.output)
    except ReportError as error:
        print(f"bench-report: {error}", file=sys.stderr)
        return 2
    print(options.output.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
