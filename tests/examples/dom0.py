# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stands in for the ``xenaltp2m`` of a dom0 whose guests are those that the docs speak of.

    dom0.py ARGUMENT...
    dom0.py --script FILE ARGUMENT...

is the command line, or a program, as it is, but ``libxc`` opens a mock, whose guests do what is
listened to: win10 uses the pages that it is asked about, and CR3; others execute images. What would
go on until Ctrl-C ends after three hits.
"""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from xenaltp2m import cli
from xenaltp2m.backend import Backend, open_backend
from xenaltp2m.backend.mock import Instruction, MockBackend, WriteControlRegister
from xenaltp2m.handles import xen
from xenaltp2m.tools.doctor import Finding, Machine, examine_xen
from xenaltp2m.tools.migration import import_views
from xenaltp2m.types import PAGE_SIZE
from xenaltp2m.values.state import State

GUESTS = Path(__file__).parents[2] / "examples" / "guest"
ENDLESS, END = {"watch", "trace"}, ("--count", "3")
CR3 = 1
SMALLEST = 16 << 20
"""Bytes of a guest."""
IMAGES = {
    "linux": "paged",
    "hello": "hello",
    "racer": "racer",
    "checker": "checker",
    "DOMAIN": "hello",
}
CREATED_PAUSED = {"checker", "racer"}


def host(arguments: list[str]) -> MockBackend:
    """Make the mock host."""
    mock = MockBackend()
    words = [Path(arguments[1]).read_text() if "--script" in arguments[:1] else "", *arguments]
    gfns = [int(text, 0) for text in re.findall(r"0x[0-9a-f]+", " ".join(words))]
    pages = [gfn * PAGE_SIZE for gfn in gfns if gfn * PAGE_SIZE < 1 << 30]
    memory = max([SMALLEST, *(page + PAGE_SIZE for page in pages)])  # each page takes its time
    win10 = mock.add_domain("win10", memory_kib=memory >> 10)
    touches = [Instruction(0x1000 + at, 4, [("w", page)]) for at, page in enumerate(pages)]
    switches = [Instruction(0x2000, 3, effect=WriteControlRegister(CR3, root)) for root in (1, 2)]
    mock.load(win10, [*touches, *switches], loop=True)
    mock.domain_unpause(win10)
    for name, image in IMAGES.items():
        domid = mock.add_domain(name, vcpus=4 if image == "racer" else 1)
        mock.boot(domid, GUESTS / f"{image}.elf")
        if name not in CREATED_PAUSED:
            mock.domain_unpause(domid)
    return mock


def prepare(mock: MockBackend, arguments: list[str]) -> None:
    """Have in the domain what commands before this one have left there, or somebody else."""
    mock.name = "libxc"  # so that there are journals
    patch("xenaltp2m.handles.xen.DIRECTORY", Path(tempfile.mkdtemp())).start()
    if "save" in arguments or "verify" in arguments:
        domid = int(mock.name_to_domid("DOMAIN") or 0)
        mock.altp2m_set_domain_state(domid, True)
        mock.altp2m_set_mem_access(domid, mock.altp2m_create_view(domid, 7), 0x100, 1)
    if "export" in arguments:
        with patch.object(MockBackend, "close"):
            connection = xen.connect(mock)
            content = Path("views.json").read_bytes()
            import_views(connection, "DOMAIN", State.from_bytes(content))
            connection.close()


def main() -> int:
    """Run the command line there."""
    arguments = sys.argv[1:]

    mock = host(arguments)
    if "state" in arguments:
        prepare(mock, arguments)

    def opened(name: str) -> Backend:
        return mock if name == "libxc" else open_backend(name)

    def examined(which: str | None, machine: Machine) -> list[Finding]:
        with machine.connect() as connection:
            return examine_xen(connection, which)

    with (
        patch("xenaltp2m.handles.xen.open_backend", opened),
        patch("xenaltp2m.cli.doctor.examine", examined),  # but this machine, which is no dom0
    ):
        if arguments[:1] == ["--script"]:
            sys.argv = arguments[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
            return 0
        if ENDLESS & set(arguments) and END[0] not in arguments:
            arguments += END
        return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
