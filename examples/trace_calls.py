# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trace a function's calls, from the first on, in a guest that checks itself and notices nothing.

In a view of its own the function's page is as it was, but for fetches, which stop the vCPU: they
are let through by single steps in view 0. On Xen, xl create -p checker.cfg makes the guest.
"""

import argparse
import json
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.symbols import Image, Symbol

CHECKER = Path(__file__).parent / "guest" / "checker.elf"
REGISTERS = "rip", "rsp", "rbx", "rdi", "rsi", "rdx"
LONG_MODE, SHOWN = 1 << 10, 10
Calls = Generator[dict[str, int], None, None]


def word(domain: xa.Domain, image: Image, address: int, size: int) -> int:
    place = image.physical(Symbol("", address, size))  # the guest's addresses are virtual
    return int.from_bytes(domain.memory.read(place, size), "little")


def trace(xen: xa.Xen, domain: xa.Domain, image: Image, name: str) -> Calls:
    """Yield each call, while the guest waits in it."""
    function = image.address(name)
    with domain.altp2m() as altp2m, domain.monitor(xa.MemAccess) as monitor:
        view = altp2m.create_view(label="private")
        view.set_access(image.gfns(name), xa.Access.RW)
        altp2m.switch_to_view(view)
        step = xa.Response.fast_singlestep(through=0, back_to=view)
        xen.backend.domain_unpause(domain.domid)
        for event in monitor.events(timeout=10.0):
            if isinstance(event, xa.MemAccess):
                event.reply(step)
                if event.registers.rip == function:  # its page has more on it
                    call = {name: getattr(event.registers, name) for name in REGISTERS}
                    size = 8 if event.registers.msr_efer & LONG_MODE else 4
                    yield {**call, "return": word(domain, image, call["rsp"], size)}


def self_check(domain: xa.Domain, image: Image) -> tuple[int, int]:
    """How much the guest has noticed, and in how many passes."""
    _, at, size, _ = image.symbol("noticed")
    counters = [word(domain, image, address, 4) for address in range(at, at + size, 4)]
    has_passes = any(symbol.name == "passes" for symbol in image.symbols)
    passes = word(domain, image, image.address("passes"), 8) if has_passes else counters.pop()
    return sum(counters), passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--image", type=Path, default=CHECKER, help="of examples/guest")
    parser.add_argument("--domain", help="domid, name or uuid (default: the image's name)")
    parser.add_argument("--symbol", default="target")
    parser.add_argument("--count", type=int, default=200, help="end after so many calls")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    image, name = Image.open(options.image), options.domain or options.image.stem

    backend: str | MockBackend = options.connect
    if options.connect == "mock":
        backend = MockBackend()
        backend.boot(backend.add_domain(name), options.image)
    with (
        xa.connect(backend) as xen,
        xen.domain(name) as domain,
        closing(trace(xen, domain, image, options.symbol)) as tracing,
    ):
        calls = list(islice(tracing, options.count))
        noticed, passes = self_check(domain, image)  # while the guest waits in the last call
    if options.json:
        print(json.dumps({"calls": calls, "noticed": noticed, "passes": passes}))
        return
    rows = [["call", *REGISTERS, "returns to"]]
    for number, call in enumerate(calls[:SHOWN], 1):
        back = call["return"]
        rows.append([str(number), *(f"{call[name]:#x}" for name in REGISTERS)])
        rows[-1].append(f"{back:#x} {image.locate(back) or ''}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    if calls[SHOWN:]:
        print(f"and {len(calls) - SHOWN} more")
    print(f"The guest's self-check noticed {noticed or 'nothing'} in {passes} passes.")


if __name__ == "__main__":
    main()
