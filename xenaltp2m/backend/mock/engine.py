# SPDX-License-Identifier: LGPL-2.1-or-later
"""One Unicorn on the host's memory: its pages, its translations and its registers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from xenaltp2m.abi.x86 import (
    CR0_PE,
    CR0_PG,
    DB,
    EFER_LMA,
    EFER_LME,
    FLAG_RF,
    FLAG_VM,
    GP,
    UD,
    Fault,
    Segment,
    canonical,
)
from xenaltp2m.backend.mock.vcpu import EFER, MSR_REGISTERS, REGISTERS, Vcpu
from xenaltp2m.types import PAGE_SIZE

if TYPE_CHECKING:
    from xenaltp2m.backend.mock.machine import Frames
    from xenaltp2m.backend.mock.p2m import P2m

from xenaltp2m.backend.mock.engine_state import (
    EXCEPTION_NUMBER,
    GENERAL,
    REST,
    SEGMENT,
    SEGMENT_FIELDS,
    SEGMENTS,
    Places,
    State,
    attributes_of,
    not_found,
    offset_of_mark,
)

_HIDDEN = (1 << 63) - PAGE_SIZE
"""The linear page of the core's own code. It is not canonical: no guest may use it."""
_INVALIDATE = bytes.fromhex("488b06 4883c608 0f0138 e2f4 f4")
"""1: mov (%rsi), %rax; add $8, %rsi; invlpg (%rax); loop 1b; hlt. Unicorn forgets a page in no
other way."""
UNDEFINED = b"\x06"
"""What the page has for a guest that jumps there: an instruction that 64-bit mode has not."""
_LIST = 0x100
"""Where in the frame the addresses for that are."""
_MOST_FORGOTTEN = (PAGE_SIZE - _LIST) // 8 - 1
LONGEST_INSTRUCTION = 15
_INVALID_INSTRUCTION, _EXCEPTION = 10, 21
"""``UC_ERR_*``."""
KINDS = {16: "r", 17: "w", 18: "x"}
"""``UC_MEM_*``."""
_PERMISSIONS = {"r": 1, "w": 2, "x": 4}
_ELSEWHERE = {"tsc", "msr_efer", "fs_base", "gs_base"}
_MSRS = {name: msr for msr, name in MSR_REGISTERS.items() if name not in _ELSEWHERE}
"""MSRs that neither the segments nor the mode have, by their registers."""
_FS_BASE, _SHADOW_GS = 0xC0000100, 0xC0000102
_FCW_AT_RESET, _MXCSR_AT_RESET = 0x40, 0x1F80
"""SDM 3A, table 10-1; ``vcpu_reset_fpu``."""
_ENGINE_SIZE = 0x800
"""So much of Unicorn's own structure is looked through: it is larger."""
_BEHIND_DR0 = 8 * 8 + 4 * 8
"""Debug registers and what is set in them; then comes ``old_exception``."""


class GaveUp(RuntimeError):  # noqa: N818 - what it did
    """Unicorn ended for a reason that no guest should be able to cause."""


class ReadsAhead(Exception):  # noqa: N818 - what it does
    """Unicorn wants code of the next page, which it may not have, before it executes any here.

    :meth:`Core.step` tells whether the instruction needs it.
    """


class NewCode(Exception):  # noqa: N818 - what it is about
    """Unicorn has come to a page without knowing where to stop there.

    Unicorn gets the hooks between its runs only: within one it may be walking the list
    (g_tree_foreach, softmmu/cpus.c, Unicorn 2.1), or be translating into the page already.
    """


class WritesCode(Exception):  # noqa: N818 - what it does
    """The instruction stores into a frame with code, where it cannot be executed itself.

    Unicorn would look for what it has translated of it at the first such store only.
    """


class Place(NamedTuple):
    """What a page of linear addresses is: a frame, and some of the rights "rwx"."""

    mfn: int
    rights: str
    gfns: Collection[int] = ()
    """The pages that this depends on: itself, and those of the guest's own tables."""
    entries: Mapping[int, bytes] = {}
    """And the entries that led there, by where they are in the host's memory."""


