# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of the numbers that C receives.

C truncates: a domid to 16 bits (``xc_altp2m.c``), a control register's index to 8
(``xc_monitor.c``). cffi checks only against C's prototype, and accepts whatever has an ``__int__``.
The first test of each check passes for a plain int in range, and costs about 40 ns.
"""

from __future__ import annotations

import sys

from xenaltp2m.backend import arguments


def as_domid(value: int) -> int:
    """Check a domid."""
    if type(value) is int and 0 <= value < arguments.DOMID_LIMIT:
        return value
    return _coerce_int("domid", value, arguments.DOMID_LIMIT)


def as_view(value: int) -> int:
    """Check the number of a view."""
    if type(value) is int and 0 <= value <= 0xFFFF:
        return value
    return _coerce_int("view", value, arguments.LIMITS["view"])


def as_gfn(value: int, name: str = "gfn") -> int:
    """Check a gfn."""
    if type(value) is int and 0 <= value <= 0xFFFF_FFFF_FFFF_FFFF:
        return value
    return _coerce_int(name, value, arguments.LIMITS[name])


def as_access(value: int, name: str = "access") -> int:
    """Check the number of an access."""
    if type(value) is int and 0 <= value <= 0xFFFF:
        return value
    return _coerce_int(name, value, arguments.LIMITS[name])


def as_number(name: str, value: int, limit: int | None = None) -> int:
    """Check a number, by default against the limit of its name."""
    if limit is None:
        limit = arguments.LIMITS[name]
    if type(value) is int and 0 <= value < limit:
        return value
    return _coerce_int(name, value, limit)


def as_flag(name: str, value: bool) -> bool:
    """Check a truth value; the error names the calling method."""
    if value is True or value is False:
        return value
    return arguments.as_flag(sys._getframe(1).f_code.co_name, name, value)  # noqa: SLF001 - documented, for messages


def _coerce_int(name: str, value: int, limit: int) -> int:
    """Take the int subclasses (enums) that the quick checks leave, and refuse the rest."""
    op = sys._getframe(2).f_code.co_name  # noqa: SLF001 - documented, for messages
    number = int(arguments.as_int(op, name, value))
    if 0 <= number < limit:
        return number
    raise arguments.out_of_range(op, name, number, limit)
