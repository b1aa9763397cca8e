# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mock's side of vm_event: the ring's life, the event switches, and taking responses.

Restates ``common/vm_event.c`` (``vm_event_enable``, ``vm_event_resume``), ``common/monitor.c``
and ``arch/x86/monitor.c``, and what ``xc_monitor_enable`` does around them.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable
from errno import EBUSY, EEXIST, EINVAL, ENODEV, ENXIO, EOPNOTSUPP
from functools import partial

from xenaltp2m.backend.mock.machine import HVM_PARAM_MONITOR_RING_PFN, Domain, Refused

_RING = struct.Struct("<IIII")  # req_prod, req_event, rsp_prod, rsp_event
_SLOTS = 8
_SLOTS_AT = 64
_EVENT_SIZE = {6: 384, 7: 400}
_RSP_EVENT = struct.Struct("<12xI")
_RESPONSE = struct.Struct("<IIIIH6xH")
"""version, flags, reason, vcpu_id, altp2m_idx, u.fast_singlestep.p2midx"""
_VCPU_PAUSED, _TOGGLE_SINGLESTEP, _ALTERNATE_P2M = 1 << 0, 1 << 4, 1 << 7
_FAST_SINGLESTEP = 1 << 11

_MSR_RANGES = (range(0x2000), range(0x40000000, 0x40002000), range(0xC0000000, 0xC0002000))
_CTRLREGS = 4
_CAPABILITIES = {
    "write_ctrlreg": 0,
    "mov_to_msr": 1,
    "singlestep": 2,
    "software_breakpoint": 3,
    "guest_request": 4,
    "debug_exceptions": 5,
    "cpuid": 6,
    "interrupt": 8,
    "descriptor_access": 9,
    "emul_unimplemented": 10,
    "inguest_pagefault": 11,
}
_NEWER_CAPABILITIES = {"vmexit": (12, (4, 17)), "io": (13, (4, 18))}


