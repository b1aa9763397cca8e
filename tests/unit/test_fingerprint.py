# SPDX-License-Identifier: LGPL-2.1-or-later
"""Symbols that are not of what a guest runs are refused before it is changed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m import cli
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.errors import NotMappedError, SymbolError
from xenaltp2m.tools.symbols import Image, Symbol, Symbols, fingerprint

MADE = Path(__file__).parent / "elf"
GUESTS = Path(__file__).parents[2] / "examples" / "guest"
RACER = GUESTS / "racer.elf"


class Guest:
    """Memory at linear addresses."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}

    def put(self, address: int, data: bytes) -> None:
        self.memory.update(enumerate(data, address))

    def load(self, image: Image, by: int = 0) -> None:
        for segment in image.segments:
            self.put(segment.virtual + by, segment.data.ljust(segment.size, b"\0"))

    def read(self, address: int, size: int) -> bytes:
        try:
            return bytes(self.memory[at] for at in range(address, address + size))
        except KeyError:
            raise NotMappedError(f"nothing at {address:#x}") from None


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_fault_05_the_image_of_the_guest_fits(guest: Guest) -> None:
    plain = Image.open(MADE / "plain.elf")
    guest.load(plain)
    fingerprint.compare(plain, guest.read, ["inner", "local", "outer+4"])
    moved = Guest()
    moved.load(plain, 0x200000)
    fingerprint.compare(plain.slid(0x200000), moved.read, ["inner", "outer"])


def test_fault_05_a_label_at_the_end_of_what_is_loaded(guest: Guest, tmp_path: Path) -> None:
    """Without a size, it is compared as far as there is code."""
    made = tmp_path / "image"
    source = ".globl last; .nops 8; last: .byte 0xc3\n"
    command = ["gcc", "-x", "assembler", "-", "-o", str(made), "-nostdlib", "-static"]
    subprocess.run([*command, "-Wl,-e,last"], input=source, text=True, check=True)
    image = Image.open(made)
    guest.load(image)
    fingerprint.compare(image, guest.read, ["last"])
    with pytest.raises(SymbolError, match="does not match the guest"):
        fingerprint.compare(image, changed(guest, image.address("last")).read, ["last"])


def test_fault_05_the_image_of_another_build_is_refused(guest: Guest) -> None:
    plain, other = Image.open(MADE / "plain.elf"), Image.open(MADE / "other.elf")
    guest.load(plain)
    wrong = plain.symbol("inner").address
    with pytest.raises(SymbolError, match=rf"does not match the guest: at inner, {wrong:#x}, it"):
        fingerprint.compare(other, guest.read, ["outer", "inner"])
    for slide in (0x10, -0x10):  # behind the last function nothing is mapped
        with pytest.raises(SymbolError, match=r"match.* the guest"):
            fingerprint.compare(plain.slid(slide), guest.read, ["outer"])


def test_fault_05_where_nothing_is_mapped_nothing_is_known(guest: Guest) -> None:
    plain = Image.open(MADE / "plain.elf")
    with pytest.raises(SymbolError, match="cannot check that") as caught:
        fingerprint.compare(plain, guest.read, ["outer"])
    assert "--trust-symbols" in str(caught.value)
    assert plain.build_id is not None
    guest.put(plain.build_id.address, plain.build_id.value)
    fingerprint.compare(plain, guest.read, ["outer"])  # a page that is not there yet


@pytest.mark.parametrize("file", ["eu-strip.debug", "objcopy.debug"])
def test_fault_05_a_file_without_code_is_known_by_its_build_id(guest: Guest, file: str) -> None:
    symbols = Image.open(MADE / file)
    guest.load(Image.open(MADE / "plain.elf"))
    fingerprint.compare(symbols, guest.read, ["outer"])
    other = Guest()
    other.load(Image.open(MADE / "other.elf"))
    with pytest.raises(SymbolError, match="its build id is"):
        fingerprint.compare(symbols, other.read, ["outer"])


BASE = 0xFFFFFFFF81000000
SLIDE = 0x1E00000
SYSTEM_CALLS = {"read": 0, "write": 1, "openat": 257, "getrandom": 318}
"""As Linux numbers them on x86-64."""


def kernel(*names: str) -> Symbols:
    known = {
        "ksys_write": BASE + 0x100, "linux_banner": BASE + 0x100000,
        "sys_call_table": BASE + 0x101000,
    }  # fmt: skip
    known |= {f"__x64_sys_{name}": BASE + 64 * number for name, number in SYSTEM_CALLS.items()}
    found = [(known[name], 3, Symbol(name, known[name], 0)) for name in names or known]
    module = BASE + 0x40000000
    found += [(module, 1, Symbol("ext4_open", module, 0))]
    return Symbols([*found[:-1], (*found[-1], "ext4")], "kallsyms").slid(SLIDE)


