# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the simulator knows of the CPU. Expected values are worked out from the SDM by hand.

Volume 3A: chapter 4 for paging, 5 for segments, 6 for gates and exceptions; volume 2 for opcodes.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import NoReturn

import pytest

from xenaltp2m.abi.x86 import (
    Fault,
    Gate,
    Paging,
    Segment,
    canonical,
    decode,
    doubled,
    exiting_starts,
    has_error_code,
    is_privileged,
    segment_of,
)

PE, WP, PG = 1, 1 << 16, 1 << 31
PSE, PAE, LA57, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
LONG, NXE = 1 << 8 | 1 << 10, 1 << 11
P, W, U, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
ALL = P | W | U
PF, GP = 14, 13
PRESENT, WRITE, USER, RESERVED, FETCH = 1, 2, 4, 8, 16
ROOT, SECOND, THIRD, FOURTH, FIFTH = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
FRAME = 0x0765_4000

OFF = Paging(PE, 0, 0, 0, user=False)
TWO = Paging(PE | PG | WP, ROOT, PSE, 0, user=False)
THREE = Paging(PE | PG | WP, ROOT + 0x20, PAE, NXE, user=False)
FOUR = Paging(PE | PG | WP, ROOT, PAE, LONG | NXE, user=False)
FIVE = replace(FOUR, cr4=PAE | LA57)
MODES = {"2": TWO, "3": THREE, "4": FOUR, "5": FIVE}

LINEAR = {
    "2": 0xC070_5ABC,
    "3": 0xC070_5ABC,
    "4": 0xFFFF_A0C0_C070_5ABC,
    "5": 0xFF12_A0C0_C070_5ABC,
}
# The indices in it: 0xC0705ABC >> 22 is 0x301, >> 12 & 0x3ff is 0x305; >> 30 is 3, >> 21 & 0x1ff
# is 3, >> 12 & 0x1ff is 0x105; 0xA0C0C0705ABC >> 39 is 0x141, >> 30 & 0x1ff is 0x103;
# 0xFF12A0C0C0705ABC >> 48 & 0x1ff is 0x112.
PATHS = {
    "2": [ROOT + 4 * 0x301, SECOND + 4 * 0x305],
    "3": [ROOT + 0x20 + 8 * 3, SECOND + 8 * 3, THIRD + 8 * 0x105],
    "4": [ROOT + 8 * 0x141, SECOND + 8 * 0x103, THIRD + 8 * 3, FOURTH + 8 * 0x105],
    "5": [
        ROOT + 8 * 0x112,
        SECOND + 8 * 0x141,
        THIRD + 8 * 0x103,
        FOURTH + 8 * 3,
        FIFTH + 8 * 0x105,
    ],
}
BELOW = [SECOND, THIRD, FOURTH, FIFTH]


class Tables:
    """Page tables for one address, and what the CPU does to them."""

    def __init__(self, mode: str, last: int = FRAME | ALL, above: int = ALL) -> None:
        self.mode = mode
        self.paging = MODES[mode]
        self.path = PATHS[mode]
        entries = [table | above for table in BELOW[: len(self.path) - 1]]
        if mode == "3":
            entries[0] = SECOND | P
        self.memory = dict(zip(self.path, [*entries, last], strict=True))
        self.stored: dict[int, int] = {}

    def load(self, address: int, size: int) -> int:
        assert size == (4 if self.mode == "2" else 8)
        return self.memory[address]

    def store(self, address: int, size: int, value: int) -> None:
        assert size == (4 if self.mode == "2" else 8)
        self.stored[address] = self.memory[address] = value

    def use(self, kind: str = "r", **registers: object) -> tuple[int, str]:
        """Translate the address; gives the frame and what is allowed."""
        paging = replace(self.paging, **registers)  # type: ignore[arg-type]
        return paging.translate(LINEAR[self.mode], kind, self.load, self.store)

    def error(self, kind: str = "r", **registers: object) -> int:
        """Translate in vain; gives the page fault's error code."""
        with pytest.raises(Fault) as caught:
            self.use(kind, **registers)
        assert caught.value.vector == PF
        assert caught.value.address == LINEAR[self.mode]
        assert self.stored == {}
        return caught.value.error_code


each_mode = pytest.mark.parametrize("mode", MODES)
each_with_nx = pytest.mark.parametrize("mode", ["3", "4", "5"])


