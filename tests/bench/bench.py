# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a call costs in Python, against C making the same call.

Both call the same library: the stand-in of ``tests/fakexc``, told to do nothing. What is measured
is thus the way there and back, without the hypercall that a real call makes on top (about a
microsecond on silicon at the least). Figures of one run compare with each other; those of different
runs, or machines, do not. `make bench-report` keeps the ratios.

    python tests/bench/bench.py [--json] [--rounds N] [--gfns N]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ratios import Ratio, shortest, timed

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import xenaltp2m as xa  # noqa: E402 - found by the line above
from tests.fakexc import fake as fakexc  # noqa: E402
from xenaltp2m.backend.libxc import LibxcBackend, clib  # noqa: E402

DOMID, VIEW, ACCESS = 1, 1, 5
BATCH = 4096
CALLS = 2000
HANDLE_TARGET = 2000
"""Nanoseconds a handle's call may cost more than C's."""


def connect(fake: fakexc.Fake) -> tuple[LibxcBackend, xa.Xen, xa.View]:
    """Open a backend over the stand-in, and a view through the handles."""
    backend = fakexc.connect(fake.library)
    info = bytearray(112)
    info[:2] = DOMID.to_bytes(2, "little")
    info[4] = 1 << 1 | 1 << 3  # HVM, paused
    for _ in range(4):
        fake.answer("xc_domain_getinfolist", 1, data=bytes(info))
    fake.answer("xc_altp2m_create_view", outs=(VIEW, 0))
    xen = xa.connect(backend)
    view = xen.domain(DOMID).altp2m().create_view()
    fake.reset()
    return backend, xen, view


def single(fake: fakexc.Fake, backend: LibxcBackend, view: xa.View, rounds: int) -> Any:
    """Measure one call for each gfn, as C, cffi, the backend and a handle make it.

    Many short runs, for the shortest to be one that nothing else on the machine disturbed.
    """
    address = fake.address_of("xc_altp2m_set_mem_access")
    pointer = fakexc.pointer_to(address)
    function, interface = backend._c.xc_altp2m_set_mem_access, backend._xch
    assert clib.ffi.typeof(function).kind == "function"

    def c() -> None:
        fake.loop_single(pointer, DOMID, VIEW, 100 * CALLS, ACCESS)

    def cffi() -> None:
        for gfn in range(CALLS):
            function(interface, DOMID, VIEW, gfn, ACCESS)

    def through_backend() -> None:
        call = backend.altp2m_set_mem_access
        for gfn in range(CALLS):
            call(DOMID, VIEW, gfn, ACCESS)

    def through_handle() -> None:
        call, access = view.set_access, xa.Access.RX
        for gfn in range(CALLS):
            call(gfn, access)

    ways = {"C": c, "cffi": cffi, "backend": through_backend, "handle": through_handle}
    fake.quiet()
    spent = shortest({name: partial(timed, run) for name, run in ways.items()}, rounds)
    fake.reset()
    ns = {name: 1e9 * seconds / CALLS for name, seconds in spent.items()}
    ns["C"] /= 100
    return {name: {"ns": each, "over_c_ns": each - ns["C"]} for name, each in ns.items()}


