# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel's own list of its symbols: System.map and /proc/kallsyms."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.errors import SymbolError
from xenaltp2m.tools.symbols import Image, Symbols
from xenaltp2m.values.events import Registers
from xenaltp2m.values.registers import registers_at

HELLO = Path(__file__).parents[2] / "examples" / "guest" / "hello.elf"
LIST = b"""\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000000 T startup_64
ffffffff81200000 T entry_SYSCALL_64
ffffffff81200040 t helper
ffffffff81200080 t helper
ffffffff81200100 T do_sys_openat2
ffffffff81200180 d a+0x10
ffffffffc0000000 t in_module\t[ext4]
"""
SLIDE = 0x1260_0000


def opened(tmp_path: Path, content: bytes) -> Symbols:
    path = tmp_path / "System.map"
    path.write_bytes(content)
    return Symbols.open(path)


@pytest.fixture
def kernel(tmp_path: Path) -> Symbols:
    return opened(tmp_path, LIST)


def registers(lstar: int, **others: int) -> Registers:
    raw = bytearray(HVM_CPU.size)
    for name, value in {"msr_lstar": lstar, **others}.items():
        offset, width = HVM_CPU.fields[name]
        raw[offset : offset + width] = value.to_bytes(width, "little")
    return registers_at(HVM_CPU.fields)(bytes(raw))


def test_names_and_addresses(kernel: Symbols) -> None:
    assert kernel.address("do_sys_openat2") == 0xFFFFFFFF81200100
    assert kernel.address("do_sys_openat2+0x10") == 0xFFFFFFFF81200110
    for offset in ("08", "9" * 5000, "0x" + "f" * 17):
        with pytest.raises(SymbolError, match="has no symbol 'do_sys_openat2"):
            kernel.address(f"do_sys_openat2+{offset}")
    assert kernel.address("do_sys_openat2+16") == 0xFFFFFFFF81200110
    assert kernel.address("a+0x10") == 0xFFFFFFFF81200180  # a name like that
    assert str(kernel.locate(0xFFFFFFFF81200105)) == "do_sys_openat2+0x5"
    assert str(kernel.locate(0xFFFFFFFFC0000001)) == "in_module+0x1"
    assert kernel.locate(0xFFFFFFFF80FFFFFF) is None
    assert kernel.locate(0xFFFFFFFFD0000000) is None
    with pytest.raises(SymbolError, match="has no symbol 'fixed_percpu_data'"):
        kernel.address("fixed_percpu_data")
    with pytest.raises(SymbolError, match="several symbols 'helper'"):
        kernel.address("helper")
    with pytest.raises(SymbolError, match="did you mean do_sys_openat2"):
        kernel.address("do_sys_opena2+1")


def test_a_slide_that_is_found(kernel: Symbols) -> None:
    entry = kernel.address("entry_SYSCALL_64")
    slide = kernel.find_slide(registers(entry + SLIDE))
    assert slide == SLIDE
    slid = kernel.slid(slide)
    assert slid.address("_stext+4") == 0xFFFFFFFF81000004 + SLIDE
    assert str(slid.locate(0xFFFFFFFF81200100 + SLIDE)) == "do_sys_openat2"
    assert kernel.address("_stext") == 0xFFFFFFFF81000000
    assert kernel.find_slide(registers(entry)) == 0


@pytest.mark.parametrize("off", [1, -(2 << 20), 1 << 30, 0x1000])
def test_another_kernel_s_registers(kernel: Symbols, off: int) -> None:
    entry = kernel.address("entry_SYSCALL_64")
    with pytest.raises(SymbolError, match="does not match the running kernel"):
        kernel.find_slide(registers(entry + off))


def test_fault_16_lines_without_an_address_are_counted(tmp_path: Path) -> None:
    """As kernels before 4.15 print a hidden address, and nm a symbol that is not defined."""
    more = (
        b"\n          (null) A irq_stack_union\n(null) T hidden\t[ext4]\n"
        b"                 U undefined\n                 w __gmon_start__\n   \n"
    )
    plain, found = opened(tmp_path, LIST), opened(tmp_path, LIST + more)
    assert found.symbols == plain.symbols
    assert (plain.skipped, found.skipped) == (1, 7)
    with pytest.raises(SymbolError, match="kptr_restrict"):
        opened(tmp_path, b"          (null) T _stext\n(null) t helper\n")
    with pytest.raises(SymbolError, match="neither an ELF image nor a list"):
        opened(tmp_path, b"\n\n")


def test_fault_16_several_of_one_name_can_be_told_apart(tmp_path: Path) -> None:
    base = 0xFFFFFFFF81000000
    lines = [(base + 0x40, "helper", ""), (base, "helper", ""), (base + 0x80, "helper", "\t[ext4]")]
    lines += [(base + 0x1000 + n, "many", "") for n in range(20)]
    text = "".join(f"{address:x} t {name}{module}\n" for address, name, module in lines)
    kernel = opened(tmp_path, text.encode())
    listed = (
        rf"helper#1 at {base:#x}, helper#2 at {base + 0x40:#x}, helper#3 at {base + 0x80:#x} "
        r"\(ext4\)$"
    )
    with pytest.raises(SymbolError, match=listed):
        kernel.address("helper")
    assert kernel.address("helper#1") == base
    assert kernel.address("helper#2+0x8") == base + 0x48
    assert kernel.address("helper@ext4") == base + 0x80
    assert kernel.address(f"helper@{base + 0x40:#x}") == base + 0x40
    assert kernel.address(f"{base + 0x40:#x}") == base + 0x40
    for wrong in ("helper#0", "helper#4", "helper@xfs", "helper@", "#1", f"helper@{base + 1:#x}"):
        with pytest.raises(SymbolError, match="has no symbol"):
            kernel.address(wrong)
    with pytest.raises(SymbolError, match=r"many#8 at 0x\w+, \.\.\. 20 in all$"):
        kernel.address("many")