def test_without_paging_addresses_are_physical() -> None:
    def nothing(*_: int) -> NoReturn:
        pytest.fail("there are no tables")

    assert OFF.translate(0xFFFF_F123, "w", nothing, nothing) == (0xFFFF_F000, "rwx")


@each_mode
def test_small_pages(mode: str) -> None:
    assert Tables(mode, FRAME | ALL | A | D).use() == (FRAME, "rwx")


@each_mode
def test_marks_of_a_read(mode: str) -> None:
    tables = Tables(mode)
    assert tables.use("r") == (FRAME, "rx")  # a write has to mark it dirty
    marked = tables.path[1:] if mode == "3" else tables.path  # PDPTEs have no such bit
    assert {address: value & (A | D) for address, value in tables.stored.items()} == dict.fromkeys(
        marked, A
    )


@each_mode
def test_marks_of_a_write(mode: str) -> None:
    tables = Tables(mode)
    assert tables.use("w") == (FRAME, "rwx")
    assert tables.memory[tables.path[-1]] == FRAME | ALL | A | D
    assert tables.memory[tables.path[-2]] & D == 0
    tables.stored.clear()
    assert tables.use("w") == (FRAME, "rwx")
    assert tables.stored == {}


LARGE = [
    ("2", 1, 0x0740_0000, 0x0770_5000),  # 4 MiB: the low 22 bits of 0xC0705000 are 0x305000
    ("2", 1, 0x0740_0000 | 3 << 13, 0x3_0770_5000),  # PSE-36: bits 20:13 are address bits 39:32
    ("3", 2, 0x0760_0000, 0x0770_5000),  # 2 MiB: the low 21 bits are 0x105000
    ("4", 3, 0x0760_0000, 0x0770_5000),
    ("4", 2, 0x4000_0000, 0x4070_5000),  # 1 GiB: the low 30 bits are 0x705000
    ("5", 4, 0x0760_0000, 0x0770_5000),
    ("5", 3, 0x4000_0000, 0x4070_5000),
]


@pytest.mark.parametrize(("mode", "level", "frame", "physical"), LARGE)
def test_large_pages(mode: str, level: int, frame: int, physical: int) -> None:
    tables = Tables(mode)
    at = tables.path[level - 1]
    tables.memory[at] = frame | ALL | PS
    assert tables.use("w") == (physical, "rwx")
    assert tables.memory[at] == frame | ALL | PS | A | D
    assert set(tables.stored) <= set(tables.path[:level])


def test_without_pse_the_bit_is_ignored() -> None:
    tables = Tables("2", above=ALL | PS)
    assert tables.use(cr4=0)[0] == FRAME


@each_mode
def test_not_present(mode: str) -> None:
    for missing in PATHS[mode]:
        tables = Tables(mode)
        tables.memory[missing] &= ~P
        tables.memory[missing] |= NX if mode != "2" else 0  # what else is there does not matter
        assert tables.error("r") == 0
        assert tables.error("w") == WRITE
        assert tables.error("r", user=True) == USER
        assert tables.error("w", user=True) == WRITE | USER


@each_mode
def test_the_fetch_bit_of_error_codes(mode: str) -> None:
    """Set where SMEP is on, or PAE and NXE both are."""
    tables = Tables(mode, 0)
    assert tables.error("x", cr4=tables.paging.cr4 | SMEP, efer=LONG & tables.paging.efer) == FETCH
    assert tables.error("x", efer=LONG & tables.paging.efer) == 0
    assert tables.error("x", efer=tables.paging.efer | NXE) == (0 if mode == "2" else FETCH)


@each_mode
def test_writes_to_read_only_pages(mode: str) -> None:
    levels = PATHS[mode][1:] if mode == "3" else PATHS[mode]
    for at in levels:
        tables = Tables(mode)
        tables.memory[at] &= ~W
        assert tables.error("w") == PRESENT | WRITE
        assert tables.error("w", user=True) == PRESENT | WRITE | USER
        assert tables.error("w", user=True, cr0=PE | PG) == PRESENT | WRITE | USER
        assert tables.use("r") == (FRAME, "rx")
        assert tables.use("w", cr0=PE | PG) == (FRAME, "rwx")  # WP is clear


