# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the pictures of the docs anew, from real runs: ``make pictures``."""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from html import escape
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.text import Text

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.state.svg import svg
from xenaltp2m.tools.symbols import Image
from xenaltp2m.values.state import State

HERE = Path(__file__).parent
TREE = HERE.parents[1]
CHECKER = TREE / "examples" / "guest" / "checker.elf"
HITS = 100
WIDTH = 100
SCREENS = {
    "demo.svg": "xenaltp2m demo",
    "trace.svg": (
        "xenaltp2m --connect mock trace guest hit:u --returns --count 6 "
        "--symbols examples/guest/racer.elf"
    ),
    "state.svg": "xenaltp2m state show views.json",
    "refused.svg": "xenaltp2m --connect mock views win10",
}
"""What is typed, and where the screen goes that it leaves."""


def views() -> str:
    """Draw the views of a hooked guest."""
    return svg(state())


def state() -> State:
    """Hook a simulated guest, let it run, and capture its views while the hooks are there."""
    image, mock = Image.open(CHECKER), MockBackend()
    domid = mock.add_domain("checker", memory_kib=16 << 10)
    mock.boot(domid, CHECKER)
    with (
        xa.connect(mock) as xen,
        xen.domain(domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        xa.Breakpoints(altp2m, monitor) as breakpoints,
    ):
        hits = count(1)

        def note(_: xa.Hit) -> None:
            if next(hits) == HITS:
                monitor.stop()

        for name in ("main", "target", "target2"):
            breakpoints.insert(image.physical(image.symbol(name)), note)
        data = altp2m.create_view(label="read only")
        data.set_access(range(0x103, 0x107), xa.Access.R)
        data.set_access(range(0x400, 0xC00), xa.Access.N2RWX)
        data.set_suppress_ve(range(0x103, 0x105), False)
        data.set_visibility(False)
        mock.domain_unpause(domid)
        monitor.run(breakpoints)
        return xa.capture(altp2m, verify=True)


def typed(command: str) -> Iterator[bytes]:
    """Run a command in a terminal, and yield what it writes."""
    child, terminal = pty.fork()
    if not child:
        colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(WIDTH)}
        program, *arguments = shlex.split(command)
        os.execvpe(  # noqa: S606
            sys.executable,
            [sys.executable, "-m", program, *arguments],
            os.environ | colours | {"PYTHONPATH": str(TREE)},
        )
    while True:
        try:
            yield os.read(terminal, 1 << 16)
        except OSError:  # it has ended
            os.waitpid(child, 0)
            return


def screen(command: str, name: str) -> str:
    """Draw what a command leaves on the screen."""
    written = b"".join(typed(command)).decode().replace("\r\n", "\n")
    left = re.sub(r"\r\x1b\[K[^\n\r]*(?=\r)", "", written)  # a status that was written over
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", "bold"), soft_wrap=True)
    console.print(Text.from_ansi(left.replace("\r\x1b[K", "").rstrip()), soft_wrap=True)
    drawn = console.export_svg(title="xenaltp2m", unique_id=name)
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(command)}" ', 1)
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)  # nothing from elsewhere
    return "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"


def main() -> None:
    """Write them all."""
    (HERE / "views.svg").write_text(views(), encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        Path("views.json").write_bytes(state().to_bytes())
        Path("examples").symlink_to(TREE / "examples")
        for name, command in SCREENS.items():
            drawn = screen(command, name.removesuffix(".svg"))
            (HERE / name).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
