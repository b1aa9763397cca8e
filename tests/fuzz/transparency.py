# SPDX-License-Identifier: LGPL-2.1-or-later
"""Judges random programs on the simulator: free, and under breakpoints and watchpoints.

    transparency.py [--count 20000] [--first 0] [--xen 4.17]

What differs is told with its seed, which makes the same program again. The exit status is 1 then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.transparency.compare import describe
from tests.transparency.simulated import judge_seed

PROGRESS_SECONDS = 30


def judged(seed: int, xen: tuple[int, int]) -> tuple[str | None, int]:
    """Judge a seed: how it differs, if it does, and how many hits there were."""
    try:
        verdict = judge_seed(seed, xen)
    except Exception:  # noqa: BLE001 - told with the seed
        return f"seed {seed}: {traceback.format_exc()}", 0
    return describe(verdict) if verdict.differences else None, verdict.hits


def main() -> int:
    """Judge a range of seeds on all processors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20000, help="programs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--xen", default="4.17", help="release of Xen to simulate")
    arguments = parser.parse_args()
    major, _, minor = arguments.xen.partition(".")
    seeds = range(arguments.first, arguments.first + arguments.count)
    differing = hits = 0
    shown = time.monotonic()
    with multiprocessing.Pool(maxtasksperchild=500) as pool:
        verdicts = pool.imap(partial(judged, xen=(int(major), int(minor))), seeds, chunksize=10)
        for number, (lines, hit) in enumerate(verdicts, 1):
            hits += hit
            if lines is not None:
                differing += 1
                print(lines, flush=True)
            if time.monotonic() - shown > PROGRESS_SECONDS:
                shown = time.monotonic()
                print(f"{number} of {len(seeds)}, {differing} differ", file=sys.stderr, flush=True)
    print(f"{len(seeds)} programs, {hits} hits, {differing} differ")
    return differing > 0


if __name__ == "__main__":
    sys.exit(main())
