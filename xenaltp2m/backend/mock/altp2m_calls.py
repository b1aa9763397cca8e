# SPDX-License-Identifier: LGPL-2.1-or-later
"""The altp2m calls of the modelled host, and memory access in the host p2m."""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOSYS, EOPNOTSUPP, EPERM

from xenaltp2m.backend import arguments
from xenaltp2m.backend.mock.calls import operation
from xenaltp2m.backend.mock.machine import Domain, HypercallError
from xenaltp2m.backend.mock.scheduler import Scheduler
from xenaltp2m.backend.protocol import Bytes, Gfns
from xenaltp2m.types import ALL_GFNS


class Altp2mCalls(Scheduler):
    """The altp2m calls, and those for access in the host p2m."""

    @operation
    def set_mem_access(self, domid: int, access: int, first_gfn: int, count: int) -> None:
        domain = self._memory_event_domain(domid)
        if first_gfn == ALL_GFNS:
            domain.set_mem_access(0, first_gfn, access)
            return
        if not count or first_gfn + count - 1 > domain.host.max_mapped:
            raise HypercallError(EINVAL)
        for gfn in range(first_gfn, first_gfn + count):
            domain.set_mem_access(0, gfn, access)

    @operation
    def set_mem_access_multi(self, domid: int, accesses: Bytes, gfns: Gfns) -> None:
        self._memory_event_domain(domid).set_mem_access_multi(0, bytes(accesses), gfns)

    @operation
    def get_mem_access(self, domid: int, gfn: int) -> int:
        domain = self._memory_event_domain(domid)
        if domain.host.max_mapped < gfn < ALL_GFNS:
            raise HypercallError(EINVAL)
        return domain.get_mem_access(0, gfn)

    def _memory_event_domain(self, domid: int) -> Domain:
        """``mem_access_memop``: needs a monitor's ring, unlike the altp2m calls."""
        domain = self.machine.domain(domid)
        if not self.machine.vm_event:
            raise HypercallError(ENOSYS)
        if not domain.hvm:
            raise HypercallError(EINVAL)
        if not self.machine.privileged:
            raise HypercallError(EPERM)
        if not domain.listened:
            raise HypercallError(ENODEV)
        return domain

    @operation
    def domain_set_access_required(self, domid: int, required: bool) -> None:
        domain = self._domctl(domid)
        if not self.machine.vm_event:
            raise HypercallError(ENOSYS)
        domain.access_required = required
        if domain.active:
            for view in domain.views:
                view.access_required = required

    @operation
    def altp2m_get_domain_state(self, domid: int) -> bool:
        return self.machine.altp2m(domid, needs_active=False).active

    @operation
    def altp2m_set_domain_state(self, domid: int, state: bool) -> None:
        self.machine.altp2m(domid, needs_active=False).set_active(state)

    @operation
    def altp2m_set_vcpu_enable_notify(self, domid: int, vcpu: int, gfn: int) -> None:
        self.machine.altp2m(domid).enable_notify(vcpu, gfn)

    @operation
    def altp2m_set_vcpu_disable_notify(self, domid: int, vcpu: int) -> None:
        self.machine.altp2m(domid).disable_notify(vcpu)

    @operation
    def altp2m_create_view(self, domid: int, default_access: int) -> int:
        return self.machine.altp2m(domid).create_view(default_access)

    @operation
    def altp2m_destroy_view(self, domid: int, view: int) -> None:
        self.machine.altp2m(domid).destroy_view(view)

    @operation
    def altp2m_switch_to_view(self, domid: int, view: int) -> None:
        self.machine.altp2m(domid).switch_to_view(view)

    @operation
    def altp2m_set_mem_access(self, domid: int, view: int, gfn: int, access: int) -> None:
        self._access_altp2m(domid).set_mem_access(view, gfn, access)

    @operation
    def altp2m_set_mem_access_multi(
        self, domid: int, view: int, accesses: Bytes, gfns: Gfns
    ) -> None:
        self._access_altp2m(domid).set_mem_access_multi(view, bytes(accesses), gfns)

    @operation
    def altp2m_get_mem_access(self, domid: int, view: int, gfn: int) -> int:
        return self._access_altp2m(domid).get_mem_access(view, gfn)

    def _access_altp2m(self, domid: int) -> Domain:
        """The gate of the access calls, which 4.22 may be built without."""
        domain = self.machine.altp2m(domid)
        if not self.machine.vm_event:
            raise HypercallError(EOPNOTSUPP)
        return domain

    @operation
    def altp2m_change_gfn(self, domid: int, view: int, old_gfn: int, new_gfn: int) -> None:
        self.machine.altp2m(domid).change_gfn(view, old_gfn, new_gfn)

    @operation
    def altp2m_set_suppress_ve(self, domid: int, view: int, gfn: int, suppress: bool) -> None:
        arguments.refuse_livelock("altp2m_set_suppress_ve", gfn)
        self.machine.altp2m(domid).set_suppress_ve(view, gfn, suppress)

    @operation
    def altp2m_set_suppress_ve_multi(
        self, domid: int, view: int, first_gfn: int, last_gfn: int, suppress: bool
    ) -> tuple[int, int] | None:
        domain = self.machine.altp2m(domid)
        return domain.set_suppress_ve_multi(view, first_gfn, last_gfn, suppress)

    @operation
    def altp2m_get_suppress_ve(self, domid: int, view: int, gfn: int) -> bool:
        return self.machine.altp2m(domid).get_suppress_ve(view, gfn)

    @operation
    def altp2m_get_vcpu_p2m_idx(self, domid: int, vcpu: int) -> int:
        return self.machine.altp2m(domid).vcpu_view(vcpu)

    @operation
    def altp2m_set_visibility(self, domid: int, view: int, visible: bool) -> None:
        self.machine.altp2m(domid).set_visibility(view, visible)
