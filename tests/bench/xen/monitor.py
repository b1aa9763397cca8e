# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our monitor where loop.c and xen-access are measured: answers violations, counts them.

python3 monitor.py DOMAIN toggle|fast SECONDS GFN...
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

import xenaltp2m as xa


def handler(view: xa.View, way: str, counts: dict[str, int]) -> Callable[[xa.Event], xa.Response]:
    """Return what answers, and counts what it has answered."""
    fast = xa.Response.fast_singlestep(through=0, back_to=view)
    step, back = xa.Response.singlestep(view=0), xa.Response.resume(view=view)

    def answer_fast(event: xa.Event) -> xa.Response:
        counts["hits"] += 1
        return fast

    def answer_toggle(event: xa.Event) -> xa.Response:
        if isinstance(event, xa.MemAccess):
            counts["hits"] += 1
            return step
        counts["steps"] += 1
        return back

    return {"fast": answer_fast, "toggle": answer_toggle}[way]


def main() -> None:
    """Serve a domain for a while."""
    name, way, seconds, *gfns = sys.argv[1:]
    counts = {"hits": 0, "steps": 0}
    with (
        xa.connect() as xen,
        xen.domain(name) as dom,
        dom.altp2m() as altp2m,
        dom.monitor(xa.MemAccess, xa.Singlestep) as monitor,
    ):
        view = altp2m.create_view()
        view.set_access([int(gfn, 0) for gfn in gfns], xa.Access.RW)
        handle = handler(view, way, counts)
        clock = threading.Timer(float(seconds), monitor.stop)
        altp2m.switch_to_view(view)
        start = time.perf_counter()
        clock.start()
        monitor.run(handle)
        took = time.perf_counter() - start
        found = {**counts, "seconds": took, "gfns": len(gfns)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
