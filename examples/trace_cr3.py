# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trace the address spaces that each vCPU switches to: writes to CR3.

The vCPUs do not wait for an answer here (sync=False), so that tracing hardly slows the guest.
"""

import argparse
from collections import Counter

import xenaltp2m as xa
from xenaltp2m.backend.mock import Instruction, MockBackend, WriteControlRegister


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="guest", help="domid, name or uuid")
    parser.add_argument("--seconds", type=float, default=0.2, help="end if nothing happens so long")
    parser.add_argument("--writes", type=int, default=1000, help="end after so many")
    options = parser.parse_args()

    switches = xa.WriteCtrlreg.on(xa.ControlRegister.CR3, sync=False)
    seen: Counter[tuple[int, int]] = Counter()
    with (
        xa.connect(options.connect) as xen,
        xen.domain(options.domain) as domain,
        domain.monitor(switches) as monitor,
    ):
        if isinstance(xen.backend, MockBackend):  # whose guest does as it is told
            spaces = (0x5000, 0x9000, 0x5000)
            program = [
                Instruction(0x1000 + 3 * at, 3, effect=WriteControlRegister(1, value))
                for at, value in enumerate(spaces)
            ]
            xen.backend.load(domain.domid, program)
            xen.backend.domain_unpause(domain.domid)

        for event in monitor.events(timeout=options.seconds):
            if isinstance(event, xa.WriteCtrlreg):
                print(f"vCPU {event.vcpu}: {event.old_value:#x} -> {event.new_value:#x}")
                seen[event.vcpu, event.new_value] += 1
            if seen.total() == options.writes:
                break

    for (vcpu, space), times in sorted(seen.items()):
        print(f"vCPU {vcpu} went to {space:#x} {times} times")


if __name__ == "__main__":
    main()
