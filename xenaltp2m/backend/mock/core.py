# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machine code on the mock's memory: a CPU core that Unicorn emulates, without any of Xen's rules.

The core sees the host's frames. For each page that it touches it asks which frame the page is and
what may be done with it, and remembers the answer until told to forget; so a view, its remaps and
its restrictions come from the one model there is. Instructions that leave guest mode are never
executed here: the core stops before them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.backend.mock.vcpu import CR0_PE, CR0_PG, UD, Vcpu
from xenaltp2m.backend.mock.x86 import (
    EFER_LMA,
    EFER_LME,
    Fault,
    Segment,
    descriptor,
    exiting_starts,
    segment_of,
)
from xenaltp2m.types import PAGE_SIZE

if TYPE_CHECKING:
    from xenaltp2m.backend.mock.machine import Frames

_UNTIL = 1 << 63
"""Where no guest's code can be: Unicorn wants an address to stop at."""
_HIDDEN = _UNTIL - (1 << 20)
"""Linear addresses from here to :data:`_UNTIL` are the core's own, and no guest's."""
_INVALID_INSTRUCTION, _EXCEPTION = 10, 21
"""``UC_ERR_*``."""
_KINDS = {16: "r", 17: "w", 18: "x"}
"""``UC_MEM_*``."""
_PERMISSIONS = {"r": 1, "w": 2, "x": 4}
_ALL = 7
_CONTEXT_SIZE: Final = HVM_CPU.size
_GENERAL = slice(HVM_CPU.fields["rax"].offset, HVM_CPU.fields["rflags"].offset + 8)
_PRESENT, _PRIVILEGE, _FLAT_DATA = 1 << 7, 3 << 5, 0xC93
SEGMENTS = ("ss", "cs", "ds", "es", "fs", "gs")  # ss first: it carries the privilege level
_MSRS = {
    "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176, "msr_star": 0xC0000081,
    "msr_lstar": 0xC0000082, "msr_cstar": 0xC0000083, "msr_syscall_mask": 0xC0000084,
    "shadow_gs": 0xC0000102, "msr_tsc_aux": 0xC0000103,
}  # fmt: skip
_EFER, _FS_BASE, _GS_BASE, _SHADOW_GS = 0xC0000080, 0xC0000100, 0xC0000101, 0xC0000102


class Place(NamedTuple):
    """What a page of linear addresses is: a frame, and some of the rights "rwx"."""

    mfn: int
    rights: str


class Refusal(NamedTuple):
    """A page that may not be used so; ``address`` is anywhere in it."""

    address: int
    kind: str


class SoftwareInterrupt(NamedTuple):
    """INT n that Unicorn came upon by itself; rip is behind it."""

    vector: int


Resolve = Callable[[int, str], Place]
"""Finds a page: any linear address in it, "r", "w" or "x". May raise what :meth:`Core.run` raises."""


@dataclass
class Seen:
    """A memory access that an instruction made."""

    kind: str
    address: int
    size: int


def _unicorn() -> Any:
    try:
        import unicorn
    except ImportError as error:
        raise ImportError(
            "machine code needs the package unicorn: pip install 'xenaltp2m[sim]'"
        ) from error
    return unicorn


