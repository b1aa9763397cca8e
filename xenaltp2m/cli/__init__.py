# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: parses, calls the public API, prints. No other part depends on it."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Final, Protocol

import xenaltp2m as xa
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend import REPLAY
from xenaltp2m.cli import demo, doctor, domains, lab, protect, rescue, state, trace, views, watch
from xenaltp2m.cli.arguments import FileError
from xenaltp2m.cli.console import Console
from xenaltp2m.cli.host import MOCK_DOMAIN
from xenaltp2m.errors import left_in_place
from xenaltp2m.handles.journal import DIRECTORY

DONE, REFUSED, USAGE, LEFTOVER, INTERRUPTED = 0, 1, 2, 3, 130

_RELEASES = "{}.{} to {}.{}".format(*SUPPORTED[0], *SUPPORTED[-1])
_EXIT_CODES = """\
exit codes:
  0    done; all changes are undone, after Ctrl-C and SIGTERM, too
  1    refused by Xen, or by the domain's configuration or state; or the domain or library does
       not exist; or the output was closed; doctor: there is a problem; state diff and verify:
       there is a difference
  2    wrong arguments, or a file given by name cannot be used: an image, a state, a recording
  3    a change could not be undone, whatever ended the command; the message lists what is left
  130  interrupted before anything was changed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; those of the process if None.

    Returns:
        The exit code; ``xenaltp2m --help`` lists them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack letters of guests' names
            stream.reconfigure(errors="backslashreplace")
    top = parser()
    options = top.parse_args(argv)
    if not options.takes_xen:
        options.connect = options.connect or options.usual_connect
        if options.xen is not None and options.connect != "mock":
            top.error("--xen chooses the mock's release: add --connect mock")
        if options.record is not None and options.connect.startswith(REPLAY):
            top.error("--record does not apply to --connect replay: that is recorded already")
    console = Console(options.json, options.quiet)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: console.warn(str(message))
            options.command(options, console)
    except xa.XenError as error:
        console.error(error)
        return _exit_code(error, USAGE if _is_usage(error) else REFUSED)
    except xa.ReplayError as error:
        headline, _, details = str(error).partition("\n")
        told = xa.XenError(headline)
        told.add_note(details)
        console.error(told)
        return _exit_code(error, REFUSED)
    except KeyboardInterrupt as error:
        return _ended(error, "interrupted", INTERRUPTED, console)
    except BrokenPipeError as error:
        # The output was closed; Python's flush at exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _ended(error, "the output was closed", REFUSED, console)
    return DONE


def _ended(error: BaseException, how: str, code: int, console: Console) -> int:
    """Report what is still in place after a command that has ended early, if anything is."""
    left = left_in_place(error)
    if left is not None:
        console.error(xa.LeftoverError(f"{how}, and not everything could be undone", left=left))
    return _exit_code(error, code)


def _exit_code(error: BaseException, otherwise: int) -> int:
    return otherwise if left_in_place(error) is None else LEFTOVER


def _is_usage(error: xa.XenError) -> bool:
    """Return whether an error comes from the arguments or a file, not from a domain or a host."""
    if isinstance(error, xa.InvalidArgumentError):
        return error.errno is None  # not Xen's
    return isinstance(error, xa.SymbolError | xa.RecordingError | FileError)


def parser() -> argparse.ArgumentParser:
    """Make the parser; the manual page and the shells' completions are generated from it, too."""
    parser = argparse.ArgumentParser(
        prog="xenaltp2m",
        description="Alternate views of a guest's physical memory (Xen altp2m).",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {xa.__version__}")
    _add_common(parser)
    parser.set_defaults(connect=None, journal="", record=None, xen=None, json=False, quiet=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        _add_command(commands, name, module)
    return parser


class Command(Protocol):
    """The interface of a command's module."""

    SUMMARY: str
    """What the command does, in one line that begins in lower case."""
    KEYS: str
    """The rest of its help, with the keys of its JSON output."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, options: argparse.Namespace, console: Console) -> None:
        """Run the command."""


_COMMANDS: Final[dict[str, Command]] = {
    "doctor": doctor,
    "list": domains,
    "views": views,
    "watch": watch,
    "trace": trace,
    "protect": protect,
    "state": state,
    "rescue": rescue,
    "demo": demo,
    "lab": lab,
}


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: Command
) -> None:
    summary = module.SUMMARY
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=module.KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_common(parser)
    parser.set_defaults(command=module.run, usual_connect="libxc", takes_xen=False)
    module.add_arguments(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that may stand before or after the command."""
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--connect",
        type=_backend,
        default=absent,
        metavar="{libxc,mock,replay:FILE}",
        help=f"the Xen this runs on (default), a mock with one domain, {MOCK_DOMAIN!r}, "
        "or a file that --record has written",
    )
    parser.add_argument(
        "--journal",
        default=absent,
        metavar="DIRECTORY",
        help=f"the directory of journals (default: {DIRECTORY}, for the mock none); with one, the "
        "mock's domain has the views that state import has left",
    )
    parser.add_argument(
        "--record",
        default=absent,
        metavar="FILE",
        help="write all calls to Xen and their results to a new file, which may then "
        "contain secrets of the guest",
    )
    parser.add_argument(
        "--xen",
        type=_release,
        default=absent,
        metavar="RELEASE",
        help=f"the mock's release, {_RELEASES} (default: 4.17)",
    )
    parser.add_argument("--json", action="store_true", default=absent, help="print JSON")
    parser.add_argument(
        "--quiet", action="store_true", default=absent, help="no progress and no remarks on stderr"
    )


def _backend(text: str) -> str:
    if text not in ("libxc", "mock") and not text.startswith(REPLAY):
        raise argparse.ArgumentTypeError(f"{text!r} is not libxc, mock or {REPLAY}FILE")
    return text


def _release(text: str) -> tuple[int, int]:
    for version in SUPPORTED:
        if text == f"{version[0]}.{version[1]}":
            return version
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {_RELEASES}")
