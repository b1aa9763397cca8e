# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls about the host and its domains: versions, pausing, memory, and HVM parameters."""

from __future__ import annotations

import itertools
from functools import partial
from uuid import UUID

from xenaltp2m import errors
from xenaltp2m.abi import layouts
from xenaltp2m.backend import arguments
from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.checks import as_domid, as_gfn, as_number
from xenaltp2m.backend.libxc.clib import NULL, checked, constant, ffi, new, refusal, text
from xenaltp2m.backend.libxc.connection import Connection
from xenaltp2m.backend.protocol import Gfns
from xenaltp2m.types import DomainInfo, DomId, MemoryType, PodTarget

_EXTRAVERSION_SIZE = 16  # xen_extraversion_t, public/version.h
_COMMANDLINE_SIZE = 1024  # xen_commandline_t


class DomainCalls(Connection):
    """Calls about the host and whole domains."""

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

    def domain_getinfolist(self, first_domid: int, limit: int) -> list[DomainInfo]:
        first = as_number("first_domid", first_domid)
        limit = min(as_number("limit", limit), arguments.DOMID_LIMIT - first)
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

    def domain_pause(self, domid: int) -> None:
        self._call("xc_domain_pause", as_domid(domid))

    def domain_unpause(self, domid: int) -> None:
        self._call("xc_domain_unpause", as_domid(domid))

    def domain_maximum_gpfn(self, domid: int) -> int:
        gpfn = new(clib.PFN)
        self._call("xc_domain_maximum_gpfn", as_domid(domid), gpfn)
        return int(gpfn[0])

    def domain_get_pod_target(self, domid: int) -> PodTarget:
        numbers = [new(clib.UINT64) for _ in range(3)]
        self._call("xc_domain_get_pod_target", as_domid(domid), *numbers)
        return PodTarget(*(int(number[0]) for number in numbers))

    def hvm_get_mem_type(self, domid: int, gfn: int) -> MemoryType:
        asked = layouts.GET_MEM_TYPE.filled({"domid": as_domid(domid), "pfn": as_gfn(gfn)})
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
        self._call("xc_domain_setmaxmem", as_domid(domid), as_number("max_kib", max_kib))

    # libxenctrl writes the gfns back after these two (BOUNCE_BOTH, xc_domain.c): it gets a copy.

    def domain_populate_physmap_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        function = "xc_domain_populate_physmap_exact"
        extents = clib.copy_gfns("domain_populate_physmap_exact", gfns)
        order = as_number("order", order)
        self._call(function, as_domid(domid), len(extents), order, 0, extents)

    def domain_decrease_reservation_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        function = "xc_domain_decrease_reservation_exact"
        extents = clib.copy_gfns("domain_decrease_reservation_exact", gfns)
        order = as_number("order", order)
        self._call(function, as_domid(domid), len(extents), order, extents)

    def hvm_param_get(self, domid: int, param: int) -> int:
        value = new(clib.UINT64)
        self._call("xc_hvm_param_get", as_domid(domid), as_number("param", param), value)
        return int(value[0])

    def hvm_param_set(self, domid: int, param: int, value: int) -> None:
        index, wanted = as_number("param", param), as_number("value", value)
        self._call("xc_hvm_param_set", as_domid(domid), index, wanted)

    def get_paging_mempool_size(self, domid: int) -> int:
        size = new(clib.UINT64)
        self._call("xc_get_paging_mempool_size", as_domid(domid), size)
        return int(size[0])

    def set_paging_mempool_size(self, domid: int, size: int) -> None:
        self._call("xc_set_paging_mempool_size", as_domid(domid), as_number("size", size))

    def shadow_get_allocation(self, domid: int) -> int:
        """``xc_shadow_control``, which has another prototype in libraries up to 4.15."""
        function, op = "xc_shadow_control", constant("XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION")
        if self.supports("xc_logdirty_control") or not self.supports(function):
            size = new(clib.UINT)
            self._call(function, as_domid(domid), op, size, 0)
            return int(size[0])
        long_size = new(clib.ULONG)
        older = clib.cast_function(self._library, function, "xc_shadow_control_4_14_t *")
        if older(self._xch, as_domid(domid), op, NULL, 0, long_size, 0, NULL) < 0:
            raise refusal(function, domid=domid)
        return int(long_size[0])


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
