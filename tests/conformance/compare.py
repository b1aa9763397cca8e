# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares what agents heard from real Xen with what the simulator tells the same agents.

    python -m tests.conformance.compare --xen 4.17 DIRECTORY

of the files that record.py left there. Every byte of every event is compared, registers among
them, but for what :data:`UNCOMPARED` and :func:`of_its_vcpu` name. The exit status is 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

import xenaltp2m as xa
from tests.conformance import agent
from xenaltp2m.abi.vm_event import layout
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.symbols import Image

GUESTS = Path(__file__).resolve().parents[2] / "examples" / "guest"
UNCOMPARED = ("data.regs.x86.vmtrace_pos", "data.regs.x86.npt_base")
"""Not what a guest does: where a trace is, and which table the CPU uses."""
SIMULATED_PATIENCE = 60.0
"""A guest that executes zeros instruction by instruction takes the simulator longer than Xen, and
longer still beside others. Nothing waits so long that comes to its end."""
FLAGS = "data.regs.x86.rflags"
ARITHMETIC_FLAGS = 0x8D5


def simulate(guest: str, seed: int, limit: int, release: tuple[int, int]) -> list[bytes]:
    """The same agent, the same guest, no Xen."""
    image = Image.open(GUESTS / f"{guest}.elf")
    mock = MockBackend(release)
    mode = xa.Altp2mMode.MIXED if agent.has_own_views(image) else xa.Altp2mMode.EXTERNAL
    domid = mock.add_domain(guest, vcpus=agent.vcpus(image), mode=mode)
    mock.boot(domid, GUESTS / f"{guest}.elf")
    with xa.connect(mock) as xen, xen.domain(guest) as dom:
        return agent.run(
            dom, image, seed, limit, lambda: mock.domain_unpause(domid), SIMULATED_PATIENCE
        )


def of_its_vcpu(guest: str, rows: list[bytes]) -> dict[int, list[bytes]]:
    """Sort events by vCPU, of a guest that has several: nothing says who comes first.

    There, flags are left out, which depend on a number that all of them count up.
    """
    found: dict[int, list[bytes]] = {}
    several = guest == "racer"
    for row in rows:
        key = int(xa.Event.of(row).vcpu) if several else 0
        found.setdefault(key, []).append(_without_flags(row) if several else row)
    return found


def _without_flags(row: bytes) -> bytes:
    place = layout(int.from_bytes(row[:4], "little")).fields[FLAGS]
    where = slice(place.offset, place.offset + place.width)
    flags = int.from_bytes(row[where], "little") & ~ARITHMETIC_FLAGS
    return row[: where.start] + flags.to_bytes(place.width, "little") + row[where.stop :]


def differences(expected: bytes, found: bytes) -> dict[str, tuple[int, int]]:
    """By field: what Xen says, what the simulator says."""
    shape = layout(int.from_bytes(expected[:4], "little"))
    wrong = {}
    masked = [bytearray(expected), bytearray(found)]
    for name in UNCOMPARED:
        if (place := shape.fields.get(name)) is not None:
            for row in masked:
                row[place.offset : place.offset + place.width] = bytes(place.width)
    if masked[0] == masked[1]:
        return {}
    for name, (offset, width) in shape.fields.items():
        values = [int.from_bytes(row[offset : offset + width], "little") for row in masked]
        if width <= 8 and values[0] != values[1]:
            wrong[name] = values[0], values[1]
    return wrong or {"in no field": (0, 0)}


def recordings(directory: Path) -> Iterator[tuple[str, int, list[bytes]]]:
    """Yield guest, seed and events of each file below a directory."""
    for path in sorted([*directory.rglob("*.events"), *directory.rglob("*.events.gz")]):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        guest, _, seed = path.name.partition(".")[0].partition("-")
        size = layout(int.from_bytes(data[:4], "little")).size if data else 1
        yield guest, int(seed), [data[at : at + size] for at in range(0, len(data), size)]


def compare(
    guest: str,
    seed: int,
    recorded: list[bytes],
    release: tuple[int, int],
    *,
    shortened: bool = False,
) -> tuple[int, list[str]]:
    """Return how many events were compared, and what is different, in words.

    Where a recording was shortened, the guest may have had several vCPUs at different places.
    """
    expected = of_its_vcpu(guest, recorded)
    found = of_its_vcpu(guest, simulate(guest, seed, len(recorded), release))
    several, compared, wrong = len(expected) > 1, 0, []
    if expected.keys() != found.keys():
        wrong.append(f"{guest}-{seed}: vCPUs {[*expected]} on Xen, {[*found]} simulated")
    for vcpu in expected.keys() & found.keys():
        theirs, ours = expected[vcpu], found[vcpu]
        if len(theirs) != len(ours) and not several and not shortened:
            wrong.append(f"{guest}-{seed}: {len(theirs)} events on Xen, {len(ours)} simulated")
        for number, (here, there) in enumerate(zip(theirs, ours, strict=False)):
            compared += 1
            if fields := differences(here, there):
                lines = [f"{guest}-{seed} vCPU {vcpu} event {number}:"]
                for who, row in (("Xen", here), ("sim", there)):
                    event = xa.Event.of(row)
                    lines.append(f"  {who} {event!r} rip={event.registers.rip:#x}")
                lines += [f"    {name}: {a:#x} {b:#x}" for name, (a, b) in fields.items()]
                wrong.append("\n".join(lines))
                break  # the two have parted
    return compared, wrong


def main() -> int:
    """Compare everything in a directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", default="4.17", help="the release that was recorded")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    major, minor = map(int, arguments.xen.split("."))
    events = differing = 0
    for guest, seed, recorded in recordings(arguments.directory):
        compared, wrong = compare(guest, seed, recorded, (major, minor))
        events += compared
        differing += bool(wrong)
        print(*wrong, sep="\n", end="\n" if wrong else "", flush=True)
    print(f"Xen {arguments.xen}: {events} events compared, {differing} recordings differ")
    return int(bool(differing or not events))


if __name__ == "__main__":
    sys.exit(main())
