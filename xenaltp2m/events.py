# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a monitor hears of.

Events are frozen: each holds a copy of its request and decodes a field when it is asked for. They
compare by that copy. Fields keep the names of ``public/vm_event.h``.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, overload

from xenaltp2m.abi import layouts
from xenaltp2m.abi.ring import Head, Request
from xenaltp2m.abi.vm_event import (
    HEAD,
    REGISTER_PREFIX,
    AccessFlag,
    Flag,
    Reason,
    layout,
)
from xenaltp2m.abi.x86 import EFER_LMA
from xenaltp2m.arguments import check_flag, check_kind, check_number
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.responses import EMULATE, LET_THROUGH, REINJECT, RESUME, Response, step_over
from xenaltp2m.types import Gfn, VcpuId, ViewId

if TYPE_CHECKING:
    from xenaltp2m.monitor import Monitor

_T = TypeVar("_T")
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_SHUTDOWN_WORDS = {
    0: "powered off", 1: "rebooted", 2: "suspended", 3: "crashed",
    4: "was killed by a watchdog", 5: "was reset",
}  # fmt: skip
"""``SHUTDOWN_*`` (public/sched.h)."""


def shutdown_words(reason: int) -> str:
    """Say how a domain has shut down."""
    return _SHUTDOWN_WORDS.get(reason, "has shut down")


_U16, _U32 = (1 << 16) - 1, (1 << 32) - 1
_CODE_L, _BIG = 1 << 9, 1 << 10
_LIMIT_BITS = 20
_REASON = 2
_PAUSED, _HAS_VIEW = int(Flag.VCPU_PAUSED), int(Flag.ALTERNATE_P2M)  # enums are slow


class ControlRegister(enum.IntEnum):
    """``VM_EVENT_X86_*``: registers whose writes a monitor can hear of."""

    CR0 = 0
    CR3 = 1
    CR4 = 2
    XCR0 = 3


class Descriptor(enum.IntEnum):
    """``VM_EVENT_DESC_*``: descriptor table registers."""

    IDTR = 1
    GDTR = 2
    LDTR = 3
    TR = 4


class TrapType(enum.IntEnum):
    """``X86_EVENTTYPE_*``: what brought an exception about (Intel SDM, VM-entry interruption)."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6


class Registers:
    """A vCPU's registers by name, as attributes: ``registers.rip``. Read-only.

    Those of an event are a copy taken when it happened; those of :meth:`Vcpu.registers` when they
    were asked for. ``dir()`` and iteration list the names there are.
    """

    __slots__ = ("_raw",)
    _fields: ClassVar[Mapping[str, layouts.Field]] = MappingProxyType({})
    _cs_attributes: int
    """Access rights: 12 bits as Xen packs them (``struct segment_register``)."""
    _ss_attributes: int
    rip_and_cs_base: tuple[int, int]
    """Both in one step: every breakpoint has to look at them."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> int:
        raise AttributeError(f"there is no register {name!r} here: dir() lists those there are")

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._fields]

    def __repr__(self) -> str:
        return f"<Registers rip={self.rip:#x} rsp={self.rsp:#x} cr3={self.cr3:#x}>"

    @property
    def word_size(self) -> int:
        """Bytes of an address in the running code: 8, 4 or 2, by CS.L and CS.D."""
        attributes = self._cs_attributes
        if attributes & _CODE_L and self.msr_efer & EFER_LMA:
            return 8
        return 4 if attributes & _BIG else 2

    @property
    def privilege(self) -> int:
        """The current privilege level, which is SS.DPL (SDM 3C, 25.4.1)."""
        return self._ss_attributes >> 5 & 3

    @property
    def linear_rip(self) -> int:
        """Linear address of the instruction: outside 64-bit code, rip is an offset within CS."""
        base = self.cs_base
        if base and self.word_size < 8:  # 64-bit code ignores the base (SDM 3A, 3.4.4)
            return (base + self.rip) & _U32
        return self.rip

    @property
    def linear_rsp(self) -> int:
        """Linear address of the top of the stack: outside 64-bit code, in the segment SS."""
        if self.word_size == 8:
            return self.rsp
        size = _U32 if self._ss_attributes & _BIG else _U16
        return (self.ss_base + (self.rsp & size)) & _U32

    def as_dict(self) -> dict[str, int]:
        """Return all of them by name."""
        return {name: getattr(self, name) for name in self._fields}


