# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find an ELF file's debugging information (DWARF 2 to 5), in the file or in files beside it.

pyelftools parses entries. This module finds their sections, however they are compressed, and the
other files: ``.dwo`` files of a split build (gcc ``-gsplit-dwarf``), and the file that dwz makes.
"""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import elftools

from xenaltp2m.errors import SymbolError
from xenaltp2m.tools.symbols.elf import ElfFile, opened
from xenaltp2m.tools.symbols.meter import Meter

if TYPE_CHECKING:
    from elftools.dwarf.dwarfinfo import DebugSectionDescriptor, DWARFInfo

_SECTIONS = frozenset(
    f"debug_{name}"
    for name in (
        "info", "abbrev", "str", "line_str", "addr", "str_offsets", "types", "loc", "loclists",
        "ranges", "rnglists",
    )
)  # fmt: skip
_SHARED = "debug_addr", "debug_ranges"
"""The sections that ``.dwo`` files leave in the image, because the linker relocates them."""
_OTHER_FORM = "debug_loc", ".dwo"
"""Lists of locations whose entries (DW_LLE_GNU_*) pyelftools misreads."""
_OF_DWARF_5 = {
    "DW_FORM_GNU_str_index": "DW_FORM_strx",
    "DW_FORM_GNU_addr_index": "DW_FORM_addrx",
}
"""The forms of split DWARF 4, a GNU extension, and the equal forms of DWARF 5."""
_NAMES = "DW_AT_dwo_name", "DW_AT_GNU_dwo_name", 0x76, 0x2130
"""With the numbers, because old versions of pyelftools do not know the names."""
_FULL_UNITS = 1, 3
"""DW_UT_compile and DW_UT_partial."""
_MOST_ABBREVIATIONS = 1 << 16


def is_described(elf: ElfFile) -> bool:
    """Return whether a file has debugging information, not only tables for unwinding."""
    return any(elf.section(name) is not None for name in (".debug_info", ".zdebug_info"))


def load(
    elf: ElfFile, meter: Meter, suffix: str = "", shared: DWARFInfo | None = None
) -> DWARFInfo:
    """Prepare a file's debugging information for pyelftools.

    Args:
        elf: The file.
        meter: Counts the reads of the sections.
        suffix: The suffix of the sections' names: ``.dwo`` in a split build.
        shared: The debugging information of the image that a ``.dwo`` file belongs to.

    Raises:
        SymbolError: A section is damaged, or compressed by a method that cannot be read.
    """
    # Imported late: else each program that reads no DWARF would take a tenth longer to start.
    from elftools.dwarf.dwarfinfo import DebugSectionDescriptor, DwarfConfig, DWARFInfo

    found: dict[str, DebugSectionDescriptor | None] = {}
    for parameter in inspect.signature(DWARFInfo).parameters:
        name = parameter.removesuffix("_sec")
        if name == parameter:
            continue  # the configuration
        found[parameter] = None
        if shared is not None and name in _SHARED:
            found[parameter] = getattr(shared, parameter)
        elif name in _SECTIONS and (name, suffix) != _OTHER_FORM:
            # A file may have sections of both kinds, because ld compresses only those that become
            # smaller; a .dwo file has one for each type unit.
            names = f".{name}{suffix}", f".z{name}{suffix}"
            named = [section for section in elf.sections if section.name in names]
            if named:
                data = b"".join(map(elf.content, named))
                found[parameter] = DebugSectionDescriptor(
                    meter.on(io.BytesIO(data)), names[0], named[0].offset, len(data), 0
                )
    config = DwarfConfig(
        little_endian=True,
        machine_arch="x64" if elf.bits == 64 else "x86",
        default_address_size=elf.bits // 8,
    )
    return DWARFInfo(config, **found)


def load_supplement(elf: ElfFile, meter: Meter, directory: Path | None) -> DWARFInfo | None:
    """Load what dwz has moved to a file shared by several images; None if it has moved nothing.

    Raises:
        SymbolError: The file is missing, or belongs to another build.
    """
    link = elf.section(".gnu_debugaltlink")
    if link is None:
        return None
    text, _, wanted = elf.content(link).partition(b"\0")
    path = os.fsdecode(text)
    what = f"{elf.name}: dwz has moved some of its debugging information to {path}"
    with _beside(path, [directory], what) as stream:
        other = ElfFile(stream, path)
        build_id = other.build_id(loaded=False)
        if build_id is None or build_id.value != wanted:
            raise SymbolError(f"{what}, but the file of that name belongs to another build")
        return load(other, meter)


def check_unit(elf: ElfFile, unit: Any) -> None:
    """Raise if a unit is of an unknown kind.

    Raises:
        SymbolError: It is.
    """
    kind = unit.header.get("unit_type")
    if isinstance(kind, int) and kind not in _FULL_UNITS:
        _refuse_old(elf, f"units of type {kind}")  # pyelftools 0.29 misreads it as a full unit


def _refuse_old(elf: ElfFile, what: str) -> NoReturn:
    raise SymbolError(
        f"{elf.name}: its debugging information has {what}, which pyelftools "
        f"{elftools.__version__} cannot read",
        hint=("install pyelftools 0.33 or newer",),
    )


def is_skeleton(unit: Any) -> bool:
    """Return whether a unit's entries are in a ``.dwo`` file."""
    return any(name in unit.get_top_DIE().attributes for name in _NAMES)


