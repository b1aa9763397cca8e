# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Backend Protocol over libxenctrl and its companions: the only package that calls C.

Nothing is opened by importing it. :class:`LibxcBackend` opens libxenctrl; the other libraries are
opened when they are first needed. Each function is looked up once, at its first use, and an absent
one raises :class:`~xenaltp2m.errors.UnsupportedError`.

Every number is checked before C sees it, because C truncates: a domid to 16 bits
(``xc_altp2m.c``), a control register's index to 8 (``xc_monitor.c``); cffi minds only C's
prototype, and takes whatever has an ``__int__``.
"""

from __future__ import annotations

import errno as _errno
import itertools
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from xenaltp2m import errors
from xenaltp2m.abi import layouts
from xenaltp2m.abi.releases import Release, release
from xenaltp2m.backend import Bytes, Gfns, PortCalls, arguments
from xenaltp2m.backend.clock import CLOCK
from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.clib import NULL, checked, constant, ffi, new, operation, refusal, text
from xenaltp2m.backend.loader import Library, Loader, mismatch
from xenaltp2m.backend.mapping import Mapping
from xenaltp2m.errors import ClosedError, InvalidArgumentError, UnsupportedError, XenError
from xenaltp2m.types import PAGE_SIZE, DomainInfo, DomId, MemoryType, PodTarget, VcpuInfo

__all__ = ["LibxcBackend"]

_PROT_READ, _PROT_WRITE = 1, 2  # <sys/mman.h>, Linux
_EXTRAVERSION_SIZE = 16  # xen_extraversion_t, public/version.h
_COMMANDLINE_SIZE = 1024  # xen_commandline_t
_DOMAINS_AT_ONCE = 256
_NARROW = 1 << 8
"""Bound of fields that are a byte in the hypercall, whatever their type in C's prototype:
``xen_mem_access_op.access`` (memory.h) and ``mov_to_cr.index`` (domctl.h)."""
_VCPU_INFO_VCPU = 1 << 16
"""``xc_vcpu_getinfo`` casts the vCPU to uint16_t (``xc_domain.c``, 4.14 to 4.22)."""
_SHORT = (PAGE_SIZE - 16) // 8
"""Gfns that fit a page behind libxencall's header: it keeps up to four pages (``buffer.c``)."""

_CLOSED = "the backend is closed"
_FORKED = "the backend was opened before this process was forked: connect again in the child"


# Arguments. The first test of each check passes for a plain int in range, and costs about 40 ns.


def _domid(value: int) -> int:
    if type(value) is int and 0 <= value < arguments.DOMID_LIMIT:
        return value
    return _odd("domid", value, arguments.DOMID_LIMIT)


def _view(value: int) -> int:
    if type(value) is int and 0 <= value <= 0xFFFF:
        return value
    return _odd("view", value, arguments.LIMITS["view"])


def _gfn(value: int, name: str = "gfn") -> int:
    if type(value) is int and 0 <= value <= 0xFFFF_FFFF_FFFF_FFFF:
        return value
    return _odd(name, value, arguments.LIMITS[name])


def _access(value: int, name: str = "access") -> int:
    if type(value) is int and 0 <= value <= 0xFFFF:
        return value
    return _odd(name, value, arguments.LIMITS[name])


def _number(name: str, value: int, limit: int | None = None) -> int:
    if limit is None:
        limit = arguments.LIMITS[name]
    if type(value) is int and 0 <= value < limit:
        return value
    return _odd(name, value, limit)


def _flag(name: str, value: bool) -> bool:
    if value is True or value is False:
        return value
    return arguments.as_flag(sys._getframe(1).f_code.co_name, name, value)


def _odd(name: str, value: int, limit: int) -> int:
    """Take the int subclasses (enums) that the quick checks leave, and refuse the rest."""
    op = sys._getframe(2).f_code.co_name  # the backend method; only ever part of a message
    number = int(arguments.as_int(op, name, value))
    if 0 <= number < limit:
        return number
    raise arguments.out_of_range(op, name, number, limit)


_opened: weakref.WeakSet[LibxcBackend] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for backend in list(_opened):
        backend._disown()


os.register_at_fork(after_in_child=_after_fork_in_child)


