# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the calls about domains, their memory and their monitor answer, on the mock and on Xen."""

from __future__ import annotations

import json
import select
from array import array
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from xenaltp2m.abi.layouts import HVM_CPU, HVM_CPU_TYPECODE, HVM_DESCRIPTOR
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import ALL_GFNS, PAGE_SIZE, Altp2mMode

from .hosts import Host

Answer: TypeAlias = Callable[..., Any]

HOLE = 0x3000
APIC_PAGE = 0xFEE00
ABSENT = 0x7FE0
NO_ERROR_CODE = 0xFFFF_FFFF


def test_what_is_known_of_a_domain(host: Host) -> None:
    domid = host.shared_domain(vcpus=4)
    [info] = host.backend.domain_getinfolist(domid, 1)
    assert (info.domid, info.hvm, info.paused, info.dying, info.shutdown) == (
        domid, True, True, False, False,
    )  # fmt: skip
    assert (info.vcpus, info.max_vcpu_id) == (1, 3)  # the guest brings the others up when it runs
    assert info.pages >= 16 << 20 >> 12
    assert info.max_pages >= info.pages


def test_domains_come_in_order(host: Host) -> None:
    mine = {host.shared_domain(), host.shared_domain(vcpus=4)}
    listed = [info.domid for info in host.backend.domain_getinfolist(0, 1000)]
    assert mine <= set(listed)
    assert listed == sorted(listed)
    assert [info.domid for info in host.backend.domain_getinfolist(0, 1)] == listed[:1]
    assert host.backend.domain_getinfolist(max(listed) + 1, 10) == []


def test_names(host: Host) -> None:
    domid = host.shared_domain()
    name = host.backend.domid_to_name(domid)
    assert name is not None
    assert host.backend.name_to_domid(name) == domid
    assert host.backend.name_to_domid("no such domain") is None
    assert host.backend.domid_to_name(ABSENT) is None


@pytest.mark.parametrize("mode", list(Altp2mMode))
def test_libxl_tells_the_mode(host: Host, mode: Altp2mMode) -> None:
    domid = host.shared_domain(mode)
    config = json.loads(host.backend.domain_config_json(domid))
    assert config["c_info"]["name"] == host.backend.domid_to_name(domid)
    assert config["c_info"]["type"] == "pvh"
    assert config["b_info"]["max_vcpus"] == 1
    assert config["b_info"]["max_memkb"] == 16 << 10
    expected = None if mode is Altp2mMode.DISABLED else mode.name.lower()
    assert config["b_info"].get("altp2m") == expected


def test_pauses_are_counted(host: Host, own_domain: int) -> None:
    xen = host.backend

    def paused() -> bool:
        return xen.domain_getinfolist(own_domain, 1)[0].paused

    xen.domain_pause(own_domain)
    xen.domain_unpause(own_domain)
    assert paused()
    xen.domain_unpause(own_domain)  # the pause it was created with
    assert not paused()
    xen.domain_pause(own_domain)
    assert paused()


