# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stealth breakpoints: a guest's code stops where somebody wants to know, and cannot tell.

A page with breakpoints is executed from a *shadow*, a copy with int3 in it, that one view shows
instead of the page. Whoever reads sees the page itself, what is written lands in the page itself,
and the shadow's own gfn looks as if nothing were there. Memory can be watched, too, in the same
views. There are three, and one more where memory is watched or patched::

    view  | a page with breakpoints         | a shadow's own gfn      | a page with watches
    ------|---------------------------------|-------------------------|------------------------
    hooks | its shadow, to be executed only | the sink: reads as ones | not to be used unheard
    step  | itself, not to be written       | the sink                | not to be used unheard
    write | itself                          | the sink                | not to be used unheard
    used  | itself, as its one vCPU needs,  | the sink                | as its one vCPU needs
          | or a copy with patches          |                         |

The vCPUs are in ``hooks``. One that comes upon an int3, or reads a page with breakpoints, executes
that one instruction in ``step``; one that writes to such a page executes it in ``write``. One that
uses what is watched executes the instruction in ``used``, where each page is opened when the
instruction first violates its rights, so that every page it uses is reported. One vCPU at a time
is in ``used``; others that come to watched pages meanwhile try again. No other vCPU sees any of
this, and none is stopped; but for a moment where shadows are added, and where the first watch is.

A shadow whose page was written to is *stale*: until it is copied anew it may not be executed, so
that the next vCPU that wants to tells. Writes that move the bounds of instructions are noticed
then: int3 is put where an instruction begins only while the bytes before it, as many as an
instruction may have, are those that stood there at first. Where they are not, every fetch from the
page is looked at. Bytes in the page before, by the page tables of a vCPU, count as well: that page
is executed as it is, and may not be written to in ``hooks`` and ``step``.

A *patch* is other code in a shadow, which is executed at full speed. An instruction of a patch that
cannot be executed there, because it uses a page with breakpoints or patches, or has a breakpoint,
is stepped in ``used``. For that ``used`` shows a *copy* of its page, in which the bytes of just
this instruction are patched, so that it reads all others as they are. What it writes into the copy
is written to the page when the step ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.abi.x86 import CR0_PG, GP, Repeated, repeated
from xenaltp2m.arguments import check_bytes, check_number
from xenaltp2m.errors import AlreadyError, InvalidArgumentError, NotMappedError, XenError
from xenaltp2m.events import (
    Event,
    MemAccess,
    Registers,
    Singlestep,
    SoftwareBreakpoint,
    TrapType,
)
from xenaltp2m.executions import Execution
from xenaltp2m.handle import Handle, UndoList, check_callback
from xenaltp2m.hooks import (
    Breakpoint,
    Callback,
    Hit,
    LinearBreakpoint,
    Patch,
    Touch,
    TouchCallback,
    Watch,
)
from xenaltp2m.instructions import LONGEST_ACCESS, LONGEST_INSTRUCTION, length
from xenaltp2m.memory import MappedPages
from xenaltp2m.patches import Copy, Patched
from xenaltp2m.placement import check_placement
from xenaltp2m.repetitions import Repetitions
from xenaltp2m.responses import REINJECT, RESUME, STEP, Response
from xenaltp2m.shadows import Shadows
from xenaltp2m.signals import uninterruptible
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE, Access, Gfn
from xenaltp2m.view import check_gfn

if TYPE_CHECKING:
    from xenaltp2m.altp2m import Altp2m, Lost
    from xenaltp2m.memory import AddressSpace
    from xenaltp2m.monitor import Monitor
    from xenaltp2m.symbols import Symbol, Symbols
    from xenaltp2m.view import View

_LOG = logging.getLogger(__name__)
_INT3 = 0xCC
_BEFORE = 14
"""Bytes before an address from which on an instruction may reach behind it."""
_MOST_LEADS = 8
"""Pages that come before one: a guest that maps it after more of them is stepped there."""
_REPEATS = frozenset(b"\xf2\xf3\x66\x67\x26\x2e\x36\x3e\x64\x65")
"""What a repeated string instruction begins with: REP, sizes, segments."""
_OFFSET = PAGE_SIZE - 1
_W, _X = AccessFlag.W, AccessFlag.X
_MOST_REPEATING = 64
_MOST_REFUSALS, _MOST_PASSED_OVER = 1000, 16
"""Attempts to use watched memory, all while one vCPU does not finish its step: then the next is
let in beside it. What both do to one page may be told of one only, but no guest stands still."""
_READ_ONES, _WRITE_NOWHERE = (
    Response.emulate(read_data=b"\xff" * 64),
    Response.emulate(write=False),
)


def _nothing_to_do() -> None: ...


class _Mapped:
    """A page of the guest's, mapped to read."""

    __slots__ = ("_unmap", "memory")

    def __init__(self, memory: memoryview, unmap: Callable[[], None]) -> None:
        self.memory, self._unmap = memory, unmap

    def unmap(self) -> None:
        """Let go of it; again is harmless."""
        self._unmap()
        self._unmap = _nothing_to_do

    def map_again(self, memory: memoryview, unmap: Callable[[], None]) -> None:
        """Have another mapping of it instead: another frame may be there now."""
        self.unmap()
        self.memory, self._unmap = memory, unmap


class _Page(_Mapped, Patched):
    """A page with breakpoints or patches."""

    __slots__ = (
        "before", "copy", "guess", "hooks", "inside", "leads", "patches", "planted", "shadow",
        "shadow_gfn",
    )  # fmt: skip

    def __init__(
        self, memory: memoryview, shadow_gfn: int, shadow: memoryview, unmap: Callable[[], None]
    ) -> None:
        super().__init__(memory, unmap)
        self.shadow_gfn = shadow_gfn
        self.shadow = shadow
        self.planted = False
        """Whether the shadow is what it should be, and may be executed."""
        self.hooks: dict[int, list[Breakpoint]] = {}
        """By offset."""
        self.before: dict[int, bytes] = {}
        """What stood before each at first, in this page."""
        self.leads: dict[int, _Lead] = {}
        """By gfn: the pages before this one, of breakpoints at its start."""
        self.guess: int | None = None
        """That of them which is only taken for one, until a vCPU's page tables are seen."""
        self.inside: set[int] = set()
        """Offsets that were seen to be inside an instruction."""
        self.patches: dict[int, bytes] = {}
        """By offset."""
        self.copy: Copy | None = None
        """What ``used`` may show, where there are patches."""

    def can_be_planted(self) -> bool:
        """Whether each breakpoint is where an instruction begins, as far as one can know.

        What is not executed does not count: that has patches in its place.
        """
        return (
            not self.inside
            and all(
                self.executed(_start(at), at) == self.patched(before, _start(at))
                for at, before in self.before.items()
            )
            and all(lead.is_as_it_was() for lead in self.leads.values())
        )

    def fill(self) -> None:
        """Make the shadow what it should be."""
        content = bytearray(self.executed(0, PAGE_SIZE))
        for offset in self.hooks:
            content[offset] = _INT3
        self.shadow[:] = content


class _Lead(_Mapped):
    """The page before one with breakpoints: instructions that begin here may reach into that."""

    __slots__ = ("ends",)

    def __init__(self, memory: memoryview, unmap: Callable[[], None]) -> None:
        super().__init__(memory, unmap)
        self.ends: dict[int, bytes] = {}
        """What stood at its end at first, by the offset of a breakpoint in the page after it."""

    def note(self, offset: int) -> None:
        """Remember as many bytes as an instruction there may have that reaches a breakpoint."""
        self.ends.setdefault(offset, bytes(self.memory[offset - _BEFORE :]))

    def is_as_it_was(self) -> bool:
        """Whether nobody has changed these since."""
        return all(self.memory[at - _BEFORE :] == end for at, end in self.ends.items())


_Instruction: TypeAlias = Mapping[int, Sequence[range]]
"""Which bytes, by gfn, an instruction has in pages with patches; empty where none is patched."""


def _start(offset: int) -> int:
    return max(offset - _BEFORE, 0)