def registers_at(fields: Mapping[str, layouts.Field]) -> type[Registers]:
    """Return the class of registers that lie in such places: looked up, that takes half as long."""
    places: dict[str, Any] = {name: property(_reader(*place)) for name, place in fields.items()}
    rip, base = fields["rip"], fields["cs_base"]
    gap = base.offset - rip.offset - rip.width
    both = struct.Struct(f"<{rip.offset}xQ{gap}x{_CODES[base.width]}").unpack_from
    places["rip_and_cs_base"] = property(lambda registers: both(registers._raw))
    for name in ("cs", "ss"):
        hidden = f"{name}_arbytes"
        # An event has them above the limit (struct vm_event_x86_selector_reg).
        place, shift = (fields[hidden], 0) if hidden in fields else (fields[name], _LIMIT_BITS)
        places[f"_{name}_attributes"] = property(_reader(*place, shift))
    return type("Registers", (Registers,), {"__slots__": (), "_fields": fields, **places})


def _reader(offset: int, width: int, shift: int = 0) -> Callable[[Registers], int]:
    def read_long(registers: Registers) -> int:
        return int.from_bytes(registers._raw[offset : offset + width], "little")

    if width not in _CODES:
        return read_long
    unpack = struct.Struct(f"<{_CODES[width]}").unpack_from

    def read(registers: Registers) -> int:
        value: int = unpack(registers._raw, offset)[0]
        return value

    def read_upper(registers: Registers) -> int:
        return read(registers) >> shift

    return read_upper if shift else read


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


class _Field(Generic[_T]):
    """An event's field, decoded at each access; it lies at one place in all versions."""

    def __init__(self, path: str, kind: Callable[[int], _T]) -> None:
        offset, width = _NEWEST.fields[path]
        self._offset = offset
        self._unpack = struct.Struct(f"<{_CODES[width]}").unpack_from
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
        return self._kind(self._unpack(event._request[1], self._offset)[0])

    def __set__(self, event: Event, value: _T) -> None:
        raise AttributeError(f"events are frozen: {self._name} cannot be set")


_E = TypeVar("_E", bound=enum.IntEnum)


def _known(kind: type[_E]) -> Callable[[int], _E | int]:
    """Turn a number into its name, or leave it a number where a newer Xen has more names."""

    def convert(number: int) -> _E | int:
        try:
            return kind(number)
        except ValueError:
            return number

    return convert


@dataclass(frozen=True)
class Subscription:
    """What a monitor should hear of, with its options; made by an event's ``on``.

    ``switch`` is the backend's method that turns it on and off; ``options`` its other arguments.
    ``deniable`` has register writes wait for their answers, of every subscription of the monitor.
    """

    event: type[Event] | None
    switch: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    deniable: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two of them one switch of Xen's."""
        which = {name: self.options[name] for name in ("index", "msr") if name in self.options}
        return self.switch, *which.values()


