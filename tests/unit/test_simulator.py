# SPDX-License-Identifier: LGPL-2.1-or-later
"""vCPUs of the mock that execute machine code: what they do, what leaves guest mode, who hears.

What is expected is from the SDM (volume 3A for exceptions, 3C for exits) and Xen's ``vmx.c``,
``hvm.c``, ``hvm/monitor.c`` and ``hvm/emulate.c``, 4.14.0 to 4.22.0.
"""

from __future__ import annotations

import gc
import signal
import struct
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from xenaltp2m.abi.vm_event import Flag, Reason
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.core import Core
from xenaltp2m.backend.mock.engine import Engine
from xenaltp2m.backend.mock.machine import SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT
from xenaltp2m.backend.mock.physical_memory import PhysicalMemory
from xenaltp2m.backend.mock.virtual_memory import VirtualMemory
from xenaltp2m.errors import DomainNotFoundError, InvalidArgumentError
from xenaltp2m.types import PAGE_SIZE, Altp2mMode

from .machinecode import (
    CF,
    CODE,
    DATA,
    ET,
    FOREVER,
    GDT,
    HALT,
    HANDLERS,
    HOLE,
    HOLE_32,
    IDT,
    IF,
    IOPL,
    IST_STACK,
    KERNEL_CODE,
    KERNEL_DATA,
    OTHER,
    PAE,
    PE,
    PG,
    PRESENT,
    RF,
    SMAP,
    SMEP,
    STACK,
    STOP,
    TABLES,
    TF,
    TSS,
    USER,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    WRITABLE,
    Computer,
    elf,
    gate,
)
from .test_mock_events import Request

DE, DB, BP, OF, UD, DF, NP, GP, PF, VE = 0, 1, 3, 4, 6, 8, 11, 13, 14, 20
R, RW, X, RX, RWX = 1, 3, 4, 5, 7
PAUSED, TOGGLE, FAST, SWITCH = (
    Flag.VCPU_PAUSED, Flag.TOGGLE_SINGLESTEP, Flag.FAST_SINGLESTEP, Flag.ALTERNATE_P2M,
)  # fmt: skip
EMULATE, NOWRITE, READ_DATA, INSN_DATA, SET = (
    Flag.EMULATE, Flag.EMULATE_NOWRITE, Flag.SET_EMUL_READ_DATA, Flag.SET_EMUL_INSN_DATA,
    Flag.SET_REGISTERS,
)  # fmt: skip
NOP, INT3, UD2, IRET = b"\x90", b"\xcc", b"\x0f\x0b", b"\xcf"
VMFUNC = b"\x0f\x01\xd4"
STEP_DR6 = 1 << 14
DF_SET = 1 << 10 | 2
LSTAR, PAT, EFER = 0xC0000082, 0x277, 0xC0000080
OSFXSR = 1 << 9


def int32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def load_eax(address: int) -> bytes:
    return b"\xa1" + int32(address)


def store_eax(address: int) -> bytes:
    return b"\xa3" + int32(address)


def store(address: int, value: int) -> bytes:
    """MOV dword [address], value, paging off."""
    return b"\xc7\x05" + int32(address) + int32(value)


def in_ring_3() -> Computer:
    """In 64-bit mode, where everybody may do everything that pages forbid."""
    computer = Computer(NOP)
    computer.go_long(PRESENT | WRITABLE | USER)
    computer.describe(ring=3)
    return computer


@pytest.fixture
def ring_3() -> Computer:
    return in_ring_3()


# The machine.


def test_it_computes_and_writes_to_the_debug_port() -> None:
    computer = Computer(b"\xb0A\xe6\xe9\x40\xe6\xe9" + STOP)
    computer.run()
    assert computer.host.console(computer.domid) == "AB"
    assert computer.vcpu.halted
    assert computer.register("rip") == CODE + 9


def test_halting_for_good_powers_the_domain_off() -> None:
    computer = Computer(HALT)
    computer.run()
    assert computer.model.shutdown_code == SHUTDOWN_POWEROFF
    assert not computer.vcpu.online


def test_a_guest_begins_as_xen_has_it_begin() -> None:
    computer = Computer(STOP)
    vcpu = computer.vcpu
    for segment, kind in (("cs", 0xC9B), ("ds", 0xC93), ("es", 0xC93), ("ss", 0xC93)):
        assert vcpu.register(f"{segment}_arbytes") == kind
        assert vcpu.register(f"{segment}_limit") == 0xFFFF_FFFF
    assert vcpu.register("rip") == CODE
    assert vcpu.register("rflags") == 2
    info = vcpu.register("rbx")
    assert struct.unpack("<II", computer.read(info, 8)) == (0x336EC578, 1)


def test_fault_24_the_fpu_begins_as_after_a_reset() -> None:
    """SDM 3A, table 10-1: FCW 40H, MXCSR 1F80H; FNINIT makes it 37FH."""
    fnstcw, stmxcsr = b"\xd9\x3d", b"\x0f\xae\x1d"
    code = fnstcw + int32(DATA) + stmxcsr + int32(DATA + 4) + b"\xdb\xe3" + fnstcw
    computer = Computer(code + int32(DATA + 8) + STOP, cr4=OSFXSR)
    computer.run()
    assert computer.words(DATA, 3) == [0x40, 0x1F80, 0x37F]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1000, 1001, 2500])
def test_fault_26_a_run_executes_so_many_instructions(steps: int) -> None:
    computer = Computer(b"\x40" + b"\xeb\xfd", rax=0)  # inc %eax; jmp back
    for total in (steps, 2 * steps):
        assert computer.host.run(computer.domid, steps) == steps
        assert computer.register("rax") == (total + 1) // 2
        assert computer.register("rip") == CODE + total % 2


def test_fault_26_a_run_ends_within_an_exiting_program() -> None:
    """Instructions that leave guest mode count like others; of faults, what came before."""
    computer = Computer(b"\x0f\xa2\x40\xe6\xe9" * 4 + UD2)
    computer.describe()
    assert computer.host.run(computer.domid, 7) == 7
    assert computer.register("rip") == CODE + 2 * 5 + 2
    assert computer.host.run(computer.domid, 7) == 6  # five, and the handler's HLT
    assert computer.vector == UD


def test_fault_26_each_repetition_is_a_step() -> None:
    computer = Computer(b"\xf3\xaa" + FOREVER, rdi=DATA, rcx=100, rax=1)
    assert computer.host.run(computer.domid, 30) == 30
    assert computer.register("rcx") == 70
    assert computer.register("rip") == CODE


def test_fault_26_of_several_vcpus_together() -> None:
    computer = Computer(b"\x40" + b"\xeb\xfd", vcpus=3, rax=0)
    for vcpu in computer.vcpus[1:]:
        vcpu.context[:] = computer.vcpu.context
        vcpu.initialised = vcpu.online = True
    for steps in (1, 10, 3000):
        before = sum(vcpu.register("rax") for vcpu in computer.vcpus)
        assert computer.host.run(computer.domid, steps) == steps
        after = sum(vcpu.register("rax") for vcpu in computer.vcpus)
        assert abs(after - before - steps / 2) <= 1.5


def test_fault_26_steps_at_once_are_instructions() -> None:
    computer = Computer(b"\x40" + b"\xeb\xfd", rax=0)
    computer.host.domain_pause(computer.domid)
    computer.host.steps_at_once = 10
    computer.host.domain_unpause(computer.domid)
    assert computer.register("rax") == 5


def test_a_hole_gives_ones_and_takes_anything() -> None:
    computer = Computer(load_eax(HOLE) + store(HOLE, 5) + b"\x8b\x1d" + HOLE_32 + STOP)
    computer.run()
    assert computer.register("rax") == computer.register("rbx") == 0xFFFF_FFFF
    assert computer.vcpu.halted


def test_code_in_a_hole_faults() -> None:
    computer = Computer(b"\xb8" + HOLE_32 + b"\xff\xe0")  # JMP EAX
    computer.describe()
    assert computer.handled()[:2] == [0, HOLE]  # hvm_hap_nested_page_fault: #GP(0)
    assert computer.vector == GP


# Segments.

BOOT_SECTOR = 0x7C10
"""07c0:0010."""


def in_a_segment(code: bytes, base: int, offset: int, **options: Any) -> Computer:
    """32-bit code at an offset of a code segment with a base."""
    computer = Computer(b"", {base + offset: code}, **options)
    computer.set(cs_base=base, rip=offset)
    return computer


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    ("base", "offset"),
    [
        (CODE - 0x40, 0x40),
        (CODE + 0xFF0, 0),
        (CODE + 0x123, 0xED8),  # the linear page ends within the code, the segment's does not
        (0xFFFF_F010, CODE + 0x1010),  # and the sum wraps
    ],
)
def test_fault_02_code_in_a_segment_with_a_base(base: int, offset: int, counted: bool) -> None:
    call = b"\xe8\x01\x00\x00\x00\x90\x5b"  # call 1f; nop; 1: pop %ebx
    code = b"\xb8\x05\x00\x00\x00" + store_eax(DATA) + call + b"\x0f\xa2" + STOP
    linear = base + offset & 0xFFFF_FFFF
    computer = Computer(b"", {linear: code})
    computer.set(cs_base=base, rip=offset)
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vcpu.halted
    assert computer.words(DATA, 1) == [5]
    assert computer.register("rip") == offset + len(code)
    assert computer.words(STACK - 4, 1) == [offset + 15]  # where the call returns to


def test_fault_02_each_step_in_a_segment_with_a_base() -> None:
    computer = in_a_segment(NOP + b"\x0f\xa2" + NOP + STOP, CODE - 0x40, 0x44, listen=True)
    computer.switch("singlestep", True)
    computer.vcpu.single_step = True
    seen = []
    while not computer.vcpu.halted:
        computer.run()
        for request in computer.take():
            seen.append((request.register("rip"), request["singlestep.gfn"]))
            computer.answer(request)
    # CPUID is completed by Xen, so that the step comes after its successor
    assert seen == [(0x45, CODE >> 12), (0x48, CODE >> 12), (0x49, CODE >> 12)]


def test_fault_02_a_fetch_that_a_view_denies_is_told_at_its_linear_address() -> None:
    code = NOP * 0x20 + STOP
    computer = in_a_segment(code, CODE + 0xF80, 0x70, views=True, listen=True)
    computer.view((CODE + 0x1000 >> 12, R))
    request = heard(computer, Reason.MEM_ACCESS)
    assert request.register("rip") == 0x80
    assert request["mem_access.gla"] == CODE + 0x1000
    assert request["mem_access.gfn"] == CODE + 0x1000 >> 12


def test_fault_02_an_int3_in_a_segment_with_a_base() -> None:
    computer = in_a_segment(NOP + INT3, CODE + 0xFF8, 0x10, listen=True)
    computer.switch("software_breakpoint", True)
    request = heard(computer, Reason.SOFTWARE_BREAKPOINT)
    assert request.register("rip") == 0x11
    assert request["software_breakpoint.gfn"] == CODE + 0x1009 >> 12


def test_fault_02_a_far_jump_into_another_segment() -> None:
    computer = Computer(
        b"\xea\x10\x00\x00\x00\x28\x00", {OTHER + 0x30: b"\x0f\xa2\x66\x8c\xcb" + STOP}
    )
    computer.describe()
    descriptor = 0x0040_9A00_0000_FFFF | (OTHER + 0x20) << 16  # 32-bit code, limit 0xffff
    computer.write(GDT + 40, struct.pack("<Q", descriptor))
    computer.set(gdtr_limit=47)
    computer.run()
    assert computer.vcpu.halted
    assert computer.register("rbx") & 0xFFFF == computer.register("cs_sel") == 0x28
    assert computer.register("cs_base") == OTHER + 0x20
    assert computer.register("rip") == 0x10 + 2 + 3 + 2


@pytest.mark.parametrize("counted", [False, True])
def test_fault_02_real_mode(counted: bool) -> None:
    """Code, data and stack are each in a segment of their own."""
    call = b"\xe8\x01\x00\x90\x5b"  # call 1f; nop; 1: pop %bx
    code = b"\xb8\x34\x12\xa3\x00\x01" + call + b"\x26\x89\x1e\x02\x00\x0f\xa2" + STOP
    computer = Computer(b"", {BOOT_SECTOR: code})
    computer.go_real(cs=0x7C00, ds=DATA + 0x10, es=OTHER + 0x20, ss=0x30000)
    computer.set(rip=0x10, rsp=0x200)
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vcpu.halted
    assert computer.register("rip") == 0x10 + len(code)
    assert computer.read(DATA + 0x110, 2) == b"\x34\x12"
    assert computer.read(OTHER + 0x22, 2) == computer.read(0x301FE, 2) == b"\x19\x00"


def test_fault_02_a_far_jump_of_real_mode() -> None:
    computer = Computer(b"", {BOOT_SECTOR: b"\xea\x04\x00\x03\x20", 0x20034: b"\x0f\xa2" + STOP})
    computer.go_real(cs=0x7C00)
    computer.set(rip=0x10)
    computer.run()
    assert computer.vcpu.halted
    assert (computer.register("cs_sel"), computer.register("cs_base")) == (0x2003, 0x20030)
    assert computer.register("rip") == 4 + 4


@pytest.mark.parametrize(("code", "vector"), [("cc", BP), ("cd20", 0x20), ("0f0b", UD), ("f1", DB)])
def test_fault_02_exceptions_of_real_mode(code: str, vector: int) -> None:
    """SDM 3B, 21.1.4: by the vectors at the IDT's base; IRET goes back."""
    raw = bytes.fromhex(code)
    handler = b"\x9c\x58" + (b"\x36\x83\x06\xfa\x00\x02" if vector == UD else b"") + IRET
    computer = Computer(
        b"",
        {
            4 * vector: struct.pack("<HH", 0x40, 0x2000),
            BOOT_SECTOR: raw + STOP,
            0x20040: handler,  # pushf; pop %ax; for UD2: addw $2, %ss:0xfa
        },
    )
    computer.go_real(cs=0x7C00, ss=0x30FF0)
    computer.set(rip=0x10, rsp=0xABCD_0100, rflags=IF | CF | 2)
    computer.run()
    assert computer.vcpu.halted
    assert computer.vcpu.delivered[0][0] == vector
    frame = struct.unpack("<HHH", computer.read(0x310EA, 6))
    assert frame == (0x10 + len(raw), 0x7C0, IF | CF | 2)
    assert computer.register("rax") & 0xFFFF == CF | 2
    assert computer.register("rsp") == 0xABCD_0100
    assert computer.register("rip") == 0x10 + len(raw) + 2


