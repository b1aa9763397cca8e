# SPDX-License-Identifier: LGPL-2.1-or-later
"""What functions take: as gcc describes it, and as the code it makes passes it."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.abi.layouts import HVM_CPU
from xenaltp2m.tools.symbols import Image, meter
from xenaltp2m.tools.symbols.locations import Piece
from xenaltp2m.tools.symbols.prototypes import Parameter, Prototypes, Type
from xenaltp2m.values.registers import registers_at

ET_EXEC = 2
SOURCE = """
typedef unsigned int u32; typedef u32 (*callback)(int); typedef const char *text;
enum color { RED, GREEN }; struct pair { int a, b; }; struct big { long a[5]; };
union either { int a; float b; };
int none(void) { return 1; }
long seven(int a, unsigned char b, const char *c, void *d, enum color e, u32 f, short g, long *h)
{ return a + b + f + g; }
int small(int a, struct pair p, int c) { return a + p.a + c; }
int variadic(const char *format, ...) { return format[0]; }
u32 typed(callback back, text t, char *const *argv, const volatile u32 *p, union either u, int v)
{ return back(1) + t[0] + *p + v; }
static inline __attribute__((always_inline)) int inlined(int x) { return x * 2; }
int caller(int x) { return inlined(x) + 1; }
static __attribute__((noinline)) int hidden(int only) { return only + 1; }
struct big makes(int a) { struct big b = {{a}}; return b; }
int uses(int x) { return hidden(x); }
"""
SHOWN = {
    "none": "int none(void)",
    "seven": (
        "long int seven(int a, unsigned char b, const char * c, void * d, enum color e, u32 f, "
        "short int g, long int * h)"
    ),
    "small": "int small(int a, struct pair p, int c)",
    "variadic": "int variadic(const char * format, ...)",
    "typed": (
        "u32 typed(callback back, text t, char *const * argv, volatile const u32 * p, "
        "union either u, int v)"
    ),
    "caller": "int caller(int x)",
    "hidden": "int hidden(int only)",
    "makes": "struct big makes(int a)",
    "uses": "int uses(int x)",
}

# Every parameter has a number of its own; the callee gives back all words it may be in.
PASSED = {
    "integers": ("int a, long b, char c, short d, void *e, int f, int g, long h", "w" * 8),
    "floats": ("float a, double b, int c, long double d, int e, double f", "ffwdwf"),
    "many_floats": (
        ", ".join(f"double d{n}" for n in range(9)) + ", int i, double last",
        "f" * 8 + "sws",
    ),
    "wide": ("int a, __int128 b, int c", "wWw"),
    "wide_last": (
        "int a, int b, int c, int d, int e, __int128 w, int f, int g, __int128 h, int i",
        "wwwwwWwwWw",
    ),
    "structure": ("int a, struct big b, int c, long d, long e, long f, long g, long h", "wBwwwwww"),
    "small_one": ("int a, struct pair b, int c", "w??"),
}
"""Source of the parameters; of each: w a word, W two, B a structure of five, f in a register for
floating point, d a long double, s a double on the stack, ? not known."""


def compiled(path: Path, source: str, *options: str, language: str = "c") -> Path:
    made = path / "image"
    subprocess.run(
        ["gcc", "-x", language, "-", "-o", str(made), *options],
        input=source, text=True, check=True,
    )  # fmt: skip
    return made


@pytest.fixture(
    params=[
        "-gdwarf-4 -O0",
        "-gdwarf-5 -O2",
        "-gdwarf-5 -O2 -gz",
        "-gdwarf-4 -O2 -gz=zlib-gnu",
        "-gdwarf-4 -O2 -ffunction-sections",
    ]
)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    options = [*request.param.split(), "-nostdlib", "-static", "-Wl,-e,none"]
    return compiled(tmp_path, SOURCE, *options)


def test_as_the_source_has_them(image: Path) -> None:
    symbols = Image.open(image)
    with Prototypes.open(image) as prototypes:
        found = {name: str(prototypes.at(symbols.address(name))) for name in SHOWN}
        assert found == SHOWN
        kinds = {
            name: [one.type.kind for one in prototype.parameters]
            for name in ("seven", "typed")
            if (prototype := prototypes.at(symbols.address(name))) is not None
        }
        assert kinds["seven"] == [
            "signed", "unsigned", "string", "pointer", "unsigned", "unsigned", "signed", "pointer"
        ]  # fmt: skip
        assert kinds["typed"] == [
            "pointer", "string", "pointer", "pointer", "structure", "signed"
        ]  # fmt: skip
        assert prototypes.at(symbols.address("seven+1")) is None
        assert prototypes.at(0) is None


def test_symbols_where_there_is_no_table_of_them(image: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "stripped"
    command = ["objcopy", "--strip-all", "--keep-section=.*debug_*", str(image), str(stripped)]
    subprocess.run(command, check=True)
    whole, found = Image.open(image), Image.open(stripped)
    assert {one.name for one in found.symbols} == SHOWN.keys()
    for name in SHOWN:
        assert found.symbol(name) == whole.symbol(name)


def test_functions_and_their_sizes(image: Path) -> None:
    symbols = Image.open(image)
    with Prototypes.open(image) as prototypes:
        found = {one.name: (one.address, one.size) for one in prototypes.functions()}
    assert found == {
        name: (symbols.symbol(name).address, symbols.symbol(name).size) for name in SHOWN
    }


@pytest.mark.parametrize("name", PASSED)
def test_where_the_compiler_puts_them(tmp_path: Path, name: str) -> None:
    """The callee is in assembly: it prints the words that a breakpoint could see."""
    parameters, classes = PASSED[name]
    values = []
    for number, letter in enumerate(classes, 1):
        wide = f"(__int128){number + 1000} << 64 | {number}"
        big = f"(struct big){{{{{number}, 1, 2, 3, 4}}}}"
        values.append({"W": wide, "B": big, "?": f"{number}"}.get(letter, str(number)))
    if name == "small_one":
        values[1] = "(struct pair){7, 8}"
    source = f"""
