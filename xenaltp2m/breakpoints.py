# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stealth breakpoints: a guest's code stops where somebody wants to know, and cannot tell.

A page with breakpoints is executed from a *shadow*, a copy with int3 in it, that one view shows
instead of the page. Whoever reads sees the page itself, what is written lands in the page itself,
and the shadow's own gfn looks as if nothing were there. Three views make this:

    view  | a page with breakpoints         | a shadow's own gfn
    ------|---------------------------------|---------------------------
    hooks | its shadow, to be executed only | the sink: reads as ones
    step  | itself, not to be written       | the sink
    write | itself                          | the sink

The vCPUs are in ``hooks``. One that comes upon an int3, or reads such a page, executes that one
instruction in ``step``; one that writes to such a page executes it in ``write``. No other vCPU sees
any of this, and none is stopped.

A shadow whose page was written to is *stale*: until it is copied anew it may not be executed, so
that the next vCPU that wants to tells. Writes that move the bounds of instructions are noticed
then: int3 is put where an instruction begins only while the bytes before it, as many as an
instruction may have, are those that stood there at first. Where they are not, every fetch from the
page is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from xenaltp2m.abi.vm_event import AccessFlag
from xenaltp2m.errors import AlreadyError, InvalidArgumentError, XenError
from xenaltp2m.events import Event, MemAccess, Registers, Singlestep, SoftwareBreakpoint
from xenaltp2m.handle import Handle, UndoList
from xenaltp2m.responses import REINJECT, RESUME, STEP, Response
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE, Access, Gfn, VcpuId
from xenaltp2m.view import check_gfn

if TYPE_CHECKING:
    from xenaltp2m.altp2m import Altp2m
    from xenaltp2m.domain import Domain
    from xenaltp2m.monitor import Monitor
    from xenaltp2m.view import View

_INT3 = 0xCC
_BEFORE = 14
"""Bytes before an address from which on an instruction may reach behind it."""
_SHADOWS_AT_ONCE = 16
_NOTHING = b"\xff" * PAGE_SIZE
"""What a guest reads where there is no memory."""
_OFFSET = PAGE_SIZE - 1
_GENERAL_PROTECTION, _HARDWARE_EXCEPTION = 13, 3
_W, _X = AccessFlag.W, AccessFlag.X
_READ_ONES, _WRITE_NOWHERE = (
    Response.emulate(read_data=_NOTHING[:64]),
    Response.emulate(write=False),
)


class Hit:
    """A vCPU that is about to execute the instruction of a breakpoint, and waits.

    Attributes:
        breakpoint: The breakpoint.
        event: What the monitor told.
    """

    __slots__ = ("_registers", "breakpoint", "event")

    def __init__(self, hit: Breakpoint, event: Event, registers: dict[str, int]) -> None:
        self.breakpoint = hit
        self.event = event
        self._registers = registers

    def __repr__(self) -> str:
        return f"<Hit of {self.breakpoint!r} by vCPU {self.vcpu}>"

    @property
    def vcpu(self) -> VcpuId:
        """The vCPU."""
        return self.event.vcpu

    @property
    def registers(self) -> Registers:
        """Its registers, before the instruction."""
        return self.event.registers

    def set_registers(self, **values: int) -> None:
        """Set registers by name. With ``rip`` the instruction there is the next, not this one.

        Raises:
            InvalidArgumentError: There is no such register, or the value does not fit into it.
        """
        RESUME.with_registers(**values)
        self._registers.update(values)


Callback: TypeAlias = Callable[[Hit], object]


class Breakpoint:
    """A place in the guest's code. Made by :meth:`Breakpoints.insert`.

    Attributes:
        address: Guest-physical.
        hits: How often it was hit.
    """

    def __init__(self, owner: Breakpoints, address: int, callback: Callback) -> None:
        self._owner = owner
        self.address = address
        self.callback = callback
        self.hits = 0

    def __repr__(self) -> str:
        return f"<Breakpoint at {self.address:#x}>"

    @property
    def inserted(self) -> bool:
        """Whether it is, still."""
        return self._owner._has(self)

    def remove(self) -> None:
        """Take it out; again is harmless."""
        self._owner.remove(self)


