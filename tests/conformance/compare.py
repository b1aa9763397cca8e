# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares what agents heard from real Xen with what the simulator tells the same agents.

    compare.py --xen 4.17 DIRECTORY

of the files that record.py left there. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import xenaltp2m as xa
from tests.conformance import agent
from xenaltp2m.abi.vm_event import layout
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.symbols import Image

GUESTS = Path("examples/guest")
UNCOMPARED = {"data.regs.x86.vmtrace_pos", "data.regs.x86.npt_base"}


def simulate(guest: str, seed: int, limit: int, release: tuple[int, int]) -> list[bytes]:
    """The same agent, the same guest, no Xen."""
    image = Image.open(GUESTS / f"{guest}.elf")
    mock = MockBackend(release)
    domid = mock.add_domain(guest, memory_kib=16 << 10, max_kib=32 << 10)
    mock.boot(domid, GUESTS / f"{guest}.elf")
    with xa.connect(mock) as xen, xen.domain(guest) as dom:
        return agent.run(dom, image, seed, limit, lambda: mock.domain_unpause(domid))


def differences(expected: bytes, found: bytes) -> dict[str, tuple[int, int]]:
    """By field: what Xen says, what the simulator says."""
    shape = layout(int.from_bytes(expected[:4], "little"))
    wrong = {}
    reason = xa.Event.of(expected).reason
    for name, (offset, width) in shape.fields.items():
        if (
            name in UNCOMPARED
            or name.startswith("data.emul")
            or name in ("data", "u")
            or (name.startswith("u.") and not _of(name, reason))
        ):
            continue
        here, there = expected[offset : offset + width], found[offset : offset + width]
        if here != there:
            wrong[name] = int.from_bytes(here, "little"), int.from_bytes(there, "little")
    return wrong


def _of(name: str, reason: object) -> bool:
    return str(getattr(reason, "name", "")).lower().startswith(name.split(".")[1][:8])


def main() -> int:
    """Compare everything in a directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--xen", default="4.17")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--show", type=int, default=3)
    arguments = parser.parse_args()
    major, minor = map(int, arguments.xen.split("."))
    events = wrong = 0
    for path in sorted(arguments.directory.rglob("*.events")):
        guest, _, seed = path.stem.partition("-")
        data = path.read_bytes()
        size = layout(int.from_bytes(data[:4], "little")).size
        expected = [data[at : at + size] for at in range(0, len(data), size)]
        found = simulate(guest, int(seed), len(expected), (major, minor))
        events += len(expected)
        shown = 0
        for number, (here, there) in enumerate(zip(expected, found, strict=False)):
            if not (fields := differences(here, there)):
                continue
            wrong += 1
            if shown < arguments.show:
                shown += 1
                print(f"{path.stem} event {number}:")
                print(f"  Xen {xa.Event.of(here)!r} rip={xa.Event.of(here).registers.rip:#x}")
                print(f"  sim {xa.Event.of(there)!r} rip={xa.Event.of(there).registers.rip:#x}")
                for name, (a, b) in fields.items():
                    print(f"    {name}: {a:#x} {b:#x}")
            if shown >= arguments.show:
                break
        if len(found) != len(expected):
            wrong += 1
            print(f"{path.stem}: {len(expected)} events from Xen, {len(found)} simulated")
    print(f"{events} events compared, {wrong} differ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
