# SPDX-License-Identifier: LGPL-2.1-or-later
"""The base class of events, and subscriptions to them.

Events are frozen: each contains a copy of its request, and decodes a field when it is read. Events
compare by that copy. Fields keep the names of ``public/vm_event.h``.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, overload

from xenaltp2m.abi import layouts
from xenaltp2m.abi.ring import Head, Request
from xenaltp2m.abi.vm_event import HEAD, REGISTER_PREFIX, Flag, Reason, layout
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import VcpuId, ViewId
from xenaltp2m.values.registers import CODES, Registers, registers_at
from xenaltp2m.values.responses import RESUME, Response

_T = TypeVar("_T")
_SHUTDOWN_WORDS = {
    0: "powered off", 1: "rebooted", 2: "suspended", 3: "crashed",
    4: "was killed by a watchdog", 5: "was reset",
}  # fmt: skip
"""``SHUTDOWN_*`` (public/sched.h)."""


def shutdown_words(reason: int) -> str:
    """Describe how a domain has shut down."""
    return _SHUTDOWN_WORDS.get(reason, "has shut down")


_REASON = 2
_PAUSED, _HAS_VIEW = int(Flag.VCPU_PAUSED), int(Flag.ALTERNATE_P2M)  # enums are slow
EVENTS: dict[int, type[Event]] = {}
"""The event class of each reason."""


def _event_registers(version: int) -> type[Registers]:
    start = len(REGISTER_PREFIX)
    return registers_at(
        MappingProxyType(
            {
                name[start:]: place
                for name, place in layout(version).fields.items()
                if name.startswith(REGISTER_PREFIX)
            }
        )
    )


_EVENT_REGISTERS = {version: _event_registers(version) for version in layouts.VM_EVENT}
_NEWEST = layouts.VM_EVENT[max(layouts.VM_EVENT)]


class Field(Generic[_T]):
    """A field of an event, decoded at each read; its place is the same in all versions."""

    def __init__(self, path: str, kind: Callable[[int], _T]) -> None:
        offset, width = _NEWEST.fields[path]
        self._offset = offset
        self._unpack = struct.Struct(f"<{CODES[width]}").unpack_from
        self._kind = kind

    def __set_name__(self, owner: type[Event], name: str) -> None:
        self._name = name
        owner.fields = (*owner.fields, name)

    @overload
    def __get__(self, event: None, owner: type[Event]) -> Self: ...
    @overload
    def __get__(self, event: Event, owner: type[Event]) -> _T: ...
    def __get__(self, event: Event | None, owner: type[Event]) -> Self | _T:
        if event is None:
            return self
        return self._kind(self._unpack(event.request[1], self._offset)[0])

    def __set__(self, event: Event, value: _T) -> None:
        raise AttributeError(f"events are frozen: {self._name} cannot be set")


_E = TypeVar("_E", bound=enum.IntEnum)


def known(kind: type[_E]) -> Callable[[int], _E | int]:
    """Convert a number to a member of an enum, or leave it a number if the enum has none."""

    def convert(number: int) -> _E | int:
        try:
            return kind(number)
        except ValueError:
            return number

    return convert


@dataclass(frozen=True)
class Subscription:
    """A subscription to a kind of event, with its options; made by the event's ``on``.

    ``switch`` is the backend's method that enables and disables it; ``options`` are the method's
    other arguments. ``deniable`` makes register writes wait for their responses; it applies to
    every subscription of the monitor.
    """

    event: type[Event] | None
    switch: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    deniable: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of Xen's switch: subscriptions with equal keys use the same one."""
        which = {name: self.options[name] for name in ("index", "msr") if name in self.options}
        return self.switch, *which.values()


class Answerer(Protocol):
    """The source of an event: a :class:`xenaltp2m.handles.monitor.Monitor`, which answers it."""

    def reply(self, event: Event, response: Response) -> None:
        """Answer an event."""

    def stop(self) -> None:
        """End the iteration."""


