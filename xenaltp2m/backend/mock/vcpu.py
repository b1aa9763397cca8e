# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual CPU's state: registers, what stops it, and what waits for it to run."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.abi.x86 import CR0_ET, CR0_PE, DF, GP, PF, VE, Segment

INVALID_VIEW = 0xFFFF

EXTERNAL_INTERRUPT, NMI = 0, 2
HARDWARE_EXCEPTION, SOFTWARE_INTERRUPT, PRIVILEGED_EXCEPTION, SOFTWARE_EXCEPTION = 3, 4, 5, 6
"""``X86_ET_*``."""
DR6_DEFAULT, DR7_DEFAULT = 0xFFFF0FF0, 0x400
BEGINNING = {"rflags": 2, "cr0": CR0_PE | CR0_ET, "dr6": DR6_DEFAULT, "dr7": DR7_DEFAULT}
"""Registers of a vCPU in protected mode that has executed nothing."""
EFER = 0xC0000080
MSR_REGISTERS = {
    0x10: "tsc", 0x174: "sysenter_cs", 0x175: "sysenter_esp", 0x176: "sysenter_eip",
    EFER: "msr_efer", 0xC0000081: "msr_star", 0xC0000082: "msr_lstar",
    0xC0000083: "msr_cstar", 0xC0000084: "msr_syscall_mask", 0xC0000100: "fs_base",
    0xC0000101: "gs_base", 0xC0000102: "shadow_gs", 0xC0000103: "msr_tsc_aux",
}  # fmt: skip
"""MSRs that a vCPU's context has."""
GENERAL_REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""As instructions number them."""
FLAT_CODE, FLAT_CODE_64, FLAT_DATA = 0xC9B, 0xA9B, 0xC93
"""Attributes of segments."""
FLAT_LIMIT = 0xFFFF_FFFF
_TASK_STATE = Segment(0, 0x67, 0x8B)
REGISTERS = {
    name: slice(offset, offset + width) for name, (offset, width) in HVM_CPU.fields.items()
}
"""Where they lie in a vCPU's context."""
_HIDDEN = ("base", "limit", "arbytes")
_T = TypeVar("_T")

Waits: TypeAlias = Generator[None, None, _T]
"""Hypervisor code on behalf of a vCPU: yields where Xen puts the vCPU on a wait queue."""


class Trap(NamedTuple):
    """An exception or interrupt (Xen: ``struct x86_event``); ``kind`` is ``X86_ET_*``."""

    vector: int
    kind: int
    error_code: int
    length: int
    cr2: int


@dataclass
class Deferred:
    """What responses asked for, until the vCPU runs next (Xen: ``struct arch_vm_event``)."""

    emulate_flags: int = 0
    emulation_data: bytes = b""
    registers: dict[str, int] | None = None
    control_registers: dict[int, int] = field(default_factory=dict)
    """Writes that wait for permission (``do_write``), by ``VM_EVENT_X86_*`` index."""
    msr: tuple[int, int] | None = None

    @property
    def waits(self) -> bool:
        """Whether there is anything to do."""
        return bool(
            self.emulate_flags
            or self.registers is not None
            or self.control_registers
            or self.msr is not None
        )


