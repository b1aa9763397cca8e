# SPDX-License-Identifier: LGPL-2.1-or-later
"""Symbols of a guest: from an ELF image, System.map, or a copy of its /proc/kallsyms."""

from __future__ import annotations

from xenaltp2m.tools.symbols.symbol import Location, Segment, Symbol
from xenaltp2m.tools.symbols.tables import Image, Symbols

__all__ = ["Image", "Location", "Segment", "Symbol", "Symbols"]
