# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compare a view with what was asked of it.

Xen passes over gfns that are not ordinary RAM without saying so, and it may reset a view when the
guest's memory changes. The view remembers what was set, and ``verify`` asks Xen what became of it.
"""

import argparse

import xenaltp2m as xa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="guest", help="domid, name or uuid")
    parser.add_argument("--first", type=lambda text: int(text, 0), default=0xF00)
    parser.add_argument("--count", type=lambda text: int(text, 0), default=0x200)
    options = parser.parse_args()
    gfns = range(options.first, options.first + options.count)

    with (
        xa.connect(options.connect) as xen,
        xen.domain(options.domain) as domain,
        domain.altp2m() as altp2m,
    ):
        view = altp2m.create_view(label="checked")
        view.set_access(gfns, xa.Access.RX)
        missing = [mismatch.gfn for mismatch in view.verify()]
        print(f"asked for {xa.Access.RX}: gfns {gfns[0]:#x}..{gfns[-1]:#x}")
        print(f"{len(gfns) - len(missing)} are so, {len(missing)} are not")
        if missing:
            print(f"not so: from {missing[0]:#x} to {missing[-1]:#x}")


if __name__ == "__main__":
    main()
