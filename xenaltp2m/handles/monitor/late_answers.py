# SPDX-License-Identifier: LGPL-2.1-or-later
"""Responses that a vCPU would ignore on its next resume, kept until it takes them.

After a page was removed from one of a domain's p2m tables, the next resume of each vCPU only
notifies device models: registers, emulation and exceptions of a response take effect on the resume
after that (``hvm_do_resume``, ``Release.removal_delays_answers``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from xenaltp2m.abi.vm_event import Reason
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.vcpu import Vcpu
from xenaltp2m.values.events import Event
from xenaltp2m.values.responses import RESUME, Action, Response

_REPEATED = frozenset(
    {
        Reason.MEM_ACCESS, Reason.SOFTWARE_BREAKPOINT, Reason.CPUID, Reason.DESCRIPTOR_ACCESS,
        Reason.EMUL_UNIMPLEMENTED,
    }
)  # fmt: skip
"""Events that come again if the vCPU is only resumed."""


class _Kept(NamedTuple):
    """A response that waits for its event to come again."""

    response: Response
    reason: int
    rip: int


class LateAnswers:
    """The vCPUs that may ignore their next response, and the responses kept for them.

    Attributes:
        vcpus: The kept response or None, by vCPU.
    """

    def __init__(self, context: DomainContext, vcpus: int) -> None:
        self._context, self._count = context, vcpus
        self.vcpus: dict[int, _Kept | None] = {}

    def note_page_removed(self) -> None:
        """Expect every vCPU to ignore its response, until it has been resumed once."""
        if self._context.release.removal_delays_answers:
            for vcpu in range(self._count):
                self.vcpus.setdefault(vcpu, None)

    def defer(self, event: Event, response: Response, check: Callable[[], None]) -> Response:
        """Return the response to give now; keep the real one, or carry it out by other means.

        Args:
            event: An event of a vCPU that is in :attr:`vcpus`.
            response: The response to it.
            check: Raises if the response does not fit; called before the response is kept.
        """
        vcpu = int(event.vcpu)
        kept = self.vcpus.pop(vcpu)
        late = response.registers or response.action in (Action.EMULATE, Action.REINJECT)
        if kept is not None or not late or not event.paused:
            return response
        if event.reason in _REPEATED:
            check()
            self.vcpus[vcpu] = _Kept(response, int(event.reason), event.registers.rip)
            return RESUME
        if response.registers:
            Vcpu(self._context, vcpu).set_registers(**response.registers)
        return replace(response, registers={})

    def redeliver(self, event: Event) -> Response | None:
        """Return the response that was kept for an event that has come again, or None."""
        kept = self.vcpus.get(int(event.vcpu))
        if kept is None:
            return None
        if (kept.reason, kept.rip) != (event.head[2], event.registers.rip):
            del self.vcpus[int(event.vcpu)]
            return None
        return kept.response
