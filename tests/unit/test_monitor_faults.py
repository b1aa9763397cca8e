# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole session with a monitor, with its 1st, 2nd ... last call to the hypervisor failing.

Whatever fails: after the last close the guest runs, nothing of the monitor is left, and no vCPU
waits for an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from errno import EACCES, EBUSY, EINVAL, ENOMEM, EPERM, ESRCH
from itertools import count

import pytest

import xenaltp2m as xa
from tests.thorough import THOROUGH
from xenaltp2m.backend.mock import Cpuid, Instruction, WriteControlRegister
from xenaltp2m.testing import Failing

ERRNOS = [EPERM, EINVAL, ENOMEM, EBUSY, ESRCH, EACCES]
RELEASES = [(4, 14), (4, 17), (4, 20)]
WATCHED = 0x40


def guests(version: tuple[int, int]) -> Iterator[tuple[Failing, xa.Xen, xa.Domain]]:
    while True:
        mock = Failing(version, memory_pages=1 << 12)
        domid = mock.add_domain("guest", vcpus=2, memory_kib=1 << 10)
        for vcpu in range(2):
            start = 0x1000 * (vcpu + 1)
            program = [
                Instruction(start, 4, [("w", WATCHED << 12)]),
                Instruction(start + 4, 2, effect=Cpuid()),
                Instruction(
                    start + 6, 3, effect=WriteControlRegister(xa.ControlRegister.CR3, start)
                ),
                Instruction(start + 9, 3, effect=WriteControlRegister(xa.ControlRegister.CR3, 0)),
            ]
            mock.domain(domid).vcpus[vcpu].online = True
            mock.load(domid, program, vcpu=vcpu, loop=True)
        mock.steps_at_once = 8
        mock.domain_unpause(domid)
        xen = xa.connect(mock)
        yield mock, xen, xen.domain("guest")


def session(mock: Failing, dom: xa.Domain) -> None:
    """Open everything, hear of everything, answer in every way, close everything."""
    answers = count()
    with dom.altp2m() as altp2m, dom.monitor(xa.MemAccess, xa.Cpuid) as monitor:
        monitor.enable(xa.WriteCtrlreg.on(xa.ControlRegister.CR3))
        view = altp2m.create_view()
        view.set_access(WATCHED, xa.Access.R)
        altp2m.switch_to_view(view)
        mock.run(int(dom.domid), 8)

        def handler(event: xa.Event) -> xa.Response | None:
            turn = next(answers)
            if turn >= 20:
                monitor.stop()
            if isinstance(event, xa.MemAccess) and turn % 2:
                return xa.Response.singlestep(0)
            if isinstance(event, xa.Singlestep):
                return xa.Response.resume(view)
            return None

        monitor.run(handler, timeout=0)
        monitor.disable(xa.Cpuid)


def is_as_before(mock: Failing, domid: int) -> None:
    domain = mock.domain(domid)
    assert mock.open_resources() == []
    assert domain.pauses == 0
    assert not domain.active
    assert not domain.crashed
    for vcpu in domain.vcpus:
        assert vcpu.event_pauses == 0
        assert not vcpu.ring_blocked
        assert not vcpu.single_step
    assert mock.run(domid, 20) == 20


def made_by_a_session(version: tuple[int, int]) -> int:
    mock, xen, dom = next(guests(version))
    mock.start({})
    session(mock, dom)
    made = mock.made
    xen.close()
    is_as_before(mock, int(dom.domid))
    return made


def fails(version: tuple[int, int], plan: dict[int, int]) -> None:
    mock, xen, dom = next(guests(version))
    mock.start(plan)
    with contextlib.suppress(xa.XenError):
        session(mock, dom)
    with contextlib.suppress(xa.LeftoverError):
        xen.close()
    mock.start({})
    xen.close()
    is_as_before(mock, int(dom.domid))


@pytest.mark.parametrize("version", RELEASES, ids="{0[0]}.{0[1]}".format)
@pytest.mark.parametrize("errno", ERRNOS)
def test_any_call_may_fail(version: tuple[int, int], errno: int) -> None:
    made = made_by_a_session(version)
    assert made > 50
    for nth in range(1, made + 1):
        try:
            fails(version, {nth: errno})
        except BaseException as error:
            error.add_note(f"call {nth} of {made}")
            raise


def test_any_two_calls_may_fail() -> None:
    made = made_by_a_session((4, 20))
    for first in range(1, made + 1, 3):
        for second in range(first + 1 + first // 3 % 2, made + 8, 1 if THOROUGH else 2):
            try:
                fails((4, 20), {first: EPERM, second: EPERM})
            except BaseException as error:
                error.add_note(f"calls {first} and {second} of {made}")
                raise
