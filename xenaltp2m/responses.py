# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a monitor answers: an action, and beside it a view and registers.

Flags keep the names of ``public/vm_event.h``.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

from xenaltp2m.abi import layouts
from xenaltp2m.abi.vm_event import REGISTER_PREFIX, SETTABLE_REGISTERS, Flag, read_data_room
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import HOST_VIEW, ViewId

if TYPE_CHECKING:
    from xenaltp2m.view import View


class RegisterValues(TypedDict, total=False):
    """What a response can set (``hvm_vm_event_do_resume``), for type checkers to know the names."""

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
    """What a response does; one of them."""

    RESUME = "resume"
    """The vCPU goes on: what was about to happen happens, what faulted is tried again."""
    DENY = "deny"
    """The register write does not happen."""
    REINJECT = "reinject"
    """The guest's own handler gets the exception."""
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
    """An answer: one action, and beside it a view to move to and registers to set.

    Made by the class methods and the ``with_`` methods; checked when made. One response may
    answer any number of events.

    Attributes:
        action: What to do.
        view: The view the vCPU is moved to before it goes on; None leaves it where it is.
        back_to: Where a fast single-step ends.
        registers: Values to set, by name; the other registers keep the event's values.
        write: Whether emulated writes reach memory.
        read_data: What emulated reads get to see instead of memory.
        instruction: What is emulated instead of the instruction in memory.
        next_interrupt: Whether the vCPU's next interrupt is sent as an :class:`Interrupt`.
    """

    action: Action = Action.RESUME
    view: View | ViewId | None = None
    back_to: View | ViewId | None = None
    registers: Mapping[str, int] = field(default_factory=dict)
    write: bool = True
    read_data: bytes = b""
    instruction: bytes = b""
    next_interrupt: bool = False
    flags: int = field(default=0, init=False, repr=False, compare=False)
    """``VM_EVENT_FLAG_*`` it comes to, but for those that depend on the vCPU's state."""
    data: bytes = field(default=b"", init=False, repr=False, compare=False)
    """What goes to the emulator."""

    @classmethod
    def resume(cls, view: View | int | None = None) -> Response:
        """Go on, in another view if one is given."""
        return RESUME if view is None else RESUME.in_view(view)

    @classmethod
    def deny(cls) -> Response:
        """Keep a control register or MSR from being written: its subscription was ``deniable``."""
        return cls(Action.DENY)

    @classmethod
    def reinject(cls) -> Response:
        """Give a breakpoint or debug exception to the guest."""
        return REINJECT

    @classmethod
    def emulate(
        cls, *, write: bool = True, read_data: bytes = b"", instruction: bytes = b""
    ) -> Response:
        """Have Xen's emulator execute the instruction.

        It reads the host p2m's pages whatever the view shows, knows few vector instructions, and
        does nothing unless the access still violates the vCPU's view (``vm_event_emulate_check``).

        Args:
            write: False drops what it writes to memory.
            read_data: What it reads, at most 324 bytes.
            instruction: For a breakpoint: what stands there in truth, at most 16 bytes.
        """
        return cls(Action.EMULATE, write=write, read_data=read_data, instruction=instruction)

    @classmethod
    def singlestep(cls, view: View | int | None = None) -> Response:
        """Execute one instruction, in ``view`` if one is given, then send :class:`Singlestep`.

        Xen's switch is a toggle that stays; here one response is one step. The vCPU stays in
        ``view`` afterwards: answer the :class:`Singlestep` with where it belongs.
        """
        return STEP if view is None else STEP.in_view(view)

    @classmethod
    def fast_singlestep(
        cls, *, through: View | int | None = HOST_VIEW, back_to: View | int
    ) -> Response:
        """Execute one instruction in one view and go on in another, with no second event.

        Args:
            through: Where to execute it; None is where the vCPU is.
            back_to: Where to go on.
        """
        return cls(
            Action.FAST_SINGLESTEP,
            view=None if through is None else _view(through),
            back_to=_view(back_to),
        )

    def in_view(self, view: View | int) -> Response:
        """Return the same response with the vCPU moved to a view."""
        return replace(self, view=_view(view))

    def with_registers(self, **values: Unpack[RegisterValues]) -> Response:
        """Return the same response with registers set: rax to r15, rflags and rip."""
        chosen = cast("dict[str, int]", values)
        return replace(self, registers=MappingProxyType({**self.registers, **chosen}))

    def with_next_interrupt(self) -> Response:
        """Return the same response, asking for an :class:`Interrupt` event, too."""
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
                raise InvalidArgumentError(f"{name} cannot be {value!r}: it holds 64 bits")
        if self.registers and (self.read_data or self.instruction):
            raise InvalidArgumentError(
                "a response cannot set registers and give the emulator data: both have one place"
            )
        object.__setattr__(self, "flags", self._flags())
        object.__setattr__(self, "data", self._data())

    def _check_types(self) -> None:
        if not isinstance(self.action, Action):
            raise InvalidArgumentError(f"an action is an Action, not {self.action!r}")
        for view in (self.view, self.back_to):
            if view is not None:
                _view(view)
        for name, data in (("read_data", self.read_data), ("instruction", self.instruction)):
            if not isinstance(data, bytes):
                raise InvalidArgumentError(f"{name} is bytes, not {data!r}")
        if not isinstance(self.registers, Mapping):
            raise InvalidArgumentError(f"registers are values by name, not {self.registers!r}")

    def _check_action(self) -> None:
        emulates = self.action is Action.EMULATE
        if (self.back_to is not None) != (self.action is Action.FAST_SINGLESTEP):
            raise InvalidArgumentError("back_to belongs to a fast single-step, and it needs one")
        if not emulates and (not self.write or self.read_data or self.instruction):
            raise InvalidArgumentError("write, read_data and instruction belong to emulate()")
        if self.read_data and (self.instruction or not self.write):
            raise InvalidArgumentError(
                "Xen takes one of read_data, write=False and instruction, in this order"
            )
        if self.instruction and not self.write:
            raise InvalidArgumentError("Xen ignores the instruction where write is False")
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


def view_number(view: View | ViewId) -> int:
    """Return a view's number."""
    return view if isinstance(view, int) else view.id


def _view(view: View | int) -> View | ViewId:
    if isinstance(view, bool) or (not isinstance(view, int) and not hasattr(view, "id")):
        raise InvalidArgumentError(f"a view is a View or its number, not {view!r}")
    if isinstance(view, int) and not 0 <= view <= 0xFFFF:
        raise InvalidArgumentError(f"{view} is not a view's number")
    return ViewId(view) if isinstance(view, int) else view


def _check_live(view: View | ViewId | None) -> None:
    if view is not None and not isinstance(view, int) and view.closed:
        raise InvalidArgumentError(f"{view!r} is closed: a vCPU cannot be moved to it")


@functools.lru_cache
def step_over(view: ViewId) -> Response:
    """Return the fast single-step through view 0 and back, made once for each view."""
    return Response.fast_singlestep(through=HOST_VIEW, back_to=view)


RESUME = Response()
REINJECT = Response(Action.REINJECT)
EMULATE = Response(Action.EMULATE)
STEP = Response(Action.SINGLESTEP)
LET_THROUGH = Response(Action.LET_THROUGH)
