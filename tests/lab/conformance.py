# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares the simulator with real Xen: random agents on all example guests, event by event.

    conformance.py --xen 4.17 --seeds 6 --events 2000

records in one boot of the lab what the agents hear, then has the simulator tell it to the same
agents. The recordings stay in the results directory. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from images import RELEASES

from xenaltp2m.abi.vm_event import layout

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
GUESTS = ("hello", "checker", "paged", "racer", "insider")
WALL_LIMIT = 1200


def keep(results: Path, xen: str, guests: Sequence[str], events: int) -> None:
    """Leave shortened recordings where the tests find them, instead of those guests' old ones."""
    kept = TREE / "tests" / "conformance" / "recorded" / xen
    kept.mkdir(parents=True, exist_ok=True)
    for guest in guests:
        for old in kept.glob(f"{guest}-*"):
            old.unlink()
    for path in sorted(results.glob("*.events")):
        data = path.read_bytes()
        size = layout(int.from_bytes(data[:4], "little")).size
        short = gzip.compress(data[: events * size], mtime=0)
        (kept / f"{path.name}.gz").write_bytes(short)


def main() -> int:
    """Record, then compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", choices=[*RELEASES], default="4.17", help="release to boot")
    parser.add_argument("--guests", nargs="+", choices=GUESTS, default=GUESTS)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many, for each guest")
    parser.add_argument("--events", type=int, default=1000, help="at most, for each seed")
    parser.add_argument("--keep", type=int, default=0, metavar="EVENTS",
                        help="put so many of each into tests/conformance/recorded")  # fmt: skip
    parser.add_argument("--results", type=Path, help="directory (default: results/RELEASE)")
    arguments = parser.parse_args()
    results = (arguments.results or TREE / "results" / arguments.xen) / "conformance"
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    wanted = [f"{guest}:{seed}" for seed in seeds for guest in arguments.guests]
    command = [sys.executable, str(HERE / "run.py"), "--xen", arguments.xen]
    command += ["--timeout", str(WALL_LIMIT), "--results", str(results)]
    command += ["--wheel", str(TREE / "xenaltp2m")]
    for put in ("tests/__init__.py", "tests/conformance", "examples/guest"):
        command += ["--put", f"{TREE / put}:{put}"]
    record = f"python3 -m tests.conformance.record $RESULTS {arguments.events} {' '.join(wanted)}"
    if status := subprocess.run([*command, "--", record], check=False).returncode:
        return status
    if arguments.keep:
        keep(results, arguments.xen, arguments.guests, arguments.keep)
    compare = [sys.executable, "-m", "tests.conformance.compare", "--xen", arguments.xen]
    return subprocess.run([*compare, str(results)], cwd=TREE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
