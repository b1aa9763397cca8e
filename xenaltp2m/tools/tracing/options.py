# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check the options of a trace."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping

from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.tools.symbols import Symbols

_MOST_ARGUMENTS = 256
"""The most arguments of a function."""


def check_options(
    names: Collection[str],
    symbols: object,
    arguments: int | Mapping[str, int],
    most_per_second: float | None,
) -> None:
    """Check the options of a trace.

    Raises:
        InvalidArgumentError: An option is invalid; the message says which, and what is valid.
    """
    if not names:
        raise InvalidArgumentError("name at least one function to trace")
    for name in names:
        if not isinstance(name, str):
            raise InvalidArgumentError(f"a function is named by a string, not {name!r}")
    if not isinstance(symbols, Symbols):
        raise InvalidArgumentError(
            f"symbols must be the result of Symbols.open({symbols!r})"
            if isinstance(symbols, str | os.PathLike)
            else f"symbols must be the result of Symbols.open, not {symbols!r}"
        )
    _check_arguments(arguments, names)
    rate = most_per_second
    if rate is not None and not (_is_number(rate, float) and 0 < rate < math.inf):
        raise InvalidArgumentError(
            f"most_per_second must be a number above 0, or None, not {most_per_second!r}"
        )


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, (int, *kinds)) and not isinstance(value, bool)


def _check_arguments(arguments: int | Mapping[str, int], names: Collection[str]) -> None:
    if isinstance(arguments, Mapping):
        if unknown := sorted(map(str, arguments.keys() - set(names))):
            raise InvalidArgumentError(
                f"arguments of {unknown[0]!r} are requested, but it is not traced"
            )
        counts = list(arguments.values())
    else:
        counts = [arguments]
    for count in counts:
        if not _is_number(count) or not 0 <= count <= _MOST_ARGUMENTS:
            raise InvalidArgumentError(
                f"the number of arguments must be 0 to {_MOST_ARGUMENTS}, or a mapping of names to "
                f"such numbers, not {count!r}"
            )


def wanted_cr3(cr3: int | Collection[int] | None) -> list[int] | None:
    """Return the page tables whose calls are wanted; None for all.

    Raises:
        InvalidArgumentError: They are not values of CR3, or there are none.
    """
    if cr3 is None:
        return None
    wanted = [cr3] if isinstance(cr3, int | str) or not isinstance(cr3, Collection) else list(cr3)
    for each in wanted:
        if not _is_number(each) or not 0 <= each < 1 << 64:
            raise InvalidArgumentError(f"cr3 must be a value of CR3, or several, not {each!r}")
    if not wanted:
        raise InvalidArgumentError("cr3 names no page tables: use None for all")
    return wanted
