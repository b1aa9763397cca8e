# SPDX-License-Identifier: LGPL-2.1-or-later
"""A monitor's connection to Xen: the ring, its event channel, and the descriptors to wait on."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable, Iterator
from errno import EMFILE
from functools import partial
from pathlib import Path

from xenaltp2m.abi.ring import Ring
from xenaltp2m.abi.vm_event import layout
from xenaltp2m.errors import BusyError, InvalidArgumentError, XenError, from_errno
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.probe import has_ring

_LOG = logging.getLogger(__package__)


class RingConnection:
    """An enabled monitor's ring and event channel, and the descriptor that :meth:`stop` writes to.

    Attributes:
        version: Xen's vm_event interface version.
        attached: Whether the ring and the descriptors may be used; False after a close that failed.
        stopping: Whether :meth:`stop` was called for the iteration.
        enabled: Whether the monitor is enabled in Xen.
        notified: The number of responses that Xen was notified of, modulo 2^32.
        ring: The ring.
        poller: The epoll object that waits for the event channel and for :meth:`stop`.
        signalled: The result of the poller if only the event channel has fired.
        leave_loop: Removes the poller from an asyncio event loop that waits for it.
    """

    ring: Ring
    poller: select.epoll

    def __init__(self, context: DomainContext, version: int) -> None:
        self._context, self.version = context, version
        self._backend = context.backend
        self._domid = int(context.domid)
        self.attached = self.stopping = self.enabled = False
        self.notified = 0
        self.leave_loop: Callable[[], object] | None = None
        self._wakeup = -1
        self._stop_lock = threading.RLock()  # a signal handler may stop() within a stop()
        self._own = UndoList()
        """Frees this process's resources: its ring mapping, event channel and descriptors."""

    def __repr__(self) -> str:
        return f"<RingConnection of domain {self._domid}>"

    # Opening.

    def open_files(self) -> None:
        """Open the eventfd for :meth:`stop`, and the epoll object.

        Raises:
            XenError: The process has too many files open.
        """
        try:
            self._wakeup = self._own.do(
                "",
                partial(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
                lambda _: self._close_wakeup(),
            )
            self.poller = self._own.do("", select.epoll, select.epoll.close)
        except OSError as error:
            raise from_errno("monitor_wait", error.errno or EMFILE, domid=self._domid) from error
        self.poller.register(self._wakeup, select.EPOLLIN)
        self.poll = self._backend.clock.polling(self.poller)

    def open(self, undo: UndoList, disable: Callable[[], None]) -> None:
        """Enable the monitor and set up its ring, while the domain is paused.

        A guest that is restricted already may write a request at once, and clearing the ring would
        lose it.

        Args:
            undo: Receives the step that disables the monitor.
            disable: That step, after the ring has been set up.

        Raises:
            BusyError: A monitor is active already.
        """
        backend, domid = self._backend, self._domid
        with self._context.paused():
            try:
                # libxc pauses the domain, too, during the call (xc_vm_event_enable, 4.14 to 4.22).
                journal = self._context.journal
                pauses = journal.record.pauses
                with journal.about_to(monitor=True, pauses=pauses + 1):
                    remote, page = backend.monitor_enable(domid)
                journal.undone(pauses=pauses)
            except BusyError as error:
                killed = f"if its agent was killed: xenaltp2m rescue {domid}"
                error.hint = (*_other_agents(), killed, *error.hint)
                raise
            self.enabled = True
            undo.push(f"monitor of domain {domid}", self.give_back)
            self._own.push(f"ring of domain {domid}", partial(backend.monitor_unmap_ring, page))
            self.ring = Ring(page, layout(self.version).size)
            self._own.push("", self.ring.release)
            self.ring.clear()
            self._channel = backend.evtchn_open()
            self._own.push(
                f"event channel of domain {domid}", partial(backend.evtchn_close, self._channel)
            )
            self._port = backend.evtchn_bind_interdomain(self._channel, domid, remote)
            calls = backend.evtchn_calls(self._channel, self._port)
            self.pending, self.unmask, self.notify = calls
            descriptor = backend.evtchn_fd(self._channel)
            self.poller.register(descriptor, select.EPOLLIN)
            self.signalled = [(descriptor, select.EPOLLIN)]
            undo.drop()
            undo.push(f"monitor of domain {domid}", disable)
            self.attached = True

    # While it is open.

    def stop(self) -> None:
        """Stop the running iteration, or the next one; from any thread or signal handler."""
        with self._stop_lock:
            if self.attached:
                self.stopping = True
                os.eventfd_write(self._wakeup, 1)

    @contextlib.contextmanager
    def stop_held_back(self) -> Iterator[None]:
        """Block a :meth:`stop` of another thread during the ``with`` block."""
        with self._stop_lock:
            yield

    def end_stop(self) -> None:
        """Clear a :meth:`stop`, because its iteration has ended."""
        if self.stopping:
            self.stopping = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)

    def heed(self, ready: list[tuple[int, int]]) -> bool:
        """Acknowledge what the poller has returned, except a stop.

        Returns:
            Whether the event channel has fired.
        """
        signalled = False
        for descriptor, _ in ready:
            if descriptor != self._wakeup:
                self.pending()
                self.unmask()
                signalled = True
        return signalled

    def flush(self) -> None:
        """Publish the responses and notify Xen, which has processed them when this returns."""
        shown = self.ring.publish()
        if shown != self.notified:
            if self.notify() < 0:
                self._backend.evtchn_notify(self._channel, self._port)  # raises, with the reason
            self.notified = shown

    # Closing.

    def end_loop(self) -> None:
        """Remove the poller from the asyncio event loop, before its descriptor is reused.

        A generator that was left by ``break`` ends only after its monitor was closed.
        """
        leave, self.leave_loop = self.leave_loop, None
        if leave is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                leave()

    def give_back(self) -> None:
        """Disable the monitor in Xen, which frees the ring."""
        try:
            self._backend.monitor_disable(self._domid)
        except InvalidArgumentError:
            if has_ring(self._backend, self._domid):
                raise  # else another program has disabled it
        self.enabled = False
        self._context.journal.undone(monitor=False)
        _LOG.info("<Monitor of domain %d>: detached", self._domid)

    def let_go(self) -> None:
        """Free the ring and the event channel, unless they are needed to try again.

        Raises:
            BusyError: The monitor is still enabled.
        """
        if self.enabled:
            raise BusyError(
                f"<Monitor of domain {self._domid}> is still enabled", domid=self._domid
            )
        self._detach()
        self._own.unwind(f"closing <Monitor of domain {self._domid}>")

    def abandon(self) -> None:
        """Free this process's resources: the domain is gone."""
        self._detach()
        with contextlib.suppress(XenError):
            self._own.unwind(f"abandoning <Monitor of domain {self._domid}>")

    def _detach(self) -> None:
        """Mark the ring and the descriptors unusable, before they are freed."""
        self.attached = False
        self.end_loop()

    def _close_wakeup(self) -> None:
        with self._stop_lock:  # the descriptor's number may be reused at once
            wakeup, self._wakeup = self._wakeup, -1
            os.close(wakeup)


def _other_agents() -> Iterator[str]:
    """Name processes that may have the monitor open: those with an open event channel."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            files = [str(link.readlink()) for link in (directory / "fd").iterdir()]
            name = (directory / "comm").read_text().strip()
        except OSError:
            continue
        if "/dev/xen/evtchn" in files and not name.startswith(("xenstored", "xenconsoled", "qemu")):
            who = (
                "this process"
                if int(directory.name) == os.getpid()
                else f"process {directory.name}"
            )
            yield f"{who} ({name}) has an event channel open and may be the agent"
