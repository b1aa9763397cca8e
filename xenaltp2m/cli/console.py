# SPDX-License-Identifier: LGPL-2.1-or-later
"""Print the command line's results and remarks: tables, JSON, progress, errors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import xenaltp2m as xa
from xenaltp2m.values.gfns import Progress

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

_QUICK_SECONDS = 0.5
"""An operation that takes less shows no progress."""


class Table:
    """Rows of text under a head; columns of numbers are aligned to the right."""

    def __init__(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
    ) -> None:
        self.head = head
        self.rows = [[printable(cell) for cell in row] for row in rows]
        self.title = None if title is None else printable(title)
        self.to_right = [
            bool(self.rows) and all(row[column].isdecimal() for row in self.rows)
            for column in range(len(head))
        ]

    def plain(self) -> str:
        """Return the table aligned with spaces."""
        lines = [list(self.head), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, self.to_right, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", *texts] if self.title else texts)


class Console:
    """The outputs for results and remarks."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self._quiet = quiet
        self._status = ""
        self._rows_in_place = 0

    def result(self, document: dict[str, Any], table: Table | None = None) -> None:
        """Print the result: the document as JSON, or else the table."""
        if self.as_json:
            print(json.dumps(document, indent=2), flush=True)
        elif table is not None:
            self.table(table)

    def table(self, table: Table) -> None:
        """Print a table."""
        _print_table(table, sys.stdout)

    def coloured(self, lines: Sequence[Sequence[tuple[str, str | None]]]) -> None:
        """Print lines of texts, each in its colours if stdout is a terminal; rich names them."""
        _print_coloured(lines, sys.stdout)

    def in_place(self, table: Table) -> None:
        """Print a table over the previous one, if stdout is a terminal."""
        if sys.stdout.isatty() and not self.as_json:
            back = f"\033[{self._rows_in_place}A\033[J" if self._rows_in_place else ""
            text = table.plain()
            self._rows_in_place = text.count("\n") + 1
            print(f"{back}{text}", flush=True)

    def line(self, text: str) -> None:
        """Print a line of a result that arrives over time, above the status line."""
        status = self._status
        self.status("")
        print(text, flush=True)
        self.status(status)

    def status(self, text: str) -> None:
        """Show a status line, if stderr is a terminal; an empty text removes it."""
        if not self._quiet and sys.stderr.isatty() and (text or self._status):
            print(f"\r\033[K{printable(text)}", end="", file=sys.stderr, flush=True)
            self._status = text

    def note(self, text: str) -> None:
        """Print a remark, unless the command is quiet."""
        if not self._quiet:
            self._tell(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._tell(f": {text}", ("xenaltp2m: warning", "bold yellow"))

    def _tell(self, text: str, head: tuple[str, str] | None = None) -> None:
        status = self._status
        self.status("")
        _print_coloured([[*([head] if head else []), (text, None)]], sys.stderr)
        self.status(status)

    def error(self, error: xa.XenError) -> None:
        """Print an error in one line, and its hints below."""
        headline = error.message.partition("\n")[0].removesuffix("; tried:")
        lines = [f"  hint: {hint}" for hint in error.hint]
        if isinstance(error, xa.LibraryError):
            lines = [line.replace('connect("mock")', "--connect mock") for line in lines]
        left = error.left if isinstance(error, xa.LeftoverError) else ()
        lines += [f"  still in place: {thing}" for thing in left]
        for note in getattr(error, "__notes__", ()):
            lines += [f"  {line.strip()}" for line in note.splitlines()]
        head = [("xenaltp2m: error", "bold red"), (f": {headline}", None)]
        _print_coloured([head, *([(line, None)] for line in lines)], sys.stderr)

    def progress(self, what: str) -> Progress:
        """Return a callback that shows progress in place, if stderr is a terminal."""
        if self._quiet or not sys.stderr.isatty():
            return _silent
        started = time.monotonic()
        shown = -1

        def show(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // total
            if percent == shown or time.monotonic() - started < _QUICK_SECONDS:
                return
            shown = percent
            end = "\r\033[K" if done == total else ""
            print(f"\r{what} {percent:3} %{end}", end="", file=sys.stderr, flush=True)

        return show


def _silent(done: int, total: int) -> None:
    pass


def _rich(stream: TextIO) -> RichConsole | None:
    """Return rich's console if the stream is a terminal; it obeys NO_COLOR and TERM."""
    if not stream.isatty():
        return None
    try:
        from rich import console
    except ImportError:
        return None
    return console.Console(file=stream)


def _print_table(table: Table, stream: TextIO) -> None:
    """Print a table, with rich if it is installed."""
    console = _rich(stream)
    if console is None:
        print(table.plain(), file=stream, flush=True)
        return
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    if table.title:
        console.print(Text(table.title))
    shown = RichTable(box=box.SIMPLE_HEAD)
    for name, right in zip(table.head, table.to_right, strict=True):
        shown.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


def _print_coloured(lines: Iterable[Sequence[tuple[str, str | None]]], stream: TextIO) -> None:
    """Print lines of texts, each in its colours, with rich if it is installed."""
    shown = [[(printable(text), colours or "") for text, colours in line] for line in lines]
    console = _rich(stream)
    if console is None:
        text = "\n".join("".join(text for text, _ in line).rstrip() for line in shown)
        print(text, file=stream, flush=True)
        return
    from rich.text import Text

    for line in shown:
        console.print(Text.assemble(*line), soft_wrap=True)


def printable(text: str) -> str:
    """Escape control characters, because names come from images and guests."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
