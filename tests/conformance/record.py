# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs random agents on guests under real Xen, in dom0, and writes down what they hear.

    record.py DIRECTORY EVENTS GUEST:SEED...

A file for each: what Xen wrote for each event, one after another.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import xenaltp2m as xa
from tests.conformance import agent
from xenaltp2m.tools.symbols import Image

GUESTS = Path("examples/guest")


def record(guest: str, seed: int, limit: int) -> bytes:
    """Start a guest, be the agent, end the guest."""
    image = Image.open(GUESTS / f"{guest}.elf")
    options = [
        f'kernel="{(GUESTS / guest).resolve()}.elf"',
        f'name="{guest}"',
        f"vcpus={agent.vcpus(image)}",
    ]
    options += [f'on_{event}="preserve"' for event in ("crash", "poweroff", "reboot")]
    subprocess.run(
        ["xl", "create", "-p", "-q", "-e", GUESTS / f"{guest}.cfg", *options], check=True
    )
    try:
        with xa.connect() as xen, xen.domain(guest) as dom:
            rows = agent.run(
                dom, image, seed, limit, lambda: xen.backend.domain_unpause(int(dom.domid))
            )
    finally:
        subprocess.run(["xl", "destroy", guest], check=True)
    return b"".join(rows)


def main() -> None:
    """Record what the command line names."""
    directory, limit, *wanted = sys.argv[1:]
    for one in wanted:
        guest, _, seed = one.partition(":")
        begun = time.monotonic()
        data = record(guest, int(seed), int(limit))
        (Path(directory) / f"{guest}-{seed}.events").write_bytes(data)
        print(f"{one}: {len(data)} bytes in {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main()