def running(guest: Guest) -> None:
    guest.put(BASE + SLIDE + 0x100000, b"Linux version 6.1.0-9-amd64 (debian-kernel@")
    for number in SYSTEM_CALLS.values():
        entry = BASE + SLIDE + 64 * number
        guest.put(BASE + SLIDE + 0x101000 + 8 * number, entry.to_bytes(8, "little"))


def test_fault_05_a_list_is_known_by_the_banner_and_the_system_calls(guest: Guest) -> None:
    running(guest)
    for names in ((), ("ksys_write", "linux_banner")):
        fingerprint.compare(kernel(*names), guest.read, ["ksys_write"])
    with pytest.raises(SymbolError, match=r"match the running kernel: linux_banner is not at"):
        fingerprint.compare(kernel().slid(SLIDE + 0x200000), guest.read, ["ksys_write"])


def test_fault_05_a_list_of_a_kernel_of_nearly_the_same_layout(guest: Guest) -> None:
    """Its entries and data are at the same places, for they begin at multiples of 2 MiB."""
    running(guest)
    guest.put(BASE + SLIDE + 0x101000 + 8 * SYSTEM_CALLS["openat"], b"\x10")
    with pytest.raises(SymbolError, match="__x64_sys_openat in sys_call_table is not at"):
        fingerprint.compare(kernel(), guest.read, ["ksys_write"])


def test_fault_05_a_list_that_tells_nothing(guest: Guest) -> None:
    running(guest)
    with pytest.raises(SymbolError, match="cannot check that kallsyms matches"):
        fingerprint.compare(kernel("ksys_write"), guest.read, ["ksys_write"])
    same = kernel().slid(0)
    rest = Guest()
    rest.memory = {at - SLIDE: byte for at, byte in guest.memory.items()}
    for number in SYSTEM_CALLS.values():
        rest.put(BASE + 0x101000 + 8 * number, (BASE + 64 * number).to_bytes(8, "little"))
    fingerprint.compare(same, rest.read, ["ksys_write"])
    with pytest.raises(SymbolError, match="ext4_open is in a module"):
        fingerprint.compare(same, rest.read, ["ksys_write", "ext4_open"])


LINUX = """
.section .note.GNU-stack, "", @progbits
.text
.globl patched, plain
.type patched, @function
patched: call tracer
1: .nops 6
2: jmp 3f
   .nops 3
3: call thunk
4: .byte 0xe9; .long thunk - . - 4
5: lock incl (%rax)
6: mov $data, %rdi
   movabs $data, %rsi
   ret
.size patched, . - patched
.type plain, @function
plain: mov $1, %eax; xor %edx, %edx; ret
.size plain, . - plain
tracer: ret
thunk: ret
.data
data: .quad 0
.macro table name:vararg
.section \\name, "a", @progbits
.endm
table .init.data
.byte 0
__start_mcount_loc: .quad patched
__stop_mcount_loc: .byte 0
table .altinstructions
ALTERNATIVE
table __jump_table
JUMP
table .return_sites
.long 4b - .
table .retpoline_sites
.long 3b - .
table .smp_locks
.long 5b - .
"""
ALTERNATIVES = {
    "before 5.13": ".long 1b - .; .long plain - .; .short 3; .byte 6, 2, 4;",
    "5.13": ".long 1b - .; .long plain - .; .short 3; .byte 6, 2;",
    "6.3": ".long 1b - .; .long plain - .; .long 3; .byte 6, 2;",
}
JUMPS = {
    "before 4.20": ".quad 2b, 3b, data;",
    "4.20": ".long 2b - ., 3b - .; .quad data - .;",
}


