# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of a guest's functions, as they happen: who calls, with what, and what comes of it.

A trace has breakpoints at the functions it was given. It opens the domain's altp2m and a monitor
for them, and gives both back when it is closed.
"""

from __future__ import annotations

import math
import os
import re
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Required, TypeAlias, TypedDict

from xenaltp2m import fingerprint
from xenaltp2m.abi.x86 import CR0_PG, EFER_LMA
from xenaltp2m.breakpoints import Breakpoints
from xenaltp2m.errors import InvalidArgumentError, NotMappedError, OutOfMemoryError
from xenaltp2m.events import DomainEnded, Registers
from xenaltp2m.handle import Handle, check_callback
from xenaltp2m.hooks import Breakpoint, Hit
from xenaltp2m.memory import AddressSpace, MappedPages, table_address
from xenaltp2m.placement import check_placement
from xenaltp2m.symbols import Image, Symbols
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from xenaltp2m.domain import Domain
    from xenaltp2m.events import Event
    from xenaltp2m.responses import Response
    from xenaltp2m.types import VcpuId

_Place: TypeAlias = "int | tuple[AddressSpace, int]"
_StackPage: TypeAlias = tuple[int, int]
"""The page tables, or 0 for all of them, and the number of a page."""
_MOST_WAITING = 1 << 16
"""Calls whose return is waited for: some never come back."""
_MOST_PLACES = 1 << 10
"""Places that traced functions come back to."""
_CALL, _CALL_SIZE = 0xE8, 5
"""``call rel32``."""
_NEAR = 16
"""Bytes from a page's ends: a breakpoint there concerns the next page, too."""
_MOST_TAKEN = 256
"""Bytes of arguments that a function outside 64-bit code may take off the stack (``ret n``)."""
_RETURNS_TWICE = re.compile(r"(_|__|__x)?(setjmp|sigsetjmp|savectx|vfork|getcontext)([@#].*)?")
"""The names by which gcc knows such functions (``special_function_p``)."""
_IN_REGISTERS = "rdi", "rsi", "rdx", "rcx", "r8", "r9"
"""The first six arguments (System V ABI, AMD64)."""
_MOST_ARGUMENTS = 256
"""Words."""
_MOST_TABLES = 1 << 10
"""Top-level page tables of which is remembered whether they are wanted."""
_UPPER_HALF = 1 << 63
"""Where kernels of 64 bits have their stacks."""
_PRIVILEGE = 3
"""Of a selector of CS: 0 in the kernel."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function was called; the vCPU is about to execute its first instruction."""

    name: str
    vcpu: VcpuId
    time: float
    """Seconds since the trace began."""
    cr3: int
    stack: int
    """Linear address of the top of the stack, where the return address is."""
    caller: int | None
    """Linear return address; None where the stack cannot be read."""
    arguments: tuple[int, ...]
    """As many as were asked for."""
    registers: Registers = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Return:
    """A call came back."""

    call: Call
    vcpu: VcpuId
    time: float
    value: int
    """rax, or eax."""
    registers: Registers = field(repr=False, compare=False)


Seen: TypeAlias = Call | Return


class TraceOptions(TypedDict, total=False):
    """The options of :class:`Trace`, which has their meaning."""

    symbols: Required[Symbols]
    arguments: int | Mapping[str, int]
    returns: bool
    cr3: int | Collection[int] | None
    most_per_second: float | None
    fast: bool
    accept: Collection[str]
    trust: bool


