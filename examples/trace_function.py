# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trace a function of a guest: each call with its arguments, and what it returns.

On the mock the guest is examples/guest/racer.elf, whose hit(n) returns 3n + 1. Whoever watches its
own code there finds nothing: the breakpoints are in shadow pages.
"""

import argparse
from itertools import islice
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.symbols import Symbols
from xenaltp2m.tools.tracing import Call, Trace

RACER = Path(__file__).parent / "guest" / "racer.elf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="racer", help="domid, name or uuid")
    parser.add_argument("--symbols", type=Path, default=RACER, help="ELF, System.map, kallsyms")
    parser.add_argument("--function", default="hit")
    parser.add_argument("--arguments", type=int, default=1, help="how many to show")
    parser.add_argument("--count", type=int, default=6, help="end after so many lines")
    options = parser.parse_args()

    symbols = Symbols.open(options.symbols)
    backend: str | MockBackend = options.connect
    if options.connect == "mock":
        backend = MockBackend()
        backend.boot(backend.add_domain("racer"), RACER)
    with (
        xa.connect(backend) as xen,
        xen.domain(options.domain) as domain,
        Trace(
            domain, options.function, symbols=symbols, arguments=options.arguments, returns=True
        ) as trace,
    ):
        if isinstance(backend, MockBackend):
            backend.domain_unpause(domain.domid)
        for seen in islice(trace.calls(timeout=10.0), options.count):
            call = seen if isinstance(seen, Call) else seen.call
            words = f"{call.name}({', '.join(map(hex, call.arguments))})"
            if isinstance(seen, Call):
                place = symbols.locate(call.caller or 0) or hex(call.caller or 0)
                print(f"vCPU {seen.vcpu}: {words} called from {place}")
            else:
                print(f"vCPU {seen.vcpu}: {words} = {seen.value:#x}")
        print(f"{trace.hits[options.function]} calls")


if __name__ == "__main__":
    main()
