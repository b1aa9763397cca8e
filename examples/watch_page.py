# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watch what a guest does with a page: who touches it, how, and from where.

The page is restricted in a view of its own. Each violation is let through by a fast single-step:
one instruction in view 0, where the page is as it was, and back. Everything is undone at the end.
"""

import argparse

import xenaltp2m as xa
from xenaltp2m.backend.mock import Instruction, MockBackend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="guest", help="domid, name or uuid")
    parser.add_argument("--gfn", type=lambda text: int(text, 0), default=0x101)
    parser.add_argument("--hits", type=int, default=4)
    options = parser.parse_args()

    with (
        xa.connect(options.connect) as xen,
        xen.domain(options.domain) as domain,
        domain.altp2m() as altp2m,
        domain.monitor(xa.MemAccess) as monitor,
    ):
        view = altp2m.create_view(label="watched")
        with domain.paused():
            view.set_access(options.gfn, xa.Access.N)
            altp2m.switch_to_view(view)
        if isinstance(xen.backend, MockBackend):  # whose guest does as it is told
            page = options.gfn * xa.PAGE_SIZE
            read, write = (
                Instruction(0x1000, 4, [("r", page)]),
                Instruction(0x1004, 4, [("w", page)]),
            )
            xen.backend.load(domain.domid, [read, write, Instruction(page + 8)], loop=True)
            xen.backend.domain_unpause(domain.domid)

        once = xa.Response.fast_singlestep(through=0, back_to=view)
        left = options.hits
        for event in monitor.events(timeout=5.0):
            if isinstance(event, xa.MemAccess):
                event.reply(once)
                kinds = xa.AccessFlag.R | xa.AccessFlag.W | xa.AccessFlag.X
                tried = (event.access_flags & kinds).name
                print(f"rip {event.registers.rip:#x} tried {tried} at {event.gla:#x}")
                left -= 1
            if not left:
                break


if __name__ == "__main__":
    main()
