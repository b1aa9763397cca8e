# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw a state of views into a file, and in the terminal."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from xenaltp2m.cli.arguments import FileError
from xenaltp2m.cli.console import Console
from xenaltp2m.tools.state.svg import html, svg
from xenaltp2m.tools.state.terminal import strips
from xenaltp2m.values.state import State

_WIDTH = 100
"""The width of a terminal that does not report it."""
_HEIGHT = 24
_FILES: dict[str, Callable[[State], str]] = {"html": html, "svg": svg}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options for the output files."""
    for kind in _FILES:
        help_text = f"show: draw the views into a file, as {kind.upper()}"
        parser.add_argument(f"--{kind}", metavar="OUT", help=help_text)


def wanted(options: argparse.Namespace) -> bool:
    """Return whether an option asks for a file."""
    return any(getattr(options, kind) is not None for kind in _FILES)


def show(state: State, options: argparse.Namespace, console: Console) -> None:
    """Write the requested files; draw in the terminal unless the output is JSON."""
    for kind, draw in _FILES.items():
        name = getattr(options, kind)
        if name is None:
            continue
        try:
            Path(name).write_text(draw(state), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise FileError(f"{name}: {error.strerror}", errno=error.errno) from error
        console.note(f"Drawn: {name}.")
    if not console.as_json:
        console.line("")
        width = shutil.get_terminal_size((_WIDTH, _HEIGHT)).columns
        console.coloured(
            [
                [(span.text, None if span.colours is None else "{} on {}".format(*span.colours))
                 for span in line]
                for line in strips(state, width)
            ]
        )  # fmt: skip
