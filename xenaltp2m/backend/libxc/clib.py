# SPDX-License-Identifier: LGPL-2.1-or-later
"""C functions as Python attributes, what they say when they fail, and buffers lent to them."""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from xenaltp2m import errors
from xenaltp2m.abi import layouts
from xenaltp2m.abi._ffi import ffi as _ffi
from xenaltp2m.abi.releases import SYMBOL_SINCE
from xenaltp2m.backend import arguments
from xenaltp2m.backend.libxc.loader import Library
from xenaltp2m.backend.protocol import Bytes, Gfns
from xenaltp2m.errors import ClosedError, InvalidArgumentError, UnsupportedError, XenError

ffi: Any = _ffi
NULL = ffi.NULL
new = ffi.new
constant = ffi.integer_const

BOOL = ffi.typeof("bool *")
INT = ffi.typeof("int *")
INT32 = ffi.typeof("int32_t *")
UINT = ffi.typeof("unsigned int *")
ULONG = ffi.typeof("unsigned long *")
UINT16 = ffi.typeof("uint16_t *")
UINT32 = ffi.typeof("uint32_t *")
UINT64 = ffi.typeof("uint64_t *")
PFN = ffi.typeof("xen_pfn_t *")
ACCESS = ffi.typeof("xenmem_access_t *")
BYTES = ffi.typeof("uint8_t[]")
UINT64S = ffi.typeof("uint64_t[]")
PFNS = ffi.typeof("xen_pfn_t[]")


def operation(function: str) -> str:
    """Return the Protocol's name for a C function."""
    if function == "xc_altp2m_set_supress_ve_multi":
        return "altp2m_set_suppress_ve_multi"
    if function == "xc_shadow_control":
        return "shadow_get_allocation"
    return function.removeprefix("xc_").removeprefix("xen")


def refusal(
    function: str,
    *,
    domid: int | None = None,
    view: int | None = None,
    gfn: int | None = None,
    vcpu: int | None = None,
) -> XenError:
    """Make the error for a C call that failed just now: the one place that reads errno.

    errno tells the whole truth: of libxenctrl's altp2m functions only the bulk one ever sets
    ``xc_get_last_error`` (``xc_altp2m.c``), and that is shared by all threads.
    """
    number = ffi.errno
    return errors.from_errno(
        operation(function), number, domid=domid, view=view, gfn=gfn, vcpu=vcpu
    )


def checked(function: str, call: Callable[..., int], *args: Any) -> None:
    """Make a call whose only answer is success or an errno."""
    if call(*args) < 0:
        raise refusal(function)


class Absent:
    """Stands for a function that the library lacks."""

    def __init__(self, symbol: str, library: str) -> None:
        self._symbol = symbol
        self._library = library

    def __call__(self, *_: object) -> NoReturn:
        op = operation(self._symbol)
        since = SYMBOL_SINCE.get(self._symbol)
        if since is not None:
            error = errors.missing_symbol(op, self._symbol, since)
            error.add_note(f"the loaded library is {self._library}")
            raise error
        raise UnsupportedError(
            f"{op}: {self._library} has no {self._symbol}, which came with Xen 4.14 or older",
            op=op,
            hint=("the file is not what its name says, or a cut-down build of it",),
        )


def cast_function(library: Library, symbol: str, ctype: str) -> Any:
    """Return a library's function under another prototype than the one declared."""
    return ffi.cast(ctype, ffi.addressof(library.handle, symbol))


_loaded: dict[str, Library] = {}
"""Libraries stay loaded, as cffi unloads one with its last reference: their handles, and the fork
handlers that libxl registers (``libxl__atfork_init``), may outlive a backend."""


class Functions:
    """One library's functions as attributes; the library is opened when the first is wanted.

    Presence decides what can be called: an absent function becomes an :class:`Absent`.
    """

    def __init__(self, prefix: str, open_library: Callable[[], Library]) -> None:
        """Remember how to open the library, and the prefix that its functions' names share."""
        self.prefix = prefix
        self._open_library = functools.cache(open_library)

    def __getattr__(self, symbol: str) -> Any:
        # Reached once for each function: afterwards it is an attribute like any other.
        if not symbol.startswith(self.prefix):
            raise AttributeError(symbol)
        library = self._open_library()
        _loaded.setdefault(library.name, library)
        function: Any
        try:
            function = getattr(library.handle, symbol)
        except ffi.error:  # declared, but not in this library; undeclared is AttributeError
            function = Absent(symbol, library.name)
        setattr(self, symbol, function)
        return function


