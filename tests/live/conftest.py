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
from xenaltp2m.tools.symbols import Image

from .machine import EventsGuest

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


class Shelf:
    """Guests that tests share, by how many vCPUs they have, each as good as new for each test."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._guests: dict[int, EventsGuest] = {}

    def take(self, vcpus: int) -> EventsGuest:
        """Return the guest with so many vCPUs."""
        if vcpus not in self._guests:
            self._guests[vcpus] = EventsGuest(self._backend, vcpus)
        return self._guests[vcpus]

    def give_back(self, guest: EventsGuest) -> str | None:
        """Look at what a test has left; a guest that is not as it was is none for the next."""
        damage = guest.damage()
        if damage is not None:
            self._guests.pop(guest.vcpus).destroy()
        return damage

    def close(self) -> None:
        """Destroy them."""
        for guest in self._guests.values():
            guest.destroy()


@pytest.fixture(scope="session")
def shelf(backend: Backend) -> Iterator[Shelf]:
    """The guests that tests of events share."""
    # Their storms would leave dom0, on one CPU with them, a fifth of it.
    subprocess.run(["xl", "sched-credit2", "-d", "0", "-w", "4096"], check=True)
    shelf = Shelf(backend)
    yield shelf
    shelf.close()


@pytest.fixture
def events(shelf: Shelf, request: pytest.FixtureRequest) -> Iterator[EventsGuest]:
    """A guest that does what it is told, with one vCPU or the parameter's number; it must be
    left running, unwatched, with altp2m off."""
    guest = shelf.take(getattr(request, "param", 1))
    yield guest
    damage = shelf.give_back(guest)
    if damage is not None:
        pytest.fail(f"the test left {damage}")


@pytest.fixture
def another(shelf: Shelf) -> Iterator[EventsGuest]:
    """A second guest, of 4 vCPUs."""
    guest = shelf.take(4)
    yield guest
    damage = shelf.give_back(guest)
    if damage is not None:
        pytest.fail(f"the test left {damage}")


@pytest.fixture
def mortal(backend: Backend) -> Iterator[EventsGuest]:
    """A guest of its own, which may end."""
    guest = EventsGuest(backend, 1, "mortal")
    yield guest
    guest.destroy()
