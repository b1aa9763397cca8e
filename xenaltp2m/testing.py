# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tools to test agents: a modelled host with fault injection, and a check for leftovers.

The fixtures of the pytest plugin use this module, which does not need pytest itself.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeAlias

from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import HypercallError
from xenaltp2m.errors import LeftoverError, XenError
from xenaltp2m.handles.xen import Xen, connect

__all__ = ["ERRNOS", "Agent", "Failing", "Plan", "fail_each_call", "footprint", "left_behind"]

Plan: TypeAlias = dict[int, int]
"""The errno of each call that fails, by the call's number, from 1."""

Agent: TypeAlias = Callable[[Xen], object]
"""The agent under test: it takes a connection, and closes everything that it opens."""

ERRNOS = (_errno.EINVAL, _errno.EBUSY, _errno.ENOMEM, _errno.ESRCH, _errno.EPERM)
"""The errnos that Xen returns most often."""

_OPEN = "open"
_ANSWERS = {
    ("altp2m_get_mem_access", _errno.ESRCH),
    ("altp2m_get_suppress_ve", _errno.ESRCH),
    ("altp2m_set_suppress_ve", _errno.ESRCH),
}
"""Errnos that are no failures: Xen returns them if a gfn has no entry, or is not RAM."""


class Failing(MockBackend):
    """A modelled host whose calls fail by a plan.

    Attributes:
        plan: The calls that fail; a call that fails changes nothing.
        made: The number of calls since :meth:`start`.
        failed: The operations that have failed since then, in order.
    """

    plan: Plan = {}  # noqa: RUF012 - replaced, never changed
    made = 0
    failed: tuple[str, ...] = ()

    def start(self, plan: Plan) -> None:
        """Restart the count of calls, and set the plan; with ``{}`` no call fails."""
        self.plan, self.made, self.failed = plan, 0, ()

    def _inject(self, op: str) -> None:
        super()._inject(op)
        self.made += 1
        errno = self.plan.get(self.made)
        if errno and (op, errno) not in _ANSWERS:
            self.failed += (op,)
            raise HypercallError(errno)


def footprint(host: MockBackend) -> dict[str, object]:
    """Return everything that an agent must leave as it was, by name.

    It does not include the page of a ring, which Xen removes from the guest permanently.
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
    """List how a footprint differs from an earlier one, in words.

    Domains that are in only one of them are not compared.
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
    """Run an agent once for each of its calls, and make that call fail.

    Each run has a new host. In the first run the first call fails, in the second run the second
    call, and so on, for each errno. The agent may handle the failure, or raise a
    :class:`~xenaltp2m.errors.XenError`. In both cases, after everything is closed, its host must be
    as it was before.

    Args:
        agent: Takes a connection.
        make_host: Makes a host; all hosts must be alike.
        errnos: The errnos to fail with.

    Returns:
        The number of calls that have failed.

    Raises:
        AssertionError: A run left changes in place; the message names the call and the changes.
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
                error.add_note(_failed_call(host, number, errno))
                raise
            finally:
                with suppress(LeftoverError):
                    xen.close()
                made, failed = host.made, host.failed
                host.plan = {}
                xen.close()
            if left := left_behind(before, footprint(host)):
                raise AssertionError("\n  ".join([_failed_call(host, number, errno), *left]))
            failures += len(failed)
            if made < number:
                break
    return failures


def _failed_call(host: Failing, number: int, errno: int) -> str:
    if not host.failed:
        return "no call has failed, but:"
    return f"call {number}, {host.failed[0]}, has failed with {_errno.errorcode[errno]}:"
