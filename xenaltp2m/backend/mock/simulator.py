# SPDX-License-Identifier: LGPL-2.1-or-later
"""vCPUs that execute machine code in the view they are in.

:mod:`~xenaltp2m.backend.mock.core` executes; which frame a page is and what may be done with it
comes from the domain's tables, through :func:`~xenaltp2m.backend.mock.guest.access` where Xen would
come in. What leaves guest mode goes the way of every vCPU of the mock
(:class:`~xenaltp2m.backend.mock.processor.Processor`).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EFAULT
from typing import Any

from xenaltp2m.abi.vm_event import AccessFlag, Flag
from xenaltp2m.abi.x86 import (
    BP,
    CR0_PE,
    CR0_PG,
    CR4_DE,
    CR4_TSD,
    DB,
    DF,
    EFER_LMA,
    EFER_LME,
    EFER_SCE,
    FLAG_AC,
    FLAG_DF,
    FLAG_IF,
    FLAG_NT,
    FLAG_OF,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    GP,
    NO_ERROR_CODE,
    NP,
    OF,
    PF,
    SYSCALL,
    SYSENTER,
    UD,
    VE,
    Decoded,
    Fault,
    Gate,
    Paging,
    Repeated,
    Segment,
    decode,
    doubled,
    has_error_code,
    is_inc_or_dec,
    is_privileged,
    repeated,
    segment_of,
)
from xenaltp2m.backend.mock.core import (
    LONGEST_INSTRUCTION,
    Core,
    GaveUp,
    Place,
    ReadsAhead,
    Seen,
    SoftwareInterrupt,
    State,
    Where,
    WritesCode,
    null_stack,
)
from xenaltp2m.backend.mock.guest import AT_PAGE, Outcome, access, vm_exit
from xenaltp2m.backend.mock.hypercalls import hypercall
from xenaltp2m.backend.mock.machine import SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, Refused
from xenaltp2m.backend.mock.monitor import CR0, CR3, CR4, XCR0, Monitor
from xenaltp2m.backend.mock.p2m import R, W, X, entry_rights
from xenaltp2m.backend.mock.processor import (
    DIRECT_MSRS,
    DR6_STEP,
    EXIT_HLT,
    EXIT_MSR_READ,
    EXIT_VMCALL,
    EXIT_VMFUNC,
    WRITES_DROPPED,
    Cpuid,
    DebugException,
    DescriptorAccess,
    Done,
    Effect,
    Halt,
    PortIo,
    Processor,
    SetRegisters,
    WriteControlRegister,
    WriteMsr,
    moves_itself,
    needs_reinjection,
    pages,
)
from xenaltp2m.backend.mock.vcpu import (
    DR6_DEFAULT,
    DR7_DEFAULT,
    EFER,
    FLAT_CODE,
    FLAT_CODE_64,
    FLAT_DATA,
    FLAT_LIMIT,
    GENERAL_REGISTERS,
    HARDWARE_EXCEPTION,
    PRIVILEGED_EXCEPTION,
    SOFTWARE_EXCEPTION,
    SOFTWARE_INTERRUPT,
    Trap,
    Waits,
)
from xenaltp2m.types import PAGE_SIZE

_SOFTWARE = SOFTWARE_INTERRUPT, SOFTWARE_EXCEPTION
_FROM_BEHIND = *_SOFTWARE, PRIVILEGED_EXCEPTION
"""Kinds of exceptions whose handlers return behind the instruction."""
_RIGHTS = {"r": R, "w": W, "x": X}
_U16, _U32, _U64 = 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1
_IRET, _EMULATED_PREFIXES = b"\xcf", b"\x48\x66"
_PAGE_OF_32_BITS = _U32 & ~(PAGE_SIZE - 1)
_LONG, _BIG = 1 << 9, 1 << 10
_INT3, _INT_N, _INTO, _ICEBP = 0xCC, 0xCD, 0xCE, 0xF1
_FROM_DEBUG, _TO_DEBUG = 0x0F21, 0x0F23
_DEBUG_BITS = {"dr6": (0xE00F, DR6_DEFAULT), "dr7": (0xFFFF_23FF, DR7_DEFAULT)}
"""Of a debug register that has reserved bits: those that can be set, and those that are set."""
_RDMSR = 0x0F32
_ERROR_WRITE = 1 << 1
_DEBUG_PORT = 0xE9
_IN_WALK = AccessFlag.GLA_VALID | AccessFlag.FAULT_IN_GPT
_MOST_REPETITIONS = 4096
"""That Xen's emulator does at once."""
_VM_FUNCTIONS = 64
"""From here on they raise #UD without an exit."""
_TICKS = 2
"""Of the time stamp counter, in a nanosecond."""
_CPUID_VENDOR = (0x756E6547, 0x6C65746E, 0x49656E69)
_CPUID = {
    0: (0xD, _CPUID_VENDOR[0], _CPUID_VENDOR[1], _CPUID_VENDOR[2]),
    1: (0x306C3, 0, 0x8000_0000, 0x1789_A17F),
    0x4000_0000: (0x4000_0005, 0x566E_6558, 0x65584D4D, 0x4D4D_566E),
    0x8000_0000: (0x8000_0008, 0, 0, 0),
    0x8000_0001: (0, 0, 1, 0x2810_0800),
    0x8000_0008: (0x3027, 0, 0, 0),
}
"""Leaves a guest may look at; all others are zero."""


_MOST_REMEMBERED = 128
"""Of so many pages it takes as long to see which are still right as to ask anew for those used."""


class _Denied(Exception):  # noqa: N818 - the view's answer
    """An access of a page that the tables do not allow, or have no entry for."""

    def __init__(
        self, physical: int, kind: str, linear: int, wanted: str, flags: AccessFlag
    ) -> None:
        super().__init__(physical, kind)
        self.physical = physical
        self.kind = kind
        self.linear = linear
        """Anywhere in the page that it is for, and ``wanted`` what that was to be used for."""
        self.wanted = wanted
        self.flags = flags