def test_fault_16_modules_do_not_move_with_the_kernel(kernel: Symbols) -> None:
    slid = kernel.slid(SLIDE)
    assert kernel.address("in_module") == 0xFFFFFFFFC0000000
    with pytest.raises(SymbolError, match="in the module ext4"):
        slid.address("in_module")
    assert slid.locate(0xFFFFFFFFC0000000 + SLIDE) is None
    assert (kernel.is_in_module("in_module"), kernel.is_in_module("_stext")) == (True, False)


ENTRIES = b"""\
ffffffff81000000 T _stext
ffffffff81a00000 T entry_SYSCALL_64
ffffffff81a00010 t entry_SYSCALL_64_trampoline
ffffffff81a01b60 T entry_SYSENTER_compat
ffffffff81a01c90 T entry_SYSCALL_compat
ffffffff81a01d00 T ignore_sysret
"""
TRAMPOLINE = 0xFFFFFE0000006010
"""SYSCALL64_entry_trampoline of CPU 0: its entry area has the trampoline in its seventh page."""


@pytest.mark.parametrize("slide", [0, SLIDE])
@pytest.mark.parametrize("cstar", ["entry_SYSCALL_compat", "ignore_sysret"])
def test_fault_16_a_kernel_entered_by_a_trampoline(tmp_path: Path, slide: int, cstar: str) -> None:
    """Linux 4.15 to 4.19 with page-table isolation (arch/x86/kernel/cpu/common.c, syscall_init)."""
    kernel = opened(tmp_path, ENTRIES)
    there = {
        "msr_cstar": kernel.address(cstar) + slide,
        "sysenter_eip": kernel.address("entry_SYSENTER_compat") + slide,
    }
    assert kernel.find_slide(registers(TRAMPOLINE, **there)) == slide
    assert kernel.find_slide(registers(TRAMPOLINE, msr_cstar=there["msr_cstar"])) == slide
    assert kernel.in_guest(registers(TRAMPOLINE, **there)).slide == slide
    there["sysenter_eip"] += 0x10
    with pytest.raises(SymbolError, match="does not match the running kernel"):
        kernel.find_slide(registers(TRAMPOLINE, **there))


def test_fault_05_a_slide_that_cannot_be_found_is_an_error(tmp_path: Path) -> None:
    entries = opened(tmp_path, ENTRIES)
    for there in (registers(0), registers(TRAMPOLINE)):
        with pytest.raises(SymbolError, match="cannot find the address"):
            entries.in_guest(there)
    without = opened(tmp_path, b"ffffffff81000000 T _stext\n")
    with pytest.raises(SymbolError, match="cannot find the address"):
        without.in_guest(registers(0xFFFFFFFF81A00000))


def test_an_image_is_opened_as_one() -> None:
    image = Symbols.open(HELLO)
    assert isinstance(image, Image)
    slid = image.slid(0x1000)
    assert isinstance(slid, Image)
    assert slid.address("target+2") == image.address("target") + 0x1002
    assert str(slid.locate(image.address("target") + 0x1000)) == "target"
    assert slid.gfns("target") == image.gfns("target")


def test_addresses_that_the_kernel_hides(tmp_path: Path) -> None:
    hidden = b"0000000000000000 T _stext\n0000000000000000 t helper\n"
    with pytest.raises(SymbolError, match="kptr_restrict") as caught:
        opened(tmp_path, hidden)
    assert "as root" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"#!/bin/sh\n",
        b"ffffffff81000000 T\n",
        b"ffffffff81000000 T " + b"x" * 2000 + b"\n",
        b"fffffffff81000000 T too_wide\n",
        b"-1 T minus\n",
        b"\x00" * 100,
    ],
)
def test_what_is_no_such_list(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SymbolError, match=r"line [12]$"):
        opened(tmp_path, content)


def test_a_list_that_says_where_the_list_is(tmp_path: Path) -> None:
    """What Debian ships instead."""
    line = (
        b"ffffffffffffffff B The real System.map is in the linux-image-6.1.0-9-amd64-dbg package\n"
    )
    with pytest.raises(SymbolError, match=r"in the linux-image-6\.1\.0-9-amd64-dbg package"):
        opened(tmp_path, line)


def test_too_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenaltp2m.tools.symbols.kallsyms.MAX_SYMBOLS", 3)
    with pytest.raises(SymbolError, match="more than 3 lines"):
        opened(tmp_path, LIST)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(LIST)), st.integers(0, 20))
def test_any_bytes_may_be_wrong(
    tmp_path_factory: pytest.TempPathFactory, some: bytes, at: int, gone: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "map"
    path.write_bytes(LIST[:at] + some + LIST[at + gone :])
    try:
        found = Symbols.open(path)
    except SymbolError:
        return
    for symbol in found.symbols:
        assert 0 <= symbol.address < 1 << 64
        assert found.locate(symbol.address) is not None
