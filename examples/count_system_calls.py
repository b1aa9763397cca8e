# SPDX-License-Identifier: LGPL-2.1-or-later
"""Count the system calls of each process of a guest, told apart by its page tables.

Of a Linux guest, its /proc/kallsyms being in a file: --symbols kallsyms --entry do_syscall_64
--number 1, for that takes the registers and the number of the call. On the mock the guest is
examples/guest/paged.elf, whose user code calls by int 0x80; there the function is system_call.
"""

import argparse
from collections import Counter
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.symbols import Symbols
from xenaltp2m.tools.tracing import Call, Return

PAGED = Path(__file__).parent / "guest" / "paged.elf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="paged", help="domid, name or uuid")
    parser.add_argument("--symbols", type=Path, default=PAGED, help="ELF, System.map, kallsyms")
    parser.add_argument("--entry", default="system_call", help="what each system call comes to")
    parser.add_argument("--number", type=int, help="which argument has its number, from 0")
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()

    backend: str | MockBackend = options.connect
    if options.connect == "mock":
        backend = MockBackend()
        backend.boot(backend.add_domain("paged"), PAGED)
    words = 0 if options.number is None else options.number + 1
    calls: Counter[tuple[int, int | None]] = Counter()

    def count(seen: Call | Return) -> None:
        if isinstance(seen, Call):
            calls[seen.cr3 & -xa.PAGE_SIZE, seen.arguments[-1] if words else None] += 1

    with (
        xa.connect(backend) as xen,
        xen.domain(options.domain) as domain,
        xa.Trace(
            domain, options.entry, symbols=Symbols.open(options.symbols), arguments=words
        ) as trace,
    ):
        if isinstance(backend, MockBackend):
            backend.domain_unpause(domain.domid)
        trace.run(count, timeout=options.seconds, seconds=options.seconds)
    for (cr3, number), hits in calls.most_common():
        what = "" if number is None else f"  call {number}"
        print(f"page tables at {cr3:#x}{what}  {hits}")


if __name__ == "__main__":
    main()