@each_mode
def test_users_and_supervisors_pages(mode: str) -> None:
    levels = PATHS[mode][1:] if mode == "3" else PATHS[mode]
    for at in levels:
        tables = Tables(mode)
        tables.memory[at] &= ~U
        for kind, bits in (("r", 0), ("w", WRITE)):
            assert tables.error(kind, user=True) == PRESENT | USER | bits
        assert tables.error("x", user=True, efer=LONG & tables.paging.efer) == PRESENT | USER
        smep_and_smap = tables.paging.cr4 | SMEP | SMAP
        assert tables.use("w", cr4=smep_and_smap) == (FRAME, "rwx")


@each_mode
def test_smep(mode: str) -> None:
    tables = Tables(mode)
    cr4 = tables.paging.cr4 | SMEP
    assert tables.error("x", cr4=cr4) == PRESENT | FETCH
    assert tables.use("x", cr4=cr4, user=True)[0] == FRAME
    assert tables.use("w", cr4=cr4) == (FRAME, "rw")


@each_mode
def test_smap(mode: str) -> None:
    tables = Tables(mode)
    cr4 = tables.paging.cr4 | SMAP
    assert tables.error("r", cr4=cr4) == PRESENT
    assert tables.error("w", cr4=cr4) == PRESENT | WRITE
    assert tables.use("x", cr4=cr4) == (FRAME, "x")
    assert tables.use("w", cr4=cr4, alignment_check=True) == (FRAME, "rwx")
    assert tables.use("w", cr4=cr4, user=True) == (FRAME, "rwx")


@each_with_nx
def test_no_execute(mode: str) -> None:
    for at in PATHS[mode][1:]:
        tables = Tables(mode)
        tables.memory[at] |= NX
        assert tables.error("x") == PRESENT | FETCH
        assert tables.error("x", user=True) == PRESENT | FETCH | USER
        reserved = tables.error("r", efer=tables.paging.efer & ~NXE)
        assert reserved == PRESENT | RESERVED
        assert tables.use("w") == (FRAME, "rw")


BEYOND = 1 << 39  # with 39 bits of physical address
RESERVED_BITS = [
    *((mode, level, bit) for mode in ("4", "5") for level in range(1, int(mode) + 1)
      for bit in (BEYOND, 1 << 51)),
    *(("3", level, bit) for level in (2, 3) for bit in (BEYOND, 1 << 52, 1 << 62)),
    *(("3", 1, bit) for bit in (2, 4, 1 << 5, 1 << 8)),
    ("4", 1, PS), ("5", 1, PS), ("5", 2, PS),
    ("2", 1, PS | 1 << 21), ("2", 1, PS | 1 << 20),
    ("3", 2, PS | 1 << 13), ("4", 3, PS | 1 << 20), ("4", 2, PS | 1 << 29),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "level", "bits"), RESERVED_BITS)
def test_reserved_bits(mode: str, level: int, bits: int) -> None:
    tables = Tables(mode)
    at = tables.path[level - 1]
    tables.memory[at] = tables.memory[at] & 0xFFF | bits
    assert tables.error("r") == PRESENT | RESERVED
    assert tables.error("w", user=True) == PRESENT | RESERVED | WRITE | USER


@pytest.mark.parametrize(("mode", "bits"), [("4", 1 << 52), ("4", 1 << 9), ("2", 1 << 9)])
def test_ignored_bits(mode: str, bits: int) -> None:
    assert Tables(mode, FRAME | ALL | bits).use()[0] == FRAME


@pytest.mark.parametrize(
    ("address", "bits", "expected"),
    [
        (0, 48, True),
        (0x0000_7FFF_FFFF_FFFF, 48, True),
        (0x0000_8000_0000_0000, 48, False),
        (0xFFFF_7FFF_FFFF_FFFF, 48, False),
        (0xFFFF_8000_0000_0000, 48, True),
        (0x0000_8000_0000_0000, 57, True),
        (0x0100_0000_0000_0000, 57, False),
        (0xFF00_0000_0000_0000, 57, True),
    ],
)
def test_canonical(address: int, bits: int, expected: bool) -> None:
    assert canonical(address, bits) is expected
    paging = FIVE if bits == 57 else FOUR
    if not expected:
        with pytest.raises(Fault) as caught:
            paging.translate(address, "r", lambda *_: 0, lambda *_: None)
        assert (caught.value.vector, caught.value.error_code) == (GP, 0)


