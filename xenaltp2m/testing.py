# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests of agents need: a modelled host whose calls fail by plan, and what was left behind.

The fixtures of the pytest plugin are made of this; it needs no pytest itself.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeAlias

from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Refused
from xenaltp2m.errors import LeftoverError, XenError
from xenaltp2m.xen import Xen, connect

__all__ = ["ERRNOS", "Agent", "Failing", "Plan", "fail_each_call", "footprint", "left_behind"]

Plan: TypeAlias = dict[int, int]
"""Which calls fail, counted from 1, and with which errno."""

Agent: TypeAlias = Callable[[Xen], object]
"""What is tested: it gets a connection, and closes what it opens."""

ERRNOS = (_errno.EINVAL, _errno.EBUSY, _errno.ENOMEM, _errno.ESRCH, _errno.EPERM)
"""What Xen most often refuses with."""

_OPEN = "open"
_ANSWERS = {
    ("altp2m_get_mem_access", _errno.ESRCH),
    ("altp2m_get_suppress_ve", _errno.ESRCH),
    ("altp2m_set_suppress_ve", _errno.ESRCH),
}
"""What is no failure: Xen says so that there is no entry, or no RAM to make one of."""


class Failing(MockBackend):
    """A modelled host whose calls fail by plan.

    Attributes:
        plan: Which fail; nothing is done by those.
        made: How many calls were made since :meth:`start`.
        failed: The operations that have failed since then, in order.
    """

    plan: Plan = {}  # noqa: RUF012 - replaced, never changed
    made = 0
    failed: tuple[str, ...] = ()

    def start(self, plan: Plan) -> None:
        """Count calls from here on, and have them fail by a plan; ``{}``: none."""
        self.plan, self.made, self.failed = plan, 0, ()

    def _inject(self, op: str) -> None:
        super()._inject(op)
        self.made += 1
        errno = self.plan.get(self.made)
        if errno and (op, errno) not in _ANSWERS:
            self.failed += (op,)
            raise Refused(errno)


def footprint(host: MockBackend) -> dict[str, object]:
    """Return all that an agent should leave as it was, by its name.

    A page that was given to a ring is not among it: Xen takes it from the guest for good.
    """
    found: dict[str, object] = dict.fromkeys(host.open_resources(), _OPEN)
    for domid, domain in sorted(host.machine.domains.items()):
        name = f"domain {domid}"
        found[f"{name}: pauses"] = domain.pauses
        found[f"{name}: altp2m"] = "on" if domain.active else "off"
        found[f"{name}: limit in pages"] = domain.max_pages
        found[f"{name}: access_required"] = domain.access_required
        found[f"{name}: crashed"] = domain.crashed
        for vcpu in domain.vcpus:
            where = f"{name}, vCPU {vcpu.number}"
            found[f"{where}: waits for answers"] = vcpu.event_pauses
            found[f"{where}: waits for room in the ring"] = vcpu.ring_blocked
            found[f"{where}: single-steps"] = vcpu.single_step
    return found


def left_behind(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Say in what a footprint differs from an earlier one, a line for each thing.

    Domains that are only in one of them do not count.
    """
    return [f"{what} is open" for what in after if what not in before and after[what] == _OPEN] + [
        f"{what} is {after[what]}, and was {before[what]}"
        for what in after
        if what in before and before[what] != after[what]
    ]


def fail_each_call(
    agent: Agent,
    make_host: Callable[[], Failing],
    errnos: Iterable[int] = ERRNOS,
) -> int:
    """Run an agent on one host after the other, on each with another of its calls failing.

    On the first host its first call fails, on the second its second, and so on with each errno. It
    may raise a :class:`~xenaltp2m.errors.XenError` then, or cope. Whatever it does, once all is
    closed its host must be as it was before.

    Args:
        agent: Gets a connection.
        make_host: Makes hosts, all alike.
        errnos: What calls fail with.

    Returns:
        How many calls have failed, each on a host of its own.

    Raises:
        AssertionError: Something is left behind; it names the call and what is left.
    """
    failures = 0
    for errno in errnos:
        number = 0
        while True:
            number += 1
            host = make_host()
            before = footprint(host)
            xen = connect(host)
            host.start({number: errno})
            try:
                with suppress(XenError):
                    agent(xen)
            except BaseException as error:
                error.add_note(_told(host, number, errno))
                raise
            finally:
                with suppress(LeftoverError):
                    xen.close()
                made, failed = host.made, host.failed
                host.plan = {}
                xen.close()
            if left := left_behind(before, footprint(host)):
                raise AssertionError("\n  ".join([_told(host, number, errno), *left]))
            failures += len(failed)
            if made < number:
                break
    return failures


def _told(host: Failing, number: int, errno: int) -> str:
    if not host.failed:
        return "no call has failed, and yet:"
    return f"call {number}, {host.failed[0]}, has failed with {_errno.errorcode[errno]}:"