class Event:
    """Something a vCPU did. The subclasses say what; one without is an :class:`UnknownEvent`."""

    __slots__ = ("_head", "_monitor", "_request")

    reason: ClassVar[Reason | None] = None
    """Why Xen sends it."""
    fields: ClassVar[tuple[str, ...]] = ()
    """The names of what it tells beside the vCPU, the view and the registers."""

    _request: Request
    _head: Head
    _monitor: Monitor | None

    # There is no __init__: one is made for every event, and its call costs as much as all else.

    @classmethod
    def of(cls, raw: bytes | bytearray | memoryview) -> Event:
        """Wrap a request's bytes, recorded or written by hand, in the class of its reason.

        Raises:
            InvalidArgumentError: It is not a request of a version this package knows.
        """
        if len(raw) < HEAD.size or len(raw) != _size_of(raw):
            raise InvalidArgumentError(f"{len(raw)} bytes are not a request")
        head = HEAD.unpack_from(raw)
        event = EVENTS.get(head[_REASON], UnknownEvent)()
        event._request, event._head, event._monitor = (0, bytes(raw)), head, None
        return event

    @classmethod
    def on(cls) -> Subscription:
        """Return the subscription to events of this kind, for :meth:`Domain.monitor`."""
        return Subscription(cls, None)

    @property
    def raw(self) -> bytes:
        """The request as Xen wrote it (``struct vm_event_st``), copied out of the ring."""
        return self._request[1]

    @property
    def version(self) -> int:
        """The interface version, which says how registers are laid out."""
        return self._head[0]

    @property
    def vcpu(self) -> VcpuId:
        """The vCPU it happened on."""
        return VcpuId(self._head[3])

    @property
    def flags(self) -> Flag:
        """``VM_EVENT_FLAG_*`` of the request."""
        return Flag(self._head[1])

    @property
    def paused(self) -> bool:
        """Whether the vCPU waits for the answer; if not, no response can change anything."""
        return bool(self._head[1] & _PAUSED)

    @property
    def view(self) -> ViewId | None:
        """The view the vCPU was in, or None where altp2m is off."""
        return ViewId(self._head[4]) if self._head[1] & _HAS_VIEW else None

    @property
    def registers(self) -> Registers:
        """The vCPU's registers when it happened."""
        return _EVENT_REGISTERS[self._head[0]](self._request[1])

    def reply(self, response: Response) -> None:
        """Answer, once; the vCPU goes on as the response says.

        What is not answered gets :attr:`default_response` when the next event is asked for.

        Raises:
            InvalidArgumentError: The response does not fit the event; it can be answered again.
            AlreadyError: It was answered.
            ClosedError: The monitor is closed, and has answered.
        """
        if self._monitor is None:
            raise InvalidArgumentError(f"{self!r} did not come from a monitor")
        self._monitor.reply(self, response)

    @property
    def default_response(self) -> Response:
        """What it is answered with if nobody does: the guest goes on as if nobody watched."""
        return RESUME

    def as_dict(self) -> dict[str, Any]:
        """Return what it tells, by name, as plain values: what the JSON of the tools shows."""
        found = {"event": type(self).__name__, "vcpu": self.vcpu, "view": self.view}
        return found | {name: _plain(getattr(self, name)) for name in self.fields}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return type(self) is type(other) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self._request[1])

    def __repr__(self) -> str:
        told = [f"vcpu={self.vcpu}", f"view={self.view}"]
        told += [f"{name}={_word(getattr(self, name))}" for name in self.fields]
        return f"{type(self).__name__}({', '.join(told)})"


def _size_of(raw: bytes | bytearray | memoryview) -> int | None:
    shape = layouts.VM_EVENT.get(HEAD.unpack_from(raw)[0])
    return None if shape is None else shape.size


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else value


def _word(value: Any) -> str:
    return str(_plain(value)) if isinstance(value, enum.Enum | bool) else f"{value:#x}"


class UnknownEvent(Event):
    """A request with a reason this package does not know."""

    __slots__ = ()
    fields = ("number",)

    @property
    def number(self) -> int:
        """The reason as Xen gave it."""
        return self._head[_REASON]


class DomainEnded(Event):
    """The domain was destroyed or has shut down: the last event, which needs no answer."""

    __slots__ = ("_shutdown",)
    fields = ("shutdown_reason",)

    def __init__(self, shutdown_reason: int | None) -> None:
        self._request, self._head, self._monitor = (0, b""), (0, 0, 0, 0, 0), None
        self._shutdown = shutdown_reason

    @property
    def shutdown_reason(self) -> int | None:
        """Xen's ``SHUTDOWN_*`` number, or None where the domain was destroyed."""
        return self._shutdown

    @property
    def paused(self) -> bool:
        """False: there is no vCPU left."""
        return False

    def reply(self, response: Response) -> None:
        """Do nothing: a handler may answer every event alike."""

    def __str__(self) -> str:
        if self._shutdown is None:
            return "the domain was destroyed"
        return f"the domain {shutdown_words(self._shutdown)}"

    def __repr__(self) -> str:
        return f"DomainEnded(shutdown_reason={self._shutdown})"


class MemAccess(Event):
    """A guest's access violated the access rights of a page in the vCPU's view.

    Needs no switch: what a view, or the host p2m, forbids is what is heard.
    """

    __slots__ = ()
    reason = Reason.MEM_ACCESS

    gfn = _Field("u.mem_access.gfn", Gfn)
    """The page, as the guest numbers it."""
    offset = _Field("u.mem_access.offset", int)
    """The byte within the page."""
    gla = _Field("u.mem_access.gla", int)
    """The guest-linear address; means something with :attr:`AccessFlag.GLA_VALID`."""
    access_flags = _Field("u.mem_access.flags", AccessFlag)
    """What was tried (R, W, X; a write always counts as a read too) and how."""

    @property
    def default_response(self) -> Response:
        """Let it happen once, in view 0, and go on watching; by Xen's emulator without altp2m."""
        return step_over(self.view) if self.view else EMULATE


