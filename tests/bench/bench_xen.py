# SPDX-License-Identifier: LGPL-2.1-or-later
"""What our monitor and bulk operations cost on real Xen, against Xen's own tool and against C.

In one boot of the lab, on a guest that trips on every instruction: hits a second of
``xen-access altp2m_exec``, of a C loop that does no more than it must (xen/loop.c) and of our
monitor; on one that comes upon a breakpoint, of that loop and of ours; and how long each takes to
protect all gfns. Time there is a count of instructions, so
that figures repeat, and are not those of silicon: compare those of one run.

    python tests/bench/bench_xen.py [--json] [--xen 4.17] [--seconds 5]

Fails if something could not be measured, never because of a figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ratios import Ratio

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WALL_LIMIT = 1800
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
PEER = "xen-access"
RELEASES = ("4.17", "4.20")
"""Debian's 4.14 comes without xen-access."""
TITLES = {
    ("hits", "C, toggle"): "C loop, toggle",
    ("hits", "C, fast"): "C loop, fast single-step",
    ("hits", "xenaltp2m, toggle"): "Monitor.run, toggle",
    ("hits", "xenaltp2m, fast"): "Monitor.run, fast single-step",
    ("breakpoints", "C, toggle"): "C loop at an int3, toggle",
    ("breakpoints", "C, fast"): "C loop at an int3, fast single-step",
    ("breakpoints", "Breakpoints, toggle"): "Breakpoints, toggle",
    ("breakpoints", "Breakpoints, fast"): "Breakpoints, fast single-step",
    ("breakpoints", "Trace, fast"): "Trace, fast single-step",
    ("protecting", "C, one call"): "C, every gfn protected in one call",
    ("protecting", "xenaltp2m"): "View.set_access, every gfn protected",
}
"""What is measured against xen-access, and where it is ours, against C."""


def measure(xen: str, seconds: float, work: Path) -> tuple[int, Any]:
    """Run xen/measure.py in dom0; return its status and its figures."""
    loop = work / "loop"
    subprocess.run(["gcc", *FLAGS, "-o", loop, HERE / "xen" / "loop.c", "-ldl"], check=True)
    puts = [loop, *(HERE / "xen" / f"{name}.py" for name in ("measure", "monitor", "breakpoints"))]
    puts += [ROOT / "examples" / "guest" / name for name in ("hello.elf", "hello.cfg")]
    command = [sys.executable, str(ROOT / "tests/lab/run.py"), "--xen", xen]
    command += ["--results", str(work / "results"), "--timeout", str(WALL_LIMIT)]
    command += ["--wheel", str(ROOT / "xenaltp2m")]
    for put in puts:
        command += ["--put", str(put)]
    job = f"python3 measure.py {seconds} $RESULTS/bench.json"
    # The lab tells what it does on its output: ours is for the figures.
    status = subprocess.run([*command, "--", job], stdout=sys.stderr, check=False).returncode
    figures = work / "results" / "bench.json"
    return status, json.loads(figures.read_text()) if figures.exists() else None


def rate(row: dict[str, Any]) -> float:
    return float(row["hits"] / row["seconds"])


def per_gfn(row: dict[str, Any]) -> float:
    return float(row["seconds"] / row["gfns"]) * 1e6


def ratios(figures: Any) -> list[Ratio]:
    """What the figures come to; what could not be measured is left out."""
    found = []
    for (kind, name), title in TITLES.items():
        rows = figures[kind]
        in_c = "C, one call" if kind == "protecting" else "C," + name.partition(",")[2]
        peers = [(PEER, figures["protecting" if kind == "protecting" else "hits"].get(PEER, {}))]
        if name != in_c:
            peers.append((TITLES[kind, in_c], rows[in_c]))
        found += [
            Ratio(title, peer, speed(rows[name]) / speed(row))
            for peer, row in peers
            if speed(rows[name]) and speed(row)
        ]
    return found


def speed(row: dict[str, Any]) -> float:
    """Hits or gfns a second; 0 where that could not be measured."""
    return float(row.get("hits", row.get("gfns", 0)) / row.get("seconds", 1))


def report(figures: Any) -> str:
    """Put the figures in words."""
    hits, protecting = figures["hits"], figures["protecting"]
    lines = []
    for title, rows in (
        ("a guest that trips on every instruction", hits),
        ("a breakpoint in a copy of a page", figures["breakpoints"]),
    ):
        lines.append(f"{title:44} hits a virtual second   of xen-access's")
        for name, row in rows.items():
            if "error" in row:
                lines.append(f"  {name:40} {row['error']}")
                continue
            of_peer = f"{rate(row) / rate(hits[PEER]):17.2f}" if "hits" in hits[PEER] else ""
            lines.append(f"  {name:42} {rate(row):21.0f} {of_peer}")
        lines.append("")
    lines.append("protecting every gfn              gfns   virtual s   µs a gfn   times as fast")
    for name, row in protecting.items():
        if "error" in row:
            lines.append(f"  {name:25} {row['error']}")
            continue
        peer = protecting.get(PEER, {})
        faster = f"{per_gfn(peer) / per_gfn(row):15.1f}" if "gfns" in peer else ""
        lines.append(
            f"  {name:25} {row['gfns']:10} {row['seconds']:11.2f} {per_gfn(row):10.2f} {faster}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print figures for programs")
    parser.add_argument("--xen", choices=RELEASES, default=RELEASES[0], help="release to boot")
    parser.add_argument("--seconds", type=float, default=5.0, help="virtual seconds of each run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xenaltp2m-bench-") as name:
        status, figures = measure(arguments.xen, arguments.seconds, Path(name))
    if figures is None:
        print("bench: the lab brought no figures", file=sys.stderr)
        return status or 1
    figures["ratios"] = [ratio._asdict() for ratio in ratios(figures)]
    print(json.dumps(figures, indent=2) if arguments.json else report(figures))
    return status


if __name__ == "__main__":
    sys.exit(main())
