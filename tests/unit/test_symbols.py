# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images: what a good one says, and that no bad one does harm."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.errors import InvalidArgumentError, SymbolError
from xenaltp2m.tools.symbols import Image, Location, Symbol, elf

HELLO = Path(__file__).parents[2] / "examples" / "guest" / "hello.elf"
CONTENT = HELLO.read_bytes()

# Offsets in a 32-bit ELF header, and in a program and a section header.
E_MACHINE, E_PHOFF, E_SHOFF, E_PHENTSIZE, E_PHNUM, E_SHENTSIZE, E_SHNUM = 18, 28, 32, 42, 44, 46, 48
P_OFFSET, P_PADDR, P_FILESZ, P_MEMSZ = 4, 12, 16, 20
SH_TYPE, SH_OFFSET, SH_SIZE, SH_LINK, SH_ENTSIZE = 4, 16, 20, 24, 36
PROGRAM_HEADER, SECTION_HEADER, SYMBOL = 32, 40, 16
PROGBITS, SYMTAB, STRTAB, DYNSYM = 1, 2, 3, 11
GLOBAL_OBJECT, LOCAL_OBJECT, LOCAL_LABEL, SECTION_SYMBOL = 0x11, 0x01, 0x00, 0x03


@dataclass
class Sym:
    """A symbol to be written."""

    name: str
    value: int
    size: int = 0
    info: int = GLOBAL_OBJECT
    index: int = 1


def elf64(
    syms: list[Sym],
    *,
    virtual: int = 0xFFFFFFFF81000000,
    physical: int = 0x1000000,
    size: int = 0x4000,
    kind: int = SYMTAB,
) -> bytes:
    """Write a 64-bit image: one segment, one symbol table."""
    names, table = b"\0", bytes(24)
    for sym in syms:
        table += struct.pack("<IBBHQQ", len(names), sym.info, 0, sym.index, sym.value, sym.size)
        names += sym.name.encode() + b"\0"
    code = b"\x90" * 64
    phoff, data = 64, 64 + 56
    at_table = data + len(code)
    at_names = at_table + len(table)
    shoff = at_names + len(names)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, virtual, phoff, shoff, 0, 64, 56, 1, 64, 3, 2,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, data, virtual, physical, len(code), size, 0x1000)
    sections = (
        bytes(64)
        + struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, at_table, len(table), 2, 1, 8, 24)
        + struct.pack("<IIQQQQIIQQ", 0, STRTAB, 0, 0, at_names, len(names), 0, 0, 1, 0)
    )
    return header + segment + code + table + names + sections


def patched(*changes: tuple[int, str, int]) -> bytes:
    """Return the example guest with numbers written over, as (offset, format, number)."""
    content = bytearray(CONTENT)
    for offset, kind, number in changes:
        struct.pack_into(f"<{kind}", content, offset, number)
    return bytes(content)


def number(offset: int, kind: str) -> int:
    [found] = struct.unpack_from(f"<{kind}", CONTENT, offset)
    assert isinstance(found, int)
    return found


def section(kind: int) -> int:
    """Offset of the header of the first section of a type."""
    first = number(E_SHOFF, "I")
    for at in range(first, first + number(E_SHNUM, "H") * SECTION_HEADER, SECTION_HEADER):
        if number(at + SH_TYPE, "I") == kind:
            return at
    raise AssertionError(kind)


@pytest.fixture(scope="module")
def hello() -> Image:
    return Image.open(HELLO)


def test_the_example_guest(hello: Image) -> None:
    assert [symbol.name for symbol in hello.symbols] == [
        "_start", "main", "target", "data", "counter",
    ]  # fmt: skip
    assert hello.address("target") == 0x101000
    assert [hello.gfns(name) for name in ("target", "data", "counter")] == [
        range(0x101, 0x102),
        range(0x102, 0x103),
        range(0x103, 0x104),
    ]
    data = hello.segment(hello.symbol("data"))
    assert data.address == data.virtual == 0x102000
    assert data.data == b"hello from a PVH guest\n\0"
    assert (data.writable, data.executable) == (False, False)
    counter = hello.segment(hello.symbol("counter"))
    assert counter.writable
    assert counter.data == b""
    assert counter.size == 0x1400
    assert repr(hello) == f"<Image {HELLO} of 5 symbols>"


