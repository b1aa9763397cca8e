# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events that Xen sends: a class for each reason."""

from __future__ import annotations

import enum

from xenaltp2m.abi.vm_event import AccessFlag, Reason
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import Gfn
from xenaltp2m.values.arguments import check_flag, check_kind, check_number
from xenaltp2m.values.events.base import Event, Field, Subscription, known
from xenaltp2m.values.responses import EMULATE, LET_THROUGH, REINJECT, RESUME, Response, step_over

_U16, _U32 = (1 << 16) - 1, (1 << 32) - 1


class ControlRegister(enum.IntEnum):
    """``VM_EVENT_X86_*``: the registers whose writes a monitor can subscribe to."""

    CR0 = 0
    CR3 = 1
    CR4 = 2
    XCR0 = 3


class Descriptor(enum.IntEnum):
    """``VM_EVENT_DESC_*``: descriptor table registers."""

    IDTR = 1
    GDTR = 2
    LDTR = 3
    TR = 4


class TrapType(enum.IntEnum):
    """``X86_EVENTTYPE_*``: the type of an exception (Intel SDM, VM-entry interruption)."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6


class MemAccess(Event):
    """An access of the guest violated the rights of a page in the vCPU's view.

    It needs no switch in Xen: every access that a view, or the host p2m, forbids is reported.
    """

    __slots__ = ()
    reason = Reason.MEM_ACCESS

    gfn = Field("u.mem_access.gfn", Gfn)
    """The page's gfn."""
    offset = Field("u.mem_access.offset", int)
    """The offset within the page."""
    gla = Field("u.mem_access.gla", int)
    """The virtual address; valid only with :attr:`AccessFlag.GLA_VALID`."""
    access_flags = Field("u.mem_access.flags", AccessFlag)
    """The kind of access (R, W, X; a write always counts as a read, too), and how it happened."""

    @property
    def default_response(self) -> Response:
        """Step over the access in view 0; without altp2m, Xen's emulator executes it."""
        return step_over(self.view) if self.view else EMULATE


class MemSharing(Event):
    """A shared page could not be unshared; on the ring of memory sharing, never on a monitor's."""

    __slots__ = ()
    reason = Reason.MEM_SHARING

    gfn = Field("u.mem_sharing.gfn", Gfn)
    """The page."""
    p2mt = Field("u.mem_sharing.p2mt", int)
    """Its type in the p2m."""


class MemPaging(Event):
    """A page is requested or dropped; on the ring of memory paging, never on a monitor's."""

    __slots__ = ()
    reason = Reason.MEM_PAGING

    gfn = Field("u.mem_paging.gfn", Gfn)
    """The page."""
    p2mt = Field("u.mem_paging.p2mt", int)
    """Its type in the p2m."""
    paging_flags = Field("u.mem_paging.flags", int)
    """``MEM_PAGING_*``."""


class WriteCtrlreg(Event):
    """A control register is written. ``xc_monitor_write_ctrlreg``.

    When the event is received, the register has been written already, although
    :attr:`Event.registers` are from just before the write. With a ``deniable`` subscription, it is
    written only after the response allows it. CLTS is reported as a write of CR0 and never waits
    (``vmx_cr_access``). A write that Xen's emulator makes for a response cannot be denied
    (``hvm_vm_event_do_resume``).
    """

    __slots__ = ()
    reason = Reason.WRITE_CTRLREG

    index = Field("u.write_ctrlreg.index", known(ControlRegister))
    """The register."""
    new_value = Field("u.write_ctrlreg.new_value", int)
    """The value that the guest writes."""
    old_value = Field("u.write_ctrlreg.old_value", int)
    """The value before the write."""

    @classmethod
    def on(
        cls,
        register: ControlRegister | None = None,
        *,
        sync: bool = True,
        ignored_bits: int = 0,
        only_changes: bool = True,
        deniable: bool = False,
    ) -> Subscription:
        """Subscribe to writes of one control register.

        Args:
            register: The register.
            sync: Whether the vCPU waits for the response.
            ignored_bits: Writes that change only these bits are not reported.
            only_changes: Has no effect: Xen never reports a write that does not change the value
                (``hvm_monitor_cr``).
            deniable: Whether the write waits for the response, so that :meth:`Response.deny` can
                prevent it. Applies to all register writes that the monitor subscribes to.

        Raises:
            InvalidArgumentError: No register was given, or its writes cannot be denied, or an
                argument is not valid.
        """
        if register is None:
            raise InvalidArgumentError(
                "name the register: WriteCtrlreg.on(ControlRegister.CR3) instead of WriteCtrlreg"
            )
        check_kind("register", register, ControlRegister, "a ControlRegister")
        check_flag("sync", sync)
        check_number("ignored_bits", ignored_bits, most=(1 << 64) - 1)
        check_flag("only_changes", only_changes)
        check_flag("deniable", deniable)
        options = {
            "index": int(register),
            "sync": sync,
            "bitmask": ignored_bits,
            "onchangeonly": only_changes,
        }
        if deniable and not sync:
            raise InvalidArgumentError(
                "deniable needs sync: a write cannot be denied if the vCPU does not wait"
            )
        if deniable and register == ControlRegister.XCR0:
            raise InvalidArgumentError("XCR0 is not deniable: Xen writes it despite the response")
        return Subscription(cls, "monitor_write_ctrlreg", options, deniable)


