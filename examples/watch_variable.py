# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watch a variable of a guest: who writes to it, and what.

On the mock the guest is examples/guest/racer.elf: `made` has a count for each vCPU, 64 bytes apart;
this is the second one's. What happens in the rest of the page is passed over, and counted.
"""

import argparse
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.symbols import Image

RACER = Path(__file__).parent / "guest" / "racer.elf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="racer", help="domid, name or uuid")
    parser.add_argument("--image", type=Path, default=RACER, help="the guest's ELF image")
    parser.add_argument("--variable", default="made+0x40", help="a symbol, or symbol+0x10")
    parser.add_argument("--size", type=int, default=4, help="bytes")
    parser.add_argument("--count", type=int, default=4, help="end after so many writes")
    options = parser.parse_args()

    image = Image.open(options.image)
    backend: str | MockBackend = options.connect
    if options.connect == "mock":
        backend = MockBackend()
        backend.boot(backend.add_domain("racer", vcpus=2), RACER)
    with (
        xa.connect(backend) as xen,
        xen.domain(options.domain) as domain,
        domain.altp2m() as altp2m,
        domain.monitor() as monitor,
        xa.Breakpoints(altp2m, monitor) as breakpoints,
    ):

        def written(touch: xa.WatchpointHit) -> None:
            value = int.from_bytes(touch.watchpoint.read(), "little")
            place = image.locate(touch.registers.rip)
            print(f"vCPU {touch.vcpu} has made it {value}, before {place}")
            if touch.watchpoint.hits == options.count:
                monitor.stop()

        where = image.physical_of(image.address(options.variable))
        watch = breakpoints.watch(where, options.size, after=written)
        if isinstance(backend, MockBackend):
            backend.domain_unpause(domain.domid)
        monitor.run(breakpoints, timeout=10.0)
        print(f"{watch.hits} writes, and {watch.passed} beside it")


if __name__ == "__main__":
    main()
