# SPDX-License-Identifier: LGPL-2.1-or-later
"""Throws mutated requests, ring states and handlers at the monitor, and counts its answers.

    events.py [--count 1000000] [--seed 1]

Each round opens a monitor over a ring, near the end of the indices now and then, lets a front end
as Xen's post up to eight requests at a time, well-formed, mutated or random, and answers with
random responses, with exceptions, or not at all. After closing, every request must have been
answered exactly once, with its own vCPU, and with the flag that lets it go on. Where the ring
itself was damaged every vCPU must have been let go.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import struct
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import xenaltp2m as xa
from tests.unit.ringhost import SIZES, RingHost, finish, started
from xenaltp2m.abi.vm_event import encode_request

PAUSED = 1
CONSTANT = [
    None,
    xa.Response.resume(),
    xa.Response.resume(1),
    xa.Response.deny(),
    xa.Response.reinject(),
    xa.Response.emulate(),
    xa.Response.emulate(write=False),
    xa.Response.emulate(read_data=b"abcd"),
    xa.Response.emulate(instruction=b"\x90\xc3"),
    xa.Response.singlestep(),
    xa.Response.singlestep(0),
    xa.Response.fast_singlestep(through=0, back_to=1),
    xa.Response.fast_singlestep(through=None, back_to=9),
    xa.Response.resume().with_registers(rip=1, rax=2),
    xa.Response.resume().with_next_interrupt(),
    "not a response",
]


class HandlerError(Exception):
    """What a handler raises on purpose."""


def mutated(rng: random.Random, version: int, vcpus: int) -> bytes:
    """Make a request: mostly one that Xen could send."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(SIZES[version])
    reason = rng.randrange(20) if kind < 0.9 else rng.getrandbits(32)
    flags = rng.choice([0, PAUSED, PAUSED | 0x80, PAUSED | 0x80, rng.getrandbits(32)])
    request = encode_request(version, reason, rng.randrange(vcpus), flags=flags)
    struct.pack_into("<H", request, 16, rng.choice([0, 1, 2, 9, 10, 0xFFFF]))
    request[24:56] = rng.choice([bytes(32), rng.randbytes(32)])
    if kind < 0.3:
        for _ in range(rng.randrange(1, 8)):
            request[rng.randrange(len(request))] = rng.getrandbits(8)
    return bytes(request)


def round_of(rng: random.Random) -> int:
    """Play one round; return how many requests it had."""
    version = rng.choice([6, 7])
    start = rng.choice([0, rng.getrandbits(32), 0xFFFFFFFF - rng.randrange(12)])
    host = RingHost(version, vcpus=rng.randrange(1, 12), start=start)
    requests: list[bytes] = []
    left = rng.randrange(1, 120)

    def post() -> None:
        nonlocal left
        room = 8 - ((host.produced - host.consumed) & 0xFFFFFFFF)
        for _ in range(min(rng.randrange(1, 9), room, left)):
            requests.append(mutated(rng, version, host.vcpus))
            host.put(requests[-1])
            left -= 1

    host.on_notify = post
    damaged = False

    def handler(event: xa.Event) -> xa.Response | None:
        nonlocal damaged
        repr(event), event.as_dict()
        if event.version in SIZES:
            event.registers.as_dict()
        chance = rng.random()
        if chance < 0.02:
            raise HandlerError
        if chance < 0.03:
            monitor.stop()
        if chance < 0.033:
            damaged = True
            host.damage(rng.getrandbits(32))
        if chance < 0.1:
            with contextlib.suppress(xa.XenError):
                event.reply(rng.choice(CONSTANT))  # type: ignore[arg-type]
            return None
        return rng.choice(CONSTANT)  # type: ignore[return-value]

    dom, monitor = started(host, xa.MemAccess, xa.Singlestep, xa.Io)
    post()
    while left and not damaged:
        try:
            if rng.random() < 0.5:
                monitor.run(handler, timeout=0)
            else:
                for event in monitor.events(timeout=0):
                    if (response := handler(event)) is not None:
                        event.reply(response)
        except (HandlerError, xa.XenError):
            pass
        if rng.random() < 0.02:
            break
    host.on_notify = lambda: None
    monitor.close()
    finish(dom)
    host.close()
    check(host, requests, damaged)
    return len(requests)


def check(host: RingHost, requests: list[bytes], damaged: bool) -> None:
    """Compare what was asked with what was answered."""
    answered = [struct.unpack_from("<IIII", raw) for raw in host.responses]
    if damaged:
        freed = {vcpu for _, flags, _, vcpu in answered if flags & PAUSED}
        waiting = {
            struct.unpack_from("<I", raw, 12)[0]
            for raw in requests
            if struct.unpack_from("<I", raw, 4)[0] & PAUSED
        }
        missing = {vcpu for vcpu in waiting if vcpu < host.vcpus} - freed
        assert not missing, f"vCPUs {missing} wait for ever"
        return
    assert len(answered) == len(requests), f"{len(requests)} asked, {len(answered)} answered"
    asked = sorted(
        (version, flags & PAUSED, reason, vcpu)
        for version, flags, reason, vcpu in (struct.unpack_from("<IIII", raw) for raw in requests)
    )
    given = sorted(
        (version, flags & PAUSED, reason, vcpu) for version, flags, reason, vcpu in answered
    )
    assert asked == given


def main() -> int:
    """Fuzz from the command line."""
    parser = argparse.ArgumentParser(description="Fuzz the monitor's ring and codec.")
    parser.add_argument("--count", type=int, default=1_000_000, help="requests")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)
    done, seed, began = 0, options.seed, time.monotonic()
    while done < options.count:
        try:
            done += round_of(random.Random(seed))
        except BaseException:
            print(f"seed {seed} fails", file=sys.stderr)
            raise
        seed += 1
        if sys.stderr.isatty() and not seed % 100:
            print(f"\r{done:9} requests", end="", file=sys.stderr)
    seconds = time.monotonic() - began
    print(f"{done} requests in {seed - options.seed} rounds, {seconds:.0f} s: each answered once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
