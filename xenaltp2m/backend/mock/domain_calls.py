# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about the modelled host and its domains."""

from __future__ import annotations

import json
from errno import EACCES, EBUSY, EINVAL, EOPNOTSUPP, EPERM

from xenaltp2m.backend import arguments
from xenaltp2m.backend.mock.calls import operation
from xenaltp2m.backend.mock.machine import Domain, HypercallError
from xenaltp2m.backend.mock.scheduler import Scheduler
from xenaltp2m.backend.protocol import Gfns
from xenaltp2m.types import PAGE_SIZE, Altp2mMode, DomainInfo, DomId, MemoryType, PodTarget

_MIB = 1 << 20
_MAX_PAGES = (1 << 32) - 1


class DomainCalls(Scheduler):
    """Calls about the host and whole domains."""

    @operation
    def xen_extraversion(self) -> str:
        return ".0-mock"

    @operation
    def xen_commandline(self) -> str:
        return "altp2m=1" if self.machine.altp2m_supported else ""

    @operation
    def vm_event_get_version(self) -> int:
        self._check_skew()
        if not self.machine.vm_event:
            raise HypercallError(EOPNOTSUPP)
        return self.release.vm_event_version

    @operation
    def domain_getinfolist(self, first_domid: int, limit: int) -> list[DomainInfo]:
        if self.machine.library.sysctl_version != self.release.sysctl_version:
            raise HypercallError(EACCES)
        if not self.machine.privileged:
            raise HypercallError(EPERM)
        found = sorted(domid for domid in self.machine.domains if domid >= first_domid)
        return [_info(self.machine.domains[domid]) for domid in found[:limit]]

    @operation
    def name_to_domid(self, name: str) -> int | None:
        found = [
            domid
            for domid, domain in self.machine.domains.items()
            if domain.name == name and not domain.dying
        ]
        return arguments.only_domid(name, found)

    @operation
    def domid_to_name(self, domid: int) -> str | None:
        domain = self.machine.domains.get(domid)
        return None if domain is None or domain.dying else domain.name

    @operation
    def domain_config_json(self, domid: int) -> str:
        domain = self.machine.domain(domid)
        build: dict[str, object] = {
            "max_vcpus": len(domain.vcpus),
            "avail_vcpus": list(range(len(domain.vcpus))),
            "max_memkb": domain.max_kib,
            "target_memkb": domain.target_kib,
            f"type.{domain.kind}": {},
        }
        if domain.nested:
            build["nested_hvm"] = "True"
        if domain.mode:
            build["altp2m"] = Altp2mMode(domain.mode).name.lower()
            if self.release.view_count_is_setting:
                build["altp2m_count"] = len(domain.views)
        return json.dumps(
            {
                "c_info": {"type": domain.kind, "name": domain.name, "uuid": str(domain.uuid)},
                "b_info": build,
            }
        )

    @operation
    def xs_read(self, path: str) -> bytes | None:
        for domain in self.machine.domains.values():
            if not domain.dying and (found := domain.store().get(path)) is not None:
                return found.encode()
        return None

    @operation
    def domain_pause(self, domid: int) -> None:
        self._domctl(domid).pauses += 1

    @operation
    def domain_unpause(self, domid: int) -> None:
        domain = self._domctl(domid)
        domain.unpause()
        if not domain.pauses:
            self._go_on(domid)

    @operation
    def domain_maximum_gpfn(self, domid: int) -> int:
        return self.machine.controlled(domid).host.max_mapped

    @operation
    def domain_get_pod_target(self, domid: int) -> PodTarget:
        told = self.machine.library.version >= (4, 17)  # xc_domain_pod_target
        try:
            domain = self.machine.controlled(domid)
        except HypercallError as refused:
            raise HypercallError(refused.errno if told else EPERM) from None
        if not domain.hvm and self.release.version >= (4, 17):
            raise HypercallError(EINVAL if told else EPERM)
        return PodTarget(domain.pages, 0, domain.pod_entries)

    @operation
    def hvm_get_mem_type(self, domid: int, gfn: int) -> MemoryType:
        return self.machine.controlled(domid).mem_type(gfn)

    @operation
    def domain_setmaxmem(self, domid: int, max_kib: int) -> None:
        self._domctl(domid).max_pages = min(max_kib // (PAGE_SIZE // 1024), _MAX_PAGES)

    @operation
    def domain_populate_physmap_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        domain = self._own_memory(domid)
        if domain is None or not all(domain.add_page(gfn, order) for gfn in gfns):
            raise HypercallError(EBUSY)

    @operation
    def domain_decrease_reservation_exact(self, domid: int, gfns: Gfns, order: int = 0) -> None:
        domain = self._own_memory(domid)
        pages = (gfn + offset for gfn in gfns for offset in range(1 << order))
        if domain is None or not all(domain.remove_page(gfn) for gfn in pages):
            raise HypercallError(EINVAL)

    def _own_memory(self, domid: int) -> Domain | None:
        """Whose memory a reservation call changes; Xen does nothing where it may not."""
        return self.machine.domains.get(domid) if self.machine.privileged else None

    @operation
    def hvm_param_get(self, domid: int, param: int) -> int:
        return self.machine.controlled(domid).get_param(param)

    @operation
    def hvm_param_set(self, domid: int, param: int, value: int) -> None:
        self.machine.controlled(domid).set_param(param, value)

    @operation
    def get_paging_mempool_size(self, domid: int) -> int:
        self._require("get_paging_mempool_size")
        return self._domctl(domid).pool.pages * PAGE_SIZE

    @operation
    def set_paging_mempool_size(self, domid: int, size: int) -> None:
        self._require("set_paging_mempool_size")
        pool = self._domctl(domid).pool
        if size % PAGE_SIZE:
            raise HypercallError(EINVAL)
        pool.pages = max(size // PAGE_SIZE, pool.used)

    @operation
    def shadow_get_allocation(self, domid: int) -> int:
        return -(-self._domctl(domid).pool.pages * PAGE_SIZE // _MIB)


def _info(domain: Domain) -> DomainInfo:
    return DomainInfo(
        domid=DomId(domain.domid),
        uuid=domain.uuid,
        hvm=domain.hvm,
        paused=domain.pauses > 0,
        dying=domain.dying,
        shutdown=domain.shutdown_code is not None,
        shutdown_reason=domain.shutdown_code or 0,
        pages=domain.pages,
        max_pages=domain.max_pages,
        vcpus=domain.online_vcpus,
        max_vcpu_id=len(domain.vcpus) - 1,
        shared_pages=domain.shared_pages,
        paged_pages=domain.paged_pages,
    )