class Trace(Handle):
    """A trace of a domain. Closing it leaves the domain as it was.

    Attributes:
        hits: How often each function was called, by name, whatever was left out.
        dropped: How many calls were left out because there were too many in a second.
        waiting: Of how many calls the return is awaited.
        unfinished: Of how many calls the return is awaited no more: longjmp has left them, their
            return address leads nowhere, or there were too many.
        reapplied: How many pages with breakpoints :meth:`verify` has found reset by Xen.
        busy: Seconds that were spent on calls and returns, callbacks included.
        ended: How the domain ended, once it has.
    """

    def __init__(
        self,
        domain: Domain,
        *names: str,
        symbols: Symbols,
        arguments: int | Mapping[str, int] = 0,
        returns: bool = False,
        cr3: int | Collection[int] | None = None,
        most_per_second: float | None = None,
        fast: bool = True,
        accept: Collection[str] = (),
        trust: bool = False,
    ) -> None:
        """Begin.

        Args:
            domain: The domain, started or not.
            *names: Functions, as :meth:`Symbols.address` takes them.
            symbols: Where they are.
            arguments: How many arguments a call tells, of all or by name: in 64-bit mode the first
                six in registers, the others, and all in 32-bit mode, on the stack.
            returns: Whether returns are told, too.
            cr3: Only calls with these page tables are told, or with the other ones of the same
                process, where the kernel has its own (Linux: PTI; Windows: KVA shadow).
            most_per_second: How many calls are told in a second; the rest is counted.
            fast: See :class:`Breakpoints`.
            accept: See :meth:`Domain.altp2m`.
            trust: Whether the symbols are taken to be the guest's without looking; else its memory
                is compared with them, before anything is changed.

        Raises:
            InvalidArgumentError: An argument is not what it should be.
            SymbolError: A name is not known; or the symbols are of something else, or nothing
                tells whether they are.
            NotMappedError: Its address is none while paging is off.
            XenError: No vCPU is up.
        """
        if not names:
            raise InvalidArgumentError("say which functions to trace")
        for name in names:
            if not isinstance(name, str):
                raise InvalidArgumentError(f"a function is named by a string, not {name!r}")
        if not isinstance(symbols, Symbols):
            raise InvalidArgumentError(
                f"symbols are what Symbols.open({symbols!r}) returns"
                if isinstance(symbols, str | os.PathLike)
                else f"symbols are what Symbols.open returns, not {symbols!r}"
            )
        _check_arguments(arguments, names)
        rate = most_per_second
        if rate is not None and not (_is_number(rate, float) and 0 < rate < math.inf):
            raise InvalidArgumentError(
                f"most_per_second is a number above 0, or None, not {most_per_second!r}"
            )
        self._domain, self._symbols, self._returns = domain, symbols, returns
        self._cr3 = _wanted_cr3(cr3)
        self._same_process: dict[tuple[int, int], bool] = {}
        addresses = {name: symbols.address(name) for name in names}
        registers = domain.registers()
        places = {name: self._place(name, at, registers) for name, at in addresses.items()}
        if not trust:
            fingerprint.check(domain, symbols, names, registers)
            read = fingerprint.reader(domain, symbols, registers)
            for address in addresses.values():
                check_placement(symbols, address, read, registers.word_size)
        super().__init__()
        self._arguments = arguments
        self._most = max(int(rate), 1) if rate else math.inf
        """So many are told in a span of time, which is a second or what one takes."""
        self._span = self._most / rate if rate else math.inf
        self.hits: Counter[str] = Counter(dict.fromkeys(names, 0))
        self.dropped = self.waiting = self.unfinished = self.reapplied = 0
        self.busy = 0.0
        self._until = math.inf
        self.ended: DomainEnded | None = None
        self._clock = domain.xen.backend.clock
        self._begun = self._clock.monotonic()
        self._span_ends, self._told = 0.0, 0
        self._seen: deque[Seen] = deque()
        self._callback: Callable[[Seen], object] = self._seen.append
        self._places: dict[int, _ReturnPlace] = {}
        """By guest-physical address: their breakpoints stay, for the next call from there."""
        self._stacks: dict[_StackPage, list[_Frame]] = {}
        """Shadow stacks: frames that are awaited, by address."""
        self._frames: dict[_Frame, None] = {}
        """The same, oldest first."""
        self._twice: dict[tuple[_ReturnPlace, _StackPage, int], list[Call]] = {}
        """Calls that have returned and may again, by the place and the stack pointer."""
        try:
            self._open(places, fast, accept)
        except BaseException as error:
            self._roll_back(self._undo, error, heir=domain._undo)
            super().abandon()
            raise

    def __repr__(self) -> str:
        return f"<Trace of {', '.join(self.hits)} in domain {self._domain.domid}>"

    def _open(self, places: Mapping[str, _Place], fast: bool, accept: Collection[str]) -> None:
        """Open what is needed, and insert the breakpoints."""
        opened, close = self._undo.do, Handle.close
        altp2m = opened("", partial(self._domain.altp2m, accept=accept), close)
        self._monitor = opened("", self._domain.monitor, close)
        self._breakpoints = opened(
            "", partial(Breakpoints, altp2m, self._monitor, fast=fast), close
        )
        self._mapped = opened("", partial(MappedPages, self._domain), close)
        for name, place in places.items():
            called = partial(self._called, name)
            if isinstance(place, int):
                self._breakpoints.insert(place, called)
            else:
                self._breakpoints.insert_linear(*place, called)

    def _place(self, name: str, linear: int, registers: Registers) -> _Place:
        """Where a function is: physical; or linear, if the page tables lead nowhere there yet."""
        if registers.cr0 & CR0_PG:
            space = self._domain.memory.kernel_space(registers)
            try:
                return space.translate(linear).physical
            except NotMappedError:
                return space, linear
        if isinstance(self._symbols, Image):
            return self._symbols.physical_of(linear)
        if linear >= 1 << 32:
            raise NotMappedError(
                f"{name} is at {linear:#x}, and the vCPU has not turned paging on yet",
                domid=int(self._domain.domid),
                hint=("begin when the guest's kernel runs, or give its ELF image as the symbols",),
            )
        return linear

    # Listening.

    def calls(self, timeout: float | None = None) -> Iterator[Seen]:
        """Yield what happens; the guest goes on meanwhile.

        Args:
            timeout: How many seconds nothing may happen before the iteration ends; None waits
                for ever.
        """
        with closing(self._monitor.events(timeout)) as events:
            for event in events:
                self._answer(event)
                while self._seen:
                    yield self._seen.popleft()

    def __iter__(self) -> Iterator[Seen]:
        return self.calls()

    async def __aiter__(self) -> AsyncGenerator[Seen, None]:
        """As :meth:`calls`, for ``async for``."""
        async with aclosing(self._monitor.__aiter__()) as events:
            async for event in events:
                self._answer(event)
                while self._seen:
                    yield self._seen.popleft()

    def run(
        self,
        callback: Callable[[Seen], object],
        timeout: float | None = None,
        *,
        seconds: float = math.inf,
    ) -> None:
        """Call a function with what happens, while the vCPU waits: the fastest way.

        Args:
            callback: What it raises is raised here, once the vCPU was answered.
            timeout: As for :meth:`calls`.
            seconds: After so long this ends, with the next that happens, told or not.
        """
        check_callback(callback)
        self._callback = callback
        self._until = self._clock.monotonic() + seconds
        try:
            self._monitor.run(self._handle, timeout)
        finally:
            self._callback, self._until = self._seen.append, math.inf

    def stop(self) -> None:
        """End the iteration that runs, or the next one; from any thread or signal handler."""
        self._monitor.stop()

    def address_space(self, call: Call) -> AddressSpace:
        """Return the linear addresses of the caller, quick to read while the trace is open."""
        return self._domain.memory.address_space(call.registers, mapped=self._mapped)

    def verify(self) -> None:
        """Make breakpoints again that Xen has reset: see :meth:`Breakpoints.verify`."""
        self.reapplied += len(self._breakpoints.verify())

    def _handle(self, event: Event) -> Response | None:
        if isinstance(event, DomainEnded):
            self.ended = event
            return None
        begun = time.perf_counter()
        try:
            return self._breakpoints(event)
        finally:
            self.busy += time.perf_counter() - begun
            if self._until < math.inf and self._clock.monotonic() >= self._until:
                self._monitor.stop()

    def _answer(self, event: Event) -> None:
        response = self._handle(event)
        if response is not None:
            event.reply(response)

    # What is hit.

    def _called(self, name: str, hit: Hit) -> None:
        self.hits[name] += 1
        registers = hit.registers
        cr3 = registers.cr3
        if self._cr3 is not None and not self._is_wanted(registers):
            return
        now = self._clock.monotonic() - self._begun
        if now >= self._span_ends:
            self._span_ends, self._told = now + self._span, 0
        if self._told >= self._most:
            self.dropped += 1
            return
        self._told += 1
        width = registers.word_size
        count = (
            self._arguments if isinstance(self._arguments, int) else self._arguments.get(name, 0)
        )
        stack = registers.linear_rsp
        caller, arguments = self._stack(registers, stack, count, width)
        call = Call(name, hit.vcpu, now, cr3, stack, caller, arguments, registers)
        if self._returns:
            self._await(call)
        self._callback(call)

    def _is_wanted(self, registers: Registers) -> bool:
        assert self._cr3 is not None
        own = table_address(registers, registers.cr3)
        return any(
            own == wanted or self._is_one_process(registers, own, wanted)
            for wanted in (table_address(registers, cr3) for cr3 in self._cr3)
        )

    def _is_one_process(self, registers: Registers, one: int, other: int) -> bool:
        found = self._same_process.get((one, other))
        if found is None:
            if len(self._same_process) >= _MOST_TABLES:
                self._same_process.clear()
            found = self._domain.memory.is_one_process(registers, one, other)
            self._same_process[one, other] = found
        return found

    def _stack(
        self, registers: Registers, stack: int, count: int, width: int
    ) -> tuple[int | None, tuple[int, ...]]:
        """Read the return address, and the arguments wherever they are."""
        in_registers = [getattr(registers, name) for name in _IN_REGISTERS if width == 8][:count]
        on_stack = count - len(in_registers)
        space = self._domain.memory.address_space(registers, mapped=self._mapped)
        try:
            raw = space.read(stack, width * (1 + on_stack))
        except (NotMappedError, InvalidArgumentError):
            return None, tuple(in_registers)
        words = [int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width)]
        caller = words[0] if width == 8 else (registers.cs_base + words[0]) & 0xFFFF_FFFF
        return caller, (*in_registers, *words[1:])

    def _await(self, call: Call) -> None:
        """Wait for the return of a call."""
        key, slot = _stack_of(call.registers, call.stack), call.stack
        self._leave(key, slot, call.vcpu)
        place = self._place_of_return(call)
        frame = self._frame_at(key, slot)
        if frame is not None and frame.place is not place:
            self._give_up(frame)  # CALL has overwritten its return address
            frame = None
        if place is None:
            self.unfinished += 1
            return
        if frame is None:
            frame = _Frame(key, slot, place)
            insort(self._stacks.setdefault(key, []), frame, key=_slot)
            self._frames[frame] = None
            place.arm(self._breakpoints, self._left_by_call)
        frame.calls.append(call)  # a tail call, if there was one before
        self.waiting += 1
        if self.waiting > _MOST_WAITING:
            self._give_up_oldest()

    def _place_of_return(self, call: Call) -> _ReturnPlace | None:
        """Return where a call comes back to, with a breakpoint there; None if there can be none."""
        if call.caller is None:
            return None
        space = self.address_space(call)
        try:
            physical = space.translate(call.caller).physical
            place = self._places.get(physical)
            if place is None and len(self._places) < _MOST_PLACES:
                wrap = (1 << 64) - 1 if call.registers.word_size == 8 else 0xFFFF_FFFF
                place = _ReturnPlace(self._site(space, call.caller, wrap))
                self._breakpoints.insert(physical, partial(self._returned, place))
                self._places[physical] = place
        except (NotMappedError, InvalidArgumentError, OutOfMemoryError):
            return None  # the guest has put the address there: it may be anything
        return place

    def _site(self, space: AddressSpace, caller: int, wrap: int) -> int | None:
        """Return the physical address of the CALL before a return address; None if not known.

        Only ``call rel32`` to a symbol is certain: other bytes may be the end of something else.
        """
        site = caller - _CALL_SIZE
        try:
            code = space.read(site, _CALL_SIZE)
            target = caller + int.from_bytes(code[1:], "little", signed=True)
            found = self._symbols.locate(target & wrap) if code[0] == _CALL else None
            return space.translate(site).physical if found and not found.offset else None
        except (NotMappedError, InvalidArgumentError):
            return None

    def _left_by_call(self, hit: Hit) -> None:
        """Give up calls that longjmp has left: their frame is where this CALL puts its own."""
        registers = hit.registers
        top = registers.linear_rsp
        slot = top - registers.word_size
        key = _stack_of(registers, slot)
        frame = self._frame_at(key, slot)
        if frame is not None:
            self._give_up(frame)
        self._leave(key, top, hit.vcpu)

    def _frame_at(self, key: _StackPage, slot: int) -> _Frame | None:
        frames = self._stacks.get(key, ())
        at = bisect_left(frames, slot, key=_slot)
        return frames[at] if at < len(frames) and frames[at].slot == slot else None

    def _leave(self, key: _StackPage, top: int, vcpu: VcpuId) -> None:
        """Give up calls whose return address is below the top of their stack.

        In the same page, and by the same vCPU, it is the same stack: others seldom share a page.
        """
        frames = self._stacks.get(key, ())
        for frame in frames[: bisect_left(frames, top, key=_slot)]:
            if frame.calls[0].vcpu == vcpu:
                self._give_up(frame)

    def _give_up(self, frame: _Frame) -> None:
        self._remove(frame)
        self.unfinished += len(frame.calls)

    def _give_up_oldest(self) -> None:
        frame = next(iter(self._frames))
        frame.calls.popleft()
        self.waiting -= 1
        self.unfinished += 1
        if not frame.calls:
            self._remove(frame)

    def _remove(self, frame: _Frame) -> None:
        frames = self._stacks[frame.key]
        frames.remove(frame)
        if not frames:
            del self._stacks[frame.key]
        del self._frames[frame]
        self.waiting -= len(frame.calls)
        frame.place.disarm()

    def _returned(self, place: _ReturnPlace, hit: Hit) -> None:
        registers = hit.registers
        top, width = registers.linear_rsp, registers.word_size
        frame = self._frame_of_return(place, hit, top - width)
        calls: deque[Call] = deque()
        if frame is not None:
            self._remove(frame)
            calls = frame.calls
        self._leave(_stack_of(registers, top - 1), top, hit.vcpu)
        again = place, _stack_of(registers, top), top
        if not calls:
            calls.extend(self._twice.get(again, ()))
        elif twice := [call for call in calls if _RETURNS_TWICE.fullmatch(call.name)]:
            self._twice[again] = twice
            if len(self._twice) > _MOST_PLACES:
                del self._twice[next(iter(self._twice))]
        now = self._clock.monotonic() - self._begun
        value = registers.rax & (-1 if width == 8 else 0xFFFF_FFFF)
        try:
            while calls:
                self._callback(Return(calls.pop(), hit.vcpu, now, value, registers))
        finally:
            self.unfinished += len(calls)

    def _frame_of_return(self, place: _ReturnPlace, hit: Hit, slot: int) -> _Frame | None:
        """Find the frame whose return address a RET has just taken off the stack.

        Outside 64-bit code it may have taken arguments along (``ret n``).
        """
        registers = hit.registers
        frame = self._frame_at(_stack_of(registers, slot), slot)
        if frame is not None and frame.place is place:
            return frame
        if registers.word_size == 8:
            return None
        found = [
            frame
            for key in {_stack_of(registers, slot), _stack_of(registers, slot - _MOST_TAKEN)}
            for frame in self._stacks.get(key, ())
            if frame.place is place
            and slot - _MOST_TAKEN <= frame.slot < slot
            and frame.calls[0].vcpu == hit.vcpu
        ]
        return max(found, key=_slot, default=None)


