# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example guest that is shipped is what its source makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from xenaltp2m.symbols import Image, Segment

SOURCE = Path(__file__).parents[2] / "examples" / "guest"
SHIPPED = SOURCE / "hello.elf"
XEN_ELFNOTE_PHYS32_ENTRY = 18
PLACES = ("_start", "target", "data", "counter")


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
    made = work / "hello.elf"
    subprocess.run(
        ["make", "--silent", "-C", SOURCE, f"OUT={made}", "CC=gcc"], check=True, timeout=60
    )
    return made


def compiler(path: Path) -> bytes:
    with path.open("rb") as stream:
        section = ELFFile(stream).get_section_by_name(".comment")
        assert section is not None
        return section.data()


def layout(segment: Segment) -> tuple[int, int, bool, bool]:
    return segment.address, segment.virtual, segment.writable, segment.executable


def test_the_source_makes_the_shipped_image(rebuilt: Path) -> None:
    old, new = Image.open(SHIPPED), Image.open(rebuilt)
    assert [layout(segment) for segment in new.segments] == [
        layout(segment) for segment in old.segments
    ]
    for name in PLACES:
        assert new.address(name) == old.address(name)
        assert new.gfns(name) == old.gfns(name)
    assert new.segment(new.symbol("data")).data == old.segment(old.symbol("data")).data
    if compiler(rebuilt) == compiler(SHIPPED):
        assert rebuilt.read_bytes() == SHIPPED.read_bytes()


def test_it_is_a_guest_that_xen_starts_in_protected_mode() -> None:
    with SHIPPED.open("rb") as stream:
        elf = ELFFile(stream)
        notes: list[tuple[object, ...]] = [
            (note["n_name"], note["n_type"], bytes(note["n_descdata"]))
            for segment in elf.iter_segments()
            if isinstance(segment, NoteSegment)
            for note in segment.iter_notes()
        ]
        assert elf["e_machine"] == "EM_386"
    entry = Image.open(SHIPPED).address("_start")
    assert notes == [("Xen", XEN_ELFNOTE_PHYS32_ENTRY, entry.to_bytes(4, "little"))]


def test_what_a_view_may_protect_has_pages_of_its_own() -> None:
    image = Image.open(SHIPPED)
    pages = [image.gfns(name) for name in PLACES]
    assert all(len(page) == 1 for page in pages)
    assert len(set(pages)) == len(PLACES)
    assert image.gfns("main") == image.gfns("_start")


def test_it_tells_nothing_of_where_it_was_built() -> None:
    content = SHIPPED.read_bytes()
    assert len(content) < 2048
    assert b"/" not in content.replace(compiler(SHIPPED), b"")
