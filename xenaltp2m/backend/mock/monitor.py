# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mock's side of vm_event: the ring, what is put into it, the answers, the event switches.

Restates ``common/vm_event.c``, ``arch/x86/vm_event.c``, ``common/monitor.c`` and
``arch/x86/monitor.c``, and what ``xc_monitor_enable`` does around them.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from errno import EBUSY, EEXIST, EINVAL, ENODEV, ENXIO, EOPNOTSUPP

from xenaltp2m.abi.layouts import HVM_CPU, VM_EVENT_RING, Layout
from xenaltp2m.abi.ring import MASK, SLOTS
from xenaltp2m.abi.vm_event import (
    HEAD,
    SETTABLE_REGISTERS,
    Flag,
    Reason,
    encode_request,
    layout,
)
from xenaltp2m.backend.mock.machine import (
    HVM_PARAM_MONITOR_RING_PFN,
    Domain,
    HypercallError,
    Livelock,
)
from xenaltp2m.backend.mock.p2m import access_rights
from xenaltp2m.backend.mock.vcpu import Deferred, Vcpu, Waits
from xenaltp2m.types import ALL_GFNS, PAGE_SIZE

CR0, CR3, CR4, XCR0 = range(4)
"""``VM_EVENT_X86_*``."""
_MOST_RESPONSES = 1 << 20
_RWX = 7
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_NOT_MONITORS = {"emulate_each_rep"}
_GRANULAR = 1 << 11
"""Of a segment's attributes as Xen packs them: its limit counts pages."""

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
        self.produced = 0
        """Requests put so far (``req_prod_pvt``)."""
        self.taken = 0
        """Responses taken so far (``rsp_cons``)."""
        self.producers = 0
        """Slots that are claimed and not filled (``target_producers``)."""
        self.queue: deque[Vcpu] = deque()
        """vCPUs that wait for a slot (``wq``)."""
        self.blocked = 0
        """vCPUs paused because the ring was nearly full."""
        self.last_woken = 0
        """``last_vcpu_wake_up``."""
        self.gates_writes = False
        """Whether writes of registers wait for the answer (``control_register_values``).

        ``XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS`` turns it on, of a PV domain and without a ring
        as well (``arch_monitor_domctl_op``); without it the write has been done when the agent
        receives the event.
        """
        self.intercepted_msrs: set[int] = set()
        """Those whose writes exit for having once been monitored (``vmx_set_msr_intercept``)."""
        self.switches: dict[str, dict[str, int]] = {}
        """Which events are sent, with the options given."""
        self.signal: Callable[[], None] | None = None
        """Makes the port of the agent bound to this monitor fire."""
        self.record: Callable[[str, bytes], None] | None = None
        """Told of each "request" put and "response" taken."""

    @property
    def enabled(self) -> bool:
        """True between enable and disable."""
        return self.ring_frame is not None

    def enable(self) -> int:
        """``xc_monitor_enable``: the frame of the ring, taken out of the guest's reach."""
        domain = self.domain
        gfn = domain.get_param(HVM_PARAM_MONITOR_RING_PFN)
        # A second enable leaks this page, as in Xen.
        if not domain.host.lookup(gfn).mapped and not domain.add_page(gfn, 0):
            raise HypercallError(EBUSY)
        if self.enabled:
            raise HypercallError(EBUSY)
        if not gfn:
            raise HypercallError(EOPNOTSUPP)
        frame = domain.host.lookup(gfn).mfn
        domain.machine.frames.pin(frame)
        domain.remove_page(gfn)
        self.ring_frame = frame
        domain.listened = True
        for vcpu in domain.vcpus:
            vcpu.deferred = vcpu.deferred or Deferred()  # vm_event_init_domain
        self.produced = self.taken = self.producers = self.blocked = self.last_woken = 0
        self.port = self._last_port = self._last_port + 1
        domain.machine.frames.page(frame)[:] = bytes(PAGE_SIZE)
        self._write_index("req_event", 1)
        self._write_index("rsp_event", 1)
        return frame

    def disable(self) -> None:
        """``vm_event_disable``: every switch falls, paused vCPUs stay paused.

        What responses asked for and no vCPU has run for is lost.
        """
        if self.domain.dying:  # vm_event_domctl
            return
        if self.ring_frame is None:
            raise HypercallError(EINVAL)
        self._forget_switches()  # also where the next line refuses
        if self.queue:
            raise HypercallError(EBUSY)
        self._destroy()

    def clean_up(self) -> None:
        """``vm_event_cleanup``: the domain is dying."""
        self._wake_queued(len(self.queue))
        if self.ring_frame is not None:
            self._forget_switches()
            self._destroy()

    def migrate(self) -> None:
        """Become that of a domain restored from what was saved of this one: a new one."""
        self.clean_up()
        self.switches.clear()
        self.gates_writes = False
        self.intercepted_msrs.clear()

    def _forget_switches(self) -> None:
        """``arch_monitor_cleanup_domain``."""
        self.switches = {
            event: self.switches[event] for event in self.switches.keys() & _NOT_MONITORS
        }
        self.gates_writes = False

    def _destroy(self) -> None:
        assert self.ring_frame is not None
        for vcpu in self.domain.vcpus:
            vcpu.ring_blocked = False
            vcpu.deferred = None  # vm_event_cleanup_domain
        self.switches.clear()
        self.blocked = 0
        self.domain.machine.frames.unpin(self.ring_frame)
        self.ring_frame = None
        self.port = 0
        self.signal = None
        self.domain.listened = False

    # Requests.

    def traps(
        self, vcpu: Vcpu, reason: int, fields: Mapping[str, int], *, sync: bool = True
    ) -> Waits[bool]:
        """``monitor_traps``: send a request, when there is room. True if the vCPU is paused now."""
        while not (claimed := self._claim_slot()):
            if claimed is None:
                return False
            self.queue.append(vcpu)
            vcpu.queued = True
            yield
        domain = self.domain
        flags, view = Flag(0), 0
        if sync:
            flags |= Flag.VCPU_PAUSED
            vcpu.event_pauses += 1
        if domain.active:
            flags |= Flag.ALTERNATE_P2M
            view = vcpu.view
        version = domain.release.vm_event_version
        request = encode_request(
            version,
            reason,
            vcpu.number,
            flags=flags,
            view=view,
            fields=fields,
        )
        _fill_registers(vcpu, version, request)
        self._put(vcpu, request)
        return sync

    def report(self, event: str, vcpu: Vcpu, reason: int, fields: Mapping[str, int]) -> Waits[bool]:
        """Send a request if such events are switched on. True if the vCPU is paused now."""
        options = self.switches.get(event)
        if options is None:
            return False
        return (yield from self.traps(vcpu, reason, fields, sync=bool(options.get("sync", 1))))

    @property
    def available(self) -> int:
        """``vm_event_ring_available``."""
        used = (self.produced - self.taken) & MASK
        if used > MASK // 2:
            used -= MASK + 1  # more responses than requests
        return SLOTS - used - self.producers

    def _claim_slot(self) -> bool | None:
        """``vm_event_grab_slot``: None where there is no ring."""
        if self.ring_frame is None:
            return None
        if not self.available:
            return False
        self.producers += 1
        return True

    def _put(self, vcpu: Vcpu, request: bytearray) -> None:
        """``vm_event_put_request``."""
        ring, start = self._slot(self.produced)
        ring[start : start + len(request)] = request
        self.produced = (self.produced + 1) & MASK
        self._write_index("req_prod", self.produced)
        self.producers -= 1
        self._wake()
        few = self.available < len(self.domain.vcpus)
        if few and not vcpu.event_pauses and not vcpu.ring_blocked:  # vm_event_mark_and_pause
            vcpu.ring_blocked = True
            self.blocked += 1
        self.wake()
        if self.record is not None:
            self.record("request", bytes(request))

    def _wake(self) -> None:
        """``vm_event_wake``: those on the queue come first."""
        if self.queue:
            self._wake_queued(self.available)
        else:
            self._wake_blocked()

    def _wake_queued(self, count: int) -> None:
        """``wake_up_nr``: they have to claim a slot again when they run."""
        for _ in range(min(count, len(self.queue))):
            self.queue.popleft().queued = False

    def _wake_blocked(self) -> None:
        """``vm_event_wake_blocked``: as many as there are slots, from the one after the last."""
        vcpus = self.domain.vcpus
        available, first = self.available, self.last_woken + 1
        for at in range(first, first + len(vcpus)):
            if not available or not self.blocked:
                break
            vcpu = vcpus[at % len(vcpus)]
            if vcpu.ring_blocked:
                vcpu.ring_blocked = False
                available -= 1
                self.blocked -= 1
                self.last_woken = vcpu.number

    def _slot(self, index: int) -> tuple[memoryview, int]:
        assert self.ring_frame is not None
        size = layout(self.domain.release.vm_event_version).size
        page = self.domain.machine.frames.page(self.ring_frame)
        return page, VM_EVENT_RING.size + index % SLOTS * size

    def _write_index(self, name: str, value: int) -> None:
        assert self.ring_frame is not None
        offset, width = VM_EVENT_RING.fields[name]
        page = self.domain.machine.frames.page(self.ring_frame)
        page[offset : offset + width] = (value & MASK).to_bytes(width, "little")

    # Responses.

    def resume(self) -> None:
        """``vm_event_resume``: take every response in the ring.

        Raises:
            Livelock: Xen would be busy with garbage for long.
        """
        if self.domain.dying:  # vm_event_domctl
            return
        if self.ring_frame is None:
            raise HypercallError(ENODEV)
        page = self.domain.machine.frames.page(self.ring_frame)
        version = self.domain.release.vm_event_version
        shape = layout(version)
        produced = VM_EVENT_RING.number(page, "rsp_prod")
        if (produced - self.taken) & MASK > _MOST_RESPONSES:
            raise Livelock(f"rsp_prod is {produced:#x} and {self.taken:#x} responses were taken")
        while self.taken != produced:
            page, start = self._slot(self.taken)
            response = bytes(page[start : start + shape.size])
            self.taken = (self.taken + 1) & MASK
            self._write_index("rsp_event", self.taken + 1)
            self._wake()
            if self.record is not None:
                self.record("response", response)
            spoken, _, _, number, _ = HEAD.unpack_from(response)
            if spoken != version or number >= len(self.domain.vcpus):
                continue
            vcpu = self.domain.vcpus[number]
            if vcpu.event_pauses:
                self._apply(vcpu, response, shape)

    def _apply(self, vcpu: Vcpu, response: bytes, shape: Layout) -> None:
        """One response to a paused vCPU, in Xen's order."""
        domain, deferred = self.domain, vcpu.deferred
        assert deferred is not None
        _, flags, reason, _, view = HEAD.unpack_from(response)
        self._check_emulation(vcpu, deferred, flags, reason, response, shape)
        if flags & Flag.DENY:  # vm_event_register_write_resume
            if reason == Reason.MOV_TO_MSR:
                deferred.msr = None
            elif reason == Reason.WRITE_CTRLREG:
                index = shape.number(response, "u.write_ctrlreg.index")
                deferred.control_registers.pop(index, None)
        step_view = shape.number(response, "u.fast_singlestep.p2midx")
        if flags & Flag.TOGGLE_SINGLESTEP:  # vm_event_toggle_singlestep
            vcpu.single_step = not vcpu.single_step
        elif flags & Flag.FAST_SINGLESTEP and step_view < len(domain.views):
            vcpu.single_step = True
            vcpu.fast_step_view = step_view
        if flags & Flag.ALTERNATE_P2M:
            domain.switch_vcpu(vcpu, view)
        if flags & Flag.SET_REGISTERS:  # vm_event_set_registers
            deferred.registers = {
                name: shape.number(response, f"data.regs.x86.{name}") for name in SETTABLE_REGISTERS
            }
        if flags & Flag.GET_NEXT_INTERRUPT:
            vcpu.next_interrupt = True
        if flags & Flag.VCPU_PAUSED:
            vcpu.event_pauses -= 1

    def _check_emulation(
        self,
        vcpu: Vcpu,
        deferred: Deferred,
        flags: int,
        reason: int,
        response: bytes,
        shape: Layout,
    ) -> None:
        """``vm_event_emulate_check``: what it does not accept leaves things as they are."""
        data = shape.raw(response, "data")
        if not flags & Flag.EMULATE:
            deferred.emulate_flags = 0
            return
        if reason == Reason.SOFTWARE_BREAKPOINT:
            if not flags & Flag.SET_EMUL_INSN_DATA:
                return
            deferred.emulation_data = data
        elif reason == Reason.DESCRIPTOR_ACCESS or (
            reason == Reason.MEM_ACCESS
            and self._violates(
                vcpu,
                shape.number(response, "u.mem_access.gfn"),
                shape.number(response, "u.mem_access.flags"),
            )
        ):
            if flags & Flag.SET_EMUL_READ_DATA:
                deferred.emulation_data = data
        else:
            return
        deferred.emulate_flags = flags

    def _violates(self, vcpu: Vcpu, gfn: int, flags: int) -> bool:
        """``p2m_mem_access_emulate_check``: the access of the response, in the vCPU's view."""
        domain = self.domain
        view = domain.views[vcpu.view] if domain.active else None
        if gfn == ALL_GFNS:
            access = domain.host_default_access if view is None else view.default_access
        else:
            found = (domain.host if view is None else view.table).lookup(gfn)
            if not found.mapped or found.access >= domain.release.default_access_number:
                return True
            access = found.access
        return bool(flags & ~access_rights(access) & _RWX)

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
            raise HypercallError(EEXIST)
        if enable:
            self.switches[event] = options
        else:
            del self.switches[event]

    def switch_ctrlreg(self, index: int, enable: bool, **options: int) -> None:
        """``XEN_DOMCTL_MONITOR_EVENT_WRITE_CTRLREG``."""
        self._require_events()
        if index >= _CTRLREGS:
            raise HypercallError(EINVAL)
        self.switch(f"ctrlreg {index}", enable, **options)

    def switch_msr(self, msr: int, enable: bool, **options: int) -> None:
        """``XEN_DOMCTL_MONITOR_EVENT_MOV_TO_MSR``: its bitmap lives from enable to disable."""
        self._require_events()
        event = f"msr {msr:#x}"
        if enable and event not in self.switches:
            if not self.enabled:
                raise HypercallError(ENXIO)
            if not any(msr in span for span in _MSR_RANGES):
                raise HypercallError(EINVAL)
        self.switch(event, enable, **options)
        if enable:
            self.intercepted_msrs.add(msr)

    def emulate_each_rep(self, enable: bool) -> None:
        """``XEN_DOMCTL_MONITOR_OP_EMULATE_EACH_REP``: no EEXIST, but a ring is needed."""
        if not self.enabled:
            raise HypercallError(EINVAL)
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
            raise HypercallError(EOPNOTSUPP)


