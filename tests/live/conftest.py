# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only a real hypervisor can show: guests that run. These tests run in the lab's dom0."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.backend import Backend, open_backend
from xenaltp2m.symbols import Image

if os.environ.get("XENALTP2M_LIVE") != "1":
    collect_ignore_glob = ["*.py"]

IMAGE = Path("examples/guest/hello.elf")
_SETTLE = 0.05  # seconds of the emulated machine: about ten thousand rounds of the guest


class Guest:
    """A PVH guest that runs examples/guest/hello.elf: calls ``target`` for ever, counting."""

    def __init__(self, dom: xa.Domain, gfns: dict[str, int]) -> None:
        self.dom = dom
        self.domid = int(dom.domid)
        self.target, self.data, self.counter = (
            gfns[name] for name in ("target", "data", "counter")
        )

    def count(self) -> int:
        """How often ``target`` was called."""
        return int.from_bytes(self.dom.memory.read(self.counter << 12, 4), "little")

    def run(self) -> int:
        """Let the guest run for a moment; return how often it called ``target`` meanwhile."""
        before = self.count()
        backend = self.dom.xen.backend
        backend.domain_unpause(self.domid)
        time.sleep(_SETTLE)
        backend.domain_pause(self.domid)
        return self.count() - before

    def crashed(self) -> bool:
        """Whether the domain has crashed (``SHUTDOWN_crash`` is 3)."""
        info = self.dom.info()
        return info.shutdown and info.shutdown_reason == 3


@pytest.fixture(scope="session")
def backend() -> Iterator[Backend]:
    """The real one."""
    backend = open_backend("libxc")
    yield backend
    backend.close()


@pytest.fixture
def guest(backend: Backend) -> Iterator[Guest]:
    """A guest of its own, started and paused again, altp2m off."""
    config = [f'kernel="{IMAGE.resolve()}"', 'name="live"', 'on_crash="preserve"']
    subprocess.run(["xl", "create", "-p", "-q", "-e", "/lab/external-1.cfg", *config], check=True)
    xen = xa.Xen(backend)
    dom = xen.domain("live")
    image = Image.open(IMAGE)
    gfns = {name: image.gfns(name)[0] for name in ("target", "data", "counter")}
    guest = Guest(dom, gfns)
    assert guest.run() > 0
    yield guest
    subprocess.run(["xl", "destroy", str(guest.domid)], check=True)
    dom.abandon()
    xen.abandon()
