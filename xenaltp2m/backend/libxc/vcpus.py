# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls about vCPUs: their saved state, their scheduling, and injected traps."""

from __future__ import annotations

import errno as _errno
from functools import partial

from xenaltp2m import errors
from xenaltp2m.abi import layouts
from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.checks import as_domid, as_number
from xenaltp2m.backend.libxc.clib import NULL, ffi, new
from xenaltp2m.backend.libxc.connection import Connection
from xenaltp2m.backend.protocol import Bytes
from xenaltp2m.types import VcpuInfo

_VCPU_INFO_VCPU = 1 << 16
"""``xc_vcpu_getinfo`` casts the vCPU to uint16_t (``xc_domain.c``, 4.14 to 4.22)."""


class VcpuCalls(Connection):
    """Calls about vCPUs, and the HVM save stream that holds their registers."""

    def domain_hvm_getcontext(self, domid: int) -> bytes:
        """``xc_domain_hvm_getcontext``, once for the size and once for the stream."""
        size = self._call("xc_domain_hvm_getcontext", as_domid(domid), NULL, 0)
        stream = new(clib.BYTES, size)
        used = self._call("xc_domain_hvm_getcontext", domid, stream, size)
        return bytes(ffi.buffer(stream, min(used, size)))

    def domain_hvm_getcontext_partial(self, domid: int, typecode: int, instance: int) -> bytes:
        """``xc_domain_hvm_getcontext_partial``; for other records than a vCPU's, the full call.

        The partial call does not tell a record's length (``xc_domain.c`` drops ``bufsz``), and
        only the vCPU's is known beforehand.
        """
        as_domid(domid)
        as_number("typecode", typecode)
        as_number("instance", instance)
        if typecode != layouts.HVM_CPU_TYPECODE:
            return _record(self.domain_hvm_getcontext(domid), domid, typecode, instance)
        function = "xc_domain_hvm_getcontext_partial"
        record = new(clib.BYTES, layouts.HVM_CPU.size)
        self._call(function, domid, typecode, instance, record, len(record), vcpu=instance)
        return bytes(ffi.buffer(record))

    def domain_hvm_setcontext(self, domid: int, stream: Bytes) -> None:
        lent = clib.borrow("domain_hvm_setcontext", "stream", clib.BYTES, stream)
        self._call("xc_domain_hvm_setcontext", as_domid(domid), lent, len(lent))

    def domain_debug_control(self, domid: int, op: int, vcpu: int) -> None:
        what, which = as_number("op", op), as_number("vcpu", vcpu)
        self._call("xc_domain_debug_control", as_domid(domid), what, which, vcpu=vcpu)

    def vcpu_getinfo(self, domid: int, vcpu: int) -> VcpuInfo:
        layout, which = layouts.VCPU_INFO, as_number("vcpu", vcpu, _VCPU_INFO_VCPU)
        room = new("char[]", 2 * layout.size)  # the library copies its own structure's size
        info = ffi.cast("xc_vcpuinfo_t *", room)
        self._call("xc_vcpu_getinfo", as_domid(domid), which, info, vcpu=vcpu)
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
        which = as_number("vcpu", vcpu)
        self._call(
            "xc_hvm_inject_trap",
            as_domid(domid),
            which - ((which & 1 << 31) << 1),  # an int in the prototype, uint32_t in the hypercall
            as_number("vector", vector),
            as_number("kind", kind),
            as_number("error_code", error_code),
            as_number("length", length),
            as_number("cr2", cr2),
            vcpu=vcpu,
        )


def _record(stream: bytes, domid: int, typecode: int, instance: int) -> bytes:
    """Find one record in an HVM save stream."""
    for kind, which, start, length in layouts.save_records(stream):
        if (kind, which) == (typecode, instance) and start + length <= len(stream):
            return stream[start : start + length]
    raise errors.from_errno("domain_hvm_getcontext_partial", _errno.ENOENT, domid=domid)
