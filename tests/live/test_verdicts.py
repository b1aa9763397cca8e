# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reading Xen's source had left open, settled on a running hypervisor.

Each test's docstring is a verdict that docs/semantics.md repeats.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

import xenaltp2m as xa
from xenaltp2m.abi.layouts import VM_EVENT, VM_EVENT_RING
from xenaltp2m.backend import Backend
from xenaltp2m.types import ALL_GFNS

from .conftest import Guest

N, R, W, X, RX, WX, RWX, RX2RW, N2RWX = 0, 1, 2, 4, 5, 6, 7, 8, 9
HOLES = 0x200000

Answer: TypeAlias = Callable[..., Any]


def errno_name(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(xa.XenError) as refused:
        call(*arguments)
    return str(refused.value).split(": ")[1].split(",")[0]


def exhaust_pool(backend: Backend, domid: int) -> None:
    """Use up the domain's p2m pool: an empty entry in each 2M takes a table."""
    for gfn in range(HOLES, HOLES << 4, 512):
        try:
            backend.altp2m_set_mem_access(domid, 0, gfn, RWX)
        except xa.OutOfMemoryError:
            return
    raise AssertionError("the pool has no end")


def enter_view(backend: Backend, guest: Guest, default: int = RWX) -> int:
    backend.altp2m_set_domain_state(guest.domid, True)
    view = backend.altp2m_create_view(guest.domid, default)
    backend.altp2m_switch_to_view(guest.domid, view)
    return view


def test_a_failed_remap_is_reported_as_success(backend: Backend, guest: Guest) -> None:
    """change_gfn returns 0 though its last write failed for want of memory; nothing is remapped."""
    domid = guest.domid
    backend.altp2m_set_domain_state(domid, True)
    for gfn in (0x10, 0x11):
        backend.altp2m_set_mem_access(domid, 0, gfn, RWX)  # 4K in the host: nothing to copy ahead
    view = backend.altp2m_create_view(domid, RWX)
    exhaust_pool(backend, domid)
    backend.altp2m_change_gfn(domid, view, 0x10, 0x11)
    assert errno_name(backend.altp2m_get_mem_access, domid, view, 0x10) == "ESRCH"
    assert errno_name(backend.altp2m_set_mem_access, domid, view, 0x10, RX) == "ENOMEM"


def test_our_remap_reports_it(backend: Backend, guest: Guest) -> None:
    """View.remap makes an entry first, so that the pool's end is an error."""
    backend.altp2m_set_domain_state(guest.domid, True)
    for gfn in (0x10, 0x11):
        backend.altp2m_set_mem_access(guest.domid, 0, gfn, RWX)
    with guest.dom.altp2m() as altp2m:
        view = altp2m.create_view()
        exhaust_pool(backend, guest.domid)
        with pytest.raises(xa.OutOfMemoryError, match="shadow_memory"):
            view.remap(0x10, 0x11, access=xa.Access.X)
        assert view.access(0x10) is None


def test_a_view_that_cannot_be_filled_kills_the_guest(backend: Backend, guest: Guest) -> None:
    """With an exhausted pool the first lazy copy crashes the domain."""
    enter_view(backend, guest)
    exhaust_pool(backend, guest.domid)
    guest.run()
    assert guest.crashed()


def test_unheard_violations_lift_the_restriction(backend: Backend, guest: Guest) -> None:
    """Without a monitor a violation makes the entry rwx and the guest goes on."""
    view = enter_view(backend, guest)
    for access in (N, R, RX):
        backend.altp2m_set_mem_access(guest.domid, view, guest.counter, access)
        assert guest.run() > 0
        assert backend.altp2m_get_mem_access(guest.domid, view, guest.counter) == RWX


def test_access_required_reaches_views_only_while_on(backend: Backend, guest: Guest) -> None:
    """access_required set before altp2m is on does not reach the views; set after, it does."""
    backend.domain_set_access_required(guest.domid, True)
    view = enter_view(backend, guest)
    backend.altp2m_set_mem_access(guest.domid, view, guest.counter, R)
    assert guest.run() > 0
    backend.domain_set_access_required(guest.domid, True)
    backend.altp2m_set_mem_access(guest.domid, view, guest.counter, R)
    guest.run()
    assert guest.crashed()


@pytest.mark.parametrize("access", [W, WX])
def test_write_without_read_kills_the_guest(backend: Backend, guest: Guest, access: int) -> None:
    """An entry that is writable but not readable is an EPT misconfiguration: the domain crashes."""
    view = enter_view(backend, guest)
    backend.altp2m_set_mem_access(guest.domid, view, guest.counter, access)
    guest.run()
    assert guest.crashed()


def test_rx2rw_turns_at_the_first_write(backend: Backend, guest: Guest) -> None:
    """rx2rw becomes rw silently at a write, and n2rwx becomes rwx at any access."""
    view = enter_view(backend, guest)
    backend.altp2m_set_mem_access(guest.domid, view, guest.counter, RX2RW)
    backend.altp2m_set_mem_access(guest.domid, view, guest.target, N2RWX)
    assert guest.run() > 0
    assert backend.altp2m_get_mem_access(guest.domid, view, guest.counter) == R | W
    assert backend.altp2m_get_mem_access(guest.domid, view, guest.target) == RWX


def test_what_a_lazy_copy_gets(backend: Backend, guest: Guest) -> None:
    """A lazy copy takes the host's access up to 4.18, the view's default from 4.19."""
    view = enter_view(backend, guest, RX)
    assert guest.run() > 0
    expected = RX if backend.release.minor >= 19 else RWX
    assert backend.altp2m_get_mem_access(guest.domid, view, guest.target) == expected


def test_host_access_is_not_seen_in_view_0(backend: Backend, guest: Guest) -> None:
    """A host restriction binds a vCPU in view 0 up to 4.18; from 4.19 not where it fills later."""
    domid = guest.domid
    _, ring = backend.monitor_enable(domid)
    try:
        backend.set_mem_access(domid, RX, guest.counter, 1)
        backend.altp2m_set_domain_state(domid, True)
        assert backend.altp2m_get_vcpu_p2m_idx(domid, 0) == 0
        assert backend.altp2m_get_mem_access(domid, 0, guest.counter) == RX
        calls = guest.run()
        requests = VM_EVENT_RING.number(ring, "req_prod")
        if backend.release.minor >= 19:
            assert (calls > 0, requests) == (True, 0)
        else:
            assert (calls > 0, requests) == (False, 1)
    finally:
        backend.monitor_unmap_ring(ring)
        backend.monitor_disable(domid)


@pytest.mark.parametrize("default", [N, X])
def test_a_default_without_rights_stalls_the_guest(
    backend: Backend, guest: Guest, default: int
) -> None:
    """From 4.19, a default that leaves a superpage no rights stalls the vCPU, without an event.

    ``x`` is such a one where Xen makes no executable superpages (XSA-304), as on this CPU. It
    takes a gfn beyond the first 2 MiB: what an empty view copies there is 4K.
    """
    memory = guest.dom.memory
    code = memory.read_page(guest.target)
    counter = (guest.counter << 12).to_bytes(4, "little")
    guest.counter = 0x400  # let target() count in another superpage
    assert counter in code
    elsewhere = (guest.counter << 12).to_bytes(4, "little")
    memory.write_page(guest.target, code.replace(counter, elsewhere))
    assert guest.run() > 0
    _, ring = backend.monitor_enable(guest.domid)
    try:
        view = enter_view(backend, guest, default)
        gfns = array("Q", range(0x200))
        backend.altp2m_set_mem_access_multi(guest.domid, view, bytes([RWX]) * len(gfns), gfns)
        calls, requests = guest.run(), VM_EVENT_RING.number(ring, "req_prod")
        if backend.release.minor < 19:
            assert (calls > 0, requests) == (True, 0)  # the default has no effect
            return
        assert (calls, requests) == (0, 0)
        # One entry of 4K in the superpage brings the others along, here with the host's access.
        backend.altp2m_set_mem_access(guest.domid, view, guest.counter + 1, RWX)
        assert guest.run() > 0
    finally:
        backend.monitor_unmap_ring(ring)
        backend.monitor_disable(guest.domid)


def test_suppress_ve_copies_no_superpage(backend: Backend, guest: Guest) -> None:
    """Setting the suppress-#VE bit makes one 4K entry, where setting access copies a superpage."""
    domid = guest.domid
    backend.altp2m_set_domain_state(domid, True)
    view = backend.altp2m_create_view(domid, RWX)
    backend.altp2m_set_suppress_ve(domid, view, 0x600, False)
    assert backend.altp2m_get_suppress_ve(domid, view, 0x600) is False
    assert errno_name(backend.altp2m_get_suppress_ve, domid, view, 0x601) == "ESRCH"


def test_views_can_be_listed(backend: Backend, guest: Guest) -> None:
    """get_mem_access(view, ~0) tells a view's default, and EINVAL where there is no view."""
    domid = guest.domid
    backend.altp2m_set_domain_state(domid, True)
    made = [backend.altp2m_create_view(domid, access) for access in (RX, R, X)]
    backend.altp2m_destroy_view(domid, made[1])
    found = {}
    for view in range(1, 10):
        try:
            found[view] = backend.altp2m_get_mem_access(domid, view, ALL_GFNS)
        except xa.InvalidArgumentError:
            continue
    assert found == {1: RX, 3: X}


def test_reverting_a_lazy_copy(backend: Backend, guest: Guest) -> None:
    """Reverting a gfn that was only copied succeeds; it fills again and the guest goes on."""
    view = enter_view(backend, guest)
    assert guest.run() > 0
    backend.altp2m_set_mem_access(guest.domid, view, guest.counter, RWX)  # a 4K entry
    backend.altp2m_change_gfn(guest.domid, view, guest.counter, ALL_GFNS)
    assert errno_name(backend.altp2m_get_mem_access, guest.domid, view, guest.counter) == "ESRCH"
    assert guest.run() > 0
    assert backend.altp2m_get_mem_access(guest.domid, view, guest.counter) == RWX


def test_a_remap_is_what_the_guest_runs(backend: Backend, guest: Guest) -> None:
    """A vCPU fetches from the page a gfn is remapped to, and from its own again after a revert."""
    with guest.dom.altp2m() as altp2m:
        view = altp2m.create_view()
        [shadow] = guest.dom.add_pages()
        code = bytearray(guest.dom.memory.read_page(guest.target))
        code[0] = 0xC3  # ret: target() no longer counts
        guest.dom.memory.write_page(shadow, code)
        view.remap(guest.target, shadow, access=xa.Access.X)
        altp2m.switch_to_view(view)
        assert guest.run() == 0
        view.revert(guest.target)
        assert guest.run() > 0


def test_a_frozen_guest_can_be_brought_back(backend: Backend, guest: Guest) -> None:
    """After an agent died before it answered: altp2m off, a fresh ring, one response a vCPU."""
    domid = guest.domid
    _, ring = backend.monitor_enable(domid)
    view = enter_view(backend, guest)
    backend.altp2m_set_mem_access(domid, view, guest.counter, N)
    assert guest.run() == 0
    assert VM_EVENT_RING.number(ring, "req_prod") == 1
    backend.monitor_unmap_ring(ring)  # the agent is gone, its ring is not
    assert errno_name(backend.monitor_enable, domid) == "EBUSY"
    assert guest.run() == 0

    backend.altp2m_switch_to_view(domid, 0)
    backend.altp2m_set_domain_state(domid, False)
    backend.domain_debug_control(domid, 0, 0)
    backend.monitor_disable(domid)
    assert guest.run() == 0  # the vCPU still waits for its answer
    port, ring = backend.monitor_enable(domid)
    channel = backend.evtchn_open()
    local = backend.evtchn_bind_interdomain(channel, domid, port)
    answer_vcpu(ring, backend.release.vm_event_version, 0)
    backend.evtchn_notify(channel, local)
    backend.evtchn_close(channel)
    backend.monitor_unmap_ring(ring)
    backend.monitor_disable(domid)
    assert guest.run() > 0


def answer_vcpu(ring: memoryview, version: int, vcpu: int) -> None:
    """Put one response into a fresh ring: VCPU_PAUSED and nothing else."""
    layout = VM_EVENT[version]
    slot = ring[VM_EVENT_RING.size : VM_EVENT_RING.size + layout.size]
    slot[:] = bytes(layout.size)
    for name, value in (("version", version), ("flags", 1), ("vcpu_id", vcpu)):
        struct.pack_into("<I", slot, layout.fields[name].offset, value)
    struct.pack_into("<I", ring, VM_EVENT_RING.fields["rsp_prod"].offset, 1)
