# SPDX-License-Identifier: LGPL-2.1-or-later
"""Protect one page of a guest in a view, and run the guest in it for a while.

Everything is undone at the end of the ``with`` statement, after an error and after Ctrl-C, too.
A write to the page then lifts the protection, for no monitor listens: see the last line printed.
"""

import argparse
import time

import xenaltp2m as xa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="guest", help="domid, name or uuid")
    parser.add_argument("--gfn", type=lambda text: int(text, 0), default=0x101)
    parser.add_argument("--seconds", type=float, default=0.1)
    options = parser.parse_args()

    with (
        xa.connect(options.connect) as xen,
        xen.domain(options.domain) as domain,
        domain.altp2m() as altp2m,
    ):
        view = altp2m.create_view(label="write-protected")
        view.set_access(options.gfn, xa.Access.RX)
        altp2m.switch_to_view(view)

        print(f"gfn {options.gfn:#x} is {domain.host_access(options.gfn)} in the host p2m")
        print(f"gfn {options.gfn:#x} is {view.access(options.gfn)} in {view}")
        print(f"vCPUs and the views they run in: {altp2m.vcpu_views()}")
        time.sleep(options.seconds)
        print("still protected" if not view.verify() else "the guest has written to it")


if __name__ == "__main__":
    main()