def test_fault_02_a_vector_beyond_the_table_of_real_mode_is_a_triple_fault() -> None:
    computer = Computer(b"", {BOOT_SECTOR: b"\xcd\x20"})
    computer.go_real(cs=0x7C00)
    computer.set(rip=0x10, idtr_limit=0x1F)
    computer.run()
    assert computer.model.shutdown_code == SHUTDOWN_REBOOT


def test_fault_02_16_bit_protected_mode() -> None:
    """Through a gate of 16 bits, onto a stack of 16 bits, both with a base."""
    computer = Computer(b"", {CODE + 0x30: b"\x90\xcd\x20" + STOP, HANDLERS + 0x48: HALT})
    computer.describe()
    code = 0x0000_9A00_0000_FFFF | (CODE + 0x20) << 16
    handlers = 0x0000_9A00_0000_FFFF | (HANDLERS + 0x40) << 16
    computer.write(GDT + 40, struct.pack("<2Q", code, handlers))
    entry = struct.pack("<HHHH", 8, 0x30, 0x8600, 0xFFFF)
    computer.write(IDT + 8 * 0x20, entry)
    computer.set(gdtr_limit=55, cs_sel=0x28, cs_base=CODE + 0x20, cs_arbytes=0x9B, rip=0x10)
    computer.set(ss_base=DATA + 0x10, ss_arbytes=0x93, rsp=0x1234_0004)
    computer.run()
    assert computer.register("rip") == 9
    assert (computer.register("cs_sel"), computer.register("cs_base")) == (0x30, HANDLERS + 0x40)
    assert computer.register("rsp") == 0x1234_FFFE  # SP wraps
    frame = computer.read(DATA + 0x10, 4) + computer.read(DATA + 0x10 + 0xFFFE, 2)
    assert struct.unpack("<HHH", frame) == (0x28, 2, 0x13)


def test_fault_02_64_bit_mode_ignores_bases() -> None:
    computer = Computer(b"\xb0\x05\xa2" + struct.pack("<Q", DATA) + STOP)
    computer.go_long()
    computer.set(cs_base=0x5000, ds_base=0x6000, ss_base=0x7000)
    computer.run()
    assert computer.vcpu.halted
    assert computer.read(DATA, 1) == b"\x05"
    assert computer.register("cs_base") == 0x5000


# Exceptions.


def test_an_exception_in_32_bit_mode() -> None:
    computer = Computer(b"\xf9" + UD2)
    computer.describe()
    assert computer.handled()[:3] == [CODE + 1, KERNEL_CODE, RF | 2 | CF]
    assert computer.vector == UD
    assert computer.register("rsp") == STACK - 12
    assert computer.register("rflags") & (RF | TF) == 0


def test_an_error_code_in_32_bit_mode() -> None:
    computer = Computer(b"\xcd\x80")  # behind the IDT's limit
    computer.describe()
    assert computer.handled()[:4] == [0x80 * 8 + 2, CODE, KERNEL_CODE, RF | 2]
    assert computer.vector == GP


def test_an_exception_in_64_bit_mode() -> None:
    computer = Computer(UD2)
    computer.go_long()
    computer.set(rsp=STACK + 8)
    computer.describe()
    assert computer.handled()[:5] == [CODE, KERNEL_CODE, RF | 2, STACK + 8, KERNEL_DATA]
    assert computer.register("rsp") == STACK - 40  # aligned before it pushes


def test_a_page_fault() -> None:
    computer = Computer(b"\x48\xa1" + (DATA + 0x123).to_bytes(8, "little"))
    computer.go_long()
    computer.describe()
    computer.map(DATA, 0)
    assert computer.handled()[:2] == [0, CODE]
    assert computer.vector == PF
    assert computer.register("cr2") == DATA + 0x123


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_interrupt_gates_mask_interrupts(wide: bool, kind: int) -> None:
    computer = Computer(UD2)
    if wide:
        computer.go_long()
    computer.describe(kind=kind)
    computer.set(rflags=IF | 2)
    computer.write(CODE + 0x100, FOREVER)
    entry = gate(CODE + 0x100, wide=wide, kind=kind)
    computer.write(IDT + UD * len(entry), entry)
    computer.run(3)
    assert computer.register("rip") == CODE + 0x100
    assert bool(computer.register("rflags") & IF) is (kind == 0xF)


@pytest.mark.parametrize("wide", [False, True])
def test_the_stack_changes_with_the_privilege_level(wide: bool) -> None:
    computer = Computer(UD2)
    if wide:
        computer.go_long(PRESENT | WRITABLE | USER)
    computer.describe(ring=3)
    assert computer.handled()[:5] == [CODE, USER_CODE, RF | 2, USER_STACK, USER_DATA]
    assert computer.vector == UD
    assert computer.register("rsp") == STACK - (40 if wide else 20)
    assert computer.register("cs_sel") == KERNEL_CODE
    assert computer.register("ss_sel") == (0 if wide else KERNEL_DATA)  # SDM 3A, 6.14.4
    assert computer.processor.privilege == 0


def test_a_handler_returns_to_ring_3(ring_3: Computer) -> None:
    ring_3.write(CODE, UD2 + b"\xb0\x07" + FOREVER)
    ring_3.write(CODE + 0x100, b"\x48\x83\x04\x24\x02\x48" + IRET)  # rip += 2
    ring_3.write(IDT + 16 * UD, gate(CODE + 0x100, wide=True))
    ring_3.run(10)
    assert ring_3.register("rax") & 0xFF == 7
    assert (ring_3.register("cs_sel"), ring_3.register("ss_sel")) == (USER_CODE, USER_DATA)
    assert ring_3.register("rsp") == USER_STACK
    assert ring_3.processor.privilege == 3


def test_a_stack_of_the_interrupt_stack_table() -> None:
    computer = Computer(UD2)
    computer.go_long()
    computer.describe(at=[UD], stack=1)
    assert computer.handled()[3:5] == [STACK, KERNEL_DATA]
    assert computer.register("rsp") == IST_STACK - 40


@pytest.mark.parametrize("wide", [False, True])
def test_a_double_fault(wide: bool) -> None:
    """#NP for the gate of #GP."""
    computer = Computer(b"\xcd\x80")
    if wide:
        computer.go_long()
    computer.describe(at=[GP], present=False)
    assert computer.handled()[:2] == [0, CODE]
    assert computer.vector == DF


@pytest.mark.parametrize("wide", [False, True])
def test_a_triple_fault_is_a_reboot(wide: bool) -> None:
    computer = Computer(b"\xcd\x80")
    if wide:
        computer.go_long()
    computer.describe(at=[GP, DF], present=False)
    computer.run()
    assert computer.model.shutdown_code == SHUTDOWN_REBOOT
    assert computer.run() == 0


def test_a_benign_exception_whose_gate_faults_is_no_double_fault() -> None:
    computer = Computer(UD2)
    computer.describe(at=[UD], present=False)
    assert computer.handled()[:2] == [UD * 8 + 2 + 1, CODE]
    assert computer.vector == NP


@pytest.mark.parametrize(
    ("descriptor", "vector"),
    [
        (0x00CF93000000FFFF, GP),  # data
        (0x00CF1B000000FFFF, NP),  # not present
        (0x00CFFB000000FFFF, GP),  # of ring 3, while in ring 0
    ],
)
def test_gates_to_bad_code_segments(descriptor: int, vector: int) -> None:
    """The error code is the selector, and that it came of an exception."""
    computer = Computer(UD2)
    computer.describe()
    computer.write(GDT + 32, struct.pack("<Q", descriptor))
    entry = bytearray(gate(0, wide=False))
    entry[2:4] = b"\x20\x00"
    computer.write(IDT + 8 * UD, bytes(entry))
    assert computer.handled()[0] == 0x20 | 1
    assert computer.vector == vector


def test_64_bit_mode_wants_64_bit_handlers() -> None:
    computer = Computer(UD2)
    computer.go_long()
    computer.describe()
    computer.write(GDT + 32, struct.pack("<Q", 0x00CF9B000000FFFF))
    entry = bytearray(gate(0, wide=True))
    entry[2:4] = b"\x20\x00"
    computer.write(IDT + 16 * UD, bytes(entry))
    assert computer.handled()[0] == 0x20 | 1
    assert computer.vector == GP


@pytest.mark.parametrize("code", ["cd20", "cc", "6690cd20"])
def test_software_interrupts_push_what_follows(code: str) -> None:
    raw = bytes.fromhex(code)
    computer = Computer(raw)
    computer.describe()
    assert computer.handled()[:3] == [CODE + len(raw), KERNEL_CODE, 2]
    assert computer.vector == (BP if code == "cc" else 0x20)


@pytest.mark.parametrize(("code", "vector"), [("cd20", 0x20), ("cc", BP), ("cd06", UD)])
@pytest.mark.parametrize("ring", [0, 3])
def test_software_interrupts_of_ring_3_want_a_gate_for_it(
    ring_3: Computer, code: str, vector: int, ring: int
) -> None:
    ring_3.write(CODE, bytes.fromhex(code))
    ring_3.describe(ring=3, at=[vector])
    handler = ring_3.read(IDT + 16 * vector, 16)
    kind = bytearray(handler)
    kind[5] = 0x8E | ring << 5
    ring_3.write(IDT + 16 * vector, bytes(kind))
    found = ring_3.handled()
    if ring:
        assert ring_3.vector == vector
        assert found[0] == CODE + len(code) // 2
    else:
        assert ring_3.vector == GP
        assert found[:2] == [vector * 8 + 2, CODE]


def test_exceptions_of_ring_3_need_no_gate_for_it(ring_3: Computer) -> None:
    ring_3.write(CODE, UD2)
    ring_3.handled()
    assert ring_3.vector == UD


def test_into() -> None:
    """Software as INT n, and a trap; in 64-bit mode there is none."""
    overflow = b"\xb0\x7f\x04\x01"
    computer = Computer(b"\xce" + overflow + b"\xce")
    computer.describe()
    assert computer.handled()[0] == CODE + 6
    assert computer.vector == OF

    computer = Computer(b"\xce")
    computer.go_long()
    computer.describe()
    assert computer.handled()[0] == CODE
    assert computer.vector == UD


def test_int1() -> None:
    """It exits as any #DB; told nobody, the guest gets it, and behind the instruction."""
    computer = Computer(b"\xf1")
    computer.describe()
    assert computer.handled()[:3] == [CODE + 1, KERNEL_CODE, 2]
    assert computer.vector == DB


def test_division_by_zero() -> None:
    computer = Computer(b"\xf9\xf7\xf1", rcx=0)
    computer.describe()
    assert computer.handled()[:3] == [CODE + 1, KERNEL_CODE, RF | 2 | CF]
    assert computer.vector == DE


PRIVILEGED = [
    "f4", "fa", "fb", "0f30", "0f32", "0f22d8", "0f20d8", "0f06", "0f08", "0f09", "0f0118",
    "0f0110", "0f00d8", "0f00d0", "0f0138", "0f01d1", "0f01f8", "0f21f8", "0f23f8", "ec", "e6e9",
    "6e", "6c", "0f33",
]  # fmt: skip


@pytest.mark.parametrize("code", PRIVILEGED)
def test_privileged_instructions(ring_3: Computer, code: str) -> None:
    ring_3.write(CODE, bytes.fromhex(code))
    ring_3.set(rax=DATA, rcx=0, rsi=DATA, rdi=DATA)
    assert ring_3.handled()[:3] == [0, CODE, USER_CODE]
    assert ring_3.vector == GP
    assert ring_3.host.console(ring_3.domid) == ""


def test_code_that_ring_0_executed_before(ring_3: Computer) -> None:
    """What is privileged is so in the same page, too."""
    ring_3.write(CODE, b"\xfa" + FOREVER)
    ring_3.describe()
    ring_3.run(2)
    assert ring_3.vector is None
    ring_3.describe(ring=3)
    ring_3.set(rip=CODE)
    assert ring_3.handled()[:3] == [0, CODE, USER_CODE]
    assert ring_3.vector == GP


@pytest.mark.parametrize("cr4", [0, SMEP, SMAP, SMEP | SMAP])
def test_instructions_of_ring_3_under_smep_and_smap(cr4: int) -> None:
    """Nobody but ring 3 itself is kept from its pages."""
    computer = Computer(b"\xcd\x20")
    computer.go_long(PRESENT | WRITABLE, cr4=cr4)
    user = PRESENT | WRITABLE | USER
    computer.map(CODE, CODE | user)
    computer.describe(ring=3)
    kind = bytearray(computer.read(IDT + 16 * 0x20, 16))
    kind[5] |= 3 << 5
    computer.write(IDT + 16 * 0x20, bytes(kind))
    assert computer.handled()[:2] == [CODE + 2, USER_CODE]
    assert computer.vector == 0x20


@pytest.mark.parametrize("code", ["f7f1", "8ed8"], ids=["#DE", "#GP"])
def test_fault_20_an_exception_after_another(ring_3: Computer, code: str) -> None:
    """The first was delivered and returned from: no double fault, and so for ever."""
    raw = bytes.fromhex(code)
    back = b"\x48\x83\x04\x24\x02\x48" + IRET  # rip += 2
    with_code = b"\x48\x83\xc4\x08" + back
    load_and_store = b"\x8b\x04\x25" + int32(OTHER) + b"\x89\x04\x25" + int32(CODE + 0x800)
    ring_3.write(OTHER, int32(0x1000))  # no selector
    ring_3.write(CODE, load_and_store + b"\x31\xc9" + raw * 3 + UD2)
    vector = DE if code == "f7f1" else GP
    ring_3.write(CODE + 0x100, back if vector == DE else with_code)
    ring_3.write(IDT + 16 * vector, gate(CODE + 0x100, wide=True))
    ring_3.run(40)
    assert ring_3.vector == UD
    assert [one for one, _ in ring_3.vcpu.delivered] == [vector] * 3 + [UD]


