# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check that a response fits its event, and encode it for the ring."""

from __future__ import annotations

from typing import TypeAlias

from xenaltp2m.abi.vm_event import Flag, Reason
from xenaltp2m.values.events import EVENTS, ControlRegister, Event, WriteCtrlreg
from xenaltp2m.values.responses import RESUME, Action, OpenView, Response, view_number

# Plain numbers, because enums are slow.
_PAUSED, _TOGGLE = int(Flag.VCPU_PAUSED), int(Flag.TOGGLE_SINGLESTEP)
_HAS_VIEW = int(Flag.ALTERNATE_P2M)
DENIABLE = (ControlRegister.CR0, ControlRegister.CR3, ControlRegister.CR4)
"""Control registers whose writes can be denied; MSRs can be, too."""
Data: TypeAlias = bytes | bytearray

FITTING: dict[Action, frozenset[int]] = {
    Action.DENY: frozenset({Reason.WRITE_CTRLREG, Reason.MOV_TO_MSR}),
    Action.REINJECT: frozenset({Reason.SOFTWARE_BREAKPOINT, Reason.DEBUG_EXCEPTION}),
    Action.EMULATE: frozenset(
        {Reason.MEM_ACCESS, Reason.SOFTWARE_BREAKPOINT, Reason.DESCRIPTOR_ACCESS}
    ),
    Action.LET_THROUGH: frozenset({Reason.VMEXIT, Reason.IO_INSTRUCTION}),
}
"""The reasons that an action can answer, for actions that cannot answer every event
(``vm_event_emulate_check``, ``vm_event_register_write_resume``, xen/arch/x86/vm_event.c)."""


class _AnyView:
    """A placeholder for a view that was given by number, or not at all."""

    closed = False


_ANY_VIEW = _AnyView()


class EncodedResponse:
    """The encoding of a response, without the parts that depend on the event.

    Xen's single-step switch is a toggle that stays on (``hvm_toggle_singlestep``), but a response
    asks for one step. A step that was requested and is not done yet continues:

        the vCPU                | no step requested | a step requested
        does not step           | unchanged         | toggled on
        steps, not done yet     | unchanged         | unchanged
        has done its step       | toggled off       | unchanged

    A fast single-step turns the switch on itself, and Xen turns it off after the step.
    """

    __slots__ = (
        "back_to", "data", "needs", "plain", "response", "rows", "through", "union", "view",
    )  # fmt: skip
    through: OpenView | _AnyView
    back_to: OpenView | _AnyView

    def __init__(self, response: Response) -> None:
        self.response = response  # kept alive, so that its id is not reused
        views = (response.view, response.back_to)
        moves = views != (None, None)
        self.through, self.back_to = (
            _ANY_VIEW if view is None or isinstance(view, int) else view for view in views
        )
        """View handles, which may have been closed since."""
        self.needs = (0 if response == RESUME else _PAUSED) | (_HAS_VIEW if moves else 0)
        self.view = 0 if response.view is None else view_number(response.view)
        self.union = b""
        if response.back_to is not None:
            self.union = view_number(response.back_to).to_bytes(2, "little") + bytes(30)
        self.data: Data = response.data
        self.plain = not (response.data or response.registers)
        """Whether the response consists of flags, a view's number and ``u`` only."""
        flags, pulled = response.flags, response.flags | _TOGGLE
        self.rows: tuple[tuple[int, bool], ...]
        """Flags, and whether the vCPU steps afterwards, by row of the table above."""
        if response.back_to is not None:
            self.rows = ((flags, False),) * 3
        elif response.action in (Action.SINGLESTEP, Action.LET_THROUGH):
            self.rows = (pulled, True), (flags, True), (flags, True)
        else:
            self.rows = (flags, False), (flags, True), (pulled, False)


def mismatch_reason(event: Event, response: Response, gates_writes: bool) -> str | None:
    """Return why a response cannot answer an event, or None if it can."""
    fitting = FITTING[response.action]
    if event.reason not in fitting:
        return f"it answers {', '.join(sorted(_names(fitting)))} only"
    if response.action is Action.DENY:
        if isinstance(event, WriteCtrlreg) and event.index not in DENIABLE:
            return "Xen can deny writes of CR0, CR3 and CR4 only"
        if not gates_writes:
            wanted = "MovToMsr.on(msr"
            if isinstance(event, WriteCtrlreg):
                wanted = "WriteCtrlreg.on(register"
            return f"the write has happened: open the monitor with {wanted}, deniable=True)"
    if response.action is Action.EMULATE:
        breakpoint_ = event.reason is Reason.SOFTWARE_BREAKPOINT
        if response.instruction and not breakpoint_:
            return "an instruction to emulate answers a SoftwareBreakpoint only"
        if breakpoint_ and not response.instruction:
            return "at a breakpoint, give the original instruction"
    return None


def _names(reasons: frozenset[int]) -> list[str]:
    return [EVENTS[reason].__name__ for reason in reasons]
