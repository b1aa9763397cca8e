# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the toolstack knows of domains: names, xenstore, and libxl's configuration."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from xenaltp2m import errors
from xenaltp2m.backend import arguments
from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.checks import as_domid
from xenaltp2m.backend.libxc.clib import NULL, constant, ffi, new, refusal, text
from xenaltp2m.backend.libxc.domains import DomainCalls
from xenaltp2m.backend.libxc.loader import Loader
from xenaltp2m.errors import InvalidArgumentError, XenError

_DOMAINS_AT_ONCE = 256


class ToolstackReads(DomainCalls):
    """Reads of xenstore and of what libxl keeps."""

    def __init__(self, loader: Loader | None = None) -> None:
        self._store: Any = None
        self._libxl: Any = None
        super().__init__(loader)

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
        name = self._stored_name("domid_to_name", as_domid(domid))
        return None if name is None else text(name)

    def _stored_name(self, op: str, domid: int) -> bytes | None:
        # Not through libxl: libxl_domid_to_name makes the same read (libxl_utils.c, 4.14 to 4.22),
        # after it opens a second privcmd handle and installs a process-wide fork handler.
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
        found = self.domain_getinfolist(as_domid(domid), 1)
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
