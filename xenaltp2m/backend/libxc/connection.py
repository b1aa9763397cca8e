# SPDX-License-Identifier: LGPL-2.1-or-later
"""The connection to a host: its C libraries, their handles, and how calls are made and undone."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from xenaltp2m import errors
from xenaltp2m.abi.releases import Release, release
from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.clib import NULL, checked, constant, ffi, refusal
from xenaltp2m.backend.libxc.loader import Library, Loader
from xenaltp2m.errors import UnsupportedError

_CLOSED = "the backend is closed"
_FORKED = "the backend was opened before this process was forked: connect again in the child"

_opened: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in list(_opened):
        connection.disown()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Connection:
    """The libraries and handles that all calls share.

    A part of the backend that has resources of its own creates their table before it calls
    ``__init__`` here, which closes everything when it fails.
    """

    def __init__(self, loader: Loader | None = None) -> None:
        """Open libxenctrl and ask which Xen is running."""
        self._loader = loader or Loader(ffi.dlopen, os.environ)
        self._library = self._loader.xenctrl()
        self._lock = threading.Lock()
        self._undo: list[Callable[[], object]] = []
        self._handles: dict[str, Any] = {}
        self._closed: str | None = None

        self._c: Any = clib.Functions("xc_", lambda: self._library)
        self._toollog: Any = self._companion("xtl_", "libxentoollog")
        self._xencall: Any = self._companion("xencall", "libxencall")
        self._evtchn: Any = self._companion("xenevtchn_", "libxenevtchn")
        self._foreignmemory: Any = self._companion("xenforeignmemory_", "libxenforeignmemory")
        self._xenstore: Any = self._companion("xs_", "libxenstore")
        self._light: Any = self._companion("libxl_", "libxenlight")
        self._libc: Any = clib.Functions("", lambda: Library("libc", ffi.dlopen(None)))

        try:
            self._log = clib.Log(self._toollog, self._libc, self._undo)
            loggers = self._log.logger, self._log.logger
            self._xch = self._open(self._c, "xc_interface_open", "xc_interface_close", *loggers, 0)
            self._release = self._running_release()
        except BaseException:
            self.close()
            raise
        _opened.add(self)

    def _companion(self, prefix: str, which: str) -> clib.Functions:
        return clib.Functions(prefix, lambda: self._loader.companion(which, self._library))

    def _open(self, library: Any, opens: str, closes: str, *args: Any) -> Any:
        """Open a library's handle, to be closed at the end."""
        handle = getattr(library, opens)(*args)
        if handle == NULL:
            raise self._log.annotate(refusal(opens))
        self._undo.append(partial(checked, closes, getattr(library, closes), handle))
        return handle

    def _handle(self, library: Any, opens: str, closes: str) -> Any:
        """Return a library's handle, opened when it is first needed."""
        with self._lock:
            if opens not in self._handles or self._closed:
                logger = self._log.logger
                self._handles[opens] = self._open(library, opens, closes, logger, 0)
            return self._handles[opens]

    def _xencall_handle(self) -> Any:
        return self._handle(self._xencall, "xencall_open", "xencall_close")

    def _foreignmemory_handle(self) -> Any:
        library = self._foreignmemory
        return self._handle(library, "xenforeignmemory_open", "xenforeignmemory_close")

    def _running_release(self) -> Release:
        version = self._c.xc_version(self._xch, constant("XENVER_version"), NULL)
        if version < 0:
            raise refusal("xc_version")
        try:
            return release(version >> 16, version & 0xFFFF)
        except ValueError as error:
            raise UnsupportedError(str(error), op="connect") from None

    @property
    def release(self) -> Release:
        """The running hypervisor's release."""
        return self._release

    def supports(self, function: str) -> bool:
        """Tell whether C's ``function`` can be called: the library that has it decides."""
        others = self._evtchn, self._foreignmemory, self._xencall, self._xenstore, self._light
        for functions in (self._c, *others):
            if function.startswith(functions.prefix):
                try:
                    return not isinstance(getattr(functions, function), clib.Absent)
                except (AttributeError, errors.LibraryError):
                    return False
        return False

    def close(self) -> None:
        """Give back every mapping, channel and handle; again is harmless.

        Consistency on error: everything is given back that can be, whatever fails; then the first
        failure is raised, with the others in its notes.
        """
        with self._lock:
            if self._closed is not None:
                return
            undo = [*self._undo, *self._held()]
            self._shut(_CLOSED)
        failures = []
        for give_back in reversed(undo):
            try:
                give_back()
            except OSError as error:
                failures.append(error)
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"then: {other}")
            raise first

    def disown(self) -> None:
        """Become closed in a forked child: the C handles are the parent's to close."""
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._log.close()
        self._release_pages()
        if self._closed is None:
            self._shut(_FORKED)

    def _shut(self, why: str) -> None:
        self._closed = why
        self._c = self._evtchn = self._foreignmemory = self._xenstore = clib.Closed(why)
        self._light = self._toollog = self._libc = self._xencall = self._c
        self._undo.clear()
        self._forget()
        _opened.discard(self)

    def _held(self) -> list[Callable[[], object]]:
        """Return calls that free what the undo list lacks; closing makes the last one first."""
        return []

    def _release_pages(self) -> None:
        """Release the views of mapped pages, which a forked child does not have."""

    def _forget(self) -> None:
        """Drop the numbers of resources that closing gives back."""

    def _call(
        self,
        function: str,
        domid: int,
        *args: Any,
        view: int | None = None,
        gfn: int | None = None,
        vcpu: int | None = None,
    ) -> int:
        """Call a libxenctrl function about a domain; the keywords are for its error."""
        result: int = getattr(self._c, function)(self._xch, domid, *args)
        if result < 0:
            raise refusal(function, domid=domid, view=view, gfn=gfn, vcpu=vcpu)
        return result

    def _hypercall(self, op: str, domid: int, numbers: Sequence[str], asked: bytearray) -> bytes:
        """Make one that libxenctrl has no function for: what its argument is afterwards."""
        handle, calls = self._xencall_handle(), self._xencall
        room = calls.xencall_alloc_buffer(handle, len(asked))  # memory that Xen can reach
        if room == NULL:
            raise refusal("xencall_alloc_buffer", domid=domid)
        try:
            argument = ffi.buffer(room, len(asked))
            argument[:] = asked
            call = calls.xencall1 if len(numbers) == 1 else calls.xencall2
            if call(handle, *map(constant, numbers), int(ffi.cast("uintptr_t", room))) < 0:
                raise refusal(op, domid=domid)
            return bytes(argument)
        finally:
            calls.xencall_free_buffer(handle, room)