class MovToMsr(Event):
    """A model-specific register (MSR) is written. ``xc_monitor_mov_to_msr``.

    When the event is received, the MSR has been written already, although :attr:`Event.registers`
    are from just before the write. With a ``deniable`` subscription, it is written only after the
    response allows it.
    """

    __slots__ = ()
    reason = Reason.MOV_TO_MSR

    msr = Field("u.mov_to_msr.msr", int)
    """The MSR's number."""
    new_value = Field("u.mov_to_msr.new_value", int)
    """The value that the guest writes."""
    old_value = Field("u.mov_to_msr.old_value", int)
    """The value before the write."""

    @classmethod
    def on(
        cls, msr: int | None = None, *, only_changes: bool = True, deniable: bool = False
    ) -> Subscription:
        """Subscribe to writes of one MSR.

        Args:
            msr: The MSR's number.
            only_changes: Writes that do not change the value are not reported.
            deniable: Whether the write waits for the response, so that :meth:`Response.deny` can
                prevent it. Applies to all register writes that the monitor subscribes to.

        Raises:
            InvalidArgumentError: No MSR was given, or an argument is not valid.
        """
        if msr is None:
            raise InvalidArgumentError("name the MSR: MovToMsr.on(0xc0000082), not MovToMsr")
        check_number("msr", msr, most=(1 << 32) - 1)
        check_flag("only_changes", only_changes)
        check_flag("deniable", deniable)
        options = {"msr": msr, "onchangeonly": only_changes}
        return Subscription(cls, "monitor_mov_to_msr", options, deniable)


class SoftwareBreakpoint(Event):
    """The guest executed an int3. ``xc_monitor_software_breakpoint``."""

    __slots__ = ()
    reason = Reason.SOFTWARE_BREAKPOINT

    gfn = Field("u.software_breakpoint.gfn", Gfn)
    """The gfn of the instruction."""
    insn_length = Field("u.software_breakpoint.insn_length", int)
    """The instruction's length."""
    type = Field("u.software_breakpoint.type", known(TrapType))
    """The type of the exception."""

    @classmethod
    def on(cls) -> Subscription:
        """Subscribe to int3; the monitor then receives it instead of the guest's handler."""
        return Subscription(cls, "monitor_software_breakpoint")

    @property
    def default_response(self) -> Response:
        """Reinject it, so that the guest's own handler runs."""
        return REINJECT


class Singlestep(Event):
    """A single-stepping vCPU has executed an instruction. ``xc_monitor_singlestep``."""

    __slots__ = ()
    reason = Reason.SINGLESTEP

    gfn = Field("u.singlestep.gfn", Gfn)
    """The gfn of the next instruction."""

    @classmethod
    def on(cls) -> Subscription:
        """Subscribe to single steps; :meth:`Response.singlestep` does this by itself."""
        return SINGLESTEP_ON


class GuestRequest(Event):
    """The guest requested it (``HVMOP_guest_request_vm_event``). ``xc_monitor_guest_request``."""

    __slots__ = ()
    reason = Reason.GUEST_REQUEST

    @classmethod
    def on(cls, *, sync: bool = True, allow_userspace: bool = False) -> Subscription:
        """Subscribe to requests of the guest.

        Args:
            sync: Whether the vCPU waits for the response.
            allow_userspace: Whether the guest's user mode may make requests, too.
        """
        check_flag("sync", sync)
        check_flag("allow_userspace", allow_userspace)
        options = {"sync": sync, "allow_userspace": allow_userspace}
        return Subscription(cls, "monitor_guest_request", options)


class DebugException(Event):
    """A debug exception (#DB) was raised. ``xc_monitor_debug_exceptions``."""

    __slots__ = ()
    reason = Reason.DEBUG_EXCEPTION

    gfn = Field("u.debug_exception.gfn", Gfn)
    """The gfn of the instruction pointer."""
    insn_length = Field("u.debug_exception.insn_length", int)
    """The length of the instruction that caused it, if an instruction did."""
    type = Field("u.debug_exception.type", known(TrapType))
    """The type of the exception."""
    pending_dbg = Field("u.debug_exception.pending_dbg", int)
    """The value that DR6 will get."""

    @classmethod
    def on(cls, *, sync: bool = True) -> Subscription:
        """Subscribe to #DB; the monitor then receives it instead of the guest's handler.

        Args:
            sync: Whether the vCPU waits for the response.
        """
        check_flag("sync", sync)
        return Subscription(cls, "monitor_debug_exceptions", {"sync": sync})

    @property
    def default_response(self) -> Response:
        """Reinject it, so that the guest's own handler runs."""
        return REINJECT


