# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trace calls of a guest's functions: caller, arguments, return value.

A trace has breakpoints at the functions it was given. It opens the domain's altp2m and a monitor
for them, and closes both when it is closed.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, closing
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from xenaltp2m.abi.x86 import CR0_PG
from xenaltp2m.errors import InvalidArgumentError, NotMappedError
from xenaltp2m.handles.base import Handle, check_callback
from xenaltp2m.handles.memory import AddressSpace, MappedPages, table_address
from xenaltp2m.tools.breakpoints.hooks import Hit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.breakpoints.placement import check_placement
from xenaltp2m.tools.symbols import Image, Symbols, fingerprint
from xenaltp2m.tools.tracing.calls import Call, Return, Seen
from xenaltp2m.tools.tracing.options import check_options, wanted_cr3
from xenaltp2m.tools.tracing.stacks import ShadowStacks
from xenaltp2m.values.events import DomainEnded, Registers

if TYPE_CHECKING:
    from xenaltp2m.handles.domain import Domain
    from xenaltp2m.values.events import Event
    from xenaltp2m.values.responses import Response

_Place: TypeAlias = "int | tuple[AddressSpace, int]"
_IN_REGISTERS = "rdi", "rsi", "rdx", "rcx", "r8", "r9"
"""The first six arguments (System V ABI, AMD64)."""
_MOST_TABLES = 1 << 10
"""The most top-level page tables for which a trace remembers whether they are wanted."""


