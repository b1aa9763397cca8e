# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views captured, restored, captured again: on the mock, and on Xen; in a domain, and the next.

What hypothesis makes of it on the mock is in tests/unit/test_state.py.
"""

from __future__ import annotations

import random

import pytest

import xenaltp2m as xa
from xenaltp2m.tools.state.capture import restore
from xenaltp2m.values.state import State

from .guests import RunningGuest, running
from .test_breakpoints import HOSTS

ACCESSES = [xa.Access.N, xa.Access.R, xa.Access.X, xa.Access.RX, xa.Access.RW, xa.Access.N2RWX]
UNUSED = range(0x300, 0x400)
"""gfns of the guest's own that it does not use."""


def ask(guest: RunningGuest, altp2m: xa.Altp2m, chance: random.Random) -> None:
    """Views with anything in them."""
    shadows = guest.dom.add_pages(3)
    for gfn in shadows:
        guest.dom.memory.write_page(gfn, chance.randbytes(xa.PAGE_SIZE))
    views = [altp2m.create_view(label=f"view {number}") for number in range(3)]
    for view in views:
        for _ in range(12):
            first = chance.choice(UNUSED)
            access = chance.choice(ACCESSES)
            if chance.random() < 0.5:
                view.set_access(range(first, min(first + 9, UNUSED.stop)), access)
            else:
                new = chance.choice([*shadows, *UNUSED])
                if new != first and new not in chained(view, first):
                    view.remap(first, new, access=chance.choice(ACCESSES[:5]))
        view.set_suppress_ve(UNUSED[7], False)
    views[2].set_visibility(False)
    altp2m.switch_to_view(views[1])


def chained(view: xa.View, gfn: int) -> set[int]:
    """The gfns that show a page, by way of others, that is this gfn's own, or would be."""
    found: set[int] = {gfn}
    more = set(found)
    while more:
        more = {int(one) for one, new in view.remaps.items() if new in found} - found
        found |= more
    return found


@pytest.mark.parametrize("host_name", HOSTS)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_again(host_name: str, seed: int) -> None:
    with running(host_name, "hello") as guest:
        with guest.dom.altp2m() as altp2m:
            ask(guest, altp2m, random.Random(seed))
            data = xa.capture(altp2m, contents=True, verify=True).to_bytes(origin=False)
        take_pages(guest)
        again_and_again(guest, data)
    with running(host_name, "hello") as guest:  # the next domain
        again_and_again(guest, data)


def again_and_again(guest: RunningGuest, data: bytes) -> None:
    for _ in range(2):
        pages = guest.dom.info().pages
        with guest.dom.altp2m() as altp2m:
            restore(altp2m, State.from_bytes(data))
            captured = xa.capture(altp2m, contents=True, verify=True)
            assert captured.to_bytes(origin=False) == data
            assert {int(view) for view in altp2m.vcpu_views().values()} == {int(altp2m.views[1].id)}
        take_pages(guest)
        assert guest.dom.info().pages == pages


def take_pages(guest: RunningGuest) -> None:
    for gfns in list(guest.dom.context.added):
        guest.dom.remove_pages(gfns)
