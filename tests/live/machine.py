# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that runs tests/lab/guest/events.elf, and how an agent is watched at work on it."""

from __future__ import annotations

import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.abi.ring import SLOTS
from xenaltp2m.backend import Backend
from xenaltp2m.tools.symbols import Image

from .mailbox import Mailbox

IMAGE = Path("tests/lab/guest/events.elf")
PATIENCE = 20.0  # seconds of the emulated machine after which nothing is to come
_IDLE = 0.003


class EventsGuest:
    """The guest: it does what its mailboxes, one per vCPU, are told."""

    def __init__(self, backend: Backend, vcpus: int, name: str | None = None) -> None:
        self.vcpus = vcpus
        self.name = name or f"events-{vcpus}"
        config = [f'kernel="{IMAGE.resolve()}"', f'name="{self.name}"']
        config += [f'on_{event}="preserve"' for event in ("crash", "poweroff", "reboot")]
        subprocess.run(
            ["xl", "create", "-q", "-e", f"/lab/external-{vcpus}.cfg", *config], check=True
        )
        self.xen = xa.Xen(backend)
        self.backend = backend
        self.dom = self.xen.domain(self.name)
        self.domid = int(self.dom.domid)
        self.image = Image.open(IMAGE)
        self.boxes = [Mailbox(self.dom, self.image, vcpu) for vcpu in range(vcpus)]
        end = time.monotonic() + PATIENCE
        while not all(box.up() for box in self.boxes):
            assert time.monotonic() < end, "a vCPU has not come up"
            time.sleep(0.001)

    @property
    def box(self) -> Mailbox:
        """The first vCPU's."""
        return self.boxes[0]

    def address(self, symbol: str) -> int:
        """Where something is."""
        return int(self.image.address(symbol))

    def gfn(self, symbol: str) -> int:
        """The page of something that has one of its own."""
        return self.box.gfn(symbol)

    def word(self, symbol: str, offset: int = 0) -> int:
        """Four bytes of the guest's memory."""
        return int.from_bytes(self.dom.memory.read(self.address(symbol) + offset, 4), "little")

    def put_word(self, symbol: str, value: int, offset: int = 0) -> None:
        """Write four bytes."""
        self.dom.memory.write(self.address(symbol) + offset, value.to_bytes(4, "little"))

    def beats(self) -> bool:
        """Whether every vCPU goes round its loop."""
        return all(box.alive() for box in self.boxes)

    def damage(self) -> str | None:
        """What keeps the guest from being as good as new, if anything does."""
        info = self.dom.context.find()
        if info is None or info.dying or info.shutdown:
            return "a guest that has ended"
        if info.paused:
            return "the guest paused"
        if self.dom.altp2m_active:
            return "altp2m on"
        if not self.beats():
            return "a vCPU that stands still"
        try:
            self.dom.monitor().close()
        except xa.XenError as error:
            return f"a monitor: {error}"
        for box in self.boxes:
            if box.busy():
                box.answer(PATIENCE)
            box.storm(None)
        return None

    def destroy(self) -> None:
        """End it, if it has not ended."""
        subprocess.run(["xl", "destroy", self.name], check=False, capture_output=True)
        self.dom.abandon()
        self.xen.abandon()


@contextmanager
def storm(guest: EventsGuest, function: str = "target") -> Iterator[None]:
    """Have every vCPU call a function for ever, within the block."""
    for box in guest.boxes:
        box.storm(function)
    try:
        yield
    finally:
        for box in guest.boxes:
            box.storm(None)


def watch(
    guest: EventsGuest,
    monitor: xa.Monitor,
    name: str,
    arg: int | str = 0,
    value: int = 0,
    *,
    vcpu: int = 0,
    answer: Callable[[xa.Event], xa.Response | None] = lambda _: None,
) -> list[xa.Event]:
    """Make a vCPU do something and answer what comes of it, until it is done.

    Returns:
        The events, in order.
    """
    seen: list[xa.Event] = []

    def handler(event: xa.Event) -> xa.Response | None:
        seen.append(event)
        if not box.busy():
            monitor.stop()
        return answer(event)

    box = guest.boxes[vcpu]
    box.command(name, arg, value, wait=False)
    end = time.monotonic() + PATIENCE
    while box.busy():
        if time.monotonic() > end:
            raise TimeoutError(f"{name} is not done; so far {seen[:20]}")
        monitor.run(handler, timeout=_IDLE)
    return [*seen, *islice(monitor.events(timeout=0), SLOTS)]  # of vCPUs that did not wait


def wait_until(condition: Callable[[], bool]) -> None:
    """Let the guest run until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it has not come to be")
        time.sleep(0.001)


class Process:
    """An agent in a process of its own, forked from this one.

    Attributes:
        pid: Its number.
        status: What it has exited with, as a shell tells it, once it was waited for.
    """

    def __init__(self, name: str, agent: Callable[[xa.Domain, Callable[[], None]], object]) -> None:
        """Start it.

        Args:
            name: The domain's.
            agent: Gets the domain, and what to call once the process may be stopped.
        """
        ready, say = os.pipe()
        self.status = -1
        self.pid = os.fork()
        if not self.pid:
            os._exit(_agent(name, agent, say))
        os.close(say)
        with open(ready, "rb") as pipe:  # noqa: PTH123
            self.ready = pipe.read(1) == b"!"

    def wait(self, signal: int | None = None) -> int:
        """Wait for its end, after a signal if one is given; return its status."""
        if signal is not None:
            os.kill(self.pid, signal)
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status


def _say(pipe: int) -> None:
    os.write(pipe, b"!")


def _agent(name: str, agent: Callable[[xa.Domain, Callable[[], None]], object], say: int) -> int:
    """Be the process; return its exit status."""
    try:
        with xa.connect() as xen, xen.domain(name) as dom:
            agent(dom, lambda: _say(say))
    except KeyboardInterrupt:
        return 128 + 2
    except SystemExit as over:
        return int(over.code or 0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0
