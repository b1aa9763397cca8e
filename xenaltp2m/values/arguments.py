# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check the arguments of public calls, before the calls do anything.

Every check raises :class:`~xenaltp2m.errors.InvalidArgumentError`, with the expected value.
"""

from __future__ import annotations

from typing import Any

from xenaltp2m.errors import InvalidArgumentError


def check_number(what: str, value: object, least: int = 0, most: int | None = None) -> None:
    """Check that a value is an integer within bounds, and not True or False."""
    if type(value) is int or (isinstance(value, int) and not isinstance(value, bool)):
        if value >= least and (most is None or value <= most):
            return
        bounds = f"at least {least:#x}" if most is None else f"{least:#x} to {most:#x}"
        raise InvalidArgumentError(f"{what} must be {bounds}, not {value:#x}")
    raise InvalidArgumentError(f"{what} must be an integer, not {value!r:.80}")


def check_flag(what: str, value: object) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{what} must be True or False, not {value!r:.80}")


def check_kind(what: str, value: object, kind: Any, expected: str) -> None:
    """Check that a value is an instance of a class, or of one of several classes."""
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{what} must be {expected}, not {value!r:.80}")


def check_bytes(what: str, value: object) -> None:
    """Check that a value is bytes-like."""
    check_kind(what, value, bytes | bytearray | memoryview, "bytes")


def check_progress(value: object) -> None:
    """Check that a progress callback can be called, or is None."""
    if value is not None and not callable(value):
        raise InvalidArgumentError(f"progress must be a function, not {value!r:.80}")


def check_seconds(what: str, value: object) -> None:
    """Check that a value is a number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise InvalidArgumentError(f"{what} must be a number of seconds, not {value!r:.80}")


def check_sample(value: object) -> None:
    """Check a sample size: a number of gfns, or None."""
    if value is not None:
        check_number("sample", value, least=1)
