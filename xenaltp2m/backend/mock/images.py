# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libxl does to start a PVH guest: its image in memory, its first vCPU's registers.

Restates ``xc_dom_hvmloader``'s sibling for PVH: ``xc_dom_elfloader.c``, ``bootlate_hvm`` and
``vcpu_hvm`` (``xg_dom_x86.c``).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile

from xenaltp2m.abi.x86 import EFER_LMA
from xenaltp2m.backend.mock.machine import Domain
from xenaltp2m.backend.mock.p2m import ORDER_4K, RAM_TYPES
from xenaltp2m.backend.mock.vcpu import BEGINNING, FLAT_CODE, FLAT_CODE_64, REGISTERS, Vcpu
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import PAGE_SIZE

_PHYS32_ENTRY = 18
"""``XEN_ELFNOTE_PHYS32_ENTRY``."""
_MAGIC, _VERSION = 0x336EC578, 1
_START_INFO = struct.Struct("<IIIIQQQQII")
_MAP_ENTRY = struct.Struct("<QQII")
_MAP_AT = 0x878
"""After the start info, two modules and their command lines."""
_RAM, _RESERVED, _ACPI_TABLES = 1, 2, 3
_ACPI, _SPECIAL_PAGES = 0xFC00_0000, 0xFEFF_8000
_MOST_SEGMENTS = 256


def load(domain: Domain, content: bytes, name: str) -> None:
    """Put an image into a domain's memory, and have its first vCPU begin it.

    Raises:
        InvalidArgumentError: It is not a PVH image, or does not fit.
    """
    try:
        entry, end = _load_segments(domain, ELFFile(io.BytesIO(content)))
    except (ELFError, ConstructError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"{name} is not an ELF image that can be read: {error}"
        ) from None
    if entry is None:
        raise InvalidArgumentError(
            f"{name} has no note XEN_ELFNOTE_PHYS32_ENTRY: it is not a PVH guest's image"
        )
    start_info = -(-end // PAGE_SIZE) * PAGE_SIZE
    write(domain, start_info, _start_info(domain, start_info))
    begin(domain.vcpus[0], {"rip": entry, "rbx": start_info})


def _load_segments(domain: Domain, elf: Any) -> tuple[int | None, int]:
    entry, end = None, 0
    if elf.num_segments() > _MOST_SEGMENTS:
        raise ValueError(f"it has {elf.num_segments()} segments")
    for segment in elf.iter_segments():
        if segment["p_type"] == "PT_LOAD":
            first, size = segment["p_paddr"], segment["p_memsz"]
            data = segment.data()
            if len(data) != segment["p_filesz"]:
                raise ValueError("a segment extends beyond the end of the file")
            if len(data) > size:
                raise ValueError("a segment is longer in the file than in memory")
            write(domain, first, data)
            end = max(end, first + size)
        elif segment["p_type"] == "PT_NOTE":
            for note in segment.iter_notes():
                if note["n_name"] == "Xen" and int(note["n_type"]) == _PHYS32_ENTRY:
                    entry = int.from_bytes(note["n_descdata"], "little")
    return entry, end


def _start_info(domain: Domain, address: int) -> bytes:
    """``struct hvm_start_info``, room for modules, and the memory map (``bootlate_hvm``)."""
    tables = 5 if domain.release.version >= (4, 18) else 7  # seen: 7 in 4.14 and 4.17, 5 in 4.20
    root = _ACPI + (1 + tables) * PAGE_SIZE
    entries = [
        (0, domain.target_kib << 10, _RAM),
        (_SPECIAL_PAGES, 8 * PAGE_SIZE, _RESERVED),
        (root, 0x40, _ACPI_TABLES),
        (_ACPI, PAGE_SIZE, _ACPI_TABLES),
        (_ACPI + PAGE_SIZE, tables * PAGE_SIZE, _ACPI_TABLES),
    ]
    for page in range(_ACPI, root + PAGE_SIZE, PAGE_SIZE):
        domain.max_pages += 1
        domain.add_page(page // PAGE_SIZE, ORDER_4K)
    head = _START_INFO.pack(_MAGIC, _VERSION, 0, 0, 0, 0, root, address + _MAP_AT, len(entries), 0)
    return head.ljust(_MAP_AT, b"\0") + b"".join(_MAP_ENTRY.pack(*one, 0) for one in entries)


def write(domain: Domain, address: int, data: bytes) -> None:
    """Write guest-physical memory before the guest runs.

    Raises:
        InvalidArgumentError: It is not RAM.
    """
    at = 0
    while at < len(data):
        gfn, offset = divmod(address + at, PAGE_SIZE)
        count = min(PAGE_SIZE - offset, len(data) - at)
        found = domain.host_lookup(gfn, populate=True, unshare=True)
        if found.type not in RAM_TYPES or not found.valid:
            raise InvalidArgumentError(
                f"gfn {gfn:#x} is not RAM of {domain.name}: give the domain more memory", gfn=gfn
            )
        page = domain.machine.frames.page(found.mfn)
        page[offset : offset + count] = data[at : at + count]
        at += count


def begin(vcpu: Vcpu, registers: Mapping[str, int]) -> None:
    """Set a vCPU's registers: those given, over flat segments with paging off (``vcpu_hvm``).

    Raises:
        InvalidArgumentError: There is no such register.
    """
    for name in registers:
        if name not in REGISTERS:
            raise InvalidArgumentError(f"there is no register {name!r}")
    long = bool(registers.get("msr_efer", 0) & EFER_LMA)
    vcpu.set_flat_segments(FLAT_CODE_64 if long else FLAT_CODE)
    vcpu.set_registers({**BEGINNING, **registers})
    vcpu.initialised = vcpu.online = True
    vcpu.halted = False
