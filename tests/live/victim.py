# SPDX-License-Identifier: LGPL-2.1-or-later
"""An agent to be killed: three views of its own, breakpoints, a patch, a busy ring, for ever."""

import json
import random
import time
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.tools.breakpoints.hooks import Breakpoint, Hit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.symbols import Image

HOOKS = 50
PLACES = Path(__file__).parents[1] / "contract" / "instructions.json"


def live(dom: xa.Domain, image: Image, chance: random.Random, fast: bool) -> None:
    """Begin, work for a moment, and end."""
    places = json.loads(PLACES.read_text())["racer"]
    until = time.monotonic() + chance.random()
    with (
        dom.altp2m() as altp2m,
        dom.monitor(access_required=chance.random() < 0.3) as monitor,
        Breakpoints(altp2m, monitor, fast=fast) as breakpoints,
    ):
        for number in range(3):
            view = altp2m.create_view(label=f"view {number}")
            view.set_access(range(0x200, 0x240), xa.Access.RX)
        hooks: list[Breakpoint] = []

        def churn(hit: Hit) -> None:
            if len(hooks) < HOOKS:
                hooks.append(breakpoints.insert(chance.choice(places), lambda hit: None))
            elif chance.random() < 0.2:
                hooks.pop(chance.randrange(len(hooks))).remove()
            if time.monotonic() > until:
                monitor.stop()

        target = image.physical(image.symbol("hit"))
        lea = target + 4, 4
        breakpoints.insert(target, churn)
        breakpoints.patch(lea[0], dom.memory.read(*lea))
        breakpoints.watch(image.physical(image.symbol("total")), 4, after=lambda touch: None)
        monitor.run(breakpoints, timeout=1.0)


def main(name: str, path: Path, seed: int, fast: bool) -> None:
    """Work on a domain for ever."""
    chance, image = random.Random(seed), Image.open(path)
    with xa.connect() as xen:
        while True:
            with xen.domain(name) as dom:
                live(dom, image, chance, fast)
