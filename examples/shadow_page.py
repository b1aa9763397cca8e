# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hide a patched byte: a view executes the patch, everybody else sees the page as it was.

This is how breakpoints are hidden from a guest. The patch lies in a shadow page, a copy that only
the view shows; with access ``x`` the guest may fetch from it, while a read would be a violation,
which a monitor answers from the page itself.
"""

import argparse

import xenaltp2m as xa

INT3 = b"\xcc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="guest", help="domid, name or uuid")
    parser.add_argument("--address", type=lambda text: int(text, 0), default=0x101000)
    options = parser.parse_args()
    gfn, offset = divmod(options.address, xa.PAGE_SIZE)

    with xa.connect(options.connect) as xen, xen.domain(options.domain) as domain:
        with domain.altp2m() as altp2m:
            [shadow] = domain.add_pages(1)
            with domain.paused():
                domain.memory.write_page(shadow, domain.memory.read_page(gfn))
                domain.memory.write(shadow * xa.PAGE_SIZE + offset, INT3)
                view = altp2m.create_view(label="breakpoint")
                view.remap(gfn, shadow, access=xa.Access.X)

            original = domain.memory.read(options.address, 1)
            patched = domain.memory.read(shadow * xa.PAGE_SIZE + offset, 1)
            print(f"host p2m: gfn {gfn:#x} has {original.hex()} at {offset:#x}")
            print(f"{view}: gfn {gfn:#x} shows gfn {shadow:#x}, which has {patched.hex()} there")
            print(f"access in the view: {view.access(gfn)}")
            # Here altp2m.switch_to_view(view), and a monitor that answers what is hit.

        print(
            f"afterwards: {domain.memory.read(options.address, 1).hex()}, no view, no shadow page"
        )


if __name__ == "__main__":
    main()
