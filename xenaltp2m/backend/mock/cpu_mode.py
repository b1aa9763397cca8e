# SPDX-License-Identifier: LGPL-2.1-or-later
"""CPU mode: how a vCPU reads addresses and code, by the registers that decide it."""

from __future__ import annotations

from dataclasses import dataclass

from xenaltp2m.abi.x86 import CR0_PG, EFER_LMA, FLAG_RF, Decoded, Repeated, decode, repeated
from xenaltp2m.backend.mock.vcpu import Vcpu

_U32, _U64 = 0xFFFF_FFFF, (1 << 64) - 1
_LONG, _BIG = 1 << 9, 1 << 10


@dataclass(eq=False)
class CpuMode:
    """The mode that a vCPU is in."""

    vcpu: Vcpu

    @property
    def is_64_bit(self) -> bool:
        """Whether it executes 64-bit code."""
        return self.long_mode and bool(self.vcpu.register("cs_arbytes") & _LONG)

    @property
    def long_mode(self) -> bool:
        """Whether long mode is active, for 64-bit code or in compatibility mode."""
        return bool(self.vcpu.register("msr_efer") & EFER_LMA)

    @property
    def paged(self) -> bool:
        """Whether paging is on."""
        return bool(self.vcpu.register("cr0") & CR0_PG)

    @property
    def privilege(self) -> int:
        """The current privilege level."""
        return self.vcpu.register("ss_arbytes") >> 5 & 3

    @property
    def rip_va(self) -> int:
        """The virtual address of the instruction at rip."""
        rip = self.vcpu.register("rip")
        return rip if self.is_64_bit else (self.vcpu.register("cs_base") + rip) & _U32

    @property
    def mask(self) -> int:
        """The bits that an address or a general register has."""
        return _U64 if self.is_64_bit else _U32

    @property
    def _default_size(self) -> int:
        return 4 if self.is_64_bit or self.vcpu.register("cs_arbytes") & _BIG else 2

    def decode(self, code: bytes) -> Decoded | None:
        """Decode an instruction that may exit; None for any other."""
        return decode(code, self.is_64_bit, self._default_size)

    def repeats(self, code: bytes) -> Repeated | None:
        """Decode a string instruction with a REP prefix; None for any other."""
        return repeated(code, self.is_64_bit, self._default_size)

    def advance(self, length: int) -> None:
        """Move rip to the next instruction, as the CPU does: RF is cleared."""
        vcpu = self.vcpu
        vcpu.set_register("rip", vcpu.register("rip") + length & self.mask)
        vcpu.set_register("rflags", vcpu.register("rflags") & ~FLAG_RF)

    def set_resume_flag(self) -> None:
        """Set RF, as the CPU does when the exit is of the kind of a fault (SDM 3C, 28.3.3)."""
        self.vcpu.set_register("rflags", self.vcpu.register("rflags") | FLAG_RF)