SCE = 1


def syscall_in(computer: Computer, code: bytes = b"\x0f\x05") -> None:
    computer.write(CODE, code)
    computer.write(OTHER, HALT)
    star = KERNEL_CODE << 32 | (KERNEL_DATA | 3) << 48
    computer.set(msr_star=star, msr_lstar=OTHER, msr_syscall_mask=IF | TF | 0x400)
    computer.set(rflags=IF | CF | 0x400 | 2, rcx=7, r11=7)


@pytest.mark.parametrize("emulated", [False, True])
def test_fault_21_syscall(emulated: bool) -> None:
    """SDM 2B; by Xen's emulator, too."""
    computer = in_ring_3()
    syscall_in(computer, NOP + b"\x0f\x05")
    computer.set(msr_efer=computer.register("msr_efer") | SCE)
    if emulated:
        computer.listen()
        computer.switch("software_breakpoint", True)
        computer.write(CODE + 1, INT3)
        request = heard(computer, Reason.SOFTWARE_BREAKPOINT)
        computer.answer(request, EMULATE | INSN_DATA, data=b"\x0f\x05".ljust(16, NOP))
    computer.run()
    assert computer.register("rip") == OTHER + 1
    assert computer.register("rcx") == CODE + 3
    assert computer.register("r11") == IF | CF | 0x400 | 2
    assert computer.register("rflags") & ~0x8D4 == CF | 2
    assert (computer.register("cs_sel"), computer.register("ss_sel")) == (KERNEL_CODE, KERNEL_DATA)
    assert computer.register("cs_arbytes") == 0xA9B
    assert computer.register("ss_arbytes") == 0xC93
    assert computer.register("rsp") == USER_STACK
    assert computer.processor.privilege == 0


@pytest.mark.parametrize("wide", [False, True])
def test_fault_21_syscall_is_undefined_without_sce_and_outside_64_bit_mode(wide: bool) -> None:
    computer = Computer(NOP)
    if wide:
        computer.go_long()
    computer.describe()
    syscall_in(computer)
    if not wide:
        computer.set(msr_efer=SCE)
    assert computer.handled()[0] == CODE
    assert computer.vector == UD
    assert computer.register("rcx") == computer.register("r11") == 7


@pytest.mark.parametrize(
    "before", ["90", "ce", "0fa2", "0f06"], ids=["NOP", "INTO", "CPUID", "CLTS"]
)
def test_a_guest_reads_in_dr6_what_it_was_stopped_for(before: str) -> None:
    """SDM 3B, 18.2.3; also where Xen or the simulator completes the instruction, not Unicorn."""
    code = SET_TF + bytes.fromhex(before) + STOP
    computer = Computer(code, rax=0)
    computer.describe()
    computer.write(HANDLERS + 16 * DB, b"\x0f\x21\xf0\xf4")  # mov %dr6, %eax; hlt
    computer.run()
    assert computer.register("rax") == 0xFFFF_4FF0


def test_debug_registers_are_those_of_the_context() -> None:
    """A guest clears DR6 and sets others; reserved bits read as they do (SDM 3B, 18.2)."""
    code = b"\x31\xc0\x0f\x23\xf0"  # xor %eax, %eax; mov %eax, %dr6
    code += b"\x48\x0f\x23\xc0\x0f\x23\xd8\x0f\x23\xf8"  # dec %eax; to dr0, dr3, dr7
    code += b"\x0f\x21\xf9\x0f\x21\xe2" + STOP  # dr7 to %ecx; dr4, which is dr6, to %edx
    computer = Computer(code, dr6=0xFFFF_4FF0)
    computer.run()
    assert computer.register("dr6") == computer.register("rdx") == 0xFFFF_0FF0
    assert computer.register("dr0") == computer.register("dr3") == 0xFFFF_FFFF
    assert computer.register("dr7") == computer.register("rcx") == 0xFFFF_27FF


@pytest.mark.parametrize(
    ("code", "vector"),
    [("0f23f0", GP), ("0f23f8", GP), ("0f21e0", UD), ("440f21c0", UD)],
    ids=["dr6 of 33 bits", "dr7 of 33 bits", "dr4 with CR4.DE", "dr8"],
)
def test_moves_to_debug_registers_that_fault(code: str, vector: int) -> None:
    """SDM 2B, MOV to and from debug registers."""
    computer = Computer(bytes.fromhex(code))
    computer.go_long(cr4=1 << 3)
    computer.describe()
    computer.set(rax=1 << 32)
    computer.handled()
    assert computer.vector == vector


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("ring", [0, 3])
def test_fault_21_sysenter(wide: bool, ring: int) -> None:
    computer = Computer(b"\x0f\x34", {OTHER: HALT})
    if wide:
        computer.go_long(PRESENT | WRITABLE | USER)
    computer.describe(ring=ring)
    computer.set(sysenter_cs=KERNEL_CODE | 3, sysenter_eip=OTHER, sysenter_esp=IST_STACK)
    computer.set(rflags=IF | CF | 2)
    computer.run()
    assert computer.register("rip") == OTHER + 1
    assert computer.register("rsp") == IST_STACK
    assert computer.register("rflags") == CF | 2
    assert (computer.register("cs_sel"), computer.register("ss_sel")) == (KERNEL_CODE, KERNEL_DATA)
    assert computer.register("cs_arbytes") == (0xA9B if wide else 0xC9B)
    assert computer.processor.privilege == 0


def test_fault_21_sysenter_wants_a_selector_and_protected_mode() -> None:
    computer = Computer(b"\x0f\x34", sysenter_eip=OTHER)
    computer.describe()
    assert computer.handled()[:2] == [0, CODE]
    assert computer.vector == GP
    computer = Computer(b"", {BOOT_SECTOR: b"\x0f\x34", 4 * GP: struct.pack("<HH", 5, 0x2000)})
    computer.write(0x20005, HALT)
    computer.go_real(cs=0x7C00, ss=0x30000)
    computer.set(rip=0x10, sysenter_cs=KERNEL_CODE, rsp=0x100)
    computer.run()
    assert computer.vcpu.delivered == [(GP, 3)]
    assert computer.register("cs_base") + computer.register("rip") == 0x20006


def test_fault_21_to_ring_3_and_back(ring_3: Computer) -> None:
    """SYSRET goes back to the instruction after SYSCALL."""
    syscall_in(ring_3, b"\x0f\x05\xb0\x07\xf4")
    ring_3.set(msr_efer=ring_3.register("msr_efer") | SCE)
    ring_3.write(OTHER, b"\x48\x0f\x07")
    assert ring_3.handled()[:2] == [0, CODE + 4]  # the HLT is not for ring 3
    assert ring_3.vector == GP
    assert ring_3.register("rax") & 0xFF == 7


# The trap flag.

SET_TF = b"\x9c\x81\x0c\x24" + int32(TF) + b"\x9d"


@pytest.mark.parametrize(
    ("code", "flags"),
    [
        ("83c0ff", 0x84),  # ADD EAX, -1: 0xffffffff: SF, PF
        ("f9", CF),
        ("90", 0),
        ("0fa2", 0),  # Xen does this one
        ("e6e9", 0),
        ("0f20c1", 0),
        ("0f06", 0),  # CLTS: nothing changes, no exit
        ("b90b010000", 0),
    ],
)
def test_a_guest_steps_itself(code: str, flags: int) -> None:
    raw = bytes.fromhex(code)
    computer = Computer(SET_TF + raw + NOP * 3, rax=0, rflags=2)
    computer.describe()
    found = computer.handled()
    assert computer.vector == DB
    assert found[0] == CODE + len(SET_TF) + len(raw)
    assert found[2] & ~RF == flags | TF | 2
    assert computer.register("dr6") & STEP_DR6
    assert computer.vcpu.delivered == [(DB, 3)]


def test_steps_of_the_guest_are_heard() -> None:
    computer = Computer(SET_TF + NOP + NOP + STOP, listen=True)
    computer.describe()
    computer.switch("debug_exceptions", True, True)
    computer.run()
    request = computer.event(Reason.DEBUG_EXCEPTION)
    assert request.register("rip") == CODE + len(SET_TF) + 1
    assert request["debug_exception.type"] == 3
    assert request["debug_exception.insn_length"] == 0
    computer.answer(request)
    computer.run()
    assert computer.event(Reason.DEBUG_EXCEPTION).register("rip") == CODE + len(SET_TF) + 2


# What leaves guest mode.


def heard(computer: Computer, reason: Reason) -> Request:
    computer.run()
    return computer.event(reason)


def test_control_registers_are_heard() -> None:
    computer = Computer(b"\x0f\x22\xd8\x0f\x22\xe1" + STOP, listen=True, rax=0x5000, rcx=PAE)
    computer.ctrlreg(1)
    computer.ctrlreg(2)
    request = heard(computer, Reason.WRITE_CTRLREG)
    assert request["write_ctrlreg.index"] == 1
    assert (request["write_ctrlreg.old_value"], request["write_ctrlreg.new_value"]) == (0, 0x5000)
    assert request.register("rip") == CODE
    computer.answer(request)
    request = heard(computer, Reason.WRITE_CTRLREG)
    assert request["write_ctrlreg.index"] == 2
    assert request["write_ctrlreg.new_value"] == PAE
    computer.answer(request)
    computer.run()
    assert computer.vcpu.halted
    assert (computer.register("cr3"), computer.register("cr4")) == (0x5000, PAE)


@pytest.mark.parametrize(
    ("code", "registers"),
    [
        ("0f22c0", {"rax": PG}),  # paging without protection
        ("0f22e0", {"rax": 1 << 31}),
    ],
)
def test_bad_control_registers_fault(code: str, registers: dict[str, int]) -> None:
    computer = Computer(bytes.fromhex(code))
    computer.set(**registers)
    computer.describe()
    assert computer.handled()[:2] == [0, CODE]
    assert computer.vector == GP


def test_cr2_is_the_guests_own() -> None:
    computer = Computer(b"\x0f\x22\xd0\x0f\x20\xd1" + STOP, rax=0x123450)
    computer.run()
    assert computer.register("cr2") == computer.register("rcx") == 0x123450


def test_going_into_long_mode() -> None:
    """EFER.LMA follows CR0.PG where LME is set (SDM 3A, 9.8.5)."""
    computer = Computer(
        b"\xb9" + int32(EFER) + b"\xb8" + int32(1 << 8) + b"\x31\xd2\x0f\x30"
        b"\xb8" + int32(PG | PE | 0x10) + b"\x0f\x22\xc0\x0f\x32" + STOP
    )  # fmt: skip
    computer.go_long()
    computer.wide = False
    computer.set(cs_arbytes=0xC9B, msr_efer=0, cr0=PE | 0x10)
    computer.run()
    assert computer.vcpu.halted
    assert computer.register("rax") == computer.register("msr_efer") == 1 << 8 | 1 << 10


@pytest.mark.parametrize("msr", [PAT, LSTAR, 0xC0000100, 0x174])
def test_model_specific_registers_keep_what_is_written(msr: int) -> None:
    write = b"\xb9" + int32(msr) + b"\xb8" + int32(0x4433) + b"\x31\xd2\x0f\x30"
    computer = Computer(write + b"\x31\xc0\xba\x01\x00\x00\x00\x0f\x32" + STOP)
    computer.run()
    assert (computer.register("rax"), computer.register("rdx")) == (0x4433, 0)