class Engine:
    """One Unicorn, with the host's memory in it."""

    def __init__(self, frames: Frames, hidden: int) -> None:
        unicorn = _unicorn()
        self._library = unicorn.unicorn_py3.unicorn.uclib
        self._error = unicorn.UcError
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        x86, const = unicorn.x86_const, unicorn.unicorn_const
        self._x86 = x86
        address, size = frames.whole
        self.uc.mem_map_ptr(0, size, unicorn.UC_PROT_ALL, address)
        self.uc.ctl_set_tlb_mode(const.UC_TLB_VIRTUAL)
        self._frames, self._hidden = frames, hidden
        self._resolve: Resolve | None = None
        self._raised: BaseException | None = None
        self._interrupt: int | None = None
        self._flush_command = ctypes.c_int(const.UC_CTL_TLB_FLUSH | const.UC_CTL_IO_WRITE << 30)
        self.uc.hook_add(const.UC_HOOK_TLB_FILL, self._fill)
        self.uc.hook_add(const.UC_HOOK_INTR, self._interrupted)
        names = [
            *_names("RAX RBX RCX RDX RBP RSI RDI RSP R8 R9 R10 R11 R12 R13 R14 R15 RIP"),
            "RFLAGS",
        ]
        self._general = _Batch(
            self._library, self.uc, [getattr(x86, f"UC_X86_REG_{n}") for n in names]
        )
        selectors = [getattr(x86, f"UC_X86_REG_{name.upper()}") for name in SEGMENTS]
        self._rest = _Batch(
            self._library,
            self.uc,
            [x86.UC_X86_REG_CR2, x86.UC_X86_REG_FS_BASE, x86.UC_X86_REG_GS_BASE, *selectors],
        )
        self._selector_ids = dict(zip(SEGMENTS, selectors, strict=True))
        # Unicorn begins in long mode; a PC begins without.
        self.uc.reg_write(x86.UC_X86_REG_CR0, CR0_PG | CR0_PE | 0x10)
        self.uc.reg_write(x86.UC_X86_REG_CR0, CR0_PE | 0x10)
        self.uc.msr_write(_EFER, 0)
        self.uc.reg_write(x86.UC_X86_REG_CR4, 0)
        self.initial = self.uc.context_save()

    # Memory.

    def _fill(self, _uc: Any, address: int, access: int, entry: Any, _data: Any) -> bool:
        if _HIDDEN <= address < _UNTIL:
            entry.paddr, entry.perms = self._hidden * PAGE_SIZE, _ALL
            return True
        if self._resolve is None:
            return False
        try:
            place = self._resolve(address, _KINDS[access])
        except BaseException as raised:  # noqa: BLE001 - C is between here and who handles it
            self._raised = raised
            return False
        entry.paddr = place.mfn * PAGE_SIZE
        entry.perms = sum(_PERMISSIONS[right] for right in place.rights)
        return True

    def forget_pages(self) -> None:
        """Ask again for each page."""
        status = self._library.uc_ctl(self.uc._uch, self._flush_command)
        assert status == 0, status

    def forget_code(self) -> None:
        """Translate all code anew."""
        self.uc.ctl_flush_tb()

    def _interrupted(self, uc: Any, vector: int, _data: Any) -> None:
        self._interrupt = vector
        uc.emu_stop()

    # Execution.

    def run(self, rip: int, resolve: Resolve, limit: int) -> Fault | SoftwareInterrupt | None:
        """Execute up to ``limit`` instructions, or without a limit (0); None: nothing happened.

        Raises:
            BaseException: What ``resolve`` raised; rip is that of the instruction.
        """
        self._resolve, self._raised, self._interrupt = resolve, None, None
        errno = 0
        try:
            self.uc.emu_start(rip, _UNTIL, count=limit)
        except self._error as error:
            errno = error.errno
        finally:
            self._resolve = None
        if self._raised is not None:
            raise self._raised
        if self._interrupt is not None:
            return SoftwareInterrupt(self._interrupt)
        if errno in (_INVALID_INSTRUCTION, _EXCEPTION):
            return Fault(UD)
        if errno:
            raise RuntimeError(f"Unicorn gave up with error {errno} at {self.rip:#x}")
        return None

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        return int(self.uc.reg_read(self._x86.UC_X86_REG_RIP))

    # Registers.

    def load(self, vcpu: Vcpu, held: bytes, selectors: list[int]) -> None:
        """Give the engine what of a vCPU's registers is not as ``held`` has it."""
        now, uc, x86 = vcpu.context, self.uc, self._x86
        if now[_GENERAL] != held[_GENERAL]:
            self._general.write(bytes(now[_GENERAL]))

        def changed(*names: str) -> bool:
            return any(now[place] != held[place] for place in map(_slice, names))

        if changed("cr0", "cr3", "cr4", "msr_efer"):
            efer = vcpu.register("msr_efer")
            uc.reg_write(x86.UC_X86_REG_CR4, vcpu.register("cr4"))
            uc.msr_write(_EFER, efer & ~EFER_LMA)
            if efer & EFER_LMA:
                assert efer & EFER_LME
            uc.reg_write(x86.UC_X86_REG_CR0, vcpu.register("cr0"))
            uc.reg_write(x86.UC_X86_REG_CR3, vcpu.register("cr3"))
        if changed("cr2"):
            uc.reg_write(x86.UC_X86_REG_CR2, vcpu.register("cr2"))
        for at, name in enumerate(SEGMENTS):
            if changed(*(f"{name}_{part}" for part in ("sel", "base", "limit", "arbytes"))):
                selectors[at] = self._load_segment(vcpu, name)
        for name, register in (("gdtr", x86.UC_X86_REG_GDTR), ("idtr", x86.UC_X86_REG_IDTR)):
            if changed(f"{name}_base", f"{name}_limit"):
                base, limit = vcpu.register(f"{name}_base"), vcpu.register(f"{name}_limit")
                uc.reg_write(register, (0, base, limit, 0))
        for name, register in (("tr", x86.UC_X86_REG_TR), ("ldtr", x86.UC_X86_REG_LDTR)):
            if changed(*(f"{name}_{part}" for part in ("sel", "base", "limit", "arbytes"))):
                parts = [vcpu.register(f"{name}_{part}") for part in ("sel", "base", "limit")]
                uc.reg_write(register, (*parts, vcpu.register(f"{name}_arbytes") << 8))
        for name, msr in _MSRS.items():
            if changed(name):
                uc.msr_write(msr, vcpu.register(name))

    def _load_segment(self, vcpu: Vcpu, name: str) -> int:
        """Load a segment register, whatever the guest's own tables say; return its selector."""
        uc, x86 = self.uc, self._x86
        segment = segment_in(vcpu, name)
        selector = vcpu.register(f"{name}_sel")
        if name == "ss" and not segment.attributes & _PRESENT:
            segment = Segment(0, 0xFFFF_FFFF, _FLAT_DATA | segment.attributes & _PRIVILEGE)
        if not segment.attributes & _PRESENT:  # unusable
            uc.reg_write(self._selector_ids[name], 0)
            return 0
        loaded = selector & ~4
        if loaded < 4:  # usable with a null selector, as a PVH guest begins
            loaded = 0xFF8 | segment.privilege
        table = self._frames.page(self._hidden)
        at = loaded & 0xFF8
        table[at : at + 8] = descriptor(segment._replace(base=segment.base & 0xFFFF_FFFF)).to_bytes(
            8, "little"
        )
        own = uc.reg_read(x86.UC_X86_REG_GDTR)
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, _HIDDEN, 0xFFFF, 0))
        try:
            uc.reg_write(self._selector_ids[name], loaded)
        finally:
            uc.reg_write(x86.UC_X86_REG_GDTR, own)
        if name in ("fs", "gs") and segment.base >> 32:
            uc.msr_write(_FS_BASE if name == "fs" else _GS_BASE, segment.base)
        return loaded

    def save(self, vcpu: Vcpu, selectors: list[int], load: Callable[[int, int], bytes]) -> None:
        """Take the registers back; ``load`` reads the guest's linear memory."""
        context = vcpu.context
        context[_GENERAL] = self._general.read()
        rest = self._rest.read().cast("Q")
        vcpu.set_register("cr2", rest[0])
        for at, name in enumerate(SEGMENTS):
            selector = rest[3 + at] & 0xFFFF
            if selector != selectors[at]:
                selectors[at] = selector
                self._saw_segment(vcpu, name, selector, load)
        if vcpu.register("msr_efer") & EFER_LMA:
            vcpu.set_register("fs_base", rest[1])
            vcpu.set_register("gs_base", rest[2])

    def _saw_segment(
        self, vcpu: Vcpu, name: str, selector: int, load: Callable[[int, int], bytes]
    ) -> None:
        segment = Segment(0, 0, 0)
        if selector & ~3:
            table = "ldtr_base" if selector & 4 else "gdtr_base"
            raw = load(vcpu.register(table) + (selector & ~7), 8)
            segment = segment_of(int.from_bytes(raw, "little") | 1 << 40)  # it is marked accessed
        vcpu.set_register(f"{name}_sel", selector)
        put_segment(vcpu, name, segment)

    def save_tables(self, vcpu: Vcpu) -> None:
        """Take back what only rare instructions change: descriptor tables, MSRs."""
        uc, x86 = self.uc, self._x86
        for name, register in (("gdtr", x86.UC_X86_REG_GDTR), ("idtr", x86.UC_X86_REG_IDTR)):
            _, base, limit, _ = uc.reg_read(register)
            vcpu.set_register(f"{name}_base", base)
            vcpu.set_register(f"{name}_limit", limit)
        for name, register in (("tr", x86.UC_X86_REG_TR), ("ldtr", x86.UC_X86_REG_LDTR)):
            selector, base, limit, flags = uc.reg_read(register)
            if selector != vcpu.register(f"{name}_sel"):
                vcpu.set_register(f"{name}_sel", selector)
                put_segment(vcpu, name, Segment(base, limit, flags >> 8 & 0xF0FF))
        if vcpu.register("msr_efer") & EFER_LMA:
            vcpu.set_register("shadow_gs", uc.msr_read(_SHADOW_GS))