def load_split(elf: ElfFile, skeleton: Any, meter: Meter, directory: Path | None) -> Any:
    """Load the unit in a ``.dwo`` file that a skeleton unit stands for.

    Raises:
        SymbolError: The file is missing, or belongs to another build.
    """
    if tuple(map(int, elftools.__version__.split(".")[:2])) < (0, 33):
        _refuse_old(elf, "parts in .dwo files")
    top = skeleton.get_top_DIE()
    path = next(_text(top, name) for name in _NAMES if name in top.attributes)
    what = f"{elf.name}: some of its debugging information is in {path}"
    built_in = Path(_text(top, "DW_AT_comp_dir")) if directory is not None else None
    with _beside(path, [built_in, directory], what) as stream:
        dwarf = load(ElfFile(stream, path), meter, ".dwo", skeleton.dwarfinfo)
    found = None
    for unit in (*dwarf.iter_CUs(), *_type_units(dwarf)):
        _prepare(unit, top)
        if _id(unit) == _id(skeleton):
            found = unit
    if found is None:
        raise SymbolError(f"{what}, but the file of that name belongs to another build")
    return found


def find_type(dwarf: DWARFInfo, signature: int) -> Any:
    """Return the entry of a type that has a unit of its own (gcc ``-fdebug-types-section``)."""
    for unit in dwarf.iter_CUs():  # DWARF 5
        if unit.header.get("type_signature") == signature:
            return unit.get_DIE_from_refaddr(unit.cu_offset + unit["type_offset"])
    if dwarf.debug_types_sec is None:
        raise KeyError(signature)
    return dwarf.get_DIE_by_sig8(signature)


def _type_units(dwarf: DWARFInfo) -> Iterator[Any]:
    """Return the type units of DWARF 4, which have a section of their own."""
    return dwarf.iter_TUs() if dwarf.debug_types_sec is not None else iter(())


def _beside(path: str, directories: list[Path | None], what: str) -> Any:
    """Open a file that another file names."""
    tried = [directory / path for directory in directories if directory is not None]
    for one in tried:
        if one.exists():
            return opened(one)
    raise SymbolError(
        f"{what}, which is missing",
        hint=("copy that file to the path in the image, or next to the image",),
    )


def _id(unit: Any) -> int | None:
    if unit["version"] >= 5:
        found: int | None = unit.header.get("dwo_id")
        return found
    attribute = unit.get_top_DIE().attributes.get("DW_AT_GNU_dwo_id")
    return None if attribute is None else attribute.value


def _prepare(unit: Any, skeleton: Any) -> None:
    """Add a split unit's attributes from its skeleton, and those it has by definition.

    Each ``.dwo`` file has one contribution to its tables, so their bases are implied (DWARF 5,
    7.3.2.2); pyelftools needs them as attributes.
    """
    from elftools.dwarf.die import AttributeValue

    is_5, is_64 = unit["version"] >= 5, unit.structs.dwarf_format == 64
    if not is_5:
        _as_dwarf_5(unit)
    bases = {"DW_AT_str_offsets_base": (16 if is_64 else 8) if is_5 else 0}
    if is_5:
        bases |= dict.fromkeys(("DW_AT_rnglists_base", "DW_AT_loclists_base"), 20 if is_64 else 12)
    for name in ("DW_AT_addr_base", "DW_AT_GNU_addr_base"):
        if name in skeleton.attributes:
            bases["DW_AT_addr_base"] = skeleton.attributes[name].value
    for name in ("DW_AT_low_pc", "DW_AT_GNU_ranges_base"):
        if name in skeleton.attributes:
            bases[name] = skeleton.attributes[name].value
    with suppress(Exception):  # names need the bases; this first read fails, and is cached
        unit.get_top_DIE()
    attributes = unit.get_top_DIE().attributes
    for name, value in bases.items():
        attributes[name] = AttributeValue(name, "DW_FORM_sec_offset", value, value, 0, 0)


def _as_dwarf_5(unit: Any) -> None:
    table = unit.get_abbrev_table()
    for code in count(1):
        try:
            specs = table.get_abbrev(code)["attr_spec"]
        except KeyError:
            return
        for spec in specs:
            spec.form = _OF_DWARF_5.get(spec.form, spec.form)
        if code > _MOST_ABBREVIATIONS:
            return


def _text(entry: Any, name: str | int) -> str:
    attribute = entry.attributes.get(name)
    return os.fsdecode(attribute.value) if attribute is not None else ""
