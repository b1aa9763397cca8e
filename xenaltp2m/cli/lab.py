# SPDX-License-Identifier: LGPL-2.1-or-later
"""``lab``: run real Xen in an emulator, from a source tree."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.cli.console import Console

SUMMARY = "run real Xen in an emulator, for experiments: from a source tree only"

KEYS = """\
The lab boots a hypervisor, a dom0 and guests in an emulator of a CPU with altp2m, and needs no Xen
on this machine. It is part of the source tree, and not of the installed package: it is built from
Debian's packages and from tests/lab. In a source tree,

  shell    is `make lab-shell`: a prompt in dom0, with this package and a running guest
  test     is `make test-xen`: the tests that run on real Xen

Both install what they need if they run as root on Debian; the first time takes minutes.
--xen selects the release: 4.14, 4.17 or 4.20.
"""

_TREE = Path(xa.__file__).resolve().parents[1]
_RELEASES = ((4, 14), (4, 17), (4, 20))
_PROGRAMS = {"shell": ("shell.py", "--install"), "test": ("suite.py",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.set_defaults(usage_error=parser.error, takes_xen=True)
    parser.add_argument("action", choices=tuple(_PROGRAMS), help="what to run")


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command: replace this process by the lab's own program."""
    del console
    if options.connect is not None or options.record is not None or options.json:
        options.usage_error("lab takes none of --connect, --record and --json")
    release = options.xen or (4, 17)
    if release not in _RELEASES:
        options.usage_error("the lab has Xen 4.14, 4.17 and 4.20")
    name, *arguments = _PROGRAMS[options.action]
    program = _TREE / "tests" / "lab" / name
    if not program.exists():
        raise xa.UnsupportedError(
            "the lab is part of the source tree, and this package was installed without it",
            hint=(
                f"in a source tree of {xa.__version__}: make lab-shell, make test-xen",
                "without a lab: xenaltp2m demo, and --connect mock of the other commands",
            ),
        )
    text = "{}.{}".format(*release)
    # exec replaces this process, so that the terminal and its signals belong to the lab alone.
    os.execv(sys.executable, [sys.executable, str(program), *arguments, "--xen", text])  # noqa: S606