struct pair {{ int a, b; }}; struct big {{ long a[5]; }};
unsigned long words[24];
__attribute__((noinline)) void described({parameters}) {{ __asm__ volatile(""); }}
void {name}({parameters});
__asm__(".globl {name}; {name}: mov %rdi, words; mov %rsi, words+8; mov %rdx, words+16;"
        "mov %rcx, words+24; mov %r8, words+32; mov %r9, words+40; xor %ecx, %ecx;"
        "1: mov 8(%rsp, %rcx, 8), %rax; mov %rax, words+48(, %rcx, 8);"
        "inc %ecx; cmp $16, %ecx; jne 1b; ret");
int printf(const char *, ...);
int main(void)
{{
    {name}({", ".join(values)});
    for (int i = 0; i < 22; i++) printf("%ld ", words[i]);
}}
"""
    made = compiled(tmp_path, source, "-g", "-O0", "-no-pie")
    words = list(map(int, subprocess.check_output([made]).split()))
    with Prototypes.open(made) as prototypes:
        prototype = prototypes.at(Image.open(made).address("described"))
    assert prototype is not None
    assert len(prototype.parameters) == len(classes)
    for number, (letter, parameter) in enumerate(
        zip(classes, prototype.parameters, strict=True), 1
    ):
        if letter in "f?":
            assert parameter.word is None, parameter
        elif letter in "wWB":
            assert parameter.word is not None
            assert words[parameter.word] & 0xFF == number, parameter
            if letter == "W":
                assert words[parameter.word + 1] == 1000 + number
        else:
            assert parameter.word is not None
            assert parameter.word >= 6
    assert prototype.words == 1 + max(one.word or 0 for one in prototype.parameters)


COLD = """
__attribute__((cold, noinline)) void oops(const char *text) { __asm__ volatile("" :: "r"(text)); }
__attribute__((noinline)) long parted(int fd, const char *path, unsigned long count)
{ if (fd < 0) { oops(path); __builtin_trap(); } return count + fd; }
int main(int count, char **words) { return parted(count, words[0], 3); }
"""


@pytest.mark.parametrize("version", [4, 5])
def test_a_function_whose_code_is_in_parts(tmp_path: Path, version: int) -> None:
    """What is seldom executed is elsewhere: DW_AT_ranges in place of DW_AT_low_pc."""
    made = compiled(tmp_path, COLD, f"-gdwarf-{version}", "-O2")
    image = Image.open(made)
    place = image.symbol("parted")
    assert image.symbol("parted.cold").address not in range(place.address, place.address + 64)
    with Prototypes.open(made) as prototypes:
        assert str(prototypes.at(place.address)) == (
            "long int parted(int fd, const char * path, long unsigned int count)"
        )
        found = {one.name: (one.address, one.size) for one in prototypes.functions()}
    assert found["parted"] == (place.address, place.size)


UNIT = "1: .long 3f-2f; 2: .short 4; .long {table}; .byte 8; .uleb128 1; {entries} 3:"
TABLE = ".uleb128 1,0x11; .byte 1,0,0; .uleb128 2,{tag}; .byte {children}; {attributes} .byte 0,0,0"
STRUCTURE, SUBPROGRAM = 0x13, 0x2E
NAME, EXTERNAL, SIBLING = 0x03, 0x3F, 0x01
STRP, PRESENT, REF4 = 0x0E, 0x19, 0x13
HOSTILE = {
    "a name that many have": (
        TABLE.format(tag=SUBPROGRAM, children=0, attributes=f".byte {NAME},{STRP};"),
        UNIT.format(table=0, entries=".rept 5000; .uleb128 2; .long 0; .endr; .byte 0;"),
        ".fill 100000,1,65; .byte 0",
    ),
    "attributes that take no room": (
        TABLE.format(
            tag=SUBPROGRAM,
            children=0,
            attributes=f".rept 5000; .byte {EXTERNAL},{PRESENT}; .endr;",
        ),
        UNIT.format(table=0, entries=".rept 5000; .uleb128 2; .endr; .byte 0;"),
        "",
    ),
    "tables that share their ends": (
        ".rept 5000; .byte 1,0x11,0,0,0; .endr; .byte 0",
        "\n".join(UNIT.format(table=5 * number, entries="") for number in range(2000)),
        "",
    ),
    "an entry that is its own sibling": (
        TABLE.format(
            tag=STRUCTURE,
            children=1,
            attributes=f".byte 0,0; .uleb128 3,{STRUCTURE}; .byte 1,{SIBLING},{REF4};",
        ),
        UNIT.format(
            table=0, entries=".uleb128 2; 4: .uleb128 3; .long 4b-1b; .byte 0,0,0,0;"
        ),
        "",
    ),
    "a sibling that comes before": (
        TABLE.format(tag=STRUCTURE, children=1, attributes=f".byte {SIBLING},{REF4};"),
        UNIT.format(table=0, entries="4: .uleb128 2; .long 4b-1b; .byte 0,0;"),
        "",
    ),
    "entries in entries": (
        TABLE.format(tag=STRUCTURE, children=1, attributes=""),
        UNIT.format(table=0, entries=".fill 100000,1,2; .fill 100000;"),
        "",
    ),
}  # fmt: skip
"""Abbreviations, entries and strings, in assembly."""


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tables(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What little there is leads a reader far; without a limit, to days and gigabytes."""
    abbreviations, entries, strings = HOSTILE[kind]
    source = "".join(
        f'.section {name}, "", @progbits\n{content}\n'
        for name, content in (
            (".debug_abbrev", abbreviations),
            (".debug_info", entries),
            (".debug_str", strings),
        )
    )
    made = compiled(tmp_path, source, "-nostdlib", "-static", "-Wl,-e,0", language="assembler")
    monkeypatch.setattr(meter, "MAX_STEPS", 1 << 18)
    with (
        Prototypes.open(made) as prototypes,
        pytest.raises(xa.SymbolError, match=r"too much to read|in circles"),
    ):
        list(prototypes.functions())