class Closed:
    """Takes the place of every library once a backend is closed: being open costs no test."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, symbol: str) -> NoReturn:
        raise ClosedError(self._why, op=operation(symbol))


class Log:
    """Where the C libraries say why they failed: a file in memory, not the caller's stderr.

    Without a logger libxenctrl, libxenevtchn and libxenforeignmemory write to stderr, and libxl
    crashes (``xtl_logv``, ``tools/libs/toollog/xtl_core.c``).
    """

    def __init__(self, toollog: Any, libc: Any, undo: list[Callable[[], object]]) -> None:
        """Make a logger, and append to ``undo`` what gives it back."""
        # A file object: once closed it refuses, where a bare descriptor might be another's.
        self._file = os.fdopen(os.memfd_create("xenaltp2m-log"), "rb", buffering=0)
        undo.append(self.close)
        descriptor = os.dup(self._file.fileno())
        # Appending: the stream must not leave a hole where take() has cut the file off.
        stream = libc.fdopen(descriptor, b"a")
        if stream == NULL:
            os.close(descriptor)
            raise refusal("fdopen")
        undo.append(functools.partial(libc.fclose, stream))
        logger = toollog.xtl_createlogger_stdiostream(
            stream, constant("XTL_ERROR"), constant("XTL_STDIOSTREAM_HIDE_PROGRESS")
        )
        if logger == NULL:
            raise refusal("xtl_createlogger_stdiostream")
        self.logger = ffi.cast("xentoollog_logger *", logger)
        undo.append(functools.partial(toollog.xtl_logger_destroy, self.logger))

    def take(self) -> str:
        """Return what was logged since the last time."""
        descriptor = self._file.fileno()
        text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        os.ftruncate(descriptor, 0)
        # libxenctrl's own line breaks, before the "(16 = Device or resource busy)" of PERROR.
        return text.decode(errors="replace").replace("\n (", " (").strip()

    def annotate(self, error: XenError) -> XenError:
        """Add what was logged to an error."""
        if text := self.take():
            error.add_note(text)
        return error

    def close(self) -> None:
        """Let go of the file, and of nothing that C made."""
        self._file.close()


def borrow(op: str, name: str, ctype: Any, buffer: object) -> Any:
    """Lend C a Python buffer; nothing is copied, and it cannot be resized while the loan lives."""
    try:
        return ffi.from_buffer(ctype, buffer)
    except (BufferError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{op}: {name}: {error}", op=op) from None


def lend_bulk(op: str, accesses: Bytes, gfns: Gfns) -> tuple[Any, Any, int]:
    """Lend C the arrays of a bulk access call."""
    arguments.check_bulk(op, accesses, gfns)
    return borrow(op, "accesses", BYTES, accesses), borrow(op, "gfns", UINT64S, gfns), len(gfns)


class HypercallBuffer:
    """Memory that Xen can reach, for the arguments of one bulk access call at a time."""

    GFNS = 1 << 16
    SIZE = layouts.ALTP2M_OP.size + GFNS * (8 + 1)

    def __init__(self, memory: Any) -> None:
        """Take :attr:`SIZE` bytes that ``xencall_alloc_buffer`` gave."""
        self._memory = ffi.cast("char *", memory)
        self._address = int(ffi.cast("uintptr_t", memory))

    def fill(self, domid: int, view: int, accesses: Any, gfns: Any, count: int) -> int:
        """Write a call's arguments, and return their address."""
        gfns_at = layouts.ALTP2M_OP.size
        accesses_at = gfns_at + 8 * count
        # Whole, for Xen has written to the last call's (opaque, do_altp2m_op).
        op = layouts.ALTP2M_OP.filled(
            {
                "version": constant("HVMOP_ALTP2M_INTERFACE_VERSION"),
                "cmd": constant("HVMOP_altp2m_set_mem_access_multi"),
                "domain": domid,
                "u.set_mem_access_multi.view": view,
                "u.set_mem_access_multi.nr": count,
                "u.set_mem_access_multi.pfn_list": self._address + gfns_at,
                "u.set_mem_access_multi.access_list": self._address + accesses_at,
            }
        )
        ffi.memmove(self._memory, op, len(op))
        ffi.memmove(self._memory + gfns_at, gfns, 8 * count)
        ffi.memmove(self._memory + accesses_at, accesses, count)
        return self._address


def copy_gfns(op: str, gfns: Gfns | Sequence[int]) -> Any:
    """Make a C array of gfns."""
    try:
        return ffi.from_buffer(PFNS, array("Q", gfns))
    except (OverflowError, TypeError) as error:
        raise InvalidArgumentError(f"{op}: gfns: {error}", op=op) from None


def text(raw: bytes) -> str:
    """Decode what C says; bytes that are not UTF-8 survive a round trip."""
    return raw.decode(errors="surrogateescape")