# Segments, gates, exceptions.


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (0x00CF9B000000FFFF, Segment(0, 0xFFFF_FFFF, 0xC9B)),
        (0x12409334_5678_9ABC, Segment(0x1234_5678, 0x9ABC, 0x493)),
        (0xFF8F_F3FF_FFFF_0000, Segment(0xFFFF_FFFF, 0xF000_0FFF, 0x8F3)),
    ],
)
def test_descriptors(raw: int, expected: Segment) -> None:
    """Base 63:56, 39:16; limit 51:48, 15:0, where G (55) is set in pages; the rest 55:52, 47:40."""
    assert segment_of(raw) == expected


def test_what_a_segment_is() -> None:
    assert Segment(0, 0, 0x9B).is_code
    assert not Segment(0, 0, 0x93).is_code  # data
    assert not Segment(0, 0, 0x8B).is_code  # a TSS
    assert Segment(0, 0, 0x29B).is_64_bit
    assert not Segment(0, 0, 0x69B).is_64_bit  # D and L
    assert not Segment(0, 0, 0x1B).is_present
    assert Segment(0, 0, 0xFB).privilege == 3


def test_gates() -> None:
    narrow = struct.pack("<HHHH", 0x5678, 0x08, 0xEE00, 0x1234)
    assert Gate.of(narrow, 3, 0) == Gate(8, 0x1234_5678, 0xE, 3, 0)
    assert Gate.of(narrow, 3, 0).masks_interrupts
    wide = struct.pack("<HHHHII", 0x5678, 0x10, 0x8F05, 0x1234, 0xFFFF_8000, 0)
    assert Gate.of(wide, 3, 0) == Gate(0x10, 0xFFFF_8000_1234_5678, 0xF, 0, 5)
    assert not Gate.of(wide, 3, 0).masks_interrupts


@pytest.mark.parametrize(
    ("kind", "vector"), [(0x0E00, 11), (0x8500, GP), (0x8C00, GP), (0x0000, GP), (0x9E00, GP)]
)
def test_gates_that_are_none(kind: int, vector: int) -> None:
    """Not present: #NP. A task gate in long mode, a call gate, nothing, a segment: #GP."""
    for external in (0, 1):
        with pytest.raises(Fault) as caught:
            Gate.of(struct.pack("<HHHH", 0, 8, kind, 0), 0x21, external)
        assert (caught.value.vector, caught.value.error_code) == (vector, 0x21 * 8 + 2 + external)


def test_which_exceptions_have_error_codes() -> None:
    """Table 6-1; 21 is #CP."""
    assert {vector for vector in range(32) if has_error_code(vector)} == {
        *(8, 10, 11, 12, 13, 14, 17, 21)
    }


def test_double_faults() -> None:
    """Tables 6-4 and 6-5: #VE is as a page fault."""
    contributory, benign = (0, 10, 11, 12, 13), (1, 3, 4, 5, 6, 7, 16, 17, 19)
    for first in contributory:
        assert {second for second in range(20) if doubled(first, second)} == set(contributory)
    for first in (14, 20):
        assert {second for second in range(20) if doubled(first, second)} == {*contributory, 14}
    for first in benign:
        assert not any(doubled(first, second) for second in range(20))


# Instructions: opcode, length, ModRM, immediate, REX, operand size, whether it repeats.

INSTRUCTIONS = [
    ("cc", 64, (0xCC, 1, 0, 0, 0, 4, False)),
    ("cd80", 64, (0xCD, 2, 0, 0x80, 0, 4, False)),
    ("66cc", 32, (0xCC, 2, 0, 0, 0, 2, False)),
    ("ce", 32, (0xCE, 1, 0, 0, 0, 4, False)),
    ("f1", 32, (0xF1, 1, 0, 0, 0, 4, False)),
    ("f4", 64, (0xF4, 1, 0, 0, 0, 4, False)),
    ("0fa2", 64, (0x0FA2, 2, 0, 0, 0, 4, False)),
    ("480fa2", 64, (0x0FA2, 3, 0, 0, 0x48, 8, False)),
    ("0f22d8", 64, (0x0F22, 3, 0xD8, 0, 0, 4, False)),
    ("440f22c0", 64, (0x0F22, 4, 0xC0, 0, 0x44, 4, False)),
    ("0f01c1", 64, (0x0F01, 3, 0xC1, 0, 0, 4, False)),
    ("0f01d4", 32, (0x0F01, 3, 0xD4, 0, 0, 4, False)),
    ("0f30", 64, (0x0F30, 2, 0, 0, 0, 4, False)),
    ("e4e9", 32, (0xE4, 2, 0, 0xE9, 0, 4, False)),
    ("66ed", 32, (0xED, 2, 0, 0, 0, 2, False)),
    ("66ed", 16, (0xED, 2, 0, 0, 0, 4, False)),
    ("f36f", 32, (0x6F, 2, 0, 0, 0, 4, True)),
    ("4866f4", 64, (0xF4, 3, 0, 0, 0, 2, False)),  # a REX that a prefix follows is none
]


