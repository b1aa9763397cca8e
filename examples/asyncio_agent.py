# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listen to a guest in an asyncio loop, beside whatever else runs there: here, a timer.

An event is answered when the loop comes back for the next one: by what reply() was given, or by
the event's default response. The guest waits that long, so a task that blocks the loop stops it.
"""

import argparse
import asyncio
from collections import Counter

import xenaltp2m as xa
from xenaltp2m.backend.mock import Cpuid, Instruction, MockBackend, WriteControlRegister


async def count(monitor: xa.Monitor, hits: Counter[str]) -> None:
    async for event in monitor:
        hits[type(event).__name__] += 1


async def stop_later(monitor: xa.Monitor, seconds: float, hits: Counter[str]) -> None:
    await asyncio.sleep(seconds)
    print(f"{hits.total()} events in {seconds} s")
    monitor.stop()


async def listen(monitor: xa.Monitor, seconds: float) -> Counter[str]:
    hits: Counter[str] = Counter()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(count(monitor, hits))
        tasks.create_task(stop_later(monitor, seconds, hits))
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    parser.add_argument("--domain", default="guest", help="domid, name or uuid")
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args()

    cr3 = xa.WriteCtrlreg.on(xa.ControlRegister.CR3)
    with (
        xa.connect(options.connect) as xen,
        xen.domain(options.domain) as domain,
        domain.monitor(cr3, xa.Cpuid) as monitor,
    ):
        if isinstance(xen.backend, MockBackend):  # whose guest does as it is told
            cpuid = Instruction(0x1000, 2, effect=Cpuid())
            switch = Instruction(0x1002, 3, effect=WriteControlRegister(1, 0x5000))
            xen.backend.load(domain.domid, [cpuid, switch])
            xen.backend.domain_unpause(domain.domid)
        hits = asyncio.run(listen(monitor, options.seconds))
    for name, times in sorted(hits.items()):
        print(f"{name}: {times}")


if __name__ == "__main__":
    main()
