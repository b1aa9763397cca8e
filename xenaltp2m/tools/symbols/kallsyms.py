# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read a kernel's own list of its symbols: /proc/kallsyms, System.map."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from xenaltp2m.errors import SymbolError
from xenaltp2m.tools.symbols.symbol import GLOBAL, MAX_SYMBOLS, Found, Symbol

_MAP_LINE = re.compile(rb"[0-9A-Fa-f]{1,16} [A-Za-z?] ")
_NO_ADDRESS = re.compile(rb"\s*(?:\(null\) [A-Za-z?]|[UwvV]) \S+(?:\s+\[\S*\])?\s*")
"""Lines without an address: hidden by a kernel before 4.15, or of a symbol without one (nm)."""
_ELSEWHERE = b"ffffffffffffffff B The"
"""Debian's System.map contains only a sentence that names the package with the real one."""
_LONGEST_LINE = 1024


def map_symbols(stream: BinaryIO, name: str) -> tuple[list[Found], str, int]:
    """Read a kernel's list; each line has an address, a letter, a name, maybe a module.

    Returns:
        The arguments of ``Symbols``, which are (address, rank, symbol) of each, the name, and the
        number of skipped lines.
    """
    found: list[Found] = []
    lines = hidden = 0
    for lines, line in enumerate(_lines(stream, name), 1):
        parts = line.split()
        if line.startswith(_ELSEWHERE):
            what = line[len(_ELSEWHERE) - 3 :].decode("utf-8", "backslashreplace").strip()
            raise SymbolError(f"{name} has no symbols, but says: {what}")
        if not parts or _NO_ADDRESS.fullmatch(line):
            hidden += line.lstrip().startswith(b"(null)")
            continue
        if len(parts) not in (3, 4) or not _MAP_LINE.match(line):
            raise SymbolError(
                f"{name}: neither an ELF image nor a list of a kernel's symbols: line {lines}"
            )
        address, kind = int(parts[0], 16), parts[1]
        hidden += not address
        if kind in b"UuAa":
            continue
        rank = GLOBAL * kind.isupper() + 1
        text = parts[2].decode("utf-8", "backslashreplace")
        module = parts[3].strip(b"[]").decode("utf-8", "backslashreplace") if parts[3:] else ""
        symbol = Symbol(text, address, 0, kind in b"bBdDrR")
        found.append((address, rank, symbol, module))
    if not any(one[0] for one in found):
        if not hidden:
            raise SymbolError(f"{name}: neither an ELF image nor a list of a kernel's symbols")
        raise SymbolError(
            f"{name}: every address is 0, because the kernel hides them (kptr_restrict)",
            hint=("read /proc/kallsyms as root of the guest, with kernel.kptr_restrict=0 or 1",),
        )
    return found, name, lines - len(found)


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    for _ in range(MAX_SYMBOLS):
        line = stream.readline(_LONGEST_LINE)
        if not line:
            return
        yield line
    raise SymbolError(f"{name}: more than {MAX_SYMBOLS} lines")