@functools.cache
def _register_copies(version: int) -> list[tuple[slice, slice]]:
    """Where registers lie in a request, and where in the context; both are little-endian."""
    copies = []
    for name, (offset, width) in layout(version).fields.items():
        place = HVM_CPU.fields.get(name.removeprefix("data.regs.x86."))
        if name.startswith("data.regs.x86.") and place is not None:
            copies.append(
                (slice(offset, offset + width), slice(place.offset, place.offset + width))
            )
    return copies


def _fill_registers(vcpu: Vcpu, version: int, request: bytearray) -> None:
    """``vm_event_fill_regs``."""
    for to, source in _register_copies(version):
        request[to] = vcpu.context[source]
    fields = layout(version).fields
    offset, width = fields["data.regs.x86.dr6"]
    request[offset : offset + width] = bytes(width)  # vmx_save_cpu_ctxt leaves it out
    for name in _SEGMENTS:
        limit, attributes = vcpu.register(f"{name}_limit"), vcpu.register(f"{name}_arbytes")
        if attributes & _GRANULAR:
            limit >>= 12
        offset, width = fields[f"data.regs.x86.{name}"]
        packed = (limit & 0xFFFFF) | (attributes & 0xFFF) << 20
        request[offset : offset + width] = packed.to_bytes(width, "little")
    if (trace := fields.get("data.regs.x86.vmtrace_pos")) is not None:
        request[trace.offset : trace.offset + trace.width] = b"\xff" * trace.width