class _Batch:
    """Registers that are read and written at once: Unicorn's own binding takes 7 µs for each."""

    def __init__(self, library: Any, uc: Any, registers: list[int]) -> None:
        count = len(registers)
        self._library, self._handle, self._count = library, uc._uch, count
        self._ids = (ctypes.c_int * count)(*registers)
        self._values = (ctypes.c_uint64 * count)()
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * count)(*(base + 8 * at for at in range(count)))
        self._bytes = memoryview(self._values).cast("B")

    def read(self) -> memoryview:
        status = self._library.uc_reg_read_batch(
            self._handle, self._ids, self._pointers, self._count
        )
        assert status == 0, status
        return self._bytes

    def write(self, values: bytes) -> None:
        self._bytes[:] = values
        status = self._library.uc_reg_write_batch(
            self._handle, self._ids, self._pointers, self._count
        )
        assert status == 0, status


def segment_in(vcpu: Vcpu, name: str) -> Segment:
    """Return the hidden part of a segment register."""
    return Segment(*(vcpu.register(f"{name}_{part}") for part in ("base", "limit", "arbytes")))


def put_segment(vcpu: Vcpu, name: str, segment: Segment) -> None:
    """Set the hidden part of a segment register."""
    for part, value in zip(("base", "limit", "arbytes"), segment, strict=True):
        vcpu.set_register(f"{name}_{part}", value)


