# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the manual page and the shells' completions from the command line's parser.

``make manual``; with ``--check`` nothing is written, and what is out of date is an error.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import shtab

from xenaltp2m import cli

HERE = Path(__file__).parent
FILES = ("ELF", "FILE", "OUT", "FILE|DOMAIN")
"""What arguments are called that take the name of a file."""
BACKENDS = ("libxc", "mock", "replay:")
"""What --connect may be, or begin with."""
SHELLS = {"bash": "xenaltp2m", "zsh": "_xenaltp2m", "fish": "xenaltp2m.fish"}
SEE_ALSO = "xl(1), xl.cfg(5)"


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def summaries(parser: argparse.ArgumentParser) -> dict[str, str]:
    """What each command does."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {choice.dest: str(choice.help) for choice in action._choices_actions}
    return {}


# The manual page.


def escaped(text: str) -> str:
    """Text that troff shows as it stands."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join(f"\\&{line}" if line.startswith(".") else line for line in text.split("\n"))


def paragraphs(text: str) -> Iterator[str]:
    """Text flows; what has lines that are indented stays as it is."""
    for block in text.strip().split("\n\n"):
        shown = escaped(block)
        yield f".PP\n.nf\n{shown}\n.fi" if "\n " in block else f".PP\n{shown}"


def value(action: argparse.Action) -> str:
    """What stands behind an option, or for an argument."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    return str(action.metavar or action.dest.upper())


def signature(action: argparse.Action) -> str:
    """An option or an argument, as one types it."""
    shown = f"\\fI{escaped(value(action))}\\fR" if value(action) else ""
    if not action.option_strings:
        return shown
    names = ", ".join(f"\\fB{escaped(name)}\\fR" for name in action.option_strings)
    return f"{names} {shown}".strip()


def options(parser: argparse.ArgumentParser, known: set[str]) -> Iterator[str]:
    """Describe what a parser takes, but for the options that all commands have."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or known & set(action.option_strings):
            continue
        yield f".TP\n{signature(action)}\n{escaped(str(action.help))}"


def usage(name: str, parser: argparse.ArgumentParser, known: set[str]) -> str:
    """Say in a line how a command is called."""
    parts = [f"\\fBxenaltp2m {name}\\fR"]
    own = [action for action in parser._actions if not known & set(action.option_strings)]
    for action in sorted(own, key=lambda action: not action.option_strings):
        text = signature(action)
        if action.option_strings:
            text = text.replace(", ", "|")
        needed = action.required if action.option_strings else action.nargs != "?"
        parts.append((text if needed else f"[{text}]") + (" ..." if action.nargs == "+" else ""))
    return " ".join(parts)


def manual() -> str:
    """Write the manual page."""
    top = cli.parser()
    common = {name for action in top._actions for name in action.option_strings}
    told, description = summaries(top), str(top.description)
    exits = str(top.epilog).partition("\n")[2]
    parts = [
        '.\\" Made by docs/manual/make.py from the parser; do not edit.',
        '.TH XENALTP2M 1 "" "xenaltp2m" "User Commands"',
        ".ad l",
        ".SH NAME",
        f"xenaltp2m \\- {escaped(description[0].lower() + description[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        "\\fBxenaltp2m\\fR [\\fIOPTION\\fR ...] \\fICOMMAND\\fR [\\fIARGUMENT\\fR ...]",
        ".SH DESCRIPTION",
        escaped(
            "It works on the domains of the Xen host it runs on, as root in dom0, or on a mock of "
            "one. Whatever a command does to a domain, it undoes when it ends, also at Ctrl-C "
            "and SIGTERM; after SIGKILL, xenaltp2m rescue does."
        ),
        ".SH OPTIONS",
        "They stand before the command or after it.",
        *options(top, set()),
        ".SH COMMANDS",
    ]
    for name, parser in commands(top).items():
        summary = told[name]
        parts += [
            f".SS {name}",
            usage(name, parser, common),
            ".PP",
            escaped(f"{summary[0].upper()}{summary[1:]}."),
            *options(parser, common),
        ]
        parts += paragraphs(parser.epilog or "")
    parts.append(".SH EXIT STATUS")
    for line in exits.strip().split("\n"):
        code, _, meaning = line.strip().partition(" ")
        parts.append(f".TP\n{code}\n{escaped(meaning.strip())}")
    parts += [
        ".SH ENVIRONMENT",
        ".TP\n\\fBNO_COLOR\\fR\nIf it is set, and not empty, nothing is coloured.",
        ".TP\n\\fBCOLUMNS\\fR\nHow many letters a line of a picture or a table has.",
        ".SH FILES",
        ".TP\n\\fI/run/xenaltp2m\\fR\nJournals of what has to be undone, for \\fBrescue\\fR.",
        ".SH SEE ALSO",
        SEE_ALSO,
    ]
    return "\n".join(parts) + "\n"


# Completions.


def completion(shell: str) -> str:
    """Write a shell's completions."""
    top = cli.parser()
    for parser in (top, *commands(top).values()):
        for action in parser._actions:
            if "--connect" in action.option_strings:
                action.choices = BACKENDS
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(top, shell=shell)).rstrip("\n") + "\n"


def main() -> int:
    """Write the files, or say which are out of date."""
    wanted = {"xenaltp2m.1": manual()}
    wanted |= {name: completion(shell) for shell, name in SHELLS.items()}
    if sys.argv[1:] != ["--check"]:
        for name, text in wanted.items():
            (HERE / name).write_text(text, encoding="utf-8")
        return 0
    stale = 0
    for name, text in wanted.items():
        path = HERE / name
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in difflib.unified_diff(
            found.splitlines(), text.splitlines(), str(path), "now", lineterm="", n=1
        ):
            stale = 1
            print(line)
    if stale:
        print("out of date: make manual", file=sys.stderr)
    return stale


if __name__ == "__main__":
    sys.exit(main())