def test_unicorn_is_told_where_to_stop_between_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has stopped it goes through the list, and asks for pages: the list must stay."""
    running: list[Engine] = []
    told: list[bool] = []
    run, set_exits = Engine.run, Core._set_exits

    def noting_run(engine: Engine, *arguments: Any) -> Any:
        running.append(engine)
        try:
            return run(engine, *arguments)
        finally:
            running.remove(engine)

    def noting(core: Core) -> None:
        told.append(core.engine in running)
        set_exits(core)

    monkeypatch.setattr(Engine, "run", noting_run)
    monkeypatch.setattr(Core, "_set_exits", noting)
    jump = b"\xe9" + int32(OTHER - CODE - 5)
    computer = Computer(jump + STOP, {OTHER: b"\x0f\xa2" + STOP})
    computer.run()
    assert computer.vcpu.halted
    assert len(told) >= 3  # to begin with, and for each page
    assert not any(told)


@pytest.mark.parametrize("paged", [False, True])
def test_what_exits_comes_first_in_code_that_was_not_seen(paged: bool) -> None:
    """Though it is known what exits in the next page, and that may not be executed."""
    following, shadow = CODE + PAGE_SIZE, 0x70000
    cpuid = b"\x0f\xa2"
    memory = {following: FOREVER + cpuid, shadow: cpuid + FOREVER}
    computer = Computer(FOREVER, memory, views=True, rax=0x4000_0000)
    if paged:
        computer.go_long()
    host, domid = computer.host, computer.domid
    for place in (following, CODE):
        computer.set(rip=place)
        computer.run(20)
    view = computer.view((following >> 12, R), enter=False)
    host.altp2m_change_gfn(domid, view, CODE >> 12, shadow >> 12)
    host.altp2m_switch_to_view(domid, view)
    computer.run(20)
    words = [computer.register(name) for name in ("rbx", "rcx", "rdx")]
    assert struct.pack("<3I", *words) == b"XenVMMXenVMM"


def test_msr_writes_are_heard() -> None:
    code = b"\xb9" + int32(LSTAR) + b"\xb8\x01\x00\x00\x00\xba\x02\x00\x00\x00\x0f\x30" + STOP
    computer = Computer(code, listen=True)
    computer.switch("mov_to_msr", LSTAR, True, False)
    request = heard(computer, Reason.MOV_TO_MSR)
    assert request["mov_to_msr.msr"] == LSTAR
    assert request["mov_to_msr.new_value"] == 2 << 32 | 1
    assert request.register("rip") == CODE + 15


def test_cpuid_is_heard_once_its_results_are_there() -> None:
    computer = Computer(b"\x0f\xa2" + STOP, listen=True, rax=0x4000_0000, rcx=7)
    computer.switch("cpuid", True)
    request = heard(computer, Reason.CPUID)
    assert request["cpuid.insn_length"] == 2
    assert (request["cpuid.leaf"], request["cpuid.subleaf"]) == (0x4000_0000, 7)
    assert request.register("rip") == CODE
    words = [request.register(name) for name in ("rbx", "rcx", "rdx")]
    assert struct.pack("<3I", *words) == b"XenVMMXenVMM"


@pytest.mark.parametrize(
    ("code", "port", "size", "is_in"),
    [("e6e9", 0xE9, 1, 0), ("e5e9", 0xE9, 4, 1), ("66ef", 0x3F8, 2, 0), ("ec", 0x3F8, 1, 1)],
)
def test_port_io_is_heard(code: str, port: int, size: int, is_in: int) -> None:
    computer = Computer(
        bytes.fromhex(code) + STOP, listen=True, xen=(4, 20), rdx=0x3F8, rax=0x11223344
    )
    computer.switch("io", True)
    request = heard(computer, Reason.IO_INSTRUCTION)
    assert (request["io.port"], request["io.bytes"], request["io.in"]) == (port, size, is_in)
    assert request["io.str"] == 0


@pytest.mark.parametrize(
    ("code", "rax"), [("ec", 0x112233FF), ("66ed", 0x1122FFFF), ("ed", 0xFFFFFFFF)]
)
def test_a_port_where_nobody_is(code: str, rax: int) -> None:
    computer = Computer(bytes.fromhex(code) + STOP, rax=0x11223344, rdx=0x3F8)
    computer.run()
    assert computer.register("rax") == rax


def test_a_guest_request() -> None:
    computer = Computer(b"\x0f\x01\xc1" + STOP, listen=True, rax=34, rbx=24)
    computer.switch("guest_request", True, True, False)
    request = heard(computer, Reason.GUEST_REQUEST)
    assert request.register("rip") == CODE
    computer.answer(request)
    computer.run()
    assert computer.vcpu.halted
    assert computer.register("rax") == 0


def test_a_breakpoint_with_a_listener() -> None:
    computer = Computer(NOP + INT3 + NOP + STOP, listen=True)
    computer.describe()
    computer.switch("software_breakpoint", True)
    request = heard(computer, Reason.SOFTWARE_BREAKPOINT)
    assert request["software_breakpoint.gfn"] == CODE >> 12
    assert request["software_breakpoint.insn_length"] == 1
    assert request["software_breakpoint.type"] == 6
    assert request.register("rip") == CODE + 1
    computer.answer(request, SET, data__regs__x86__rip=CODE + 2)
    computer.run()
    assert computer.vcpu.halted
    assert computer.vcpu.delivered == []


EXITS = [
    (b"\xcc", {}, False), (b"\xcc", {"software_breakpoint": True}, True),
    (b"\xcc", {"singlestep": True}, True),
]  # fmt: skip


@pytest.mark.parametrize(("code", "switches", "exits"), EXITS)
def test_when_breakpoints_exit(code: bytes, switches: dict[str, bool], exits: bool) -> None:
    """vmx_do_resume, vmx_update_debug_state: where somebody hears of them, or of single steps."""
    computer = Computer(code, listen=True)
    computer.describe()
    for name, on in switches.items():
        computer.switch(name, on)
    computer.switch("vmexit", True, True)
    computer.run()
    found = computer.take()
    if exits:
        assert [request.reason for request in found] == [Reason.VMEXIT]
        assert found[0]["vmexit.arch.vmx.reason"] == 0
    else:
        assert [request["vmexit.arch.vmx.reason"] for request in found] == [12]  # its handler's HLT
        assert computer.vcpu.delivered == [(BP, 6)]


def test_int1_with_a_listener() -> None:
    computer = Computer(b"\xf1" + STOP, listen=True)
    computer.describe()
    computer.switch("debug_exceptions", True, True)
    request = heard(computer, Reason.DEBUG_EXCEPTION)
    assert request["debug_exception.type"] == 5
    assert request["debug_exception.insn_length"] == 1
    assert request.register("rip") == CODE
    computer.answer(request, SET, data__regs__x86__rip=CODE + 1)
    computer.run()
    assert computer.vcpu.halted


@pytest.mark.parametrize(
    ("code", "descriptor", "is_write"),
    [
        ("0f010d" + (DATA).to_bytes(4, "little").hex(), 1, 0),  # SIDT
        ("0f0105" + (DATA).to_bytes(4, "little").hex(), 2, 0),
        ("0f00c0", 3, 0),
        ("0f00c8", 4, 0),
        ("0f011d" + (DATA).to_bytes(4, "little").hex(), 1, 1),  # LIDT
        ("0f0115" + (DATA).to_bytes(4, "little").hex(), 2, 1),
    ],
)
def test_descriptor_tables_are_heard(code: str, descriptor: int, is_write: int) -> None:
    computer = Computer(bytes.fromhex(code) + STOP, listen=True)
    computer.switch("descriptor_access", True)
    request = heard(computer, Reason.DESCRIPTOR_ACCESS)
    assert request["desc_access.descriptor"] == descriptor
    assert request["desc_access.is_write"] == is_write
    assert request.register("rip") == CODE
    computer.answer(request, EMULATE)
    computer.run()
    assert computer.vcpu.halted


def test_sidt_and_lidt() -> None:
    computer = Computer(b"\x0f\x01\x1d" + int32(DATA) + b"\x0f\x01\x0d" + int32(OTHER) + STOP)
    computer.write(DATA, struct.pack("<HI", 0x7F, 0x1234))
    computer.run()
    assert (computer.register("idtr_limit"), computer.register("idtr_base")) == (0x7F, 0x1234)
    assert computer.read(OTHER, 6) == struct.pack("<HI", 0x7F, 0x1234)


VMEXITS = [
    ("0fa2", 10, 0), ("f4", 12, 0), ("0f01c1", 18, 0), ("0f22e0", 28, 4), ("0f30", 32, 0),
    ("0f32", 31, 0), ("e6e9", 30, 0xE9 << 16), ("66ed", 30, 1 | 1 << 3 | 0x3F8 << 16),
    ("0f01d1", 55, 0), ("f1", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("code", "reason", "qualification"), VMEXITS)
def test_exits(code: str, reason: int, qualification: int) -> None:
    """SDM 3C, appendix C; qualifications of 27.2.1. With a sync vmexit nothing of it is done."""
    computer = Computer(
        bytes.fromhex(code) + STOP, listen=True, rax=PAE, rcx=LSTAR, rdx=0x3F8, rbx=24
    )
    computer.switch("vmexit", True, True)
    request = heard(computer, Reason.VMEXIT)
    assert request["vmexit.arch.vmx.reason"] == reason
    assert request["vmexit.arch.vmx.qualification"] == qualification
    assert computer.register("rip") == CODE


@pytest.mark.parametrize("code", ["0f22d8", "0f20d8", "0f06", "cd20", "0f0105" + "00000200"])
def test_what_does_not_exit(code: str) -> None:
    """CR3 and descriptor tables while nobody hears of them, INT n, CLTS that changes nothing."""
    computer = Computer(bytes.fromhex(code) + FOREVER, listen=True)
    computer.describe()
    computer.write(0x30000 + 16 * 0x20, FOREVER)
    computer.switch("vmexit", True, True)
    computer.run(3)
    assert computer.take() == []
    assert computer.register("rip") != CODE


def test_prefixes_hide_nothing() -> None:
    computer = Computer(b"\x2e\x66\xf3\x0f\xa2" + STOP, listen=True)
    computer.switch("cpuid", True)
    assert heard(computer, Reason.CPUID)["cpuid.insn_length"] == 5


@pytest.mark.parametrize("before", [1, 2])
def test_an_instruction_across_pages(before: int) -> None:
    at = DATA + 0x1000 - before
    computer = Computer(b"\xe9" + int32(at - CODE - 5), {at: b"\x66\x0f\xa2" + STOP}, listen=True)
    computer.switch("cpuid", True)
    request = heard(computer, Reason.CPUID)
    assert request["cpuid.insn_length"] == 3
    assert request.register("rip") == at


def test_an_instruction_across_pages_whose_second_is_missing() -> None:
    at = DATA + 0xFFF
    computer = Computer(b"\xe9" + int32(at - CODE - 5), {at: b"\x0f\xa2"})
    computer.go_long()
    computer.describe()
    computer.map(DATA + 0x1000, 0)
    computer.handled()
    assert computer.vector == PF
    assert computer.register("cr2") == DATA + 0x1000
    assert computer.words(computer.register("rsp"), 2)[1] == at


# Views.


def test_a_write_that_a_view_forbids() -> None:
    computer = Computer(store(DATA + 0x123, 5) + STOP, listen=True, views=True)
    view = computer.view((DATA >> 12, R))
    request = heard(computer, Reason.MEM_ACCESS)
    assert request.view == view
    assert request["mem_access.gfn"] == DATA >> 12
    assert request["mem_access.offset"] == 0x123
    assert request["mem_access.gla"] == DATA + 0x123
    assert request["mem_access.flags"] == 1 | 2 | 8 | 16  # R, W; GLA_VALID, FAULT_WITH_GLA
    assert request.register("rip") == CODE
    computer.answer(request, SWITCH, view=0)
    computer.run()
    assert computer.words(DATA + 0x123, 1) == [5]


def test_a_fetch_that_a_view_forbids() -> None:
    computer = Computer(b"\xe9" + int32(OTHER - CODE - 5), {OTHER: STOP}, listen=True, views=True)
    computer.view((OTHER >> 12, RW))
    request = heard(computer, Reason.MEM_ACCESS)
    assert (request["mem_access.gfn"], request["mem_access.flags"]) == (OTHER >> 12, 4 | 8 | 16)
    assert request.register("rip") == OTHER


def test_a_page_walk_that_a_view_forbids() -> None:
    computer = Computer(load_eax(DATA) + STOP, listen=True, views=True)
    computer.go_long()
    computer.set(cs_arbytes=0xC9B)  # compatibility mode
    computer.view((0x62, 0))  # the third table
    request = heard(computer, Reason.MEM_ACCESS)
    assert request["mem_access.gfn"] == 0x62
    assert request["mem_access.offset"] == 0  # of the first 2 MiB
    assert request["mem_access.gla"] == CODE
    assert request["mem_access.flags"] == 1 | 8 | 32  # R; GLA_VALID, FAULT_IN_GPT


def test_steps_of_an_agent() -> None:
    code = b"\x40\x40\xeb\x00\x40" + STOP
    computer = Computer(code, listen=True, views=True)
    computer.switch("singlestep", True)
    computer.vcpu.single_step = True
    seen = []
    for _ in range(4):
        request = heard(computer, Reason.SINGLESTEP)
        assert request["singlestep.gfn"] == CODE >> 12
        seen.append((request.register("rip") - CODE, request.register("rax")))
        computer.answer(request)
    assert seen == [(1, 1), (2, 2), (4, 2), (5, 3)]
    computer.answer(heard(computer, Reason.SINGLESTEP), TOGGLE)
    computer.run()
    assert computer.vcpu.halted


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("f3a4", [2, 1, 0]),  # REP MOVSB
        ("f2ae", [2, 1, 0]),  # REPNE SCASB, which does not find it
        ("f3a6", [2]),  # REPE CMPSB, of which the first differs
    ],
)
def test_a_repetition_is_a_step(code: str, left: list[int]) -> None:
    """SDM 3C, Monitor Trap Flag: after each iteration; the last one ends the instruction.

    RF is as it would be after a trap (SDM 3B, Instruction-Breakpoint Exception Condition).
    """
    computer = Computer(
        bytes.fromhex(code) + NOP + STOP, {DATA: b"abc", OTHER: b"xyz"},
        listen=True, views=True, rsi=DATA, rdi=OTHER, rcx=3, rax=0,
    )  # fmt: skip
    computer.switch("singlestep", True)
    computer.vcpu.single_step = True
    seen = []
    for _ in range(len(left) + 1):
        request = heard(computer, Reason.SINGLESTEP)
        place = request.register("rip") - CODE
        seen.append((place, request.register("rcx"), request.register("rflags") & RF))
        computer.answer(request)
    assert seen == [*((0, count, RF) for count in left[:-1]), (2, left[-1], 0), (3, left[-1], 0)]


@pytest.mark.parametrize("wide", [False, True])
def test_the_step_of_an_iret_shows_the_rf_that_it_loads(wide: bool) -> None:
    """SDM 2A, IRET; the next instruction ends it."""
    iret = b"\x48\xcf" if wide else b"\xcf"
    computer = Computer(iret, {DATA: NOP * 8}, listen=True, views=True)
    if wide:
        computer.go_long()
    computer.describe()
    stack = (DATA, KERNEL_CODE, RF | 2, STACK, KERNEL_DATA)
    computer.write(STACK, struct.pack(f"<5{'Q' if wide else 'I'}", *stack))
    computer.switch("singlestep", True)
    computer.vcpu.single_step = True
    seen = []
    for _ in range(3):
        request = heard(computer, Reason.SINGLESTEP)
        seen.append((request.register("rip"), request.register("rflags")))
        computer.answer(request)
    assert seen == [(DATA, RF | 2), (DATA + 1, 2), (DATA + 2, 2)]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("code", "count", "offset", "pushed"),
    [("f3a4", 2, 0, RF), ("f3a4", 1, 2, 0), ("f3a4", 0, 2, 0), ("e2fe", 2, 0, 0)],
)
def test_a_guest_steps_through_repetitions(
    wide: bool, code: str, count: int, offset: int, pushed: int
) -> None:
    """RF is pushed after any iteration but the last; LOOP to itself is no repetition."""
    computer = Computer(bytes.fromhex(code) + STOP, rsi=DATA, rdi=OTHER, rcx=count)
    if wide:
        computer.go_long()
    computer.describe()
    computer.set(rflags=TF | 2)
    rip, _, flags, *_ = computer.handled()
    assert computer.vector == DB
    assert (rip - CODE, flags & RF) == (offset, pushed)
    assert computer.register("rcx") == max(count - 1, 0)


def test_a_fast_step_goes_through_another_view_and_back() -> None:
    computer = Computer(store(DATA, 5) + store(DATA, 6) + STOP, listen=True, views=True)
    view = computer.view((DATA >> 12, R))
    computer.switch("singlestep", True)
    computer.run()
    for value, at in ((5, CODE), (6, CODE + 10)):
        request = computer.event(Reason.MEM_ACCESS)
        assert request.register("rip") == at
        assert computer.vcpu.view == view
        computer.answer(request, SWITCH | FAST, view=0, u__fast_singlestep__p2midx=view)
        computer.run()
        assert computer.words(DATA, 1) == [value]
    assert computer.vcpu.halted
    assert computer.vcpu.view == view


def test_an_instruction_that_xen_completes_is_no_step() -> None:
    computer = Computer(b"\x0f\xa2" + NOP + NOP + STOP, listen=True, views=True)
    computer.switch("singlestep", True)
    computer.vcpu.single_step = True
    assert heard(computer, Reason.SINGLESTEP).register("rip") == CODE + 3


def test_emulation() -> None:
    computer = Computer(b"\xff\x05" + int32(DATA) + STOP, {DATA: b"\x07"}, listen=True, views=True)
    computer.view((DATA >> 12, R))
    computer.answer(heard(computer, Reason.MEM_ACCESS), EMULATE)
    computer.run()
    assert computer.vcpu.halted
    assert computer.words(DATA, 1) == [8]


STOSB, STOSD, STOSW, STOSQ, MOVSB, MOVSW, SCASB = (
    bytes.fromhex(code) for code in ("f3aa", "f3ab", "66f3ab", "f348ab", "f3a4", "66f3a5", "f2ae")
)


def emulated(
    code: bytes, registers: Mapping[str, int], flags: Flag = EMULATE, data: bytes = b""
) -> tuple[Computer, int]:
    """Have Xen emulate a repeated instruction that may not write; how often it is yet to come."""
    chosen = {"rsi": DATA, "rdi": OTHER, "rax": 0x0807060504030201, **registers}
    wide, each = bool(chosen.pop("wide", 0)), bool(chosen.pop("each", 0))
    memory = {DATA: b"abcdefgh", OTHER: bytes(0x8000)}
    computer = Computer(code + STOP, memory, listen=True, views=True)
    if wide:
        computer.go_long()
        computer.map(OTHER + 0x1000, OTHER + 0x3000 | PRESENT | WRITABLE)
    computer.set(**chosen)
    computer.view(*((page >> 12, R) for page in range(OTHER, OTHER + 0x8000, 0x1000)))
    computer.host.monitor_emulate_each_rep(computer.domid, each)
    request = heard(computer, Reason.MEM_ACCESS)
    computer.answer(request, flags, data=data)
    computer.run()
    if computer.vcpu.halted:
        return computer, 0
    return computer, computer.event(Reason.MEM_ACCESS).register("rcx")


@pytest.mark.parametrize(
    ("code", "registers", "left"),
    [
        (STOSB, {"rcx": 7}, 0),
        (MOVSB, {"rcx": 7}, 0),
        (STOSB, {"rcx": 5000}, 904),
        (STOSD, {"rcx": 4100}, 4),
        (STOSB, {"rcx": 7, "each": True}, 6),
        (MOVSB, {"rcx": 7, "each": True}, 6),
        (STOSB, {"rcx": 7, "wide": True}, 0),
        (STOSB, {"rcx": 7, "wide": True, "rdi": OTHER + 0xFFC}, 3),
        (STOSQ, {"rcx": 7, "wide": True, "rdi": OTHER + 0xFE8}, 4),
        (STOSB, {"rcx": 7, "wide": True, "rdi": OTHER + 0x1002, "rflags": DF_SET}, 4),
        (MOVSB, {"rcx": 7, "rsi": OTHER, "rdi": OTHER + 1}, 6),
        (MOVSB, {"rcx": 7, "rsi": OTHER + 1}, 0),
        (MOVSB, {"rcx": 7, "rsi": OTHER + 6, "rdi": OTHER + 5, "rflags": DF_SET}, 6),
    ],
)
def test_how_often_xen_repeats_at_once(code: bytes, registers: dict[str, int], left: int) -> None:
    """``hvmemul_rep_stos``, ``hvmemul_rep_movs``, ``hvmemul_linear_to_phys``."""
    assert emulated(code, registers)[1] == left


def test_what_xen_compares_it_repeats_one_by_one() -> None:
    computer = Computer(SCASB + STOP, listen=True, views=True, rdi=OTHER, rcx=5, rax=1)
    computer.view((OTHER >> 12, X))
    computer.answer(heard(computer, Reason.MEM_ACCESS), EMULATE)
    assert heard(computer, Reason.MEM_ACCESS).register("rcx") == 4


@pytest.mark.parametrize(
    ("code", "registers", "at", "expected"),
    [
        (STOSD, {"rcx": 2}, OTHER, b"\1\2\3\4\1\2\3\4\0"),
        (STOSW, {"rcx": 2}, OTHER, b"\1\2\1\2\0"),
        (STOSQ, {"rcx": 1, "wide": True}, OTHER, b"\1\2\3\4\5\6\7\x08\0"),
        (STOSB, {"rcx": 2, "rdi": OTHER + 1, "rflags": DF_SET}, OTHER, b"\1\1\0"),
        (MOVSW, {"rcx": 3}, OTHER, b"abcdef\0"),
        (MOVSB, {"rcx": 3, "rsi": DATA + 2, "rdi": OTHER + 2, "rflags": DF_SET}, OTHER, b"abc\0"),
    ],
)
def test_what_xen_repeats(code: bytes, registers: dict[str, int], at: int, expected: bytes) -> None:
    computer, left = emulated(code, registers)
    assert left == 0
    assert computer.read(at, len(expected)) == expected
    moved = -1 if registers.get("rflags") == DF_SET else 1
    size = moved * (len(expected) - 1)
    assert computer.register("rdi") == registers.get("rdi", OTHER) + size
    assert computer.register("rcx") == 0


@pytest.mark.parametrize("backwards", [False, True])
def test_data_for_what_xen_repeats(backwards: bool) -> None:
    """``set_context_data``: of the whole buffer, zeros behind."""
    data = (3).to_bytes(4, "little") + b"xyz"
    end = {"rsi": DATA + 4, "rdi": OTHER + 4, "rflags": DF_SET} if backwards else {}
    computer, left = emulated(MOVSB, {"rcx": 5, **end}, EMULATE | READ_DATA, data)
    assert left == 0
    assert computer.read(OTHER, 5) == b"xyz\0\0"
    assert computer.read(DATA, 8) == b"abcdefgh"


@pytest.mark.parametrize("code", [STOSB, MOVSB])
def test_without_writes_all_is_repeated(code: bytes) -> None:
    """``hvmemul_rep_stos_discard``: however many."""
    computer, left = emulated(code, {"rcx": 4100}, EMULATE | NOWRITE)
    assert left == 0
    assert computer.read(OTHER, 8) == bytes(8)
    assert computer.register("rdi") == OTHER + 4100


@pytest.mark.parametrize("kind", ["r", "w"])
def test_where_an_emulated_instruction_faults(kind: str) -> None:
    """``x86_emul_pagefault``: the very address."""
    access = b"\x48\x8b\x06" if kind == "r" else b"\x48\x89\x06"
    computer = Computer(access + STOP, listen=True, views=True)
    computer.go_long()
    computer.describe()
    computer.map(OTHER, 0)
    computer.set(rsi=OTHER + 0x128)
    computer.view((CODE >> 12, R))
    computer.answer(heard(computer, Reason.MEM_ACCESS), EMULATE)
    computer.run()
    assert computer.vector == PF
    assert computer.register("cr2") == OTHER + 0x128


def test_emulation_without_its_writes() -> None:
    computer = Computer(b"\xff\x05" + int32(DATA) + STOP, {DATA: b"\x07"}, listen=True, views=True)
    computer.view((DATA >> 12, R))
    computer.answer(heard(computer, Reason.MEM_ACCESS), EMULATE | NOWRITE)
    computer.run()
    assert computer.vcpu.halted
    assert computer.words(DATA, 1) == [7]


def test_emulation_with_other_data() -> None:
    computer = Computer(load_eax(DATA) + STOP, {DATA: b"\x07"}, listen=True, views=True)
    computer.view((DATA >> 12, X))
    data = struct.pack("<I4s", 4, b"abcd")
    computer.answer(heard(computer, Reason.MEM_ACCESS), EMULATE | READ_DATA, data=data)
    computer.run()
    assert computer.register("rax") == int.from_bytes(b"abcd", "little")
    assert computer.read(DATA, 4) == b"\x07\0\0\0"


def test_emulation_of_another_instruction() -> None:
    computer = Computer(INT3 + NOP + STOP, listen=True)
    computer.switch("software_breakpoint", True)
    request = heard(computer, Reason.SOFTWARE_BREAKPOINT)
    computer.answer(request, EMULATE | INSN_DATA, data=b"\xb0\x07".ljust(16, NOP))
    computer.run()
    assert computer.register("rax") & 0xFF == 7
    assert computer.vcpu.halted
    assert computer.read(CODE, 1) == INT3


def test_registers_are_set() -> None:
    computer = Computer(b"\x0f\xa2" + STOP, {OTHER: STOP}, listen=True)
    computer.switch("cpuid", True)
    values = {"rax": 1, "rbx": 2, "rip": OTHER, "rflags": 0x87, "rsp": USER_STACK}
    changed: dict[str, Any] = {f"data__regs__x86__{name}": value for name, value in values.items()}
    computer.answer(heard(computer, Reason.CPUID), SET, **changed)
    computer.run()
    assert computer.vcpu.halted
    for name, value in values.items():
        after = {"rip": OTHER + 2, "rflags": 0x87 | IF}.get(name, value)
        assert computer.register(name) == after


def test_a_shadow_with_a_breakpoint_in_it() -> None:
    """Executed in the view, and never seen where the page is read."""
    code = b"\xe8" + int32(OTHER - CODE - 5) + load_eax(OTHER) + STOP
    computer = Computer(code, {OTHER: b"\x41\xc3"}, listen=True, views=True)
    shadow = 0x100
    computer.page(shadow)[:] = computer.page(OTHER >> 12)
    computer.page(shadow)[0] = 0xCC
    view = computer.view(enter=False)
    computer.host.altp2m_change_gfn(computer.domid, view, OTHER >> 12, shadow)
    computer.host.altp2m_set_mem_access(computer.domid, view, OTHER >> 12, X)
    computer.host.altp2m_switch_to_view(computer.domid, view)
    computer.switch("software_breakpoint", True)
    computer.switch("singlestep", True)
    request = heard(computer, Reason.SOFTWARE_BREAKPOINT)
    assert request.register("rip") == OTHER
    assert request.view == view
    computer.answer(request, SWITCH | FAST, view=0, u__fast_singlestep__p2midx=view)
    request = heard(computer, Reason.MEM_ACCESS)
    assert request["mem_access.flags"] & 7 == 1
    computer.answer(request, SWITCH, view=0)
    computer.run()
    assert computer.register("rcx") == 1  # INC ECX was executed
    assert computer.register("rax") & 0xFFFF == 0xC341


# Code that changes.


def test_code_that_a_guest_writes_exits_as_other_code() -> None:
    patched = CODE + 16
    code = store(patched, 0x9090_A20F).ljust(16, NOP) + NOP * 4 + STOP
    computer = Computer(code, listen=True)
    computer.switch("cpuid", True)
    assert heard(computer, Reason.CPUID).register("rip") == patched


def test_code_that_a_guest_writes_elsewhere_in_its_address_space() -> None:
    """The page is mapped twice; it was written to there before it was executed here."""
    call = b"\xe8" + int32(OTHER - CODE - 5 - 10)
    code = store(DATA, 0x90C3_9090) + call + store(DATA, 0x90C3_A20F)
    code += b"\xe8" + int32(OTHER - CODE - len(code) - 5) + STOP
    computer = Computer(code, listen=True)
    computer.go_long()
    computer.set(cs_arbytes=0xC9B)
    computer.map(DATA, OTHER | PRESENT | WRITABLE)
    computer.switch("cpuid", True)
    assert heard(computer, Reason.CPUID).register("rip") == OTHER


def test_code_that_is_written_while_an_agent_steps() -> None:
    """The engine that steps is not the one that had translated the code."""
    call = b"\xe8" + int32(OTHER - CODE - 5)
    code = call + store(OTHER + 1, 7) + b"\xe8" + int32(OTHER - CODE - 20) + STOP
    computer = Computer(code, {OTHER: b"\xb8\x05\0\0\0\xc3"}, listen=True, views=True)
    computer.view((OTHER >> 12, RX))
    computer.switch("singlestep", True)
    request = heard(computer, Reason.MEM_ACCESS)
    assert request.register("rip") == CODE + 5
    computer.answer(request, SWITCH | FAST, view=0, u__fast_singlestep__p2midx=0)
    computer.run()
    assert computer.register("rax") == 7


def test_code_that_dom0_patches() -> None:
    computer = Computer(b"\x40" + FOREVER + NOP, listen=True)
    computer.run(3)
    mapped = computer.host.foreignmemory_map(computer.domid, True, [CODE >> 12])
    mapped[0][1:3] = b"\x0f\xa2"
    computer.switch("cpuid", True)
    request = heard(computer, Reason.CPUID)
    assert request.register("rip") == CODE + 1
    computer.host.foreignmemory_unmap(mapped)


def test_pages_whose_frame_changes() -> None:
    """The host p2m shows another frame, with other code, at the same address."""
    computer = Computer(b"\xe9" + int32(OTHER - CODE - 5), {OTHER: b"\xb0\x05" + FOREVER})
    computer.run(3)
    assert computer.register("rax") & 0xFF == 5
    assert computer.model.remove_page(OTHER >> 12)
    assert computer.model.add_page(OTHER >> 12, 0)
    computer.write(OTHER, b"\xb0\x06" + FOREVER)
    computer.set(rip=OTHER)
    computer.run(3)
    assert computer.register("rax") & 0xFF == 6


STORE_BYTE = b"\xc6\x05"
"""MOV byte [address], value."""


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("alias", [False, True])
def test_fault_19_the_second_store_of_a_block_changes_code_of_that_block(
    alias: bool, counted: bool
) -> None:
    """The first changes nothing; with ``alias`` both go by another linear address."""
    changed = CODE + 16
    mov = b"\xb0\x01"  # mov $1, %al; its operand becomes 2
    at = OTHER if alias else CODE
    code = b"\xc6\x04\x25" + int32(at + 0x800) + b"\x00"
    code += b"\xc6\x04\x25" + int32(at + 17) + b"\x02" + mov + STOP
    assert len(code) - len(STOP) - 1 == changed + 1 - CODE
    computer = Computer(code)
    computer.go_long()
    computer.map(OTHER, CODE | PRESENT | WRITABLE)
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vcpu.halted
    assert computer.register("rax") & 0xFF == 2


@pytest.mark.parametrize("counted", [False, True])
def test_fault_19_stores_into_another_page_with_code(counted: bool) -> None:
    """The block has stored there before it changes a function that was executed."""
    function = b"\xb0\x01\xc3"
    call = b"\xe8" + int32(OTHER + 0x100 - CODE - 5)
    stores = STORE_BYTE + int32(OTHER) + b"\x00" + STORE_BYTE + int32(OTHER + 0x101) + b"\x02"
    again = b"\xe8" + int32(OTHER + 0x100 - CODE - 24)
    computer = Computer(call + stores + again + STOP, {OTHER + 0x100: function})
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vcpu.halted
    assert computer.register("rax") & 0xFF == 2


@pytest.mark.parametrize("counted", [False, True])
def test_fault_19_a_store_ahead_of_itself_that_ends_as_a_prefix_does(counted: bool) -> None:
    """It is a block by itself when it is executed: nothing in it exits, nor does it come again."""
    code = b"\xeb\x00\xc7\x05" + int32(CODE + 18) + int32(0x6690_9090) + NOP * 12 + STOP
    computer = Computer(code)
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vcpu.halted


def test_fault_19_a_store_puts_what_exits_into_its_own_block() -> None:
    code = STORE_BYTE + int32(CODE + 0x800) + b"\x00" + b"\x66\xc7\x05" + int32(CODE + 18)
    code += b"\x0f\xa2" + NOP * 2 + NOP * 2 + STOP  # CPUID in the place of two NOPs
    computer = Computer(code, rax=0x4000_0000)
    computer.host.run(computer.domid)
    assert computer.vcpu.halted
    assert computer.register("rbx") == 0x566E_6558  # "XenV"


SUBTRACTED = {  # from 0 in AL; flags by SDM 1, 3.4.3.1
    0x00: 0x46, 0x01: 0x97, 0x10: 0x87, 0x40: 0x87, 0x80: 0x883, 0x82: 0x17, 0xFF: 0x13,
}  # fmt: skip
STORE_4, INVERT = b"\xc7\x05", b"\xf6\x15"
INTO_ITS_BLOCK = {
    "ahead": (CODE, STORE_BYTE + int32(CODE + 14) + NOP),
    "behind": (CODE, STORE_BYTE + int32(CODE + 1) + NOP),
    "itself": (CODE, STORE_BYTE + int32(CODE + 7) + NOP),
    "4 bytes": (CODE, STORE_4 + int32(CODE + 13) + NOP * 4),
    "reads, too": (CODE, INVERT + int32(CODE + 1)),
    "over the page's end": (CODE + 0xFF0, STORE_4 + int32(CODE + 0xFFE) + NOP * 4),
}


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("subtracted", SUBTRACTED, ids=hex)
@pytest.mark.parametrize(("start", "store"), INTO_ITS_BLOCK.values(), ids=INTO_ITS_BLOCK)
def test_fault_19_a_store_into_its_own_block_leaves_the_flags(
    start: int, store: bytes, subtracted: int, counted: bool
) -> None:
    code = b"\xb0\x00\x2c" + bytes([subtracted]) + store  # mov $0, %al; sub
    code += NOP * 6 + b"\x9c\x58" + STOP  # pushf; pop %eax
    computer = Computer(b"", {start: code}, rip=start)
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vcpu.halted
    assert computer.register("rax") == SUBTRACTED[subtracted]


@pytest.mark.parametrize("counted", [False, True])
def test_fault_19_stores_by_rep_into_the_page_that_is_executed(counted: bool) -> None:
    """They change what comes behind them."""
    code = b"\xf3\xaa" + b"\xb3\x01" * 4 + STOP  # rep stosb; mov $1, %bl; ...
    computer = Computer(code, rax=0x43, rdi=CODE + 2, rcx=8, rbx=0)  # inc %ebx
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vcpu.halted
    assert computer.register("rbx") == 8


NOT_CANONICAL = [0x0000_8000_0000_0000, 0x7FFF_FFFF_FFF0_0000, 0x7FFF_FFFF_FFFF_F000]
NOT_CANONICAL += [0x7FFF_FFFF_FFFF_F00C, 0x7FFF_FFFF_FFFF_FFFF, 0x8000_0000_0000_0000]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("address", NOT_CANONICAL, ids=hex)
@pytest.mark.parametrize("code", ["8a03", "8803", "ffe3", "f3a4"], ids=["r", "w", "x", "rep"])
def test_fault_32_no_address_of_a_guest_is_the_simulators(
    code: str, address: int, counted: bool
) -> None:
    """Nor where its own code has run: two views differ, so that it forgets pages."""
    read = b"\x8b\x14\x25" + int32(DATA)
    switches = (b"\x83\xf1\x01" + VMFUNC + read) * 4
    computer = Computer(switches + bytes.fromhex(code), mode=Altp2mMode.MIXED, views=True)
    computer.go_long()
    computer.describe()
    computer.set(rbx=address, rsi=address, rdi=DATA, rcx=0, rax=0)
    computer.view((DATA >> 12, R), enter=False)
    computer.host.altp2m_set_vcpu_enable_notify(computer.domid, 0, OTHER >> 12)
    if code == "f3a4":
        computer.set(rcx=1)
        computer.write(CODE, NOP * len(switches))
    computer.host.run(computer.domid, 1000 if counted else None)
    assert computer.vector == GP
    at = address if code == "ffe3" else CODE + len(switches)
    assert computer.words(computer.register("rsp"), 2) == [0, at]
    assert computer.register("rdx") == computer.register("rax") == 0


READ_TO_WRITE = {
    "inc": "ff06", "lock inc": "f0ff06", "add": "0106", "xchg": "8706", "cmpxchg": "0fb116",
    "lock cmpxchg": "f00fb116", "xadd": "0fc106", "not": "f716", "shl": "d126", "shl 0": "c12600",
    "shld": "0fa41604", "bts": "0fab16", "cmpxchg8b": "0fc70e", "adc": "1106", "dec": "fe0e",
}  # fmt: skip
READ = {"cmp": "3906", "test": "8506", "mov": "8b06", "movs": "a5", "push": "ff36", "bt": "0fa316"}


@pytest.mark.parametrize("access", [X, R])
@pytest.mark.parametrize("name", [*READ_TO_WRITE, *READ])
def test_fault_22_what_is_read_to_be_written_is_a_write(name: str, access: int) -> None:
    """One event with R and W, as on the lab's CPU under Xen 4.17; of what is only read, R."""
    code = bytes.fromhex({**READ_TO_WRITE, **READ}[name])
    computer = Computer(code + STOP, views=True, listen=True, rsi=DATA + 8, rdi=OTHER, rcx=2)
    computer.view((DATA >> 12, access))
    computer.run()
    told = [(one["mem_access.flags"] & 7, one["mem_access.gla"]) for one in computer.take()]
    if name in READ:
        assert told == ([(1, DATA + 8)] if access == X else [])
    else:
        assert told == [(3, DATA + 8)]