@dataclass(eq=False)
class MachineCode(Processor):
    """A vCPU on a core."""

    executes_code = True

    core: Core
    console: bytearray
    """What was written to port 0xe9."""
    _state: State = field(init=False)
    _loaded: bytes = field(default=b"", init=False)
    """The context as the engine has it."""
    _executed: int = field(default=0, init=False)
    """Instructions that the core has completed in this turn, where it counts."""

    def __post_init__(self) -> None:
        self._state = self.core.engine.new_state()
        self._loaded = bytes(len(self.vcpu.context))

    def close(self) -> None:
        """Give back the core's own memory."""
        self.core.close()

    @property
    def written(self) -> bytes:
        """What the domain wrote to port 0xe9."""
        return bytes(self.console)

    @property
    def _has_work(self) -> bool:
        return True

    @property
    def long(self) -> bool:
        """Whether it is in 64-bit mode."""
        return self._long_mode and bool(self.vcpu.register("cs_arbytes") & _LONG)

    @property
    def _long_mode(self) -> bool:
        return bool(self.vcpu.register("msr_efer") & EFER_LMA)

    @property
    def _paged(self) -> bool:
        return bool(self.vcpu.register("cr0") & CR0_PG)

    @property
    def privilege(self) -> int:
        """The current privilege level."""
        return self.vcpu.register("ss_arbytes") >> 5 & 3

    @property
    def _linear_rip(self) -> int:
        rip = self.vcpu.register("rip")
        return rip if self.long else (self.vcpu.register("cs_base") + rip) & _U32

    def _gfn(self) -> int:
        """``gfn_of_rip``: by a walk that no view restricts."""
        try:
            return self._walk_freely(self._linear_rip, "x", self.privilege == 3) // PAGE_SIZE
        except Fault:
            return _U64

    # Memory as this vCPU sees it.

    def _paging(self, user: bool) -> Paging:
        register = self.vcpu.register
        return Paging(
            register("cr0"),
            register("cr3"),
            register("cr4"),
            register("msr_efer"),
            user,
            alignment_check=bool(register("rflags") & FLAG_AC),
            physical_bits=self.monitor.domain.machine.physical_address_bits,
        )

    def _check(
        self, physical: int, kind: str, linear: int, wanted: str, flags: AccessFlag
    ) -> tuple[int, int]:
        """Return the frame at a physical address, which the vCPU may use so in its view; rights."""
        found = self._find_in_view(physical // PAGE_SIZE)
        rights = entry_rights(found.type, found.access) if found.mapped else 0
        big = found.order and not self.monitor.domain.machine.executable_superpages
        if not rights & _RIGHTS[kind] or (kind == "x" and big) or (rights & W and not rights & R):
            raise _Denied(physical, kind, linear, wanted, flags)
        return found.mfn, rights

    def _resolve(self, linear: int, kind: str, user: bool, *, ahead: bool = False) -> Place:
        """Find a page for the engine; a Fault or _Denied where it may not be used so.

        Raises:
            ReadsAhead: It would be marked as accessed (SDM 3A, 4.8) before it is.
        """
        frames = self.monitor.domain.machine.frames
        gfns = []
        entries = {}

        def load(physical: int, size: int) -> int:
            gfn, offset = divmod(physical, PAGE_SIZE)
            mfn, _ = self._check(physical, "r", linear, kind, _IN_WALK)
            at = mfn * PAGE_SIZE + offset
            value = entries[at] = frames.memory[at : at + size]
            gfns.append(gfn)
            return int.from_bytes(value, "little")

        def store(physical: int, size: int, value: int) -> None:
            if ahead:
                raise ReadsAhead
            mfn, _ = self._check(physical, "w", linear, kind, _IN_WALK)
            at = physical % PAGE_SIZE
            marked = entries[mfn * PAGE_SIZE + at] = value.to_bytes(size, "little")
            frames.page(mfn)[at : at + size] = marked

        physical, allowed = linear & _PAGE_OF_32_BITS, "rwx"
        if self._paged:
            physical, allowed = self._paging(user).translate(linear, kind, load, store)
        mfn, rights = self._check(physical, kind, linear, kind, AT_PAGE)
        granted = "".join(right for right in allowed if rights & _RIGHTS[right])
        gfns.append(physical // PAGE_SIZE)
        if kind == "x":
            self.core.note_code(linear, mfn)
            return Place(mfn, granted.replace("w", ""), gfns, entries)
        if kind == "w" and self.core.has_code_at(linear, mfn):  # Unicorn looks at each store
            return Place(mfn, granted, gfns, entries)
        if self.core.has_code(mfn) and kind == "r":
            granted = granted.replace("w", "")
        return Place(mfn, granted.replace("x", ""), gfns, entries)

    def _resolve_to_run(self, linear: int, kind: str, user: bool) -> Place:
        """Find a page for the engine that runs on; WritesCode where it may not use it."""
        ahead = kind == "x" and linear // PAGE_SIZE != self.core.engine.linear_rip // PAGE_SIZE
        place = self._resolve(linear, kind, user, ahead=ahead)
        if kind == "w" and self.core.has_code(place.mfn):
            if "x" not in place.rights:
                raise WritesCode
            self.core.note_write(place.mfn)
        return place

    def _walk_freely(self, linear: int, kind: str, user: bool = False) -> int:
        """Translate without the view's restrictions and without leaving marks; a Fault if none."""
        domain = self.monitor.domain

        def load(physical: int, size: int) -> int:
            found = domain.host_lookup(physical // PAGE_SIZE)
            at = physical % PAGE_SIZE
            return int.from_bytes(self._frame(found)[at : at + size], "little")

        paging = self._paging(user)
        page, _ = paging.translate(linear, kind, load, lambda *_: None)
        return page + linear % PAGE_SIZE

    def copy_from(self, linear: int, size: int) -> bytes:
        """``copy_from_guest``: what the host p2m has, whatever the view."""
        found = b""
        for start, count in pages(linear, size):
            found += self._bytes_in_host(self._argument(start, "r"), count)
        return found

    def copy_to(self, linear: int, data: bytes) -> None:
        """``copy_to_guest``."""
        at = 0
        for start, count in pages(linear, len(data)):
            self._store_in_host(self._argument(start, "w"), data[at : at + count])
            at += count

    def _argument(self, linear: int, kind: str) -> int:
        """Translate an address that the guest gave to Xen."""
        try:
            physical = self._walk_freely(linear, kind)
        except Fault:
            raise Refused(EFAULT) from None
        if not self.monitor.domain.host_lookup(physical // PAGE_SIZE, populate=True).valid:
            raise Refused(EFAULT)
        return physical

    def _fetch(self, linear: int) -> bytes:
        """Fetch as many bytes as an instruction may have, up to the page's end."""
        mfn = self._resolve(linear, "x", self.privilege == 3).mfn
        at = linear % PAGE_SIZE
        return bytes(self.monitor.domain.machine.frames.peek(mfn)[at : at + LONGEST_INSTRUCTION])

    def _read(self, linear: int, size: int) -> bytes:
        """Read linear memory as the CPU does for itself, as a supervisor."""
        found = b""
        for start, count in pages(linear, size):
            mfn = self._resolve(start, "r", user=False).mfn
            at = start % PAGE_SIZE
            found += bytes(self.monitor.domain.machine.frames.peek(mfn)[at : at + count])
        return found

    def _write(self, linear: int, data: bytes) -> None:
        """Write linear memory as the CPU does for itself: all of it or nothing."""
        places = []
        at = 0
        for start, count in pages(linear, len(data)):
            places.append((self._resolve(start, "w", user=False).mfn, start % PAGE_SIZE, at, count))
            at += count
        for mfn, offset, at, count in places:
            frame = self.monitor.domain.machine.frames.page(mfn)
            frame[offset : offset + count] = data[at : at + count]

    # Running.

    def _where(self) -> Where:
        table = self._table
        return Where(self, table, table.generation)

    def _enter(self, engine: Any) -> None:
        engine.load(self.vcpu, self._state, self._loaded)

    def _leave(self, engine: Any) -> None:
        engine.save(self.vcpu, self._state)
        self._loaded = bytes(self.vcpu.context)

    def _run_engine(self, limit: int) -> Fault | SoftwareInterrupt | None:
        core, where = self.core, self._where()
        if core.where != where or (self._paged and not core.stayed):
            self._forget_pages(core.where, where)
        core.where, core.stayed = where, False
        core.check_code()
        self._enter(core.engine)
        try:
            return core.run(self.vcpu.register("rip"), self._resolve_to_run, limit)
        finally:
            self._leave(core.engine)
            self._executed += core.executed

    def _forget_pages(self, before: Where | None, now: Where) -> None:
        """Have the engine ask again for the pages that differ; for all where that is not known.

        The CPU has left guest mode, and looks anew at the guest's own tables, too.
        """
        engine, memory = self.core.engine, self.monitor.domain.machine.frames.memory
        if (
            before is None
            or before.processor is not now.processor
            or before.table.generation != before.generation
            or len(engine.remembered) > _MOST_REMEMBERED
        ):
            engine.forget_pages()
            return
        remembered = engine.remembered.items()
        stale = {
            at
            for at, place in remembered
            for entry, value in place.entries.items()
            if memory[entry : entry + len(value)] != value
        }
        if before.table is not now.table:
            was, here = before.table.lookup, now.table.lookup
            used = {gfn for _, place in remembered for gfn in place.gfns}
            differ = {gfn for gfn in used if was(gfn) != here(gfn)}
            if differ:
                stale |= {at for at, place in remembered if not differ.isdisjoint(place.gfns)}
        engine.forget(stale)

    def _step_engine(
        self,
        resolve: Callable[[int, str, bool], Place],
        on_access: Callable[[Seen], None] | None = None,
    ) -> Fault | SoftwareInterrupt | None:
        core, frames = self.core, self.monitor.domain.machine.frames

        def noting(linear: int, kind: str, user: bool) -> Place:
            place = resolve(linear, kind, user)
            if "w" in place.rights:
                frames.page(place.mfn)  # the other engine may have translated it
            return place

        self._enter(core.stepper)
        try:
            return core.step(self.vcpu.register("rip"), self._linear_rip, noting, on_access)
        finally:
            self._leave(core.stepper)
            core.stepper.save_tables(self.vcpu, self._state)
            self._loaded = bytes(self.vcpu.context)

    def _step_once(
        self,
        code: bytes,
        resolve: Callable[[int, str, bool], Place],
        on_access: Callable[[Seen], None] | None = None,
    ) -> Fault | SoftwareInterrupt | None:
        """Execute one instruction, ``code``, or one repetition (SDM 3C, Monitor Trap Flag)."""
        register = self.vcpu.register
        rip, count = register("rip"), register("rcx")
        stopped = self._step_engine(resolve, on_access)
        found = self._repeats(code) if register("rip") == rip else None
        was_last = found and (count & found.mask, register("rcx") & found.mask) == (1, 0)
        if stopped is None and was_last:  # Unicorn goes on when it comes to the next, only
            stopped = self._step_engine(resolve, on_access)
        self._executed += stopped is None or stopped == SoftwareInterrupt(DB)
        return stopped

    def _step_natively(self, code: bytes) -> Fault | SoftwareInterrupt | None:
        """Execute one instruction, ``code``, or one repetition, as the CPU itself does."""
        rip, count = self.vcpu.register("rip"), self.vcpu.register("rcx")
        stopped = self._step_once(code, self._resolve)
        self._mark_repetition(rip, count, code)
        return stopped

    def _mark_repetition(self, rip: int, count: int, code: bytes) -> None:
        """Set RF after any repetition but the last, as a fault does (SDM 3B, 18.3.1.1)."""
        if self.vcpu.register("rip") == rip and self.vcpu.register("rcx") != count:
            found = self._repeats(code)
            if found and self.vcpu.register("rcx") & found.mask:
                self._fault_like()

    def _execute(self, limit: int) -> Waits[tuple[Done, int]]:
        register = self.vcpu.register
        self._executed = 0
        try:
            code = b""
            if self.vcpu.monitor_trap_flag or register("rflags") & FLAG_TF:
                # The engine that executes one instruction does not stop where that exits.
                code = self._fetch(self._linear_rip)
            if self.core.exits_at(self._linear_rip):
                return (yield from self._execute_exiting())
            rip, count = register("rip"), register("rcx")
            if self.vcpu.monitor_trap_flag:
                stopped = self._step_natively(code)
            else:
                try:
                    stopped = self._run_engine(limit)
                    self._mark_repetition(rip, count, code)
                except (ReadsAhead, WritesCode):
                    stopped = None
                    if not self.core.exits_at(self._linear_rip):  # now that its page is known
                        stopped = self._step_natively(self._fetch(self._linear_rip))
                stayed = register("rip") == rip and not self._executed and stopped is None
                if stayed and self.core.exits_at(self._linear_rip):  # as its page is known now
                    return (yield from self._execute_exiting())
        except Fault as fault:
            stopped = fault
            if fault.vector == PF:
                fault.address, kind = self._exact(fault.address, fault.kind)
                fault.error_code |= _ERROR_WRITE if kind == "w" else 0
        except _Denied as denied:
            done = yield from self._violate(denied)
            return done, self._executed + (done is not Done.HELD)
        if stopped is not None:
            return (yield from self._interrupted(stopped)), self._executed
        if not self.vcpu.monitor_trap_flag and not self.core.exits_at(self._linear_rip):
            self.core.stayed = True
        return Done.NATIVE, self._executed

    def _violate(self, denied: _Denied) -> Waits[Done]:
        """``EXIT_REASON_EPT_VIOLATION``: Xen looks at it, and the instruction comes again."""
        linear, kind = self._exact(denied.linear, denied.wanted)
        if denied.flags == AT_PAGE:
            denied.kind = kind
        outcome = yield from self._access(denied, linear)
        if outcome is Outcome.EMULATED:
            if denied.kind == "x":
                self._fault(GP)
            else:
                completed = yield from self._emulate_here(Flag(0), b"", answered=False)
                return Done.EXITED if completed else Done.HELD
        if outcome is Outcome.VIRTUALISATION_EXCEPTION:
            return (yield from self._raise(Fault(VE)))
        return Done.HELD

    def _access(
        self, denied: _Denied, linear: int, delivered: Trap | None = None
    ) -> Waits[Outcome]:
        """Leave guest mode for an access, now that its linear address is known."""
        physical = denied.physical
        if denied.flags == AT_PAGE:
            physical = physical & ~(PAGE_SIZE - 1) | linear % PAGE_SIZE
        if delivered is None or (delivered.vector, delivered.kind) != (DB, HARDWARE_EXCEPTION):
            self._fault_like()  # a trap's RF is pushed as it is (SDM 3C, 28.3.3)
        about = physical, denied.kind, linear, denied.flags
        delivers = delivered is not None
        return (yield from access(self.monitor, self.vcpu, *about, delivers=delivers))

    def _fault_like(self) -> None:
        """Set RF, as the CPU does when the exit is of the kind of a fault (SDM 3C, 28.3.3)."""
        self.vcpu.set_register("rflags", self.vcpu.register("rflags") | FLAG_RF)

    def _exact(self, linear: int, denied: str) -> tuple[int, str]:
        """Find which address in a page it is, by executing the instruction to nowhere; and how.

        What an instruction reads to write it, it asks for as a write (seen on the lab's CPU).
        """
        page = linear // PAGE_SIZE * PAGE_SIZE
        if denied == "x":
            rip = self._linear_rip
            return (rip if page <= rip < page + PAGE_SIZE else page), denied
        core = self.core
        found: dict[str, list[tuple[int, int]]] = {"r": [], "w": []}
        marker = core.marker

        def resolve(linear: int, kind: str, user: bool) -> Place:
            if kind != "x" and linear // PAGE_SIZE * PAGE_SIZE == page:
                return Place(marker, kind)
            if kind == "w":
                return Place(core.scratch, "rw")
            physical = self._walk_freely(linear, kind, user)
            # What is executed and read in one page shall come to the marker, too.
            return Place(self._find_in_view(physical // PAGE_SIZE).mfn, kind)

        def on_access(seen: Seen) -> None:
            if seen.address // PAGE_SIZE == marker:
                found[seen.kind].append((page + seen.address % PAGE_SIZE, seen.size))

        self._enter(core.stepper)
        core.stepper.save(self.vcpu, self._state)
        self._loaded = bytes(self.vcpu.context)
        with contextlib.suppress(Fault, GaveUp):
            core.step(self.vcpu.register("rip"), self._linear_rip, resolve, on_access)
        if not found[denied]:
            return page, denied
        first = found[denied][0]
        return first[0], "w" if first in found["w"] else denied

    # Exceptions.

    def _raise(self, fault: Fault) -> Waits[Done]:
        """An exception that the CPU delivers by itself."""
        code = fault.error_code if has_error_code(fault.vector) else NO_ERROR_CODE
        trap = Trap(fault.vector, HARDWARE_EXCEPTION, code, 0, fault.address)
        if fault.vector == UD and self._has_breakpoint():
            return (yield from self._breakpoint())
        return (yield from self._deliver_natively(trap))

    def _has_breakpoint(self) -> bool:
        return self._fetch(self._linear_rip)[0] == _INT3

    def _interrupted(self, stopped: Fault | SoftwareInterrupt) -> Waits[Done]:
        """What stopped the core: Unicorn tells of exceptions, with rip at the instruction."""
        if isinstance(stopped, Fault):
            return (yield from self._raise(stopped))
        if stopped.vector == DB:
            return (yield from self._apply_trap_flag())
        return (yield from self._raise(Fault(stopped.vector, 0)))

    def _apply_trap_flag(self) -> Waits[Done]:
        return (yield from self._debug_exception(HARDWARE_EXCEPTION, 0))

    def _deliver(self, trap: Trap) -> Waits[bool]:
        vcpu = self.vcpu
        while True:
            try:
                self._through_gate(trap)
            except _Denied as denied:  # vmx_idtv_reinject; other instructions come again
                vcpu.pending = trap if needs_reinjection(trap) else None
                outcome = yield from self._access(denied, denied.linear, trap)
                if outcome is not Outcome.DONE or vcpu.pending is None:
                    return False
            except Fault as fault:
                if trap.vector == DF:
                    vcpu.pending = None
                    self.monitor.domain.shut_down(SHUTDOWN_REBOOT)  # hvm_triple_fault
                    return False
                double = doubled(trap.vector, fault.vector)
                vector = DF if double else fault.vector
                code = 0 if double else fault.error_code
                address = fault.address if vector == PF else 0
                trap = Trap(vector, HARDWARE_EXCEPTION, code, 0, address)
            else:
                vcpu.pending = None
                vcpu.delivered.append((trap.vector, trap.kind))
                return True

    def _through_gate(self, trap: Trap) -> None:
        """What the CPU does to deliver an exception or interrupt; a Fault where it cannot."""
        vcpu = self.vcpu
        if trap.vector == PF:
            vcpu.set_register("cr2", trap.cr2)
        register, long = vcpu.register, self._long_mode
        rip = register("rip") + (trap.length if trap.kind in _FROM_BEHIND else 0)
        flags = register("rflags")
        if trap.kind in _FROM_BEHIND:  # an exit meanwhile has set it
            flags &= ~FLAG_RF
        if not register("cr0") & CR0_PE:
            self._through_vector_table(trap.vector, [rip, register("cs_sel"), flags])
            return
        gate, code = self._find_gate(trap)
        inner = code.privilege if not code.attributes & 4 else self.privilege
        changes = inner < self.privilege
        stack_selector, stack, top = self._find_stack(gate, inner)
        if trap.kind == HARDWARE_EXCEPTION and trap.vector != DB:
            flags |= FLAG_RF
        frame = [rip, register("cs_sel"), flags]
        if long or changes:
            frame += [register("rsp"), register("ss_sel")]
        if has_error_code(trap.vector) and trap.kind == HARDWARE_EXCEPTION:
            frame.insert(0, trap.error_code)
        top = self._push(frame, 8 if long else gate.width, stack, top)
        cleared = FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | (FLAG_IF if gate.masks_interrupts else 0)
        vcpu.set_register("rflags", register("rflags") & ~cleared)
        vcpu.set_register("rip", gate.offset)
        vcpu.set_register("rsp", top)
        vcpu.set_register("cs_sel", gate.selector & ~3 | inner)
        vcpu.set_segment("cs", code._replace(attributes=code.attributes | 1))
        if changes:
            vcpu.set_register("ss_sel", stack_selector)
            vcpu.set_segment("ss", stack)

    def _through_vector_table(self, vector: int, frame: list[int]) -> None:
        """In real mode (SDM 3B, 21.1.4): offset and segment, and no error code."""
        vcpu, register = self.vcpu, self.vcpu.register
        if 4 * vector + 3 > register("idtr_limit"):
            raise Fault(GP, 0)
        offset, selector = struct.unpack("<HH", self._read(register("idtr_base") + 4 * vector, 4))
        top = self._push(frame, 2, vcpu.segment("ss"), register("rsp"))
        cleared = FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF
        vcpu.set_registers({"rflags": register("rflags") & ~cleared, "rsp": top, "rip": offset})
        vcpu.set_registers({"cs_sel": selector, "cs_base": selector << 4})

    def _push(self, frame: list[int], width: int, stack: Segment, top: int) -> int:
        """Push words, the last first; all of them or none. The new stack pointer."""
        long = self._long_mode
        mask = _U64 if long else _U32 if stack.attributes & _BIG else _U16
        base, limit = (0, _U64) if long else (stack.base, _U32)
        parts = []
        for word in reversed(frame):
            top = top & ~mask | (top - width) & mask
            data = (word & _U64).to_bytes(8, "little")[:width]
            for start, count in pages(base + (top & mask) & limit, width):
                parts.append((self._resolve(start, "w", user=False).mfn, start, data[:count]))
                data = data[count:]
        for mfn, start, data in parts:
            frame_page = self.monitor.domain.machine.frames.page(mfn)
            frame_page[start % PAGE_SIZE :][: len(data)] = data
        return top

    def _find_gate(self, trap: Trap) -> tuple[Gate, Segment]:
        """The gate of an exception or interrupt, and the code segment it leads to."""
        register, long = self.vcpu.register, self._long_mode
        size = 16 if long else 8
        at = trap.vector * size
        external = int(trap.kind < SOFTWARE_INTERRUPT)
        if not register("cr0") & CR0_PE or at + size - 1 > register("idtr_limit"):
            raise Fault(GP, trap.vector * 8 + 2 + external)
        gate = Gate.of(self._read(register("idtr_base") + at, size), trap.vector, external)
        if trap.kind in _SOFTWARE and gate.privilege < self.privilege:
            raise Fault(GP, trap.vector * 8 + 2)
        if not gate.selector & ~3 or (gate.selector | 7) > register("gdtr_limit"):
            raise Fault(GP, gate.selector & ~3 | external)
        code = self._segment_at(gate.selector)
        if not code.is_code or code.privilege > self.privilege or (long and not code.is_64_bit):
            raise Fault(GP, gate.selector & ~3 | external)
        if not code.is_present:
            raise Fault(NP, gate.selector & ~3 | external)
        return gate, code

    def _find_stack(self, gate: Gate, inner: int) -> tuple[int, Segment, int]:
        """The stack that a gate wants: its selector, its segment, and its top."""
        vcpu, register = self.vcpu, self.vcpu.register
        selector, stack, top = register("ss_sel"), vcpu.segment("ss"), register("rsp")
        changes = inner < self.privilege
        if self._long_mode:
            if gate.stack or changes:
                where = 0x24 + 8 * (gate.stack - 1) if gate.stack else 4 + 8 * inner
                top = int.from_bytes(self._read(register("tr_base") + where, 8), "little")
            if changes:
                selector, stack = inner, null_stack(inner)
            top &= ~0xF
        elif changes:
            new = self._read(register("tr_base") + 4 + 8 * inner, 8)
            top = int.from_bytes(new[:4], "little")
            selector = int.from_bytes(new[4:6], "little")
            stack = self._segment_at(selector)
        return selector, stack, top

    def _segment_at(self, selector: int) -> Segment:
        raw = self._read(self.vcpu.register("gdtr_base") + (selector & ~7), 8)
        return segment_of(int.from_bytes(raw, "little"))

    # Instructions that exit.

    def _go_behind(self, length: int) -> None:
        rip = self.vcpu.register("rip") + length
        self.vcpu.set_register("rip", rip if self.long else rip & _U32)
        self.vcpu.set_register("rflags", self.vcpu.register("rflags") & ~FLAG_RF)

    def _advance(self, length: int) -> None:
        vcpu = self.vcpu
        self._go_behind(length)
        if vcpu.register("rflags") & FLAG_TF:  # vmx_inject_event sets dr6, too
            vcpu.set_register("dr6", vcpu.register("dr6") | DR6_STEP)
            vcpu.raise_trap(Trap(DB, HARDWARE_EXCEPTION, NO_ERROR_CODE, 0, 0))

    def _complete(self, length: int) -> Waits[Done]:
        """The CPU itself completes the instruction at rip."""
        self._go_behind(length)
        if self.vcpu.register("rflags") & FLAG_TF:
            return (yield from self._apply_trap_flag())
        return Done.NATIVE

    def _execute_exiting(self) -> Waits[tuple[Done, int]]:
        """An instruction that the core must not execute alone, or bytes that look like one."""
        done = yield from self._try_exiting()
        return done, int(done is not Done.HELD)

    def _try_exiting(self) -> Waits[Done]:
        linear = self._linear_rip
        room = PAGE_SIZE - linear % PAGE_SIZE
        code = self._fetch(linear)
        found = self._decode(code)
        if found is None and room < LONGEST_INSTRUCTION and not is_inc_or_dec(code, self.long):
            found = self._decode(code + self._fetch(linear + room))
        if found is None:
            return (yield from self._execute_alone())
        return (yield from self._dispatch(found))

    def _decode(self, code: bytes) -> Decoded | None:
        return decode(code, self.long, self._default_size)

    def _repeats(self, code: bytes) -> Repeated | None:
        return repeated(code, self.long, self._default_size)

    @property
    def _default_size(self) -> int:
        return 4 if self.long or self.vcpu.register("cs_arbytes") & _BIG else 2

    def _execute_alone(self) -> Waits[Done]:
        stopped = self._step_natively(self._fetch(self._linear_rip))
        return Done.NATIVE if stopped is None else (yield from self._interrupted(stopped))

    def _dispatch(self, found: Decoded) -> Waits[Done]:
        self.vcpu.set_register("rflags", self.vcpu.register("rflags") & ~FLAG_RF)
        opcode, length = found.opcode, found.length
        if opcode == _INT3:
            return (yield from self._breakpoint(length))
        if opcode == _INT_N:
            return (yield from self._software_interrupt(found.immediate, length))
        if opcode == _INTO:
            return (yield from self._check_overflow(length))
        if self.privilege and is_privileged(opcode, found.modrm):
            return (yield from self._raise(Fault(GP, 0)))
        if opcode == 0x0F01 and found.modrm == 0xC1:
            return (yield from self._vmcall(length))
        if opcode == 0x0F01 and found.modrm == 0xD4:
            return (yield from self._vmfunc(length))
        if opcode == _RDMSR:
            return (yield from self._read_msr_at_rip(length))
        if opcode in (SYSCALL, SYSENTER):
            return (yield from self._call_system(opcode, length))
        if opcode in (_FROM_DEBUG, _TO_DEBUG):
            self._move_debug_register(found)
            return (yield from self._complete(length))
        effect = self._effect(found)
        if effect is None:
            return (yield from self._execute_alone())
        if isinstance(effect, Halt):
            return (yield from self._halt(length))
        heard = isinstance(effect, DescriptorAccess) and (
            "descriptor_access" in self.monitor.switches
        )
        if not length and not heard:  # its operand is in memory, and nobody hears of it
            return (yield from self._execute_alone())
        done = yield from self._apply(effect, length)
        if isinstance(effect, DescriptorAccess) and done is Done.NATIVE:
            return (yield from self._execute_alone())
        if done is Done.NATIVE:
            return (yield from self._complete(length))
        if done is Done.EXITED and not moves_itself(effect):
            self._advance(length)
        return done

    def _effect(self, found: Decoded) -> Effect | None:
        """What an instruction does, in the words of the other vCPUs; None: the core can do it."""
        register, opcode = self.vcpu.register, found.opcode
        mask = _U64 if self.long else _U32
        number, operand = found.modrm >> 3 & 7, found.modrm & 7
        if found.rex & 4:
            number += 8
        if found.rex & 1:
            operand += 8
        wide = register("rax") & _U32 | (register("rdx") & _U32) << 32
        if opcode == 0x0F22 and number in (0, 3, 4):
            index = {0: CR0, 3: CR3, 4: CR4}[number]
            return WriteControlRegister(index, register(GENERAL_REGISTERS[operand]) & mask)
        if opcode == 0x0F06:  # CLTS
            return WriteControlRegister(CR0, register("cr0") & ~8)
        if opcode == 0x0F30:
            return WriteMsr(register("rcx") & _U32, wide)
        if opcode == 0x0F01 and found.modrm == 0xD1:
            return WriteControlRegister(XCR0, wide)
        if opcode == 0x0F31 or (opcode == 0x0F01 and found.modrm == 0xF9):
            return self._read_time(with_number=opcode == 0x0F01)
        if opcode == 0x0FA2:
            return Cpuid(self._cpuid(register("rax") & _U32))
        if opcode == _ICEBP:
            return DebugException(PRIVILEGED_EXCEPTION)
        if opcode == 0xF4:
            return Halt()
        if opcode in (0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF):
            port = found.immediate if opcode < 0xE8 else register("rdx") & _U16
            size = 1 if not opcode & 1 else min(found.operand_size, 4)
            is_in = not opcode & 2
            value = register("rax") & ((1 << 8 * size) - 1)
            return PortIo(port, size, is_in=is_in, value=value)
        if opcode == 0x0F01 and found.modrm >> 3 & 7 < 4 and found.modrm < 0xC0:
            kind = found.modrm >> 3 & 7
            return DescriptorAccess((2, 1)[kind & 1], kind >= 2)
        if opcode == 0x0F00 and found.modrm >> 3 & 7 < 4:
            kind = found.modrm >> 3 & 7
            return DescriptorAccess((3, 4)[kind & 1], kind >= 2)
        return None

    def _read_time(self, *, with_number: bool) -> Effect | None:
        """RDTSC, RDTSCP: the vCPU's own time, for the core would tell the host's."""
        if self.privilege and self.vcpu.register("cr4") & CR4_TSD:
            return None
        time = self.vcpu.cpu_time * _TICKS
        values = {"rax": time & _U32, "rdx": time >> 32 & _U32}
        if with_number:
            values["rcx"] = self.vcpu.register("msr_tsc_aux") & _U32
        return SetRegisters(values)

    def _read_msr_at_rip(self, length: int) -> Waits[Done]:
        msr = self.vcpu.register("rcx") & _U32
        if msr in DIRECT_MSRS or msr == EFER:  # construct_vmcs, vmx_update_guest_efer
            self._load_msr(msr)
            return (yield from self._complete(length))
        if (yield from vm_exit(self.monitor, self.vcpu, EXIT_MSR_READ)):
            return Done.HELD
        self._load_msr(msr)
        self._advance(length)
        return Done.EXITED

    def _load_msr(self, msr: int) -> None:
        value = self._read_msr(msr)
        self.vcpu.set_registers({"rax": value & _U32, "rdx": value >> 32})

    def _cpuid(self, leaf: int) -> tuple[int, int, int, int]:
        return _CPUID.get(leaf, (0, 0, 0, 0))

    def _halt(self, length: int) -> Waits[Done]:
        if (yield from vm_exit(self.monitor, self.vcpu, EXIT_HLT)):
            return Done.HELD
        self._advance(length)
        if self.vcpu.register("rflags") & FLAG_IF:
            self.vcpu.halted = True
            return Done.EXITED
        self.vcpu.online = False  # hvm_hlt, hvm_vcpu_down
        domain = self.monitor.domain
        if not domain.online_vcpus:
            domain.shut_down(SHUTDOWN_POWEROFF)
        return Done.EXITED

    def _complete_io(self, effect: PortIo) -> None:
        size = (1 << 8 * effect.size) - 1
        if effect.is_in:
            kept = 0 if effect.size == 4 else self.vcpu.register("rax") & ~size
            self.vcpu.set_register("rax", kept | size)  # nobody is at the port
        elif effect.port == _DEBUG_PORT:
            self.console.append(effect.value & 0xFF)

    def _call_system(self, opcode: int, length: int) -> Waits[Done]:
        try:
            self._enter_system(opcode, length)
        except Fault as fault:
            return (yield from self._raise(fault))
        if self.vcpu.register("rflags") & FLAG_TF:
            return (yield from self._apply_trap_flag())
        return Done.NATIVE

    def _enter_system(self, opcode: int, length: int) -> None:
        """SYSCALL and SYSENTER (SDM 2B), which Unicorn leaves out; a Fault where there is none."""
        vcpu, register, long = self.vcpu, self.vcpu.register, self._long_mode
        flags = register("rflags") & ~FLAG_RF
        if opcode == SYSCALL:
            if not self.long or not register("msr_efer") & EFER_SCE:
                raise Fault(UD)
            code = register("msr_star") >> 32
            vcpu.set_registers({"rcx": register("rip") + length, "r11": flags})
            flags &= ~register("msr_syscall_mask")
            target = {"rip": register("msr_lstar")}
        else:
            code = register("sysenter_cs")
            if not register("cr0") & CR0_PE or not code & 0xFFFC:
                raise Fault(GP, 0)
            flags &= ~(FLAG_VM | FLAG_IF)
            mask = _U64 if long else _U32
            target = {"rip": register("sysenter_eip"), "rsp": register("sysenter_esp")}
            target = {name: value & mask for name, value in target.items()}
        vcpu.set_registers({"rflags": flags | 2, **target})
        vcpu.set_registers({"cs_sel": code & 0xFFFC, "ss_sel": (code & 0xFFFC) + 8})
        vcpu.set_segment("cs", Segment(0, FLAT_LIMIT, FLAT_CODE_64 if long else FLAT_CODE))
        vcpu.set_segment("ss", Segment(0, FLAT_LIMIT, FLAT_DATA))

    def _move_debug_register(self, found: Decoded) -> None:
        """MOV from and to DR0 to DR7 (SDM 2B; 3B, 18.2); what they are set to stops nothing."""
        vcpu, number = self.vcpu, found.modrm >> 3 & 7
        if found.rex & 4 or (number in (4, 5) and vcpu.register("cr4") & CR4_DE):
            raise Fault(UD)
        debug = f"dr{number + 2 if number in (4, 5) else number}"
        general = GENERAL_REGISTERS[(found.modrm & 7) + 8 * (found.rex & 1)]
        mask = _U64 if self.long else _U32
        if found.opcode == _FROM_DEBUG:
            vcpu.set_register(general, vcpu.register(debug) & mask)
            return
        value = vcpu.register(general) & mask
        if debug in _DEBUG_BITS:
            if value > _U32:
                raise Fault(GP, 0)
            settable, fixed = _DEBUG_BITS[debug]
            value = value & settable | fixed
        vcpu.set_register(debug, value)

    def _check_overflow(self, length: int) -> Waits[Done]:
        """INTO."""
        if self.long:
            return (yield from self._raise(Fault(UD)))
        if not self.vcpu.register("rflags") & FLAG_OF:
            return (yield from self._complete(length))
        trap = Trap(OF, SOFTWARE_EXCEPTION, NO_ERROR_CODE, length, 0)
        return (yield from self._deliver_natively(trap))

    def _software_interrupt(self, vector: int, length: int) -> Waits[Done]:
        trap = Trap(vector, SOFTWARE_INTERRUPT, NO_ERROR_CODE, length, 0)
        return (yield from self._deliver_natively(trap))

    def _vmcall(self, length: int) -> Waits[Done]:
        if (yield from vm_exit(self.monitor, self.vcpu, EXIT_VMCALL)):
            return Done.HELD
        yield from hypercall(self)
        self.vcpu.map_cache_stale = False  # hvm_hypercall
        self._advance(length)
        return Done.EXITED

    def _vmfunc(self, length: int) -> Waits[Done]:
        """SDM 3C, VM Functions: the one there is switches views; ``vmx_vmfunc_intercept``."""
        views, vcpu = self.monitor.domain.views, self.vcpu
        function, view = vcpu.register("rax") & _U32, vcpu.register("rcx") & _U32
        if not vcpu.vm_functions or function >= _VM_FUNCTIONS:
            return (yield from self._raise(Fault(UD)))
        if function or view >= len(views) or not views[view].visible:
            if not (yield from vm_exit(self.monitor, vcpu, EXIT_VMFUNC)):
                self._fault(UD)
            return Done.HELD
        vcpu.view = view
        return (yield from self._complete(length))

    def _set_control_register(self, index: int, value: int) -> None:
        super()._set_control_register(index, value)
        if index == CR0:  # hvm_set_cr0
            efer = self.vcpu.register("msr_efer")
            paged = bool(value & CR0_PG and efer & EFER_LME)
            self.vcpu.set_register("msr_efer", efer | EFER_LMA if paged else efer & ~EFER_LMA)

    def _write_msr(self, msr: int, value: int) -> None:
        if msr == EFER:
            value = value & ~EFER_LMA | self.vcpu.register("msr_efer") & EFER_LMA
        super()._write_msr(msr, value)

    # Execution by Xen's emulator, in the host p2m.

    def _emulate(self, kind: Flag, data: bytes) -> Waits[None]:
        yield from self._emulate_here(kind, data)

    def _emulate_here(self, kind: Flag, data: bytes, *, answered: bool = True) -> Waits[bool]:
        """Execute the instruction at rip against the host p2m; True if it is completed."""
        vcpu = self.vcpu
        replaced = data[:LONGEST_INSTRUCTION] if kind is Flag.SET_EMUL_INSN_DATA else b""
        code = replaced or self._host_bytes(self._linear_rip, LONGEST_INSTRUCTION)
        if code[0] == _INT3:
            vcpu.raise_trap(Trap(BP, SOFTWARE_EXCEPTION, NO_ERROR_CODE, 1, 0))
            return False
        if code.lstrip(_EMULATED_PREFIXES)[:1] == _IRET:  # x86_emulate: in real mode only
            self._fault(UD)
            return False
        found = self._decode(code)
        if found is not None and found.opcode == _INT_N:
            trap = Trap(found.immediate, SOFTWARE_INTERRUPT, NO_ERROR_CODE, found.length, 0)
            vcpu.raise_trap(trap)
            return False
        if found is not None and (found.opcode, found.modrm) == (0x0F01, 0xD4):
            self._fault(UD)  # vmx_vcpu_emulate_vmfunc, where the CPU has it
            return False
        if found is not None and (found.opcode, found.modrm) == (0x0F01, 0xC1):
            yield from self._cannot_emulate(answered=answered)
            return False
        if found is not None and found.opcode in (SYSCALL, SYSENTER):
            return self._emulate_system_call(found)
        effect = None if found is None else self._effect(found)
        if found is not None and found.length and effect is not None:
            if not (yield from self._emulate_effect(effect, found.length)):
                return False
            if not moves_itself(effect):
                self._advance(found.length)
            return True
        fault = None
        for part in self._parts(code, kind, data):
            fault = self._step_in_host(kind, part, code, is_replaced=bool(replaced))
            if fault is not None:
                break
        if fault is None:
            return True
        error = fault.error_code if has_error_code(fault.vector) else NO_ERROR_CODE
        vcpu.raise_trap(Trap(fault.vector, HARDWARE_EXCEPTION, error, 0, fault.address))
        return False

    def _emulate_system_call(self, found: Decoded) -> bool:
        try:
            self._enter_system(found.opcode, found.length)
        except Fault as fault:
            self._fault(fault.vector)
            return False
        return True

    def _parts(self, code: bytes, kind: Flag, data: bytes) -> list[bytes]:
        """For each repetition that Xen's emulator does at once, its part of an answer's data."""
        found = self._repeats(code)
        count = 1 if found is None else self._repetitions_at_once(found, kind)
        if count == 1 or found is None or kind is not Flag.SET_EMUL_READ_DATA:
            return [data] * count
        size = int.from_bytes(data[:4], "little")  # set_context_data, of the whole buffer
        given = data[4 : 4 + size].ljust(count * found.width, b"\0")
        parts = [given[at * found.width :][: found.width] for at in range(count)]
        if self.vcpu.register("rflags") & FLAG_DF:
            parts.reverse()
        return [len(part).to_bytes(4, "little") + part for part in parts]

    def _repetitions_at_once(self, found: Repeated, kind: Flag) -> int:
        """``get_rep_prefix``, ``hvmemul_rep_movs``, ``hvmemul_rep_stos``: many; of others, one."""
        register, width, mask = self.vcpu.register, found.width, found.mask
        count, flags = register("rcx") & mask, register("rflags")
        if not (found.is_movs or found.is_stos) or count <= 1 or flags & FLAG_TF:
            return 1
        offsets = [("es", register("rdi") & mask, "w")]
        if found.is_movs:
            offsets.append((found.source, register("rsi") & mask, "r"))
        backwards = bool(flags & FLAG_DF)
        for _, offset, _ in offsets:  # truncate_ea_and_reps
            room = offset // width + 1 if backwards else (-offset & mask) // width
            count = min(count, max(room, 1))
        if kind is Flag.EMULATE_NOWRITE:  # hvmemul_rep_movs_discard
            return count
        if "emulate_each_rep" in self.monitor.switches:
            return 1
        count = min(count, _MOST_REPETITIONS)
        places = []
        for segment, offset, right in offsets:
            base = 0 if self.long and segment not in ("fs", "gs") else register(f"{segment}_base")
            physical, count = self._contiguous(base + offset, right, count, width, backwards)
            places.append(physical)
        size = count * width
        if found.is_movs:
            target, source = places
            source -= size - width if backwards else 0
            if source - width < target < source + size:
                return 1
        return count

    def _contiguous(
        self, linear: int, access: str, count: int, width: int, backwards: bool
    ) -> tuple[int, int]:
        """``hvmemul_linear_to_phys``: where it is, and for how many repetitions in one piece."""
        linear &= _U64 if self.long else _U32
        if not self._paged:
            return linear, count
        user, step = self.privilege == 3, -PAGE_SIZE if backwards else PAGE_SIZE
        try:
            physical = self._walk_freely(linear, access, user)
        except Fault:
            return 0, 1  # it is raised by the first
        done = linear % PAGE_SIZE + width if backwards else PAGE_SIZE - linear % PAGE_SIZE
        behind = physical
        while done < count * width:
            linear, behind = linear + step, behind + step
            try:
                if self._walk_freely(linear, access, user) != behind:
                    break
            except Fault:
                break
            done += PAGE_SIZE
        return physical, max(min(count, done // width), 1)

    def _host_bytes(self, linear: int, size: int) -> bytes:
        found = b""
        for start, count in pages(linear, size):
            try:
                physical = self._walk_freely(start, "x", self.privilege == 3)
            except Fault:
                break
            found += self._bytes_in_host(physical, count)
        return found or b"\0"

    def _step_in_host(
        self, kind: Flag, data: bytes, code: bytes, *, is_replaced: bool
    ) -> Fault | None:
        """One instruction whose accesses no view restricts."""
        core, domain = self.core, self.monitor.domain
        frames = domain.machine.frames
        kept: dict[int, bytes] = {}
        rip = self._linear_rip
        frames.page(core.nothing)[:] = b"\xff" * PAGE_SIZE

        def resolve(linear: int, access: str, user: bool) -> Place:
            physical = self._walk_freely(linear, access, user)
            found = domain.host_lookup(physical // PAGE_SIZE, populate=True, unshare=access == "w")
            if access == "x" and is_replaced:
                return Place(
                    self._overlay(core.scratch, frames.peek(found.mfn), linear, rip, code), "x"
                )
            if not found.valid:
                if access == "w":
                    kept.setdefault(core.nothing, b"\xff" * PAGE_SIZE)
                return Place(core.nothing, "rw")
            if access != "w":
                return Place(found.mfn, "rx")
            if kind is Flag.EMULATE_NOWRITE or found.type in WRITES_DROPPED:
                kept.setdefault(found.mfn, bytes(frames.peek(found.mfn)))
            return Place(found.mfn, "rw")

        patched: dict[int, bytes] = {}

        def on_access(seen: Seen) -> None:
            if seen.kind != "r" or kind is not Flag.SET_EMUL_READ_DATA:
                return
            size = int.from_bytes(data[:4], "little")
            given = data[4 : 4 + min(size, seen.size)].ljust(seen.size, b"\0")
            mfn, at = divmod(seen.address, PAGE_SIZE)
            frame = frames.page(mfn)
            patched.setdefault(mfn, bytes(frame))
            room = frame[at : at + seen.size]
            room[:] = given[: len(room)]

        try:
            stopped = self._step_once(code, resolve, on_access)
        except Fault as fault:
            stopped = fault
            if fault.vector == PF and not is_replaced:
                fault.address, tried = self._exact(fault.address, fault.kind)
                fault.error_code |= _ERROR_WRITE if tried == "w" else 0
        finally:
            for mfn, content in {**patched, **kept}.items():
                frames.page(mfn)[:] = content
        if isinstance(stopped, SoftwareInterrupt):
            return Fault(stopped.vector, 0)
        return stopped

    def _overlay(self, mfn: int, page: memoryview, linear: int, rip: int, code: bytes) -> int:
        """Lay an instruction over a copy of the page it is in."""
        frame = self.monitor.domain.machine.frames.page(mfn)
        frame[:] = page
        at = rip - linear // PAGE_SIZE * PAGE_SIZE
        start, skipped = max(at, 0), max(-at, 0)
        part = code[skipped : skipped + PAGE_SIZE - start]
        frame[start : start + len(part)] = part
        return mfn


def processors(monitor: Monitor) -> list[Processor]:
    """Make a domain's vCPUs, on one core."""
    core, console = Core(monitor.domain.machine.frames), bytearray()
    return [MachineCode(monitor, vcpu, core, console) for vcpu in monitor.domain.vcpus]
