# SPDX-License-Identifier: LGPL-2.1-or-later
"""The responses to events: an action, and with it a view and registers.

Flags keep the names of ``public/vm_event.h``.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol, TypedDict, Unpack, cast

from xenaltp2m.abi import layouts
from xenaltp2m.abi.vm_event import REGISTER_PREFIX, SETTABLE_REGISTERS, Flag, read_data_room
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import HOST_VIEW, DomId, ViewId


class OpenView(Protocol):
    """A view that vCPUs can be moved to: a :class:`xenaltp2m.handles.view.View`."""

    closed: bool

    @property
    def id(self) -> ViewId:
        """The view's number."""

    @property
    def domid(self) -> DomId:
        """The number of its domain."""


class RegisterValues(TypedDict, total=False):
    """The registers that a response can set (``hvm_vm_event_do_resume``), for type checkers."""

    rax: int
    rcx: int
    rdx: int
    rbx: int
    rsp: int
    rbp: int
    rsi: int
    rdi: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rflags: int
    rip: int


class Action(enum.Enum):
    """What a response does; each response has one action."""

    RESUME = "resume"
    """The vCPU resumes: a pending operation completes, an instruction that faulted is retried."""
    DENY = "deny"
    """The register write does not happen."""
    REINJECT = "reinject"
    """The guest's own handler receives the exception."""
    EMULATE = "emulate"
    """Xen's emulator executes the instruction, against the host p2m."""
    SINGLESTEP = "singlestep"
    """The vCPU executes one instruction and sends a :class:`Singlestep`."""
    FAST_SINGLESTEP = "fast singlestep"
    """The vCPU executes one instruction; then Xen itself moves it to another view."""
    LET_THROUGH = "let through"
    """The vCPU executes one instruction with the event's switch off for the whole domain."""


_INSTRUCTION_BYTES = 16
_NOP = b"\x90"
_READ_DATA_ROOM = min(map(read_data_room, layouts.VM_EVENT))
_REGISTER_LIMIT = 1 << 64


