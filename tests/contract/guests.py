# SPDX-License-Identifier: LGPL-2.1-or-later
"""Example guests that execute, in the simulator or on Xen, and what their counters say."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xenaltp2m as xa
from tests.thorough import THOROUGH
from xenaltp2m.backend import open_backend
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.symbols import Image

GUESTS = Path(__file__).resolve().parents[2] / "examples" / "guest"
MEMORY_KIB = 16 << 10
LINE = 64
ON_XEN = os.environ.get("XENALTP2M_LIVE") == "1"
CALLS = int(os.environ.get("XENALTP2M_CALLS", "300" if ON_XEN or THOROUGH else "100"))
"""How many calls of a function are counted."""
PATIENCE = 60 + CALLS / 100
"""Seconds after which what is waited for does not come: the lab's machine is slow."""
_STEPS = 1_500_000
_QUIET = 0.05


def kernel_of(name: str) -> Path:
    """An example's image, or one that a test has written."""
    return Path(name) if name.endswith(".elf") else GUESTS / f"{name}.elf"


def write_image(path: Path, first: int, content: bytes) -> None:
    """Write an image of one segment, which is entered at its start: PVH, 32-bit, paging off."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", first)
    at = 52 + 2 * 32
    head = b"\x7fELF\1\1\1" + bytes(9)
    head += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, first, 52, 0, 0, 52, 32, 2, 0, 0, 0)
    for kind, offset, place, size in [(1, at, first, len(content)), (4, at + len(content), 0, 20)]:
        head += struct.pack("<8I", kind, offset, place, place, size, size, 7, 1)
    path.write_bytes(head + content + note)


class RunningGuest:
    """A guest, paused before its first instruction."""

    def __init__(
        self, xen: xa.Xen, domid: int, name: str, vcpus: int, start: Callable[[], None]
    ) -> None:
        self.xen, self.vcpus, self.start = xen, vcpus, start
        self.dom = xen.domain(domid)
        self.image = Image.open(kernel_of(name))

    def address(self, symbol: str) -> int:
        """Where something is, guest-physical."""
        return self.image.physical(self.image.symbol(symbol))

    def words(self, symbol: str, count: int = 1, size: int = 4) -> tuple[int, ...]:
        """Numbers in the guest's memory."""
        data = self.dom.memory.read(self.address(symbol), count * size)
        return struct.unpack(f"<{count}{'I' if size == 4 else 'Q'}", data)

    def lines(self, symbol: str) -> list[int]:
        """A number of each vCPU."""
        return list(self.words(symbol, self.vcpus * LINE // 4)[:: LINE // 4])

    def write_word(self, symbol: str, value: int) -> None:
        """Set a number in the guest's memory."""
        self.dom.memory.write(self.address(symbol), value.to_bytes(4, "little"))

    def writable_gfns(self) -> set[int]:
        """Pages that the guest itself writes to."""
        return {
            gfn
            for segment in self.image.segments
            if segment.writable
            for gfn in range(segment.address >> 12, (segment.address + segment.size - 1 >> 12) + 1)
        }

    def contents(self) -> dict[int, bytes]:
        """Each page of the guest's own memory."""
        pages = MEMORY_KIB // 4
        whole = self.dom.memory.read(0, pages * xa.PAGE_SIZE)
        return {gfn: whole[gfn * 4096 : (gfn + 1) * 4096] for gfn in range(pages)}


def serve(
    monitor: xa.Monitor, handler: Callable[[xa.Event], xa.Response | None], done: Callable[[], bool]
) -> None:
    """Answer events until something is so; handlers may stop the monitor to have it looked at."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, "it does not come"
        monitor.run(handler, timeout=_QUIET)


@contextmanager
def running(host: str, name: str, vcpus: int = 1) -> Iterator[RunningGuest]:
    """Have a guest within the block; ``host`` is "xen", or the mock at a release."""
    if host == "xen":
        kernel, name = kernel_of(name), Path(name).stem
        options = [f'kernel="{kernel}"', f'name="{name}"', f"vcpus={vcpus}"]
        options += [f'on_{event}="preserve"' for event in ("crash", "poweroff", "reboot")]
        command = ["xl", "create", "-p", "-q", "-e", "/lab/external-1.cfg", *options]
        subprocess.run(command, check=True)
        try:
            with xa.Xen(open_backend("libxc")) as xen:
                [domid] = [
                    info.domid for info in xen.domains() if xen.domain(info.domid).name == name
                ]
                yield RunningGuest(
                    xen, domid, str(kernel), vcpus, lambda: xen.backend.domain_unpause(int(domid))
                )
        finally:
            subprocess.run(["xl", "destroy", name], check=True)
        return
    release = tuple(map(int, host.removeprefix("mock-").split(".")))
    mock = MockBackend((release[0], release[1]))
    mock.steps_at_once = _STEPS
    made = mock.add_domain(name, vcpus=vcpus, memory_kib=MEMORY_KIB)
    mock.boot(made, kernel_of(name))
    with xa.connect(mock) as xen:
        yield RunningGuest(xen, made, name, vcpus, lambda: mock.domain_unpause(made))


@contextmanager
def hooked(
    guest: RunningGuest, *, fast: bool = True, int3: bool = True
) -> Iterator[tuple[xa.Monitor, Breakpoints]]:
    """Have breakpoints in it."""
    with (
        guest.dom.altp2m() as altp2m,
        guest.dom.monitor() as monitor,
        Breakpoints(altp2m, monitor, fast=fast, int3=int3) as breakpoints,
    ):
        yield monitor, breakpoints