def bulk(fake: fakexc.Fake, backend: LibxcBackend, view: xa.View, gfns: int, rounds: int) -> Any:
    """Measure many gfns: C in a loop of single calls, the backend and a handle in batches."""
    pointer = fakexc.pointer_to(fake.address_of("xc_altp2m_set_mem_access"))
    every, accesses = memoryview(array("Q", range(gfns))), bytes([ACCESS]) * BATCH

    def c() -> None:
        fake.loop_single(pointer, DOMID, VIEW, gfns, ACCESS)

    def through_backend() -> None:
        for start in range(0, gfns, BATCH):
            batch = every[start : start + BATCH]
            backend.altp2m_set_mem_access_multi(DOMID, VIEW, accesses[: len(batch)], batch)

    def range_through_handle() -> None:
        view.set_access(range(gfns), xa.Access.RX)

    def array_through_handle() -> None:
        view.set_access(every, xa.Access.RX)

    ways: dict[str, Callable[[], None]] = {
        "C, one call each": c,
        "backend": through_backend,
        "handle, a range": range_through_handle,
        "handle, an array": array_through_handle,
    }
    calls = {}
    for name, run in ways.items():
        run()  # the first opens what is kept for the next
        fake.reset()
        run()
        calls[name] = fake.count
    fake.quiet()
    spent = shortest({name: partial(timed, run) for name, run in ways.items()}, rounds)
    fake.reset()
    return {
        name: {
            "calls": calls[name],
            "gfns_per_call": gfns / calls[name],
            "ns_per_gfn": 1e9 * spent[name] / gfns,
        }
        for name in ways
    }


def ratios(figures: Any) -> list[Ratio]:
    """What the figures come to."""
    ns = {name: row["ns"] for name, row in figures["single"].items()}
    bulk = figures["bulk"]
    per_call = {name: row["gfns_per_call"] for name, row in bulk.items()}
    return [
        Ratio("backend.altp2m_set_mem_access", "cffi alone", ns["cffi"] / ns["backend"]),
        Ratio("View.set_access, one gfn", "cffi alone", ns["cffi"] / ns["handle"]),
        Ratio(
            "View.set_access, an array",
            "View.set_access, a range",
            bulk["handle, a range"]["ns_per_gfn"] / bulk["handle, an array"]["ns_per_gfn"],
        ),
        Ratio(
            "View.set_access, a range: gfns a library call",
            "C, one call each",
            per_call["handle, a range"] / per_call["C, one call each"],
        ),
    ]


def report(figures: Any) -> str:
    """Put the figures in words."""
    lines = ["one call for one gfn       ns a call    more than C"]
    for name, row in figures["single"].items():
        lines.append(f"  {name:22} {row['ns']:11.1f} {row['over_c_ns']:11.0f} ns")
    over = figures["single"]["handle"]["over_c_ns"]
    lines.append(f"  a handle's call: {over / 1000:.2f} µs more than C's (the aim: at most 2)")
    lines.append(f"\n{figures['gfns']} gfns in bulk     library calls   gfns a call   ns a gfn")
    for name, row in figures["bulk"].items():
        lines.append(
            f"  {name:22} {row['calls']:13} {row['gfns_per_call']:13.0f} {row['ns_per_gfn']:10.2f}"
        )
    calls = figures["bulk"]["handle, a range"]["calls"]
    saved = figures["bulk"]["C, one call each"]["calls"] / calls
    lines.append(f"  a handle makes {saved:.0f} times fewer calls than C's loop (the aim: 4096)")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; exit 1 if the bulk path makes more calls than it may."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--gfns", type=int, default=1_000_000, metavar="N", help="gfns in bulk")
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="runs to choose from")
    options = parser.parse_args()
    if not fakexc.have_compiler():
        print("bench: no gcc to build the stand-in with", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        fake = fakexc.Fake(fakexc.build(Path(directory)))
        fake.reset()
        backend, xen, view = connect(fake)
        try:
            figures = {
                "python": sys.version.split()[0],
                "gfns": options.gfns,
                "single": single(fake, backend, view, options.rounds),
                "bulk": bulk(fake, backend, view, options.gfns, -(-options.rounds // 60)),
            }
        finally:
            fake.reset()
            xen.close()
    figures["ratios"] = [ratio._asdict() for ratio in ratios(figures)]
    print(json.dumps(figures, indent=2) if options.json else report(figures))
    most = -(-options.gfns // BATCH)
    return int(any(row["calls"] > most for name, row in figures["bulk"].items() if name[0] != "C"))


if __name__ == "__main__":
    sys.exit(main())