def test_a_packed_section_that_is_larger_than_it_should(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(8 << 20))
    content = ",".join(map(str, b"ZLIB" + bytes(8) + packed))
    source = f'.section .zdebug_info, "", @progbits\n.byte {content}\n'
    made = bytearray(compiled(tmp_path, source, "-c", language="assembler").read_bytes())
    made[16] = ET_EXEC
    with pytest.raises(xa.SymbolError, match="damaged: 1 of 0 bytes"):
        Prototypes(io.BytesIO(made), "packed")


MADE = Path(__file__).parent / "elf"
"""Of one source, by the tools that make.sh names."""
AS_IN_SOURCE = {
    "inner": "int inner(int x)",
    "local": "int local(thing * it, long int by)",
    "outer": "int outer(int a, const char * s)",
}


@pytest.mark.parametrize(
    "file",
    [
        "plain.elf", "eu-strip.debug", "objcopy.debug", "zdebug.elf", "zstd.elf", "dwz.elf",
        "dwz-other.elf", "gcc-split-4.elf", "gcc-split-5.elf", "clang-split-4.elf",
        "clang-split-5.elf", "types-4.elf", "types-5.elf",
    ],
)  # fmt: skip
def test_fault_16_debugging_information_wherever_tools_put_it(file: str) -> None:
    symbols = Image.open(MADE / file)
    with Prototypes.open(MADE / file) as prototypes:
        found = {name: str(prototypes.at(symbols.symbol(name).address)) for name in AS_IN_SOURCE}
        named = {one.name: one.size for one in prototypes.functions()}
    if file.startswith("clang"):
        found = {name: text.replace("long ", "long int ") for name, text in found.items()}
    assert found == AS_IN_SOURCE
    assert named == {name: symbols.symbol(name).size for name in AS_IN_SOURCE}


