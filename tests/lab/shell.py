# SPDX-License-Identifier: LGPL-2.1-or-later
"""A prompt in dom0 of real Xen, with the package installed and a guest running.

    shell.py --xen 4.17

The terminal is dom0's serial console: every key goes there, Ctrl-C too. Ctrl-] ends the lab.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import sys
import tempfile
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from boot import STATUS_OF_LAB, Boot, Machine, snapshot
from images import HERE, RELEASES, Images, LabError, cache_dir, images, locked, require, say
from run import pack

TREE = HERE.parent.parent
QUIT = b"\x1d"  # Ctrl-]
GUEST = """\
name = "guest"
type = "pvh"
kernel = "/job/{name}"
memory = 16
vcpus = 1
altp2m = "external"
"""


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Passes each key on as it is typed, and puts the terminal back afterwards."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def connect(machine: Machine, console: int) -> None:
    """Carries bytes between the terminal and the console until either ends."""
    shown = b""
    while machine.running():
        ready, _, _ = select.select([0, console], [], [], 0.5)
        if 0 in ready:
            typed = os.read(0, 1024)
            if not typed or QUIT in typed:
                return
            os.write(console, typed)
        if console in ready:
            output = os.read(console, 4096)
            shown = (shown + output)[-64:]
            if b"LAB: job ended" in shown:
                return
            os.write(1, output.replace(b"\n", b"\r\n").replace(b"\r\r\n", b"\r\n"))


def start(arguments: argparse.Namespace, built: Images) -> None:
    """Resumes a machine with the console on a pseudo terminal, and connects to it."""
    boot = Boot.of(built, arguments.xen_option, arguments.dom0_option)
    state = snapshot(boot)
    guest: Path = arguments.guest
    with (
        locked("machine", "the emulator"),
        tempfile.TemporaryDirectory(prefix="shell-", dir=cache_dir()) as name,
    ):
        work = Path(name)
        (work / "guest.cfg").write_text(GUEST.format(name=guest.name))
        columns, rows = shutil.get_terminal_size()
        disk = work / "job.img"
        pack(
            disk,
            built,
            arguments.wheel or [TREE / "xenaltp2m"],
            [*arguments.put, str(guest), str(work / "guest.cfg")],
            f"lab-shell {rows} {columns} {guest.name}\n",
        )
        machine = Machine(boot, work)
        console, other_end = os.openpty()
        try:
            machine.resume(state, disk, console=os.ttyname(other_end))
            with raw_terminal():
                connect(machine, console)
        finally:
            machine.stop()
            os.close(console)
            os.close(other_end)
    print()
    say("over")


def main() -> int:
    """Runs the shell from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", choices=[*RELEASES], default="4.17", help="release to boot")
    parser.add_argument(
        "--wheel", action="append", type=Path, default=[], help="wheel to install, not the tree"
    )
    parser.add_argument("--put", action="append", default=[], metavar="SOURCE[:NAME]")
    parser.add_argument("--guest", type=Path, default=TREE / "examples/guest/hello.elf")
    parser.add_argument("--xen-option", action="append", default=[], metavar="OPTION")
    parser.add_argument("--dom0-option", action="append", default=[], metavar="OPTION")
    parser.add_argument("--install", action="store_true", help="apt-get install what is missing")
    arguments = parser.parse_args()
    if not os.isatty(0):
        parser.error("the shell needs a terminal; run.py runs a command without one")
    try:
        require(arguments.install)
        start(arguments, images(arguments.xen))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return STATUS_OF_LAB
    return 0


if __name__ == "__main__":
    sys.exit(main())