def test_populate_and_decrease(host: Host, own_domain: int, answer: Answer) -> None:
    xen = host.backend
    before = xen.domain_getinfolist(own_domain, 1)[0]
    xen.domain_setmaxmem(own_domain, 64 << 10)
    assert xen.domain_getinfolist(own_domain, 1)[0].max_pages == 64 << 20 >> 12
    top = xen.domain_maximum_gpfn(own_domain)
    pages = array("Q", [top + 1, top + 2])
    xen.domain_populate_physmap_exact(own_domain, pages)
    assert xen.domain_maximum_gpfn(own_domain) == top + 2
    assert xen.domain_getinfolist(own_domain, 1)[0].pages == before.pages + 2
    xen.domain_decrease_reservation_exact(own_domain, pages)
    assert xen.domain_getinfolist(own_domain, 1)[0].pages == before.pages
    assert xen.domain_maximum_gpfn(own_domain) == top + 2  # it never shrinks
    assert answer(xen.domain_decrease_reservation_exact, own_domain, pages) == "EINVAL"
    apic = array("Q", [APIC_PAGE])
    assert answer(xen.domain_decrease_reservation_exact, own_domain, apic) == "EINVAL"
    xen.domain_setmaxmem(own_domain, before.pages * (PAGE_SIZE // 1024))
    assert answer(xen.domain_populate_physmap_exact, own_domain, pages) == "EBUSY"
    assert answer(xen.domain_populate_physmap_exact, ABSENT, pages) == "EBUSY"


def test_memory_is_shared(host: Host, own_domain: int, answer: Answer) -> None:
    xen = host.backend
    pages = xen.foreignmemory_map(own_domain, True, [0x300, 0x205])
    pages[1][8:12] = b"\xde\xad\xbe\xef"
    again = xen.foreignmemory_map(own_domain, False, [0x205])
    assert bytes(again[0][8:12]) == b"\xde\xad\xbe\xef"
    assert again[0].readonly
    assert bytes(pages[0]) == bytes(PAGE_SIZE)
    xen.foreignmemory_unmap(pages)
    with pytest.raises(ValueError, match="released"):
        pages[1][0]
    xen.foreignmemory_unmap(again)
    assert answer(xen.foreignmemory_map, own_domain, False, [0x205, HOLE]) == "EINVAL"


def test_pages_stay_mapped_while_a_slice_is_alive(
    host: Host, own_domain: int, answer: Answer
) -> None:
    xen = host.backend
    for writable in (True, False):
        pages = xen.foreignmemory_map(own_domain, writable, [0x300, 0x205])
        slices = [pages[1][:16]]
        assert answer(xen.foreignmemory_unmap, pages) == "EBUSY"
        assert len(bytes(slices.pop())) == 16
        xen.foreignmemory_unmap(pages)
        with pytest.raises(InvalidArgumentError):
            xen.foreignmemory_unmap(pages)


def test_registers(host: Host, own_domain: int) -> None:
    xen = host.backend
    record = xen.domain_hvm_getcontext_partial(own_domain, HVM_CPU_TYPECODE, 0)
    assert len(record) == HVM_CPU.size
    stream = bytearray(xen.domain_hvm_getcontext(own_domain))
    [start] = [at for typecode, at in records(stream) if typecode == HVM_CPU_TYPECODE]
    clock = HVM_CPU.fields["tsc"].offset  # it goes on between the two calls
    assert stream[start : start + clock] == record[:clock]
    offset, width = HVM_CPU.fields["rbx"]
    rbx = 0x1122334455667788
    stream[start + offset : start + offset + width] = rbx.to_bytes(width, "little")
    xen.domain_hvm_setcontext(own_domain, stream)
    now = xen.domain_hvm_getcontext_partial(own_domain, HVM_CPU_TYPECODE, 0)
    assert HVM_CPU.number(now, "rbx") == rbx


def records(stream: bytearray) -> Iterator[tuple[int, int]]:
    """Yield (typecode, where its body starts) of each record of an HVM save stream."""
    at = 0
    while at < len(stream):
        yield HVM_DESCRIPTOR.number(stream, "typecode", at), at + HVM_DESCRIPTOR.size
        at += HVM_DESCRIPTOR.size + HVM_DESCRIPTOR.number(stream, "length", at)


def test_vcpus_that_never_ran(host: Host, answer: Answer) -> None:
    xen = host.backend
    domid = host.shared_domain(vcpus=4)
    found = [xen.vcpu_getinfo(domid, vcpu) for vcpu in range(4)]
    assert [info.online for info in found] == [True, False, False, False]
    assert not any(info.blocked or info.running or info.cpu_time for info in found)
    no_such = "EINVAL" if host.release.minor < 22 else "ENOENT"
    for missing in (4, 0xFFFF):
        assert answer(xen.vcpu_getinfo, domid, missing) == no_such


def test_one_event_waits_for_a_vcpu(host: Host, answer: Answer) -> None:
    xen = host.backend
    domid = host.create(vcpus=4)
    breakpoint_ = (3, 6, NO_ERROR_CODE, 1, 0)
    try:
        for vcpu in (0, 3):  # one that runs when the domain does, and one that was never started
            assert answer(xen.hvm_inject_trap, domid, vcpu, *breakpoint_) is None
            assert answer(xen.hvm_inject_trap, domid, vcpu, *breakpoint_) == "EBUSY"
            assert answer(xen.hvm_inject_trap, domid, vcpu, 14, 3, 2, 0, 0x1000) == "EBUSY"
        for missing in (4, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF):
            assert answer(xen.hvm_inject_trap, domid, missing, *breakpoint_) == "EINVAL"
    finally:
        host.destroy(domid)


def test_an_absent_domain(host: Host, answer: Answer) -> None:
    xen = host.backend
    for call, arguments in (
        (xen.domain_pause, ()),
        (xen.domain_unpause, ()),
        (xen.domain_maximum_gpfn, ()),
        (xen.domain_setmaxmem, (1 << 20,)),
        (xen.hvm_param_get, (35,)),
        (xen.domain_hvm_getcontext_partial, (HVM_CPU_TYPECODE, 0)),
        (xen.domain_set_access_required, (False,)),
        (xen.monitor_get_capabilities, ()),
        (xen.monitor_disable, ()),
        (xen.monitor_control_registers, ()),
        (xen.domain_debug_control, (0, 0)),
        (xen.vcpu_getinfo, (0,)),
        (xen.hvm_inject_trap, (0, 3, 6, NO_ERROR_CODE, 1, 0)),
    ):
        assert answer(call, ABSENT, *arguments) == "ESRCH", call


def test_host_access_needs_a_ring(host: Host, own_domain: int, answer: Answer) -> None:
    xen = host.backend
    one = array("Q", [0x104])
    assert answer(xen.set_mem_access, own_domain, 5, 0x104, 1) == "ENODEV"
    assert answer(xen.set_mem_access_multi, own_domain, b"\5", one) == "ENODEV"
    assert answer(xen.get_mem_access, own_domain, 0x104) == "ENODEV"
    _, ring = xen.monitor_enable(own_domain)
    try:
        xen.set_mem_access(own_domain, 5, 0x104, 2)
        assert xen.get_mem_access(own_domain, 0x105) == 5
        xen.set_mem_access_multi(own_domain, b"\1", one)
        assert xen.get_mem_access(own_domain, 0x104) == 1
        xen.set_mem_access(own_domain, 3, ALL_GFNS, 0)
        assert xen.get_mem_access(own_domain, ALL_GFNS) == 3
        top = xen.domain_maximum_gpfn(own_domain)
        assert answer(xen.set_mem_access, own_domain, 5, 0x104, 0) == "EINVAL"
        assert answer(xen.set_mem_access, own_domain, 5, top, 2) == "EINVAL"
        assert answer(xen.set_mem_access, own_domain, 99, 0x104, 1) == "EINVAL"
        assert answer(xen.get_mem_access, own_domain, top + 1) == "EINVAL"
        assert answer(xen.get_mem_access, own_domain, HOLE) == "ESRCH"
    finally:
        xen.monitor_unmap_ring(ring)
        xen.monitor_disable(own_domain)


def test_one_monitor_at_a_time(host: Host, own_domain: int, answer: Answer) -> None:
    xen = host.backend
    assert answer(xen.monitor_disable, own_domain) == "EINVAL"
    assert answer(xen.monitor_resume, own_domain) == "ENODEV"
    _, ring = xen.monitor_enable(own_domain)
    assert len(ring) == PAGE_SIZE
    assert answer(xen.monitor_enable, own_domain) == "EBUSY"
    assert answer(xen.monitor_resume, own_domain) is None
    xen.monitor_unmap_ring(ring)
    xen.monitor_disable(own_domain)
    _, ring = xen.monitor_enable(own_domain)
    xen.monitor_unmap_ring(ring)
    xen.monitor_disable(own_domain)


def test_event_switches(host: Host, own_domain: int, answer: Answer) -> None:
    xen, domid = host.backend, own_domain
    switches: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = [
        (xen.monitor_singlestep, (True,), (False,)),
        (xen.monitor_software_breakpoint, (True,), (False,)),
        (xen.monitor_guest_request, (True, True, False), (False, True, False)),
        (xen.monitor_debug_exceptions, (True, True), (False, True)),
        (xen.monitor_cpuid, (True,), (False,)),
        (xen.monitor_emul_unimplemented, (True,), (False,)),
        (xen.monitor_inguest_pagefault, (True,), (False,)),
        (xen.monitor_write_ctrlreg, (1, True, True, 0, True), (1, False, True, 0, True)),
    ]
    if host.release.minor >= 17:
        switches.append((xen.monitor_vmexit, (True, True), (False, True)))
    if host.release.minor >= 18:
        switches.append((xen.monitor_io, (True,), (False,)))
    for call, on, off in switches:
        assert answer(call, domid, *off) == "EEXIST", call
        assert answer(call, domid, *on) is None, call
        assert answer(call, domid, *on) == "EEXIST", call
        assert answer(call, domid, *off) is None, call
    assert answer(xen.monitor_privileged_call, domid, True) == "EOPNOTSUPP"
    assert answer(xen.monitor_write_ctrlreg, domid, 4, True, True, 0, True) == "EINVAL"
    assert answer(xen.monitor_mov_to_msr, domid, 0x174, True, True) == "ENXIO"
    assert answer(xen.monitor_emulate_each_rep, domid, True) == "EINVAL"
    _, ring = xen.monitor_enable(domid)
    try:
        assert answer(xen.monitor_mov_to_msr, domid, 0x174, True, True) is None
        assert answer(xen.monitor_mov_to_msr, domid, 0x174, True, True) == "EEXIST"
        assert answer(xen.monitor_mov_to_msr, domid, 0x2000, True, True) == "EINVAL"
        assert answer(xen.monitor_emulate_each_rep, domid, True) is None
        xen.monitor_singlestep(domid, True)
    finally:
        xen.monitor_unmap_ring(ring)
        xen.monitor_disable(domid)
    assert answer(xen.monitor_singlestep, domid, False) == "EEXIST"  # disabling took it along


def test_register_writes_can_be_gated_with_and_without_a_ring(
    host: Host, own_domain: int, answer: Answer
) -> None:
    xen, domid = host.backend, own_domain
    assert answer(xen.monitor_control_registers, domid) is None
    _, ring = xen.monitor_enable(domid)
    for _ in range(2):
        assert answer(xen.monitor_control_registers, domid) is None
    xen.monitor_unmap_ring(ring)
    xen.monitor_disable(domid)


def test_capabilities(host: Host, own_domain: int) -> None:
    capabilities = host.backend.monitor_get_capabilities(own_domain)
    always = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11)
    assert all(capabilities >> bit & 1 for bit in always), bin(capabilities)
    assert capabilities >> 12 & 1 == (host.release.minor >= 17)  # vmexit
    assert capabilities >> 13 & 1 == (host.release.minor >= 18)  # io


def test_versions(host: Host) -> None:
    assert host.backend.vm_event_get_version() == (6 if host.release.minor == 14 else 7)
    assert "altp2m=1" in host.backend.xen_commandline().split()


def test_the_p2m_pool(host: Host, own_domain: int, answer: Answer) -> None:
    xen = host.backend
    if host.release.minor < 17:
        assert answer_is_unsupported(xen.get_paging_mempool_size, own_domain)
        return
    size = xen.get_paging_mempool_size(own_domain)
    assert size > 0
    assert size % PAGE_SIZE == 0
    xen.set_paging_mempool_size(own_domain, size + (1 << 20))
    assert xen.get_paging_mempool_size(own_domain) == size + (1 << 20)
    assert answer(xen.set_paging_mempool_size, own_domain, size + 1) == "EINVAL"


def answer_is_unsupported(call: Callable[[int], Any], domid: int) -> bool:
    """Tell whether the library lacks the function: an error without an errno."""
    try:
        call(domid)
    except NotImplementedError as error:
        return "4.17" in str(error)
    return False


def test_event_channels(host: Host, own_domain: int, answer: Answer) -> None:
    xen = host.backend
    port, ring = xen.monitor_enable(own_domain)
    channel = xen.evtchn_open()
    try:
        assert answer(xen.evtchn_bind_interdomain, channel, own_domain, port + 1000) == "EINVAL"
        local = xen.evtchn_bind_interdomain(channel, own_domain, port)
        assert select.select([xen.evtchn_fd(channel)], [], [], 5)[0]  # binding fires once
        assert xen.evtchn_pending(channel) == local
        xen.evtchn_unmask(channel, local)
        xen.evtchn_notify(channel, local)  # nothing in the ring: nothing happens
        assert answer(xen.evtchn_notify, channel, local + 1000) == "ENOTCONN"
        assert answer(xen.evtchn_unmask, channel, local + 1000) is None
    finally:
        xen.evtchn_close(channel)
        xen.monitor_unmap_ring(ring)
        xen.monitor_disable(own_domain)
    assert answer(xen.evtchn_fd, channel) == "EBADF"


def test_more_refusals(host: Host, answer: Answer) -> None:
    xen = host.backend
    domid = host.shared_domain(vcpus=4)
    assert answer(xen.domain_debug_control, domid, 99, 0) == "ENOSYS"
    assert answer(xen.foreignmemory_map, domid, False, []) == "EINVAL"
    assert answer(xen.domain_hvm_getcontext_partial, domid, HVM_CPU_TYPECODE, 4) == "ENOENT"
    assert answer(xen.domain_hvm_getcontext_partial, domid, HVM_CPU_TYPECODE, 1) == "ENODATA"
    assert answer(xen.domain_hvm_setcontext, domid, b"") == "ENODATA"
    assert answer(xen.hvm_param_get, domid, 4096) == "EINVAL"