def test_locating_an_address(hello: Image) -> None:
    target = hello.symbol("target")
    assert hello.locate(0x101000) == Location(target, 0)
    assert str(hello.locate(0x101000)) == "target"
    assert str(hello.locate(0x101000 + target.size - 1)) == f"target+{target.size - 1:#x}"
    assert hello.locate(0x101000 + target.size) is None, "behind it, but in no symbol"
    assert hello.locate(0x103400) is None, "in the stack, which has no symbol"
    assert hello.locate(0xFFFFF) is None
    assert hello.locate(0) is None
    assert hello.locate(1 << 64) is None


def test_virtual_addresses_become_physical() -> None:
    base = 0xFFFFFFFF81000000
    image = Image(elf64([Sym("one", base + 0x10, 8), Sym("two", base + 0x1FF8, 16)]))
    assert image.physical(image.symbol("one")) == 0x1000010
    assert image.gfns("one") == range(0x1000, 0x1001)
    assert image.gfns("two") == range(0x1001, 0x1003), "it crosses a page boundary"
    assert str(image.locate(base + 0x17)) == "one+0x7"


def test_a_label_reaches_to_the_next_symbol() -> None:
    image = Image(elf64([Sym("a", 0x1000), Sym("b", 0x1010)], virtual=0x1000, physical=0x1000))
    assert str(image.locate(0x100F)) == "a+0xf"
    assert str(image.locate(0x4FFF)) == "b+0x3fef"
    assert image.gfns("a") == range(1, 2)


def test_of_several_names_at_an_address_the_best_is_told() -> None:
    syms = [Sym("label", 0x1000, 0, LOCAL_LABEL), Sym("real", 0x1000, 8), Sym("a", 0x1000, 8, 1)]
    image = Image(elf64(syms, virtual=0x1000, physical=0x1000))
    assert str(image.locate(0x1004)) == "real+0x4"


def test_a_global_symbol_is_preferred_to_local_ones() -> None:
    syms = [Sym("x", 0x1000, 4, LOCAL_OBJECT), Sym("x", 0x1010, 4), Sym("x", 0x1020, 4, 1)]
    assert Image(elf64(syms)).address("x") == 0x1010


def test_several_local_symbols_are_not_guessed_between() -> None:
    image = Image(elf64([Sym("x", 0x1000, 4, LOCAL_OBJECT), Sym("x", 0x1010, 4, LOCAL_OBJECT)]))
    with pytest.raises(SymbolError, match=r"several symbols 'x': x#1 at 0x1000, x#2 at 0x1010$"):
        image.address("x")


def test_the_same_local_symbol_twice_is_one() -> None:
    image = Image(elf64([Sym("x", 0x1000, 4, LOCAL_OBJECT), Sym("x", 0x1000, 4, LOCAL_OBJECT)]))
    assert image.address("x") == 0x1000


def test_what_has_no_address_is_no_symbol() -> None:
    syms = [Sym("undefined", 0, index=0), Sym("section", 0x1000, info=SECTION_SYMBOL), Sym("", 1)]
    assert Image(elf64(syms)).symbols == ()


def test_dynamic_symbols_serve_where_there_are_no_others() -> None:
    image = Image(elf64([Sym("x", 0x1000)], kind=DYNSYM))
    assert image.symbols == (Symbol("x", 0x1000, 0, is_data=True),)


@pytest.mark.parametrize(("value", "size"), [(0x5000, 0), (0x4FF9, 8), (0xFFF, 1), (0x2000, 2**63)])
def test_a_symbol_outside_memory_has_no_gfns(value: int, size: int) -> None:
    image = Image(elf64([Sym("x", value, size)], virtual=0x1000, physical=0x1000))
    with pytest.raises(SymbolError, match="not in memory that the image loads"):
        image.gfns("x")


def test_an_unknown_symbol(hello: Image) -> None:
    with pytest.raises(SymbolError, match=r"no symbol 'tarjet'; did you mean target"):
        hello.gfns("tarjet")
    with pytest.raises(SymbolError, match=r"no symbol 'zzz'$"):
        hello.symbol("zzz")


def test_an_image_truncated_anywhere() -> None:
    for length in range(len(CONTENT)):
        with pytest.raises(SymbolError):
            Image(CONTENT[:length])


