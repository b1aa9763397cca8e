# SPDX-License-Identifier: LGPL-2.1-or-later
"""The altp2m calls, and memory access in the host p2m."""

from __future__ import annotations

from functools import partial

from xenaltp2m.backend import arguments
from xenaltp2m.backend.libxc import clib
from xenaltp2m.backend.libxc.checks import as_access, as_domid, as_flag, as_gfn, as_number, as_view
from xenaltp2m.backend.libxc.clib import NULL, constant, new, refusal
from xenaltp2m.backend.libxc.connection import Connection
from xenaltp2m.backend.libxc.loader import Loader
from xenaltp2m.backend.protocol import Bytes, Gfns
from xenaltp2m.errors import XenError
from xenaltp2m.types import PAGE_SIZE

_NARROW_ACCESS = 1 << 8
"""``xen_mem_access_op.access`` is a byte in the hypercall (memory.h), an int in C's prototype."""
_SHORT = (PAGE_SIZE - 16) // 8
"""Gfns that fit a page after libxencall's header: it keeps up to four pages (``buffer.c``)."""


class Altp2mCalls(Connection):
    """The altp2m calls, with kept buffers for the bulk one, and the host p2m's access calls."""

    def __init__(self, loader: Loader | None = None) -> None:
        self._buffers: list[clib.HypercallBuffer] = []  # those that no call is using
        super().__init__(loader)

    def _forget(self) -> None:
        super()._forget()
        self._buffers.clear()

    def set_mem_access(self, domid: int, access: int, first_gfn: int, count: int) -> None:
        access, first = as_number("access", access, _NARROW_ACCESS), as_gfn(first_gfn, "first_gfn")
        count = as_number("count", count)
        self._call("xc_set_mem_access", as_domid(domid), access, first, count, gfn=first_gfn)

    def set_mem_access_multi(self, domid: int, accesses: Bytes, gfns: Gfns) -> None:
        """``xc_set_mem_access_multi``; the arrays are lent to C, not copied."""
        bulk = clib.lend_bulk("set_mem_access_multi", accesses, gfns)
        self._call("xc_set_mem_access_multi", as_domid(domid), *bulk)

    def get_mem_access(self, domid: int, gfn: int) -> int:
        access = new(clib.ACCESS)
        self._call("xc_get_mem_access", as_domid(domid), as_gfn(gfn), access, gfn=gfn)
        return int(access[0])

    def domain_set_access_required(self, domid: int, required: bool) -> None:
        self._call("xc_domain_set_access_required", as_domid(domid), as_flag("required", required))

    def altp2m_get_domain_state(self, domid: int) -> bool:
        state = new(clib.BOOL)
        self._call("xc_altp2m_get_domain_state", as_domid(domid), state)
        return bool(state[0])

    def altp2m_set_domain_state(self, domid: int, state: bool) -> None:
        self._call("xc_altp2m_set_domain_state", as_domid(domid), as_flag("state", state))

    def altp2m_set_vcpu_enable_notify(self, domid: int, vcpu: int, gfn: int) -> None:
        function = "xc_altp2m_set_vcpu_enable_notify"
        self._call(
            function, as_domid(domid), as_number("vcpu", vcpu), as_gfn(gfn), vcpu=vcpu, gfn=gfn
        )

    def altp2m_set_vcpu_disable_notify(self, domid: int, vcpu: int) -> None:
        function = "xc_altp2m_set_vcpu_disable_notify"
        self._call(function, as_domid(domid), as_number("vcpu", vcpu), vcpu=vcpu)

    def altp2m_create_view(self, domid: int, default_access: int) -> int:
        view = new(clib.UINT16)
        access = as_access(default_access, "default_access")
        self._call("xc_altp2m_create_view", as_domid(domid), access, view)
        return int(view[0])

    def altp2m_destroy_view(self, domid: int, view: int) -> None:
        self._call("xc_altp2m_destroy_view", as_domid(domid), as_view(view), view=view)

    def altp2m_switch_to_view(self, domid: int, view: int) -> None:
        self._call("xc_altp2m_switch_to_view", as_domid(domid), as_view(view), view=view)

    def altp2m_set_mem_access(self, domid: int, view: int, gfn: int, access: int) -> None:
        function = "xc_altp2m_set_mem_access"
        access = as_access(access)
        self._call(
            function, as_domid(domid), as_view(view), as_gfn(gfn), access, view=view, gfn=gfn
        )

    def altp2m_set_mem_access_multi(
        self, domid: int, view: int, accesses: Bytes, gfns: Gfns
    ) -> None:
        """``xc_altp2m_set_mem_access_multi``; of long arrays its hypercall, with a buffer kept.

        libxenctrl maps new pages for its copy of such arrays at every call, and unmaps them.
        """
        function = "xc_altp2m_set_mem_access_multi"
        bulk = clib.lend_bulk("altp2m_set_mem_access_multi", accesses, gfns)
        as_domid(domid)
        as_view(view)
        kept = self._take_buffer() if _SHORT < len(gfns) <= clib.HypercallBuffer.GFNS else None
        if kept is None:
            self._call(function, domid, view, *bulk, view=view)
            return
        try:
            hypercall, op = constant("__HYPERVISOR_hvm_op"), constant("HVMOP_altp2m")
            arguments_at, handle = kept.fill(domid, view, *bulk), self._xencall_handle()
            if self._xencall.xencall2(handle, hypercall, op, arguments_at) < 0:
                raise refusal(function, domid=domid, view=view)
        finally:
            self._buffers.append(kept)

    def _take_buffer(self) -> clib.HypercallBuffer | None:
        """Take a buffer that no other call uses, or None: libxenctrl does without, or says why not.

        Only closing frees buffers, so there are as many as calls were made at the same time.
        """
        try:
            return self._buffers.pop()
        except IndexError:
            pass
        try:
            if not self.supports("xencall2"):
                return None
            handle, calls = self._xencall_handle(), self._xencall
            memory = calls.xencall_alloc_buffer(handle, clib.HypercallBuffer.SIZE)
        except XenError:
            return None
        if memory == NULL:
            return None
        self._undo.append(partial(calls.xencall_free_buffer, handle, memory))
        return clib.HypercallBuffer(memory)

    def altp2m_get_mem_access(self, domid: int, view: int, gfn: int) -> int:
        access = new(clib.ACCESS)
        function = "xc_altp2m_get_mem_access"
        self._call(
            function, as_domid(domid), as_view(view), as_gfn(gfn), access, view=view, gfn=gfn
        )
        return int(access[0])

    def altp2m_change_gfn(self, domid: int, view: int, old_gfn: int, new_gfn: int) -> None:
        function = "xc_altp2m_change_gfn"
        old, new = as_gfn(old_gfn, "old_gfn"), as_gfn(new_gfn, "new_gfn")
        self._call(function, as_domid(domid), as_view(view), old, new, view=view, gfn=old_gfn)

    def altp2m_set_suppress_ve(self, domid: int, view: int, gfn: int, suppress: bool) -> None:
        """``xc_altp2m_set_suppress_ve``.

        Raises:
            InvalidArgumentError: gfn is ~0, from which Xen would not come back.
        """
        function = "xc_altp2m_set_suppress_ve"
        arguments.refuse_livelock("altp2m_set_suppress_ve", as_gfn(gfn))
        flag = as_flag("suppress", suppress)
        self._call(function, as_domid(domid), as_view(view), gfn, flag, view=view, gfn=gfn)

    def altp2m_set_suppress_ve_multi(
        self, domid: int, view: int, first_gfn: int, last_gfn: int, suppress: bool
    ) -> tuple[int, int] | None:
        """``xc_altp2m_set_supress_ve_multi``.

        Xen clamps ``last_gfn`` to what the CPU can address (``p2m_set_suppress_ve_multi``), so a
        range up to 2^64-1 ends. C writes the two results on a failure only, and the errno negated.
        """
        error_gfn, error_code = new(clib.PFN), new(clib.INT32)
        first, last = as_gfn(first_gfn, "first_gfn"), as_gfn(last_gfn, "last_gfn")
        self._call(
            "xc_altp2m_set_supress_ve_multi",
            as_domid(domid),
            as_view(view),
            first,
            last,
            as_flag("suppress", suppress),
            error_gfn,
            error_code,
            view=view,
            gfn=first_gfn,
        )
        return (int(error_gfn[0]), -error_code[0]) if error_code[0] else None

    def altp2m_get_suppress_ve(self, domid: int, view: int, gfn: int) -> bool:
        suppress = new(clib.BOOL)
        function = "xc_altp2m_get_suppress_ve"
        self._call(
            function, as_domid(domid), as_view(view), as_gfn(gfn), suppress, view=view, gfn=gfn
        )
        return bool(suppress[0])

    def altp2m_get_vcpu_p2m_idx(self, domid: int, vcpu: int) -> int:
        view = new(clib.UINT16)
        function = "xc_altp2m_get_vcpu_p2m_idx"
        self._call(function, as_domid(domid), as_number("vcpu", vcpu), view, vcpu=vcpu)
        return int(view[0])

    def altp2m_set_visibility(self, domid: int, view: int, visible: bool) -> None:
        function = "xc_altp2m_set_visibility"
        self._call(function, as_domid(domid), as_view(view), as_flag("visible", visible), view=view)
