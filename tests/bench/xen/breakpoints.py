# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our breakpoints where loop.c is measured: one at a place, whose hits are counted.

python3 breakpoints.py DOMAIN toggle|fast|trace SECONDS ADDRESS
"""

from __future__ import annotations

import json
import sys
import threading
import time

import xenaltp2m as xa
from xenaltp2m.tools.symbols import Symbol, Symbols
from xenaltp2m.tools.tracing import Seen, Trace


def count(dom: xa.Domain, way: str, seconds: float, place: int) -> dict[str, float]:
    """A callback that does nothing."""
    with (
        dom.altp2m() as altp2m,
        dom.monitor(xa.MemAccess, xa.SoftwareBreakpoint) as monitor,
        xa.Breakpoints(altp2m, monitor, fast=way == "fast") as breakpoints,
    ):
        hook = breakpoints.insert(place, lambda hit: None)
        clock = threading.Timer(seconds, monitor.stop)
        start = time.perf_counter()
        clock.start()
        monitor.run(breakpoints)
        took = time.perf_counter() - start
        return {"hits": hook.hits, "seconds": took}


def trace(dom: xa.Domain, seconds: float, place: int) -> dict[str, float]:
    """Calls with the caller and an argument, which are read from the guest's stack."""
    symbols = Symbols([(place, 0, Symbol("target", place, 0))], "here")

    def take(seen: Seen) -> None:
        pass

    with Trace(dom, "target", symbols=symbols, arguments=1, trust=True) as tracing:
        start = time.perf_counter()
        tracing.run(take, seconds=seconds)
        took = time.perf_counter() - start
        return {"hits": tracing.hits["target"], "seconds": took}


def main() -> None:
    """Serve a domain for a while."""
    name, way, seconds, place = sys.argv[1:]
    with xa.connect() as xen, xen.domain(name) as dom:
        if way == "trace":
            found = trace(dom, float(seconds), int(place))
        else:
            found = count(dom, way, float(seconds), int(place))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
