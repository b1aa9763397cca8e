# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example guests that are shipped are what their sources make."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from xenaltp2m.tools.symbols import Image, Segment

SOURCE = Path(__file__).parents[2] / "examples" / "guest"
XEN_ELFNOTE_PHYS32_ENTRY = 18
PLACES = {
    "hello": ("_start", "target", "data", "counter"),
    "checker": ("_start", "target", "target2", "counter", "calls", "noticed", "holes"),
    "racer": ("_start", "hit", "total", "go", "vcpus", "made", "noticed", "done"),
    "insider": ("_start", "secret", "information", "passes", "trips", "noticed"),
    "paged": (
        *("_start", "user_main", "user_stack", "run", "target64", "passes", "calls", "user_calls"),
        *("page_faults", "page_fault_errors", "noticed", "read_only"),
    ),
}
"""What has pages of its own."""
MACHINES = dict.fromkeys(PLACES, "EM_386") | {"paged": "EM_X86_64"}
LARGEST = 10_000

each = pytest.mark.parametrize("name", PLACES)


def shipped(name: str) -> Path:
    return SOURCE / f"{name}.elf"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("gcc", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    work = tmp_path_factory.mktemp("guest")
    probe = subprocess.run(
        ["gcc", "-m32", "-ffreestanding", "-nostdlib", "-xc", "-c", "-o", work / "probe.o", "-"],
        input=b"int probe;",
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("this gcc does not know -m32")
    subprocess.run(
        ["make", "--silent", "-C", SOURCE, f"OUT={work}", "CC=gcc"], check=True, timeout=60
    )
    return work


def compiler(path: Path) -> bytes:
    with path.open("rb") as stream:
        section = ELFFile(stream).get_section_by_name(".comment")
        assert section is not None
        return section.data()


def layout(segment: Segment) -> tuple[int, int, bool, bool]:
    return segment.address, segment.virtual, segment.writable, segment.executable


@each
def test_the_source_makes_the_shipped_image(rebuilt: Path, name: str) -> None:
    made = rebuilt / f"{name}.elf"
    old, new = Image.open(shipped(name)), Image.open(made)
    assert [layout(segment) for segment in new.segments] == [
        layout(segment) for segment in old.segments
    ]
    assert {symbol.name for symbol in new.symbols} == {symbol.name for symbol in old.symbols}
    if compiler(made) == compiler(shipped(name)):
        assert made.read_bytes() == shipped(name).read_bytes()


def test_another_compiler_leaves_hello_where_it_was(rebuilt: Path) -> None:
    old, new = Image.open(shipped("hello")), Image.open(rebuilt / "hello.elf")
    for place in PLACES["hello"]:
        assert new.address(place) == old.address(place)
        assert new.gfns(place) == old.gfns(place)
    assert new.segment(new.symbol("data")).data == old.segment(old.symbol("data")).data


@each
def test_it_is_a_guest_that_xen_starts_in_protected_mode(name: str) -> None:
    with shipped(name).open("rb") as stream:
        elf = ELFFile(stream)
        notes: list[tuple[object, ...]] = [
            (note["n_name"], note["n_type"], bytes(note["n_descdata"]))
            for segment in elf.iter_segments()
            if isinstance(segment, NoteSegment)
            for note in segment.iter_notes()
        ]
        assert elf["e_machine"] == MACHINES[name]
    entry = Image.open(shipped(name)).address("_start")
    assert notes == [("Xen", XEN_ELFNOTE_PHYS32_ENTRY, entry.to_bytes(4, "little"))]


@each
def test_what_a_view_may_protect_has_pages_of_its_own(name: str) -> None:
    image = Image.open(shipped(name))
    pages = [image.gfns(place) for place in PLACES[name]]
    assert all(len(page) == 1 for page in pages)
    assert len(set(pages)) == len(pages)
    assert image.gfns("main") == image.gfns("_start")


@each
def test_it_has_a_configuration(name: str) -> None:
    text = (SOURCE / f"{name}.cfg").read_text()
    assert f'name = "{name}"\n' in text
    assert f'kernel = "{name}.elf"\n' in text


@each
def test_it_tells_nothing_of_where_it_was_built(name: str) -> None:
    content = shipped(name).read_bytes()
    assert len(content) < LARGEST
    assert not re.search(rb"/[\w.-]+/", content)
    assert not shipped(name).stat().st_mode & 0o111


def test_where_the_instructions_are_that_breakpoints_are_put_on() -> None:
    known = json.loads((SOURCE.parents[1] / "tests/contract/instructions.json").read_text())
    for name, places in known.items():
        command = ["objdump", "-d", str(shipped(name))]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.findall(r"^ *([0-9a-f]+):\t[0-9a-f ]+\t\S", text, re.MULTILINE)
        assert places == [int(place, 16) for place in found]
