# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shadow stacks: calls whose return is pending.

A call is identified by the place of its return address: the page tables, and the stack pointer.
Tail calls share one.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TypeAlias

from xenaltp2m.abi.x86 import EFER_LMA
from xenaltp2m.errors import InvalidArgumentError, NotMappedError, OutOfMemoryError
from xenaltp2m.handles.memory import AddressSpace, table_address
from xenaltp2m.tools.breakpoints.hooks import Breakpoint, Hit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.symbols import Symbols
from xenaltp2m.tools.tracing.calls import Call
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE, VcpuId
from xenaltp2m.values.events import Registers

_MOST_WAITING = 1 << 16
"""The most calls whose return is pending: some never return."""
_MOST_PLACES = 1 << 10
"""The most places that traced functions return to."""
_CALL, _CALL_SIZE = 0xE8, 5
"""``call rel32``."""
_NEAR = 16
"""The distance from a page's ends within which a breakpoint affects the next page, too."""
_MOST_TAKEN = 256
"""The most bytes of arguments that a function outside 64-bit code may pop (``ret n``)."""
_RETURNS_TWICE = re.compile(r"(_|__|__x)?(setjmp|sigsetjmp|savectx|vfork|getcontext)([@#].*)?")
"""The names by which gcc recognizes such functions (``special_function_p``)."""
_UPPER_HALF = 1 << 63
"""Where 64-bit kernels have their stacks."""
_PRIVILEGE = 3
"""The privilege level in a CS selector: 0 in the kernel."""
_StackPage: TypeAlias = tuple[int, int]
"""The page tables, or 0 for all of them, and the number of a page."""


class ShadowStacks:
    """The calls whose return is pending.

    Attributes:
        waiting: The number of calls whose return is pending.
        unfinished: The number of calls whose return is not expected any more: longjmp has left
            them, their return address is not mapped, or there were too many.
    """

    def __init__(
        self,
        breakpoints: Breakpoints,
        symbols: Symbols,
        space_of: Callable[[Call], AddressSpace],
        on_return: Callable[[Call, Hit], None],
    ) -> None:
        """Begin without pending calls.

        Args:
            breakpoints: Inserts breakpoints at return addresses.
            symbols: Show what a CALL calls.
            space_of: Returns a call's virtual address space.
            on_return: Called with each call that returns.
        """
        self._breakpoints, self._symbols = breakpoints, symbols
        self._space_of, self._on_return = space_of, on_return
        self.waiting = self.unfinished = 0
        self._places: dict[int, _ReturnPlace] = {}
        """By guest-physical address. Their breakpoints stay, for the next call from there."""
        self._stacks: dict[_StackPage, list[_Frame]] = {}
        """The pending frames of each page, ordered by address."""
        self._frames: dict[_Frame, None] = {}
        """The pending frames, oldest first."""
        self._twice: dict[tuple[_ReturnPlace, _StackPage, int], list[Call]] = {}
        """Calls that have returned and may return again, by the place and the stack pointer."""

    def wait_for(self, call: Call) -> None:
        """Wait for the return of a call."""
        key, slot = _stack_of(call.registers, call.stack), call.stack
        self._leave(key, slot, call.vcpu)
        place = self._place_of_return(call)
        frame = self._frame_at(key, slot)
        if frame is not None and frame.place is not place:
            self._give_up(frame)  # a CALL has overwritten its return address
            frame = None
        if place is None:
            self.unfinished += 1
            return
        if frame is None:
            frame = _Frame(key, slot, place)
            insort(self._stacks.setdefault(key, []), frame, key=_slot)
            self._frames[frame] = None
            place.arm(self._breakpoints, self._left_by_call)
        frame.calls.append(call)  # a tail call, if the frame existed before
        self.waiting += 1
        if self.waiting > _MOST_WAITING:
            self._give_up_oldest()

    def _place_of_return(self, call: Call) -> _ReturnPlace | None:
        """Return the place that a call returns to, with a breakpoint; None if it can have none."""
        if call.caller is None:
            return None
        space = self._space_of(call)
        try:
            physical = space.translate(call.caller).physical
            place = self._places.get(physical)
            if place is None and len(self._places) < _MOST_PLACES:
                wrap = (1 << 64) - 1 if call.registers.word_size == 8 else 0xFFFF_FFFF
                place = _ReturnPlace(self._site(space, call.caller, wrap))
                self._breakpoints.insert(physical, partial(self._returned, place))
                self._places[physical] = place
        except (NotMappedError, InvalidArgumentError, OutOfMemoryError):
            return None  # the guest has written the return address: it may be anything
        return place

    def _site(self, space: AddressSpace, caller: int, wrap: int) -> int | None:
        """Return the physical address of the CALL before a return address; None if unknown.

        Only ``call rel32`` to a symbol is certain: other bytes may be the end of another
        instruction.
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
        """Give up calls that longjmp has left: their frame is where this CALL pushes its own."""
        registers = hit.registers
        top = registers.rsp_va
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

        The same page and the same vCPU mean the same stack: two stacks seldom share a page.
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
        top, width = registers.rsp_va, registers.word_size
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
        try:
            while calls:
                self._on_return(calls.pop(), hit)
        finally:
            self.unfinished += len(calls)

    def _frame_of_return(self, place: _ReturnPlace, hit: Hit, slot: int) -> _Frame | None:
        """Find the frame whose return address a RET has just popped.

        Outside 64-bit code it may have popped arguments as well (``ret n``).
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
    """A place that calls return to, and the CALL before it.

    If that CALL is executed at the same place of the stack while calls that it has made are
    pending, they have been left: by longjmp, or by a C++ exception. The CALL has a breakpoint only
    while calls are pending. One near a page's ends keeps it, because inserting it costs more than
    being hit by all calls.
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
    """A return address on a stack, and the calls that return through it: tail calls share one."""

    __slots__ = ("calls", "key", "place", "slot")

    def __init__(self, key: _StackPage, slot: int, place: _ReturnPlace) -> None:
        self.key, self.slot, self.place = key, slot, place
        self.calls: deque[Call] = deque()


_slot = attrgetter("slot")


def _stack_of(registers: Registers, address: int) -> _StackPage:
    """Return the page of a stack.

    Kernels have their stacks at the same addresses in all page tables.
    """
    is_kernel = address & _UPPER_HALF
    if not registers.msr_efer & EFER_LMA:
        is_kernel = not registers.cs_sel & _PRIVILEGE  # the halves can have any size
    return 0 if is_kernel else table_address(registers, registers.cr3), address >> PAGE_SHIFT
