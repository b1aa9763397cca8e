# SPDX-License-Identifier: LGPL-2.1-or-later
"""Converts the traces of Xen 4.22.0, which were recorded before replay.py's format was fixed.

    convert.py FOREIGN OUT

``{"seed", "kind", "start", "steps"}`` with the calls under their names without prefix, all on one
domain as ``SETUP`` has it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from replay import DECREASE, POPULATE, Answer, Program, Setup, open_text

SETUP = Setup(warm_up=(*range(0x100, 0x108), 0x2000, 0x7FFFF, *range(0x100000, 0x100006)))
FLAGS = {
    "set_domain_state": 0, "set_visibility": 1, "set_suppress_ve": 2, "set_suppress_ve_multi": 3,
}  # fmt: skip
"""Where an operation takes a flag, which C passes as a number."""


def convert(
    op: str, args: list[Any], rc: int, errno: int, out: Any
) -> tuple[str, list[Any], Answer]:
    """Convert one step."""
    if op in {"populate_physmap", "decrease_reservation"}:
        name = POPULATE if op == "populate_physmap" else DECREASE
        return name, [args, 0], Answer(rc, errno, out)
    if op == "set_mem_access_multi":
        view, gfns, accesses = args
        args = [view, accesses, gfns]
    elif op in FLAGS:
        args[FLAGS[op]] = bool(args[FLAGS[op]])
    if op == "set_suppress_ve_multi":  # [gfn, -errno], preset to [~0, 0]
        gfn, code = out
        out = [gfn, -code] if code and not rc else None
    elif op in {"get_domain_state", "get_suppress_ve"} and not rc:
        out = bool(out)
    return f"altp2m_{op}", args, Answer(rc, errno, out)


def main() -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(description="Convert a trace of Xen 4.22.0.")
    parser.add_argument("foreign", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with open_text(arguments.foreign) as lines, open_text(arguments.out, "w") as out:
        for line in lines:
            fields = json.loads(line)
            steps = [convert(*step) for step in fields["steps"]]
            program = Program("4.22.0", fields["seed"], 0, SETUP, steps)
            out.write(program.line() + "\n")


if __name__ == "__main__":
    main()