@pytest.mark.parametrize(("version", "known"), [(4, False), (5, True)])
def test_fault_16_lists_of_locations_in_split_files(version: int, known: bool) -> None:
    """``outer`` keeps its parameters elsewhere later; DWARF 4's lists are not read."""
    image = MADE / f"gcc-split-{version}.elf"
    with Prototypes.open(image) as prototypes:
        outer = prototypes.at(Image.open(image).symbol("outer").address)
    assert outer is not None
    assert [one.word for one in outer.parameters] == ([0, 1] if known else [None, None])


@pytest.mark.parametrize(
    ("image", "other"),
    [("gcc-split-4", ".dwo"), ("gcc-split-5", ".dwo"), ("clang-split-5", ".dwo"), ("dwz", ".sup")],
)
def test_fault_16_a_file_that_is_missing_is_named(image: str, other: str, tmp_path: Path) -> None:
    path = tmp_path / f"{image}.elf"
    path.write_bytes((MADE / path.name).read_bytes())
    address = Image.open(path).symbol("outer").address
    named = rf"{image}{other}, which is missing"
    with pytest.raises(xa.SymbolError, match=named), Prototypes.open(path) as prototypes:
        prototypes.at(address)
    beside = tmp_path / f"{image}{other}"
    beside.write_bytes((MADE / "plain.elf").read_bytes())
    with (
        pytest.raises(xa.SymbolError, match="belongs to another build"),
        Prototypes.open(path) as prototypes,
    ):
        prototypes.at(address)
    stream = io.BytesIO(path.read_bytes())  # from a stream, no other file is opened
    with pytest.raises(xa.SymbolError, match="which is missing"):
        Prototypes(stream, "stream").at(address)


