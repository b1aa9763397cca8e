# SPDX-License-Identifier: LGPL-2.1-or-later
"""Judges random programs on real Xen in the lab, so many in each boot.

transparency.py --xen 4.17 --count 2000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from images import RELEASES

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
A_BOOT = 500
WALL_LIMIT = 3000


def main() -> int:
    """Judge a range of seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", choices=[*RELEASES], default="4.17", help="release to boot")
    parser.add_argument("--count", type=int, default=2000, help="programs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--results", type=Path, help="directory (default: results/RELEASE)")
    arguments = parser.parse_args()
    results = arguments.results or TREE / "results" / arguments.xen
    status, end = 0, arguments.first + arguments.count
    for first in range(arguments.first, end, A_BOOT):
        command = [sys.executable, str(HERE / "run.py"), "--xen", arguments.xen]
        command += ["--timeout", str(WALL_LIMIT), "--wheel", str(TREE / "xenaltp2m")]
        command += ["--results", str(results / f"transparency-{first}")]
        for put in ("tests/__init__.py", "tests/transparency", "tests/lab/guest/programs.elf"):
            command += ["--put", f"{TREE / put}:{put}"]
        job = f"python3 -m tests.transparency.live {first} {min(first + A_BOOT, end)}"
        status |= subprocess.run([*command, "--", job], check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
