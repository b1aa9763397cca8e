# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connect to a command's host, and delay signals until the host is restored."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self, TypeAlias

import xenaltp2m as xa
from xenaltp2m.cli.console import Console
from xenaltp2m.handles.journal import find
from xenaltp2m.handles.signals import ENDING
from xenaltp2m.tools.state.capture import restore
from xenaltp2m.tools.symbols import Image
from xenaltp2m.values.gfns import Progress
from xenaltp2m.values.state import MAX_FILE, State

if TYPE_CHECKING:
    from xenaltp2m.backend.mock import Instruction, MockBackend

Script: TypeAlias = Callable[[int], "list[Instruction]"]
"""Makes the program of the mock's guest from the number of its pages."""

MOCK_DOMAIN = "guest"
_MOCK_VCPUS = 2
_MIB = 1 << 20
_MOCK_MEMORY = 16 * _MIB
_MOCK_MEMORY_LIMIT = 2048 * _MIB
_MOCK_SPARE = 512 * _MIB
"""The mock host's memory in addition to the guest's, for copies of pages."""


@contextlib.contextmanager
def connect(
    options: argparse.Namespace,
    console: Console,
    image: Image | None = None,
    script: Script | None = None,
    *,
    start: bool = True,
) -> Iterator[xa.Xen]:
    """Open the host that ``--connect`` names; on the mock, load the image into a guest.

    The mock's guest executes the image, if it is a PVH guest's and the simulator is installed.

    Args:
        options: The arguments.
        console: Shows the progress.
        image: The guest's image.
        script: Makes the program that each vCPU of the mock's guest repeats if it does not execute
            the image; None for none.
        start: Whether the mock's guest starts at once; else a guest that executes the image is
            paused until :func:`begin`.
    """
    if options.connect != "mock":
        with _host(options) as xen:
            yield xen
        return
    from xenaltp2m.backend import mock

    end = max((part.address + part.size for part in image.segments), default=0) if image else 0
    memory = max(_MOCK_MEMORY, -(-end // _MIB) * _MIB)
    if image is not None and memory > _MOCK_MEMORY_LIMIT:
        raise xa.SymbolError(
            f"{image.name} is loaded at up to {end:#x}: the mock's guest has at most "
            f"{_MOCK_MEMORY_LIMIT // _MIB} MiB"
        )
    backend = mock.MockBackend(
        options.xen or (4, 17), memory_pages=(memory + _MOCK_SPARE) // xa.PAGE_SIZE
    )
    domid = backend.add_domain(MOCK_DOMAIN, vcpus=_MOCK_VCPUS, memory_kib=memory // 1024)
    executes = False
    if image is not None:  # through a connection of its own: a recording begins after it
        loader = xa.connect(backend)
        try:
            with loader.domain(domid) as domain:
                executes = _load(backend, domain, image, console.progress("loading the image"))
        finally:
            loader.abandon()
    if options.journal:
        _import_again(backend, domid, Path(options.journal))
    with xa.connect(backend, journal=options.journal, record=options.record) as xen:
        if script is not None and not executes:
            for vcpu in range(_MOCK_VCPUS):
                backend.load(domid, script(memory // xa.PAGE_SIZE), vcpu, loop=True)
        options.start_guest = partial(backend.domain_unpause, domid)  # not a call of the agent
        if start or not executes:
            begin(options)
        try:
            yield xen
        finally:  # if the agent failed before it was ready
            if domid in backend.machine.domains and backend.domain(domid).pauses:
                backend.domain_unpause(domid)


def begin(options: argparse.Namespace) -> None:
    """Start the mock's guest, now that the agent is ready; any other guest is left as it is.

    It executes at once: a short guest would end before the agent receives any event.
    """
    start_guest = getattr(options, "start_guest", None)
    options.start_guest = None
    if start_guest is not None:
        start_guest()


def _host(options: argparse.Namespace) -> xa.Xen:
    try:
        return xa.connect(options.connect, journal=options.journal, record=options.record)
    except xa.XenError as error:
        if error.op == "interface_open":
            error.add_note("hint: without Xen: --connect mock, or xenaltp2m demo")
        raise


def _import_again(backend: MockBackend, domid: int, directory: Path) -> None:
    """Restore the views that an earlier command imported into its mock, which ended with it."""
    loader = xa.connect(backend)
    try:
        with loader.domain(domid) as domain:
            kept = [found for found in find(directory, domid, domain.uuid) if found.kept]
            if kept:
                altp2m = domain.altp2m()
                restore(altp2m, State.from_bytes(kept[0].state(MAX_FILE)))
                altp2m.abandon()
                domain.abandon()
    finally:
        loader.abandon()


def is_altp2m_active(domain: xa.Domain, console: Console) -> bool:
    """Return whether altp2m is on before this command switches it on, and warn if it is."""
    active = domain.altp2m_active
    if active:
        console.warn(
            "altp2m is on already, because another agent uses it or was killed: "
            "the vCPUs leave their views while this command runs"
        )
    return active


def note_undone(console: Console, *undone: str, was_active: bool) -> None:
    """Print what was undone, altp2m included, unless it was on before."""
    done = undone if was_active else (*undone, "altp2m off")
    console.note(f"Undone: {', '.join(done)}.")


def _load(backend: MockBackend, domain: xa.Domain, image: Image, progress: Progress) -> bool:
    """Load the image into the guest's memory; return whether the guest executes it."""
    with contextlib.suppress(ImportError, xa.InvalidArgumentError):
        backend.boot(domain.domid, image.name)
        return True
    total, done = sum(len(part.data) for part in image.segments), 0
    for part in image.segments:
        for at in range(0, len(part.data), _MIB):
            piece = part.data[at : at + _MIB]
            domain.memory.write(part.address + at, piece)
            done += len(piece)
            progress(done, total)
    return False


class BlockedSignals:
    """Blocks Ctrl-C, SIGTERM and SIGHUP, so that no change is left half done or half undone.

    Nothing is blocked before :meth:`hold_back`; signals that arrived end with the context.
    """

    def __init__(self) -> None:
        self._before: set[int | signal.Signals] | None = None
        # Linux keeps a blocked signal even if it is ignored, as SIGHUP is under nohup.
        self._ending = [one for one in ENDING if signal.getsignal(one) is not signal.SIG_IGN]

    def __enter__(self) -> Self:
        return self

    def hold_back(self) -> None:
        """Block the signals from now on; those that are ignored stay ignored."""
        # This call first: the one that blocks raises what is pending already.
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, self._ending)

    def arrived(self, seconds: float) -> bool:
        """Wait for a signal, at most so many seconds; return whether one came."""
        return signal.sigtimedwait(self._ending, seconds) is not None

    def awaited(self, duration: float | None) -> Iterator[None]:
        """Yield each second until a signal comes or the duration is over; None waits for ever."""
        rest = math.inf if duration is None else duration
        while rest > 0 and not self.arrived(min(rest, 1.0)):
            rest -= 1.0
            yield

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            while self.arrived(0):
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


class Interrupted(KeyboardInterrupt):
    """A signal came during output."""


class StopRequest:
    """Notes Ctrl-C, SIGTERM and SIGHUP, so that a running command ends in order.

    Nothing is noted before :meth:`hold_back`. Only output is interrupted, because it may block.

    Attributes:
        came: Whether a signal has come.
        wake: Called when a signal comes.
    """

    def __init__(self) -> None:
        self.came = False
        self.wake: Callable[[], None] = lambda: None
        self._printing = False
        self._before: dict[signal.Signals, signal.Handlers | Callable[..., object]] = {}

    def __enter__(self) -> Self:
        return self

    def hold_back(self) -> None:
        """Note the signals from now on; one that is ignored stays ignored."""
        for number in ENDING:
            before = signal.getsignal(number)
            if before is not None and before is not signal.SIG_IGN:
                assert not isinstance(before, int) or before is signal.SIG_DFL
                self._before[number] = before
                signal.signal(number, self._note)

    def printing(self, act: Callable[[], None]) -> None:
        """Call a function that may block, unless a signal has come; a signal interrupts it."""
        try:
            try:
                self._printing = True
                if not self.came:
                    act()
            finally:
                self._printing = False
        except Interrupted:
            pass

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.came = True
        self.wake()
        if self._printing:
            self._printing = False
            raise Interrupted

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