class _Page:
    """A page with breakpoints."""

    __slots__ = ("before", "hooks", "memory", "planted", "shadow", "shadow_gfn", "unmap")

    def __init__(
        self, memory: memoryview, shadow_gfn: int, shadow: memoryview, unmap: Callable[[], None]
    ) -> None:
        self.memory = memory
        self.shadow_gfn = shadow_gfn
        self.shadow = shadow
        self.unmap = unmap
        self.planted = False
        """Whether the shadow is what it should be, and may be executed."""
        self.hooks: dict[int, list[Breakpoint]] = {}
        """By offset."""
        self.before: dict[int, bytes] = {}
        """What stood before each at first."""

    def can_be_planted(self) -> bool:
        """Whether each breakpoint is where an instruction begins, as far as one can know."""
        memory = self.memory
        return all(memory[_start(at) : at] == before for at, before in self.before.items())

    def fill(self) -> None:
        """Make the shadow what it should be."""
        content = bytearray(self.memory)
        for offset in self.hooks:
            content[offset] = _INT3
        self.shadow[:] = content


def _start(offset: int) -> int:
    return max(offset - _BEFORE, 0)


class _Shadows:
    """Pages of our own above the guest's memory: a sink, and shadows, hidden in every view."""

    def __init__(self, domain: Domain, views: Sequence[View], undo: UndoList) -> None:
        self._domain = domain
        self._backend = domain.xen.backend
        self._views = views
        self._undo = undo
        self._free: list[int] = []
        self._memory: dict[int, memoryview] = {}
        self._maps: list[list[memoryview]] = []
        self._sink = 0

    def __contains__(self, gfn: int) -> bool:
        return gfn in self._memory

    def take(self) -> tuple[int, memoryview]:
        """Return a shadow that nobody uses, and its memory."""
        if not self._free:
            self._grow()
        gfn = self._free.pop()
        return gfn, self._memory[gfn]

    def give_back(self, gfn: int) -> None:
        """Have it for the next one; it is hidden again."""
        self._memory[gfn][:] = _NOTHING
        self._free.append(gfn)

    def hide(self, view: View, gfn: int) -> None:
        """Let a view show the sink instead."""
        view.remap(gfn, self._sink, access=Access.R)

    def is_hidden(self, gfn: int) -> bool:
        """Whether every view has the rights there that belong to the sink."""
        return all(view.access(gfn) == Access.R for view in self._views)

    def are_hidden(self) -> bool:
        """The same of all of them and the sink."""
        return all(self.is_hidden(gfn) for gfn in self._memory)

    def abandon(self) -> None:
        """Let go of the mappings: the domain is gone."""
        for pages in list(self._maps):
            with suppress(XenError):
                self._unmap(pages)

    def _unmap(self, pages: list[memoryview]) -> None:
        self._backend.foreignmemory_unmap(pages)
        self._maps = [others for others in self._maps if others is not pages]

    def _grow(self) -> None:
        """Add some. The domain stands still, for until they are hidden they can be seen."""
        domain, backend, domid = self._domain, self._backend, int(self._domain.domid)
        with domain.paused():
            gfns = domain.add_pages(_SHADOWS_AT_ONCE)
            self._undo.push("", partial(domain.remove_pages, gfns))
            pages = backend.foreignmemory_map(domid, True, gfns)
            self._maps.append(pages)
            self._undo.push(
                f"mapping of gfns {gfns.start:#x}..{gfns.stop - 1:#x} of domain {domid}",
                partial(self._unmap, pages),
            )
            for gfn, page in zip(gfns, pages, strict=True):
                page[:] = _NOTHING
                self._memory[gfn] = page
            shadows = gfns
            if not self._sink:
                self._sink, shadows = gfns[0], gfns[1:]
            for view in self._views:
                view.set_access(self._sink, Access.R)
                for gfn in shadows:
                    self.hide(view, gfn)
            self._free += reversed(shadows)