class Cpuid(Event):
    """The guest executed CPUID; the registers contain its results. ``xc_monitor_cpuid``."""

    __slots__ = ()
    reason = Reason.CPUID

    insn_length = Field("u.cpuid.insn_length", int)
    """The instruction's length. The response must add it to rip, or CPUID is executed again."""
    leaf = Field("u.cpuid.leaf", int)
    """The value of eax before it."""
    subleaf = Field("u.cpuid.subleaf", int)
    """The value of ecx before it."""

    @classmethod
    def on(cls) -> Subscription:
        """Subscribe to CPUID."""
        return Subscription(cls, "monitor_cpuid")

    @property
    def default_response(self) -> Response:
        """Give the guest Xen's results, and advance rip."""
        after = self.registers.rip + self.insn_length  # it may wrap around to 0
        return RESUME.with_registers(rip=after & (1 << 64) - 1)


class PrivilegedCall(Event):
    """A call to the secure monitor; Arm only."""

    __slots__ = ()
    reason = Reason.PRIVILEGED_CALL


class Interrupt(Event):
    """An interrupt is about to be delivered, after :meth:`Response.with_next_interrupt`."""

    __slots__ = ()
    reason = Reason.INTERRUPT

    vector = Field("u.interrupt.x86.vector", int)
    """The vector."""
    type = Field("u.interrupt.x86.type", known(TrapType))
    """The type of the interrupt or exception."""
    error_code = Field("u.interrupt.x86.error_code", int)
    """The exception's error code."""
    cr2 = Field("u.interrupt.x86.cr2", int)
    """The address of a page fault."""


class DescriptorAccess(Event):
    """A descriptor table register was read or written. ``xc_monitor_descriptor_access``."""

    __slots__ = ()
    reason = Reason.DESCRIPTOR_ACCESS

    descriptor = Field("u.desc_access.descriptor", known(Descriptor))
    """The register."""
    is_write = Field("u.desc_access.is_write", bool)
    """Whether it was loaded, not stored."""
    instr_info = Field("u.desc_access.arch.vmx.instr_info", int)
    """VMX's instruction information."""
    exit_qualification = Field("u.desc_access.arch.vmx.exit_qualification", int)
    """VMX's exit qualification."""

    @classmethod
    def on(cls) -> Subscription:
        """Subscribe to SGDT, LGDT, SIDT, LIDT, SLDT, LLDT, STR and LTR."""
        return Subscription(cls, "monitor_descriptor_access")

    @property
    def default_response(self) -> Response:
        """Let Xen's emulator execute it; if the vCPU executed it, the event would come again."""
        return EMULATE


class EmulUnimplemented(Event):
    """Xen's emulator cannot execute an instruction. ``xc_monitor_emul_unimplemented``."""

    __slots__ = ()
    reason = Reason.EMUL_UNIMPLEMENTED

    @classmethod
    def on(cls) -> Subscription:
        """Subscribe to it; without a subscription the guest gets #UD."""
        return Subscription(cls, "monitor_emul_unimplemented")

    @property
    def default_response(self) -> Response:
        """Step over it in view 0; without altp2m, only resume."""
        return step_over(self.view) if self.view else RESUME


class VmExit(Event):
    """The vCPU left guest mode (4.17 and later). ``xc_monitor_vmexit``."""

    __slots__ = ()
    reason = Reason.VMEXIT

    exit_reason = Field("u.vmexit.arch.vmx.reason", int)
    """VMX's basic exit reason."""
    exit_qualification = Field("u.vmexit.arch.vmx.qualification", int)
    """VMX's exit qualification."""

    @classmethod
    def on(cls, *, sync: bool = False) -> Subscription:
        """Subscribe to all VM exits.

        Args:
            sync: Whether the vCPU waits for the response. Xen then does not handle the exit, and
                the vCPU exits again for the same cause.
        """
        check_flag("sync", sync)
        return Subscription(cls, "monitor_vmexit", {"sync": sync})

    @property
    def default_response(self) -> Response:
        """If the vCPU waits, let the exit through: the switch is off for one step."""
        return LET_THROUGH if self.paused else RESUME


class Io(Event):
    """The guest executed a port I/O instruction (4.18 and later). ``xc_monitor_io``.

    Xen has not executed it: the vCPU executes it again, unless the response changes its registers.
    """

    __slots__ = ()
    reason = Reason.IO_INSTRUCTION

    port = Field("u.io.port", int)
    """The port."""
    bytes = Field("u.io.bytes", int)
    """The number of bytes that it transfers."""
    is_in = Field("u.io.in", bool)
    """Whether it reads the port."""
    is_string = Field("u.io.str", bool)
    """Whether it is INS or OUTS."""

    @classmethod
    def on(cls) -> Subscription:
        """Subscribe to port I/O."""
        return Subscription(cls, "monitor_io")

    @property
    def default_response(self) -> Response:
        """Let it through: the switch is off while this vCPU steps over it."""
        return LET_THROUGH


SINGLESTEP_ON = Subscription(Singlestep, "monitor_singlestep")

InguestPagefault = Subscription(None, "monitor_inguest_pagefault")
"""Suppress events for accesses by the CPU's page walk: Xen emulates the instruction instead."""

EmulateEachRep = Subscription(None, "monitor_emulate_each_rep")
"""Make Xen emulate each repetition of a string instruction separately."""
