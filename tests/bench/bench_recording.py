# SPDX-License-Identifier: LGPL-2.1-or-later
"""What recording a session costs: ratios to the same session unrecorded, in one run.

Calls go to the stand-in of ``tests/fakexc``, which does nothing, so that the ratio is the worst
there is: a real call takes microseconds more. Hits are of a simulated guest that writes to a page,
each single-stepped.

    python tests/bench/bench_recording.py [--json] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratios import Ratio, timed

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import xenaltp2m as xa  # noqa: E402 - found by the line above
from tests.fakexc import fake as fakexc  # noqa: E402
from xenaltp2m.backend.mock import MockBackend  # noqa: E402
from xenaltp2m.backend.session.recording import record  # noqa: E402
from xenaltp2m.tools.symbols import Image  # noqa: E402

CALLS = 2000
HITS = 2000
READS = 500
GUEST = ROOT / "examples" / "guest" / "hello.elf"


def calls(path: Path | None, rounds: int) -> float:
    """Seconds of a backend's call to the stand-in."""
    with tempfile.TemporaryDirectory() as directory:
        fake = fakexc.Fake(fakexc.build(Path(directory)))
        fake.reset()
        backend: Any = fakexc.connect(fake.library)
        if path is not None:
            backend = record(backend, path)
        fake.quiet()
        call = backend.altp2m_set_mem_access

        def run() -> None:
            for gfn in range(CALLS):
                call(1, 1, gfn, 5)

        spent = min(timed(run) for _ in range(rounds)) / CALLS
        fake.reset()
        backend.close()
    return spent


def simulated(path: Path | None, act: Callable[[xa.Xen, xa.Domain], float]) -> float:
    """Seconds of what is done with a simulated guest."""
    host = MockBackend()
    host.boot(host.add_domain("guest", memory_kib=16 << 10), GUEST)
    with xa.connect(host, record=path) as xen, xen.domain("guest") as dom:
        return act(xen, dom)


def hit(xen: xa.Xen, dom: xa.Domain) -> float:
    """One hit, told, answered and stepped."""
    with dom.altp2m() as altp2m, dom.monitor(xa.MemAccess) as monitor:
        view = altp2m.create_view()
        view.set_access(Image.open(GUEST).gfns("counter"), xa.Access.R)
        altp2m.switch_to_view(view)
        xen.backend.domain_unpause(int(dom.domid))
        response = xa.Response.fast_singlestep(through=0, back_to=view)
        left = HITS

        def handler(event: xa.Event) -> xa.Response:
            nonlocal left
            left -= 1
            if not left:
                monitor.stop()
            return response

        return timed(lambda: monitor.run(handler, timeout=1.0)) / HITS


def read(xen: xa.Xen, dom: xa.Domain) -> float:
    """One page, mapped, read and unmapped."""
    del xen

    def run() -> None:
        for _ in range(READS):
            dom.memory.read_page(0x100)

    return min(timed(run) for _ in range(5)) / READS


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="runs to choose from")
    options = parser.parse_args()
    ways: dict[str, Callable[[Path | None], float]] = {
        "a page read on the mock": lambda path: simulated(path, read),
        "a hit in the simulator": lambda path: simulated(path, hit),
    }
    if fakexc.have_compiler():
        ways["a call that does nothing"] = lambda path: calls(path, options.rounds)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for nth, (name, way) in enumerate(ways.items()):
            plain, recorded = [], []
            for attempt in range(3):
                plain.append(way(None))
                recorded.append(way(Path(directory) / f"{nth}-{attempt}.session"))
            size = (Path(directory) / f"{nth}-0.session").stat().st_size
            figures[name] = {
                "ns": 1e9 * min(plain),
                "recorded_ns": 1e9 * min(recorded),
                "ratio": min(recorded) / min(plain),
                "file_bytes": size,
            }
    if options.json:
        ratios = [
            Ratio(f"{name}, recorded", "unrecorded", 1 / row["ratio"])._asdict()
            for name, row in figures.items()
        ]
        found = {"python": sys.version.split()[0], "recording": figures, "ratios": ratios}
        print(json.dumps(found, indent=2))
        return 0
    print(f"{'':26} {'µs':>8} {'recorded':>9} {'ratio':>6}")
    for name, row in figures.items():
        print(
            f"{name:26} {row['ns'] / 1e3:8.2f} {row['recorded_ns'] / 1e3:9.2f} {row['ratio']:6.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