@pytest.mark.parametrize(("code", "mode", "expected"), INSTRUCTIONS)
def test_decode(code: str, mode: int, expected: tuple[object, ...]) -> None:
    raw, size = bytes.fromhex(code), 2 if mode == 16 else 4
    assert decode(raw + b"\x90" * 4, mode == 64, size) == expected
    assert decode(raw, mode == 64, size) == expected
    for length in range(len(raw)):
        assert decode(raw[:length], mode == 64, size) is None  # it goes on behind the page


@pytest.mark.parametrize("code", ["90", "48ff", "0f1f00", "0f0b", "c3", "", "66", "0f"])
def test_what_does_not_exit(code: str) -> None:
    assert decode(bytes.fromhex(code), True, 4) is None


def test_inc_is_no_prefix_in_32_bit_mode() -> None:
    assert decode(b"\x40\xf4", False, 4) is None


def test_operands_in_memory_have_no_length() -> None:
    found = decode(bytes.fromhex("0f014c2410"), True, 4)  # SIDT [rsp+16]
    assert found is not None
    assert (found.opcode, found.modrm, found.length) == (0x0F01, 0x4C, 0)


@pytest.mark.parametrize(
    "code", ["f4", "fa", "fb", "0f30", "0f32", "0f22d8", "0f06", "0f01d1", "0fa2"]
)
def test_where_an_instruction_that_exits_may_begin(code: str) -> None:
    raw = bytes.fromhex(code)
    for at, prefixes in ((0, b""), (100, b"\x66"), (4096 - len(raw), b"\x2e\x66\x48")):
        page = bytearray(b"\x90" * 4096)
        start = max(at - len(prefixes), 0)
        page[start : at + len(raw)] = (prefixes if at else b"") + raw
        assert set(range(start, at + 1)) <= set(exiting_starts(bytes(page)))
    assert list(exiting_starts(b"\x90" * 4096)) == []


@pytest.mark.parametrize("tail", [b"\x0f", b"\x66", b"\x48\x0f", b"\xcd"])
def test_instructions_that_cross_into_the_next_page(tail: bytes) -> None:
    page = (b"\x90" * 4096)[: -len(tail)] + tail
    assert set(exiting_starts(page)) == set(range(4096 - len(tail), 4096))


@pytest.mark.parametrize(
    ("opcode", "modrm", "expected"),
    [
        (0xCC, 0, False), (0xCD, 0, False), (0xF1, 0, False), (0x0FA2, 0, False),
        (0x0F01, 0xC1, False), (0x0F01, 0xD4, False),
        (0x0F01, 0xD0, False), (0x0F01, 0xF9, False),  # XGETBV, RDTSCP
        (0x0F01, 0x08, False), (0x0F00, 0xC8, False), (0x0F01, 0x20, False),  # SIDT, STR, SMSW
        (0x0F01, 0x18, True), (0x0F01, 0x10, True), (0x0F00, 0xD8, True), (0x0F00, 0xD0, True),
        (0x0F01, 0x30, True), (0x0F01, 0x38, True), (0x0F01, 0xF8, True), (0x0F01, 0xD1, True),
        (0xF4, 0, True), (0xFA, 0, True), (0xEC, 0, True), (0x0F30, 0, True), (0x0F32, 0, True),
        (0x0F20, 0xC0, True), (0x0F22, 0xC0, True), (0x0F06, 0, True), (0x0F09, 0, True),
    ],
)  # fmt: skip
def test_privileges(opcode: int, modrm: int, expected: bool) -> None:
    assert is_privileged(opcode, modrm) is expected
