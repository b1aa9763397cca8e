# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machine code on the mock's memory: a CPU core that Unicorn emulates, without any of Xen's rules.

The core sees the host's frames. For each page that it touches it asks which frame the page is and
what may be done with it, and remembers the answer until told to forget; so a view, its remaps and
its restrictions come from the one model there is. Instructions that leave guest mode are never
executed here: the core stops before them.
"""

from __future__ import annotations

import copy
import ctypes
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from xenaltp2m.abi.layouts import HVM_CPU
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
    exiting_starts,
)
from xenaltp2m.backend.mock.vcpu import EFER, GENERAL_REGISTERS, MSR_REGISTERS, REGISTERS, Vcpu
from xenaltp2m.types import PAGE_SIZE

if TYPE_CHECKING:
    from xenaltp2m.backend.mock.machine import Frames
    from xenaltp2m.backend.mock.p2m import P2m

_HIDDEN = (1 << 63) - PAGE_SIZE
"""The linear page of the core's own code. It is not canonical: no guest may use it."""
_INVALIDATE = bytes.fromhex("488b06 4883c608 0f0138 e2f4 f4")
"""1: mov (%rsi), %rax; add $8, %rsi; invlpg (%rax); loop 1b; hlt. Unicorn forgets a page in no
other way."""
_UNDEFINED = b"\x06"
"""What the page has for a guest that jumps there: an instruction that 64-bit mode has not."""
_LIST = 0x100
"""Where in the frame the addresses for that are."""
_MOST_FORGOTTEN = (PAGE_SIZE - _LIST) // 8 - 1
LONGEST_INSTRUCTION = 15
_LAST_OF_32_BITS, _LAST_ADDRESS = (1 << 32) - 1, (1 << 64) - 1
_INVALID_INSTRUCTION, _EXCEPTION = 10, 21
"""``UC_ERR_*``."""
_KINDS = {16: "r", 17: "w", 18: "x"}
"""``UC_MEM_*``."""
_PERMISSIONS = {"r": 1, "w": 2, "x": 4}
_GENERAL = slice(HVM_CPU.fields["rax"].offset, HVM_CPU.fields["rip"].offset + 8)
_ELSEWHERE = {"tsc", "msr_efer", "fs_base", "gs_base"}
_MSRS = {name: msr for msr, name in MSR_REGISTERS.items() if name not in _ELSEWHERE}
"""MSRs that neither the segments nor the mode have, by their registers."""
_FS_BASE, _SHADOW_GS = 0xC0000100, 0xC0000102
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""As QEMU numbers them."""
_SEGMENT = struct.Struct("<I4xQII")
"""``SegmentCache``: selector, base, limit, flags."""
_WORDS, _FLAGS, _EXCEPTION_NUMBER = struct.Struct("<16Q"), struct.Struct("<I"), struct.Struct("<i")
_FCW_AT_RESET, _MXCSR_AT_RESET = 0x40, 0x1F80
"""SDM 3A, table 10-1; ``vcpu_reset_fpu``."""
_ENGINE_SIZE = 0x800
"""So much of Unicorn's own structure is looked through: it is larger."""
_BEHIND_DR0 = 8 * 8 + 4 * 8
"""Debug registers and what is set in them; then comes ``old_exception``."""
_HF_CPL, _HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_PE, _HF_LMA, _HF_CS64 = (
    3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 14, 1 << 15,
)  # fmt: skip
"""``hflags``: what of the segments the translator looks at (QEMU, target/i386/cpu.h)."""
_BIG = 1 << 22
_ARITHMETIC, _CC_OP_EFLAGS = 0x8D5, 1
_USABLE, _CODE_OR_DATA = 1 << 7, 1 << 4


class GaveUp(RuntimeError):  # noqa: N818 - what it did
    """Unicorn ended for a reason that no guest should be able to cause."""


class ReadsAhead(Exception):  # noqa: N818 - what it does
    """Unicorn wants code of the next page, which it may not have, before it executes any here.

    :meth:`Core.step` tells whether the instruction needs it.
    """