class _ReturnPlace:
    """Where calls come back to, and the CALL before it.

    A CALL that is executed while calls wait that it has made, from the same place of the stack,
    shows that these have been left: by longjmp, or by an exception of C++. It has a breakpoint only
    while some wait; but for one near a page's ends, where that takes more than to be hit by all.
    """

    __slots__ = ("_breakpoint", "_site", "_stays", "_waiting")

    def __init__(self, site: int | None) -> None:
        self._site, self._waiting = site, 0
        self._stays = site is not None and not _NEAR <= site % PAGE_SIZE < PAGE_SIZE - _NEAR
        self._breakpoint: Breakpoint | None = None

    def arm(self, breakpoints: Breakpoints, callback: Callable[[Hit], object]) -> None:
        self._waiting += 1
        if self._site is not None and self._breakpoint is None:
            try:
                self._breakpoint = breakpoints.insert(self._site, callback)
            except (NotMappedError, InvalidArgumentError, OutOfMemoryError):
                self._site = None

    def disarm(self) -> None:
        self._waiting -= 1
        if not self._waiting and self._breakpoint is not None and not self._stays:
            self._breakpoint.remove()
            self._breakpoint = None


class _Frame:
    """A return address on a stack, and the calls that end with it: tail calls share one."""

    __slots__ = ("calls", "key", "place", "slot")

    def __init__(self, key: _StackPage, slot: int, place: _ReturnPlace) -> None:
        self.key, self.slot, self.place = key, slot, place
        self.calls: deque[Call] = deque()


