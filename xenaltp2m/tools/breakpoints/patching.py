# SPDX-License-Identifier: LGPL-2.1-or-later
"""Insert and remove patches, and step their instructions in ``used``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from xenaltp2m.errors import InvalidArgumentError, NotMappedError
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.memory import Memory
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.tools.breakpoints.fetching import Fetching, Instruction
from xenaltp2m.tools.breakpoints.guarded_pages import GuardedPages
from xenaltp2m.tools.breakpoints.hooks import Patch
from xenaltp2m.tools.breakpoints.patches import Copy
from xenaltp2m.tools.breakpoints.shadow_pages import Shadows
from xenaltp2m.tools.breakpoints.views import HookViews
from xenaltp2m.types import PAGE_SHIFT, PAGE_SIZE, Access
from xenaltp2m.values.events import Event
from xenaltp2m.values.gfns import check_gfn


class Patching:
    """The patches of one session.

    Attributes:
        patches: The inserted patches.
        steps: The patched instructions that vCPUs execute in ``used``, by vCPU.
    """

    def __init__(
        self,
        context: DomainContext,
        views: HookViews,
        shadows: Shadows,
        guarded: GuardedPages,
        fetching: Fetching,
        heir: UndoList,
    ) -> None:
        self._context, self._views, self._shadows = context, views, shadows
        self._guarded, self._fetching, self._heir = guarded, fetching, heir
        self._memory = Memory(context)
        self.patches: list[Patch] = []
        self.steps: dict[int, Instruction] = {}
        self._shown: set[int] = set()
        """The gfns of which ``used`` maps a copy."""

    # Inserting and removing.

    def put_in(self, made: Patch) -> None:
        """Insert a patch; after an error none of it is left."""
        pages = self._guarded.pages
        undo = UndoList()
        undo.push("", partial(self.take_out, made))
        self.patches.append(made)
        with undo.rolling_back(heir=self._heir, unless=self._context.is_gone):
            for at, _ in made.pieces:
                page = pages.get(at // PAGE_SIZE) or self._guarded.take(at // PAGE_SIZE)
                page.copy = page.copy or Copy(*self._shadows.take())
                self._guarded.invalidate_shadow(at // PAGE_SIZE)
            for at, piece in made.pieces:
                pages[at // PAGE_SIZE].patches[at % PAGE_SIZE] = piece

    def check_free(self, new: Patch) -> None:
        """Raise if a patch would overlap another one, or a breakpoint beyond its first byte.

        Raises:
            InvalidArgumentError: It would.
        """
        for at, code in new.pieces:
            gfn, offset = divmod(at, PAGE_SIZE)
            check_gfn(gfn)
            self._shadows.check_not_one(gfn)
            for other in self.patches:
                if other.overlaps(at, len(code)):
                    raise InvalidArgumentError(
                        f"{new!r} would overlap {other!r}", gfn=gfn, hint=("remove that one first",)
                    )
            page = self._guarded.pages.get(gfn)
            hooks = {} if page is None else page.hooks
            for inside in hooks.keys() & set(range(offset, offset + len(code))):
                place = gfn << PAGE_SHIFT | inside
                if place != new.address:
                    raise InvalidArgumentError(
                        f"the breakpoint at {place:#x} would be inside {new!r}",
                        gfn=gfn,
                        hint=("a breakpoint may be at the first byte of a patch",),
                    )

    def check_breakpoint(self, address: int) -> None:
        """Raise if a breakpoint would be inside a patch.

        Raises:
            InvalidArgumentError: It would.
        """
        for patch in self.patches:
            if patch.overlaps(address, 1) and patch.address != address:
                raise InvalidArgumentError(
                    f"a breakpoint at {address:#x} would be inside {patch!r}",
                    gfn=address // PAGE_SIZE,
                    hint=("a breakpoint may be at the first byte of a patch",),
                )

    @uninterruptible
    def take_out(self, patch: Patch) -> None:
        """Remove a patch: the guest executes its own code again."""
        pages = self._guarded.pages
        places = [divmod(at, PAGE_SIZE) for at, _ in patch.pieces]
        gfns = {gfn for gfn, _ in places} & pages.keys()
        for gfn in gfns:
            self._guarded.invalidate_shadow(gfn)
        for gfn, offset in places:
            if gfn in gfns:
                pages[gfn].patches.pop(offset, None)
        with suppress(ValueError):
            self.patches.remove(patch)
        undo = UndoList()
        for gfn in gfns:
            undo.push("", partial(self.release_unpatched, gfn))
        undo.unwind(f"removing {patch!r}")

    def release_unpatched(self, gfn: int) -> None:
        """Free a page's copy, and the page, if it has no patches, or breakpoints, any more."""
        page = self._guarded.pages[gfn]
        if page.patches:
            return
        if page.copy is not None:
            if gfn in self._shown:
                self._show_itself(gfn)
            self._shadows.give_back(page.copy.gfn)
            page.copy = None
        if not page.hooks:
            self._guarded.release(gfn)

    # Stepping patched instructions.

    def parts_of(self, event: Event) -> Instruction:
        """Return where the next instruction is, if some of it is patched.

        An instruction that began in another view than ``hooks`` began before it was patched.
        """
        if not self.patches or event.view != self._views.hooks.id:
            return {}
        return self._fetching.patched_parts(event.registers)

    @uninterruptible
    def show(self, event: Event) -> None:
        """Map the next instruction patched in ``used``.

        Other vCPUs that are still in ``used`` keep their patched instructions there.
        """
        used, vcpu, steps = self._views.used, int(event.vcpu), self.steps
        assert used is not None
        is_in_used = self._views.is_in_used(event)
        patched = steps.pop(vcpu, {}) if is_in_used else self.parts_of(event)
        steps.pop(vcpu, None)
        if not (patched or self._shown):
            return
        for other in list(steps):
            if not self._views.is_where(other, used):
                del steps[other]
        if patched:
            steps[vcpu] = patched
        wanted = self._wanted()
        for gfn in self._shown - wanted.keys():
            self._show_itself(gfn)
        for gfn, places in wanted.items():
            self._show_copy(gfn, places)

    def _wanted(self) -> dict[int, list[range]]:
        """Return the bytes to be patched in ``used``, as offsets by gfn."""
        wanted: dict[int, list[range]] = {}
        for some in self.steps.values():
            for gfn, places in some.items():
                page = self._guarded.pages.get(gfn)
                if page is not None and page.copy is not None:
                    wanted.setdefault(gfn, []).extend(places)
        return wanted

    def is_copy_being_written(self, gfn: int, beside: int) -> bool:
        """Return whether patched code of another vCPU may write to a page's copy."""
        used = self._views.used
        if Access.W not in self._guarded.opened.get(gfn, Access.N):
            return False
        for vcpu, patched in list(self.steps.items()):
            if vcpu != beside and gfn in patched and used is not None:
                if self._views.is_where(vcpu, used):
                    return True
                del self.steps[vcpu]
        return False

    def _show_copy(self, gfn: int, patched: Collection[range]) -> None:
        """Map a copy of a page in ``used``, with only some bytes patched."""
        used, page = self._views.used, self._guarded.pages[gfn]
        assert used is not None
        assert page.copy is not None
        if gfn not in self._shown:
            undo = UndoList()
            undo.push("", partial(self._guarded.set_rights, [gfn]), needs_rest=True)
            with undo.rolling_back(heir=self._heir, unless=self._context.is_gone):
                self._shadows.show(used, gfn, page.copy.gfn, undo)
            self._shown.add(gfn)
        elif len(self.steps) > 1:
            used.set_access(gfn, Access.N)  # so that no vCPU writes to it meanwhile
        self.write_through(gfn)
        content = bytearray(page.memory)
        for one in patched:
            content[one.start : one.stop] = page.executed(one.start, one.stop)
        page.copy.fill(content)
        used.set_access(gfn, self._guarded.rights(gfn)[used])

    def _show_itself(self, gfn: int) -> None:
        """Map a page itself in ``used`` again."""
        used, page = self._views.used, self._guarded.pages[gfn]
        assert used is not None
        assert page.copy is not None
        used.set_access(gfn, Access.N)
        self.write_through(gfn)
        self._shadows.show_page(used, gfn)
        used.set_access(gfn, self._guarded.rights(gfn)[used])
        self._shown.discard(gfn)
        page.copy.empty()

    def stepped(self, vcpu: int) -> None:
        """End a vCPU's step: write what it has written to copies to their pages."""
        for gfn in self.steps.pop(vcpu, {}):
            self.write_through(gfn)

    @uninterruptible
    def write_through(self, gfn: int) -> None:
        """Write to a page what was written to its copy."""
        page = self._guarded.pages.get(gfn)
        if page is None or page.copy is None:
            return
        for offset, data in page.copy.written():
            for one in self._guarded.written_with(gfn):
                self._guarded.invalidate_shadow(one)
            with suppress(InvalidArgumentError, NotMappedError):  # the page is gone
                self._memory.write(gfn << PAGE_SHIFT | offset, data)

    def write_all_through(self) -> None:
        """Write to every page what was written to its copy."""
        for gfn in self._shown:
            self.write_through(gfn)


def pieces_of(code: bytes, to_physical: Callable[[int], int]) -> list[tuple[int, bytes]]:
    """Split a patch at page boundaries.

    Args:
        code: Its bytes.
        to_physical: Maps an offset, counted from the first byte, to a guest-physical address.
    """
    pieces: list[tuple[int, bytes]] = []
    while rest := code[sum(len(piece) for _, piece in pieces) :]:
        at = to_physical(len(code) - len(rest))
        pieces.append((at, rest[: PAGE_SIZE - at % PAGE_SIZE]))
    return pieces
