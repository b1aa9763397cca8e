# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the headers and libraries at hand: the installed ones, and those the environment names.

XENALTP2M_ABI=1          what is missing fails instead of being skipped
XENALTP2M_HEADER_DIRS    more headers, ``4.14=/path:4.22=/path`` (see unpack_headers.py)
XENALTP2M_LIBRARY_DIRS   more directories with libxen*.so.*, colon-separated
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

import pytest
from elftools.elf.elffile import ELFFile

from .proof import Headers

Version: TypeAlias = tuple[int, int]

_SYSTEM_LIBRARIES: Final = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"),
    *("/usr/local/lib64", "/usr/local/lib"),
)
_INSTALLED: Final = Path("/usr/include")


class Library(NamedTuple):
    """A shared library of Xen's; the release is None where the soname does not follow it."""

    path: Path
    name: str
    soname: str
    version: Version | None

    def __str__(self) -> str:
        return self.soname


def missing(what: str) -> NoReturn:
    """Skip the test for want of something, or fail it where XENALTP2M_ABI=1 promises it."""
    if os.environ.get("XENALTP2M_ABI") == "1":
        pytest.fail(f"{what}, and XENALTP2M_ABI=1")
    pytest.skip(what)


def headers() -> list[Headers]:
    """Return every release's headers at hand, the installed ones first."""
    found: list[Headers] = []
    version = _installed_version()
    if version is not None and (_INSTALLED / "xenctrl.h").exists():
        found.append(Headers(version, _INSTALLED))
    for entry in _paths("XENALTP2M_HEADER_DIRS"):
        release, _, directory = entry.partition("=")
        major, _, minor = release.partition(".")
        found.append(Headers((int(major), int(minor)), Path(directory)))
    return found


def libraries() -> list[Library]:
    """Return every Xen library at hand, each file once."""
    found: dict[Path, Library] = {}
    for directory in (*_SYSTEM_LIBRARIES, *_paths("XENALTP2M_LIBRARY_DIRS")):
        for path in sorted(Path(directory).glob("libxen*.so.*")):
            real = path.resolve()
            if real not in found and real.is_file():
                found[real] = _library(real)
    return list(found.values())


def exported(library: Library) -> set[str]:
    """Return the functions that a library's ``.dynsym`` defines for others."""
    with library.path.open("rb") as file:
        table: Any = ELFFile(file).get_section_by_name(".dynsym")
        return {
            symbol.name
            for symbol in table.iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF"
            and symbol["st_info"]["type"] == "STT_FUNC"
            and symbol["st_info"]["bind"] in {"STB_GLOBAL", "STB_WEAK"}
            and symbol["st_other"]["visibility"] in {"STV_DEFAULT", "STV_PROTECTED"}
        }


def _library(path: Path) -> Library:
    with path.open("rb") as file:
        dynamic: Any = ELFFile(file).get_section_by_name(".dynamic")
        soname: str = next(tag.soname for tag in dynamic.iter_tags("DT_SONAME"))
    release = re.search(r"\.so\.(4)\.(\d+)$", soname)
    version = (int(release[1]), int(release[2])) if release else None
    return Library(path, soname.partition(".so")[0], soname, version)


def _installed_version() -> Version | None:
    """Return the release of the development package: its headers do not say, its library does."""
    if shutil.which("gcc") is None:
        return None
    run = subprocess.run(
        ["gcc", "-print-file-name=libxenctrl.so"], capture_output=True, text=True, check=True
    )
    path = Path(run.stdout.strip())
    return _library(path.resolve()).version if path.is_absolute() and path.exists() else None


def _paths(variable: str) -> list[str]:
    return [entry for entry in os.environ.get(variable, "").split(":") if entry]
