# SPDX-License-Identifier: LGPL-2.1-or-later
"""Agents killed by SIGKILL at random moments, and the guest that goes on when it was rescued."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import time
from collections import Counter

import pytest

import xenaltp2m as xa
from tests.contract.guests import GUESTS, RunningGuest, hooked, running
from xenaltp2m.handles.journal import DIRECTORY
from xenaltp2m.tools.rescue import diagnose, rescue

from . import victim

PROCESSES = multiprocessing.get_context("fork")
KILLS = int(os.environ.get("XENALTP2M_KILLS", "2"))
PATIENCE = 60


def kill(chance: random.Random, fast: bool) -> None:
    """Have an agent work, and kill it at a moment: also when it begins or ends."""
    seed = chance.randrange(1 << 30)
    agent = PROCESSES.Process(target=victim.main, args=("racer", GUESTS / "racer.elf", seed, fast))
    agent.start()
    time.sleep(chance.uniform(0.2, 4))
    assert agent.is_alive()
    agent.kill()
    agent.join()


def goes_on(guest: RunningGuest) -> None:
    """All vCPUs do."""
    before, end = guest.lines("made"), time.monotonic() + PATIENCE
    while any(now < then + 5 for now, then in zip(guest.lines("made"), before, strict=True)):
        assert time.monotonic() < end, f"stands still: {before}, {guest.lines('made')}"
        time.sleep(0.02)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
def test_killed_at_random_moments(fast: bool) -> None:
    chance = random.Random(fast)
    left: Counter[str] = Counter()
    with running("xen", "racer", 4) as guest, xa.Xen(guest.xen.backend, DIRECTORY) as xen:
        domid = int(guest.dom.domid)
        before, limit = guest.contents(), guest.dom.info().max_pages
        counts = {guest.dom.info().pages}
        guest.start()
        for number in range(KILLS):
            kill(chance, fast)
            found = diagnose(xen, domid)
            left["a ring"] += found.ring
            left["altp2m on"] += found.altp2m
            left["a pause"] += found.paused
            left["pages"] += any(one.record and one.record.pages for one in found.killed)
            if number % 10:
                outcome = rescue(xen, domid)
                assert outcome.failed == (), outcome
            else:
                command = ["xenaltp2m", "rescue", "racer", "--json"]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                assert not [step for step in json.loads(run.stdout)["steps"] if step["error"]]
            assert diagnose(xen, domid).lines() == []
            goes_on(guest)
            info = guest.dom.info()
            assert info.max_pages == limit
            counts.add(info.pages)
            with hooked(guest) as (monitor, breakpoints):  # the next agent
                hits = 5
                hook = breakpoints.insert(guest.address("hit"), lambda hit: monitor.stop())
                while hook.hits < hits:
                    monitor.run(breakpoints, timeout=PATIENCE)
            assert not list(DIRECTORY.glob(f"{domid}-*"))
        assert max(counts) - min(counts) <= 1  # the ring's page is there or not; shadows are 16
        with guest.dom.paused():
            after = guest.contents()
        assert {gfn for gfn in after if after[gfn] != before[gfn]} <= guest.writable_gfns()
        assert guest.lines("noticed") == [0] * 4
        xen._undo.forget()  # the backend is the guest's
    print(f"{KILLS} kills, that left: {dict(left)}")
    assert left["a ring"] or KILLS < 10