class Where(NamedTuple):
    """Who runs an engine, in which table: what the answers it remembers depend on."""

    processor: object
    table: P2m
    generation: int


class SoftwareInterrupt(NamedTuple):
    """An INT n that Unicorn met on its own; rip is after it."""

    vector: int


Resolve = Callable[[int, str, bool], Place]
"""Finds a page: any linear address in it; "r", "w" or "x"; whether it is for privilege level 3."""


@dataclass
class Seen:
    """A memory access that an instruction made."""

    kind: str
    address: int
    size: int


def import_unicorn() -> Any:
    """Return the package unicorn.

    Raises:
        ImportError: It is missing, or too old.
    """
    try:
        unicorn: Any = import_module("unicorn")  # whose types are not told
    except ImportError as error:
        raise ImportError(
            "machine code needs the package unicorn: pip install 'xenaltp2m[sim]'"
        ) from error
    if not hasattr(unicorn, "unicorn_py3"):  # as in Debian 12
        raise ImportError(
            f"machine code needs unicorn 2.1 or later, here is {unicorn.__version__}: "
            "pip install 'xenaltp2m[sim]'"
        )
    return unicorn


class Engine:
    """One Unicorn, with the host's memory in it."""

    def __init__(self, frames: Frames, hidden: int) -> None:
        unicorn = import_unicorn()
        self._library = unicorn.unicorn_py3.unicorn.uclib
        self._error = unicorn.UcError
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        x86, const = unicorn.x86_const, unicorn.unicorn_const
        self._x86 = x86
        self._descriptor_tables = {"gdtr": x86.UC_X86_REG_GDTR, "idtr": x86.UC_X86_REG_IDTR}
        self._system_segments = {"tr": x86.UC_X86_REG_TR, "ldtr": x86.UC_X86_REG_LDTR}
        memory = ctypes.addressof(ctypes.c_char.from_buffer(frames.memory))
        self.uc.mem_map_ptr(0, len(frames.memory), unicorn.UC_PROT_ALL, memory)
        self.uc.ctl_set_tlb_mode(const.UC_TLB_VIRTUAL)
        self._frames, self._hidden = frames, hidden
        self._pages_are_wrong = self._invalidates = False
        self.remembered: dict[int, Place] = {}
        """The places that were passed to Unicorn, by the address of the linear page."""
        self._stores: dict[int, int] = {}
        """Hooks, by the frames with code that may be written to."""
        self._writes = const.UC_HOOK_MEM_WRITE
        self._resolve: Resolve | None = None
        self._raised: BaseException | None = None
        self._interrupt: int | None = None
        self._no_code: tuple[int, BaseException] | None = None
        self._limit = 0
        """How many instructions the run that is on may execute, where it counts."""
        self._counts = 0
        """As many instructions as anything takes, where the last run counted."""
        self.reads_ahead = True
        """Whether it may read code after the one instruction that it executes."""
        self._broke_off = False
        """Whether the last run counted, and ended within an instruction."""
        self._flush_command = ctypes.c_int(const.UC_CTL_TLB_FLUSH | const.UC_CTL_IO_WRITE << 30)
        self.uc.hook_add(const.UC_HOOK_TLB_FILL, self._fill)
        self.uc.hook_add(const.UC_HOOK_INTR, self._interrupted)
        self._value = ctypes.c_uint64()
        self._long_mode = self.uc.context_save()
        self._counter, self._most = self._find_counter()
        self.executed = 0
        """Instructions, or repetitions of one, of the last run that counted."""
        self._reset()
        self.initial = self.uc.context_save()
        self._places = self._find_places()
        self._now = self.new_state()
        """A copy of what Unicorn has, for what it cannot be asked for."""

    def _reset(self) -> None:
        """Leave long mode, in which Unicorn begins and a PC does not."""
        uc, x86 = self.uc, self._x86
        uc.reg_write(x86.UC_X86_REG_CR0, CR0_PG | CR0_PE | 0x10)
        uc.reg_write(x86.UC_X86_REG_CR0, CR0_PE | 0x10)
        uc.msr_write(EFER, 0)
        uc.reg_write(x86.UC_X86_REG_CR4, 0)
        uc.reg_write(x86.UC_X86_REG_FPCW, _FCW_AT_RESET)
        uc.reg_write(x86.UC_X86_REG_MXCSR, _MXCSR_AT_RESET)

    # Memory.

    def _fill(self, _uc: Any, address: int, access: int, entry: Any, _data: Any) -> bool:
        if self._resolve is None or self._raised is not None or self._no_code:
            return self._anything(address, access, entry)
        if KINDS[access] == "x" and self._limit and self._counter.value >= self._limit:
            return self._anything(address, access, entry)  # it looks, and stops
        try:
            place = self._resolve(address, KINDS[access], self._user)
        except BaseException as raised:  # noqa: BLE001 - C is between here and who handles it
            if KINDS[access] != "x":
                self._raised = raised
                return False
            if not 0 <= address - self.rip_va // PAGE_SIZE * PAGE_SIZE <= PAGE_SIZE:
                return self._anything(address, access, entry)
            self._no_code = address, raised
            return False
        page = address & -PAGE_SIZE
        self.remembered[page] = place
        if self._counts and KINDS[access] != "x":
            self._settle_flags()
            if "w" in place.rights:
                self._look_at_stores(page)
        entry.paddr = place.mfn * PAGE_SIZE
        entry.perms = sum(_PERMISSIONS[right] for right in place.rights)
        return True

    def _settle_flags(self) -> None:
        self._now.settle_flags()
        self.uc.context_restore(self._now.saved)

    def _look_at_stores(self, page: int) -> None:
        """Have :meth:`_stored` told of stores to code, and of those that may reach over into it."""
        for at in (page - PAGE_SIZE, page):
            place = self.remembered.get(at)
            if place is None or place.mfn in self._stores:
                continue
            if self._is_changing_code(at) or self._is_changing_code(at + PAGE_SIZE):
                first = place.mfn * PAGE_SIZE
                self._stores[place.mfn] = self.uc.hook_add(
                    self._writes, self._stored, begin=first, end=first + PAGE_SIZE - 1
                )
        if self._is_changing_code(page):
            self._leave_block()

    def _is_changing_code(self, page: int) -> bool:
        place = self.remembered.get(page)
        return place is not None and "w" in place.rights and "x" in place.rights

    def _stored(self, _uc: Any, _access: int, address: int, size: int, _v: int, _d: Any) -> None:
        """Leave the block of code that is executed before a store may change it.

        Unicorn would leave it within the store, and lose the arithmetic flags where it counts
        (tb_invalidate_phys_page_range__locked, cpu_restore_state_from_tb; 2.1.4).
        """
        if not self._counts:
            return
        self.uc.context_update(self._now.saved)
        self._settle_flags()
        mfn, offset = divmod(address, PAGE_SIZE)
        page = self._now.rip_va & -PAGE_SIZE
        here, behind = self.remembered.get(page), self.remembered.get(page + PAGE_SIZE)
        if (
            offset + size > PAGE_SIZE
            or (here is not None and here.mfn == mfn)
            or (behind is not None and behind.mfn == mfn and offset < LONGEST_INSTRUCTION)
        ):
            self._leave_block()

    def _leave_block(self) -> None:
        """End the run after the instruction that is executed, and forget its translation."""
        self.uc.ctl_flush_tb()  # not a part, which would have it look up pages amid the store
        # Not emu_stop, which ends it within the instruction (check_exit_request).
        self._limit = self._most.value = self._counter.value

    def _anything(self, address: int, access: int, entry: Any) -> bool:
        """Let Unicorn have what it asks for after the end.

        When it stops it looks up every page with an address to stop at; an answer of no would
        have it jump back into what has ended.
        """
        entry.paddr, entry.perms = self._hidden * PAGE_SIZE, _PERMISSIONS[KINDS[access]]
        self._pages_are_wrong |= not self._invalidates or address != _HIDDEN
        return True

    def _mend_pages(self) -> None:
        if self._pages_are_wrong:
            self.forget_pages()
            self._pages_are_wrong = False

    @property
    def _user(self) -> bool:
        """Whether the CPU is at privilege level 3; instructions change that while it runs."""
        self.uc.context_update(self._now.saved)
        return self._now.privilege == 3

    def _register(self, register: int) -> int:
        """Read one of up to 64 bits; faster than what the package offers."""
        self._library.uc_reg_read(self.uc._uch, register, ctypes.byref(self._value))  # noqa: SLF001 - the engine's handle
        return self._value.value

    def forget_pages(self) -> None:
        """Ask again for each page."""
        status = self._library.uc_ctl(self.uc._uch, self._flush_command)  # noqa: SLF001 - the engine's handle
        assert status == 0, status
        self.remembered.clear()
        while self._stores:
            self.uc.hook_del(self._stores.popitem()[1])

    def forget(self, pages: Collection[int]) -> None:
        """Ask again for some, if they are used."""
        if len(pages) > _MOST_FORGOTTEN:
            self.forget_pages()
        elif pages:
            self._invalidate(pages)
            for page in pages:
                self.remembered.pop(page, None)

    def _invalidate(self, pages: Collection[int]) -> None:
        addresses = struct.pack(f"<{len(pages) + 1}Q", *pages, _HIDDEN)
        own = _INVALIDATE.ljust(_LIST) + addresses
        frame = self._frames.page(self._hidden)
        frame[: len(own)] = own
        self.uc.context_restore(self._long_mode)
        # With VM set, as no guest can in long mode, none comes to the code translated here.
        self.uc.reg_write(self._x86.UC_X86_REG_RFLAGS, FLAG_VM | 2)
        self.uc.reg_write(self._x86.UC_X86_REG_RSI, _HIDDEN + _LIST)
        self.uc.reg_write(self._x86.UC_X86_REG_RCX, len(pages) + 1)
        self._invalidates = True
        try:
            self.uc.emu_start(_HIDDEN, 0, count=self._counts)
        finally:
            self._invalidates = False
            frame[: len(own)] = UNDEFINED * len(own)
        if self._register(self._x86.UC_X86_REG_RCX):
            raise GaveUp("Unicorn did not forget pages")
        self._mend_pages()

    def forget_code(self) -> None:
        """Translate all code again."""
        self.uc.ctl_flush_tb()

    def forget_code_of(self, mfn: int) -> None:
        """Translate the code of one frame again."""
        self.forget_pages()
        self._resolve, self._raised, self._no_code = lambda *_: Place(mfn, "x"), None, None
        try:  # Unicorn takes an address that it has not looked up: any
            self.uc.ctl_remove_cache(_HIDDEN, _HIDDEN + PAGE_SIZE)
        finally:
            self._resolve = None
            self.forget_pages()

    def _interrupted(self, uc: Any, vector: int, _data: Any) -> None:
        self._interrupt = vector
        uc.emu_stop()

    # Execution.

    def _find_counter(self) -> tuple[ctypes.c_uint64, ctypes.c_uint64]:
        """Find where Unicorn counts instructions, and how many it is to execute.

        They are ``emu_counter`` and ``emu_count``; it executes some.
        """
        code, limit = b"\x90\x90\x90\xf4", 0x1122_3344
        frame = self._frames.page(self._hidden)
        frame[: len(code)] = code
        self._invalidates = True
        self.uc.emu_start(_HIDDEN, 0, count=limit)
        self._invalidates = False
        frame[: len(code)] = UNDEFINED * len(code)
        self.forget_code()
        self.forget_pages()
        engine = ctypes.cast(self.uc._uch, ctypes.c_void_p).value or 0  # noqa: SLF001 - the engine's handle
        at = ctypes.string_at(engine, _ENGINE_SIZE).find(struct.pack("<QQ", len(code), limit))
        if at < 0:
            raise not_found()
        counter, most = (
            ctypes.c_uint64.from_address(engine + at + 8 * number) for number in (0, 1)
        )
        return counter, most

    def run(self, rip: int, resolve: Resolve, limit: int) -> Fault | SoftwareInterrupt | None:
        """Execute up to ``limit`` instructions, or without a limit (0); None: nothing happened.

        Raises:
            BaseException: What ``resolve`` raised; rip is that of the instruction.
        """
        self._resolve, self._raised, self._interrupt, self._no_code = resolve, None, None, None
        self._limit, self._counts = limit, limit and 4 * _MOST_FORGOTTEN
        errno, self._broke_off = 0, False
        try:
            self.uc.emu_start(rip, 0, count=limit)
        except self._error as error:
            errno = error.errno
        finally:
            limit, self._limit = self._limit, 0
            self._resolve = None
            self._mend_pages()
        faulted = self._raised is not None or self._interrupt not in (None, DB)
        # It counts what it begins, also the one at which it stops after so many.
        begun = self._counter.value if limit else 0
        self.executed = min(begun - (faulted or errno == _INVALID_INSTRUCTION), limit)
        self._broke_off = bool(limit) and faulted
        if self._raised is not None:
            raise self._raised
        if self._no_code is not None and self._interrupt != DB:
            page, raised = self._no_code  # perhaps of what comes after the end
            started, now = self.rip == rip, self.rip_va
            if page <= now < page + PAGE_SIZE and (started or limit != 1):
                raise raised
            if started and now < page:
                raise ReadsAhead if self.reads_ahead else raised
        if self._interrupt is not None:
            return SoftwareInterrupt(self._interrupt)
        if errno == _INVALID_INSTRUCTION:
            return Fault(UD) if canonical(self.rip) else Fault(GP, 0)
        if errno and not (errno == _EXCEPTION and self._no_code):
            raise GaveUp(f"Unicorn gave up with error {errno} at {self.rip:#x}")
        return None

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        return self._register(self._x86.UC_X86_REG_RIP)

    @property
    def rip_va(self) -> int:
        """Where the instruction is; far transfers change the code segment while it runs."""
        self.uc.context_update(self._now.saved)
        return self._now.rip_va

    # Registers.

    def new_state(self) -> State:
        """Return the state of a CPU that was reset, in protected mode."""
        return State(self.initial, self._places)

    def _find_places(self) -> Places:
        """Find where Unicorn keeps registers in what it saves of a CPU, by writing some."""
        uc, x86 = self.uc, self._x86
        marks = {"regs": x86.UC_X86_REG_RAX, "rip": x86.UC_X86_REG_RIP, "dr0": x86.UC_X86_REG_DR0}
        kept = uc.context_save()
        found = {}
        for number, (name, register) in enumerate(marks.items()):
            mark = 0x1122_3344_5566_7700 + number
            uc.reg_write(register, mark)
            found[name] = offset_of_mark(uc.context_save(), mark)
        uc.msr_write(_FS_BASE, mark + 1)
        fs_base = offset_of_mark(uc.context_save(), mark + 1)
        uc.context_restore(kept)
        segments = fs_base - 8 - SEGMENTS.index("fs") * SEGMENT.size
        exception = found["dr0"] + _BEHIND_DR0
        raw = ctypes.string_at(kept.context, kept.size)
        if EXCEPTION_NUMBER.unpack_from(raw, exception) != (-1,):
            raise not_found()
        return Places(found["regs"], found["rip"], segments - 8, segments, exception)

    def load(self, vcpu: Vcpu, state: State, held: bytes) -> None:
        """Go on with a vCPU: its state, changed where its context is not as ``held`` has it."""
        now, uc, x86 = vcpu.context, self.uc, self._x86
        self._broke_off = False

        def changed(*names: str) -> bool:
            return any(now[place] != held[place] for place in map(REGISTERS.__getitem__, names))

        if now[GENERAL] != held[GENERAL]:
            state.put_general(vcpu)
        rest_changed = now[REST] != held[REST]
        if (rest_changed and changed(*SEGMENT_FIELDS)) or state.wraps:
            state.put_segments(vcpu)
        uc.context_restore(state.saved)
        self._value.value = vcpu.register("rflags") & ~FLAG_RF  # which is over with the next
        self._library.uc_reg_write(uc._uch, x86.UC_X86_REG_RFLAGS, ctypes.byref(self._value))  # noqa: SLF001 - the engine's handle
        if not rest_changed:
            return
        if changed("cr0", "cr3", "cr4", "msr_efer"):
            self._load_paging(vcpu, state)
        if changed("cr2"):
            uc.reg_write(x86.UC_X86_REG_CR2, vcpu.register("cr2"))
        self._load_tables(vcpu, changed)
        for name, msr in _MSRS.items():
            if changed(name):
                uc.msr_write(msr, vcpu.register(name))

    def _load_paging(self, vcpu: Vcpu, state: State) -> None:
        """Load EFER and CR0, CR3 and CR4; what segments mean depends on them."""
        uc, x86, efer = self.uc, self._x86, vcpu.register("msr_efer")
        uc.reg_write(x86.UC_X86_REG_CR4, vcpu.register("cr4"))
        uc.msr_write(EFER, efer & ~EFER_LMA)
        assert efer & EFER_LME or not efer & EFER_LMA
        uc.reg_write(x86.UC_X86_REG_CR0, vcpu.register("cr0"))
        uc.reg_write(x86.UC_X86_REG_CR3, vcpu.register("cr3"))
        uc.context_update(state.saved)
        state.put_segments(vcpu)
        uc.context_restore(state.saved)

    def _load_tables(self, vcpu: Vcpu, changed: Callable[..., bool]) -> None:
        """Load the descriptor tables' registers, those that changed."""
        uc = self.uc
        for name, register in self._descriptor_tables.items():
            if changed(f"{name}_base", f"{name}_limit"):
                base, limit = vcpu.register(f"{name}_base"), vcpu.register(f"{name}_limit")
                uc.reg_write(register, (0, base, limit, 0))
        for name, register in self._system_segments.items():
            if changed(*(f"{name}_{part}" for part in ("sel", "base", "limit", "arbytes"))):
                parts = [vcpu.register(f"{name}_{part}") for part in ("sel", "base", "limit")]
                uc.reg_write(register, (*parts, vcpu.register(f"{name}_arbytes") << 8))

    def save(self, vcpu: Vcpu, state: State) -> None:
        """Take the registers back."""
        self.uc.context_update(state.saved)
        if self._broke_off:
            state.mend_flags()
            self.uc.context_restore(state.saved)
        state.take(vcpu)
        flags = self._register(self._x86.UC_X86_REG_RFLAGS)
        if self.reads_ahead:
            flags &= ~FLAG_RF  # which only the last instruction can have set: IRET
        vcpu.set_register("rflags", flags)

    def save_tables(self, vcpu: Vcpu, state: State) -> None:
        """Take back what only rare instructions change: cr2, descriptor tables, MSRs."""
        uc = self.uc
        vcpu.set_register("cr2", self._register(self._x86.UC_X86_REG_CR2))
        if vcpu.register("msr_efer") & EFER_LMA:
            vcpu.set_register("shadow_gs", uc.msr_read(_SHADOW_GS))
        if not state.tables_changed():
            return
        for name, register in self._descriptor_tables.items():
            _, base, limit, _ = uc.reg_read(register)
            vcpu.set_register(f"{name}_base", base)
            vcpu.set_register(f"{name}_limit", limit)
        for name, register in self._system_segments.items():
            selector, base, limit, flags = uc.reg_read(register)
            if selector != vcpu.register(f"{name}_sel"):
                vcpu.set_register(f"{name}_sel", selector)
                vcpu.set_segment(name, Segment(base, limit, attributes_of(flags)))