class Event:
    """An event of a vCPU; a subclass for each reason, :class:`UnknownEvent` for all others."""

    __slots__ = ("head", "monitor", "request")

    reason: ClassVar[Reason | None] = None
    """The reason that Xen gives in the request."""
    fields: ClassVar[tuple[str, ...]] = ()
    """The names of its fields, besides the vCPU, the view and the registers."""

    request: Request
    """The request's index in the ring, and its bytes."""
    head: Head
    """The request's first fields: version, flags, reason, vCPU and view."""
    monitor: Answerer | None
    """The monitor that it came from; None if it was made by :meth:`of`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.reason is not None:
            EVENTS[int(cls.reason)] = cls

    # No __init__: calling one would cost as much as everything else that an event costs.

    @classmethod
    def of(cls, raw: bytes | bytearray | memoryview) -> Event:
        """Make an event from a request's bytes, recorded or hand-made, by the request's reason.

        Raises:
            InvalidArgumentError: It is not a request of a version that this package knows.
        """
        if len(raw) < HEAD.size or len(raw) != _size_of(raw):
            raise InvalidArgumentError(f"{len(raw)} bytes are not a request")
        head = HEAD.unpack_from(raw)
        event = EVENTS.get(head[_REASON], UnknownEvent)()
        event.request, event.head, event.monitor = (0, bytes(raw)), head, None
        return event

    @classmethod
    def on(cls) -> Subscription:
        """Return the subscription to events of this kind, for :meth:`Domain.monitor`."""
        return Subscription(cls, None)

    @property
    def raw(self) -> bytes:
        """The request as Xen wrote it (``struct vm_event_st``), copied out of the ring."""
        return self.request[1]

    @property
    def version(self) -> int:
        """The vm_event interface version, which determines the layout of registers."""
        return self.head[0]

    @property
    def vcpu(self) -> VcpuId:
        """The vCPU that caused it."""
        return VcpuId(self.head[3])

    @property
    def flags(self) -> Flag:
        """``VM_EVENT_FLAG_*`` of the request."""
        return Flag(self.head[1])

    @property
    def paused(self) -> bool:
        """Whether the vCPU waits for the response; if not, no response can change anything."""
        return bool(self.head[1] & _PAUSED)

    @property
    def view(self) -> ViewId | None:
        """The view that the vCPU was in, or None if altp2m is off."""
        return ViewId(self.head[4]) if self.head[1] & _HAS_VIEW else None

    @property
    def registers(self) -> Registers:
        """The vCPU's registers at the time of the event."""
        return _EVENT_REGISTERS[self.head[0]](self.request[1])

    def reply(self, response: Response) -> None:
        """Answer the event, once; the vCPU resumes as the response says.

        An event that was not answered gets its :attr:`default_response` when the iteration goes on
        to the next event.

        Raises:
            InvalidArgumentError: The response does not fit the event, which can still be answered.
            AlreadyError: The event was answered already.
            ClosedError: The monitor is closed, and has answered the event.
        """
        if self.monitor is None:
            raise InvalidArgumentError(f"{self!r} did not come from a monitor")
        self.monitor.reply(self, response)

    @property
    def default_response(self) -> Response:
        """The response to an unanswered event: the guest goes on as if it was not monitored."""
        return RESUME

    def as_dict(self) -> dict[str, Any]:
        """Return its fields by name, as plain values, as in the JSON output of the tools."""
        found = {"event": type(self).__name__, "vcpu": self.vcpu, "view": self.view}
        return found | {name: _plain(getattr(self, name)) for name in self.fields}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return type(self) is type(other) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.request[1])

    def __repr__(self) -> str:
        parts = [f"vcpu={self.vcpu}", f"view={self.view}"]
        parts += [f"{name}={_word(getattr(self, name))}" for name in self.fields]
        return f"{type(self).__name__}({', '.join(parts)})"


def _size_of(raw: bytes | bytearray | memoryview) -> int | None:
    shape = layouts.VM_EVENT.get(HEAD.unpack_from(raw)[0])
    return None if shape is None else shape.size


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else value


def _word(value: Any) -> str:
    return str(_plain(value)) if isinstance(value, enum.Enum | bool) else f"{value:#x}"


class UnknownEvent(Event):
    """An event with a reason that this package does not know."""

    __slots__ = ()
    fields = ("number",)

    @property
    def number(self) -> int:
        """The number of the reason."""
        return self.head[_REASON]


class DomainEnded(Event):
    """The domain was destroyed or has shut down: the last event, which needs no answer."""

    __slots__ = ("_shutdown",)
    fields = ("shutdown_reason",)

    def __init__(self, shutdown_reason: int | None) -> None:
        self.request, self.head, self.monitor = (0, b""), (0, 0, 0, 0, 0), None
        self._shutdown = shutdown_reason

    @property
    def shutdown_reason(self) -> int | None:
        """Xen's ``SHUTDOWN_*`` number, or None if the domain was destroyed."""
        return self._shutdown

    @property
    def paused(self) -> bool:
        """False: there is no vCPU left."""
        return False

    def reply(self, response: Response) -> None:
        """Do nothing, so that a handler may reply to every event."""

    def __str__(self) -> str:
        if self._shutdown is None:
            return "the domain was destroyed"
        return f"the domain {shutdown_words(self._shutdown)}"

    def __repr__(self) -> str:
        return f"DomainEnded(shutdown_reason={self._shutdown})"