HOSTILE = {
    "no ELF file": b"#!/bin/sh\n" * 100,
    "big-endian": CONTENT[:5] + b"\2" + CONTENT[6:],
    "for another machine": patched((E_MACHINE, "H", 40)),
    "65535 program headers": patched((E_PHNUM, "H", 0xFFFF)),
    "65535 sections": patched((E_SHNUM, "H", 0xFFFF)),
    "program headers far behind the end": patched((E_PHOFF, "I", 0xFFFFFFF0)),
    "sections far behind the end": patched((E_SHOFF, "I", 0xFFFFFFF0)),
    "program headers of no size": patched((E_PHENTSIZE, "H", 0)),
    "sections of no size": patched((E_SHENTSIZE, "H", 0)),
    "a segment larger in the file": patched((number(E_PHOFF, "I") + P_FILESZ, "I", 0x51)),
    "a segment behind the end": patched((number(E_PHOFF, "I") + P_OFFSET, "I", 0xFFFFFFFF)),
    "symbols of no size": patched((section(SYMTAB) + SH_ENTSIZE, "I", 0)),
    "symbols of size 1": patched((section(SYMTAB) + SH_ENTSIZE, "I", 1)),
    "half a symbol": patched((section(SYMTAB) + SH_SIZE, "I", SYMBOL // 2)),
    "4 GiB of symbols": patched((section(SYMTAB) + SH_SIZE, "I", 0xFFFFFFF0)),
    "symbols behind the end": patched((section(SYMTAB) + SH_OFFSET, "I", 0xFFFFFFFF)),
    "a string table that is none": patched((section(SYMTAB) + SH_LINK, "I", 1)),
    "a string table that is itself": patched((section(SYMTAB) + SH_LINK, "I", 8)),
    "a string table not there": patched((section(SYMTAB) + SH_LINK, "I", 0xFFFFFFFF)),
    "names cut off": patched((section(STRTAB) + SH_SIZE, "I", 3)),
    "names behind the end": patched((section(STRTAB) + SH_SIZE, "I", 0xFFFFFFFF)),
    "a name far away": patched((number(section(SYMTAB) + SH_OFFSET, "I") + SYMBOL, "I", 0xFFFFFFF)),
    "a segment beyond memory": elf64([], physical=1 << 48),
    "a segment beyond numbers": elf64([], physical=(1 << 64) - 1, size=(1 << 64) - 1),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_image(content: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(SymbolError, match=r"^bad: "):
        Image(content, "bad")
    assert time.monotonic() - started < 5


def test_segments_that_share_the_file_do_not_multiply_it() -> None:
    first = number(E_PHOFF, "I")
    changes = [
        change
        for at in range(first, first + 4 * PROGRAM_HEADER, PROGRAM_HEADER)
        for change in (
            (at + P_OFFSET, "I", 0),
            (at + P_FILESZ, "I", len(CONTENT)),
            (at + P_MEMSZ, "I", len(CONTENT)),
        )
    ]
    with pytest.raises(SymbolError, match="overlap in the file"):
        Image(patched(*changes))


MADE = Path(__file__).parent / "elf"
"""Of one source, by the tools that make.sh names."""
ADDRESSES = {
    name: int(address, 16)
    for address, *_, name in map(str.split, (MADE / "plain.nm").read_text().splitlines())
}


@pytest.mark.parametrize("file", ["eu-strip.debug", "objcopy.debug"])
def test_fault_16_a_file_with_debugging_information_alone(file: str) -> None:
    image, whole = Image.open(MADE / file), Image.open(MADE / "plain.elf")
    assert {one.name: one.address for one in image.symbols} == ADDRESSES
    assert image.symbols == whole.symbols
    assert [(one.virtual, one.size) for one in image.segments] == [
        (one.virtual, one.size) for one in whole.segments
    ]
    outer = image.symbol("outer")
    assert image.gfns("outer") == whole.gfns("outer")
    assert image.content(outer.address, outer.size) is None
    assert image.build_id == whole.build_id
    assert whole.build_id is not None
    code = whole.content(outer.address, outer.size)
    assert code is not None
    assert code.endswith(b"\xc3")  # ret


def test_fault_16_the_mock_boots_no_image_that_is_cut_off() -> None:
    """Such as what ``eu-strip -f`` writes; libxl refuses it, too (libelf, elf_access_ok)."""
    host = MockBackend((4, 17))
    first = number(E_PHOFF, "I")
    content = patched((first + P_OFFSET, "I", len(CONTENT) - 8))
    with pytest.raises(InvalidArgumentError, match="a segment extends beyond the end of the file"):
        host.boot(host.add_domain("cut", memory_kib=16 << 10), content)


def test_fault_16_a_stripped_file_says_so() -> None:
    with pytest.raises(SymbolError, match="has no symbols: it is stripped") as caught:
        Image.open(MADE / "stripped.elf").symbol("outer")
    assert "eu-strip.debug" in str(caught.value)


@pytest.mark.parametrize(("kind", "what"), [(1, "a relocatable object"), (4, "a core dump")])
def test_fault_16_what_has_no_addresses_is_refused(kind: int, what: str) -> None:
    with pytest.raises(SymbolError, match=what):
        Image(patched((16, "H", kind)))


def test_fault_16_a_relocatable_object_of_gcc(tmp_path: Path) -> None:
    command = ["gcc", "-g", "-c", str(MADE / "source.c"), "-o", str(tmp_path / "source.o")]
    subprocess.run(command, check=True)
    with pytest.raises(SymbolError, match="a relocatable object"):
        Image.open(tmp_path / "source.o")


def test_fault_16_more_sections_than_a_header_can_count(tmp_path: Path) -> None:
    """As binutils write it: the count in section 0, an index in SHT_SYMTAB_SHNDX."""
    sections = "".join(f'.section .s{n}, "ax"\n' for n in range(65300))
    source = f"{sections} .globl far\n .zero 8\nfar: nop\n .set number, 0x1234\n"
    made = tmp_path / "many"
    command = ["gcc", "-x", "assembler", "-c", "-o", str(made), "-"]
    subprocess.run(command, input=source, text=True, check=True)
    content = bytearray(made.read_bytes())
    assert struct.unpack_from("<H", content, 60) == (0,)  # e_shnum
    content[16] = 2  # an executable one, for ld has no such number
    image = Image(bytes(content))
    assert [(one.name, one.address) for one in image.symbols] == [("far", 8)]


def many_segments(count: int, told: int) -> bytes:
    """Write an image whose last program header loads something: gABI, PN_XNUM."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, 0, 128, 64, 0, 64, 56, 0xFFFF, 64, 1, 0,
    )  # fmt: skip
    section = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, told, 0, 0)
    last = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x401000, 0x1000, 16, 32, 0x1000)
    return header + section + bytes(56 * (count - 1)) + last


def test_fault_16_more_segments_than_a_header_can_count() -> None:
    image = Image(many_segments(0x10003, 0x10003))
    assert [(one.virtual, one.size) for one in image.segments] == [(0x401000, 32)]
    assert image.content(0x401000, 4) == b"\x7fELF"
    for told in (0, 0xFFFE, 0x10004, elf.MAX_HEADERS + 1):
        with pytest.raises(SymbolError):
            Image(many_segments(0x10003, told))


@pytest.mark.parametrize("index", [0, 0xFFF1, 0xFFF2])
def test_fault_16_a_number_is_no_place(index: int) -> None:
    """SHN_UNDEF, SHN_ABS and SHN_COMMON."""
    assert Image(elf64([Sym("number", 0x1000, index=index)])).symbols == ()
    assert len(Image(elf64([Sym("place", 0x1000, index=0xFFFF)])).symbols) == 1  # SHN_XINDEX


def test_fault_16_an_address_behind_a_symbol_within_another() -> None:
    base = 0x1000
    syms = [
        Sym("outer", base, 0x40),
        Sym("label", base + 2, 0, LOCAL_LABEL),
        Sym("inner", base + 8, 8),
        Sym("innermost", base + 9, 2),
        Sym("next", base + 0x50, 0),
    ]
    image = Image(elf64(syms, virtual=base, physical=base))
    shown = {
        0: "outer", 2: "label", 4: "outer+0x4", 8: "inner", 9: "innermost", 0xA: "innermost+0x1",
        0xB: "inner+0x3", 0x10: "outer+0x10", 0x3F: "outer+0x3f", 0x40: "None", 0x51: "next+0x1",
    }  # fmt: skip
    assert {at: str(image.locate(base + at)) for at in shown} == shown
    assert image.address("outer+4") == base + 4


def test_fault_16_nested_symbols_do_not_take_long() -> None:
    syms = [Sym(f"s{n}", 0x1000 + n, 0x2000 - n) for n in range(3000)]
    image = Image(elf64(syms, virtual=0x1000, physical=0x1000))
    started = time.monotonic()
    for at in range(3000):
        image.locate(0x1000 + 3000 + at)
    assert time.monotonic() - started < 5


def test_fault_16_local_symbols_of_several_source_files() -> None:
    file = 4  # STT_FILE
    syms = [
        Sym("a.c", 0, info=file, index=0xFFF1), Sym("x", 0x1010, 4, LOCAL_OBJECT),
        Sym("b.c", 0, info=file, index=0xFFF1), Sym("x", 0x1000, 4, LOCAL_OBJECT),
    ]  # fmt: skip
    image = Image(elf64(syms))
    with pytest.raises(SymbolError, match=r"x#1 at 0x1000 \(b\.c\), x#2 at 0x1010 \(a\.c\)$"):
        image.address("x")
    assert image.address("x@a.c") == image.address("x#2") == image.address("x@0x1010") == 0x1010
    assert image.address("x#1+2") == 0x1002
    assert image.slid(0x100).address("x@b.c") == 0x1100
    assert image.symbol("0x1010") == image.symbol("x@a.c")
    for wrong in ("x#3", "x@c.c", "x@0x1001"):
        with pytest.raises(SymbolError, match=r"has no symbol 'x.*, but x#1 at 0x1000"):
            image.address(wrong)


def test_too_many_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenaltp2m.tools.symbols.elf_symbols.MAX_SYMBOLS", 5)
    with pytest.raises(SymbolError, match="6 symbols; the limit is 5"):
        Image(CONTENT)


def test_names_that_share_their_ends_do_not_multiply_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xenaltp2m.tools.symbols.elf_symbols.MAX_NAMES", 20)
    with pytest.raises(SymbolError, match="does not end"):
        Image(CONTENT)


def test_sections_that_share_a_name_do_not_multiply_it() -> None:
    count, name, at = 500, b"\0" + b"n" * 50_000 + b"\0", 64
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, 0, 0, at + len(name), 0, 64, 56, 0, 64, count, count - 1,
    )  # fmt: skip
    one = struct.pack("<IIQQQQIIQQ", 1, STRTAB, 0, 0, at, len(name), 0, 0, 1, 0)
    content = header + name + count * one
    found = elf.ElfFile(io.BytesIO(content), "shared")
    assert len(found.sections) == count
    assert sum(len(section.name) for section in found.sections) < 5 * len(content)
    assert Image(content).symbols == ()


def test_a_file_past_the_limit(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(CONTENT)
    os.truncate(large, elf.MAX_FILE + 1)
    with pytest.raises(SymbolError, match="the limit is"):
        Image.open(large)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "Is a directory"),
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
    ):
        with pytest.raises(SymbolError, match=message) as caught:
            Image.open(path)
        assert str(path) in str(caught.value)
    with pytest.raises(SymbolError, match="not a file name"):
        Image.open("nul\0byte")


def check_sane(content: bytes) -> None:
    """An image is refused, or everything it says is within bounds and of one piece."""
    try:
        image = Image(content, "mutant")
    except SymbolError:
        return
    assert sum(len(segment.data) for segment in image.segments) <= len(content)
    for symbol in image.symbols[:50]:
        image.locate(symbol.address)
        try:
            gfns = image.gfns(symbol.name)
        except SymbolError:
            continue
        assert 0 <= gfns.start < gfns.stop <= 1 << 36


GENTLE = settings(max_examples=400, deadline=1000, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, len(CONTENT)]),
    st.integers(0, 0xFFFFFFFF),
)


@GENTLE
@given(st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 255)), max_size=20))
def test_any_bytes_may_be_wrong(changes: list[tuple[int, int]]) -> None:
    check_sane(patched(*((at, "B", value) for at, value in changes)))


@GENTLE
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 12),
                st.integers(number(E_SHOFF, "I") // 4, len(CONTENT) // 4 - 1),
                st.integers(13, len(CONTENT) // 4 - 1),
            ),
            NUMBERS,
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_numbers_may_be_wrong(changes: list[tuple[int, int]]) -> None:
    check_sane(patched(*((at * 4, "I", value) for at, value in changes)))


@GENTLE
@given(st.binary(max_size=300))
def test_anything_may_follow_the_magic(rest: bytes) -> None:
    check_sane(b"\x7fELF\x01\x01\x01" + rest)
