# SPDX-License-Identifier: LGPL-2.1-or-later
"""What hazards are found by, and what is refused because of them, on the mock and on Xen alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

import xenaltp2m as xa
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.types import Altp2mMode, MemoryType, PodTarget

from .hosts import Host

Answer: TypeAlias = Callable[..., Any]

ABSENT = 0x7FE0
RAM, HOLE, APIC_PAGE, FAR = 0x200, 0x3000, 0xFEE00, 1 << 40
MEMORY_KIB = 16 << 10


@pytest.fixture
def xen(host: Host) -> Iterator[xa.Xen]:
    xen = xa.Xen(host.backend)
    yield xen
    xen.abandon()


def test_what_a_gfn_is(host: Host, answer: Answer) -> None:
    domid = host.shared_domain()
    of = host.backend.hvm_get_mem_type
    assert of(domid, RAM) is MemoryType.RAM
    for gfn in (HOLE, APIC_PAGE, FAR):
        assert of(domid, gfn) is MemoryType.EMULATED
    assert answer(of, ABSENT, RAM) == "ESRCH"


def test_what_is_populated_on_demand(host: Host, answer: Answer) -> None:
    domid = host.shared_domain()
    [info] = host.backend.domain_getinfolist(domid, 1)
    assert host.backend.domain_get_pod_target(domid) == PodTarget(info.pages, 0, 0)
    # libxenctrl up to 4.16 makes an errno of its own return value (xc_domain_pod_target).
    missing = "EPERM" if host.release.minor < 17 else "ESRCH"
    assert answer(host.backend.domain_get_pod_target, ABSENT) == missing


def test_what_is_shared_and_paged_out(host: Host) -> None:
    [info] = host.backend.domain_getinfolist(host.shared_domain(), 1)
    assert (info.shared_pages, info.paged_pages) == (0, 0)


def test_what_xenstore_has(host: Host) -> None:
    domid = host.shared_domain()
    read = host.backend.xs_read
    home = f"/local/domain/{domid}"
    name = host.backend.domid_to_name(domid)
    assert name is not None
    assert read(f"{home}/name") == name.encode()
    assert read(f"/libxl/{domid}/type") == b"pvh"
    assert read(f"{home}/memory/static-max") == str(MEMORY_KIB).encode()
    assert read(f"{home}/memory/target") == str(MEMORY_KIB).encode()
    assert read(f"/local/domain/0/backend/pci/{domid}/0/num_devs") is None
    assert read(f"/local/domain/{ABSENT}/name") is None


def test_the_pool_in_mib(host: Host, answer: Answer) -> None:
    domid = host.shared_domain()
    found = host.backend.shadow_get_allocation(domid)
    assert found > 0
    if host.release.minor >= 17:
        exact = host.backend.get_paging_mempool_size(domid)
        assert found == -(-exact >> 20)
    assert answer(host.backend.shadow_get_allocation, ABSENT) == "ESRCH"


def test_an_ordinary_guest_has_nothing_that_is_refused(host: Host, xen: xa.Xen) -> None:
    with xen.domain(host.shared_domain()) as dom:
        assert not any(hazard.severity is Severity.PROBLEM for hazard in dom.hazards())
        with dom.altp2m() as altp2m:
            altp2m.create_view()


def test_mode_mixed_is_refused_and_can_be_accepted(host: Host, xen: xa.Xen) -> None:
    with xen.domain(host.shared_domain(Altp2mMode.MIXED)) as dom:
        [hazard] = (hazard for hazard in dom.hazards() if hazard.severity is Severity.PROBLEM)
        assert hazard.name == "mixed"
        with pytest.raises(xa.HazardError) as refused:
            dom.altp2m()
        assert refused.value.hazards == ("mixed",)
        assert not dom.altp2m_active
        with dom.altp2m(accept=("mixed",)):
            assert dom.altp2m_active
        assert not dom.altp2m_active


def test_mode_limited_is_not(host: Host, xen: xa.Xen) -> None:
    with xen.domain(host.shared_domain(Altp2mMode.LIMITED)) as dom:
        assert "mixed" not in {hazard.name for hazard in dom.hazards()}
        dom.altp2m().close()
