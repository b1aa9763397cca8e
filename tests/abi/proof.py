# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prove the C declarations, and the committed tables, against a release's own headers.

Each fact we claim (a prototype, a size, an offset, a member's type, a constant) becomes one
``_Static_assert``, and all of them one translation unit that gcc only has to accept. A line
marker in front of each carries the claim's name, so that gcc's complaint names the claim.

cffi's own API mode would not do: it converts integers silently and lets pointers go with a
warning.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from cffi import FFI
from elftools.elf.elffile import ELFFile

from cdefs import build
from xenaltp2m.abi import layouts, releases

Version: TypeAlias = tuple[int, int]

_HEADERS: Final = (
    *("stdbool.h", "stddef.h", "stdint.h", "stdio.h", "stdlib.h", "sys/mman.h"),
    *("xencall.h", "xenctrl.h", "xenevtchn.h", "xenforeignmemory.h", "xenstore.h", "xentoollog.h"),
    "libxl.h",
    *("xen/domctl.h", "xen/memory.h", "xen/sched.h", "xen/version.h", "xen/vm_event.h"),
    *("xen/hvm/dm_op.h", "xen/hvm/hvm_op.h", "xen/hvm/params.h", "xen/hvm/save.h"),
)

_COMPILE: Final = (
    *("gcc", "-std=gnu11", "-x", "c", "-", "-Wall", "-Werror", "-fmax-errors=0"),
    "-DXC_WANT_COMPAT_DEVICEMODEL_API",  # xc_hvm_inject_trap, in xenctrl_compat.h
)
_ERROR: Final = re.compile(r"^(?P<name>[^:\n]+):\d+:\d+: error: (?P<message>.*)$", re.MULTILINE)

#: Ours ends where this member of theirs begins: the ring's entries are not declared.
_OPEN_ENDED: Final = {"struct vm_event_sring": "ring"}


class Headers(NamedTuple):
    """A release's headers, laid out as an installation has them."""

    version: Version
    directory: Path

    def __str__(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"


class Claim(NamedTuple):
    """One fact, what it is part of, and the C that compiles when it is true."""

    group: str
    name: str
    c: str


class ProofError(Exception):
    """The proof itself could not be run."""


def have_compiler() -> bool:
    """Tell whether there is a gcc to ask."""
    return shutil.which(_COMPILE[0]) is not None


def claims(version: Version, directory: Path = build.HERE) -> Iterator[Claim]:
    """Yield what the declarations in ``directory`` say about a release."""
    ffi = build.parse(directory)
    newer = {**build.since_marks(directory), **build.other_marks(directory)}
    for name, model in build.prototypes(ffi).items():
        if newer.get(name, build.OLDEST) > version:
            continue
        changed, earlier = build.EARLIER.get(name, (build.OLDEST, ""))
        if version >= changed:
            types = [model.result.get_c_name(), *(type_.get_c_name() for type_ in model.args)]
        else:
            pointed = ffi.typeof(f"{earlier} *")
            types = [pointed.result.cname, *(type_.cname for type_ in pointed.args)]
        yield _claim(f"function {name}", f"function {name}", _prototype_holds(name, types))
    for name, value in build.constants(ffi).items():
        if newer.get(name, build.OLDEST) <= version:
            yield _claim("constants", f"constant {name}", f"({name}) == ({value})")
    for tag in ffi.list_types()[1]:
        ours = f"struct {tag}"
        theirs = _their_name(ours, version)
        if ffi.typeof(ours).fields is None or theirs is None:
            continue
        if newer.get(tag, build.OLDEST) <= version:
            yield _claim(ours, f"size of {ours}", _size_holds(theirs, ffi.sizeof(ours)))
            yield from _member_claims(ffi, ours, theirs, newer, version)


def table_claims(version: Version) -> Iterator[Claim]:
    """Yield what ``layouts.py`` and ``releases.py`` say about a release."""
    newer = build.other_marks()
    facts = releases.release(*version)
    structures = {
        "struct xen_domctl_getdomaininfo": layouts.DOMAIN_INFO.at(version),
        "struct xen_domctl_getvcpuinfo": layouts.VCPU_INFO,
        "struct xen_domctl": layouts.DOMCTL,
        "struct xen_hvm_altp2m_op": layouts.ALTP2M_OP,
        "struct xen_hvm_get_mem_type": layouts.GET_MEM_TYPE,
        "struct hvm_hw_cpu": layouts.HVM_CPU,
        "struct hvm_save_descriptor": layouts.HVM_DESCRIPTOR,
        "struct vm_event_st": layouts.VM_EVENT[facts.vm_event_version],
        "struct vm_event_sring": layouts.VM_EVENT_RING,
    }
    for structure, layout in structures.items():
        group = f"table of {structure}"
        yield _claim(group, f"tabled size of {structure}", _size_holds(structure, layout.size))
        for path, (offset, width) in layout.fields.items():
            if not _too_new(path, newer, version):
                yield _claim(
                    group,
                    f"tabled {structure} {path}",
                    f"offsetof({structure}, {path}) == {offset}"
                    f" && sizeof((({structure} *)0)->{path}) == {width}",
                )
    for flag in layouts.DomainFlag:
        c_name = str(flag.name).lower()
        holds = f"XEN_DOMINF_{c_name} == {flag.value}"
        yield _claim("table of domain flags", f"tabled {flag.name}", holds)
    numbers = {
        "HVM_SAVE_CODE(CPU)": layouts.HVM_CPU_TYPECODE,
        "VM_EVENT_INTERFACE_VERSION": facts.vm_event_version,
        "XEN_DOMCTL_INTERFACE_VERSION": facts.domctl_version,
        "XEN_SYSCTL_INTERFACE_VERSION": facts.sysctl_version,
        "XENMEM_access_default": facts.default_access_number,
    }
    for expression, number in numbers.items():
        yield _claim("tabled numbers", f"tabled {expression}", f"{expression} == {number}")


def absences(version: Version, directory: Path = build.HERE) -> Iterator[Claim]:
    """Yield what must be refuted: that a release has what is marked newer than it."""
    newer = {**build.since_marks(directory), **build.other_marks(directory)}
    ffi = build.parse(directory)
    for name in (*build.prototypes(ffi), *build.constants(ffi)):
        if newer.get(name, build.OLDEST) > version:
            yield Claim(
                "absences", f"presence of {name}", f"extern __typeof__({name}) *has_{name};"
            )


def refute(claimed: Iterable[Claim], headers: Headers) -> dict[str, str]:
    """Return the claims that do not hold, by name, each with what gcc says.

    Raises:
        ProofError: The headers do not compile, or two claims have one name.
    """
    listed = list(claimed)
    names = {claim.name for claim in listed}
    if len(names) != len(listed):
        raise ProofError("two claims have one name")
    run = _gcc(headers, "".join(f'# 1 "{claim.name}"\n{claim.c}\n' for claim in listed))
    refuted: dict[str, str] = {}
    for match in _ERROR.finditer(run.stderr):
        if match["name"] not in names:
            raise ProofError(run.stderr)
        refuted.setdefault(match["name"], match["message"])
    if run.returncode and not refuted:
        raise ProofError(run.stderr)
    return refuted


def misplaced_bits(headers: Headers, directory: Path = build.HERE) -> dict[str, str]:
    """Return the bit fields that C does not put where the FFI does.

    There is no offsetof for a bit field: each is initialised to all ones in an object file, whose
    bytes must be those that the FFI makes of it.
    """
    ffi = build.parse(directory)
    expected: dict[str, bytes] = {}
    unit: list[str] = []
    for tag in ffi.list_types()[1]:
        for name, field in ffi.typeof(f"struct {tag}").fields or ():
            if field.bitsize >= 0:
                ones = ffi.new(f"struct {tag} *", {name: (1 << field.bitsize) - 1})
                expected[f"{tag}_{name}"] = bytes(ffi.buffer(ones))
                unit.append(f"const struct {tag} {tag}_{name} = {{ .{name} = ~0u }};")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "bits.o")
        run = _gcc(headers, "\n".join(unit), "-Wno-overflow", "-c", "-o", str(target))
        if run.returncode:
            raise ProofError(run.stderr)
        found = _variables(target.read_bytes())
    return {
        name: f"{found[name].hex()} in C, {want.hex()} in the FFI"
        for name, want in expected.items()
        if found[name] != want
    }


def _member_claims(
    ffi: FFI, ours: str, theirs: str, newer: dict[str, Version], version: Version
) -> Iterator[Claim]:
    """Claim each member's offset and type, going down into what has no name of its own."""
    pending = [("", 0, ffi.typeof(ours))]
    while pending:
        prefix, base, structure = pending.pop()
        for name, field in structure.fields:
            path, offset, type_ = f"{prefix}{name}", base + field.offset, field.type
            if field.bitsize >= 0 or _too_new(path, newer, version):
                continue
            holds = f"offsetof({theirs}, {path}) == {offset}"
            if "$" in type_.cname:  # cffi's own name for a type that has none
                pending.append((f"{path}.", offset, type_))
            else:
                declared = _their_name(type_.cname, version) or type_.cname
                member = f"__typeof__((({theirs} *)0)->{path})"
                holds += f" && __builtin_types_compatible_p({member}, {declared})"
            yield _claim(ours, f"{ours} {path}", holds)


def _prototype_holds(name: str, types: list[str]) -> str:
    result, *arguments = types
    prototype = f"{result}({', '.join(arguments) or 'void'})"
    return f"__builtin_types_compatible_p(__typeof__({name}), {prototype})"


def _size_holds(structure: str, size: int) -> str:
    if structure in _OPEN_ENDED:
        return f"offsetof({structure}, {_OPEN_ENDED[structure]}) == {size}"
    return f"sizeof({structure}) == {size}"


def _their_name(ours: str, version: Version) -> str | None:
    """Return Xen's name for a type of ours, or None for another vm_event version's."""
    match = re.fullmatch(r"struct vm_event_v(\d+)(_\w+)?", ours)
    if match is None:
        return ours
    if int(match[1]) != releases.release(*version).vm_event_version:
        return None
    return f"struct vm_event{match[2] or '_st'}"


def _too_new(path: str, newer: dict[str, Version], version: Version) -> bool:
    return any(newer.get(part, build.OLDEST) > version for part in path.split("."))


def _claim(group: str, name: str, condition: str) -> Claim:
    return Claim(group, name, f'_Static_assert({condition}, "{name}");')


def _gcc(headers: Headers, unit: str, *options: str) -> subprocess.CompletedProcess[str]:
    includes = "".join(f"#include <{header}>\n" for header in _HEADERS)
    return subprocess.run(
        [*_COMPILE, "-isystem", str(headers.directory), *(options or ("-fsyntax-only",))],
        input=includes + unit,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )


def _variables(image: bytes) -> dict[str, bytes]:
    """Read the variables' contents out of an object file."""
    elf = ELFFile(BytesIO(image))
    symbols: Any = elf.get_section_by_name(".symtab")
    found: dict[str, bytes] = {}
    for symbol in symbols.iter_symbols():
        if symbol["st_info"]["type"] == "STT_OBJECT":
            start = symbol["st_value"]
            data = elf.get_section(symbol["st_shndx"]).data()
            found[symbol.name] = data[start : start + symbol["st_size"]]
    return found