class Breakpoints(Handle):
    """A domain's breakpoints, in views of their own, which its vCPUs are moved to.

    It answers the events that come of them: give it to :meth:`Monitor.run`, or call it with each
    event; what nobody answers is answered by it, too. Closing it removes all of them, moves the
    vCPUs out of its views, destroys these and takes the shadows back.

    Attributes:
        hooks: The view that vCPUs are in.
    """

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
        super().__init__()
        self._altp2m, self._monitor = altp2m, monitor
        self._domain = altp2m.domain
        self._backend = self._domain.xen.backend
        self._domid = int(self._domain.domid)
        self._fast, self._int3 = fast, int3
        self._pages: dict[int, _Page] = {}
        self._writers: dict[int, int] = {}
        """The gfn that each vCPU is writing to, as far as is known."""
        self._views: list[View] = []
        self._added = UndoList()
        """What the shadows are."""
        self._shadows = _Shadows(altp2m.domain, self._views, self._added)
        try:
            for kind in (MemAccess, SoftwareBreakpoint):
                with suppress(AlreadyError):
                    monitor.enable(kind)
            for label in ("hooks", "step", "write"):
                self._views.append(altp2m.create_view(label=label))
            self.hooks, self._step_view, self._write_view = self._views
            self._ids = {int(view.id) for view in self._views}
            self._back = RESUME.in_view(self.hooks)
            self._step, self._write = STEP.in_view(self._step_view), STEP.in_view(self._write_view)
            if fast:
                self._step, self._write = (
                    Response.fast_singlestep(through=view, back_to=self.hooks)
                    for view in self._views[1:]
                )
            monitor.answer_by_default(self)
            altp2m.switch_to_view(self.hooks)
            monitor._close_first(self)
        except BaseException as error:
            undo = UndoList()
            undo.push("", self._take_back)
            self._roll_back(undo, error, heir=self._domain._undo)
            super().abandon()
            raise

    def __repr__(self) -> str:
        return f"<Breakpoints of domain {self._domid}>"

    def __len__(self) -> int:
        return sum(len(hooks) for page in self._pages.values() for hooks in page.hooks.values())

    # Inserting and removing.

    def insert(self, address: int, callback: Callback) -> Breakpoint:
        """Have something called before each execution of an instruction.

        It may be done while the guest runs, and in a callback. There may be several at an address;
        they are called in the order they were inserted.

        Args:
            address: Guest-physical, of the first byte of the instruction.
            callback: Called with a :class:`Hit`. What it raises is raised where the monitor runs,
                once the vCPU was answered.

        Raises:
            InvalidArgumentError: The address is not in memory.
            NotMappedError: It is not in ordinary RAM.
            OutOfMemoryError: The host, or the domain's p2m pool, is exhausted.
        """
        self._check_open()
        gfn, offset = divmod(address, PAGE_SIZE)
        check_gfn(gfn)
        if gfn in self._shadows:
            raise InvalidArgumentError(f"gfn {gfn:#x} is a shadow, not the guest's", gfn=gfn)
        page = self._pages.get(gfn) or self._take(gfn)
        made = Breakpoint(self, address, callback)
        if offset not in page.hooks:
            page.hooks[offset] = []
            page.before[offset] = bytes(page.memory[_start(offset) : offset])
            if page.planted:
                page.shadow[offset] = _INT3
        page.hooks[offset].append(made)
        return made

    def remove(self, unwanted: Breakpoint) -> None:
        """Take a breakpoint out; one that was taken out already is passed over."""
        self._check_open()
        if not self._has(unwanted):
            return
        gfn, offset = divmod(unwanted.address, PAGE_SIZE)
        page = self._pages[gfn]
        page.hooks[offset].remove(unwanted)
        if page.hooks[offset]:
            return
        del page.hooks[offset], page.before[offset]
        if page.hooks:
            if page.planted:
                page.shadow[offset] = page.memory[offset]
        else:
            self._release(gfn)

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
        hooks, step = self.hooks, self._step_view
        lost = []
        for gfn, page in self._pages.items():
            executable = Access.X if page.planted else Access.N
            expected = executable if page.shadow_gfn else Access.RW
            as_it_was = hooks.access(gfn) == expected
            if page.shadow_gfn:
                as_it_was &= step.access(gfn) == Access.RX
                as_it_was &= self._shadows.is_hidden(page.shadow_gfn)
            if not as_it_was:
                lost.append(Gfn(gfn))
        if lost or not self._shadows.are_hidden():
            with self._domain.paused():
                for view in self._views:
                    view.reapply()
                for gfn in self._pages:
                    self._outdate(gfn)
        return lost

    def _outdate(self, gfn: int) -> None:
        """Have a page's shadow copied anew before it is executed again."""
        page = self._pages[gfn]
        if page.planted:
            page.planted = False
            self.hooks.set_access(gfn, Access.N)

    def _has(self, one: Breakpoint) -> bool:
        gfn, offset = divmod(one.address, PAGE_SIZE)
        page = self._pages.get(gfn)
        return page is not None and one in page.hooks.get(offset, ())

    def _take(self, gfn: int) -> _Page:
        """Begin to shadow a page; its shadow is stale, which keeps all order simple."""
        hooks, step = self.hooks, self._step_view
        undo = UndoList()
        try:
            pages = self._backend.foreignmemory_map(self._domid, False, [gfn])
            unmap = partial(self._backend.foreignmemory_unmap, pages)
            undo.push(f"mapping of gfn {gfn:#x} of domain {self._domid}", unmap)
            if not self._int3:
                undo.push("", partial(hooks.set_access, gfn, Access.RWX))
                hooks.set_access(gfn, Access.RW)
                page = _Page(pages[0], 0, memoryview(b""), unmap)
            else:
                shadow_gfn, shadow = self._shadows.take()
                undo.push("", partial(self._shadows.give_back, shadow_gfn))
                page = _Page(pages[0], shadow_gfn, shadow, unmap)
                undo.push("", partial(step.set_access, gfn, Access.RWX))
                step.set_access(gfn, Access.RX)
                # The remapped page gets the rights that its new gfn has: none for now. That gfn
                # has to show the shadow meanwhile, which looks like nothing, still.
                undo.push("", partial(self._shadows.hide, hooks, shadow_gfn))
                hooks.revert(shadow_gfn)
                hooks.set_access(shadow_gfn, Access.N)
                self._pages[gfn] = page  # from here on somebody may ask
                undo.push("", partial(self._pages.__delitem__, gfn))
                hooks.remap(gfn, shadow_gfn, access=Access.N)
                undo.push("", partial(hooks.revert, gfn))
                self._shadows.hide(hooks, shadow_gfn)
        except BaseException as error:
            self._roll_back(undo, error, heir=self._undo)
            raise
        self._pages[gfn] = page
        return page

    def _release(self, gfn: int) -> None:
        """Show a page itself again."""
        page = self._pages[gfn]
        undo = UndoList()
        undo.push("", page.unmap)
        if page.shadow_gfn:
            undo.push("", partial(self._shadows.give_back, page.shadow_gfn))
            undo.push("", partial(self._step_view.set_access, gfn, Access.RWX))
            undo.push("", partial(self.hooks.revert, gfn))
        else:
            undo.push("", partial(self.hooks.set_access, gfn, Access.RWX))
        del self._pages[gfn]
        undo.unwind(f"removing the breakpoints of gfn {gfn:#x}")

    # Answering.

    def __call__(self, event: Event) -> Response | None:
        """Answer an event that a breakpoint, or its page, has caused; None for any other."""
        if self.closed or self.hooks.closed:
            return self._answer_late(event)
        if isinstance(event, SoftwareBreakpoint):
            return self._breakpoint(event)
        if isinstance(event, MemAccess):
            return self._violation(event)
        if isinstance(event, Singlestep) and not self._fast:
            return self._stepped(event)
        return None

    def _breakpoint(self, event: SoftwareBreakpoint) -> Response:
        gfn, offset = int(event.gfn), event.registers.rip & _OFFSET
        page = self._pages.get(gfn)
        if event.view == self.hooks.id and page is not None and offset in page.hooks:
            self._writers.pop(int(event.vcpu), None)
            over = REINJECT if page.memory[offset] == _INT3 else self._step
            return self._hit(page.hooks[offset], event, over)
        # The guest's own; or one that was removed since: the instruction comes again.
        return REINJECT if self._is_int3(gfn, offset) else RESUME

    def _is_int3(self, gfn: int, offset: int) -> bool:
        """Whether the guest itself has an int3 at a place."""
        try:
            return self._domain.memory.read(gfn << PAGE_SHIFT | offset, 1)[0] == _INT3
        except InvalidArgumentError:
            return True  # no such page: then none of ours was there

    def _hit(self, breakpoints: list[Breakpoint], event: Event, over: Response) -> Response:
        """Call all that want to know; answer even where that fails."""
        registers: dict[str, int] = {}
        failures: list[BaseException] = []
        for one in tuple(breakpoints):
            one.hits += 1
            try:
                one.callback(Hit(one, event, registers))
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)
        if self.closed:
            response = RESUME
        else:
            response = RESUME if not breakpoints or "rip" in registers else over
        if registers:
            response = response.with_registers(**registers)
        if failures:
            event.reply(response)
            for other in failures[1:]:
                failures[0].add_note(f"another callback failed, too: {other!r}")
            raise failures[0]
        return response

    def _violation(self, event: MemAccess) -> Response | None:
        gfn, flags = int(event.gfn), event.access_flags
        page = self._pages.get(gfn)
        if page is None:
            return self._nothing(event) if gfn in self._shadows else self._strange(event)
        if event.view == self.hooks.id:
            self._writers.pop(int(event.vcpu), None)
        if flags & _W:
            return self._written(event)
        if flags & _X and event.view == self.hooks.id:
            return self._fetched(page, event)
        return self._step

    def _strange(self, event: MemAccess) -> Response | None:
        """A page that is not ours, or is no more: then the access is allowed by now."""
        if event.view not in self._ids or self.hooks.access(int(event.gfn)) != Access.RWX:
            return None
        return RESUME

    def _written(self, event: MemAccess) -> Response:
        """Let a write happen to the page itself; the shadow is copied when it is next wanted."""
        self._outdate(int(event.gfn))
        self._writers[int(event.vcpu)] = int(event.gfn)
        return self._write

    def _fetched(self, page: _Page, event: MemAccess) -> Response:
        gfn, offset = int(event.gfn), event.registers.rip & _OFFSET
        if page.planted:
            return RESUME  # it is allowed by now
        if page.shadow_gfn and page.can_be_planted():
            if not self._is_being_written(gfn):
                page.fill()
                page.planted = True
                self.hooks.set_access(gfn, Access.X)
            return RESUME
        found = page.hooks.get(offset) if event.offset == offset else None
        return self._step if found is None else self._hit(found, event, self._step)

    def _is_being_written(self, gfn: int) -> bool:
        """Whether a vCPU that was let write to a page may not have done so yet."""
        if gfn not in self._writers.values():
            return False
        self._monitor.flush()  # so that each is where it was sent to
        for vcpu, written in list(self._writers.items()):
            if written == gfn:
                if self._altp2m.vcpu_view(vcpu) != self.hooks.id:
                    return True
                del self._writers[vcpu]
        return False

    def _stepped(self, event: Singlestep) -> Response | None:
        if event.view not in self._ids:
            return None
        self._writers.pop(int(event.vcpu), None)
        return self._back

    def _nothing(self, event: MemAccess) -> Response:
        """Answer for a shadow's own gfn as Xen does where there is no memory."""
        if event.access_flags & _W:
            return _WRITE_NOWHERE
        if event.access_flags & _X:
            self._backend.hvm_inject_trap(
                self._domid, int(event.vcpu), _GENERAL_PROTECTION, _HARDWARE_EXCEPTION, 0, 0, 0
            )
            return RESUME
        return _READ_ONES

    # Its end.

    def _take_back(self) -> None:
        """The vCPUs leave, then the views go, and only then the shadows: else Xen resets views."""
        doing = f"closing {self!r}"
        undo = UndoList()
        undo.push("", lambda: self._added.unwind(doing))
        for view in self._views:
            undo.push("", view.close)
        undo.push("", lambda: self._undo.unwind(doing))
        for gfn in self._pages:
            undo.push(f"mapping of gfn {gfn:#x} of domain {self._domid}", partial(self._unmap, gfn))
        undo.push(f"vCPUs of domain {self._domid} in our views", self._leave)
        undo.unwind(doing)

    def abandon(self) -> None:
        """Close without undoing anything but what is this process's own: the domain is gone."""
        for gfn in list(self._pages):
            with suppress(XenError):
                self._unmap(gfn)
        self._shadows.abandon()
        super().abandon()

    def _unmap(self, gfn: int) -> None:
        if gfn in self._pages:
            self._pages[gfn].unmap()
            del self._pages[gfn]

    def _leave(self) -> None:
        if not self._altp2m.closed:
            self._altp2m._switch_back()

    def _answer_late(self, event: Event) -> Response | None:
        """Answer what was told before the end: the instruction comes again."""
        if isinstance(event, SoftwareBreakpoint):
            gfn, offset = int(event.gfn), event.registers.rip & _OFFSET
            return REINJECT if self._is_int3(gfn, offset) else RESUME
        return None

    def _orphaned(self) -> bool:
        return self._domain._orphaned()
