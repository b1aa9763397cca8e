# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent's tests: they need pytest and xenaltp2m[sim], no Xen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tripwire import Tripwire, Write

import xenaltp2m as xa
from xenaltp2m.backend.mock import Instruction
from xenaltp2m.testing import Failing
from xenaltp2m.tools.symbols import Image

GUEST = Path(__file__).resolve().parents[2] / "guest" / "hello.elf"
CODE, TABLE, OTHER = 0x1000, 0x100, 0x200


def write_for_ever(host: Failing) -> None:
    """Have vCPU 0 write to both pages, in turn, once the domain is unpaused."""
    first = Instruction(CODE, 4, [("w", TABLE << 12)])
    second = Instruction(CODE + 4, 4, [("w", OTHER << 12)])
    host.load(1, [first, second], loop=True)


class Listener:
    """Takes so many writes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.writes: list[Write] = []

    def __call__(self, write: Write) -> bool:
        self.writes.append(write)
        return len(self.writes) < self.most


def test_it_tells_who_writes(xen_host: Failing, xen_domain: xa.Domain) -> None:
    write_for_ever(xen_host)
    xen_host.domain_unpause(1)
    listener = Listener(3)
    Tripwire(xen_domain, [TABLE]).listen(listener, timeout=1.0)
    assert listener.writes == [Write(TABLE, 0, CODE, 0)] * 3


def test_a_real_guest_does_not_notice(
    xen_host: Failing, xen_boot: Callable[..., xa.Domain]
) -> None:
    image = Image.open(GUEST)
    guest = xen_boot(GUEST)
    xen_host.domain_unpause(int(guest.domid))
    listener = Listener(5)
    Tripwire(guest, image.gfns("counter")).listen(listener, timeout=5.0)
    for write in listener.writes:
        place = image.locate(write.rip)
        assert place is not None
        assert place.symbol.name == "target"
    counter = guest.memory.read(image.physical(image.symbol("counter")), 4)
    assert int.from_bytes(counter, "little") >= 5


def test_nothing_is_left_whichever_call_fails(xen_fail_each_call: Callable[..., int]) -> None:
    def prepare(host: Failing) -> None:
        write_for_ever(host)
        host.steps_at_once = 20
        host.domain_unpause(1)

    def agent(xen: xa.Xen) -> None:
        with xen.domain("guest") as domain:
            Tripwire(domain, [TABLE, OTHER]).listen(Listener(2), timeout=0.01)

    assert xen_fail_each_call(agent, prepare) > 100


@pytest.mark.xen_live
def test_a_live_domain_goes_on(xen_domain: xa.Domain) -> None:
    """``pytest --xen-domain NAME``, as root in dom0."""
    Tripwire(xen_domain, range(0x100, 0x110)).listen(Listener(1), timeout=1.0)
    assert not xen_domain.altp2m_active