_slot = attrgetter("slot")


def _stack_of(registers: Registers, address: int) -> _StackPage:
    """Return the page of a stack.

    Kernels have their stacks at the same addresses by all page tables.
    """
    is_kernel = address & _UPPER_HALF
    if not registers.msr_efer & EFER_LMA:
        is_kernel = not registers.cs_sel & _PRIVILEGE  # the halves are of any size
    return 0 if is_kernel else table_address(registers, registers.cr3), address >> PAGE_SHIFT


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, (int, *kinds)) and not isinstance(value, bool)


def _check_arguments(arguments: int | Mapping[str, int], names: Collection[str]) -> None:
    if isinstance(arguments, Mapping):
        if unknown := sorted(map(str, arguments.keys() - set(names))):
            raise InvalidArgumentError(
                f"arguments of {unknown[0]!r} are asked for, which is not traced"
            )
        counts = list(arguments.values())
    else:
        counts = [arguments]
    for count in counts:
        if not _is_number(count) or not 0 <= count <= _MOST_ARGUMENTS:
            raise InvalidArgumentError(
                f"the number of arguments is 0 to {_MOST_ARGUMENTS}, or a mapping of functions' "
                f"names to such, not {count!r}"
            )


def _wanted_cr3(cr3: int | Collection[int] | None) -> list[int] | None:
    if cr3 is None:
        return None
    wanted = [cr3] if isinstance(cr3, int | str) or not isinstance(cr3, Collection) else list(cr3)
    for each in wanted:
        if not _is_number(each) or not 0 <= each < 1 << 64:
            raise InvalidArgumentError(f"cr3 is a value of that register, or several, not {each!r}")
    if not wanted:
        raise InvalidArgumentError("cr3 names no page tables: None is for all")
    return wanted
