# SPDX-License-Identifier: LGPL-2.1-or-later
"""Control registers and MSRs: which writes exit, which are valid, which a monitor gates."""

from __future__ import annotations

from dataclasses import dataclass

from xenaltp2m.abi.vm_event import Reason
from xenaltp2m.abi.x86 import CR0_ET, CR0_PE, CR0_PG, EFER_LMA, EFER_LME
from xenaltp2m.backend.mock.monitor import CR0, CR3, CR4, XCR0, Monitor
from xenaltp2m.backend.mock.vcpu import EFER, MSR_REGISTERS, Vcpu, Waits

_CR0_BITS = 0xE005003F
"""All but ``HVM_CR0_GUEST_RESERVED_BITS``."""
_CR4_BITS = 0x770FFF & ~(1 << 12)
_CR4_HOST_MASK = ~_CR4_BITS | 1 << 5 | 1 << 6 | 1 << 13 | 1 << 4 | 1 << 20 | 1 << 21 | 1 << 22
"""Which bits exit (``vmx_update_guest_cr``): PAE, MCE, VMXE, PKE, and while paging is off PSE,
SMEP and SMAP; and all that the guest may not set."""


@dataclass(eq=False)
class SystemRegisters:
    """A vCPU's control registers and MSRs."""

    monitor: Monitor
    vcpu: Vcpu

    def exits(self, index: int, value: int) -> bool:
        """Whether a write leaves guest mode (``vmx_update_guest_cr``)."""
        if index == CR3:
            return "ctrlreg 1" in self.monitor.switches
        if index == XCR0:
            return True
        mask = ~0
        if index == CR4:
            mask = _CR4_HOST_MASK
            options = self.monitor.switches.get("ctrlreg 2")
            if options is not None:
                mask |= ~options["bitmask"]
        return bool((value ^ self.control(index)) & mask)

    def control(self, index: int) -> int:
        """Return a control register, by its ``VM_EVENT_X86_*`` index."""
        if index == XCR0:
            return self.vcpu.xcr0
        return self.vcpu.register(("cr0", "cr3", "cr4")[index])

    def set_control(self, index: int, value: int) -> None:
        """Set a control register, unchecked."""
        if index == XCR0:
            self.vcpu.xcr0 = value
        else:
            self.vcpu.set_register(("cr0", "cr3", "cr4")[index], value)

    def write_control(self, index: int, value: int) -> bool:
        """Write a control register if the value is valid; False for a #GP."""
        valid = self._valid_control(index, value)
        if valid is None:
            return False
        self.set_control(index, valid)
        return True

    def try_control(self, index: int, value: int) -> Waits[bool]:
        """``hvm_set_cr*`` with ``may_defer``: False for a #GP."""
        valid = self._valid_control(index, value)
        if valid is None:
            return False
        defers = yield from self.report_control(index, valid)
        if defers and self.vcpu.deferred is not None:
            self.vcpu.deferred.control_registers[index] = valid
        else:
            self.set_control(index, valid)
        return True

    def report_control(self, index: int, value: int) -> Waits[bool]:
        """``hvm_monitor_cr``: True if the write waits for the vCPU to run again."""
        monitor, old = self.monitor, self.control(index)
        options = monitor.switches.get(f"ctrlreg {index}")
        if (
            options is None
            or (options["onchangeonly"] and value == old)
            or not (value ^ old) & ~options["bitmask"]
        ):
            return False
        fields = {
            "write_ctrlreg.index": index,
            "write_ctrlreg.new_value": value,
            "write_ctrlreg.old_value": old,
        }
        yield from monitor.traps(
            self.vcpu, Reason.WRITE_CTRLREG, fields, sync=bool(options["sync"])
        )
        return monitor.gates_writes

    def _valid_control(self, index: int, value: int) -> int | None:
        """Return what ``hvm_set_cr0``, ``hvm_set_cr3``, ``hvm_set_cr4`` write; None for a #GP."""
        if index == CR0:
            if value >> 32:
                return None
            value = (value & _CR0_BITS) | CR0_ET
            return None if value & (CR0_PE | CR0_PG) == CR0_PG else value
        if index == CR3:
            bits = self.monitor.domain.machine.physical_address_bits
            return None if value >> bits else value
        if index == CR4:
            return None if value & ~_CR4_BITS else value
        return value if value & 1 else None

    def msr(self, msr: int) -> int:
        """Return an MSR; 0 if nothing has written it."""
        name = MSR_REGISTERS.get(msr)
        return self.vcpu.register(name) if name else self.vcpu.msrs.get(msr, 0)

    def load_msr(self, msr: int) -> None:
        """Load an MSR into rax and rdx, as RDMSR does."""
        value = self.msr(msr)
        self.vcpu.set_registers({"rax": value & 0xFFFF_FFFF, "rdx": value >> 32})

    def write_msr(self, msr: int, value: int) -> None:
        """Write an MSR, unchecked."""
        name = MSR_REGISTERS.get(msr)
        if name:
            self.vcpu.set_register(name, value)
        else:
            self.vcpu.msrs[msr] = value

    def intercept_msr(self, msr: int, value: int) -> Waits[None]:
        """``hvm_msr_write_intercept`` with ``may_defer``, and ``hvm_monitor_msr``."""
        monitor, old = self.monitor, self.msr(msr)
        options = monitor.switches.get(f"msr {msr:#x}")
        if options is not None and not (options["onchangeonly"] and value == old):
            fields = {
                "mov_to_msr.msr": msr,
                "mov_to_msr.new_value": value,
                "mov_to_msr.old_value": old,
            }
            yield from monitor.traps(self.vcpu, Reason.MOV_TO_MSR, fields)
            if monitor.gates_writes and self.vcpu.deferred is not None:
                self.vcpu.deferred.msr = msr, value
                return
        self.write_msr(msr, value)


class LongModeRegisters(SystemRegisters):
    """The registers of a vCPU that pages: EFER.LMA follows CR0.PG and EFER.LME."""

    def set_control(self, index: int, value: int) -> None:
        """Set a control register, unchecked."""
        super().set_control(index, value)
        if index == CR0:  # hvm_set_cr0
            efer = self.vcpu.register("msr_efer")
            paged = bool(value & CR0_PG and efer & EFER_LME)
            self.vcpu.set_register("msr_efer", efer | EFER_LMA if paged else efer & ~EFER_LMA)

    def write_msr(self, msr: int, value: int) -> None:
        """Write an MSR, unchecked."""
        if msr == EFER:
            value = value & ~EFER_LMA | self.vcpu.register("msr_efer") & EFER_LMA
        super().write_msr(msr, value)