def _names(text: str) -> list[str]:
    return text.split()


def _slice(name: str) -> slice:
    offset, width = HVM_CPU.fields[name]
    return slice(offset, offset + width)


class Core:
    """Two engines that share memory: one runs on, the other executes single instructions.

    Only the second reports what memory an instruction uses, which slows it down; and Unicorn would
    have to translate everything anew to change between counting instructions and not.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        hidden, self.scratch, self.marker, self.nothing = (self._frame() for _ in range(4))
        """Frames of the core's own: segments, two for what leads nowhere, one for holes."""
        self.where: object = None
        """What the engine's pages depend on, as they were resolved."""
        self.engine = Engine(frames, hidden)
        self.stepper = Engine(frames, hidden)
        const = _unicorn().unicorn_const
        self.engine.uc.ctl_exits_enabled(True)
        self.stepper.uc.hook_add(const.UC_HOOK_MEM_READ | const.UC_HOOK_MEM_WRITE, self._accessed)
        self._on_access: Callable[[Seen], None] | None = None
        self._counts = False
        self._code: dict[int, tuple[bytes, frozenset[int]]] = {}
        """Of each frame with code: its bytes when it was translated, and where it may exit."""
        self._checked = 0
        self._exits: dict[int, set[int]] = {}
        """By linear page."""
        self._set_exits()

    def _frame(self) -> int:
        mfn = self._frames.allocate()
        if mfn is None:
            raise MemoryError("the mock host has no frame left")
        return mfn

    def _accessed(self, _uc: Any, access: int, address: int, size: int, _v: int, _d: Any) -> None:
        if self._on_access is not None:
            self._on_access(Seen(_KINDS[access], address, size))

    def _set_exits(self) -> None:
        self.engine.uc.ctl_set_exits(
            [_UNTIL, *(one for page in self._exits.values() for one in page)]
        )

    def exits_at(self, address: int) -> bool:
        """Whether an instruction at a linear address is not the core's to execute, or may not be."""
        return address in self._exits.get(address // PAGE_SIZE, ())

    def note_code(self, address: int, mfn: int, user: bool) -> None:
        """Code in this frame is about to be executed at this linear page."""
        known = self._code.get(mfn)
        page = address // PAGE_SIZE
        if known is None:
            content = bytes(self._frames.peek(mfn))
            known = self._code[mfn] = content, frozenset(exiting_starts(content, user))
        wanted = {page * PAGE_SIZE + at for at in known[1]}
        exits = self._exits.setdefault(page, set())
        if not wanted <= exits:
            exits |= wanted
            self._set_exits()

    def check_code(self) -> None:
        """Forget translations of code that was changed by somebody else than the engine."""
        frames, since = self._frames, self._checked
        self._checked = frames.moment
        stale = [
            mfn
            for mfn, (content, _) in self._code.items()
            if frames.may_have_changed(mfn, since) and frames.peek(mfn) != content
        ]
        for mfn in stale:
            del self._code[mfn]
        if stale:
            self.engine.forget_code()
            self.engine.forget_pages()

    def run(self, rip: int, resolve: Resolve, limit: int) -> Fault | SoftwareInterrupt | None:
        """Let the fast engine run; see :meth:`Engine.run`."""
        if bool(limit) is not self._counts:
            self.engine.forget_code()
            self._counts = bool(limit)
        return self.engine.run(rip, resolve, limit)

    def step(
        self, rip: int, resolve: Resolve, on_access: Callable[[Seen], None] | None = None
    ) -> Fault | SoftwareInterrupt | None:
        """Execute one instruction, and tell what memory it uses before it does."""
        self.stepper.forget_code()
        self.stepper.forget_pages()
        self._on_access = on_access
        try:
            return self.stepper.run(rip, resolve, 1)
        finally:
            self._on_access = None