@dataclass(frozen=True, slots=True)
class Response:
    """A response to an event: one action, a view to move to, and registers to set.

    Use the class methods and the ``with_`` methods to make one; it is checked then. One response
    may answer any number of events.

    Attributes:
        action: What to do.
        view: The view that the vCPU is moved to before it resumes; None leaves it in its view.
        back_to: The view that the vCPU is in after a fast single-step.
        registers: Values to set, by name; the other registers keep the event's values.
        write: Whether emulated writes reach memory.
        read_data: The data that emulated reads return instead of memory.
        instruction: The instruction to emulate instead of the one in memory.
        next_interrupt: Whether the vCPU's next interrupt is reported as an :class:`Interrupt`.
    """

    action: Action = Action.RESUME
    view: OpenView | ViewId | None = None
    back_to: OpenView | ViewId | None = None
    registers: Mapping[str, int] = field(default_factory=dict)
    write: bool = True
    read_data: bytes = b""
    instruction: bytes = b""
    next_interrupt: bool = False
    flags: int = field(default=0, init=False, repr=False, compare=False)
    """Its ``VM_EVENT_FLAG_*``, except those that depend on the vCPU's state."""
    data: bytes = field(default=b"", init=False, repr=False, compare=False)
    """The data for the emulator."""

    @classmethod
    def resume(cls, view: OpenView | int | None = None) -> Response:
        """Resume the vCPU, in another view if one is given."""
        return RESUME if view is None else RESUME.in_view(view)

    @classmethod
    def deny(cls) -> Response:
        """Deny the write of a control register or MSR; its subscription must be ``deniable``."""
        return cls(Action.DENY)

    @classmethod
    def reinject(cls) -> Response:
        """Reinject a breakpoint or debug exception into the guest."""
        return REINJECT

    @classmethod
    def emulate(
        cls, *, write: bool = True, read_data: bytes = b"", instruction: bytes = b""
    ) -> Response:
        """Execute the instruction in Xen's emulator.

        The emulator accesses the host p2m's pages, not the view's, supports few vector
        instructions, and does nothing unless the access still violates the vCPU's view
        (``vm_event_emulate_check``).

        Args:
            write: False discards its writes to memory.
            read_data: The data that it reads instead of memory, at most 324 bytes.
            instruction: For a breakpoint: the original instruction, at most 16 bytes.
        """
        return cls(Action.EMULATE, write=write, read_data=read_data, instruction=instruction)

    @classmethod
    def singlestep(cls, view: OpenView | int | None = None) -> Response:
        """Execute one instruction, in ``view`` if one is given, then send :class:`Singlestep`.

        Xen's switch is a toggle that stays on, but one response means one step. The vCPU stays in
        ``view`` afterwards: the response to the :class:`Singlestep` must move it back.
        """
        return STEP if view is None else STEP.in_view(view)

    @classmethod
    def fast_singlestep(
        cls, *, through: OpenView | int | None = HOST_VIEW, back_to: OpenView | int
    ) -> Response:
        """Execute one instruction in one view and continue in another, without a second event.

        Args:
            through: The view to execute it in; None is the vCPU's current view.
            back_to: The view to continue in.
        """
        return cls(
            Action.FAST_SINGLESTEP,
            view=None if through is None else _view(through),
            back_to=_view(back_to),
        )

    def in_view(self, view: OpenView | int) -> Response:
        """Return the same response, which also moves the vCPU to a view."""
        return replace(self, view=_view(view))

    def with_registers(self, **values: Unpack[RegisterValues]) -> Response:
        """Return the same response, which also sets registers: rax to r15, rflags and rip."""
        chosen = cast("dict[str, int]", values)
        return replace(self, registers=MappingProxyType({**self.registers, **chosen}))

    def with_next_interrupt(self) -> Response:
        """Return the same response, which also requests an :class:`Interrupt` event."""
        return replace(self, next_interrupt=True)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_action()
        for name, value in self.registers.items():
            if name not in SETTABLE_REGISTERS:
                raise InvalidArgumentError(
                    f"a response cannot set {name}: it can set {', '.join(_SETTABLE_IN_ORDER)}"
                )
            if not isinstance(value, int) or not 0 <= value < _REGISTER_LIMIT:
                raise InvalidArgumentError(f"{name} cannot be {value!r}: it has 64 bits")
        if self.registers and (self.read_data or self.instruction):
            raise InvalidArgumentError(
                "a response cannot set registers and give the emulator data: both use one field"
            )
        object.__setattr__(self, "flags", self._flags())
        object.__setattr__(self, "data", self._data())

    def _check_types(self) -> None:
        if not isinstance(self.action, Action):
            raise InvalidArgumentError(f"an action must be an Action, not {self.action!r}")
        for view in (self.view, self.back_to):
            if view is not None:
                _view(view)
        for name, data in (("read_data", self.read_data), ("instruction", self.instruction)):
            if not isinstance(data, bytes):
                raise InvalidArgumentError(f"{name} must be bytes, not {data!r}")
        if not isinstance(self.registers, Mapping):
            raise InvalidArgumentError(f"registers must be values by name, not {self.registers!r}")

    def _check_action(self) -> None:
        emulates = self.action is Action.EMULATE
        if (self.back_to is not None) != (self.action is Action.FAST_SINGLESTEP):
            raise InvalidArgumentError("a fast single-step needs back_to; no other action takes it")
        if not emulates and (not self.write or self.read_data or self.instruction):
            raise InvalidArgumentError("write, read_data and instruction belong to emulate()")
        if self.read_data and (self.instruction or not self.write):
            raise InvalidArgumentError(
                "Xen takes one of read_data, write=False and instruction, in this order"
            )
        if self.instruction and not self.write:
            raise InvalidArgumentError("Xen ignores the instruction if write is False")
        if len(self.read_data) > _READ_DATA_ROOM:
            raise InvalidArgumentError(
                f"{len(self.read_data)} bytes of read_data: at most {_READ_DATA_ROOM} fit"
            )
        if len(self.instruction) > _INSTRUCTION_BYTES:
            raise InvalidArgumentError(
                f"{len(self.instruction)} bytes of instruction: at most {_INSTRUCTION_BYTES} fit"
            )
        if self.action is Action.FAST_SINGLESTEP:
            _check_live(self.back_to)
        _check_live(self.view)

    def _flags(self) -> int:
        flags = _ACTION_FLAGS.get(self.action, 0)
        if self.view is not None:
            flags |= Flag.ALTERNATE_P2M
        if self.registers:
            flags |= Flag.SET_REGISTERS
        if not self.write:
            flags |= Flag.EMULATE_NOWRITE
        if self.read_data:
            flags |= Flag.SET_EMUL_READ_DATA
        if self.instruction:
            flags |= Flag.SET_EMUL_INSN_DATA
        if self.next_interrupt:
            flags |= Flag.GET_NEXT_INTERRUPT
        return int(flags)

    def _data(self) -> bytes:
        if self.read_data:
            return len(self.read_data).to_bytes(4, "little") + self.read_data
        return self.instruction and self.instruction.ljust(_INSTRUCTION_BYTES, _NOP)


_ACTION_FLAGS = {
    Action.DENY: Flag.DENY,
    Action.EMULATE: Flag.EMULATE,
    Action.FAST_SINGLESTEP: Flag.FAST_SINGLESTEP,
}
_SETTABLE_IN_ORDER = [
    name
    for path in layouts.VM_EVENT[7].fields
    if (name := path.removeprefix(REGISTER_PREFIX)) != path and name in SETTABLE_REGISTERS
]


def view_number(view: OpenView | ViewId) -> int:
    """Return a view's number."""
    return view if isinstance(view, int) else view.id


def _view(view: OpenView | int) -> OpenView | ViewId:
    if isinstance(view, bool) or (not isinstance(view, int) and not hasattr(view, "id")):
        raise InvalidArgumentError(f"a view must be a View or its number, not {view!r}")
    if isinstance(view, int) and not 0 <= view <= 0xFFFF:
        raise InvalidArgumentError(f"{view} is not a view's number")
    return ViewId(view) if isinstance(view, int) else view


def _check_live(view: OpenView | ViewId | None) -> None:
    if view is not None and not isinstance(view, int) and view.closed:
        raise InvalidArgumentError(f"{view!r} is closed: a vCPU cannot be moved to it")


@functools.lru_cache
def step_over(view: ViewId) -> Response:
    """Return the fast single-step through view 0 and back to a view, cached by view."""
    return Response.fast_singlestep(through=HOST_VIEW, back_to=view)


RESUME = Response()
REINJECT = Response(Action.REINJECT)
EMULATE = Response(Action.EMULATE)
STEP = Response(Action.SINGLESTEP)
LET_THROUGH = Response(Action.LET_THROUGH)
