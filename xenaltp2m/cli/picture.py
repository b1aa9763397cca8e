# SPDX-License-Identifier: LGPL-2.1-or-later
"""The picture of a state of views: in a file, and in the terminal."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from xenaltp2m.cli.arguments import FileError
from xenaltp2m.cli.console import Console
from xenaltp2m.viewpicture import html, svg
from xenaltp2m.viewstate import State
from xenaltp2m.viewstrips import strips

_WIDTH = 100
"""Of a terminal that does not tell."""
_HEIGHT = 24
_FILES: dict[str, Callable[[State], str]] = {"html": html, "svg": svg}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where a picture goes."""
    for kind in _FILES:
        help_text = f"show: draw the views into a file, as {kind.upper()}"
        parser.add_argument(f"--{kind}", metavar="OUT", help=help_text)


def wanted(options: argparse.Namespace) -> bool:
    """Tell whether a picture in a file is asked for."""
    return any(getattr(options, kind) is not None for kind in _FILES)


def show(state: State, options: argparse.Namespace, console: Console) -> None:
    """Write the files that are asked for; draw for those who read."""
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
