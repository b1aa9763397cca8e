# SPDX-License-Identifier: LGPL-2.1-or-later
"""The committed tables agree with the generated FFI, and read what they say."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from xenaltp2m.abi import layouts, releases
from xenaltp2m.abi._ffi import ffi
from xenaltp2m.abi.layouts import DomainFlag, Field, Layout, Steps


def leaves(structure: Any, prefix: str = "", base: int = 0) -> Iterator[tuple[str, Field]]:
    """What a structure of the FFI has, by path; a structure of bit fields counts as one."""
    for name, field in structure.fields:
        path, offset = f"{prefix}{name}", base + field.offset
        members = field.type.fields if field.type.kind in {"struct", "union"} else None
        if members is None or any(member.bitsize >= 0 for _, member in members):
            yield path, Field(offset, ffi.sizeof(field.type))
        else:
            yield from leaves(field.type, f"{path}.", offset)


def padding(path: str) -> bool:
    return "pad" in path.rpartition(".")[2]


@pytest.mark.parametrize("version", [6, 7])
def test_vm_event_is_the_ffi_s(version: int) -> None:
    table = layouts.VM_EVENT[version]
    structure = ffi.typeof(f"struct vm_event_v{version}")
    in_ffi = {path: field for path, field in leaves(structure) if not padding(path)}
    in_table = {path: field for path, field in table.fields.items() if path not in {"u", "data"}}
    assert in_table == in_ffi
    assert table.size == ffi.sizeof(structure)
    for path in ("u", "data"):
        offset = ffi.offsetof(structure, path)
        assert table.fields[path].offset == offset
        assert table.fields[path].width == ffi.sizeof(dict(structure.fields)[path].type)


def test_ring_is_the_ffi_s() -> None:
    structure = ffi.typeof("struct vm_event_sring")
    in_ffi = {path: field for path, field in leaves(structure) if not padding(path)}
    assert layouts.VM_EVENT_RING.fields == in_ffi
    assert layouts.VM_EVENT_RING.size == ffi.sizeof(structure)


def test_flags_are_the_ffi_s() -> None:
    for flag in DomainFlag:
        assert flag.value == ffi.integer_const(f"XEN_DOMINF_{str(flag.name).lower()}")
    reason = ffi.integer_const("SHUTDOWN_crash")
    flags = DomainFlag.SHUTDOWN | reason << ffi.integer_const("XEN_DOMINF_shutdownshift")
    assert layouts.shutdown_reason(flags | 0xFF << 24) == reason
    assert layouts.shutdown_reason(flags & ~DomainFlag.SHUTDOWN) is None


@pytest.mark.parametrize("version", releases.SUPPORTED)
def test_tables_and_releases_agree(version: tuple[int, int]) -> None:
    assert releases.release(*version).vm_event_version in layouts.VM_EVENT


TABLES = [
    *(layout for _, layout in layouts.DOMAIN_INFO),
    *layouts.VM_EVENT.values(),
    *(layouts.ALTP2M_OP, layouts.DOMCTL, layouts.HVM_CPU, layouts.HVM_DESCRIPTOR),
    *(layouts.VCPU_INFO, layouts.VM_EVENT_RING),
]


@pytest.mark.parametrize("layout", TABLES)
def test_fields_are_inside_and_aligned(layout: Layout) -> None:
    for offset, width in layout.fields.values():
        assert 0 <= offset < offset + width <= layout.size
        assert width not in {2, 4, 8} or offset % width == 0


def test_fields_are_read_where_they_are() -> None:
    info = layouts.DOMAIN_INFO.at((4, 17))
    element = struct.pack("<HHIQ", 7, 0, DomainFlag.HVM_GUEST | DomainFlag.HAP, 1 << 40)
    element = element.ljust(info.size, b"\0")
    handle = bytes(range(16))
    element = element[:76] + handle + element[92:]
    for buffer in (bytes(8) + element, bytearray(8) + element, memoryview(bytes(8) + element)):
        assert info.number(buffer, "domain", 8) == 7
        assert info.number(buffer, "tot_pages", 8) == 1 << 40
        assert DomainFlag(info.number(buffer, "flags", 8)) == DomainFlag.HVM_GUEST | DomainFlag.HAP
        assert info.raw(buffer, "handle", 8) == handle


@pytest.mark.parametrize("base", [-5, 1, 1000])
def test_what_is_not_in_the_buffer_is_not_read(base: int) -> None:
    with pytest.raises(ValueError, match="length is not in a buffer of 8 bytes"):
        layouts.HVM_DESCRIPTOR.number(bytes(8), "length", base)


def test_fields_are_filled_in_where_they_are() -> None:
    made = layouts.ALTP2M_OP.filled({"domain": 7, "u.set_mem_access_multi.nr": 1 << 16})
    assert made == struct.pack("<8xH10xI", 7, 1 << 16).ljust(80, b"\0")
    with pytest.raises(OverflowError):
        layouts.ALTP2M_OP.filled({"domain": 1 << 16})


def test_a_step_holds_until_the_next() -> None:
    steps = Steps(((4, 16), "b"), ((4, 14), "a"))
    assert [steps.at((4, minor)) for minor in (14, 15, 16, 22, 30)] == ["a", "a", "b", "b", "b"]
    assert list(steps) == [((4, 14), "a"), ((4, 16), "b")]
    with pytest.raises(LookupError, match=r"Xen 4\.13"):
        steps.at((4, 13))
