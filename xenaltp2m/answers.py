# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which response answers which event, and what it comes to in the ring."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from xenaltp2m.abi.vm_event import Flag, Reason
from xenaltp2m.events import EVENTS, ControlRegister, Event, WriteCtrlreg
from xenaltp2m.responses import RESUME, Action, Response, view_number

if TYPE_CHECKING:
    from xenaltp2m.view import View

# As plain numbers, for enums are slow.
_PAUSED, _TOGGLE = int(Flag.VCPU_PAUSED), int(Flag.TOGGLE_SINGLESTEP)
_HAS_VIEW = int(Flag.ALTERNATE_P2M)
DENIABLE = (ControlRegister.CR0, ControlRegister.CR3, ControlRegister.CR4)
"""Those whose writes can be denied, besides MSRs."""
Data: TypeAlias = bytes | bytearray

FITTING: dict[Action, frozenset[int]] = {
    Action.DENY: frozenset({Reason.WRITE_CTRLREG, Reason.MOV_TO_MSR}),
    Action.REINJECT: frozenset({Reason.SOFTWARE_BREAKPOINT, Reason.DEBUG_EXCEPTION}),
    Action.EMULATE: frozenset(
        {Reason.MEM_ACCESS, Reason.SOFTWARE_BREAKPOINT, Reason.DESCRIPTOR_ACCESS}
    ),
    Action.LET_THROUGH: frozenset({Reason.VMEXIT, Reason.IO_INSTRUCTION}),
}
"""What an action can answer, where not everything (``vm_event_emulate_check``,
``vm_event_register_write_resume``, xen/arch/x86/vm_event.c)."""


class _AnyView:
    """Stands for a view that was given by number, or not at all."""

    _closed = False


_ANY_VIEW = _AnyView()


class Plan:
    """What a response comes to, whichever event it answers.

    Xen's single-step switch is a toggle that stays (``hvm_toggle_singlestep``); here a response
    asks for one step, and a step that was asked for and is not done yet goes on:

        the vCPU              | asked for no step | asked for a step
        does not step         | not touched       | pulled, on
        steps, not done yet   | not touched       | not touched
        has done its step     | pulled, off       | not touched

    A fast single-step turns the switch on itself, and Xen turns it off after the step.
    """

    __slots__ = (
        "back_to", "data", "needs", "plain", "response", "rows", "through", "union", "view",
    )  # fmt: skip
    through: View | _AnyView
    back_to: View | _AnyView

    def __init__(self, response: Response) -> None:
        self.response = response  # kept, so that its id stays its own
        views = (response.view, response.back_to)
        moves = views != (None, None)
        self.through, self.back_to = (
            _ANY_VIEW if view is None or isinstance(view, int) else view for view in views
        )
        """Handles of views, which may have been closed since."""
        self.needs = (0 if response == RESUME else _PAUSED) | (_HAS_VIEW if moves else 0)
        self.view = 0 if response.view is None else view_number(response.view)
        self.union = b""
        if response.back_to is not None:
            self.union = view_number(response.back_to).to_bytes(2, "little") + bytes(30)
        self.data: Data = response.data
        self.plain = not (response.data or response.registers)
        """Whether nothing but flags, a view's number and ``u`` make the answer."""
        flags, pulled = response.flags, response.flags | _TOGGLE
        self.rows: tuple[tuple[int, bool], ...]
        """Flags, and whether the vCPU steps then, by the row of the table."""
        if response.back_to is not None:
            self.rows = ((flags, False),) * 3
        elif response.action in (Action.SINGLESTEP, Action.LET_THROUGH):
            self.rows = (pulled, True), (flags, True), (flags, True)
        else:
            self.rows = (flags, False), (flags, True), (pulled, False)


def misfit(event: Event, response: Response, gates_writes: bool) -> str | None:
    """Say why a response does not answer an event, if it does not."""
    fitting = FITTING[response.action]
    if event.reason not in fitting:
        return f"it answers {', '.join(sorted(_names(fitting)))} only"
    if response.action is Action.DENY:
        if isinstance(event, WriteCtrlreg) and event.index not in DENIABLE:
            return "Xen denies writes of CR0, CR3 and CR4 only"
        if not gates_writes:
            wanted = "MovToMsr.on(msr"
            if isinstance(event, WriteCtrlreg):
                wanted = "WriteCtrlreg.on(register"
            return f"it has happened: open the monitor with {wanted}, deniable=True)"
    if response.action is Action.EMULATE:
        breakpoint_ = event.reason is Reason.SOFTWARE_BREAKPOINT
        if response.instruction and not breakpoint_:
            return "an instruction to emulate answers a SoftwareBreakpoint only"
        if breakpoint_ and not response.instruction:
            return "at a breakpoint, give the instruction that stands there in truth"
    return None


def _names(reasons: frozenset[int]) -> list[str]:
    return [EVENTS[reason].__name__ for reason in reasons]
