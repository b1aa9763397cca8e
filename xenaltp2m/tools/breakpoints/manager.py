# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stealth breakpoints: trap a guest's instructions without a change that the guest can read.

A page with breakpoints is executed from a *shadow page*: a copy with int3 in it, which one view
maps instead of the page. Reads return the page itself, writes go to the page itself, and the
shadow's own gfn looks like a hole. Watchpoints use the same views. There are three views, and a
fourth once memory is watched or patched::

    view  | a page with breakpoints         | a shadow's own gfn      | a page with watchpoints
    ------|---------------------------------|-------------------------|------------------------
    hooks | its shadow, execute-only        | the sink: reads as ones | watched accesses trap
    step  | itself, not writable            | the sink                | watched accesses trap
    write | itself                          | the sink                | watched accesses trap
    used  | itself, as its one vCPU needs,  | the sink                | as its one vCPU needs
          | or a copy with patches          |                         |

The vCPUs run in ``hooks``. A vCPU that hits an int3, or reads a page with breakpoints, executes
that one instruction in ``step``; a vCPU that writes to such a page executes the instruction in
``write``. An instruction that accesses watched memory is executed in ``used``. There, a page is
opened when the instruction first violates its rights, so that every page it accesses is reported.
One vCPU at a time is in ``used``; others that access watched pages meanwhile retry. No other vCPU
sees any of this, and none is stopped, except for a moment when shadows are added and when ``used``
is created.

A shadow is *stale* after a write to its page: until it is copied again it may not be executed, so
that the next fetch from it traps. Writes that move the boundaries of instructions are found then:
int3 is put where an instruction begins only while the bytes before it, as many as an instruction
may have, are unchanged since the breakpoint was inserted. If they have changed, every fetch from
the page traps. Bytes in the preceding page, by the page tables of a vCPU, count as well: that page
is executed as it is, and is not writable in ``hooks`` and ``step``.

A *patch* is other code in a shadow, which is executed at full speed. An instruction of a patch that
cannot be executed there, because it accesses a page with breakpoints or patches, or has a
breakpoint, is stepped in ``used``. For that, ``used`` maps a *copy* of its page, in which only the
bytes of this instruction are patched, so that the instruction reads all others unpatched. What it
writes to the copy is written to the page when the step ends.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from xenaltp2m.abi.x86 import CR0_PG
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.handles.altp2m import Altp2m
from xenaltp2m.handles.base import Handle, UndoList, check_callback
from xenaltp2m.handles.memory import AddressSpace, Memory
from xenaltp2m.handles.monitor import Monitor
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.handles.view import View
from xenaltp2m.handles.view_resets import ViewReset
from xenaltp2m.tools.breakpoints.addressing import physical_place
from xenaltp2m.tools.breakpoints.hooks import (
    Breakpoint,
    Callback,
    Patch,
    VirtualBreakpoint,
    Watchpoint,
    WatchpointCallback,
)
from xenaltp2m.tools.breakpoints.pages import BEFORE, INT3
from xenaltp2m.tools.breakpoints.patching import pieces_of
from xenaltp2m.tools.breakpoints.repetitions import Repetitions
from xenaltp2m.tools.breakpoints.session import Session
from xenaltp2m.types import PAGE_SIZE, Gfn
from xenaltp2m.values.arguments import check_bytes, check_number
from xenaltp2m.values.events import Event
from xenaltp2m.values.gfns import check_gfn
from xenaltp2m.values.responses import Response

if TYPE_CHECKING:
    from xenaltp2m.tools.symbols import Symbol, Symbols


