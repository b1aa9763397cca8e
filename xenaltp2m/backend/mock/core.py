# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machine code on the mock's memory: a CPU core that Unicorn emulates, without any of Xen's rules.

The core sees the host's frames. For each page that it touches it asks which frame the page is and
what may be done with it, and remembers the answer until told to forget; so a view, its remaps and
its restrictions come from the one model there is. Instructions that leave guest mode are never
executed here: the core stops before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from xenaltp2m.abi.x86 import (
    Fault,
    exiting_starts,
)
from xenaltp2m.types import PAGE_SIZE

if TYPE_CHECKING:
    from xenaltp2m.backend.mock.machine import Frames

from xenaltp2m.backend.mock.engine import (
    KINDS,
    LONGEST_INSTRUCTION,
    UNDEFINED,
    Engine,
    NewCode,
    ReadsAhead,
    Resolve,
    Seen,
    SoftwareInterrupt,
    Where,
    import_unicorn,
)
from xenaltp2m.backend.mock.engine_state import LAST_ADDRESS


class Code(NamedTuple):
    """A frame with code, as it was when it was translated."""

    content: bytes
    exits: frozenset[int]
    """Where it may leave guest mode."""
    pages: set[int]
    """Linear pages at which it was executed."""


class Core:
    """Two engines that share memory: one runs on, the other executes single instructions.

    Only the second reports what memory an instruction uses, which slows it down; and Unicorn would
    have to translate everything again to switch between counting instructions and not.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._own = [self._frame() for _ in range(4)]
        hidden, self.scratch, self.marker, self.nothing = self._own
        """Frames of the core's own: its own code, two for what leads nowhere, one for holes."""
        frames.page(hidden)[:] = UNDEFINED * PAGE_SIZE
        self.where: Where | None = None
        """Where the engine ran last."""
        self.stayed = False
        """Whether it stayed in guest mode since, so that a CPU would have kept its translations."""
        self.engine = Engine(frames, hidden)
        self.stepper = Engine(frames, hidden)
        const = import_unicorn().unicorn_const
        for engine in (self.engine, self.stepper):
            engine.uc.ctl_exits_enabled(True)
        self.engine.uc.hook_add(const.UC_HOOK_EDGE_GENERATED, self._translated)
        self.stepper.reads_ahead = False
        self.stepper.uc.hook_add(const.UC_HOOK_MEM_READ | const.UC_HOOK_MEM_WRITE, self._accessed)
        self._on_access: Callable[[Seen], None] | None = None
        self.executed = 0
        """Instructions, where they were counted."""
        self._counts = False
        self._code: dict[int, Code] = {}
        """By frame."""
        self._stale: set[int] = set()
        """Frames whose code was found changed while the engine runs."""
        self._written: set[int] = set()
        """Frames with code that it may write to."""
        self._checked = 0
        self._runs = self._new_exits = False
        """Whether the engine runs, and has come to a page without knowing where to stop there."""
        self._exits: dict[int, set[int]] = {}
        """By linear page."""
        self._set_exits()

    def close(self) -> None:
        """Give its frames back."""
        while self._own:
            self._frames.free(self._own.pop())

    def _frame(self) -> int:
        mfn = self._frames.allocate()
        if mfn is None:
            raise MemoryError("the mock host has no frame left")
        return mfn

    def _accessed(self, _uc: Any, access: int, address: int, size: int, _v: int, _d: Any) -> None:
        if self._on_access is not None:
            self._on_access(Seen(KINDS[access], address, size))

    def _set_exits(self) -> None:
        self.engine.uc.ctl_set_exits([one for page in self._exits.values() for one in page])

    def exits_at(self, address: int) -> bool:
        """Whether what is at a linear address may not be the core's to execute."""
        return address in self._exits.get(address // PAGE_SIZE, ())

    def has_code(self, mfn: int) -> bool:
        """Whether a frame was executed."""
        return mfn in self._code

    def has_code_at(self, address: int, mfn: int) -> bool:
        """Whether a frame was executed at a linear page."""
        code = self._code.get(mfn)
        return code is not None and address // PAGE_SIZE in code.pages

    def note_write(self, mfn: int) -> None:
        """The engine is about to write to a frame with code, and looks at each store."""
        self._written.add(mfn)

    def _translated(self, uc: Any, block: Any, _before: Any, _data: Any) -> None:
        """Stop before a block that has got an instruction which the core may not execute."""
        address, end = block.pc, block.pc + block.size
        while self._written and address < end:
            page, offset = divmod(address, PAGE_SIZE)
            count = min(end - address, PAGE_SIZE - offset)
            known = self._exits.get(page, set())
            for mfn in self._written:
                if page in self._code[mfn].pages:
                    # With what follows: at its end any prefix may begin an instruction.
                    end_of_part = offset + count + LONGEST_INSTRUCTION
                    part = bytes(self._frames.peek(mfn)[offset:end_of_part])
                    starts = (at for at in exiting_starts(part) if at < count)
                    if any(address + at not in known for at in starts):
                        self._stale.add(mfn)
                        uc.emu_stop()
            address += count

    def note_code(self, address: int, mfn: int) -> None:
        """Code in this frame is about to be executed at this linear page.

        Raises:
            NewCode: The engine, which runs, does not know yet where to stop there.
        """
        known = self._code.get(mfn)
        page = address // PAGE_SIZE
        if known is not None and known.content != bytes(self._frames.peek(mfn)):
            if self._runs:
                self._stale.add(mfn)
                raise NewCode
            self.forget_code(mfn)
            known = None
        if known is None:
            self.engine.forget_pages()  # it may be writable at another address
            content = bytes(self._frames.peek(mfn))
            known = self._code[mfn] = Code(content, frozenset(exiting_starts(content)), set())
        known.pages.add(page)
        wanted = {page * PAGE_SIZE + at for at in known.exits}
        exits = self._exits.setdefault(page, set())
        if not wanted <= exits:
            exits |= wanted
            if self._runs:
                self._new_exits = True
                raise NewCode
            self._set_exits()

    def forget_code(self, mfn: int) -> None:
        """Take a frame for data until it is executed again."""
        self.engine.forget_code_of(mfn)
        self._written.discard(mfn)
        for page in self._code.pop(mfn).pages:
            self._exits.pop(page, None)  # they are noted again with the code that has them
        self._set_exits()

    def check_code(self) -> None:
        """Forget translations of code that was changed since the engine ran, or by itself."""
        frames, since = self._frames, self._checked
        self._checked = frames.moment
        for mfn, code in [*self._code.items()]:
            may_have_changed = mfn in self._written or frames.may_have_changed(mfn, since)
            if may_have_changed and bytes(frames.peek(mfn)) != code.content:
                self.forget_code(mfn)

    def run(self, rip: int, resolve: Resolve, limit: int) -> Fault | SoftwareInterrupt | None:
        """Let the fast engine run; see :meth:`Engine.run`. :attr:`executed` is how far it came."""
        self.executed = 0
        if bool(limit) is not self._counts:
            self.engine.forget_code()
            self._counts = bool(limit)
        while True:
            self._runs = True
            try:
                return self.engine.run(rip, resolve, limit)
            except (NewCode, ReadsAhead):
                if not (self._new_exits or self._stale):
                    raise
            finally:
                self._runs = False
                self.executed += self.engine.executed
                while self._stale:
                    self.forget_code(self._stale.pop())
                if self._new_exits:
                    self._set_exits()
                    self._new_exits = False
            if self.engine.rip != rip:
                return None

    def step(
        self,
        rip: int,
        linear: int,
        resolve: Resolve,
        on_access: Callable[[Seen], None] | None = None,
    ) -> Fault | SoftwareInterrupt | None:
        """Execute one instruction, and tell what memory it uses before it does."""
        self.stepper.forget_code()
        self.stepper.forget_pages()
        # Nothing after the instruction is read.
        ends = range(linear + 1, linear + LONGEST_INSTRUCTION + 1)
        self.stepper.uc.ctl_set_exits([end & LAST_ADDRESS for end in ends])
        self._on_access = on_access
        try:
            return self.stepper.run(rip, resolve, 1)
        finally:
            self._on_access = None
