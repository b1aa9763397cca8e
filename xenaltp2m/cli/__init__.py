# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: parses, calls the public API, prints. Nothing depends on it."""

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
from xenaltp2m.journal import DIRECTORY

DONE, REFUSED, USAGE, LEFTOVER, INTERRUPTED = 0, 1, 2, 3, 130

_RELEASES = "{}.{} to {}.{}".format(*SUPPORTED[0], *SUPPORTED[-1])
_EXIT_CODES = """\
exit codes:
  0    done; what was to be undone is undone, after Ctrl-C and SIGTERM, too
  1    refused: by Xen, by the domain's configuration or state, or there is no such domain or
       library, or nobody reads on; doctor has found a problem, state diff or verify a difference
  2    wrong arguments, or a file that was named cannot be used: an image, a state, a recording
  3    something could not be undone, whatever ended the command; the message says what is left
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
        if isinstance(stream, io.TextIOWrapper):  # which may lack what names in a guest are made of
            stream.reconfigure(errors="backslashreplace")
    top = parser()
    options = top.parse_args(argv)
    if not options.takes_xen:
        options.connect = options.connect or options.usual_connect
        if options.xen is not None and options.connect != "mock":
            top.error("--xen chooses the mock's release: add --connect mock")
        if options.record is not None and options.connect.startswith(REPLAY):
            top.error("what is replayed is recorded already")
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
        # Nobody reads on; Python's flush at exit must not complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _ended(error, "nobody reads the output", REFUSED, console)
    return DONE


def _ended(error: BaseException, how: str, code: int, console: Console) -> int:
    """Say what is left, if something is, of a command that has no more to say."""
    left = left_in_place(error)
    if left is not None:
        console.error(xa.LeftoverError(f"{how}, and not everything could be undone", left=left))
    return _exit_code(error, code)


def _exit_code(error: BaseException, otherwise: int) -> int:
    return otherwise if left_in_place(error) is None else LEFTOVER


def _is_usage(error: xa.XenError) -> bool:
    """Tell wrong arguments, or a file that cannot be used, from what a domain or a host refuses."""
    if isinstance(error, xa.InvalidArgumentError):
        return error.errno is None  # not Xen's
    return isinstance(error, xa.SymbolError | xa.RecordingError | FileError)


def parser() -> argparse.ArgumentParser:
    """Make what parses the arguments: the manual page and shells' completions come from it, too."""
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
    """What a command's module has."""

    SUMMARY: str
    """What it does, in a line that begins small."""
    KEYS: str
    """What else there is to know, the keys of its JSON among it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""

    def run(self, options: argparse.Namespace, console: Console) -> None:
        """Run it."""


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
    """Add what may stand before the command as well as after it."""
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--connect",
        type=_backend,
        default=absent,
        metavar="{libxc,mock,replay:FILE}",
        help=f"the Xen this runs on (default), a mock of it with one domain, {MOCK_DOMAIN!r}, "
        "or what --record has written",
    )
    parser.add_argument(
        "--journal",
        default=absent,
        metavar="DIRECTORY",
        help=f"where journals are (default: {DIRECTORY}, on the mock none); with one the mock's "
        "domain has the views that state import has left",
    )
    parser.add_argument(
        "--record",
        default=absent,
        metavar="FILE",
        help="write all that is asked of Xen and what it answers to a new file, which may then "
        "hold what the guest keeps secret",
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
