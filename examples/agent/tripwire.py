# SPDX-License-Identifier: LGPL-2.1-or-later
"""An agent: tells who writes to pages of a guest that nobody should write to.

    python tripwire.py DOMAIN GFN...

The pages are read-only in a view of their own. A write is told, then executed as a single step in
view 0, so that the guest does not notice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import xenaltp2m as xa


class Write(NamedTuple):
    """A write that was told."""

    gfn: int
    offset: int
    rip: int
    vcpu: int


class Tripwire:
    """Listens to a domain, which is afterwards as it was."""

    def __init__(self, domain: xa.Domain, gfns: Sequence[int]) -> None:
        self._domain, self._gfns = domain, gfns

    def listen(self, tell: Callable[[Write], bool], timeout: float | None = None) -> None:
        """Tell of each write until ``tell`` returns False, the domain ends, or nothing happens."""
        with self._domain.altp2m() as altp2m, self._domain.monitor(xa.MemAccess) as monitor:
            view = altp2m.create_view(label="tripwire")
            with self._domain.paused():
                view.set_access(self._gfns, xa.Access.RX)
                altp2m.switch_to_view(view)
            step = xa.Response.fast_singlestep(through=0, back_to=view)

            def handle(event: xa.Event) -> xa.Response | None:
                if not isinstance(event, xa.MemAccess):
                    return None
                write = Write(event.gfn, event.offset, event.registers.rip, event.vcpu)
                if not tell(write):
                    monitor.stop()
                return step

            monitor.run(handle, timeout)


def main() -> None:
    """Print writes until Ctrl-C."""
    name, *gfns = sys.argv[1:]

    def tell(write: Write) -> bool:
        print(f"vCPU {write.vcpu} wrote gfn {write.gfn:#x}+{write.offset:#x} at {write.rip:#x}")
        return True

    with xa.connect() as xen, xen.domain(name) as domain:
        Tripwire(domain, [int(gfn, 0) for gfn in gfns]).listen(tell)


if __name__ == "__main__":
    main()