class MemSharing(Event):
    """A shared page could not be unshared; on the ring of memory sharing, never on a monitor's."""

    __slots__ = ()
    reason = Reason.MEM_SHARING

    gfn = _Field("u.mem_sharing.gfn", Gfn)
    """The page."""
    p2mt = _Field("u.mem_sharing.p2mt", int)
    """Its type in the p2m."""


class MemPaging(Event):
    """A page is wanted or dropped; on the ring of memory paging, never on a monitor's."""

    __slots__ = ()
    reason = Reason.MEM_PAGING

    gfn = _Field("u.mem_paging.gfn", Gfn)
    """The page."""
    p2mt = _Field("u.mem_paging.p2mt", int)
    """Its type in the p2m."""
    paging_flags = _Field("u.mem_paging.flags", int)
    """``MEM_PAGING_*``."""


class WriteCtrlreg(Event):
    """A control register is written. ``xc_monitor_write_ctrlreg``.

    It has been written when this is heard, though :attr:`Event.registers` are from just before;
    subscribed to as ``deniable``, it is written once the answer allows it. CLTS comes as a write of
    CR0 and is never put off (``vmx_cr_access``), and what Xen's emulator writes for a response
    cannot be denied (``hvm_vm_event_do_resume``).
    """

    __slots__ = ()
    reason = Reason.WRITE_CTRLREG

    index = _Field("u.write_ctrlreg.index", _known(ControlRegister))
    """Which."""
    new_value = _Field("u.write_ctrlreg.new_value", int)
    """What the guest wants in it."""
    old_value = _Field("u.write_ctrlreg.old_value", int)
    """What was in it."""

    @classmethod
    def on(
        cls,
        register: ControlRegister | None = None,
        *,
        sync: bool = True,
        ignored_bits: int = 0,
        only_changes: bool = True,
        deniable: bool = False,
    ) -> Subscription:
        """Hear of writes to one control register.

        Args:
            register: Which.
            sync: Whether the vCPU waits for the answer.
            ignored_bits: Writes that change nothing but these bits are not told of.
            only_changes: Makes no difference: Xen never tells of a write of the value that is
                there (``hvm_monitor_cr``).
            deniable: Whether the write waits for the answer, and :meth:`Response.deny` can keep
                it from happening. Goes for all register writes that the monitor hears of.

        Raises:
            InvalidArgumentError: No register was given, or one whose writes cannot be denied; or
                an argument is none.
        """
        if register is None:
            raise InvalidArgumentError(
                "say which register: WriteCtrlreg.on(ControlRegister.CR3) instead of WriteCtrlreg"
            )
        check_kind("register", register, ControlRegister, "a ControlRegister")
        check_flag("sync", sync)
        check_number("ignored_bits", ignored_bits, most=(1 << 64) - 1)
        check_flag("only_changes", only_changes)
        check_flag("deniable", deniable)
        options = {
            "index": int(register),
            "sync": sync,
            "bitmask": ignored_bits,
            "onchangeonly": only_changes,
        }
        if deniable and not sync:
            raise InvalidArgumentError(
                "deniable needs sync: there is nothing to deny where the vCPU does not wait"
            )
        if deniable and register == ControlRegister.XCR0:
            raise InvalidArgumentError("Xen writes XCR0 whatever the answer: it is not deniable")
        return Subscription(cls, "monitor_write_ctrlreg", options, deniable)


class MovToMsr(Event):
    """A model-specific register is written. ``xc_monitor_mov_to_msr``.

    It has been written when this is heard, though :attr:`Event.registers` are from just before;
    subscribed to as ``deniable``, it is written once the answer allows it.
    """

    __slots__ = ()
    reason = Reason.MOV_TO_MSR

    msr = _Field("u.mov_to_msr.msr", int)
    """Its number."""
    new_value = _Field("u.mov_to_msr.new_value", int)
    """What the guest wants in it."""
    old_value = _Field("u.mov_to_msr.old_value", int)
    """What was in it."""

    @classmethod
    def on(
        cls, msr: int | None = None, *, only_changes: bool = True, deniable: bool = False
    ) -> Subscription:
        """Hear of writes to one MSR.

        Args:
            msr: Its number.
            only_changes: Writes of the value that is there are not told of.
            deniable: Whether the write waits for the answer, and :meth:`Response.deny` can keep
                it from happening. Goes for all register writes that the monitor hears of.

        Raises:
            InvalidArgumentError: No MSR was given, or an argument is none.
        """
        if msr is None:
            raise InvalidArgumentError("say which MSR: MovToMsr.on(0xc0000082), not MovToMsr")
        check_number("msr", msr, most=(1 << 32) - 1)
        check_flag("only_changes", only_changes)
        check_flag("deniable", deniable)
        options = {"msr": msr, "onchangeonly": only_changes}
        return Subscription(cls, "monitor_mov_to_msr", options, deniable)


