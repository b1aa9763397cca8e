# SPDX-License-Identifier: LGPL-2.1-or-later
"""Judges programs on real Xen, in dom0 of the lab: ``python3 -m tests.transparency.live 0 2000``.

A line for each that differs goes to standard output, with what it takes to run it again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import xenaltp2m as xa
from xenaltp2m.tools.symbols import Image

from .compare import describe, judge
from .machine import IMAGE, Machine, Stuck
from .programs import generate

NAME, CONFIG, VCPUS = "programs", "/lab/external-1.cfg", 2
_PATIENCE = 20.0
_RF = 1 << 16


class Live(Machine):
    """A guest of the lab.

    Its CPU delivers a single-step trap with RF set where the fetch of the next instruction was
    refused meanwhile: Bochs 3.0 clears RF when it fetches (``prefetch``, cpu/cpu.cc) and not when
    an instruction is done. By the SDM (3B 18.3.1.1) the flag is clear there.
    """

    kept_flags = ~_RF & 0xFFFFFFFF


@contextmanager
def live(xen: xa.Xen) -> Iterator[Machine]:
    """Start the guest; it waits, paused, for programs."""
    settings = [
        f"vcpus={VCPUS}",
        f'kernel="{IMAGE.resolve()}"',
        f'name="{NAME}"',
        'on_crash="preserve"',
    ]
    subprocess.run(["xl", "create", "-q", "-e", CONFIG, *settings], check=True)
    try:
        with xen.domain(NAME) as dom:
            end = time.monotonic() + _PATIENCE
            while not all(dom.vcpu(vcpu).info().online for vcpu in range(VCPUS)):
                if time.monotonic() > end:
                    raise Stuck("a vCPU has not come up")
            xen.backend.domain_pause(int(dom.domid))
            yield Live(dom, Image.open(IMAGE), VCPUS)
    finally:
        subprocess.run(["xl", "destroy", NAME], check=False, capture_output=True)


def main() -> int:
    """Judge a range of seeds; the exit status is 1 if any differs."""
    seeds = deque(range(int(sys.argv[1]), int(sys.argv[2])))
    judged = differing = hits = 0
    with xa.connect("libxc") as xen:
        while seeds:
            with live(xen) as machine:
                is_usable = True
                while seeds and is_usable:
                    judged, seed = judged + 1, seeds.popleft()
                    try:
                        verdict = judge(generate(seed), machine)
                        hits += verdict.hits
                        is_usable = verdict.ended
                        lines = describe(verdict) if verdict.differences else None
                    except (Stuck, xa.XenError) as error:
                        is_usable, lines = False, f"seed {seed}: {error}"
                    if lines is not None:
                        differing += 1
                        print(lines, flush=True)
    print(f"{judged} programs, {hits} hits, {differing} differ", flush=True)
    return differing > 0


if __name__ == "__main__":
    sys.exit(main())