class NewCode(Exception):  # noqa: N818 - what it is about
    """Unicorn has come to a page without knowing where to stop there.

    It is told between its runs only: within one it may be going through the list (g_tree_foreach,
    softmmu/cpus.c, Unicorn 2.1), or be translating into the page already.
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
    """INT n that Unicorn came upon by itself; rip is behind it."""

    vector: int


Resolve = Callable[[int, str, bool], Place]
"""Finds a page: any linear address in it; "r", "w" or "x"; whether it is for privilege level 3."""


@dataclass
class Seen:
    """A memory access that an instruction made."""

    kind: str
    address: int
    size: int


def _unicorn() -> Any:
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
        unicorn = _unicorn()
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
        """What Unicorn was told, by the address of the linear page."""
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
        """Whether it may look at code behind the one instruction it is to execute."""
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
        # Unicorn begins in long mode; a PC begins without.
        self.uc.reg_write(x86.UC_X86_REG_CR0, CR0_PG | CR0_PE | 0x10)
        self.uc.reg_write(x86.UC_X86_REG_CR0, CR0_PE | 0x10)
        self.uc.msr_write(EFER, 0)
        self.uc.reg_write(x86.UC_X86_REG_CR4, 0)
        self.uc.reg_write(x86.UC_X86_REG_FPCW, _FCW_AT_RESET)
        self.uc.reg_write(x86.UC_X86_REG_MXCSR, _MXCSR_AT_RESET)
        self.initial = self.uc.context_save()
        self._places = self._find_places()
        self._now = self.new_state()
        """A copy of what Unicorn has, for what it cannot be asked for."""

    # Memory.

    def _fill(self, _uc: Any, address: int, access: int, entry: Any, _data: Any) -> bool:
        if self._resolve is None or self._raised is not None or self._no_code:
            return self._anything(address, access, entry)
        if _KINDS[access] == "x" and self._limit and self._counter.value >= self._limit:
            return self._anything(address, access, entry)  # it looks, and stops
        try:
            place = self._resolve(address, _KINDS[access], self._user)
        except BaseException as raised:  # noqa: BLE001 - C is between here and who handles it
            if _KINDS[access] != "x":
                self._raised = raised
                return False
            if not 0 <= address - self.linear_rip // PAGE_SIZE * PAGE_SIZE <= PAGE_SIZE:
                return self._anything(address, access, entry)
            self._no_code = address, raised
            return False
        page = address & -PAGE_SIZE
        self.remembered[page] = place
        if self._counts and _KINDS[access] != "x":
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
        page = self._now.linear_rip & -PAGE_SIZE
        here, behind = self.remembered.get(page), self.remembered.get(page + PAGE_SIZE)
        if (
            offset + size > PAGE_SIZE
            or (here is not None and here.mfn == mfn)
            or (behind is not None and behind.mfn == mfn and offset < LONGEST_INSTRUCTION)
        ):
            self._leave_block()

    def _leave_block(self) -> None:
        """End the run behind the instruction that is executed, and forget its translation."""
        self.uc.ctl_flush_tb()  # not a part, which would have it look up pages amid the store
        # Not emu_stop, which ends it within the instruction (check_exit_request).
        self._limit = self._most.value = self._counter.value

    def _anything(self, address: int, access: int, entry: Any) -> bool:
        """Let Unicorn have what it asks for after the end.

        When it stops it looks up every page with an address to stop at; an answer of no would
        have it jump back into what has ended.
        """
        entry.paddr, entry.perms = self._hidden * PAGE_SIZE, _PERMISSIONS[_KINDS[access]]
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
        self._library.uc_reg_read(self.uc._uch, register, ctypes.byref(self._value))
        return self._value.value

    def forget_pages(self) -> None:
        """Ask again for each page."""
        status = self._library.uc_ctl(self.uc._uch, self._flush_command)
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
            frame[: len(own)] = _UNDEFINED * len(own)
        if self._register(self._x86.UC_X86_REG_RCX):
            raise GaveUp("Unicorn did not forget pages")
        self._mend_pages()

    def forget_code(self) -> None:
        """Translate all code anew."""
        self.uc.ctl_flush_tb()

    def forget_code_of(self, mfn: int) -> None:
        """Translate the code of one frame anew."""
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
        frame[: len(code)] = _UNDEFINED * len(code)
        self.forget_code()
        self.forget_pages()
        engine = ctypes.cast(self.uc._uch, ctypes.c_void_p).value or 0
        at = ctypes.string_at(engine, _ENGINE_SIZE).find(struct.pack("<QQ", len(code), limit))
        if at < 0:
            raise _lost()
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
            started, now = self.rip == rip, self.linear_rip
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
    def linear_rip(self) -> int:
        """Where the instruction is; far transfers change the code segment while it runs."""
        self.uc.context_update(self._now.saved)
        return self._now.linear_rip

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
            found[name] = _where(uc.context_save(), mark)
        uc.msr_write(_FS_BASE, mark + 1)
        fs_base = _where(uc.context_save(), mark + 1)
        uc.context_restore(kept)
        segments = fs_base - 8 - SEGMENTS.index("fs") * _SEGMENT.size
        exception = found["dr0"] + _BEHIND_DR0
        raw = ctypes.string_at(kept.context, kept.size)
        if _EXCEPTION_NUMBER.unpack_from(raw, exception) != (-1,):
            raise _lost()
        return Places(found["regs"], found["rip"], segments - 8, segments, exception)

    def load(self, vcpu: Vcpu, state: State, held: bytes) -> None:
        """Go on with a vCPU: its state, changed where its context is not as ``held`` has it."""
        now, uc, x86 = vcpu.context, self.uc, self._x86
        self._broke_off = False

        def changed(*names: str) -> bool:
            return any(now[place] != held[place] for place in map(REGISTERS.__getitem__, names))

        if now[_GENERAL] != held[_GENERAL]:
            state.put_general(vcpu)
        rest_changed = now[_REST] != held[_REST]
        if (rest_changed and changed(*_SEGMENT_FIELDS)) or state.wraps:
            state.put_segments(vcpu)
        uc.context_restore(state.saved)
        self._value.value = vcpu.register("rflags") & ~FLAG_RF  # which is over with the next
        self._library.uc_reg_write(uc._uch, x86.UC_X86_REG_RFLAGS, ctypes.byref(self._value))
        if not rest_changed:
            return
        if changed("cr0", "cr3", "cr4", "msr_efer"):
            efer = vcpu.register("msr_efer")
            uc.reg_write(x86.UC_X86_REG_CR4, vcpu.register("cr4"))
            uc.msr_write(EFER, efer & ~EFER_LMA)
            assert efer & EFER_LME or not efer & EFER_LMA
            uc.reg_write(x86.UC_X86_REG_CR0, vcpu.register("cr0"))
            uc.reg_write(x86.UC_X86_REG_CR3, vcpu.register("cr3"))
            uc.context_update(state.saved)
            state.put_segments(vcpu)  # what they mean depends on the mode
            uc.context_restore(state.saved)
        if changed("cr2"):
            uc.reg_write(x86.UC_X86_REG_CR2, vcpu.register("cr2"))
        for name, register in self._descriptor_tables.items():
            if changed(f"{name}_base", f"{name}_limit"):
                base, limit = vcpu.register(f"{name}_base"), vcpu.register(f"{name}_limit")
                uc.reg_write(register, (0, base, limit, 0))
        for name, register in self._system_segments.items():
            if changed(*(f"{name}_{part}" for part in ("sel", "base", "limit", "arbytes"))):
                parts = [vcpu.register(f"{name}_{part}") for part in ("sel", "base", "limit")]
                uc.reg_write(register, (*parts, vcpu.register(f"{name}_arbytes") << 8))
        for name, msr in _MSRS.items():
            if changed(name):
                uc.msr_write(msr, vcpu.register(name))

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
                vcpu.set_segment(name, Segment(base, limit, _attributes(flags)))


class Places(NamedTuple):
    """Offsets in what Unicorn saves of a CPU (QEMU: ``CPUX86State``)."""

    general: int
    rip: int
    hflags: int
    segments: int
    exception: int
    """The one being delivered, with which the next makes a double fault: ``old_exception``."""


class State:
    """All that Unicorn knows of one CPU, between its runs."""

    def __init__(self, template: Any, places: Places) -> None:
        self.saved = copy.copy(template)
        self._places = places
        size = self.saved.size
        room = (ctypes.c_char * size).from_address(
            ctypes.cast(self.saved.context, ctypes.c_void_p).value or 0
        )
        self._raw = memoryview(room).cast("B")
        self._segments: list[tuple[int, ...]] = [()] * len(SEGMENTS)
        self._tables = b""

    def put_general(self, vcpu: Vcpu) -> None:
        """Set the general registers and rip."""
        _WORDS.pack_into(self._raw, self._places.general, *map(vcpu.register, GENERAL_REGISTERS))
        struct.pack_into("<Q", self._raw, self._places.rip, vcpu.register("rip"))

    def put_segments(self, vcpu: Vcpu) -> None:
        """Set the segment registers, whatever the guest's tables say."""
        at, hflags = self._places.segments, self._hflags
        wide = bool(hflags & _HF_LMA) and vcpu.segment("cs").is_64_bit
        flags = {}
        bases = 0
        for number, name in enumerate(SEGMENTS):
            base, limit, attributes = vcpu.segment(name)
            if wide and name not in ("fs", "gs"):
                base = 0  # which the CPU ignores, and Unicorn does not (SDM 1, 3.4.4)
            elif name == "cs" and base + vcpu.register("rip") > _LAST_OF_32_BITS:
                base = base - (1 << 32) & _LAST_ADDRESS  # the sum wraps
            flags[name] = (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12
            _SEGMENT.pack_into(
                self._raw, at, vcpu.register(f"{name}_sel"), base, limit, flags[name]
            )
            self._segments[number] = _SEGMENT.unpack_from(self._raw, at)
            at += _SEGMENT.size
            if name in ("ds", "es", "ss"):
                bases |= base
        hflags &= ~(_HF_CPL | _HF_CS32 | _HF_SS32 | _HF_ADDSEG | _HF_CS64)
        hflags |= vcpu.segment("ss").privilege
        if wide:  # cpu_x86_load_seg_cache
            hflags |= _HF_CS32 | _HF_SS32 | _HF_CS64
        else:
            hflags |= _HF_CS32 if flags["cs"] & _BIG else 0
            hflags |= _HF_SS32 if flags["ss"] & _BIG else 0
            if bases or not hflags & _HF_CS32 or not hflags & _HF_PE:
                hflags |= _HF_ADDSEG
        _FLAGS.pack_into(self._raw, self._places.hflags, hflags)

    @property
    def _hflags(self) -> int:
        flags: int = _FLAGS.unpack_from(self._raw, self._places.hflags)[0]
        return flags

    @property
    def privilege(self) -> int:
        """The current privilege level."""
        return self._hflags & _HF_CPL

    @property
    def linear_rip(self) -> int:
        """Where the instruction is."""
        code = self._places.segments + SEGMENTS.index("cs") * _SEGMENT.size
        rip: int
        base: int
        _, base, _, _ = _SEGMENT.unpack_from(self._raw, code)
        [rip] = struct.unpack_from("<Q", self._raw, self._places.rip)
        return (base + rip) & _LAST_ADDRESS

    @property
    def wraps(self) -> bool:
        """Whether it is at no address that code of 32 bits can have, for Unicorn adds 64 bits."""
        return not self._hflags & _HF_CS64 and self.linear_rip > _LAST_OF_32_BITS

    def settle_flags(self) -> None:
        """Have the arithmetic flags be those in ``cc_src``, where a counted instruction has them.

        Unicorn puts them there before it, and then, when it asks for a page, goes back to how they
        were kept (disas_insn, gen_compute_eflags; unicorn_fill_tlb, cpu_restore_state; 2.1.4).
        """
        struct.pack_into("<I", self._raw, self._places.rip + 40, _CC_OP_EFLAGS)

    def mend_flags(self) -> None:
        """Set right the arithmetic flags of an instruction that Unicorn counted and that faulted.

        It has them in ``cc_src`` by then, and says so only after the instruction (disas_insn,
        gen_compute_eflags; Unicorn 2.0 to 2.1).
        """
        at = self._places.rip
        _, flags, _, source = struct.unpack_from("<4Q", self._raw, at)
        mended = flags & ~_ARITHMETIC | source & _ARITHMETIC
        struct.pack_into("<Q", self._raw, at + 8, mended)
        struct.pack_into("<I", self._raw, at + 40, _CC_OP_EFLAGS)

    def take(self, vcpu: Vcpu) -> None:
        """Give a vCPU's context the general registers, rip and the segment registers."""
        # Unicorn delivers none, and so never sees the end of one.
        _EXCEPTION_NUMBER.pack_into(self._raw, self._places.exception, -1)
        values = _WORDS.unpack_from(self._raw, self._places.general)
        context, at = vcpu.context, _GENERAL.start
        context[at : at + 128] = _WORDS.pack(*(values[number] for number in _ORDER))
        rip = self._places.rip
        context[_RIP] = self._raw[rip : rip + 8]
        segments = self._places.segments
        now = list(_SEGMENT.iter_unpack(self._raw[segments : segments + 6 * _SEGMENT.size]))
        for name, here, before in zip(SEGMENTS, now, self._segments, strict=True):
            if here == before:
                continue
            selector, base, limit, flags = here
            segment = Segment(base, limit, _attributes(flags))
            if name == "ss" and not selector & ~3 and vcpu.register("msr_efer") & EFER_LMA:
                segment = null_stack(selector & 3)  # QEMU takes it for a flat one
            elif not selector and not flags:  # null: the CPU keeps the rest, and forbids its use
                kept = vcpu.segment(name)
                segment = kept._replace(attributes=kept.attributes & ~_USABLE)
            vcpu.set_register(f"{name}_sel", selector)
            vcpu.set_segment(name, segment)
        self._segments = now

    def tables_changed(self) -> bool:
        """Whether LDTR, TR, GDTR or IDTR, which follow the segments, did since this was asked."""
        at = self._places.segments + len(SEGMENTS) * _SEGMENT.size
        raw = bytes(self._raw[at : at + 4 * _SEGMENT.size])
        changed, self._tables = raw != self._tables, raw
        return changed


def _attributes(flags: int) -> int:
    return (flags >> 8 & 0xFF) | (flags >> 12 & 0xF00)


def _where(saved: Any, mark: int) -> int:
    raw = ctypes.string_at(saved.context, saved.size)
    at = raw.find(mark.to_bytes(8, "little"))
    if at < 0 or raw.find(mark.to_bytes(8, "little"), at + 1) >= 0:
        raise _lost()
    return at


def _lost() -> RuntimeError:
    return RuntimeError("this version of unicorn keeps registers where they are not found")


def null_stack(privilege: int) -> Segment:
    """What SS is in long mode when its selector is null, as after an interrupt of ring 3."""
    return Segment(0, 0, _CODE_OR_DATA | privilege << 5)


_SEGMENT_FIELDS = [
    f"{name}_{part}" for name in SEGMENTS for part in ("sel", "base", "limit", "arbytes")
]
_ORDER = sorted(range(16), key=lambda number: REGISTERS[GENERAL_REGISTERS[number]].start)
"""Of the context's registers, where the CPU numbers them."""
_RIP = REGISTERS["rip"]
_REST = slice(REGISTERS["rflags"].stop, HVM_CPU.size)


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
    have to translate everything anew to change between counting instructions and not.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._own = [self._frame() for _ in range(4)]
        hidden, self.scratch, self.marker, self.nothing = self._own
        """Frames of the core's own: its own code, two for what leads nowhere, one for holes."""
        frames.page(hidden)[:] = _UNDEFINED * PAGE_SIZE
        self.where: Where | None = None
        """Where the engine ran last."""
        self.stayed = False
        """Whether it has not left guest mode since, so that the CPU would not have looked anew."""
        self.engine = Engine(frames, hidden)
        self.stepper = Engine(frames, hidden)
        const = _unicorn().unicorn_const
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
            self._on_access(Seen(_KINDS[access], address, size))

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
        # Nothing behind the instruction is looked at.
        ends = range(linear + 1, linear + LONGEST_INSTRUCTION + 1)
        self.stepper.uc.ctl_set_exits([end & _LAST_ADDRESS for end in ends])
        self._on_access = on_access
        try:
            return self.stepper.run(rip, resolve, 1)
        finally:
            self._on_access = None