class SoftwareBreakpoint(Event):
    """The guest came upon an int3. ``xc_monitor_software_breakpoint``."""

    __slots__ = ()
    reason = Reason.SOFTWARE_BREAKPOINT

    gfn = _Field("u.software_breakpoint.gfn", Gfn)
    """The page of the instruction."""
    insn_length = _Field("u.software_breakpoint.insn_length", int)
    """Its length."""
    type = _Field("u.software_breakpoint.type", _known(TrapType))
    """How it came about."""

    @classmethod
    def on(cls) -> Subscription:
        """Hear of int3 instead of the guest's own handler."""
        return Subscription(cls, "monitor_software_breakpoint")

    @property
    def default_response(self) -> Response:
        """The guest's own handler gets it."""
        return REINJECT


class Singlestep(Event):
    """A vCPU that steps has executed an instruction. ``xc_monitor_singlestep``."""

    __slots__ = ()
    reason = Reason.SINGLESTEP

    gfn = _Field("u.singlestep.gfn", Gfn)
    """The page of the next instruction."""

    @classmethod
    def on(cls) -> Subscription:
        """Hear of single steps; :meth:`Response.singlestep` sees to it by itself."""
        return SINGLESTEP_ON


class GuestRequest(Event):
    """The guest asked for it (``HVMOP_guest_request_vm_event``). ``xc_monitor_guest_request``."""

    __slots__ = ()
    reason = Reason.GUEST_REQUEST

    @classmethod
    def on(cls, *, sync: bool = True, allow_userspace: bool = False) -> Subscription:
        """Hear of guests' requests.

        Args:
            sync: Whether the vCPU waits for the answer.
            allow_userspace: Whether the guest's user mode may ask, too.
        """
        check_flag("sync", sync)
        check_flag("allow_userspace", allow_userspace)
        options = {"sync": sync, "allow_userspace": allow_userspace}
        return Subscription(cls, "monitor_guest_request", options)


class DebugException(Event):
    """A debug exception (#DB) was raised. ``xc_monitor_debug_exceptions``."""

    __slots__ = ()
    reason = Reason.DEBUG_EXCEPTION

    gfn = _Field("u.debug_exception.gfn", Gfn)
    """The page of the instruction pointer."""
    insn_length = _Field("u.debug_exception.insn_length", int)
    """The length of the instruction behind it, where it is one."""
    type = _Field("u.debug_exception.type", _known(TrapType))
    """How it came about."""
    pending_dbg = _Field("u.debug_exception.pending_dbg", int)
    """What DR6 will show."""

    @classmethod
    def on(cls, *, sync: bool = True) -> Subscription:
        """Hear of #DB instead of the guest's own handler.

        Args:
            sync: Whether the vCPU waits for the answer.
        """
        check_flag("sync", sync)
        return Subscription(cls, "monitor_debug_exceptions", {"sync": sync})

    @property
    def default_response(self) -> Response:
        """The guest's own handler gets it."""
        return REINJECT


class Cpuid(Event):
    """The guest executed CPUID; the registers have its results. ``xc_monitor_cpuid``."""

    __slots__ = ()
    reason = Reason.CPUID

    insn_length = _Field("u.cpuid.insn_length", int)
    """Its length: the response must put rip behind it, or the guest executes it again."""
    leaf = _Field("u.cpuid.leaf", int)
    """eax before it."""
    subleaf = _Field("u.cpuid.subleaf", int)
    """ecx before it."""

    @classmethod
    def on(cls) -> Subscription:
        """Hear of CPUID."""
        return Subscription(cls, "monitor_cpuid")

    @property
    def default_response(self) -> Response:
        """The guest gets Xen's results."""
        after = self.registers.rip + self.insn_length  # at the end of the address space: 0
        return RESUME.with_registers(rip=after & (1 << 64) - 1)


class PrivilegedCall(Event):
    """A call to the secure monitor; Arm only."""

    __slots__ = ()
    reason = Reason.PRIVILEGED_CALL


class Interrupt(Event):
    """What is about to be delivered, after :meth:`Response.with_next_interrupt`."""

    __slots__ = ()
    reason = Reason.INTERRUPT

    vector = _Field("u.interrupt.x86.vector", int)
    """Its number."""
    type = _Field("u.interrupt.x86.type", _known(TrapType))
    """What it is."""
    error_code = _Field("u.interrupt.x86.error_code", int)
    """The exception's error code."""
    cr2 = _Field("u.interrupt.x86.cr2", int)
    """The address of a page fault."""