def test_fault_22_a_page_fault_of_what_is_read_to_be_written(ring_3: Computer) -> None:
    """SDM 3A, 4.7: the access that causes it is a write."""
    ring_3.write(CODE, b"\xff\x06")  # inc (%rsi)
    ring_3.set(rsi=DATA + 8)
    ring_3.map(DATA, 0)
    assert ring_3.handled()[:2] == [2 | 4, CODE]
    assert ring_3.register("cr2") == DATA + 8


@pytest.mark.parametrize("code", ["cd20", "cc", "f1"])
def test_fault_23_no_rf_is_pushed_where_a_view_denied_the_stack(code: str) -> None:
    """The event's registers have it; the frame not, as on the lab's CPU under Xen 4.17."""
    computer = Computer(bytes.fromhex(code), views=True, listen=True)
    computer.describe()
    view = computer.view((STACK - 1 >> 12, RX))
    request = heard(computer, Reason.MEM_ACCESS)
    assert request.register("rflags") == RF | 2
    computer.host.altp2m_set_mem_access(computer.domid, view, STACK - 1 >> 12, RWX)
    computer.answer(request)
    assert computer.handled()[:3] == [CODE + len(code) // 2, KERNEL_CODE, 2]


def test_fault_23_a_trap_has_no_rf_where_a_view_denied_the_stack() -> None:
    """SDM 3B, 18.3.1.1: after an instruction RF is clear, which a trap's frame has."""
    computer = Computer(NOP + STOP, views=True, listen=True)
    computer.describe()
    computer.set(rflags=TF | 2)
    view = computer.view((STACK - 1 >> 12, RX))
    request = heard(computer, Reason.MEM_ACCESS)
    assert request.register("rip") == CODE + 1
    computer.host.altp2m_set_mem_access(computer.domid, view, STACK - 1 >> 12, RWX)
    computer.answer(request)
    assert computer.handled()[:3] == [CODE + 1, KERNEL_CODE, TF | 2]


@pytest.mark.parametrize("between", ["", "90", "eb00", "9090eb00"])
def test_fault_23_pushf_pushes_no_rf_after_iret(between: str) -> None:
    """SDM 2B, PUSHF: its image has none; and IRET's is over with the next instruction."""
    computer = Computer(IRET)
    computer.describe()
    computer.write(STACK - 12, struct.pack("<3I", OTHER, KERNEL_CODE, RF | 2))
    computer.write(OTHER, bytes.fromhex(between) + b"\x9c" + STOP)
    computer.set(rsp=STACK - 12)
    computer.run()
    assert computer.words(STACK - 4, 1) == [2]


@pytest.mark.parametrize("setter", ["9d", "cf"])
def test_fault_23_a_trap_between_repetitions_has_rf(setter: str) -> None:
    """SDM 3B, 18.3.1.1: of every repetition but the last, whatever ran before it."""
    code = bytes.fromhex(setter) + b"\xf3\xa4" + STOP
    frame = [TF | 2] if setter == "9d" else [CODE + 1, KERNEL_CODE, TF | 2]
    computer = Computer(code, rsi=DATA, rdi=OTHER, rcx=2)
    computer.describe()
    computer.write(STACK - 64, struct.pack(f"<{len(frame)}I", *frame))
    computer.set(rsp=STACK - 64)
    assert computer.handled()[:3] == [CODE + 1, KERNEL_CODE, RF | TF | 2]
    assert computer.register("rcx") == 1


def test_fault_23_a_trap_between_repetitions_has_rf_where_an_int3_was_executed() -> None:
    """Which lies at the same address in another frame, as a breakpoint does in another view."""
    computer = Computer(b"\x9d\xf3\xa4" + STOP, {OTHER + 1: INT3})
    computer.go_long()
    computer.describe()
    computer.map(CODE, OTHER | PRESENT | WRITABLE)
    computer.set(rip=CODE + 1)
    computer.host.run(computer.domid, 1)
    assert computer.register("rip") == HANDLERS + 16 * BP
    computer.map(CODE, CODE | PRESENT | WRITABLE)
    computer.write(STACK - 64, struct.pack("<Q", TF | 2))
    computer.set(rip=CODE, rsp=STACK - 64, rsi=DATA, rdi=DATA + 16, rcx=2)
    assert computer.handled()[:3] == [CODE + 1, KERNEL_CODE, RF | TF | 2]
    assert computer.register("rcx") == 1


def test_fault_23_cmpxchg8b_changes_zf_alone() -> None:
    """SDM 2A, CMPXCHG8B: CF, PF, AF, SF and OF are those of the ADD before it."""
    code = b"\x04\x01\x0f\xc7\x0d" + int32(DATA) + STOP  # ADD AL, 1: 0x80
    computer = Computer(code, rax=0x7F, rdx=1, rflags=2)
    computer.run()
    flags = computer.register("rflags")
    assert flags & 0x8D5 == 0x890  # OF, SF, AF


@pytest.mark.parametrize("code", ["90", "40", "9d"])
def test_fault_23_a_step_ends_before_its_trap(code: str) -> None:
    """SDM 3C, 26.5.2: the monitor trap flag's exit comes before a single-step trap."""
    computer = Computer(bytes.fromhex(code) + STOP, listen=True)
    computer.describe()
    computer.write(STACK - 4, int32(2))
    computer.set(rflags=TF | 2, rsp=STACK - 4)
    computer.switch("singlestep", True)
    computer.vcpu.single_step = True
    request = heard(computer, Reason.SINGLESTEP)
    assert request.register("rip") == CODE + 1
    assert computer.vcpu.delivered == []
    computer.answer(request)
    request = heard(computer, Reason.SINGLESTEP)
    assert request.register("rip") == HANDLERS + 16 * DB
    assert computer.vcpu.delivered == [(DB, 3)]
    computer.answer(request, TOGGLE)
    assert computer.handled()[0] == CODE + 1


def tables_of(computer: Computer, kind: str) -> tuple[int, int]:
    """Have paging, with 4 MiB in small pages where they are; the last table, an entry's size."""
    if kind == "64":
        computer.go_long()
        return TABLES + 3 * PAGE_SIZE, 8
    wide = kind == "pae"
    size, root, table = (8 if wide else 4), TABLES, TABLES + 2 * PAGE_SIZE
    directory = TABLES + PAGE_SIZE if wide else TABLES
    if wide:
        computer.write(root, struct.pack("<Q", directory | PRESENT))
    computer.write(directory, (table | PRESENT | WRITABLE).to_bytes(size, "little"))
    for page in range(512):
        entry = page * PAGE_SIZE | PRESENT | WRITABLE
        computer.write(table + size * page, entry.to_bytes(size, "little"))
    computer.set(cr3=root, cr4=PAE if wide else 0, cr0=PG | PE | ET)
    return table, size


ENDS = {
    "faults": (NOP + b"\x8b\x06" + NOP * 3, NOP * 4, 99),
    "goes on": (NOP * 3, STOP, 3),
    "goes behind": (NOP + b"\xeb\1" + NOP, STOP, 2),
    "straddles": (NOP * 2 + b"\xb8\1", b"\0\0\0" + STOP, 2),
}
"""Code at a page's end and in the next, which is used after so many instructions."""


@pytest.mark.parametrize("kind", ["64", "pae", "32"])
@pytest.mark.parametrize("steps", [2, 3, 1000, None])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("stepped", [False, True])
def test_fault_25_accessed_is_what_was_executed(
    kind: str, steps: int | None, end: str, stepped: bool
) -> None:
    """SDM 3A, 4.8: not what is behind it, be it run or stepped."""
    here, behind, most = ENDS[end]
    computer = Computer(NOP)
    table, size = tables_of(computer, kind)
    computer.describe()
    at = OTHER + PAGE_SIZE
    computer.write(at - len(here), here + behind)
    computer.write(table + size * (DATA >> 12), bytes(size))
    computer.set(rip=at - len(here), rsi=DATA)
    if stepped:
        for _ in range(steps or 9):
            computer.host.run(computer.domid, 1)
    else:
        computer.host.run(computer.domid, steps)
    marked = [computer.read(table + size * (page >> 12), 1)[0] & 0x20 for page in (OTHER, at)]
    assert marked == [0x20, 0x20 if (steps or 99) > most and most < 99 else 0]


@pytest.mark.parametrize("code", ["40", "6648"])
def test_fault_25_inc_needs_no_code_of_the_next_page(code: str) -> None:
    """What looks like a prefix of PUSHF is INC or DEC (SDM 2A, INC: 40+ rd)."""
    computer = Computer(NOP)
    table, size = tables_of(computer, "32")
    computer.describe()
    start = bytes.fromhex(code) + b"\x9c" + STOP
    at = OTHER + PAGE_SIZE
    computer.write(at - len(start), start)
    computer.write(table + size * (at >> 12), bytes(size))
    computer.set(rip=at - len(start), rax=1)
    computer.run()
    assert computer.vector is None
    assert computer.register("rip") == at
    assert computer.register("rax") == (2 if code == "40" else 0)


# Several vCPUs, several domains.


COUNT = b"\xff\x04\x9d" + int32(DATA) + b"\xeb\xf7"
"""Adds to the word of the number in EBX, for ever."""


def racing(seed: int, vcpus: int = 3) -> list[list[int]]:
    """What the vCPUs have counted after each turn of all."""
    host = MockBackend(memory_pages=1 << 13, seed=seed)
    computer = Computer(COUNT, host=host, vcpus=vcpus)
    for vcpu in computer.vcpus:
        vcpu.context[:] = computer.vcpu.context
        vcpu.set_register("rbx", vcpu.number)
        vcpu.initialised = vcpu.online = True
    counted = []
    for _ in range(10):
        computer.run(vcpus)
        counted.append(computer.words(DATA, vcpus))
    return counted


def test_how_vcpus_take_turns_is_a_matter_of_the_seed() -> None:
    first = racing(1)
    assert first == racing(1)
    assert first != racing(2)
    assert min(first[-1]) > 0
    assert sum(first[-1]) <= 10 * 3000 / 2 + 3


def test_code_that_another_vcpu_writes() -> None:
    """The second waits in a loop, whose JMP the first overwrites."""
    computer = Computer(
        store(OTHER, 0x9090_9090) + FOREVER, {OTHER: FOREVER + NOP * 2 + STOP}, vcpus=2
    )
    second = computer.vcpus[1]
    second.context[:] = computer.vcpu.context
    second.set_register("rip", OTHER)
    second.initialised = second.online = True
    computer.vcpu.event_pauses = 1
    computer.run(4)
    assert second.register("rip") == OTHER
    computer.vcpu.event_pauses = 0
    computer.run(20)
    assert second.halted


def test_two_domains_on_a_host() -> None:
    host = MockBackend(memory_pages=1 << 13)
    one = Computer(b"\xb0\x01" + store_eax(DATA) + b"\xe6\xe9" + STOP, host=host)
    two = Computer(b"\xb0\x02" + store_eax(DATA) + b"\xe6\xe9" + STOP, host=host)
    for computer in (two, one):
        computer.run()
    assert [computer.words(DATA, 1)[0] & 0xFF for computer in (one, two)] == [1, 2]
    assert [host.console(computer.domid) for computer in (one, two)] == ["\x01", "\x02"]
    host.destroy(one.domid)
    two.set(rip=CODE, rax=0)
    two.vcpu.halted = False
    two.run()
    assert two.words(DATA, 1)[0] & 0xFF == 2


def test_a_domain_that_is_destroyed_while_somebody_holds_a_page() -> None:
    computer = Computer(b"\x40\xeb\xfd")
    mapped = computer.host.foreignmemory_map(computer.domid, True, [DATA >> 12])
    computer.run(2)
    computer.host.destroy(computer.domid)
    assert computer.run(2) == 0
    computer.host.foreignmemory_unmap(mapped)
    with pytest.raises(DomainNotFoundError):
        computer.host.domain(computer.domid)


def test_a_dead_domain_leaves_nothing() -> None:
    """Neither engines nor frames: a suite boots many."""
    host = MockBackend(memory_pages=1 << 13)
    before = free(host)
    computer = Computer(STOP, host=host)
    computer.run()
    core = weakref.ref(computer.processor.core)
    host.destroy(computer.domid)
    del computer
    gc.collect()
    assert core() is None
    assert free(host) == before


def free(host: MockBackend) -> int:
    """How many frames there are to be had."""
    frames, found = host.machine.frames, []
    while (mfn := frames.allocate()) is not None:
        found.append(mfn)
    frames._free.extend(found)
    return len(found)


# Interruptions of the simulator itself.


def test_an_exception_of_the_simulators_own_ends_the_run_between_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Ctrl-C does, in the middle of a page's lookup; what was done is not done twice."""
    computer = Computer(b"\x40" + store_eax(DATA) + b"\x40" + STOP)
    find = PhysicalMemory.find

    def interrupt(self: Any, gfn: int) -> Any:
        if gfn == DATA >> 12:
            raise KeyboardInterrupt
        return find(self, gfn)

    monkeypatch.setattr(PhysicalMemory, "find", interrupt)
    with pytest.raises(KeyboardInterrupt):
        computer.run()
    assert computer.register("rip") == CODE + 1
    monkeypatch.undo()
    computer.run()
    assert computer.words(DATA, 1) == [1]
    assert computer.register("rax") == 2


# VMFUNC and #VE.


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_switching_views_touches_only_what_differs(
    monkeypatch: pytest.MonkeyPatch, counted: bool, paged: bool
) -> None:
    """Between two views that differ in two pages of ten: a remapped one and a restricted one."""
    remapped, restricted, shadow = DATA + 3 * PAGE_SIZE, DATA + 5 * PAGE_SIZE, 0x70000
    last = DATA + 9 * PAGE_SIZE
    asked: list[int] = []
    fill = Engine._fill

    def noting(engine: Engine, uc: Any, address: int, *rest: Any) -> bool:
        asked.append(address)
        return fill(engine, uc, address, *rest)

    monkeypatch.setattr(Engine, "_fill", noting)
    reads = b"".join(b"\x8b\x14\x25" + int32(DATA + page * PAGE_SIZE) for page in range(10))
    add = b"\x03\x1c\x25" + int32(remapped)
    loop = b"\x83\xf1\x01" + VMFUNC + reads + add + b"\xff\xcd"  # xor $1, %ecx; ...; dec %ebp
    code = loop + b"\x75" + (256 - len(loop) - 2).to_bytes(1, "little") + STOP
    memory = {remapped: int32(1), shadow: int32(1000)}
    computer = Computer(code, memory, mode=Altp2mMode.MIXED, views=True)
    if paged:
        computer.go_long()
    host, domid = computer.host, computer.domid
    view = computer.view((restricted >> 12, R), enter=False)
    host.altp2m_change_gfn(domid, view, remapped >> 12, shadow >> 12)
    host.altp2m_set_vcpu_enable_notify(domid, 0, OTHER >> 12)

    def go(passes: int) -> None:
        asked.clear()
        computer.set(rip=CODE, rax=0, rbx=0, rbp=passes)
        computer.vcpu.halted = False
        host.run(domid, 100 * passes if counted else None)
        assert computer.vcpu.halted
        assert computer.register("rbx") == 1001 * (passes // 2)

    go(4)  # each view gets its entries from the host p2m as they are used
    go(20)
    of_data = [address for address in asked if DATA <= address < DATA + 10 * PAGE_SIZE]
    assert sorted(of_data) == [remapped] * 20 + [restricted] * 20
    assert asked.count(CODE) <= 1
    if paged:  # and of the guest's own tables, only what was changed, though it was not told
        computer.map(last, DATA | PRESENT | WRITABLE)
        computer.write(DATA, int32(7))
        asked.clear()
        computer.set(rip=CODE, rax=0, rbp=4)
        computer.vcpu.halted = False
        host.run(domid, 400 if counted else None)
        assert computer.register("rdx") == 7
        assert asked.count(last) == 1
        assert DATA not in asked


def insider(code: bytes, **registers: int) -> Computer:
    """A vCPU that may use VMFUNC; view 1 has DATA read-only, and its #VE page is OTHER."""
    computer = Computer(code, mode=Altp2mMode.MIXED, views=True)
    computer.describe()
    computer.set(**registers)
    computer.view((DATA >> 12, R), enter=False)
    computer.host.altp2m_set_suppress_ve(computer.domid, 1, DATA >> 12, False)
    computer.host.altp2m_set_vcpu_enable_notify(computer.domid, 0, OTHER >> 12)
    return computer


@pytest.mark.parametrize("ring", [0, 3])
def test_vmfunc_switches_the_view(ring: int) -> None:
    computer = insider(VMFUNC + FOREVER, rax=0, rcx=1)
    computer.describe(ring=ring)
    computer.run(9)
    assert computer.vcpu.view == 1
    assert computer.register("rip") == CODE + 3


@pytest.mark.parametrize(
    ("rax", "rcx", "exits"),
    [(0, 9, True), (0, 10, True), (0, 512, True), (1, 1, True), (63, 1, True), (64, 1, False)],
)
def test_what_vmfunc_cannot_do(rax: int, rcx: int, exits: bool) -> None:
    """SDM 3C, VM Functions: from 64 on it is #UD, other failures are exits, which Xen makes #UD."""
    computer = insider(VMFUNC, rax=rax, rcx=rcx)
    computer.listen()
    computer.switch("vmexit", True, False)
    computer.run()
    assert computer.vector == UD
    assert computer.words(computer.register("rsp"), 1) == [CODE]
    assert computer.vcpu.view == 0
    reasons = [request["vmexit.arch.vmx.reason"] for request in computer.take()]
    assert [reason for reason in reasons if reason != 48] == ([59, 12] if exits else [12])


def test_vmfunc_wants_a_visible_view() -> None:
    computer = insider(VMFUNC, rax=0, rcx=1)
    computer.host.altp2m_set_visibility(computer.domid, 1, False)
    computer.run()
    assert computer.vector == UD


def test_vmfunc_is_there_from_enabling_the_page_to_switching_altp2m_off() -> None:
    """vmx_vcpu_update_vmfunc_ve: that the page goes takes #VE away, and leaves VMFUNC."""
    computer = Computer(VMFUNC, mode=Altp2mMode.MIXED, views=True, rax=0, rcx=0)
    computer.describe()
    computer.run()
    assert computer.vector == UD

    computer = insider(VMFUNC + FOREVER, rax=0, rcx=1)
    computer.host.altp2m_set_vcpu_disable_notify(computer.domid, 0)
    computer.run(9)
    assert computer.vcpu.view == 1

    computer = insider(VMFUNC, rax=0, rcx=0)
    computer.host.altp2m_set_domain_state(computer.domid, False)
    computer.host.altp2m_set_domain_state(computer.domid, True)
    computer.run()
    assert computer.vector == UD


def test_emulated_vmfunc_is_undefined() -> None:
    """vmx_vcpu_emulate_vmfunc does it only where the CPU cannot."""
    computer = insider(INT3, rax=0, rcx=1)
    computer.listen()
    computer.switch("software_breakpoint", True)
    computer.switch("emul_unimplemented", True)
    request = heard(computer, Reason.SOFTWARE_BREAKPOINT)
    computer.answer(request, EMULATE | INSN_DATA, data=VMFUNC.ljust(16, NOP))
    computer.run()
    assert computer.take() == []
    assert (computer.vector, computer.vcpu.view) == (UD, 0)


def information(computer: Computer) -> tuple[int, ...]:
    return struct.unpack("<IIQQQH", computer.read(OTHER, 34))


def test_virtualisation_exceptions() -> None:
    computer = insider(VMFUNC + store(DATA + 0x10, 5), rax=0, rcx=1)
    computer.listen()
    computer.switch("vmexit", True, False)
    assert computer.handled()[:3] == [CODE + 3, KERNEL_CODE, RF | 2]  # no error code
    assert computer.vector == VE
    # EPT violation; in use; a write, readable, the address is known and the page's; in view 1
    where = DATA + 0x10
    assert information(computer) == (48, 0xFFFF_FFFF, 2 | 1 << 3 | 3 << 7, where, where, 1)
    assert computer.words(where, 1) == [0]
    reasons = [request["vmexit.arch.vmx.reason"] for request in computer.take()]
    assert 48 in reasons[:-1]  # what view 1 had no entry for
    assert reasons[-1] == 12
    assert computer.model.views[1].table.lookup(DATA >> 12).access == R


def test_linear_and_physical_addresses_of_virtualisation_exceptions() -> None:
    computer = insider(store(OTHER + 0x1000, 5))
    computer.go_long()
    computer.describe()
    computer.set(cs_arbytes=0xC9B)
    computer.map(OTHER + 0x1000, DATA | PRESENT | WRITABLE)
    computer.vcpu.view = 1
    computer.run()
    assert computer.vector == VE
    assert information(computer)[3:5] == (OTHER + 0x1000, DATA)


def test_no_second_virtualisation_exception_before_the_guest_is_done_with_the_first() -> None:
    computer = insider(store(DATA, 5) + STOP)
    computer.vcpu.view = 1
    computer.write(OTHER + 4, int32(1))
    computer.listen()
    request = heard(computer, Reason.MEM_ACCESS)
    assert request["mem_access.gfn"] == DATA >> 12
    assert computer.vcpu.delivered == []


@pytest.mark.parametrize("suppressed", [True, False])
def test_suppressed_virtualisation_exceptions(suppressed: bool) -> None:
    computer = insider(store(DATA, 5) + STOP)
    computer.host.altp2m_set_suppress_ve(computer.domid, 1, DATA >> 12, suppressed)
    computer.vcpu.view = 1
    computer.listen()
    computer.run()
    assert [request.reason for request in computer.take()] == [Reason.MEM_ACCESS] * suppressed
    assert computer.vector == (None if suppressed else VE)


def test_events_are_delivered_without_virtualisation_exceptions() -> None:
    """The stack is in the page: the CPU cannot tell of that by another event."""
    computer = insider(UD2)
    computer.set(rsp=DATA + 0x100)
    computer.vcpu.view = 1
    computer.listen()
    request = heard(computer, Reason.MEM_ACCESS)
    assert request["mem_access.gfn"] == DATA >> 12
    assert computer.vcpu.delivered == []


# Hostile images.

GOOD = elf({CODE: STOP})


def images() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "not ELF", b"MZ" + bytes(100)
    for size in (4, 16, 51, 52, 60, 84, 115):
        yield f"cut to {size}", GOOD[:size]
    yield "no note", elf({CODE: STOP}, note=b"")
    yield "another note", elf({CODE: STOP}, note=struct.pack("<III4sI", 4, 4, 17, b"Xen\0", CODE))
    yield "not RAM", elf({HOLE: STOP})
    yield "partly RAM", elf({(2 << 20) - 1: STOP})
    yield "at the end of the address space", elf({0xFFFF_FFFF: STOP})
    yield "no such class", GOOD[:4] + b"\x07" + GOOD[5:]
    yield "64-bit, beyond all memory", elf({1 << 63: STOP}, bits=64)


HOSTILE = dict(images())


@pytest.mark.parametrize(
    "image", [image for _, image in images()], ids=[name for name, _ in images()]
)
def test_hostile_images(image: bytes) -> None:
    host = MockBackend(memory_pages=1 << 13)
    domid = host.add_domain(memory_kib=2048)
    with pytest.raises(InvalidArgumentError):
        host.boot(domid, image)


@pytest.mark.parametrize("at", range(len(GOOD)))
def test_any_byte_of_an_image_may_be_wrong(at: int) -> None:
    """It is refused as it should be, or boots."""
    host = MockBackend(memory_pages=1 << 12)
    domid = host.add_domain(memory_kib=256, superpages=False)
    for value in (0, 0x7F, 0xFF):
        image = GOOD[:at] + bytes([value]) + GOOD[at + 1 :]
        try:
            host.boot(domid, image)
        except InvalidArgumentError:
            continue


def test_a_64_bit_image_boots() -> None:
    host = MockBackend(memory_pages=1 << 13)
    domid = host.add_domain(memory_kib=2048)
    host.boot(domid, elf({CODE: b"\xb0A\xe6\xe9" + STOP}, bits=64))
    host.domain_unpause(domid)
    assert host.console(domid) == "A"


def test_an_older_unicorn_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", SimpleNamespace(__version__="2.0.1"))
    host = MockBackend(memory_pages=1 << 13)
    domid = host.add_domain(memory_kib=2048)
    with pytest.raises(ImportError, match=r"2\.1 or later, here is 2\.0\.1"):
        host.boot(domid, GOOD)


def test_without_unicorn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)
    host = MockBackend(memory_pages=1 << 13)
    domid = host.add_domain(memory_kib=2048)
    with pytest.raises(ImportError, match=r"pip install 'xenaltp2m\[sim\]'"):
        host.boot(domid, GOOD)


@pytest.mark.parametrize("counted", [None, 1000])
def test_flags_survive_a_store_to_a_page_that_was_not_used_before(counted: int | None) -> None:
    """9 + 9 carries out of bit 3: AF (SDM 1, 3.4.3.1), for the second PUSHF, too."""
    code = b"\x01\xf6" + b"\x9c\x59" + b"\x9c\x5f" + HALT  # ADD ESI, ESI; the stack is new
    computer = Computer(code, rsi=0x3014C9)
    computer.host.run(computer.domid, counted)
    expected = 2 | 1 << 4
    assert (computer.register("rcx"), computer.register("rdi")) == (expected, expected)
    computer.close()


class Alarm(Exception):
    pass


def test_fault_06_what_a_signals_handler_raises_waits_until_the_vcpu_has_had_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unicorn calls back from C, where an exception is told to nobody."""
    asked = VirtualMemory.resolve

    def expire(*_: object) -> None:
        raise Alarm

    def pressed(self: VirtualMemory, *about: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return asked(self, *about, **options)

    computer = Computer(b"\xa1" + int32(DATA) + STOP, {DATA: int32(7)})  # mov DATA, %eax
    monkeypatch.setattr(VirtualMemory, "resolve", pressed)
    before = signal.signal(signal.SIGUSR1, expire)
    try:
        with pytest.raises(Alarm):
            computer.run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert computer.register("rax") == 7
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


# Its limits: "Limits" in docs/simulator.md. What the CPU does is in the comments.


@pytest.mark.parametrize(
    ("code", "where"),
    [
        ("0f2800", CODE + 3),  # MOVAPS of an address that is not aligned: #GP
        ("0f32", CODE + 2),  # RDMSR of none: #GP
        ("0fa2", CODE + 2),
    ],
    ids=["movaps", "rdmsr", "cpuid"],
)
def test_a_limit_no_exception_and_zeros(code: str, where: int) -> None:
    computer = Computer(bytes.fromhex(code) + STOP, cr4=OSFXSR, rax=DATA + 1, rcx=0x12345)
    computer.describe()
    if code == "0fa2":
        computer.set(rax=7, rcx=0)
    computer.run()
    assert computer.vcpu.delivered == []
    assert computer.register("rip") == where + len(STOP)
    if code != "0f2800":
        assert (computer.register("rax"), computer.register("rdx")) == (0, 0)


def test_a_limit_error_codes_of_bad_selectors_are_zero() -> None:
    """A CPU pushes the selector (SDM 3A, 7.13)."""
    computer = Computer(b"\xb8\x40\x00\x00\x00\x8e\xd8")
    computer.describe()
    assert computer.handled()[:2] == [0, CODE + 5]
    assert computer.vector == GP


@pytest.mark.parametrize("code", ["e410", "fa"], ids=["in", "cli"])
def test_a_limit_iopl_allows_nothing(ring_3: Computer, code: str) -> None:
    """With IOPL 3 a CPU executes them in ring 3."""
    ring_3.write(CODE, bytes.fromhex(code) + FOREVER)
    ring_3.set(rflags=2 | IOPL)
    ring_3.handled()
    assert ring_3.vector == GP


def test_a_limit_the_io_bitmap_allows_nothing(ring_3: Computer) -> None:
    """A CPU executes IN at a port whose bit is clear (SDM 1, 19.5.2)."""
    bitmap = 0x68
    ring_3.write(TSS + 0x66, struct.pack("<H", bitmap) + bytes(16))
    ring_3.set(tr_limit=bitmap + 16)
    ring_3.write(CODE, b"\xe4\x10" + FOREVER)
    ring_3.handled()
    assert ring_3.vector == GP


def test_a_limit_a_gate_s_selector_is_one_of_the_gdt() -> None:
    """A CPU looks for this one in the LDT, of which there is none, and raises #GP."""
    computer = Computer(b"\xcd\x20")
    computer.describe()
    entry = bytearray(computer.read(IDT + 8 * 0x20, 8))
    entry[2] |= 4
    computer.write(IDT + 8 * 0x20, bytes(entry))
    computer.handled()
    assert computer.vector == 0x20


def test_a_limit_a_16_bit_task_state_is_read_as_one_of_32_bits() -> None:
    """Its SP0 is at 2 and SS0 at 4 (SDM 3A, figure 9-10)."""
    computer = Computer(UD2)
    computer.describe(ring=3)
    computer.set(tr_arbytes=0x83)
    computer.write(TSS + 2, struct.pack("<H", OTHER & 0xFFFF))
    computer.handled()
    assert (computer.vector, computer.register("rsp")) == (UD, STACK - 20)


def test_a_limit_breakpoints_of_debug_registers_stop_nothing() -> None:
    """DR0 has the NOP's address, and DR7 enables it."""
    code = b"\xb8" + int32(CODE + 16) + b"\x0f\x23\xc0"  # mov to %eax; to %dr0
    code += b"\xb8" + int32(0x402) + b"\x0f\x23\xf8" + NOP + STOP
    computer = Computer(code)
    computer.describe()
    computer.run()
    assert computer.vcpu.halted
    assert computer.vcpu.delivered == []


def test_a_limit_a_task_gate_is_refused() -> None:
    """A CPU switches tasks, or raises #TS or #NP; it pushes the vector, 0x20."""
    computer = Computer(b"\xcd\x20")
    computer.describe()
    computer.write(IDT + 8 * 0x20, struct.pack("<HHHH", 0, 0x28, 0x8500, 0))
    assert computer.handled()[0] == 0x20 * 8 + 2
    assert computer.vector == GP


def test_a_limit_iret_does_not_go_to_virtual_8086_mode() -> None:
    computer = Computer(IRET)
    computer.describe()
    virtual_8086 = 1 << 17
    frame = 0, 0x2000, virtual_8086 | 2, 0x1000, 0x3000, 0, 0, 0, 0
    computer.write(STACK - 36, struct.pack("<9I", *frame))
    computer.set(rsp=STACK - 36)
    computer.handled()
    assert computer.vector == GP


def test_a_limit_a_jump_that_is_not_canonical_faults_at_its_target() -> None:
    """A CPU of Intel's raises it at the jump."""
    computer = Computer(b"\x48\xbb" + (1 << 63).to_bytes(8, "little") + b"\xff\xe3")
    computer.go_long()
    computer.describe()
    assert computer.handled()[:2] == [0, 1 << 63]


def test_a_limit_the_context_has_no_fpu_and_vector_registers() -> None:
    """FLD1; CMPEQPS of a register with itself, which sets all its bits."""
    store = b"\x0f\x11\x05" + int32(DATA)
    computer = Computer(b"\xd9\xe8\x0f\xc2\xc0\x00" + store + STOP, cr4=OSFXSR)
    computer.run()
    assert computer.read(DATA, 16) == b"\xff" * 16
    assert b"\xff" * 16 not in computer.vcpu.context


def test_a_limit_descriptor_accesses_have_no_instruction_information() -> None:
    computer = Computer(b"\x0f\x01\x0d" + int32(DATA) + STOP, listen=True)  # SIDT
    computer.switch("descriptor_access", True)
    request = heard(computer, Reason.DESCRIPTOR_ACCESS)
    assert request["desc_access.arch.vmx.instr_info"] == 0


def test_a_limit_the_time_counts_attempts() -> None:
    """RDTSC twice, with what an agent has stepped over in between, and without."""
    rdtsc = b"\x0f\x31"
    took = []
    for watched in (False, True):
        code = rdtsc + b"\x89\xc3" + load_eax(OTHER) + rdtsc + b"\x29\xd8" + STOP
        computer = Computer(code, views=True, listen=True)
        view = computer.view((OTHER >> 12, X if watched else RWX))
        computer.switch("singlestep", True)
        computer.run()
        for request in computer.take():
            computer.answer(request, SWITCH | FAST, view=0, u__fast_singlestep__p2midx=view)
        computer.run()
        took.append(computer.register("rax"))
    assert took[0] < took[1]


@pytest.mark.parametrize("steps", ["agent", "guest"])
@pytest.mark.parametrize("level", [0, 1, 31])
@pytest.mark.parametrize("after", ["40", "a100000200", "eb00", "0fa2"])
def test_fault_10_enter_is_a_step(after: str, level: int, steps: str) -> None:
    """SDM 3C, 26.5.2, and 3B, 18.3.1.4: whatever its nesting level, with nothing behind it."""
    enter = b"\xc8\x10\x00" + bytes([level])
    computer = Computer(enter + bytes.fromhex(after) + STOP, listen=True, rbp=STACK - 0x200)
    computer.describe()
    if steps == "agent":
        computer.switch("singlestep", True)
        computer.vcpu.single_step = True
        assert heard(computer, Reason.SINGLESTEP).register("rip") == CODE + len(enter)
    else:
        computer.set(rflags=TF | 2)
        assert computer.handled()[0] == CODE + len(enter)
