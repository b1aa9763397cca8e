# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel's own list of its symbols: System.map and /proc/kallsyms."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.errors import SymbolError
from xenaltp2m.events import Registers, registers_at
from xenaltp2m.symbols import Image, Symbols

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


def registers(lstar: int) -> Registers:
    raw = bytearray(HVM_CPU.size)
    offset, width = HVM_CPU.fields["msr_lstar"]
    raw[offset : offset + width] = lstar.to_bytes(width, "little")
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
    with pytest.raises(SymbolError, match="is not of the kernel that runs"):
        kernel.find_slide(registers(entry + off))


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
    monkeypatch.setattr("xenaltp2m.symbols.MAX_SYMBOLS", 3)
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