@dataclass
class Vcpu:
    """A virtual CPU, as far as views and events concern it."""

    number: int
    online: bool = True
    """Not ``VPF_down``."""
    initialised: bool = False
    """Whether its registers were set; the first vCPU's are by who builds the domain."""
    view: int = INVALID_VIEW
    veinfo: int | None = None
    """The frame of its #VE information page."""
    vm_functions: bool = False
    """Whether it may use VMFUNC (``SECONDARY_EXEC_ENABLE_VM_FUNCTIONS``)."""
    single_step: bool = False
    fast_step_view: int | None = None
    event_pauses: int = 0
    """Xen's ``vm_event_pause_count``."""
    ring_blocked: bool = False
    """Paused because the ring is nearly full (``_VPF_mem_access``)."""
    queued: bool = False
    """On the ring's wait queue."""
    halted: bool = False
    """Waits for an interrupt (``_VPF_blocked``)."""
    waiting: Waits[object] | None = None
    """What goes on once it is off the wait queue (``check_wakeup_from_wait``)."""
    deferred: Deferred | None = None
    """There while a monitor is enabled."""
    injected: Trap | None = None
    """From the toolstack (``inject_event``)."""
    pending: Trap | None = None
    """Delivered when the guest is entered (``VM_ENTRY_INTR_INFO``)."""
    step_pending: bool = False
    """A single-step trap waits for the guest to be entered (``GUEST_PENDING_DBG_EXCEPTIONS``)."""
    map_cache_stale: bool = False
    """``mapcache_invalidate``: a page was removed, and what runs next tells the device model."""
    next_interrupt: bool = False
    """``next_interrupt_enabled``."""
    monitor_trap_flag: bool = False
    """The execution control, which stays set until it has caused an exit."""
    delivered: list[tuple[int, int]] = field(default_factory=list)
    """What the guest's handlers got: (vector, kind)."""
    xcr0: int = 1
    msrs: dict[int, int] = field(default_factory=dict)
    """Those that the context has no place for."""
    cpu_time: int = 0
    """In nanoseconds."""
    context: bytearray = field(default_factory=lambda: bytearray(HVM_CPU.size))
    """Its ``hvm_hw_cpu`` record."""

    def __post_init__(self) -> None:
        self.set_register("cr0", CR0_ET)  # hvm_vcpu_reset_state

    @property
    def stopped(self) -> bool:
        """Whether anything of its own keeps it from running."""
        return bool(self.event_pauses or self.ring_blocked or self.queued or self.halted)

    def register(self, name: str) -> int:
        """Return a register of the context."""
        return int.from_bytes(self.context[REGISTERS[name]], "little")

    def set_register(self, name: str, value: int) -> None:
        """Set a register of the context; what it has no room for is cut off."""
        place = REGISTERS[name]
        width = place.stop - place.start
        mask = (1 << 8 * width) - 1
        self.context[place] = (value & mask).to_bytes(width, "little")

    def migrate(self) -> None:
        """Forget what no save has: what an agent or the toolstack has asked of the vCPU."""
        self.event_pauses = 0
        self.single_step = self.monitor_trap_flag = self.next_interrupt = False
        self.step_pending = False
        self.fast_step_view = self.injected = None

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Set registers of the context."""
        for name, value in values.items():
            self.set_register(name, value)

    def segment(self, name: str) -> Segment:
        """Return the hidden part of a segment register."""
        return Segment(*(self.register(f"{name}_{part}") for part in _HIDDEN))

    def set_segment(self, name: str, segment: Segment) -> None:
        """Set the hidden part of a segment register."""
        for part, value in zip(_HIDDEN, segment, strict=True):
            self.set_register(f"{name}_{part}", value)

    def set_flat_segments(self, code: int) -> None:
        """Set those that a guest begins with, given the attributes of CS."""
        for name in ("cs", "ds", "es", "ss"):
            attributes = code if name == "cs" else FLAT_DATA
            self.set_segment(name, Segment(0, FLAT_LIMIT, attributes))
        self.set_segment("tr", _TASK_STATE)

    def raise_trap(self, trap: Trap) -> None:
        """``vmx_inject_event``: what is pending already gives way, if not to a double fault."""
        if self.pending is not None and self.pending.kind == HARDWARE_EXCEPTION:
            vector = _combined(self.pending.vector, trap.vector)
            if vector != trap.vector:
                trap = Trap(vector, trap.kind, 0, trap.length, trap.cr2)
        self.pending = trap


def _combined(first: int, second: int) -> int:
    """``hvm_combine_hw_exceptions``, but for triple faults."""
    contributory = (0, 10, 11, 12, GP)
    if first in (PF, VE) and second in (*contributory, PF, VE):
        return DF
    return DF if first in contributory and second in contributory else second