def test_fault_16_what_is_not_supported_is_not_called_damaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = bytearray((MADE / "zstd.elf").read_bytes())
    for package in ("compression", "backports"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(xa.SymbolError, match="compressed by zstd") as caught:
        Prototypes(io.BytesIO(content), "zstd")
    assert "objcopy --decompress-debug-sections" in str(caught.value)
    header = struct.pack("<II", 2, 0)  # ch_type of ELFCOMPRESS_ZSTD, and what is reserved
    content[content.index(header)] = 3
    with pytest.raises(xa.SymbolError, match="compressed by an unknown method, 3"):
        Prototypes(io.BytesIO(content), "unknown")


def test_fault_16_a_newer_dwarf_is_not_called_damaged(tmp_path: Path) -> None:
    made = compiled(tmp_path, SOURCE, "-gdwarf-5", "-O0", "-nostdlib", "-static", "-Wl,-e,none")
    content = bytearray(made.read_bytes())
    listed = subprocess.check_output(["readelf", "-SW", str(made)], text=True)
    [at] = re.findall(r"\.debug_info +PROGBITS +\w+ (\w+)", listed)
    content[int(at, 16) + 4] = 6  # the version, behind the length
    with pytest.raises(xa.SymbolError, match=r"pyelftools cannot read: .*DWARF version.*6"):
        list(Prototypes(io.BytesIO(content), "new").functions())


def test_images_without_it(tmp_path: Path) -> None:
    made = compiled(tmp_path, SOURCE, "-nostdlib", "-static", "-Wl,-e,none")
    with pytest.raises(xa.SymbolError, match="no debugging information"), Prototypes.open(made):
        pass
    with pytest.raises(xa.SymbolError, match="damaged"):
        Prototypes(io.BytesIO(b"\x7fELF" + bytes(100)), "bad")
    missing = tmp_path / "nothing"
    with pytest.raises(xa.SymbolError, match="No such file"), Prototypes.open(missing):
        pass


CLONES = """
#define APART __attribute__((noinline))
struct big { int x, y; long z[8]; };
APART static int constant(int a, int seven, const char *text)
{ __asm__ volatile("" :: "r"(text)); return a * seven; }
APART static int reduced(struct big *b, int k, int gone) { return b->y + k; }
APART long long wide(int a, long long b, char c) { __asm__ volatile(""); return a + b + c; }
APART int variadic(const char *f, ...) { __asm__ volatile(""); return f[0]; }
struct pair { int a, b; };
APART int small(struct pair p, int c) { __asm__ volatile(""); return p.a + p.b + c; }
APART double floating(float f, double d, int i) { __asm__ volatile(""); return f + d + i; }
void see(int *);
APART int kept(int x, int y) { see(&x); return x + y; }
APART static int local(int a, int b) { __asm__ volatile(""); return a - b; }
int one(int a) { return constant(a, 7, "x") + constant(a + 1, 7, "y") + local(a, 3); }
int two(struct big *b, int k) { return reduced(b, k, 9) + reduced(b, k + 1, 9) + local(k, k + 1); }
void see(int *x) { __asm__ volatile("" :: "r"(x)); }
"""


def regs(*pieces: tuple[int, str]) -> tuple[Piece, ...]:
    return tuple(Piece(size, register) for size, register in pieces)


def stack(*pieces: tuple[int, int]) -> tuple[Piece, ...]:
    return tuple(Piece(size, word=word) for size, word in pieces)


PLACED: dict[str, dict[str, dict[str, object]]] = {
    "-m32 -mregparm=3": {  # gcc's function_arg_32, and no local convention besides
        "constant": {"a": regs((4, "rax")), "seven": 7, "text": regs((4, "rdx"))},
        "reduced": {"b": None, "k": regs((4, "rdx")), "gone": 9},  # b->y is in eax instead
        "wide": {"a": regs((4, "rax")), "b": regs((4, "rdx"), (4, "rcx")), "c": stack((1, 0))},
        "variadic": {"f": stack((4, 0))},
        "small": {"p": regs((4, "rax"), (4, "rdx")), "c": regs((4, "rcx"))},
        "floating": {"f": stack((4, 0)), "d": stack((4, 1), (4, 2)), "i": regs((4, "rax"))},
        "kept": {"x": regs((4, "rax")), "y": regs((4, "rdx"))},
    },
    "-m32": {  # the System V ABI, but for functions that are called only here
        "constant": {"a": regs((4, "rax")), "seven": 7, "text": regs((4, "rdx"))},
        "wide": {"a": stack((4, 0)), "b": stack((4, 1), (4, 2)), "c": stack((1, 3))},
        "variadic": {"f": stack((4, 0))},
        "floating": {"f": stack((4, 0)), "d": stack((4, 1), (4, 2)), "i": stack((4, 3))},
        "kept": {"x": stack((4, 0)), "y": stack((4, 1))},
        "local": {"a": regs((4, "rax")), "b": regs((4, "rdx"))},
    },
    "-m64": {
        "constant": {"a": regs((4, "rdi")), "seven": 7, "text": regs((8, "rsi"))},
        "wide": {"a": regs((4, "rdi")), "b": regs((8, "rsi")), "c": regs((1, "rdx"))},
        "small": {"p": None, "c": regs((4, "rsi"))},  # no single value, of two numbers
        "floating": {"f": None, "d": None, "i": regs((4, "rdi"))},
        "kept": {"x": regs((4, "rdi")), "y": regs((4, "rsi"))},
    },
}


@pytest.mark.parametrize("flags", PLACED)
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("lto", ["", "-flto -ffat-lto-objects"])
def test_fault_13_where_gcc_puts_them(tmp_path: Path, flags: str, version: int, lto: str) -> None:
    options = f"-O2 -fno-pie -no-pie -nostdlib -static -Wl,-e,one,-u,two,-u,wide {flags} {lto}"
    used = "void *volatile used[] = {one, two, wide, variadic, small, floating, kept, see};"
    made = compiled(tmp_path, CLONES + used, f"-gdwarf-{version}", *options.split())
    image = Image.open(made)
    with Prototypes.open(made) as prototypes:
        for name, wanted in PLACED[flags].items():
            [symbol] = [one for one in image.symbols if one.name.partition(".")[0] == name]
            prototype = prototypes.at(symbol.address)
            assert prototype is not None
            found: dict[str, object] = {}
            for one in prototype.parameters:
                found[one.name] = one.place
                if one.place is not None and one.place[0][1:3] == (None, None):
                    found[one.name] = one.place[0].constant
            assert found == wanted, name
            assert prototype.name == name


@pytest.mark.parametrize("flags", ["-m32", "-m64", "-m32 -mregparm=3"])
def test_fault_13_parameters_that_are_written_to_the_stack(tmp_path: Path, flags: str) -> None:
    """-O0: the location is a variable that the function has not written yet."""
    source = "int f(int a, char b, long long c) { return a + b + c; } int g(char c) { return c; }"
    made = compiled(tmp_path, source, "-g", "-nostdlib", "-static", "-Wl,-e,f", *flags.split())
    image = Image.open(made)
    with Prototypes.open(made) as prototypes:
        found = [prototypes.at(image.address(name)) for name in "fg"]
    a, b, c, only = (one.place for of in found if of is not None for one in of.parameters)
    assert [a, b, c, only] == {
        "-m32": [stack((4, 0)), stack((1, 1)), stack((4, 2), (4, 3)), stack((1, 0))],
        "-m64": [regs((4, "rdi")), regs((1, "rsi")), regs((8, "rdx")), regs((1, "rdi"))],
        "-m32 -mregparm=3": [
            regs((4, "rax")), regs((1, "rdx")), stack((4, 0), (4, 1)), regs((1, "rax")),
        ],
    }[flags]  # fmt: skip


def test_fault_13_registers_by_an_attribute(tmp_path: Path) -> None:
    """At -O0 nothing says which, and the stack it is not."""
    source = "__attribute__((regparm(2))) int f(int a, int b, int c) { return a + b + c; }"
    made = compiled(tmp_path, source, "-g", "-m32", "-nostdlib", "-static", "-Wl,-e,f")
    with Prototypes.open(made) as prototypes:
        prototype = prototypes.at(Image.open(made).address("f"))
    assert prototype is not None
    assert [one.place for one in prototype.parameters] == [None, None, stack((4, 0))]


def test_fault_13_functions_in_assembly(tmp_path: Path) -> None:
    source = ".globl f; .type f, @function; f: ret; .size f, . - f; .globl g; g: nop; ret"
    options = ["-g", "-nostdlib", "-static", "-Wl,-e,f"]
    made = compiled(tmp_path, source, *options, language="assembler")
    with Prototypes.open(made) as prototypes:
        assert [one.name for one in prototypes.functions()] == ["f"]  # so that it is described
        assert prototypes.at(Image.open(made).address("f")) is None


def test_fault_13_values_are_read() -> None:
    registers = registers_at(HVM_CPU.fields)(bytes(range(256)) * (HVM_CPU.size // 256 + 1))
    rax, rdx = (registers.rax, registers.rdx)
    parameter = Parameter("p", Type("long long", 8, "signed"), None, regs((4, "rax"), (4, "rdx")))
    assert parameter.read(registers, ()) == (rdx & 0xFFFF_FFFF) << 32 | rax & 0xFFFF_FFFF
    parameter = Parameter("p", Type("long long", 8, "signed"), 1, stack((4, 1), (4, 2)))
    assert parameter.read(registers, (1, 2, 3)) == 3 << 32 | 2
    assert parameter.read(registers, (1, 2)) is None
    assert (
        Parameter("p", Type("int", 4, "signed"), None, (Piece(4, constant=7),)).read(registers, ())
        == 7
    )
    assert Parameter("p", Type("int", 4, "signed"), None).read(registers, (1,)) is None
    assert Parameter("p", Type("", 8, "signed"), 0).read(registers, (5,)) == 5