class Trace(Handle):
    """A trace of a domain's function calls. Closing it leaves the domain as it was.

    Attributes:
        hits: The number of calls of each function, by name, including those not reported.
        dropped: The number of calls not reported because there were too many in a second.
        reapplied: The number of pages with breakpoints that :meth:`verify` has found reset by Xen.
        busy: Seconds spent on calls and returns, callbacks included.
        ended: The event of the domain's end; None before it.
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
        """Open altp2m and a monitor, and insert the breakpoints.

        Args:
            domain: The domain, started or not.
            *names: Functions, in the syntax of :meth:`Symbols.address`.
            symbols: Resolves the names.
            arguments: The number of arguments to report, for all functions or by name. In 64-bit
                mode the first six are in registers; the others, and all in 32-bit mode, are on the
                stack.
            returns: Whether returns are reported, too.
            cr3: Report only calls with these page tables, or with the other page tables of the same
                process if the kernel has its own (Linux: PTI; Windows: KVA shadow).
            most_per_second: The most calls to report in a second; the rest is counted.
            fast: See :class:`Breakpoints`.
            accept: See :meth:`Domain.altp2m`.
            trust: Whether to skip comparing the symbols with the guest's memory; else they are
                compared before anything is changed.

        Raises:
            InvalidArgumentError: An argument is invalid.
            SymbolError: A name is unknown; or the symbols do not match the guest, or nothing shows
                whether they do.
            NotMappedError: Paging is off, and a function's address is above 4 GiB.
            XenError: No vCPU is online.
        """
        check_options(names, symbols, arguments, most_per_second)
        self._domain, self._symbols, self._returns = domain, symbols, returns
        self._cr3 = wanted_cr3(cr3)
        self._same_process: dict[tuple[int, int], bool] = {}
        addresses = {name: symbols.address(name) for name in names}
        registers = domain.registers()
        places = {name: self._place(name, at, registers) for name, at in addresses.items()}
        if not trust:
            fingerprint.check(domain.memory, symbols, names, registers)
            read = fingerprint.reader(domain.memory, symbols, registers)
            for address in addresses.values():
                check_placement(symbols, address, read, registers.word_size)
        super().__init__()
        self._arguments = arguments
        rate = most_per_second
        self._most = max(int(rate), 1) if rate else math.inf
        """The most calls to report in ``_span`` seconds."""
        self._span = self._most / rate if rate else math.inf
        self.hits: Counter[str] = Counter(dict.fromkeys(names, 0))
        self.dropped = self.reapplied = 0
        self.busy = 0.0
        self._until = math.inf
        self.ended: DomainEnded | None = None
        self._clock = domain.xen.backend.clock
        self._begun = self._clock.monotonic()
        self._span_ends, self._told = 0.0, 0
        self._seen: deque[Seen] = deque()
        self._callback: Callable[[Seen], object] = self._seen.append
        try:
            with self._undo.rolling_back(domain.context.undo, unless=self._gone):
                self._open(places, fast, accept)
        except BaseException:
            super().abandon()
            raise

    @property
    def waiting(self) -> int:
        """The number of calls whose return is pending."""
        return self._stacks.waiting

    @property
    def unfinished(self) -> int:
        """The number of calls whose return is not expected any more.

        longjmp has left them, their return address is not mapped, or there were too many.
        """
        return self._stacks.unfinished

    def __repr__(self) -> str:
        return f"<Trace of {', '.join(self.hits)} in domain {self._domain.domid}>"

    def _open(self, places: Mapping[str, _Place], fast: bool, accept: Collection[str]) -> None:
        """Open altp2m, the monitor and the breakpoints, and insert them."""
        opened, close = self._undo.do, Handle.close
        altp2m = opened("", partial(self._domain.altp2m, accept=accept), close)
        self._monitor = opened("", self._domain.monitor, close)
        self._breakpoints = opened(
            "", partial(Breakpoints, altp2m, self._monitor, fast=fast), close
        )
        self._mapped = opened("", partial(MappedPages, self._domain.context), close)
        self._stacks = ShadowStacks(
            self._breakpoints, self._symbols, self.address_space, self._returned
        )
        for name, place in places.items():
            called = partial(self._called, name)
            if isinstance(place, int):
                self._breakpoints.insert(place, called)
            else:
                self._breakpoints.insert_va(*place, called)

    def _place(self, name: str, va: int, registers: Registers) -> _Place:
        """Return a function's address: physical, or virtual if it is not mapped yet."""
        if registers.cr0 & CR0_PG:
            space = self._domain.memory.kernel_space(registers)
            try:
                return space.translate(va).physical
            except NotMappedError:
                return space, va
        if isinstance(self._symbols, Image):
            return self._symbols.physical_of(va)
        if va >= 1 << 32:
            raise NotMappedError(
                f"{name} is at {va:#x}, and the vCPU has not turned paging on yet",
                domid=int(self._domain.domid),
                hint=("start when the guest's kernel runs, or use its ELF image as the symbols",),
            )
        return va

    # Reporting.

    def calls(self, timeout: float | None = None) -> Iterator[Seen]:
        """Yield calls and returns; the guest resumes meanwhile.

        Args:
            timeout: The iteration ends after so many seconds without an event; None waits for
                ever.
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
        """Call a function with each call and return, while the vCPU waits: the fastest way.

        Args:
            callback: An exception that it raises is raised by this method, after the vCPU has been
                answered.
            timeout: As for :meth:`calls`.
            seconds: The method returns at the first event after so long, reported or not.
        """
        check_callback(callback)
        self._callback = callback
        self._until = self._clock.monotonic() + seconds
        try:
            self._monitor.run(self._handle, timeout)
        finally:
            self._callback, self._until = self._seen.append, math.inf

    def stop(self) -> None:
        """End the current iteration, or the next one; from any thread or signal handler."""
        self._monitor.stop()

    def address_space(self, call: Call) -> AddressSpace:
        """Return the caller's virtual address space; it reads fast while the trace is open."""
        return self._domain.memory.address_space(call.registers, mapped=self._mapped)

    def verify(self) -> None:
        """Restore breakpoints that Xen has reset: see :meth:`Breakpoints.verify`."""
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

    # Hits.

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
        stack = registers.rsp_va
        caller, arguments = self._stack(registers, stack, count, width)
        call = Call(name, hit.vcpu, now, cr3, stack, caller, arguments, registers)
        if self._returns:
            self._stacks.wait_for(call)
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
        """Read the return address, and the arguments from registers and stack."""
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

    def _returned(self, call: Call, hit: Hit) -> None:
        registers, now = hit.registers, self._clock.monotonic() - self._begun
        value = registers.rax & (-1 if registers.word_size == 8 else 0xFFFF_FFFF)
        self._callback(Return(call, hit.vcpu, now, value, registers))
