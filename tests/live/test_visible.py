# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest can see of breakpoints: "What a guest can detect" in docs/breakpoints.md."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.contract.guests import RunningGuest, hooked, running, serve
from tests.contract.test_breakpoints import CORNERS

SHADOWS = 16
"""Pages are added so many at a time."""
WAYS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])


@pytest.fixture
def corners() -> Iterator[RunningGuest]:
    with running("xen", str(CORNERS)) as guest:
        yield guest


def go(guest: RunningGuest, round_: int) -> None:
    """Have the guest go through its corners once more, with nobody who watches.

    A monitor is open before, as with breakpoints, for its ring counts among the guest's pages.
    """
    with guest.dom.monitor() as monitor:
        guest.write_word("go", round_)
        if round_ == 1:
            guest.start()
        serve(monitor, lambda event: None, lambda: guest.words("rounds") == (round_,))


def watched(guest: RunningGuest, round_: int, place: str, *, fast: bool) -> int:
    """The same with a breakpoint; how often it was hit."""
    with hooked(guest, fast=fast) as (monitor, breakpoints):
        hook = breakpoints.insert(guest.address(place), lambda hit: None)
        guest.write_word("go", round_)
        serve(monitor, breakpoints, lambda: guest.words("rounds") == (round_,))
    return hook.hits


def answers(guest: RunningGuest) -> tuple[int, int, int]:
    """Its reservation and the most it may have, in pages; and what HVMOP_altp2m answers."""
    current, maximum, altp2m = guest.words("answers", 3)
    return current, maximum, altp2m - (1 << 32)


def test_fault_34_a_guest_sees_that_altp2m_is_on_and_pages_were_added(
    corners: RunningGuest,
) -> None:
    """``do_altp2m_op`` (xen/arch/x86/hvm/hvm.c) looks at the state before the mode."""
    go(corners, 1)
    current, maximum, off = answers(corners)
    assert off == -errno.EOPNOTSUPP
    assert watched(corners, 2, "based_target", fast=True) == 1
    seen = answers(corners)
    assert seen == (current + SHADOWS, maximum + SHADOWS, -errno.EPERM)
    go(corners, 3)
    assert answers(corners) == (current, maximum, -errno.EOPNOTSUPP)


@WAYS
def test_fault_34_an_interrupt_comes_one_instruction_late(
    corners: RunningGuest, fast: bool
) -> None:
    """Xen completes the write to the APIC, and the step ends with the next instruction."""
    nop = 1
    corners.write_word("apic", 1)
    go(corners, 1)
    sent = corners.address("sent")
    assert corners.words("interrupted_at") == (sent,)
    assert watched(corners, 2, "send", fast=fast) == 1
    assert corners.words("interrupted_at") == (sent + nop,)
    assert watched(corners, 3, "sent", fast=fast) == 1
    assert corners.words("interrupted_at") == (sent,)
