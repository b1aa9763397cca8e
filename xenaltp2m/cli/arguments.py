# SPDX-License-Identifier: LGPL-2.1-or-later
"""The arguments that several commands take, of one name and one meaning in all of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial

import xenaltp2m as xa

_ACCESSES = {
    name: xa.Access[name.upper()]
    for name in ("n", "r", "x", "rw", "rx", "rwx", "rx2rw", "n2rwx", "r_pw")
}


def access_among(names: Iterable[str]) -> Callable[[str], xa.Access]:
    """Return what turns an argument into one of these accesses."""
    known = list(names)

    def access(text: str) -> xa.Access:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return _ACCESSES[text]

    return access


def seconds(text: str) -> float:
    """Turn an argument into a time."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return found


def number_among(text: str, among: range, what: str) -> int:
    """Turn an argument into one of these numbers."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if number not in among:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def add_domain(parser: argparse.ArgumentParser) -> None:
    """Declare the domain that a command is about."""
    parser.add_argument("domain", metavar="DOMAIN", help="a domid, a name or a uuid")


def add_duration(parser: argparse.ArgumentParser, what: str = "end") -> None:
    """Declare when a command that goes on ends by itself."""
    parser.add_argument(
        "--duration",
        type=seconds,
        metavar="SECONDS",
        help=f"{what} after so long (default: at Ctrl-C)",
    )


def add_count(parser: argparse.ArgumentParser, noun: str, default: int | None = None) -> None:
    """Declare after how many of something a command ends."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--count",
        type=partial(number_among, among=range(1, 1 << 63), what=f"a number of {noun}"),
        default=default,
        metavar="N",
        help=f"end after so many {noun}{shown}",
    )