class DescriptorAccess(Event):
    """A descriptor table register was read or written. ``xc_monitor_descriptor_access``."""

    __slots__ = ()
    reason = Reason.DESCRIPTOR_ACCESS

    descriptor = _Field("u.desc_access.descriptor", _known(Descriptor))
    """Which."""
    is_write = _Field("u.desc_access.is_write", bool)
    """Whether it was loaded."""
    instr_info = _Field("u.desc_access.arch.vmx.instr_info", int)
    """VMX's instruction information."""
    exit_qualification = _Field("u.desc_access.arch.vmx.exit_qualification", int)
    """VMX's exit qualification."""

    @classmethod
    def on(cls) -> Subscription:
        """Hear of SGDT, LGDT, SIDT, LIDT, SLDT, LLDT, STR and LTR."""
        return Subscription(cls, "monitor_descriptor_access")

    @property
    def default_response(self) -> Response:
        """Xen's emulator executes it: executed by the vCPU it would be told of again."""
        return EMULATE


class EmulUnimplemented(Event):
    """Xen's emulator cannot execute an instruction. ``xc_monitor_emul_unimplemented``."""

    __slots__ = ()
    reason = Reason.EMUL_UNIMPLEMENTED

    @classmethod
    def on(cls) -> Subscription:
        """Hear of it instead of a #UD in the guest."""
        return Subscription(cls, "monitor_emul_unimplemented")

    @property
    def default_response(self) -> Response:
        """The vCPU executes it in view 0, where altp2m is on."""
        return step_over(self.view) if self.view else RESUME


class VmExit(Event):
    """The vCPU left guest mode (4.17 and later). ``xc_monitor_vmexit``."""

    __slots__ = ()
    reason = Reason.VMEXIT

    exit_reason = _Field("u.vmexit.arch.vmx.reason", int)
    """VMX's basic exit reason."""
    exit_qualification = _Field("u.vmexit.arch.vmx.qualification", int)
    """VMX's exit qualification."""

    @classmethod
    def on(cls, *, sync: bool = False) -> Subscription:
        """Hear of every exit.

        Args:
            sync: Whether the vCPU waits for the answer. Xen then leaves the exit unhandled, and
                the vCPU exits for the same cause again.
        """
        check_flag("sync", sync)
        return Subscription(cls, "monitor_vmexit", {"sync": sync})

    @property
    def default_response(self) -> Response:
        """One that waits is let through with the switch off for a step."""
        return LET_THROUGH if self.paused else RESUME


class Io(Event):
    """The guest executed a port I/O instruction (4.18 and later). ``xc_monitor_io``.

    Xen has not executed it, and the vCPU comes upon it again unless its registers are changed.
    """

    __slots__ = ()
    reason = Reason.IO_INSTRUCTION

    port = _Field("u.io.port", int)
    """The port."""
    bytes = _Field("u.io.bytes", int)
    """How many bytes it moves."""
    is_in = _Field("u.io.in", bool)
    """Whether it reads the port."""
    is_string = _Field("u.io.str", bool)
    """Whether it is INS or OUTS."""

    @classmethod
    def on(cls) -> Subscription:
        """Hear of port I/O."""
        return Subscription(cls, "monitor_io")

    @property
    def default_response(self) -> Response:
        """Let it through: the switch is off while this vCPU steps over it."""
        return LET_THROUGH


EVENTS: Mapping[int, type[Event]] = MappingProxyType(
    {
        int(kind.reason): kind
        for kind in (
            MemAccess, MemSharing, MemPaging, WriteCtrlreg, MovToMsr, SoftwareBreakpoint,
            Singlestep, GuestRequest, DebugException, Cpuid, PrivilegedCall, Interrupt,
            DescriptorAccess, EmulUnimplemented, VmExit, Io,
        )
        if kind.reason is not None
    }
)  # fmt: skip
"""The class of each reason."""

SINGLESTEP_ON = Subscription(Singlestep, "monitor_singlestep")

InguestPagefault = Subscription(None, "monitor_inguest_pagefault")
"""No event for what the CPU's page walk does: Xen emulates the instruction instead."""

EmulateEachRep = Subscription(None, "monitor_emulate_each_rep")
"""Emulate each repetition of a string instruction by itself."""