class LibxcBackend:
    """A dom0's Xen, through its own libraries. See :class:`xenaltp2m.backend.Backend`.

    Threads: any number may call at a time. libxenctrl's handle is re-entrant unless asked not to
    be (``XC_OPENFLAG_NON_REENTRANT``, xenctrl.h; ``cache_lock``, ``tools/libs/call/buffer.c``) but
    for its last error, which is not used here; errno is the thread's own. The GIL is released
    while C runs. :meth:`close`, and unmapping pages, must wait until no other thread is in a call
    that uses them.

    Fork: the C handles are the parent's (``xc_interface_open``, xenctrl.h). In the child every
    call raises :class:`~xenaltp2m.errors.ClosedError`, and mapped pages are gone (privcmd maps
    with ``VM_DONTCOPY``), so their views are released.
    """

    name = "libxc"
    clock = CLOCK

    def __init__(self, loader: Loader | None = None) -> None:
        """Open libxenctrl and ask which Xen is running.

        Args:
            loader: Chooses the libraries; the default follows the environment and sysfs.

        Raises:
            LibraryError: No usable libxenctrl.
            UnsupportedError: The hypervisor is older than this package supports.
            XenError: This is not a Xen control domain, or the caller is not root.

        Warns:
            LibraryMismatchWarning: libxenctrl and the hypervisor are of different releases.
        """
        self._loader = loader or Loader(ffi.dlopen, os.environ)
        self._library = self._loader.xenctrl()
        self._lock = threading.Lock()
        self._undo: list[Callable[[], object]] = []
        self._channels: dict[int, Any] = {}
        self._channel_numbers = itertools.count(1)
        self._mappings: dict[int, Mapping] = {}
        self._handles: dict[str, Any] = {}
        self._rooms: list[clib.Room] = []  # those that no call is using
        self._store: Any = None
        self._libxl: Any = None
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
            if difference := mismatch(self._library.version, self._release.version):
                warnings.warn(difference, errors.LibraryMismatchWarning, stacklevel=2)
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
            undo = [*self._undo]
            undo += [partial(m.close, "close") for m in self._mappings.values()]
            if self._channels:
                close = partial(checked, "xenevtchn_close", self._evtchn.xenevtchn_close)
                undo += [partial(close, handle) for handle in self._channels.values()]
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

    def _disown(self) -> None:
        """Become closed in a forked child: the C handles are the parent's to close."""
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._log.close()
        for mapping in self._mappings.values():
            mapping.release()
        if self._closed is None:
            self._shut(_FORKED)

    def _shut(self, why: str) -> None:
        self._closed = why
        self._c = self._evtchn = self._foreignmemory = self._xenstore = clib.Closed(why)
        self._light = self._toollog = self._libc = self._xencall = self._c
        self._undo.clear()
        self._channels.clear()
        self._mappings.clear()
        self._rooms.clear()
        _opened.discard(self)

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

    # The host.

    def _version_text(self, what: str, size: int) -> str:
        room = new("char[]", size)
        checked("xc_version", self._c.xc_version, self._xch, constant(what), room)
        return text(ffi.string(room, size))

    def xen_extraversion(self) -> str:
        return self._version_text("XENVER_extraversion", _EXTRAVERSION_SIZE)

    def xen_commandline(self) -> str:
        return self._version_text("XENVER_commandline", _COMMANDLINE_SIZE)

    def vm_event_get_version(self) -> int:
        version: int = self._c.xc_vm_event_get_version(self._xch)
        if version < 0:
            raise refusal("xc_vm_event_get_version")
        return version

    # Domains.

    def domain_getinfolist(self, first_domid: int, limit: int) -> list[DomainInfo]:
        first = _number("first_domid", first_domid)
        limit = min(_number("limit", limit), arguments.DOMID_LIMIT - first)
        version = self._library.version or self._release.version
        layout = layouts.DOMAIN_INFO.at(version)
        # The library strides by its own structure's size: twice the newest known leaves room for
        # a future one, and the check below notices if the stride was another.
        room = new("char[]", 2 * layout.size * limit or 1)
        count: int = self._c.xc_domain_getinfolist(
            self._xch, first, limit, ffi.cast("xc_domaininfo_t *", room)
        )
        if count < 0:
            raise refusal("xc_domain_getinfolist")
        raw = memoryview(ffi.buffer(room)).toreadonly()
        found = [_domain_info(layout, raw, index * layout.size) for index in range(count)]
        domids = [first - 1, *(info.domid for info in found)]
        if count > limit or any(this <= last for last, this in itertools.pairwise(domids)):
            raise errors.LibraryError(
                f"{self._library.name} lays out domains in a way this package does not know",
                op="domain_getinfolist",
            )
        return found

    def name_to_domid(self, name: str) -> int | None:
        """Look a name up among those of the domains that exist, as libxl and xl do."""
        wanted = name.encode(errors="surrogateescape")
        found = [
            domid
            for domid in self._every_domid()
            if self._stored_name("name_to_domid", domid) == wanted
        ]
        return arguments.only_domid(name, found)

    def _every_domid(self) -> Iterator[int]:
        first = 0
        while first < arguments.DOMID_LIMIT:
            batch = self.domain_getinfolist(first, _DOMAINS_AT_ONCE)
            yield from (info.domid for info in batch)
            if len(batch) < _DOMAINS_AT_ONCE:
                return
            first = batch[-1].domid + 1

    def domid_to_name(self, domid: int) -> str | None:
        """Read ``/local/domain/<domid>/name`` from xenstore, as libxl and xl do."""
        name = self._stored_name("domid_to_name", _domid(domid))
        return None if name is None else text(name)

    def _stored_name(self, op: str, domid: int) -> bytes | None:
        # Not through libxl: libxl_domid_to_name is this very read (libxl_utils.c, 4.14 to 4.22),
        # behind a second privcmd handle and a process-wide fork handler.
        return self._stored(op, f"/local/domain/{domid}/name", domid)

    def xs_read(self, path: str) -> bytes | None:
        if "\0" in path:
            raise InvalidArgumentError(f"xs_read: {path!r} is not a path", op="xs_read")
        return self._stored("xs_read", path)

    def _stored(self, op: str, path: str, domid: int | None = None) -> bytes | None:
        length, no_transaction = new(clib.UINT), constant("XBT_NULL")
        store = self._xenstore_handle()
        data = self._xenstore.xs_read(store, no_transaction, os.fsencode(path), length)
        if data == NULL:
            error = refusal("xs_read", domid=domid)
            if error.errno == _errno.ENOENT:
                return None
            error.op = op
            raise error
        try:
            return bytes(ffi.buffer(data, length[0]))
        finally:
            self._libc.free(data)

    def _xenstore_handle(self) -> Any:
        with self._lock:
            if self._store is None or self._closed:
                handle = self._xenstore.xs_open(0)
                if handle == NULL:
                    raise refusal("xs_open")
                self._undo.append(partial(self._xenstore.xs_close, handle))
                self._store = handle
        return self._store

    def domain_config_json(self, domid: int) -> str:
        """``libxl_userdata_retrieve`` of ``libxl-json``: the configuration as libxl keeps it.

        That text follows hot-plugged devices, but may still list ones that were unplugged.
        ``libxl_retrieve_domain_configuration`` would drop those, at a price no library should
        make its caller pay: it asserts that it knows the device model (``libxl_domain.c``) and
        that the process has no SIGCHLD handler (``libxl_fork.c``), and either kills the process.
        """
        op = "domain_config_json"
        found = self.domain_getinfolist(_domid(domid), 1)
        if not found or found[0].domid != domid:  # libxl says NOMEM or LOCK_FAIL then
            raise errors.from_errno(op, _errno.ESRCH, domid=domid)
        data, length = new("uint8_t **"), new(clib.INT)
        context = self._libxl_context()
        code: int = self._light.libxl_userdata_retrieve(context, domid, b"libxl-json", data, length)
        if code:
            message = f"{op} (domain {domid}): libxl error {code}"
            raise self._log.annotate(XenError(message, op=op, domid=domid))
        if not length[0]:
            raise XenError(
                f"{op} (domain {domid}): libxl keeps no configuration of it",
                op=op,
                errno=_errno.ENOENT,
                domid=domid,
                hint=("the domain was not created by libxl (xl, libvirt), but by other means",),
            )
        try:
            return text(ffi.buffer(data[0], length[0])[:].rstrip(b"\0"))
        finally:
            self._libc.free(data[0])

    def _libxl_context(self) -> Any:
        with self._lock:
            if self._libxl is None or self._closed:
                context = new("libxl_ctx **")
                version = constant("LIBXL_VERSION")
                code = self._light.libxl_ctx_alloc(context, version, 0, self._log.logger)
                if code:
                    op = "libxl_ctx_alloc"
                    raise self._log.annotate(XenError(f"{op}: libxl error {code}", op=op))
                self._undo.append(partial(self._light.libxl_ctx_free, context[0]))
                self._libxl = context[0]
        return self._libxl

    def domain_pause(self, domid: int) -> None:
        self._call("xc_domain_pause", _domid(domid))

    def domain_unpause(self, domid: int) -> None:
        self._call("xc_domain_unpause", _domid(domid))

    def domain_maximum_gpfn(self, domid: int) -> int:
        gpfn = new(clib.PFN)
        self._call("xc_domain_maximum_gpfn", _domid(domid), gpfn)
        return int(gpfn[0])

    def domain_get_pod_target(self, domid: int) -> PodTarget:
        numbers = [new(clib.UINT64) for _ in range(3)]
        self._call("xc_domain_get_pod_target", _domid(domid), *numbers)
        return PodTarget(*(int(number[0]) for number in numbers))

    def hvm_get_mem_type(self, domid: int, gfn: int) -> MemoryType:
        asked = layouts.GET_MEM_TYPE.filled({"domid": _domid(domid), "pfn": _gfn(gfn)})
        numbers = "__HYPERVISOR_hvm_op", "HVMOP_get_mem_type"
        answer = self._hypercall("hvm_get_mem_type", domid, numbers, asked)
        number = layouts.GET_MEM_TYPE.number(answer, "mem_type")
        try:
            return MemoryType(number)
        except ValueError:
            raise errors.not_known(
                f"the type of gfn {gfn:#x}", number, "hvm_get_mem_type", domid
            ) from None

    def domain_setmaxmem(self, domid: int, max_kib: int) -> None:
        self._call("xc_domain_setmaxmem", _domid(domid), _number("max_kib", max_kib))

    # libxenctrl writes the gfns back after these two (BOUNCE_BOTH, xc_domain.c): it gets a copy.

    def domain_populate_physmap_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        function = "xc_domain_populate_physmap_exact"
        extents = clib.copy_gfns("domain_populate_physmap_exact", gfns)
        order = _number("order", order)
        self._call(function, _domid(domid), len(extents), order, 0, extents)

    def domain_decrease_reservation_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        function = "xc_domain_decrease_reservation_exact"
        extents = clib.copy_gfns("domain_decrease_reservation_exact", gfns)
        order = _number("order", order)
        self._call(function, _domid(domid), len(extents), order, extents)

    def hvm_param_get(self, domid: int, param: int) -> int:
        value = new(clib.UINT64)
        self._call("xc_hvm_param_get", _domid(domid), _number("param", param), value)
        return int(value[0])

    def hvm_param_set(self, domid: int, param: int, value: int) -> None:
        index, wanted = _number("param", param), _number("value", value)
        self._call("xc_hvm_param_set", _domid(domid), index, wanted)

    def domain_hvm_getcontext(self, domid: int) -> bytes:
        """``xc_domain_hvm_getcontext``, once for the size and once for the stream."""
        size = self._call("xc_domain_hvm_getcontext", _domid(domid), NULL, 0)
        stream = new(clib.BYTES, size)
        used = self._call("xc_domain_hvm_getcontext", domid, stream, size)
        return bytes(ffi.buffer(stream, min(used, size)))

    def domain_hvm_getcontext_partial(self, domid: int, typecode: int, instance: int) -> bytes:
        """``xc_domain_hvm_getcontext_partial``; for other records than a vCPU's, the full call.

        The partial call does not tell a record's length (``xc_domain.c`` drops ``bufsz``), and
        only the vCPU's is known beforehand.
        """
        _domid(domid)
        _number("typecode", typecode)
        _number("instance", instance)
        if typecode != layouts.HVM_CPU_TYPECODE:
            return _record(self.domain_hvm_getcontext(domid), domid, typecode, instance)
        function = "xc_domain_hvm_getcontext_partial"
        record = new(clib.BYTES, layouts.HVM_CPU.size)
        self._call(function, domid, typecode, instance, record, len(record), vcpu=instance)
        return bytes(ffi.buffer(record))

    def domain_hvm_setcontext(self, domid: int, stream: Bytes) -> None:
        lent = clib.lend("domain_hvm_setcontext", "stream", clib.BYTES, stream)
        self._call("xc_domain_hvm_setcontext", _domid(domid), lent, len(lent))

    def domain_debug_control(self, domid: int, op: int, vcpu: int) -> None:
        what, which = _number("op", op), _number("vcpu", vcpu)
        self._call("xc_domain_debug_control", _domid(domid), what, which, vcpu=vcpu)

    def vcpu_getinfo(self, domid: int, vcpu: int) -> VcpuInfo:
        layout, which = layouts.VCPU_INFO, _number("vcpu", vcpu, _VCPU_INFO_VCPU)
        room = new("char[]", 2 * layout.size)  # the library copies its own structure's size
        info = ffi.cast("xc_vcpuinfo_t *", room)
        self._call("xc_vcpu_getinfo", _domid(domid), which, info, vcpu=vcpu)
        number = partial(layout.number, memoryview(ffi.buffer(room)))
        return VcpuInfo(
            online=bool(number("online")),
            blocked=bool(number("blocked")),
            running=bool(number("running")),
            cpu_time=number("cpu_time"),
        )

    def hvm_inject_trap(
        self, domid: int, vcpu: int, vector: int, kind: int, error_code: int, length: int, cr2: int
    ) -> None:
        which = _number("vcpu", vcpu)
        self._call(
            "xc_hvm_inject_trap",
            _domid(domid),
            which - ((which & 1 << 31) << 1),  # an int in the prototype, uint32_t in the hypercall
            _number("vector", vector),
            _number("kind", kind),
            _number("error_code", error_code),
            _number("length", length),
            _number("cr2", cr2),
            vcpu=vcpu,
        )

    def get_paging_mempool_size(self, domid: int) -> int:
        size = new(clib.UINT64)
        self._call("xc_get_paging_mempool_size", _domid(domid), size)
        return int(size[0])

    def set_paging_mempool_size(self, domid: int, size: int) -> None:
        self._call("xc_set_paging_mempool_size", _domid(domid), _number("size", size))

    def shadow_get_allocation(self, domid: int) -> int:
        """``xc_shadow_control``, which has another prototype in libraries up to 4.15."""
        function, op = "xc_shadow_control", constant("XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION")
        if self.supports("xc_logdirty_control") or not self.supports(function):
            size = new(clib.UINT)
            self._call(function, _domid(domid), op, size, 0)
            return int(size[0])
        long_size = new(clib.ULONG)
        older = clib.cast_function(self._library, function, "xc_shadow_control_4_14_t *")
        if older(self._xch, _domid(domid), op, NULL, 0, long_size, 0, NULL) < 0:
            raise refusal(function, domid=domid)
        return int(long_size[0])

    # Host memory access.

    def set_mem_access(self, domid: int, access: int, first_gfn: int, count: int) -> None:
        access, first = _number("access", access, _NARROW), _gfn(first_gfn, "first_gfn")
        count = _number("count", count)
        self._call("xc_set_mem_access", _domid(domid), access, first, count, gfn=first_gfn)

    def set_mem_access_multi(self, domid: int, accesses: Bytes, gfns: Gfns) -> None:
        """``xc_set_mem_access_multi``; the arrays are lent to C, not copied."""
        bulk = clib.lend_bulk("set_mem_access_multi", accesses, gfns)
        self._call("xc_set_mem_access_multi", _domid(domid), *bulk)

    def get_mem_access(self, domid: int, gfn: int) -> int:
        access = new(clib.ACCESS)
        self._call("xc_get_mem_access", _domid(domid), _gfn(gfn), access, gfn=gfn)
        return int(access[0])

    def domain_set_access_required(self, domid: int, required: bool) -> None:
        self._call("xc_domain_set_access_required", _domid(domid), _flag("required", required))

    # altp2m.

    def altp2m_get_domain_state(self, domid: int) -> bool:
        state = new(clib.BOOL)
        self._call("xc_altp2m_get_domain_state", _domid(domid), state)
        return bool(state[0])

    def altp2m_set_domain_state(self, domid: int, state: bool) -> None:
        self._call("xc_altp2m_set_domain_state", _domid(domid), _flag("state", state))

    def altp2m_set_vcpu_enable_notify(self, domid: int, vcpu: int, gfn: int) -> None:
        function = "xc_altp2m_set_vcpu_enable_notify"
        self._call(function, _domid(domid), _number("vcpu", vcpu), _gfn(gfn), vcpu=vcpu, gfn=gfn)

    def altp2m_set_vcpu_disable_notify(self, domid: int, vcpu: int) -> None:
        function = "xc_altp2m_set_vcpu_disable_notify"
        self._call(function, _domid(domid), _number("vcpu", vcpu), vcpu=vcpu)

    def altp2m_create_view(self, domid: int, default_access: int) -> int:
        view = new(clib.UINT16)
        access = _access(default_access, "default_access")
        self._call("xc_altp2m_create_view", _domid(domid), access, view)
        return int(view[0])

    def altp2m_destroy_view(self, domid: int, view: int) -> None:
        self._call("xc_altp2m_destroy_view", _domid(domid), _view(view), view=view)

    def altp2m_switch_to_view(self, domid: int, view: int) -> None:
        self._call("xc_altp2m_switch_to_view", _domid(domid), _view(view), view=view)

    def altp2m_set_mem_access(self, domid: int, view: int, gfn: int, access: int) -> None:
        function = "xc_altp2m_set_mem_access"
        access = _access(access)
        self._call(function, _domid(domid), _view(view), _gfn(gfn), access, view=view, gfn=gfn)

    def altp2m_set_mem_access_multi(
        self, domid: int, view: int, accesses: Bytes, gfns: Gfns
    ) -> None:
        """``xc_altp2m_set_mem_access_multi``; of long arrays its hypercall, with a buffer kept.

        libxenctrl maps new pages for its copy of such arrays at every call, and unmaps them.
        """
        function = "xc_altp2m_set_mem_access_multi"
        bulk = clib.lend_bulk("altp2m_set_mem_access_multi", accesses, gfns)
        _domid(domid)
        _view(view)
        room = self._take_room() if _SHORT < len(gfns) <= clib.Room.GFNS else None
        if room is None:
            self._call(function, domid, view, *bulk, view=view)
            return
        try:
            hypercall, op = constant("__HYPERVISOR_hvm_op"), constant("HVMOP_altp2m")
            arguments_at, handle = room.fill(domid, view, *bulk), self._xencall_handle()
            if self._xencall.xencall2(handle, hypercall, op, arguments_at) < 0:
                raise refusal(function, domid=domid, view=view)
        finally:
            self._rooms.append(room)

    def _take_room(self) -> clib.Room | None:
        """Take a room that no other call has, or None: libxenctrl does without, or says why not.

        Rooms are given back at the end only, so there are as many as calls were made at a time.
        """
        try:
            return self._rooms.pop()
        except IndexError:
            pass
        try:
            if not self.supports("xencall2"):
                return None
            handle, calls = self._xencall_handle(), self._xencall
            memory = calls.xencall_alloc_buffer(handle, clib.Room.SIZE)
        except XenError:
            return None
        if memory == NULL:
            return None
        self._undo.append(partial(calls.xencall_free_buffer, handle, memory))
        return clib.Room(memory)

    def altp2m_get_mem_access(self, domid: int, view: int, gfn: int) -> int:
        access = new(clib.ACCESS)
        function = "xc_altp2m_get_mem_access"
        self._call(function, _domid(domid), _view(view), _gfn(gfn), access, view=view, gfn=gfn)
        return int(access[0])

    def altp2m_change_gfn(self, domid: int, view: int, old_gfn: int, new_gfn: int) -> None:
        function = "xc_altp2m_change_gfn"
        old, new = _gfn(old_gfn, "old_gfn"), _gfn(new_gfn, "new_gfn")
        self._call(function, _domid(domid), _view(view), old, new, view=view, gfn=old_gfn)

    def altp2m_set_suppress_ve(self, domid: int, view: int, gfn: int, suppress: bool) -> None:
        """``xc_altp2m_set_suppress_ve``.

        Raises:
            InvalidArgumentError: gfn is ~0, from which Xen would not come back.
        """
        function = "xc_altp2m_set_suppress_ve"
        arguments.refuse_livelock("altp2m_set_suppress_ve", _gfn(gfn))
        flag = _flag("suppress", suppress)
        self._call(function, _domid(domid), _view(view), gfn, flag, view=view, gfn=gfn)

    def altp2m_set_suppress_ve_multi(
        self, domid: int, view: int, first_gfn: int, last_gfn: int, suppress: bool
    ) -> tuple[int, int] | None:
        """``xc_altp2m_set_supress_ve_multi``.

        Xen clamps ``last_gfn`` to what the CPU can address (``p2m_set_suppress_ve_multi``), so a
        range up to 2^64-1 ends. C writes the two results on a failure only, and the errno negated.
        """
        error_gfn, error_code = new(clib.PFN), new(clib.INT32)
        first, last = _gfn(first_gfn, "first_gfn"), _gfn(last_gfn, "last_gfn")
        self._call(
            "xc_altp2m_set_supress_ve_multi",
            _domid(domid),
            _view(view),
            first,
            last,
            _flag("suppress", suppress),
            error_gfn,
            error_code,
            view=view,
            gfn=first_gfn,
        )
        return (int(error_gfn[0]), -error_code[0]) if error_code[0] else None

    def altp2m_get_suppress_ve(self, domid: int, view: int, gfn: int) -> bool:
        suppress = new(clib.BOOL)
        function = "xc_altp2m_get_suppress_ve"
        self._call(function, _domid(domid), _view(view), _gfn(gfn), suppress, view=view, gfn=gfn)
        return bool(suppress[0])

    def altp2m_get_vcpu_p2m_idx(self, domid: int, vcpu: int) -> int:
        view = new(clib.UINT16)
        function = "xc_altp2m_get_vcpu_p2m_idx"
        self._call(function, _domid(domid), _number("vcpu", vcpu), view, vcpu=vcpu)
        return int(view[0])

    def altp2m_set_visibility(self, domid: int, view: int, visible: bool) -> None:
        function = "xc_altp2m_set_visibility"
        self._call(function, _domid(domid), _view(view), _flag("visible", visible), view=view)

    # Monitor.

    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        """``xc_monitor_enable``.

        On an error a note says which of its six steps failed (``xc_vm_event_enable``).
        """
        port = new(clib.UINT32)
        enable = self._c.xc_monitor_enable
        self._log.take()
        page = enable(self._xch, _domid(domid), port)
        if page == NULL:
            raise self._log.annotate(refusal("xc_monitor_enable", domid=domid))
        unmap = partial(checked, "monitor_unmap_ring", self._libc.munmap, page, PAGE_SIZE)
        mapping = Mapping(ffi.buffer(page, PAGE_SIZE), writable=True, unmap=unmap)
        self._mappings[id(mapping.whole)] = mapping
        return int(port[0]), mapping.whole

    def monitor_unmap_ring(self, ring: memoryview) -> None:
        """``munmap`` of a ring's page.

        Raises:
            BusyError: Slices or casts of the ring are alive; release them and call again.
        """
        self._unmap("monitor_unmap_ring", ring)

    def monitor_disable(self, domid: int) -> None:
        self._call("xc_monitor_disable", _domid(domid))

    def monitor_resume(self, domid: int) -> None:
        self._call("xc_monitor_resume", _domid(domid))

    def monitor_get_capabilities(self, domid: int) -> int:
        capabilities = new(clib.UINT32)
        self._call("xc_monitor_get_capabilities", _domid(domid), capabilities)
        return int(capabilities[0])

    def monitor_write_ctrlreg(
        self, domid: int, index: int, enable: bool, sync: bool, bitmask: int, onchangeonly: bool
    ) -> None:
        self._call(
            "xc_monitor_write_ctrlreg",
            _domid(domid),
            _number("index", index, _NARROW),
            _flag("enable", enable),
            _flag("sync", sync),
            _number("bitmask", bitmask),
            _flag("onchangeonly", onchangeonly),
        )

    def monitor_mov_to_msr(self, domid: int, msr: int, enable: bool, onchangeonly: bool) -> None:
        flags = _flag("enable", enable), _flag("onchangeonly", onchangeonly)
        self._call("xc_monitor_mov_to_msr", _domid(domid), _number("msr", msr), *flags)

    def monitor_singlestep(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_singlestep", _domid(domid), _flag("enable", enable))

    def monitor_software_breakpoint(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_software_breakpoint", _domid(domid), _flag("enable", enable))

    def monitor_descriptor_access(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_descriptor_access", _domid(domid), _flag("enable", enable))

    def monitor_guest_request(
        self, domid: int, enable: bool, sync: bool, allow_userspace: bool
    ) -> None:
        flags = _flag("enable", enable), _flag("sync", sync)
        userspace = _flag("allow_userspace", allow_userspace)
        self._call("xc_monitor_guest_request", _domid(domid), *flags, userspace)

    def monitor_inguest_pagefault(self, domid: int, disable: bool) -> None:
        self._call("xc_monitor_inguest_pagefault", _domid(domid), _flag("disable", disable))

    def monitor_debug_exceptions(self, domid: int, enable: bool, sync: bool) -> None:
        flags = _flag("enable", enable), _flag("sync", sync)
        self._call("xc_monitor_debug_exceptions", _domid(domid), *flags)

    def monitor_cpuid(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_cpuid", _domid(domid), _flag("enable", enable))

    def monitor_privileged_call(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_privileged_call", _domid(domid), _flag("enable", enable))

    def monitor_emul_unimplemented(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_emul_unimplemented", _domid(domid), _flag("enable", enable))

    def monitor_vmexit(self, domid: int, enable: bool, sync: bool) -> None:
        flags = _flag("enable", enable), _flag("sync", sync)
        self._call("xc_monitor_vmexit", _domid(domid), *flags)

    def monitor_io(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_io", _domid(domid), _flag("enable", enable))

    def monitor_emulate_each_rep(self, domid: int, enable: bool) -> None:
        self._call("xc_monitor_emulate_each_rep", _domid(domid), _flag("enable", enable))

    def monitor_control_registers(self, domid: int) -> None:
        """``XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS``; whatever the library's release."""
        values = {
            "cmd": constant("XEN_DOMCTL_monitor_op"),
            "interface_version": self._release.domctl_version,
            "domain": _domid(domid),
            "u.monitor_op.op": constant("XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS"),
        }
        asked = layouts.DOMCTL.filled(values)
        self._hypercall("monitor_control_registers", domid, ("__HYPERVISOR_domctl",), asked)

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

    # Event channels.

    def evtchn_open(self) -> int:
        handle = self._evtchn.xenevtchn_open(self._log.logger, 0)
        if handle == NULL:
            raise self._log.annotate(refusal("xenevtchn_open"))
        channel = next(self._channel_numbers)
        self._channels[channel] = handle
        return channel

    def evtchn_close(self, channel: int) -> None:
        close, handle = self._evtchn.xenevtchn_close, self._channel("evtchn_close", channel)
        del self._channels[channel]
        checked("xenevtchn_close", close, handle)

    def evtchn_fd(self, channel: int) -> int:
        return self._channel_call("xenevtchn_fd", channel)

    def evtchn_bind_interdomain(self, channel: int, domid: int, remote_port: int) -> int:
        function, remote = "xenevtchn_bind_interdomain", _number("remote_port", remote_port)
        return self._channel_call(function, channel, _domid(domid), remote, domid=domid)

    def evtchn_pending(self, channel: int) -> int:
        """``xenevtchn_pending``; goes on waiting after a signal whose handler returned."""
        while True:
            try:
                return self._channel_call("xenevtchn_pending", channel)
            except XenError as error:
                if error.errno != _errno.EINTR:
                    raise

    def evtchn_unmask(self, channel: int, port: int) -> None:
        self._channel_call("xenevtchn_unmask", channel, _number("port", port))

    def evtchn_notify(self, channel: int, port: int) -> None:
        self._channel_call("xenevtchn_notify", channel, _number("port", port))

    def evtchn_calls(self, channel: int, port: int) -> PortCalls:
        """The port's calls; of these, libxenevtchn's first two are this read and this write.

        ``tools/libs/evtchn/linux.c``, ``xenevtchn_pending`` and ``xenevtchn_unmask``, 4.14 to 4.22.
        """
        handle, number = self._channel("evtchn_calls", channel), _number("port", port)
        descriptor = self.evtchn_fd(channel)
        word = number.to_bytes(4, sys.byteorder)
        return PortCalls(
            partial(os.read, descriptor, len(word)),
            partial(os.write, descriptor, word),
            partial(self._evtchn.xenevtchn_notify, handle, number),
        )

    def _channel(self, op: str, channel: int) -> Any:
        handle = self._channels.get(channel)
        if handle is None:
            raise errors.from_errno(op, _errno.EBADF)
        return handle

    def _channel_call(
        self, function: str, channel: int, *args: int, domid: int | None = None
    ) -> int:
        call = getattr(self._evtchn, function)
        result: int = call(self._channel(operation(function), channel), *args)
        if result < 0:
            raise refusal(function, domid=domid)
        return result

    # Memory.

    def foreignmemory_map(
        self, domid: int, writable: bool, gfns: Sequence[int]
    ) -> list[memoryview]:
        """``xenforeignmemory_map``; read-only views where the pages are mapped read-only."""
        _domid(domid)
        frames = clib.copy_gfns("foreignmemory_map", gfns)
        protection = _PROT_READ | (_PROT_WRITE if _flag("writable", writable) else 0)
        handle, count = self._foreignmemory_handle(), len(frames)
        # No array for each page's error: all pages, or none and the first one's errno.
        address = self._foreignmemory.xenforeignmemory_map(
            handle, domid, protection, count, frames, NULL
        )
        if address == NULL:
            raise refusal("xenforeignmemory_map", domid=domid)
        function = "xenforeignmemory_unmap"
        call = self._foreignmemory.xenforeignmemory_unmap
        unmap = partial(checked, function, call, handle, address, count)
        mapping = Mapping(ffi.buffer(address, count * PAGE_SIZE), writable=writable, unmap=unmap)
        self._mappings[id(mapping.pages)] = mapping
        return mapping.pages

    def foreignmemory_unmap(self, pages: list[memoryview]) -> None:
        """``xenforeignmemory_unmap``.

        Raises:
            BusyError: Slices of the views are alive; release them and call again.
        """
        self._unmap("foreignmemory_unmap", pages)

    def _unmap(self, op: str, handed: object) -> None:
        if self._closed is not None:
            raise ClosedError(self._closed, op=op)
        mapping = self._mappings.get(id(handed))
        if mapping is None:
            raise arguments.unknown_mapping(op)
        mapping.close(op)
        del self._mappings[id(handed)]


def _domain_info(layout: layouts.Layout, raw: memoryview, base: int) -> DomainInfo:
    number = partial(layout.number, raw, base=base)
    flags = number("flags")
    return DomainInfo(
        domid=DomId(number("domain")),
        uuid=UUID(bytes=layout.raw(raw, "handle", base)),
        hvm=bool(flags & layouts.DomainFlag.HVM_GUEST),
        paused=bool(flags & layouts.DomainFlag.PAUSED),
        dying=bool(flags & layouts.DomainFlag.DYING),
        shutdown=bool(flags & layouts.DomainFlag.SHUTDOWN),
        shutdown_reason=layouts.shutdown_reason(flags) or 0,
        pages=number("tot_pages"),
        max_pages=number("max_pages"),
        vcpus=number("nr_online_vcpus"),
        max_vcpu_id=number("max_vcpu_id"),
        shared_pages=number("shr_pages"),
        paged_pages=number("paged_pages"),
    )


def _record(stream: bytes, domid: int, typecode: int, instance: int) -> bytes:
    """Find one record in an HVM save stream."""
    for kind, which, start, length in layouts.save_records(stream):
        if (kind, which) == (typecode, instance) and start + length <= len(stream):
            return stream[start : start + length]
    raise errors.from_errno("domain_hvm_getcontext_partial", _errno.ENOENT, domid=domid)