@pytest.fixture(params=[*zip(ALTERNATIVES, ("before 4.20", "4.20", "4.20"), strict=True)], ids=str)
def linux(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    """Tables as Linux has had them (struct alt_instr, struct jump_entry)."""
    alternatives, jumps = request.param
    source = LINUX.replace("ALTERNATIVE", 2 * ALTERNATIVES[alternatives])
    source = source.replace("JUMP", 2 * JUMPS[jumps])
    command = ["gcc", "-x", "assembler", "-", "-o", str(tmp_path / "vmlinux"), "-nostdlib"]
    command += ["-static", "-Wl,-Ttext=0x1000000,-e,patched"]
    subprocess.run(command, input=source, text=True, check=True)
    return Image.open(tmp_path / "vmlinux")


PATCHES = {
    "ftrace": (0, b"\x0f\x1f\x44\0\0"),
    "alternative": (5, b"\xf3\x90" * 3),
    "static key": (11, b"\x66\x90"),
    "retpoline": (16, b"\xff\xd0\x0f\x1f\0"),
    "return": (21, b"\xc3\xcc\xcc\xcc\xcc"),
    "lock": (26, b"\x3e"),
}
"""What Linux puts where, by offset in ``patched``."""


def test_fault_05_what_linux_changes_as_it_boots_is_no_difference(
    guest: Guest, linux: Image
) -> None:
    guest.load(linux)
    at = linux.symbol("patched").address
    for offset, patch in PATCHES.values():
        guest.put(at + offset, patch)
    fingerprint.compare(linux, guest.read, ["patched", "plain"])
    size = linux.symbol("patched").size
    sites = {offset + n for offset, patch in PATCHES.values() for n in range(len(patch))}
    other = {n for n in range(size) if n not in sites and n not in (13, 14, 15)}
    for offset in other:
        guest.memory[at + offset] ^= 0x55
        with pytest.raises(SymbolError, match=rf"at patched, {at + offset:#x}, it has"):
            fingerprint.compare(linux, guest.read, ["patched"])
        guest.memory[at + offset] ^= 0x55


def changed(guest: Guest, address: int) -> Guest:
    other = Guest()
    other.memory = guest.memory | {address: guest.memory[address] ^ 1}
    return other


def test_fault_05_addresses_that_moved_with_the_kernel_are_no_difference(
    guest: Guest, linux: Image
) -> None:
    guest.load(linux, SLIDE)
    at, data = linux.symbol("patched").address + SLIDE, linux.symbol("data").address
    with pytest.raises(SymbolError, match="does not match the guest"):
        fingerprint.compare(linux.slid(SLIDE), changed(guest, at + 30).read, ["patched"])
    code = guest.read(at, linux.symbol("patched").size)
    short, long = (value.to_bytes(8, "little") for value in (data, data + SLIDE))
    moved = code.replace(short, long).replace(short[:4], long[:4])
    assert sum(a != b for a, b in zip(code, moved, strict=True)) >= 2
    guest.put(at, moved)
    fingerprint.compare(linux.slid(SLIDE), guest.read, ["patched"])
    for slide in (SLIDE - 0x200000, SLIDE + 0x200000):
        shifted = Guest()
        shifted.memory = {address - SLIDE + slide: byte for address, byte in guest.memory.items()}
        with pytest.raises(SymbolError, match="does not match the guest"):
            fingerprint.compare(linux.slid(slide), shifted.read, ["patched"])


@pytest.fixture
def host() -> MockBackend:
    return MockBackend((4, 17))


def racing(host: MockBackend) -> int:
    domid = host.add_domain("racer", memory_kib=16 << 10)
    host.boot(domid, RACER)
    return domid


CHANGES: list[Callable[[bytearray, int], None]] = [
    lambda content, at: content.__setitem__(at, content[at] ^ 1),
    lambda content, at: content.__setitem__(slice(at, at + 8), bytes(8)),
]


@pytest.mark.parametrize("change", CHANGES)
def test_fault_05_a_trace_begins_with_symbols_that_fit_only(
    host: MockBackend, change: Callable[[bytearray, int], None]
) -> None:
    domid = racing(host)
    right = Image.open(RACER)
    content = bytearray(RACER.read_bytes())
    segment = right.segment(right.symbol("hit"))
    offset = right.symbol("hit").address - segment.virtual
    change(content, content.index(segment.data) + offset)
    wrong = Image(bytes(content), "wrong")
    with xa.connect(host) as xen, xen.domain(domid) as dom:
        memory = dom.memory.read(segment.address, segment.size)
        with pytest.raises(xa.SymbolError, match="wrong does not match the guest: at hit"):
            xa.Trace(dom, "hit", symbols=wrong)
        assert not dom.altp2m_active
        assert dom.memory.read(segment.address, segment.size) == memory
        xa.Trace(dom, "hit", symbols=wrong, trust=True).close()
        xa.Trace(dom, "hit", symbols=right).close()
    assert host.open_resources() == []


def test_fault_05_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "System.map"
    address = Image.open(RACER).address("hit")
    listed.write_text(f"{address:016x} T hit\n")
    trace = ["--connect", "mock", "trace", "guest", "hit", "--count", "1", "--symbols"]
    for more in ([], ["--trust-symbols"]):
        assert cli.main([*trace, str(listed), *more]) != cli.DONE
    assert "cannot find the address of the guest's kernel" in capsys.readouterr().err
    assert cli.main([*trace, str(listed), "--slide", "0"]) != cli.DONE
    assert "cannot check that" in capsys.readouterr().err