class Breakpoints(Handle):
    """A domain's breakpoints, in views of their own, which its vCPUs are moved to.

    It answers the events that they cause: pass it to :meth:`Monitor.run`, or call it with each
    event. It also answers these events by default, if nothing else does. Closing it removes all
    breakpoints, moves the vCPUs out of its views, destroys the views and frees the shadows.

    Attributes:
        memory: The guest's memory.
    """

    @uninterruptible
    def __init__(
        self, altp2m: Altp2m, monitor: Monitor, *, fast: bool = True, int3: bool = True
    ) -> None:
        """Create the views and move the vCPUs into them.

        Args:
            altp2m: The domain's views.
            monitor: The domain's monitor; :class:`MemAccess` and :class:`SoftwareBreakpoint` are
                enabled if they are not.
            fast: Whether instructions are stepped over by Xen's fast single-step; else by a
                single-step whose end is reported, too.
            int3: Whether int3 is put into a shadow; else every fetch from the page traps, without a
                shadow: slow if the page is executed often, but it leaves no trace.

        Raises:
            InvalidArgumentError: No view is left.
        """
        super().__init__()
        self._altp2m, self._context = altp2m, altp2m.context
        self.memory = Memory(self._context)
        self._virtual: list[VirtualBreakpoint] = []
        self._repetitions = Repetitions()
        self._session = Session(altp2m, monitor, self._repetitions, fast=fast, int3=int3)
        self._open()
        monitor.add_default_handler(self)
        monitor.close_first(self)
        altp2m.on_view_reset(self._found_reset)
        self._context.register_for_migration(self)

    def _open(self, before: Session | None = None) -> None:
        """Open the session, with the state of an earlier one; undo everything if that fails."""
        try:
            self._session.open(before)
        except BaseException as error:
            undo = UndoList()
            undo.push("", self._take_back)
            undo.roll_back(error, self._context.undo, unless=self._gone)
            super().abandon()
            raise

    def __repr__(self) -> str:
        return f"<Breakpoints of domain {int(self._context.domid)}>"

    def __len__(self) -> int:
        pages = self._session.guarded.pages.values()
        return sum(len(hooks) for page in pages for hooks in page.hooks.values())

    @property
    def hooks(self) -> View:
        """The view that vCPUs are in."""
        return self._session.views.hooks

    # Inserting and removing.

    @uninterruptible
    def insert(
        self,
        address: int | str | Symbol,
        callback: Callback,
        *,
        symbols: Symbols | None = None,
        trust: bool = False,
        each_iteration: bool = False,
    ) -> Breakpoint:
        """Insert a breakpoint: call a function before each execution of an instruction.

        This works while the guest runs, and in a callback. An address can have several breakpoints;
        their callbacks are called in the order of insertion.

        Args:
            address: Address of the instruction's first byte: a guest-physical address, which is
                used unchecked; or, with ``symbols``, a name in the syntax of
                :meth:`Symbols.address`; or a symbol.
            callback: Called with a :class:`Hit`. An exception that it raises is raised by the
                monitor's loop, after the vCPU has been answered.
            symbols: Resolves names. The symbols are compared with the guest's memory. Data is
                refused, and so is a place inside an instruction, if the function's code shows it.
            trust: Whether to skip these checks.
            each_iteration: Whether each iteration of a repeated string instruction (REP MOVS) is a
                hit; by default all iterations together are one, even if an interrupt comes between.

        Raises:
            InvalidArgumentError: The address is not in memory, or inside an instruction; or an
                argument is invalid.
            NotMappedError: The address is not in ordinary RAM, or no page tables map it yet: then
                use :meth:`insert_va`, which waits for the mapping.
            SymbolError: The name is unknown, or the symbols do not match the guest.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self.check_open()
        check_callback(callback)
        address = physical_place(self._context, address, symbols, trust=trust)(0)
        gfn, offset = divmod(address, PAGE_SIZE)
        check_gfn(gfn)
        self._session.shadows.check_not_one(gfn)
        self._session.patching.check_breakpoint(address)
        guarded = self._session.guarded
        page = guarded.pages.get(gfn) or guarded.take(gfn)
        made = Breakpoint(self, address, callback, each_iteration)
        if not page.add(offset, made):
            return made
        if offset < BEFORE and page.shadow_gfn:
            undo = UndoList()
            undo.push("", made.remove)
            with undo.rolling_back(heir=self._session.undo, unless=self._gone):
                guarded.invalidate_shadow(gfn)  # the next fetch shows which page comes before
                guarded.note_ends(gfn, offset)
        elif page.armed:
            page.shadow[offset] = INT3
        return made

    @uninterruptible
    def patch(
        self,
        address: int | str | Symbol,
        code: bytes | bytearray | memoryview,
        *,
        symbols: Symbols | None = None,
        trust: bool = False,
    ) -> Patch:
        """Patch code: the guest executes other bytes than it reads.

        This works while the guest runs, and in a callback. A vCPU in the middle of the replaced
        code continues there, in the new bytes.

        Args:
            address: Address of the first byte, as for :meth:`insert`. Beyond the end of its page,
                the patch continues where the page tables lead, or in the next gfn if the address
                is a number.
            code: The bytes to execute, as long as those they replace: 1 to 4096 bytes. Relative
                jumps and addresses in them are relative to this address.
            symbols: As for :meth:`insert`.
            trust: As for :meth:`insert`.

        Raises:
            InvalidArgumentError: The patch overlaps another one, or a breakpoint that is not at its
                first byte; or no view is left; or as for :meth:`insert`.
            NotMappedError: As for :meth:`insert`.
            SymbolError: As for :meth:`insert`.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self.check_open()
        check_bytes("code", code)
        check_number("the length of code", memoryview(code).nbytes, 1, PAGE_SIZE)
        to_physical = physical_place(self._context, address, symbols, trust=trust)
        made = Patch(self, pieces_of(bytes(code), to_physical))
        self._session.patching.check_free(made)
        if self._session.views.used is None:
            self._session.create_used_view()
        self._session.patching.put_in(made)
        return made

    @uninterruptible
    def insert_va(
        self,
        space: AddressSpace,
        address: int,
        callback: Callback,
        *,
        each_iteration: bool = False,
    ) -> VirtualBreakpoint:
        """Insert a breakpoint at a virtual address, which need not be mapped yet.

        The page-table entries that map the address are watched. Once they lead to memory, a
        breakpoint is inserted there; if they change, it moves. If another vCPU maps the page, an
        execution in the moment after that may be missed.

        Args:
            space: The result of :meth:`Memory.address_space`, for a guest with paging on. The
                tables must stay page tables: remove the breakpoint when the process ends.
            address: The virtual address.
            callback: As for :meth:`insert`.
            each_iteration: As for :meth:`insert`.

        Raises:
            InvalidArgumentError: The guest has paging off, or the address is invalid.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self.check_open()
        check_callback(callback)
        if not space.paging.cr0 & CR0_PG:
            raise InvalidArgumentError("paging is off there: virtual addresses are physical")
        space.check(address)
        made = VirtualBreakpoint(self, space, address, callback, each_iteration)
        undo = UndoList()
        undo.push("", made.remove)
        with undo.rolling_back(heir=self._session.undo, unless=self._gone):
            made.follow()
        self._virtual.append(made)
        return made

    def watch(
        self,
        address: int,
        length: int,
        before: WatchpointCallback | None = None,
        *,
        after: WatchpointCallback | None = None,
        reads: bool = False,
        each_iteration: bool = False,
    ) -> Watchpoint:
        """Insert a watchpoint: call a function when the guest writes to, or reads, some bytes.

        Each execution of an instruction is reported once, however often and wherever it accesses
        the bytes. Other accesses to their pages are slowed down but not reported;
        ``Watchpoint.passed`` counts them. Instruction fetches are not reported: use breakpoints
        for these.

        Args:
            address: The guest-physical address.
            length: The number of bytes.
            before: Called with a :class:`WatchpointHit` before the instruction executes; otherwise
                as the callback of :meth:`insert`. If a write can be found only by comparing memory
                after the instruction, ``after`` is called, or ``before`` if there is no ``after``,
                with ``WatchpointHit.executed`` set.
            after: Called in the same way after the instruction has executed.
            reads: Whether reads are reported, too.
            each_iteration: Whether each iteration of a repeated string instruction (REP MOVS) is a
                hit. By default all iterations together are one: ``before`` is called before the
                first that accesses the bytes, ``after`` after the last.

        Raises:
            InvalidArgumentError: The range is empty, or not in memory.
            NotMappedError: The range is not in ordinary RAM.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self.check_open()
        if length <= 0:
            raise InvalidArgumentError(f"{length} bytes cannot be watched")
        made = Watchpoint(self, address, length, reads, before, after, each_iteration)
        self.memory.check(address, length)
        for gfn in made.gfns:
            self._session.shadows.check_not_one(gfn)
        if self._session.views.used is None:
            self._session.create_used_view()
        undo = UndoList()
        with undo.rolling_back(heir=self._session.undo, unless=self._gone):
            undo.push("", partial(self._session.watching.discard, made))
            self._session.watching.add(made)
        return made

    @uninterruptible
    def remove(self, unwanted: Breakpoint | Patch | Watchpoint) -> None:
        """Remove a breakpoint, a patch or a watchpoint; calling it again is harmless."""
        self.check_open()
        if isinstance(unwanted, Patch):
            if self.holds(unwanted):
                self._session.patching.take_out(unwanted)
        elif isinstance(unwanted, Watchpoint):
            undo = UndoList()
            undo.push("", partial(self._session.watching.discard, unwanted))
            undo.unwind(f"removing {unwanted!r}")
            self._session.watching.count_afters()
        elif self.holds(unwanted):
            self._remove_breakpoint(unwanted)

    def _remove_breakpoint(self, unwanted: Breakpoint) -> None:
        gfn, offset = divmod(unwanted.address, PAGE_SIZE)
        page = self._session.guarded.pages[gfn]
        if not page.discard(offset, unwanted):
            return
        if not page.hooks and not page.patches:
            self._session.patching.release_unpatched(gfn)
            return
        if page.armed:
            page.shadow[offset] = page.executed(offset, offset + 1)[0]
        for lead in page.leads.values():
            lead.ends.pop(offset, None)
        if not any(at < BEFORE for at in page.hooks):
            self._session.guarded.drop_leads(gfn)

    def holds(self, one: Breakpoint | Patch | Watchpoint) -> bool:
        """Return whether a breakpoint, a patch or a watchpoint is inserted."""
        if isinstance(one, Watchpoint):
            return one in self._session.guarded.watched.get(one.gfns[0], ())
        if isinstance(one, Patch):
            return one in self._session.patching.patches and not self.closed
        gfn, offset = divmod(one.address, PAGE_SIZE)
        page = self._session.guarded.pages.get(gfn)
        return page is not None and one in page.hooks.get(offset, ())

    def forget_virtual(self, one: VirtualBreakpoint) -> None:
        """Stop following a removed breakpoint's page tables; calling it again is harmless."""
        with suppress(ValueError):  # it was never followed, or is removed again
            self._virtual.remove(one)

    # Views that Xen resets.

    def verify(self) -> list[Gfn]:
        """Compare the views with Xen's, and restore what Xen has reset.

        Xen resets a view, or an entry of it, when the host p2m changes there. It does not report
        this, and the breakpoints there are not hit any more.

        Returns:
            The gfns of pages that had lost their breakpoints; empty if all is well.

        Raises:
            NotMappedError: A page with breakpoints is gone: remove them.
        """
        self.check_open()
        is_on = self._context.backend.altp2m_get_domain_state(int(self._context.domid))
        lost = self._session.guarded.lost(altp2m_is_on=is_on)
        if lost or not (is_on and self._session.shadows.are_hidden()):
            for one in self._altp2m.verify(self._session.views.every):
                if one.failure is not None:
                    raise one.failure
        return [Gfn(gfn) for gfn in lost]

    @uninterruptible
    def _found_reset(self, reset: ViewReset) -> None:
        """Refresh all shadows: writes were missed, and frames may have changed."""
        self._session.views.renumber()
        # A view that was partly restored has mismatches; one that went with altp2m has none.
        in_part = reset.failure is not None and bool(reset.mismatches)
        if reset.view is not self._session.views.hooks or not (reset.reapplied or in_part):
            return
        self._session.mapped.forget()
        failures = self._session.guarded.map_again()
        if reset.failure is None:
            self._follow_all()
            if failures:
                raise failures[0]

    def _follow_all(self) -> None:
        """Follow page tables, because writes to them may have been missed."""
        for one in self._virtual:
            one.follow()

    # Answering.

    def __call__(self, event: Event) -> Response | None:
        """Answer an event caused by a breakpoint or its page; return None for any other."""
        if self.closed or self._session.views.hooks.closed:
            return self._session.answering.answer_late(event)
        return self._session.answering.answer(event, self._back)

    def _back(self) -> Response | None:
        """Return the response that resumes a vCPU in ``hooks``; None once this is closed."""
        return None if self.closed else self._session.views.back

    # Closing.

    def _take_back(self) -> None:
        self._session.close(repr(self))

    @uninterruptible
    def detach(self, later: UndoList) -> None:
        """Undo everything before a migration; :meth:`reattach` restores it.

        Args:
            later: Receives the step that frees the shadows, once all views are gone.
        """
        self._session.detach(repr(self), later)
        super().abandon()

    @uninterruptible
    def reattach(self) -> None:
        """Create the views and shadows again after a migration."""
        self._reopen()  # first: a closed handle is no longer registered for migration
        before = self._session
        self._session = before.anew()
        self._open(before)
        self._follow_all()

    @uninterruptible
    def abandon(self) -> None:
        """Close after the domain's end: free only this process's own resources."""
        self._session.abandon()
        self._altp2m.remove_listener(self._found_reset)
        super().abandon()

    def _orphaned(self) -> bool:
        return self._context.is_gone()