class Monitor:
    """One domain's monitor: what Xen keeps from enable to disable."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.port = 0
        """The domain's end of the event channel; 0 while there is none."""
        self._last_port = 0
        self.ring_frame: int | None = None
        self.taken = 0
        """Responses taken so far (``rsp_cons``)."""
        self.waiting_vcpus = 0
        """vCPUs queued for room in the ring."""
        self.switches: dict[str, dict[str, int]] = {}
        """Which events are sent, with the options given."""
        self.signal: Callable[[], None] | None = None
        """Makes the port of the agent bound to this monitor fire."""

    @property
    def enabled(self) -> bool:
        """True between enable and disable."""
        return self.ring_frame is not None

    def enable(self) -> memoryview:
        """``xc_monitor_enable``: the ring's page, taken out of the guest's reach."""
        domain = self.domain
        gfn = domain.get_param(HVM_PARAM_MONITOR_RING_PFN)
        # A second enable leaves this page behind, as in Xen.
        if not domain.host.lookup(gfn).mapped and not domain.add_page(gfn, 0):
            raise Refused(EBUSY)
        if self.enabled:
            raise Refused(EBUSY)
        if not gfn:
            raise Refused(EOPNOTSUPP)
        frame = domain.host.lookup(gfn).mfn
        domain.machine.frames.pin(frame)
        domain.remove_page(gfn)
        self.ring_frame = frame
        domain.listened = True
        self.taken = 0
        self.port = self._last_port = self._last_port + 1
        ring = domain.machine.frames.page(frame)
        ring[:] = bytes(len(ring))
        _RING.pack_into(ring, 0, 0, 1, 0, 1)
        return ring

    def disable(self) -> None:
        """``vm_event_disable``: every switch falls, paused vCPUs stay paused."""
        if self.ring_frame is None:
            raise Refused(EINVAL)
        self.switches.clear()  # arch_monitor_cleanup_domain, also where the next line refuses
        if self.waiting_vcpus:
            raise Refused(EBUSY)
        self.domain.machine.frames.unpin(self.ring_frame)
        self.ring_frame = None
        self.port = 0
        self.signal = None
        self.domain.listened = False

    def resume(self) -> None:
        """``vm_event_resume``: take every response in the ring."""
        if self.ring_frame is None:
            raise Refused(ENODEV)
        domain = self.domain
        version = domain.release.vm_event_version
        ring = domain.machine.frames.page(self.ring_frame)
        produced = _RING.unpack_from(ring, 0)[2]
        while self.taken != produced:
            slot = _SLOTS_AT + self.taken % _SLOTS * _EVENT_SIZE[version]
            self.taken = (self.taken + 1) & 0xFFFFFFFF
            _RSP_EVENT.pack_into(ring, 0, (self.taken + 1) & 0xFFFFFFFF)
            spoken, flags, _reason, number, view, step_view = _RESPONSE.unpack_from(ring, slot)
            if spoken != version or number >= len(domain.vcpus):
                continue
            vcpu = domain.vcpus[number]
            if not vcpu.event_pauses:
                continue
            if flags & _TOGGLE_SINGLESTEP:
                vcpu.single_step = not vcpu.single_step
            elif flags & _FAST_SINGLESTEP and step_view < len(domain.views):
                vcpu.single_step = True
                vcpu.fast_step_view = step_view
            if flags & _ALTERNATE_P2M:
                domain.switch_vcpu(vcpu, view)
            if flags & _VCPU_PAUSED:
                vcpu.event_pauses -= 1

    def capabilities(self) -> int:
        """``xc_monitor_get_capabilities``: none for a PV domain."""
        if not self.domain.hvm:
            return 0
        bits = sum(1 << bit for bit in _CAPABILITIES.values())
        for bit, since in _NEWER_CAPABILITIES.values():
            if self.domain.release.version >= since:
                bits |= 1 << bit
        return bits

    def switch(self, event: str, enable: bool, **options: int) -> None:
        """``arch_monitor_domctl_event``: EEXIST where nothing would change."""
        self._require_events()
        if (event in self.switches) == enable:
            raise Refused(EEXIST)
        if enable:
            self.switches[event] = options
        else:
            del self.switches[event]

    def switch_ctrlreg(self, index: int, enable: bool, **options: int) -> None:
        """``XEN_DOMCTL_MONITOR_EVENT_WRITE_CTRLREG``."""
        self._require_events()
        if index >= _CTRLREGS:
            raise Refused(EINVAL)
        self.switch(f"ctrlreg {index}", enable, **options)

    def switch_msr(self, msr: int, enable: bool, **options: int) -> None:
        """``XEN_DOMCTL_MONITOR_EVENT_MOV_TO_MSR``: its bitmap lives from enable to disable."""
        self._require_events()
        event = f"msr {msr:#x}"
        if enable and event not in self.switches:
            if not self.enabled:
                raise Refused(ENXIO)
            if not any(msr in span for span in _MSR_RANGES):
                raise Refused(EINVAL)
        self.switch(event, enable, **options)

    def emulate_each_rep(self, enable: bool) -> None:
        """``XEN_DOMCTL_MONITOR_OP_EMULATE_EACH_REP``: no EEXIST, but a ring is needed."""
        if not self.enabled:
            raise Refused(EINVAL)
        self.switches.pop("emulate_each_rep", None)
        if enable:
            self.switches["emulate_each_rep"] = {}

    def wake(self) -> None:
        """Tell the agent that a request is in the ring."""
        if self.signal is not None:
            self.signal()

    def _require_events(self) -> None:
        """``monitor_domctl``: no event is among a PV domain's capabilities."""
        if not self.domain.hvm:
            raise Refused(EOPNOTSUPP)


class Port:
    """The agent's end of an event channel: fires once, then not before it is unmasked."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.remote = monitor.port
        self.masked = False
        self.pending = False


class Channel:
    """An open ``/dev/xen/evtchn``: its eventfd counts the fired ports that wait to be read."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        self.ports: dict[int, Port] = {}
        self._fired: deque[int] = deque()

    def bind(self, monitor: Monitor) -> int:
        """``evtchn_bind_interdomain``: a port that fires at once, for what may have been missed."""
        number = max(self.ports, default=0) + 1
        self.ports[number] = Port(monitor)
        monitor.signal = partial(self._fire, number)
        self._fire(number)
        return number

    def unbind(self, number: int) -> None:
        """Let go of a port, and of its event if that waits to be read."""
        port = self.ports.pop(number)
        if port.remote == port.monitor.port:
            port.monitor.signal = None
        if number in self._fired:
            self._fired.remove(number)
            os.eventfd_read(self.fd)

    def pending(self) -> int:
        """Wait for a port that fired."""
        os.eventfd_read(self.fd)
        return self._fired.popleft()

    def unmask(self, number: int) -> None:
        """Let a port fire again, at once if it was signalled meanwhile; unknown ones are passed."""
        port = self.ports.get(number)
        if port is None:
            return
        port.masked = False
        if port.pending:
            port.pending = False
            self._fire(number)

    def close(self) -> None:
        """Let go of everything."""
        for number in list(self.ports):
            self.unbind(number)
        os.close(self.fd)

    def _fire(self, number: int) -> None:
        port = self.ports[number]
        if port.masked:
            port.pending = True
            return
        port.masked = True
        self._fired.append(number)
        os.eventfd_write(self.fd, 1)
