# SPDX-License-Identifier: LGPL-2.1-or-later
"""Arguments shared by several commands, with one name and one meaning."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.pages import counted
from xenaltp2m.handles.hazards import NAMES

_ACCESSES = {
    name: xa.Access[name.upper()]
    for name in ("n", "r", "x", "rw", "rx", "rwx", "rx2rw", "n2rwx", "r_pw")
}


class FileError(xa.StateError):
    """A file given as an argument cannot be read, written or used."""


def seconds(text: str) -> float:
    """Parse a number of seconds."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return found


def number_among(text: str, among: range, what: str) -> int:
    """Parse a number within a range."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if number not in among:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def add_repeated(
    parser: argparse.ArgumentParser, option: str, dest: str, metavar: str, what: str, **others: Any
) -> None:
    """Declare an option that may be given again."""
    help_text = f"{what}; may be given again"
    parser.add_argument(
        option, action="append", default=[], dest=dest, metavar=metavar, help=help_text, **others
    )


def add_domain(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Declare the domain that a command works on."""
    count = "?" if optional else None
    parser.add_argument("domain", metavar="DOMAIN", nargs=count, help="a domid, a name or a uuid")


def add_image(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Declare the guest's image."""
    parser.add_argument(
        "--image",
        required=required,
        metavar="ELF",
        help="the guest's image, for its symbols; the mock's guest executes it",
    )


def add_access(
    parser: argparse.ArgumentParser, default: str, what: str, without: Iterable[str] = ()
) -> None:
    """Declare the access of a view."""
    known = [name for name in _ACCESSES if name not in without]

    def access(text: str) -> xa.Access:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return _ACCESSES[text]

    parser.add_argument(
        "--access",
        type=access,
        default=_ACCESSES[default],
        metavar="ACCESS",
        help=f"{what}: {', '.join(known)} (default: {default})",
    )


def add_accept(parser: argparse.ArgumentParser) -> None:
    """Declare the accepted hazards, for a command that opens altp2m."""
    what = "proceed although the domain has this hazard, for example passthrough"
    add_repeated(parser, "--accept", "accept", "HAZARD", what, choices=NAMES)


def add_duration(parser: argparse.ArgumentParser, what: str = "end") -> None:
    """Declare the duration after which a command ends."""
    parser.add_argument(
        "--duration",
        type=seconds,
        metavar="SECONDS",
        help=f"{what} after so many seconds (default: at Ctrl-C)",
    )


def add_count(parser: argparse.ArgumentParser, noun: str, default: int | None = None) -> None:
    """Declare the number of results after which a command ends."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--count",
        type=partial(number_among, among=range(1, 1 << 63), what=f"a number of {noun}"),
        default=default,
        metavar="N",
        help=f"end after so many {noun}{shown}",
    )


def until(options: argparse.Namespace, noun: str | None = None) -> str:
    """Describe when a command ends: by its duration, and by the number of ``noun``."""
    text = "until Ctrl-C" if options.duration is None else f"for {options.duration:g} s"
    if noun is None or options.count is None:
        return text
    return f"{text}, or {counted(options.count, noun)}"