class Breakpoints(Handle):
    """A domain's breakpoints, in views of their own, which its vCPUs are moved to.

    It answers the events that come of them: give it to :meth:`Monitor.run`, or call it with each
    event; what nobody answers is answered by it, too. Closing it removes all of them, moves the
    vCPUs out of its views, destroys these and takes the shadows back.

    Attributes:
        hooks: The view that vCPUs are in.
    """

    @uninterruptible
    def __init__(
        self, altp2m: Altp2m, monitor: Monitor, *, fast: bool = True, int3: bool = True
    ) -> None:
        """Make the views and move the vCPUs.

        Args:
            altp2m: The domain's views.
            monitor: Hears, or will hear, of :class:`MemAccess` and :class:`SoftwareBreakpoint`.
            fast: Whether instructions are stepped over by Xen's fast single-step; else by a
                single-step that is heard of, too.
            int3: Whether int3 is put into a shadow; else every fetch from the page is looked at,
                without a shadow: slow where the page is executed much, and without a trace.

        Raises:
            InvalidArgumentError: No view is left.
        """
        self._altp2m, self._monitor = altp2m, monitor
        self._domain = altp2m.domain
        self._backend = self._domain.xen.backend
        self._fast, self._int3 = fast, int3
        self._pages: dict[int, _Page] = {}
        self._watched: dict[int, list[Watch]] = {}
        """By gfn."""
        self._leads: dict[int, set[int]] = {}
        """By gfn: after which pages with breakpoints it comes before, by their gfns."""
        self._linear: list[LinearBreakpoint] = []
        self._patches: list[Patch] = []
        self._repetitions = Repetitions()
        self._set_up()
        # This one answers what those had waiting that are closed.
        monitor._answerers = [
            one for one in monitor._answerers if not (isinstance(one, Breakpoints) and one.closed)
        ]
        monitor.answer_by_default(self)
        monitor._close_first(self)
        altp2m.on_lost(self._found_lost)
        self._domain._carry_along(self)

    def _set_up(self) -> None:
        """Have the views, and the vCPUs in them; with all that there was, where there was some."""
        super().__init__()
        self._domid = int(self._domain.domid)
        self._mapped = MappedPages(self._domain)
        self._told: set[int] = set()
        """vCPUs whose step ends with an event."""
        self._afters = 0
        """How many watches have ``after``."""
        self._executions: dict[int, Execution] = {}
        """Of vCPUs in ``used``."""
        self._repeating: list[Execution] = []
        """Between two iterations of a string instruction that uses watched memory."""
        self._holder: int | None = None
        """The vCPU that may be in ``used``."""
        self._refusals = self._passed_over = 0
        self._refused: dict[int, None] = {}
        """The vCPUs that wait for it, in their order: else one that never rests kept others out."""
        self._opened: dict[int, Access] = {}
        """What ``used`` allows for some pages, beyond ``step``."""
        self._writers: dict[int, Collection[int]] = {}
        """The gfns that each vCPU may be writing to, as far as is known."""
        self._views: list[View] = []
        self._ids: set[int] = set()
        self._used_view: View | None = None
        """``used``, once something is watched or patched."""
        self._shown: set[int] = set()
        """The gfns of which ``used`` shows a copy."""
        self._patched_steps: dict[int, _Instruction] = {}
        """What vCPUs in ``used`` execute of patches."""
        self._responses: dict[tuple[View, bool], Response] = {}
        self._added = UndoList()
        """What the shadows are."""
        self._shadows = Shadows(self._domain, self._views, self._added)
        self._heard: list[type[Event]] = []
        """What was not heard of before, and will not be after."""
        pages, self._pages = self._pages, {}
        self._leads = {}
        try:
            for kind in (MemAccess, SoftwareBreakpoint):
                with suppress(AlreadyError):
                    self._monitor.enable(kind)
                    self._heard.append(kind)
            for label in ("hooks", "step", "write"):
                self._create_view(label)
            self.hooks, self._step_view, self._write_view = self._views
            self._back = RESUME.in_view(self.hooks)
            for gfn, before in pages.items():
                page = self._take(gfn)
                page.hooks, page.before, page.inside = before.hooks, before.before, before.inside
                page.guess, page.patches = before.guess, before.patches
                if page.patches:
                    page.copy = Copy(*self._shadows.take())
                for gfn_before, lead in before.leads.items():
                    self._lead(gfn, gfn_before).ends = lead.ends
            if self._watched or self._patches:
                self._create_used_view()
                self._set_rights(self._watched)
                self._count_afters()
            self._altp2m.switch_to_view(self.hooks)
        except BaseException as error:
            undo = UndoList()
            undo.push("", self._mapped.close)
            undo.push("", self._take_back)
            self._roll_back(undo, error, heir=self._domain._undo)
            super().abandon()
            raise

    def _through(
        self, view: View, event: Event, *, tell: bool = False, plain: bool = False
    ) -> Response:
        """Have an instruction executed in a view.

        From its first step on it is one that is told of, or none: Xen tells of no step once it has
        begun a fast one.

        Args:
            view: The view.
            event: The instruction is about to be executed.
            tell: Whether the end of the step is to be told of in any case.
            plain: Whether it need not be told of, though memory is watched.
        """
        told = False
        if self._told or self._watched or not self._fast or tell:
            vcpu = int(event.vcpu)
            if event.view == self.hooks.id:
                self._repetitions.forget(vcpu)
                self._executions.pop(vcpu, None)
                self._told.discard(vcpu)
                if tell or not self._fast or (self._watched and not plain):
                    self._told.add(vcpu)
            told = vcpu in self._told
        found = self._responses.get((view, told))
        if found is None:
            found = STEP.in_view(view)
            if not told:
                found = Response.fast_singlestep(through=view, back_to=self.hooks)
            self._responses[view, told] = found
        return found

    def _again(self, event: Event) -> Response:
        """Have an instruction come again where it was, for it may have been a hit already."""
        view = next((view for view in self._views if view.id == event.view), self.hooks)
        return self._back if view is self.hooks else self._through(view, event)

    def _create_view(self, label: str) -> View:
        view = self._altp2m.create_view(label=label)
        self._views.append(view)
        self._ids.add(int(view.id))
        return view

    @uninterruptible
    def _create_used_view(self) -> None:
        """Have ``used``, with the pages that there are."""
        undo = UndoList()
        try:
            with self._domain.paused():
                view = self._create_view("used")
                undo.push("", partial(self._destroy_view, view))
                self._shadows.hide_all(view)
                self._used_view = view
                self._set_rights(self._pages.keys() | self._leads.keys())
        except BaseException as error:
            self._used_view = None
            self._roll_back(undo, error, heir=self._undo)
            raise

    def _destroy_view(self, view: View) -> None:
        view.close()
        with suppress(ValueError):
            self._views.remove(view)
        self._ids.discard(int(view.id))

    def __repr__(self) -> str:
        return f"<Breakpoints of domain {self._domid}>"

    def __len__(self) -> int:
        return sum(len(hooks) for page in self._pages.values() for hooks in page.hooks.values())

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
        """Have something called before each execution of an instruction.

        It may be done while the guest runs, and in a callback. There may be several at an address;
        they are called in the order they were inserted.

        Args:
            address: Of the first byte of the instruction: a guest-physical address, which is
                taken at its word; or, with ``symbols``, a name as :meth:`Symbols.address` takes
                it; or a symbol.
            callback: Called with a :class:`Hit`. What it raises is raised where the monitor runs,
                once the vCPU was answered.
            symbols: Where names are. They are compared with the guest's memory; data is refused,
                and a place inside an instruction, as far as the function's code tells.
            trust: Whether to do without these checks.
            each_iteration: Whether each iteration of a repeated string instruction (REP MOVS) is a
                hit; by default all together are one, also where an interrupt comes in between.

        Raises:
            InvalidArgumentError: The address is not in memory, or inside an instruction; or an
                argument is none.
            NotMappedError: It is not in ordinary RAM, or no page tables lead there yet: then
                :meth:`insert_linear` waits for it.
            SymbolError: The name is not known, or the symbols are of something else.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self._check_open()
        check_callback(callback)
        address = self._physical(address, symbols, trust=trust)(0)
        gfn, offset = divmod(address, PAGE_SIZE)
        check_gfn(gfn)
        self._check_not_shadow(gfn)
        for patch in self._patches:
            if patch.overlaps(address, 1) and patch.address != address:
                raise InvalidArgumentError(
                    f"a breakpoint at {address:#x} would be inside {patch!r}",
                    gfn=gfn,
                    hint=("a breakpoint may be at the first byte of a patch",),
                )
        page = self._pages.get(gfn) or self._take(gfn)
        made = Breakpoint(self, address, callback, each_iteration)
        if offset in page.hooks:
            page.hooks[offset].append(made)
            return made
        page.hooks[offset] = [made]
        page.before[offset] = bytes(page.memory[_start(offset) : offset])
        if offset < _BEFORE and page.shadow_gfn:
            undo = UndoList()
            undo.push("", made.remove)
            try:
                self._outdate(gfn)  # the next fetch tells which page comes before
                self._note_ends(gfn, page, offset)
            except BaseException as error:
                self._roll_back(undo, error, heir=self._undo)
                raise
        elif page.planted:
            page.shadow[offset] = _INT3
        return made

    def _physical(
        self, place: int | str | Symbol, symbols: Symbols | None, *, trust: bool
    ) -> Callable[[int], int]:
        """Find where something is, by the page tables in use now if it has a name.

        Returns:
            The guest-physical address of the byte so many bytes after its first.
        """
        if isinstance(place, int):
            check_number("address", place)
            return place.__add__
        from xenaltp2m import fingerprint  # not before: it needs pyelftools
        from xenaltp2m.symbols import Image, Symbol

        if isinstance(place, Symbol):
            linear = place.address + (symbols.slide if symbols is not None else 0)
            place = f"{place.address:#x}"
        elif not isinstance(place, str):
            raise InvalidArgumentError(
                f"an address is a number, a Symbol, or with symbols= a name; not {place!r}"
            )
        elif symbols is None:
            raise InvalidArgumentError(
                f"{place!r} is a name, and nothing tells its address",
                hint=("give symbols=Symbols.open(FILE), too",),
            )
        else:
            linear = symbols.address(place)
        registers = self._domain.registers()
        to_physical: Callable[[int], int] = int
        if registers.cr0 & CR0_PG:
            space = self._domain.memory.kernel_space(registers)

            def to_physical(address: int) -> int:
                return space.translate(address).physical

        elif isinstance(symbols, Image):
            to_physical = symbols.physical_of
        to_physical(linear)  # raises where nothing is mapped
        if symbols is not None and not trust:
            fingerprint.check(self._domain, symbols, [place], registers)
            read = fingerprint.reader(self._domain, symbols, registers)
            check_placement(symbols, linear, read, registers.word_size)
        return lambda offset: to_physical(linear + offset)

    def _note_ends(self, gfn: int, page: _Page, offset: int) -> None:
        """Remember what comes before a breakpoint in the page before its own."""
        if not page.leads and gfn:
            with suppress(InvalidArgumentError, NotMappedError):  # a hole is not executed
                self._lead(gfn, gfn - 1)
                page.guess = gfn - 1
        for lead in page.leads.values():
            lead.note(offset)

    @uninterruptible
    def _lead(self, gfn: int, before: int) -> _Lead:
        """Have writes noticed to the page that comes before one with breakpoints."""
        page = self._pages[gfn]
        memory, unmap = self._map(before)
        lead = page.leads[before] = _Lead(memory, unmap)
        self._leads.setdefault(before, set()).add(gfn)
        try:
            self._set_rights([before])
        except BaseException as error:
            undo = UndoList()
            undo.push("", partial(self._lead_no_more, gfn, before))
            self._roll_back(undo, error, heir=self._undo)
            raise
        return lead

    @uninterruptible
    def _lead_no_more(self, gfn: int, before: int) -> None:
        """Have them noticed no more."""
        lead = self._pages[gfn].leads.pop(before)
        undo = UndoList()
        undo.push(f"mapping of gfn {before:#x} of domain {self._domid}", lead.unmap)
        self._leads[before].remove(gfn)
        if not self._leads[before]:
            del self._leads[before]
        undo.push("", partial(self._set_rights, [before]))
        undo.unwind(f"removing the breakpoints of gfn {gfn:#x}")

    @uninterruptible
    def patch(
        self,
        address: int | str | Symbol,
        code: bytes | bytearray | memoryview,
        *,
        symbols: Symbols | None = None,
        trust: bool = False,
    ) -> Patch:
        """Have other code executed than the guest reads.

        It may be done while the guest runs, and in a callback. A vCPU that is in the middle of what
        is replaced goes on there, in the new bytes.

        Args:
            address: Of the first byte, as for :meth:`insert`. Behind the end of its page the patch
                goes on where the page tables lead, or with a number in the next gfn.
            code: What is executed, as long as what it replaces: 1 to 4096 bytes. Its relative jumps
                and addresses are those of code at this address.
            symbols: As for :meth:`insert`.
            trust: As for :meth:`insert`.

        Raises:
            InvalidArgumentError: There is a patch, or a breakpoint, that does not begin where this
                one does; or no view is left; or as for :meth:`insert`.
            NotMappedError: As for :meth:`insert`.
            SymbolError: As for :meth:`insert`.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self._check_open()
        check_bytes("code", code)
        check_number("the length of code", memoryview(code).nbytes, 1, PAGE_SIZE)
        code, to_physical = bytes(code), self._physical(address, symbols, trust=trust)
        pieces: list[tuple[int, bytes]] = []
        while rest := code[sum(len(piece) for _, piece in pieces) :]:
            at = to_physical(len(code) - len(rest))
            pieces.append((at, rest[: PAGE_SIZE - at % PAGE_SIZE]))
        made = Patch(self, pieces)
        self._check_free(made)
        if self._used_view is None:
            self._create_used_view()
        undo = UndoList()
        undo.push("", partial(self._take_out, made))
        self._patches.append(made)
        try:
            for at, _ in pieces:
                page = self._pages.get(at // PAGE_SIZE) or self._take(at // PAGE_SIZE)
                page.copy = page.copy or Copy(*self._shadows.take())
                self._outdate(at // PAGE_SIZE)
            for at, piece in pieces:
                self._pages[at // PAGE_SIZE].patches[at % PAGE_SIZE] = piece
        except BaseException as error:
            self._roll_back(undo, error, heir=self._undo)
            raise
        return made

    def _check_free(self, new: Patch) -> None:
        """Refuse a patch where another one is, or one with a breakpoint inside."""
        for at, code in new.pieces:
            gfn, offset = divmod(at, PAGE_SIZE)
            check_gfn(gfn)
            self._check_not_shadow(gfn)
            for other in self._patches:
                if other.overlaps(at, len(code)):
                    raise InvalidArgumentError(
                        f"{new!r} would overlap {other!r}", gfn=gfn, hint=("remove that first",)
                    )
            hooks = self._pages[gfn].hooks if gfn in self._pages else {}
            for inside in hooks.keys() & set(range(offset, offset + len(code))):
                place = gfn << PAGE_SHIFT | inside
                if place != new.address:
                    raise InvalidArgumentError(
                        f"the breakpoint at {place:#x} would be inside {new!r}",
                        gfn=gfn,
                        hint=("a breakpoint may be at the first byte of a patch",),
                    )

    @uninterruptible
    def _take_out(self, patch: Patch) -> None:
        """Have the guest's own code executed again."""
        places = [divmod(at, PAGE_SIZE) for at, _ in patch.pieces]
        gfns = {gfn for gfn, _ in places} & self._pages.keys()
        for gfn in gfns:
            self._outdate(gfn)
        for gfn, offset in places:
            if gfn in gfns:
                self._pages[gfn].patches.pop(offset, None)
        with suppress(ValueError):
            self._patches.remove(patch)
        undo = UndoList()
        for gfn in gfns:
            undo.push("", partial(self._release_unpatched, gfn))
        undo.unwind(f"removing {patch!r}")

    def _release_unpatched(self, gfn: int) -> None:
        """Let go of what a page has for patches, once it has none."""
        page = self._pages[gfn]
        if page.patches:
            return
        if page.copy is not None:
            if gfn in self._shown:
                self._show_itself(gfn)
            self._shadows.give_back(page.copy.gfn)
            page.copy = None
        if not page.hooks:
            self._release(gfn)

    @uninterruptible
    def insert_linear(
        self,
        space: AddressSpace,
        address: int,
        callback: Callback,
        *,
        each_iteration: bool = False,
    ) -> LinearBreakpoint:
        """As :meth:`insert`, by a linear address, which need not be mapped yet.

        The entries of the page tables that lead there are watched: once they lead to memory there
        is a breakpoint in it, and where they come to lead elsewhere it goes along. A vCPU that
        executes the instruction in the moment after another has mapped it may be missed.

        Args:
            space: What :meth:`Memory.address_space` returned, of a guest with paging on. The
                tables must stay tables: remove the breakpoint when the process ends.
            address: Linear.
            callback: As for :meth:`insert`.
            each_iteration: As for :meth:`insert`.

        Raises:
            InvalidArgumentError: The guest has paging off, or this is no address.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self._check_open()
        check_callback(callback)
        if not space.paging.cr0 & CR0_PG:
            raise InvalidArgumentError("paging is off there: linear addresses are physical")
        space.check(address)
        made = LinearBreakpoint(self, space, address, callback, each_iteration)
        try:
            made._follow()
        except BaseException as error:
            undo = UndoList()
            undo.push("", made.remove)
            self._roll_back(undo, error, heir=self._undo)
            raise
        self._linear.append(made)
        return made

    def watch(
        self,
        address: int,
        length: int,
        before: TouchCallback | None = None,
        *,
        after: TouchCallback | None = None,
        reads: bool = False,
        each_iteration: bool = False,
    ) -> Watch:
        """Have something called when the guest writes to some bytes, or reads them.

        Each execution of an instruction is told once, however often and wherever it uses the bytes.
        What the guest does with the rest of their pages costs it time, and is counted. Fetches are
        not heard of: that is what breakpoints are for.

        Args:
            address: Guest-physical.
            length: Bytes.
            before: Called with a :class:`Touch` before the instruction executes; as the callback
                of :meth:`insert`. Where a write can be found only by comparing memory after the
                instruction, ``after`` is called, or without one ``before``, with
                ``touch.executed``.
            after: The same when it has.
            reads: Whether reads are told, too.
            each_iteration: Whether each iteration of a repeated string instruction (REP MOVS) is a
                touch. By default all together are one: ``before`` is called before the first that
                uses the bytes, ``after`` after the last.

        Raises:
            InvalidArgumentError: The range is empty, or not in memory.
            NotMappedError: It is not in ordinary RAM.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self._check_open()
        if length <= 0:
            raise InvalidArgumentError(f"{length} bytes cannot be watched")
        made = Watch(self, address, length, reads, before, after, each_iteration)
        self._domain.memory.check(address, length)
        for gfn in made.gfns:
            self._check_not_shadow(gfn)
        if self._used_view is None:
            self._create_used_view()
        undo = UndoList()
        try:
            undo.push("", partial(self._unwatch, made))
            for gfn in made.gfns:
                self._watched.setdefault(gfn, []).append(made)
            self._set_rights(made.gfns)
            self._count_afters()
        except BaseException as error:
            self._roll_back(undo, error, heir=self._undo)
            raise
        return made

    def _check_not_shadow(self, gfn: int) -> None:
        if gfn in self._shadows:
            raise InvalidArgumentError(f"gfn {gfn:#x} is a shadow, not the guest's", gfn=gfn)

    @uninterruptible
    def remove(self, unwanted: Breakpoint | Patch | Watch) -> None:
        """Take a breakpoint, a patch or a watch out; one that is out already is passed over."""
        self._check_open()
        if isinstance(unwanted, Patch):
            if self._has_patch(unwanted):
                self._take_out(unwanted)
            return
        if isinstance(unwanted, Watch):
            undo = UndoList()
            undo.push("", partial(self._unwatch, unwanted))
            undo.unwind(f"removing {unwanted!r}")
            self._count_afters()
            return
        if not self._has(unwanted):
            return
        gfn, offset = divmod(unwanted.address, PAGE_SIZE)
        page = self._pages[gfn]
        page.hooks[offset].remove(unwanted)
        if page.hooks[offset]:
            return
        del page.hooks[offset], page.before[offset]
        page.inside.discard(offset)
        if not page.hooks and not page.patches:
            self._release_unpatched(gfn)
            return
        if page.planted:
            page.shadow[offset] = page.executed(offset, offset + 1)[0]
        for lead in page.leads.values():
            lead.ends.pop(offset, None)
        if not any(at < _BEFORE for at in page.hooks):
            self._drop_leads(gfn)

    def verify(self) -> list[Gfn]:
        """Ask Xen whether the views are as they should be, and make them so again.

        Xen resets a view, or an entry of it, when the host p2m changes there; nothing tells of it,
        and a breakpoint is not hit from then on.

        Returns:
            The gfns of pages that had lost theirs; empty where all is well.

        Raises:
            NotMappedError: A page with breakpoints is gone: remove them.
        """
        self._check_open()
        lost: set[int] = set()
        is_on = self._backend.altp2m_get_domain_state(self._domid)
        for gfn in self._pages.keys() | self._watched.keys() | self._leads.keys():
            page = self._pages.get(gfn)
            rights = self._rights(gfn)
            as_it_was = is_on and all(view.effective_access(gfn) == rights[view] for view in rights)
            if as_it_was and page is not None and page.shadow_gfn:
                as_it_was = self._shadows.is_hidden(page.shadow_gfn)
            if as_it_was and page is not None and page.copy is not None:
                as_it_was = self._shadows.is_hidden(page.copy.gfn)
            if not as_it_was:
                has_some = page is not None or gfn in self._watched
                lost |= {gfn} if has_some else self._leads[gfn]
        if lost or not (is_on and self._shadows.are_hidden()):
            for one in self._altp2m.verify(self._views):
                if one.failure is not None:
                    raise one.failure
        return [Gfn(gfn) for gfn in lost]

    @uninterruptible
    def _found_lost(self, lost: Lost) -> None:
        """What was written to the pages meanwhile, nobody has told of; some may be others now."""
        self._ids = {int(view.id) for view in self._views}
        # Of what was made again in part there is some; of what went with altp2m, nothing.
        in_part = lost.failure is not None and bool(lost.mismatches)
        if lost.view is not self.hooks or not (lost.reapplied or in_part):
            return
        failures = []
        self._mapped.forget()
        for gfn, page in self._pages.items():
            try:
                self._outdate(gfn)
                page.map_again(*self._map(gfn))
                for before, lead in page.leads.items():
                    lead.map_again(*self._map(before))
            except XenError as failure:
                failures.append(failure)
        if lost.failure is None:
            self._follow_all()
            if failures:
                raise failures[0]

    def _follow_all(self) -> None:
        """Page tables may have been written to unheard."""
        for linear in self._linear:
            linear._follow()

    def _map(self, gfn: int) -> tuple[memoryview, Callable[[], None]]:
        """Map a page to read, and tell how to unmap it."""
        pages = self._backend.foreignmemory_map(self._domid, False, [gfn])
        return pages[0], partial(self._backend.foreignmemory_unmap, pages)

    @uninterruptible
    def _outdate(self, gfn: int) -> None:
        """Have a page's shadow copied anew before it is executed again."""
        page = self._pages[gfn]
        if page.planted:
            self.hooks.set_access(gfn, Access.N)
            page.planted = False

    def _rights(self, gfn: int) -> dict[View, Access]:
        """Return what may be done with a page in each view; all of it in ``write`` by default."""
        page, watches = self._pages.get(gfn), self._watched.get(gfn, ())
        guarded = gfn in self._leads or (page is not None and page.shadow_gfn)
        hooks = step = Access.RX if guarded else Access.RWX
        write = Access.RWX
        if page is not None:
            hooks = Access.RW
            if page.shadow_gfn:
                hooks = Access.X if page.planted else Access.N
        if watches:
            unheard = Access.X if any(watch.reads for watch in watches) else Access.RX
            hooks, step, write = hooks & unheard, step & unheard, unheard
        rights = {self.hooks: hooks, self._step_view: step}
        if self._used_view is not None:
            rights[self._write_view] = write
            rights[self._used_view] = self._opened.get(gfn, step)
        return rights

    def _set_rights(self, gfns: Collection[int]) -> None:
        """Set what may be done with pages in each view; of many at once."""
        wanted: dict[tuple[View, Access], list[int]] = {}
        for gfn in gfns:
            for right in self._rights(gfn).items():
                wanted.setdefault(right, []).append(gfn)
        for (view, access), some in wanted.items():
            if len(some) == 1:
                view.set_access(some[0], access)
            else:
                view.set_access(gfns if len(some) == len(gfns) else some, access)

    def _count_afters(self) -> None:
        watches = {watch for some in self._watched.values() for watch in some}
        self._afters = sum(watch.after is not None for watch in watches)

    def _unwatch(self, watch: Watch) -> None:
        for gfn in watch.gfns:
            watches = self._watched.get(gfn, [])
            if watch in watches:
                watches.remove(watch)
            if not watches:
                self._watched.pop(gfn, None)
            self._opened.pop(gfn, None)
        self._set_rights(watch.gfns)

    def _watches(self, watch: Watch) -> bool:
        return watch in self._watched.get(watch.gfns[0], ())

    def _has_patch(self, patch: Patch) -> bool:
        return patch in self._patches and not self._closed

    def _has(self, one: Breakpoint) -> bool:
        gfn, offset = divmod(one.address, PAGE_SIZE)
        page = self._pages.get(gfn)
        return page is not None and one in page.hooks.get(offset, ())

    def _take(self, gfn: int) -> _Page:
        """Begin to shadow a page; its shadow is stale, which keeps all order simple."""
        undo = UndoList()
        try:
            memory, unmap = self._map(gfn)
            undo.push(f"mapping of gfn {gfn:#x} of domain {self._domid}", unmap)
            shadow_gfn, shadow = 0, memoryview(b"")
            if self._int3:
                shadow_gfn, shadow = self._shadows.take()
                undo.push("", partial(self._shadows.give_back, shadow_gfn), needs_rest=True)
            undo.push("", partial(self._set_rights, [gfn]), needs_rest=True)
            page = self._pages[gfn] = _Page(memory, shadow_gfn, shadow, unmap)
            undo.push("", partial(self._pages.__delitem__, gfn))
            if self._int3:
                self._shadows.show(self.hooks, gfn, shadow_gfn, undo)
            self._set_rights([gfn])
        except BaseException as error:
            self._roll_back(undo, error, heir=self._undo)
            raise
        return page

    def _drop_leads(self, gfn: int) -> None:
        page = self._pages[gfn]
        page.guess = None
        for before in list(page.leads):
            self._lead_no_more(gfn, before)

    @uninterruptible
    def _release(self, gfn: int) -> None:
        """Show a page itself again."""
        page = self._pages[gfn]
        self._drop_leads(gfn)
        undo = UndoList()
        undo.push("", page.unmap)
        if page.shadow_gfn:
            undo.push("", partial(self._shadows.give_back, page.shadow_gfn), needs_rest=True)
        undo.push("", partial(self._set_rights, [gfn]), needs_rest=True)
        if page.shadow_gfn:
            undo.push("", partial(self._shadows.show_page, self.hooks, gfn))
        del self._pages[gfn]
        undo.unwind(f"removing the breakpoints of gfn {gfn:#x}", heir=self._undo)

    # Answering.

    def __call__(self, event: Event) -> Response | None:
        """Answer an event that a breakpoint, or its page, has caused; None for any other."""
        if self._closed or self.hooks._closed:
            return self._answer_late(event)
        if isinstance(event, SoftwareBreakpoint):
            return self._breakpoint(event)
        if isinstance(event, MemAccess):
            return self._violation(event)
        if isinstance(event, Singlestep):
            return self._stepped(event)
        return None

    def _breakpoint(self, event: SoftwareBreakpoint) -> Response:
        rip, base = event.registers.rip_and_cs_base
        gfn, offset = (event.gfn, rip & _OFFSET) if not base else self._place(event)
        page = self._pages.get(gfn)
        if event.view == self.hooks.id and page is not None and offset in page.hooks:
            if self._writers:
                self._writers.pop(int(event.vcpu), None)
            first = page.executed(offset, offset + 1)[0]
            again = self._repeated(page, offset, event) if first in _REPEATS else None
            # Also the guest's own int3: as often as its delivery leaves guest mode, for Xen to fill
            # a view say, it comes again (hvm_event_needs_reinjection), then in another view.
            over = self._over(event, tell=again is not None)
            if over is None:
                return self._back
            return self._hit(page.hooks[offset], event, over, again)
        if self._is_own(event):
            return REINJECT
        last_gfn, offset = self._last_byte(event)
        page = self._pages.get(last_gfn)
        if event.view == self.hooks.id and page is not None and offset in page.hooks:
            self._found_inside(page, last_gfn, {offset})
            return self._over(event) or self._back
        return RESUME  # it was removed since: the instruction comes again

    def _found_inside(self, page: _Page, gfn: int, offsets: set[int]) -> None:
        """Have no int3 in a page any more: a breakpoint is inside an instruction."""
        for offset in offsets - page.inside:
            page.inside.add(offset)
            _LOG.warning(
                "the breakpoint at %#x is inside an instruction: its page is stepped from now on",
                gfn << PAGE_SHIFT | offset,
            )
        self._outdate(gfn)

    def _last_byte(self, event: SoftwareBreakpoint) -> tuple[int, int]:
        """Return where the byte is that makes an instruction an int3: prefixes may come before.

        Raises:
            XenError: It is in another page than the first byte, and that one is not mapped.
        """
        gfn, offset = self._place(event)
        behind = event.insn_length - 1
        if 0 < behind <= _BEFORE:
            offset += behind
            if offset >= PAGE_SIZE:
                registers = event.registers
                space = self._domain.memory.address_space(registers)
                return divmod(space.translate(registers.linear_rip + behind).physical, PAGE_SIZE)
        return gfn, offset

    def _place(self, event: SoftwareBreakpoint) -> tuple[Gfn, int]:
        """Return the gfn and the offset of an int3."""
        registers, gfn = event.registers, event.gfn
        linear = registers.linear_rip
        if linear != registers.cs_base + registers.rip:
            # Xen adds the base in 64-bit code, too, and does not cut the sum (gfn_of_rip).
            with suppress(XenError):
                space = self._domain.memory.address_space(registers)
                gfn = Gfn(space.translate(linear).physical >> PAGE_SHIFT)
        return gfn, linear & _OFFSET

    def _is_own(self, event: SoftwareBreakpoint) -> bool:
        """Whether the guest has the int3 that it came to."""
        try:
            gfn, offset = self._last_byte(event)
            page = self._pages.get(gfn)
            if page is not None and page.patches:
                return page.executed(offset, offset + 1)[0] == _INT3
            return self._domain.memory.read(gfn << PAGE_SHIFT | offset, 1)[0] == _INT3
        except (InvalidArgumentError, NotMappedError):
            return True  # no such page: then none of ours was there

    def _repeated(self, page: _Page, offset: int, event: Event) -> Repeated | None:
        """Decode a repeated string instruction; None for any other."""
        registers = event.registers
        code = page.executed(offset, min(offset + LONGEST_INSTRUCTION, PAGE_SIZE))
        if _REPEATS.issuperset(code):  # it goes on in the next page
            code = self._code(registers)
        size = registers.word_size
        return repeated(code, size == 8, min(size, 4))

    def _hit(
        self,
        breakpoints: list[Breakpoint],
        event: Event,
        over: Response,
        again: Repeated | None = None,
    ) -> Response:
        """Call all that want to know of an execution."""
        registers: dict[str, int] = {}
        calls = self._hits(breakpoints, event, registers, again)
        patches = list(self._patches)

        def over_now() -> Response:
            if patches == self._patches:
                return over
            return self._over(event, waits=False) or over  # a callback has put one in, or out

        return self._call(calls, breakpoints, registers, event, over_now)

    def _hits(
        self,
        breakpoints: list[Breakpoint],
        event: Event,
        registers: dict[str, int],
        again: Repeated | None = None,
    ) -> list[tuple[Callable[[Any], object], object]]:
        """Count an execution, or an iteration, and list whom to call."""
        calls: list[tuple[Callable[[Any], object], object]] = []
        if again is not None and self._repetitions.goes_on(breakpoints[0].address, again, event):
            breakpoints = [one for one in breakpoints if one.each_iteration]
        for one in breakpoints:
            one.hits += 1
            calls.append((one.callback, Hit(one, event, registers)))
        return calls

    def _call(
        self,
        calls: Sequence[tuple[Callable[[Any], object], object]],
        still: Collection[object],
        registers: dict[str, int],
        event: Event,
        over: Callable[[], Response],
    ) -> Response:
        """Call all that want to know; answer even where that fails.

        Where nobody wants to know ``still``, the instruction comes again.
        """
        failures: list[BaseException] = []
        for call, what in calls:
            try:
                call(what)
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)
        if self._closed:
            response = RESUME
        elif not still or "rip" in registers:
            response = self._back
        else:
            response = over()
        if registers:
            response = response.with_registers(**registers)
        if failures:
            event.reply(response)
            for other in failures[1:]:
                failures[0].add_note(f"another callback failed, too: {other!r}")
            raise failures[0]
        return response

    def _violation(self, event: MemAccess) -> Response | None:
        gfn, flags, vcpu = int(event.gfn), event.access_flags, int(event.vcpu)
        page, watches = self._pages.get(gfn), self._watched.get(gfn)
        is_code = page is not None or gfn in self._leads
        if not is_code and watches is None:
            return self._nothing(event) if gfn in self._shadows else self._strange(event)
        if event.view == self.hooks.id:
            self._writers.pop(vcpu, None)
            if page is not None and flags & _X and not flags & _W:
                return self._fetched(page, event)
        elif event.view not in self._ids:
            return None  # of somebody else's view
        elif self._is_lost(event):
            return RESUME
        if watches or self._is_in_used(event) or self._patched_in(event):
            return self._touched(watches or [], event)
        if is_code and flags & _W:
            if self._is_copy_being_written(gfn, vcpu):
                return self._again(event)
            self._writers[vcpu] = written = self._written_with(gfn, event.offset)
            for one in written:
                self._outdate(one)
        return self._through(self._write_view if flags & _W else self._step_view, event)

    def _written_with(self, gfn: int, offset: int) -> Collection[int]:
        """Which pages with breakpoints a write may change, that is told of for one of them.

        In ``write`` it goes on into another unheard, which the guest may have mapped beside it.
        """
        if not LONGEST_ACCESS <= offset <= PAGE_SIZE - LONGEST_ACCESS:
            return tuple(self._pages)
        return self._code_in(gfn)

    def _code_in(self, gfn: int) -> set[int]:
        """Which pages with breakpoints a write into a page concerns: itself, those it leads to."""
        return {gfn} & self._pages.keys() | self._leads.get(gfn, set())

    def _is_lost(self, event: MemAccess) -> bool:
        """Tell whether a view has stopped what it is to allow, and make it so again.

        Xen has put the host's rights there; else the instruction would come again for ever.
        """
        gfn, tried = int(event.gfn), Access(event.access_flags & Access.RWX.value)
        view = next(one for one in self._views if one.id == event.view)
        allowed = self._rights(gfn).get(view, Access.RWX)
        if tried & allowed != tried:
            return False
        self._altp2m.verify(self._views)
        if view.access(gfn) != allowed:  # it was never asked for
            view.set_access(gfn, allowed)
        return True

    def _is_in_used(self, event: Event) -> bool:
        return self._used_view is not None and event.view == self._used_view.id

    def _touched(self, watches: list[Watch], event: MemAccess) -> Response:
        """Let an instruction go on that uses watched memory, and call all that want to know.

        One vCPU at a time, for which just the pages are open that its instruction is known to use:
        so no other access of it, and none of another vCPU, goes unheard meanwhile.
        """
        assert self._used_view is not None
        gfn, vcpu = int(event.gfn), int(event.vcpu)
        is_written = bool(event.access_flags & _W)
        registers: dict[str, int] = {}
        calls: list[tuple[Callable[[Any], object], object]] = []
        execution = self._executions.get(vcpu) if self._is_in_used(event) else None
        begins = execution is None
        if begins and not self._is_in_used(event) and not self._may_enter_used(vcpu):
            return self._again(event)
        patched = self._patched_steps.get(vcpu, {})
        if not self._is_in_used(event):
            patched = self._patched_in(event)
        writes_to_copy = is_written and gfn in patched
        if writes_to_copy and self._is_being_written(gfn, beside=vcpu):
            return self._again(event)
        if execution is None or writes_to_copy:
            self._show(event)
        if execution is None:
            execution, calls = self._begin(event, registers, is_patched=bool(patched))
        code = self._code_in(gfn) if is_written else ()
        if code:
            self._writers[vcpu] = {*self._writers.get(vcpu, ()), *code}
            for one in code:
                self._outdate(one)
        found, again = self._being_fetched(event), None
        if found:
            place, offset = divmod(found[0].address, PAGE_SIZE)
            again = self._repeated(self._pages[place], offset, event)
        new = execution.access(event, watches)
        plain = not (self._afters or found) and execution.is_plain(event)
        tell = vcpu in self._patched_steps
        over = self._through(self._used_view, event, tell=tell, plain=plain)
        self._executions[vcpu] = execution
        opened = {} if begins else dict(self._opened)
        self._open(opened | {gfn: Access.RWX if is_written else Access.RX})
        if vcpu not in self._told:
            self._count_passed(execution)
        elif is_written:
            execution.may_write(gfn)
        for use in new:
            watch = use.watch
            if use.certain or watch.before is not None or vcpu not in self._told:
                watch.hits += 1
                use.told = True
            if watch.before is not None:
                calls.append((watch.before, Touch(use, event, registers)))
        calls += self._hits(found, event, registers, again)
        still = [event] if found or not watches else watches  # a hit does not come again
        return self._call(calls, still, registers, event, lambda: over)

    def _may_enter_used(self, vcpu: int) -> bool:
        """Whether no other vCPU is in ``used``; it is taken to be there until it is known."""
        holder, is_held = self._holder, False
        if holder is not None and holder != vcpu and self._refusals < _MOST_REFUSALS:
            assert self._used_view is not None
            self._monitor.flush()  # so that it is where it was sent to
            is_held = self._altp2m.vcpu_view(holder) == self._used_view.id
        first = next(iter(self._refused), vcpu)
        if is_held or (first != vcpu and self._passed_over < _MOST_PASSED_OVER):
            self._refused.setdefault(vcpu)
            self._refusals += is_held
            self._passed_over += not is_held
            return False
        for one in (first, vcpu):  # the first does not come again, if it is another
            self._refused.pop(one, None)
        self._holder, self._refusals, self._passed_over = vcpu, 0, 0
        return True

    def _begin(
        self, event: MemAccess, registers: dict[str, int], *, is_patched: bool
    ) -> tuple[Execution, list[tuple[Callable[[Any], object], object]]]:
        """Return the execution that an instruction belongs to, and whom to call of another's end.

        An execution that the guest has given up between two iterations never goes on.
        """
        code = self._code(event.registers) if is_patched else None
        for execution in self._repeating:
            if execution.goes_on_at(event.registers):
                self._repeating.remove(execution)
                execution.begin(event.registers, code)
                return execution, []
        ended = []
        if len(self._repeating) > _MOST_REPEATING:
            ended = self._end(self._repeating.pop(0), event, registers)
        return Execution(self._domain.memory, self._mapped, event.registers, code), ended

    @uninterruptible
    def _open(self, wanted: dict[int, Access]) -> None:
        """Have ``used`` allow more than ``step`` for just these pages."""
        assert self._used_view is not None
        for gfn in self._opened.keys() | wanted.keys():
            if self._opened.get(gfn) == wanted.get(gfn):
                continue
            if gfn in wanted:
                self._used_view.set_access(gfn, wanted[gfn])
                self._opened[gfn] = wanted[gfn]
            else:
                access = self._opened.pop(gfn)
                try:
                    self._used_view.set_access(gfn, self._rights(gfn)[self._used_view])
                except BaseException:
                    self._opened[gfn] = access
                    raise

    def _end(
        self,
        execution: Execution,
        event: Event,
        registers: dict[str, int],
        *,
        goes_on: bool = False,
    ) -> list[tuple[Callable[[Any], object], object]]:
        """End an execution, or an iteration where it ``goes_on``; list whom to call."""
        calls: list[tuple[Callable[[Any], object], object]] = []
        for use in list(execution.uses.values()):
            watch = use.watch
            if goes_on and not watch.each_iteration:
                continue
            del execution.uses[watch]
            call = watch.after
            if not use.told:
                call = call or watch.before
                watch.hits += 1
            if call is not None and watch.inserted:
                calls.append((call, Touch(use, event, registers, execution.now(use))))
        self._count_passed(execution, goes_on=goes_on)
        return calls

    def _count_passed(self, execution: Execution, *, goes_on: bool = False) -> None:
        over = {watch for watch in execution.beside if watch.each_iteration or not goes_on}
        for watch in over:
            watch.passed += 1
        execution.beside -= over

    def _being_fetched(self, event: MemAccess) -> list[Breakpoint]:
        """List the breakpoints of an instruction for which page tables are read: it comes now."""
        if event.view != self.hooks.id or not event.access_flags & AccessFlag.FAULT_IN_GPT:
            return []
        registers = event.registers
        linear = registers.linear_rip
        if event.gla >> PAGE_SHIFT != linear >> PAGE_SHIFT:
            return []
        try:
            place = self._domain.memory.address_space(registers).translate(linear).physical
        except XenError:
            return []  # it is not mapped, and the CPU will tell the guest
        page = self._pages.get(place >> PAGE_SHIFT)
        return page.hooks.get(place & _OFFSET, []) if page is not None else []

    def _strange(self, event: MemAccess) -> Response | None:
        """A page that is not ours, or is no more: then the access is allowed by now."""
        if event.view not in self._ids or self.hooks.access(int(event.gfn)) != Access.RWX:
            return None
        return RESUME

    def _fetched(self, page: _Page, event: MemAccess) -> Response:
        gfn, offset = int(event.gfn), event.registers.linear_rip & _OFFSET
        if page.planted:  # it is allowed by now; or Xen has reset the view
            if self.hooks.access(gfn) != Access.X:
                self._altp2m.verify(self._views)
            return RESUME
        if page.shadow_gfn and self._knows_before(page, event) and page.can_be_planted():
            covered = self._covered(page, event)
            if covered:
                self._found_inside(page, gfn, covered)
            else:
                if not self._is_being_written(gfn):
                    self._plant(gfn, page)
                return RESUME
        found = page.hooks.get(offset) if event.offset == offset else None
        again = self._repeated(page, offset, event) if found is not None else None
        over = self._over(event, tell=again is not None)
        if over is None:
            return self._back
        return over if found is None else self._hit(found, event, over, again)

    @uninterruptible
    def _plant(self, gfn: int, page: _Page) -> None:
        """Have a page's shadow executed."""
        page.fill()
        page.planted = True
        try:
            self.hooks.set_access(gfn, Access.X)
        except BaseException:
            page.planted = False  # the next fetch tries again
            raise

    def _knows_before(self, page: _Page, event: MemAccess) -> bool:
        """Learn by the page tables in use which page comes before one that is to be executed."""
        if min(page.hooks, default=PAGE_SIZE) >= _BEFORE:
            return True
        registers, gfn = event.registers, int(event.gfn)
        linear = event.gla if event.access_flags & AccessFlag.GLA_VALID else registers.linear_rip
        start = linear & -PAGE_SIZE
        try:
            space = self._domain.memory.address_space(registers)
            before = space.translate(start - 1).physical >> PAGE_SHIFT
        except XenError:
            return True  # nothing is there
        if before in page.leads:
            page.guess = None
            return True
        if page.guess is not None:
            self._lead_no_more(gfn, page.guess)
            page.guess = None
        if len(page.leads) >= _MOST_LEADS or before in self._shadows:
            return False
        try:
            lead = self._lead(gfn, before)
        except (InvalidArgumentError, NotMappedError):
            return True  # a hole is not executed
        for offset in page.hooks:
            if offset < _BEFORE:
                lead.note(offset)
        return True

    def _covered(self, page: _Page, event: MemAccess) -> set[int]:
        """Return breakpoints that an instruction reaches which begins in the page before."""
        start = event.gla & -PAGE_SIZE
        if not 0 < start - event.registers.linear_rip <= _BEFORE:
            return set()
        return {at for at in page.hooks if at <= event.offset}

    def _is_being_written(self, gfn: int, beside: int | None = None) -> bool:
        """Whether a vCPU that was let write to a page, beside one, may not have done so yet."""
        if not any(gfn in written for written in self._writers.values()):
            return False
        self._monitor.flush()  # so that each is where it was sent to
        for vcpu, written in list(self._writers.items()):
            if gfn in written and vcpu != beside:
                if self._altp2m.vcpu_view(vcpu) != self.hooks.id:
                    return True
                del self._writers[vcpu]
        return False

    def _stepped(self, event: Singlestep) -> Response | None:
        if event.view not in self._ids or event.view == self.hooks.id:
            return None
        self._repetitions.stepped(event)
        vcpu = int(event.vcpu)
        self._writers.pop(vcpu, None)
        self._told.discard(vcpu)
        for gfn in self._patched_steps.pop(vcpu, {}):
            self._write_through(gfn)
        if self._holder == vcpu:
            self._holder = None
        execution = self._executions.pop(vcpu, None)
        if execution is None or not self._is_in_used(event):
            return self._back
        execution.compare(event.registers, self._watched)
        registers: dict[str, int] = {}
        goes_on = execution.is_repeated_in(event.registers, self._watched)
        if goes_on:
            self._repeating.append(execution)
        calls = self._end(execution, event, registers, goes_on=goes_on)
        return self._call(calls, calls, registers, event, lambda: self._back)

    # Instructions of patches.

    def _places(self, registers: Registers) -> Iterator[tuple[int, int, int]]:
        """Yield where the next instruction's bytes may be: gfn, offset, how many in this page."""
        linear = registers.linear_rip
        here = min(LONGEST_INSTRUCTION, PAGE_SIZE - linear % PAGE_SIZE)
        try:
            space = self._domain.memory.address_space(registers)
            for at, size in ((linear, here), (linear + here, LONGEST_INSTRUCTION - here)):
                if size:
                    yield *divmod(space.translate(at).physical, PAGE_SIZE), size
        except XenError:
            return  # it ends before, or faults

    def _code(self, registers: Registers) -> bytes:
        """Return the next instruction's bytes, and what follows, as they are executed."""
        code = b""
        for gfn, offset, size in self._places(registers):
            page = self._pages.get(gfn)
            if page is not None:
                code += page.executed(offset, offset + size)
                continue
            with suppress(InvalidArgumentError, NotMappedError):  # a hole is not executed
                code += self._domain.memory.read(gfn << PAGE_SHIFT | offset, size)
        return code

    def _patched_in(self, event: Event) -> _Instruction:
        """Return where the next instruction is, if some of it is patched.

        One that has begun in another view than ``hooks`` began before the patch was there.
        """
        found: dict[int, list[range]] = {}
        if not self._patches or event.view != self.hooks.id:
            return found
        registers = event.registers
        left = length(registers, self._code(registers))
        for gfn, offset, room in self._places(registers):
            page, stop = self._pages.get(gfn), offset + min(room, left)
            left -= stop - offset
            if page is not None and page.is_patched(offset, stop):
                found.setdefault(gfn, []).append(range(offset, stop))
        return found

    def _over(self, event: Event, *, tell: bool = False, waits: bool = True) -> Response | None:
        """Have the next instruction stepped; None if it is patched, and has to come again.

        Args:
            event: It is about to be executed.
            tell: As for :meth:`_through`.
            waits: Whether it comes again while another vCPU is in ``used``.
        """
        if not self._patched_in(event):
            return self._through(self._step_view, event, tell=tell)
        assert self._used_view is not None
        if waits and not self._may_enter_used(int(event.vcpu)):
            return None
        self._open({})
        self._show(event)
        return self._through(self._used_view, event, tell=True)

    @uninterruptible
    def _show(self, event: Event) -> bool:
        """Have ``used`` show the next instruction patched; return whether it is patched.

        Others that are in ``used``, still, find theirs there, too.
        """
        assert self._used_view is not None
        vcpu, steps = int(event.vcpu), self._patched_steps
        patched = steps.pop(vcpu, {}) if self._is_in_used(event) else self._patched_in(event)
        steps.pop(vcpu, None)
        if not (patched or self._shown):
            return False
        if steps:
            self._monitor.flush()  # so that each is where it was sent to
        for other in list(steps):
            if self._altp2m.vcpu_view(other) != self._used_view.id:
                del steps[other]
        if patched:
            steps[vcpu] = patched
        wanted: dict[int, list[range]] = {}
        for some in steps.values():
            for gfn, places in some.items():
                if gfn in self._pages and self._pages[gfn].copy is not None:
                    wanted.setdefault(gfn, []).extend(places)
        for gfn in self._shown - wanted.keys():
            self._show_itself(gfn)
        for gfn, places in wanted.items():
            self._show_copy(gfn, places)
        return bool(patched)

    def _is_copy_being_written(self, gfn: int, beside: int) -> bool:
        """Whether patched code of another vCPU may write to a page's copy."""
        if Access.W not in self._opened.get(gfn, Access.N):
            return False
        for vcpu, patched in list(self._patched_steps.items()):
            if vcpu != beside and gfn in patched and self._used_view is not None:
                self._monitor.flush()  # so that it is where it was sent to
                if self._altp2m.vcpu_view(vcpu) == self._used_view.id:
                    return True
                del self._patched_steps[vcpu]
        return False

    def _show_copy(self, gfn: int, patched: Collection[range]) -> None:
        """Have ``used`` show a page in which just some bytes are patched."""
        used, page = self._used_view, self._pages[gfn]
        assert used is not None
        assert page.copy is not None
        if gfn not in self._shown:
            undo = UndoList()
            undo.push("", partial(self._set_rights, [gfn]), needs_rest=True)
            try:
                self._shadows.show(used, gfn, page.copy.gfn, undo)
            except BaseException as error:
                self._roll_back(undo, error, heir=self._undo)
                raise
            self._shown.add(gfn)
        elif len(self._patched_steps) > 1:
            used.set_access(gfn, Access.N)  # so that none of them writes to it meanwhile
        self._write_through(gfn)
        content = bytearray(page.memory)
        for one in patched:
            content[one.start : one.stop] = page.executed(one.start, one.stop)
        page.copy.fill(content)
        used.set_access(gfn, self._rights(gfn)[used])

    def _show_itself(self, gfn: int) -> None:
        """Have ``used`` show a page itself again."""
        used, page = self._used_view, self._pages[gfn]
        assert used is not None
        assert page.copy is not None
        used.set_access(gfn, Access.N)
        self._write_through(gfn)
        self._shadows.show_page(used, gfn)
        used.set_access(gfn, self._rights(gfn)[used])
        self._shown.discard(gfn)
        page.copy.empty()

    @uninterruptible
    def _write_through(self, gfn: int) -> None:
        """Write to a page what was written to its copy."""
        page = self._pages.get(gfn)
        if page is None or page.copy is None:
            return
        for offset, data in page.copy.written():
            for one in self._code_in(gfn):
                self._outdate(one)
            with suppress(InvalidArgumentError, NotMappedError):  # the page is gone
                self._domain.memory.write(gfn << PAGE_SHIFT | offset, data)

    def _write_all_through(self) -> None:
        for gfn in self._shown:
            self._write_through(gfn)

    def _nothing(self, event: MemAccess) -> Response:
        """Answer for a shadow's own gfn as Xen does where there is no memory."""
        if event.access_flags & _W:
            return _WRITE_NOWHERE
        if event.access_flags & _X:
            self._backend.hvm_inject_trap(
                self._domid, int(event.vcpu), GP, int(TrapType.HARDWARE_EXCEPTION), 0, 0, 0
            )
            return RESUME
        return _READ_ONES

    # Its end.

    def _take_back(self) -> None:
        """The vCPUs leave, then the views go, and only then the shadows: else Xen resets views."""
        doing = f"closing {self!r}"
        undo, what = UndoList(), f"shadows of domain {self._domid}"
        undo.push("", self._mapped.close)
        undo.push(what, lambda: self._added.unwind(doing), needs_rest=True)
        undo.push("", self._destroy_views)
        undo.unwind(doing)

    def _destroy_views(self) -> None:
        doing = f"closing {self!r}"
        undo = UndoList()
        for kind in self._heard:
            what = f"events of {kind.__name__} of domain {self._domid}"
            undo.push(what, partial(self._hear_no_more, kind), needs_rest=True)
        for view in self._views:
            undo.push("", view.close)
        undo.push("", lambda: self._undo.unwind(doing))
        for gfn in self._pages:
            undo.push(f"mapping of gfn {gfn:#x} of domain {self._domid}", partial(self._unmap, gfn))
        undo.push("", self._write_all_through)
        undo.push(f"vCPUs of domain {self._domid} in our views", self._leave)
        undo.unwind(doing)

    @uninterruptible
    def _lay_down(self, later: UndoList) -> None:
        """Take all back but the breakpoints and watches themselves, for :meth:`_take_up`.

        Args:
            later: Takes the shadows back, once all views are gone.
        """
        pages, watched = dict(self._pages), dict(self._watched)
        self._destroy_views()
        self._mapped.close()
        later.adopt(self._added)
        super().abandon()
        self._pages, self._watched = pages, watched

    @uninterruptible
    def _take_up(self) -> None:
        self._set_up()
        self._follow_all()

    @uninterruptible
    def abandon(self) -> None:
        """Close without undoing anything but what is this process's own: the domain is gone."""
        for gfn in list(self._pages):
            with suppress(XenError):
                self._unmap(gfn)
        self._mapped.abandon()
        self._shadows.abandon()
        self._altp2m._tell_no_more(self._found_lost)
        super().abandon()

    def _unmap(self, gfn: int) -> None:
        if gfn in self._pages:
            page = self._pages[gfn]
            for one in (page, *page.leads.values()):
                one.unmap()
            del self._pages[gfn]

    def _hear_no_more(self, kind: type[Event]) -> None:
        if not self._monitor.closed:
            with suppress(InvalidArgumentError):  # somebody has disabled it already
                self._monitor.disable(kind)

    def _leave(self) -> None:
        if not self._altp2m.closed:
            self._altp2m._switch_back()

    def _answer_late(self, event: Event) -> Response | None:
        """Answer what was told before the end: the instruction comes again."""
        if isinstance(event, SoftwareBreakpoint):
            return REINJECT if self._is_own(event) else RESUME
        return None

    def _orphaned(self) -> bool:
        return self._domain._orphaned()
