# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host with domains: frames, host p2m changes, and altp2m as Xen does it, release by release.

Operations raise :class:`HypercallError` with Xen's errno and otherwise change the state as Xen
would.
Each rule names the Xen function it restates; where releases differ, the difference is a field of
:class:`~xenaltp2m.abi.releases.Release`. Where updates of one release differ, its last one counts:
XSA-378 and XSA-389 are fixed in 4.14 (4.14.6) and 4.15 (4.15.7), too.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from errno import (
    EAGAIN,
    EBUSY,
    EEXIST,
    EILSEQ,
    EINVAL,
    ENOMEM,
    EOPNOTSUPP,
    EPERM,
    ERANGE,
    ESRCH,
)
from uuid import UUID, uuid5

from xenaltp2m.abi.releases import Release
from xenaltp2m.backend.mock.p2m import (
    ACCESS_RWX,
    ANY_RAM_TYPES,
    INVALID_MFN,
    MMIO_MFN_BASE,
    ORDER_1G,
    ORDER_2M,
    ORDER_4K,
    PAGING_TYPES,
    RAM_TYPES,
    SPECIAL_TYPES,
    Lookup,
    P2m,
    PageType,
    Pool,
    pieces,
)
from xenaltp2m.backend.mock.vcpu import INVALID_VIEW, Vcpu
from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import ALL_GFNS, HVM_PARAM_ALTP2M, PAGE_SIZE, Altp2mMode, MemoryType
from xenaltp2m.values.arguments import check_flag, check_kind, check_number

_MAP_NORESERVE = 0x4000  # <sys/mman.h>, Linux: memory is taken when it is touched, not before
_DEFAULT_VIEWS = 10
_MOST_VIEWS = 512
"""A page of EPT pointers (``MAX_EPTP``)."""
_MOST_VCPUS = 128
"""``HVM_MAX_VCPUS`` (public/hvm/hvm_info_table.h)."""
_SPECIAL_PAGES_END = 0xFF000
_SPECIAL_PAGES = 8
_APIC_PAGE_GFN = 0xFEE00
_READ_ONLY_TYPES = frozenset(
    {PageType.RAM_LOGDIRTY, PageType.RAM_RO, PageType.GRANT_MAP_RO, PageType.SHARED}
)
"""``P2M_RO_TYPES``."""
_PLAIN_TYPES = RAM_TYPES | {PageType.POPULATE_ON_DEMAND, PageType.GRANT_MAP_RW}
"""What ``hvmop_get_mem_type`` calls RAM of the rest."""
_UUID_NAMESPACE = UUID("7b0d2f5c-5f0e-4c0e-9d1e-6d5ad2e5c0de")

HVM_PARAM_STORE_PFN = 1
HVM_PARAM_IOREQ_PFN = 5
HVM_PARAM_BUFIOREQ_PFN = 6
HVM_PARAM_IDENT_PT = 12
HVM_PARAM_CONSOLE_PFN = 17
HVM_PARAM_MONITOR_RING_PFN = 28
HVM_NR_PARAMS = 39

LIVELOCK_STEPS = 1 << 28
SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_CRASH = 0, 1, 3


class HypercallError(Exception):
    """Xen says no: carries the errno, as Linux numbers it."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class Livelock(RuntimeError):  # noqa: N818 - the word for what it is
    """The real Xen would not come back from this call for hours, or ever."""


class Frames:
    """The host's memory, as one sparse mapping; a frame number is an offset into it."""

    def __init__(self, limit: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.memory = mmap.mmap(-1, limit * PAGE_SIZE, flags=flags)
        self._view = memoryview(self.memory)
        self._limit = limit
        self._next = 1 << ORDER_2M  # frame 0 stays nobody's, and 2M blocks stay aligned
        self._free: list[int] = []
        self._pins: Counter[int] = Counter()
        self._released: dict[int, Domain] = {}
        self._handed_out: dict[int, int] = {}
        self.moment = 0
        """Counts how often a frame was given to somebody who may write to it."""

    def allocate(self, order: int = ORDER_4K) -> int | None:
        """Return the first of 2^order aligned free frames, or None if there are none."""
        if order == ORDER_4K and self._free:
            return self._free.pop()
        size = 1 << order
        first = -(-self._next // size) * size
        if first + size > self._limit:
            return None
        self._free.extend(range(self._next, first))
        self._next = first + size
        return first

    def release(self, mfn: int, owner: Domain) -> None:
        """Take a frame back once nobody holds it: until then it counts as its owner's.

        Its contents are scrubbed, as Xen does.
        """
        if self._pins[mfn]:
            self._released[mfn] = owner
            return
        owner.pages -= 1
        self.free(mfn)

    def free(self, mfn: int) -> None:
        """Take back a frame that nobody else knows of."""
        self.page(mfn)[:] = bytes(PAGE_SIZE)
        self._free.append(mfn)

    def pin(self, mfn: int) -> None:
        """Hold a frame, as a foreign mapping or a #VE page does (``get_page``)."""
        self._pins[mfn] += 1

    def unpin(self, mfn: int) -> None:
        """Let go of a frame (``put_page``)."""
        self._pins[mfn] -= 1
        if not self._pins[mfn] and (owner := self._released.pop(mfn, None)) is not None:
            self.release(mfn, owner)

    def page(self, mfn: int) -> memoryview:
        """Return a frame's 4096 bytes, shared with everyone who maps it."""
        self.moment += 1
        self._handed_out[mfn] = self.moment
        return self._view[mfn * PAGE_SIZE : (mfn + 1) * PAGE_SIZE]

    def peek(self, mfn: int) -> memoryview:
        """Return a frame's 4096 bytes, to read."""
        return self._view[mfn * PAGE_SIZE : (mfn + 1) * PAGE_SIZE].toreadonly()

    def may_have_changed(self, mfn: int, moment: int) -> bool:
        """Whether somebody else than a core may have written to a frame since a moment."""
        return bool(self._pins[mfn]) or self._handed_out.get(mfn, 0) > moment


@dataclass
class View:
    """One altp2m table and what Xen keeps beside it."""

    table: P2m
    exists: bool = False
    visible: bool = False
    default_access: int = ACCESS_RWX
    min_remapped: int = ALL_GFNS
    max_remapped: int = 0
    access_required: bool = False

    def reset(self) -> None:
        """Forget every entry and the remap range; the rest stays (``p2m_reset_altp2m``)."""
        self.table.flush()
        self.min_remapped = ALL_GFNS
        self.max_remapped = 0


class Domain:
    """An HVM, PVH or PV domain. Made by :meth:`Machine.add_domain`."""

    def __init__(
        self,
        machine: Machine,
        domid: int,
        name: str,
        *,
        kind: str,
        mode: Altp2mMode,
        view_count: int,
        vcpus: int,
        memory_kib: int,
        max_kib: int,
        pool_pages: int,
        nested: bool,
    ) -> None:
        self.machine = machine
        self.release = machine.release
        self.domid = domid
        self.name = name
        self.uuid = uuid5(_UUID_NAMESPACE, f"{domid} {name}")
        self.kind = kind
        self.nested = nested
        self.max_pages = max_kib * 1024 // PAGE_SIZE
        self.max_kib = max_kib
        self.target_kib = memory_kib
        self.pages = 0
        self.pauses = 0
        self.creation_finished = False
        self.dying = False
        self.shutdown_code: int | None = None
        self.crash_reason = ""
        self.pool = Pool(pool_pages)
        self.host = self._table()
        self.host_default_access = ACCESS_RWX
        self.access_required = False
        self.listened = False
        """Whether a monitor's ring is there."""
        self.active = False
        self.views = [View(self._table()) for _ in range(view_count)]
        online = 1 if kind == "pvh" else vcpus
        self.vcpus = [Vcpu(number, online=number < online) for number in range(vcpus)]
        self.params = {HVM_PARAM_ALTP2M: int(mode)}
        self.m2p: dict[int, int] = {}
        """Frame to gfn, as ``paging_mark_dirty`` and memory sharing look it up."""
        self.special_frames: set[int] = set()
        """Frames a guest may not name as #VE page (``is_special_page``)."""
        self.dirty: set[int] = set()
        self.pod_entries = self.shared_pages = self.paged_pages = 0
        """How many gfns :meth:`set_aside` was given, less those that are plain RAM again."""
        self.passed_through: list[str] = []
        """PCI devices it was given, as ``0000:03:00.0``."""
        self.memory_target: int | None = None
        """The balloon target in KiB, if it differs from the memory it was created with."""

    def _table(self) -> P2m:
        self.pool.take()  # the root
        return P2m(self.pool, executable_superpages=self.machine.executable_superpages)

    @property
    def hvm(self) -> bool:
        """True for HVM and PVH."""
        return self.kind != "pv"

    @property
    def mode(self) -> int:
        """The altp2m mode's number."""
        return self.params[HVM_PARAM_ALTP2M]

    @property
    def online_vcpus(self) -> int:
        """How many vCPUs are up."""
        return sum(vcpu.online for vcpu in self.vcpus)

    @online_vcpus.setter
    def online_vcpus(self, count: int) -> None:
        """Bring the first ones up, and the others down."""
        for vcpu in self.vcpus:
            vcpu.online = vcpu.number < count

    def get_param(self, param: int) -> int:
        """``hvmop_get_param``."""
        if not self.hvm or param >= HVM_NR_PARAMS:
            raise HypercallError(EINVAL)
        return self.params.get(param, 0)

    def set_param(self, param: int, value: int) -> None:
        """``hvmop_set_param``: the altp2m mode is settable once, and not at all from 4.19."""
        if not self.hvm or param >= HVM_NR_PARAMS:
            raise HypercallError(EINVAL)
        if param == HVM_PARAM_ALTP2M:
            if self.release.mode_set_at_creation or (self.mode and value != self.mode):
                raise HypercallError(EEXIST)
            if value > Altp2mMode.LIMITED or (value and self.nested):
                raise HypercallError(EINVAL)
        self.params[param] = value

    # Host p2m: every write is seen by the views.

    def host_lookup(self, gfn: int, *, populate: bool = False, unshare: bool = False) -> Lookup:
        """``p2m_get_gfn_type_access`` on the host p2m."""
        found = self.host.lookup(gfn)
        if populate and found.type == PageType.POPULATE_ON_DEMAND:
            order = found.order
            mfn = self.machine.frames.allocate(order)
            if mfn is None:
                self.crash("populate on demand failed")
                return found
            base = gfn >> order << order
            self.host_write(base, mfn, order, PageType.RAM_RW, self.host_default_access)
            self._set_m2p(base, mfn, order)
            self.pod_entries -= min(1 << order, self.pod_entries)
            found = self.host.lookup(gfn)
        if unshare and found.type == PageType.SHARED:
            self.host_write(gfn, found.mfn, ORDER_4K, PageType.RAM_RW, found.access)
            self.shared_pages -= min(1, self.shared_pages)
            found = self.host.lookup(gfn)
        if found.type == PageType.BROKEN:
            if populate:
                self.crash("touched a broken page")
            found = found._replace(mfn=INVALID_MFN)
        return found

    def host_write(
        self,
        gfn: int,
        mfn: int,
        order: int,
        kind: PageType,
        access: int,
        suppress_ve: bool | None = None,
    ) -> int:
        """``ept_set_entry`` on the host p2m: writes, then tells the views. Returns an errno."""
        error = self.host.write(gfn, mfn, order, kind, access, suppress_ve)
        if error or not self.machine.altp2m_supported:
            return error
        return self._propagate(gfn, mfn, order, kind, access)

    def host_write_range(self, gfn: int, mfn: int, order: int, kind: PageType, access: int) -> int:
        """``p2m_set_entry`` on the host p2m: the views see each entry it writes."""
        error = 0
        for part, frame, size in pieces(gfn, mfn, order):
            error = self.host_write(part, frame, size, kind, access) or error
        return error

    def _propagate(self, gfn: int, mfn: int, order: int, kind: PageType, access: int) -> int:
        """``p2m_altp2m_propagate_change``: a drop may reset views, a change overwrites entries."""
        if not self.active:
            return 0
        error = 0
        reset: View | None = None
        end = gfn + (1 << order) if self.release.drop_test_covers_order else gfn + 1
        for view in self.views:
            if not view.exists:
                continue
            if mfn == INVALID_MFN and end > view.min_remapped and gfn <= view.max_remapped:
                if reset is None:
                    view.reset()
                    reset = view
                    continue
                for other in self.views:
                    if other.exists and other is not reset:
                        other.reset()
                return 0
            if view.table.lookup(gfn).mapped:
                error = error or view.table.write_range(gfn, mfn, order, kind, access)
        return error

    def add_page(self, gfn: int, order: int) -> bool:
        """Populate 2^order frames at ``gfn`` (``populate_physmap``, ``p2m_add_page``)."""
        if self.dying or order > ORDER_1G or self.pages + (1 << order) > self.max_pages:
            return False
        mfn = self.machine.frames.allocate(order)
        if mfn is None:
            return False
        self.pages += 1 << order  # and so it stays where what follows fails
        at, end = gfn, gfn + (1 << order)
        while at < end:
            old = self.host.lookup(at)
            if old.type in SPECIAL_TYPES:
                self.crash("populated over grant, foreign or direct MMIO")
                return False
            if old.valid and old.type in RAM_TYPES:
                self.m2p.pop(old.mfn, None)
            at = at + 1 if old.mapped else (at >> old.order) + 1 << old.order  # past the hole
        if self.host_write_range(gfn, mfn, order, PageType.RAM_RW, self.host_default_access):
            return False
        self._set_m2p(gfn, mfn, order)
        return True

    def remove_page(self, gfn: int) -> bool:
        """Take one page back (``guest_remove_page``); a direct MMIO entry is refused."""
        found = self.host.lookup(gfn)
        if found.type == PageType.POPULATE_ON_DEMAND:  # p2m_pod_decrease_reservation
            self.pod_entries -= min(1, self.pod_entries)
            return not self.host_write(
                gfn, INVALID_MFN, ORDER_4K, PageType.INVALID, self.host_default_access
            )
        if not found.valid or self.remove_entry(None, gfn, found.mfn):
            return False
        self.machine.frames.release(found.mfn, self)
        return True

    def remove_entry(self, view: View | None, gfn: int, mfn: int) -> int:
        """``p2m_remove_entry``, order 0 (``p2m_remove_page`` up to 4.16); None is the host."""
        found = (view.table if view else self.host).lookup(gfn)
        refused = found.type == PageType.MMIO_DIRECT
        if self.release.version >= (4, 21):
            refused = found.type not in ANY_RAM_TYPES and found.type != PageType.BROKEN
        if refused:
            return EILSEQ
        tracked = found.type not in SPECIAL_TYPES and found.type != PageType.SHARED
        if tracked:
            self.m2p.pop(mfn, None)
            if self.release.version >= (4, 22):  # paging_mark_pfn_clean: 98fccdf0ac
                self.dirty.discard(gfn)
        if self.creation_finished and self.release.removal_delays_answers:
            for vcpu in self.vcpus:  # ioreq_request_mapcache_invalidate
                vcpu.map_cache_stale = True
        write, default = self.host_write, self.host_default_access
        if view is not None:
            write, default = view.table.write, view.default_access
        error = write(gfn, INVALID_MFN, ORDER_4K, PageType.INVALID, default)
        if error and tracked:  # XSA-389
            self.m2p[mfn] = gfn
            self.dirty.add(gfn)
        return error

    def populate(self, gfn: int, count: int) -> bool:
        """Populate 4K pages from ``gfn`` on in a domain that is being made: one by one, in bulk."""
        found = [self.machine.frames.allocate() for _ in range(count)]
        mfns = [mfn for mfn in found if mfn is not None]
        self.pages += len(mfns)
        kind, access = PageType.RAM_RW, self.host_default_access
        if len(mfns) < count or self.host.fill(gfn, mfns, kind, access):
            return False
        self.m2p.update(zip(mfns, range(gfn, gfn + count), strict=True))
        return True

    def _set_m2p(self, gfn: int, mfn: int, order: int) -> None:
        self.m2p.update((mfn + offset, gfn + offset) for offset in range(1 << order))

    def set_aside(self, gfn: int, kind: PageType) -> None:
        """Make a page of RAM one that is shared, paged out, or to be populated on demand.

        What a toolstack does by ``XENMEM_sharing_op``, ``XENMEM_paging_op`` or when it makes a
        domain with less memory than its limit: none of these calls is modelled.
        """
        found = self.host.lookup(gfn)
        access = self.host_default_access
        if kind == PageType.SHARED:
            self.shared_pages += 1
            self.host_write(gfn, found.mfn, ORDER_4K, kind, access)
            return
        if kind == PageType.PAGED:
            self.paged_pages += 1
        else:
            self.pod_entries += 1
        self.m2p.pop(found.mfn, None)
        self.host_write(gfn, INVALID_MFN, ORDER_4K, kind, access)
        self.machine.frames.release(found.mfn, self)

    def mem_type(self, gfn: int) -> MemoryType:
        """``hvmop_get_mem_type``."""
        if not self.hvm:
            raise HypercallError(EINVAL)
        kind = self.host.lookup(gfn).type
        if kind == PageType.IOREQ_SERVER:
            return MemoryType.IOREQ_SERVER
        if kind in _READ_ONLY_TYPES:
            return MemoryType.READ_ONLY
        if kind in _PLAIN_TYPES:
            return MemoryType.RAM
        return MemoryType.EMULATED

    def store(self) -> dict[str, str]:
        """What the toolstack has put into xenstore about it, by path."""
        home, libxl = f"/local/domain/{self.domid}", f"/libxl/{self.domid}"
        target = self.target_kib if self.memory_target is None else self.memory_target
        found = {
            f"{home}/name": self.name,
            f"{home}/memory/static-max": str(self.max_kib),
            f"{home}/memory/target": str(target),
            f"{libxl}/type": self.kind,
        }
        if self.passed_through:
            backend = f"/local/domain/0/backend/pci/{self.domid}/0"
            found[f"{backend}/num_devs"] = str(len(self.passed_through))
            for number, device in enumerate(self.passed_through):
                found[f"{backend}/dev-{number}"] = device
        return found

    def write_logdirty(self, gfn: int) -> None:
        """A guest wrote to a log-dirty page: note it, make it plain RAM (``p2m_change_type_one``).

        The host entry gets the default access, and what views had for the gfn is overwritten.
        """
        self.dirty.add(gfn)
        found = self.host.lookup(gfn)
        if found.type == PageType.RAM_LOGDIRTY:
            self.host_write(gfn, found.mfn, ORDER_4K, PageType.RAM_RW, self.host_default_access)

    def unpause(self) -> None:
        """Take one pause; the first time none is left, the APIC's page is mapped.

        ``vmx.c:domain_creation_finished``, 4.15: a domain that never ran has a hole there.
        """
        if not self.pauses:
            raise HypercallError(EINVAL)
        self.pauses -= 1
        if self.pauses or self.creation_finished:
            return
        self.creation_finished = True
        if self.release.version >= (4, 15):
            self.map_apic_page()

    def map_apic_page(self) -> None:
        """``vmx_alloc_vlapic_mapping``: part of the domain's creation in 4.14."""
        if self.hvm and (mfn := self.machine.frames.allocate()) is not None:
            self.special_frames.add(mfn)
            self.host_write(_APIC_PAGE_GFN, mfn, ORDER_4K, PageType.MMIO_DIRECT, ACCESS_RWX)

    @property
    def crashed(self) -> bool:
        """Whether Xen has shut it down."""
        return self.shutdown_code == SHUTDOWN_CRASH

    def crash(self, reason: str) -> None:
        """``domain_crash``."""
        if self.shutdown_code is None:
            self.crash_reason = reason
        self.shut_down(SHUTDOWN_CRASH)

    def shut_down(self, code: int) -> None:
        """``domain_shutdown``: the first reason counts."""
        if self.shutdown_code is None:
            self.shutdown_code = code

    def runs(self, vcpu: Vcpu) -> bool:
        """Whether nothing keeps a vCPU from running."""
        return not (
            self.pauses
            or self.dying
            or self.shutdown_code is not None
            or not vcpu.online
            or vcpu.stopped
        )

    def relinquish(self) -> None:
        """Give the memory back (``domain_relinquish_resources``); what is mapped stays so long."""
        for vcpu in self.vcpus:
            self._forget_veinfo(vcpu)
        held = {
            entry.mfn + offset
            for _, order, entry in self.host.entries()
            if entry.type in RAM_TYPES and entry.mfn < MMIO_MFN_BASE
            for offset in range(1 << order)
        }
        self.host.flush()
        self.m2p.clear()
        for mfn in held:
            self.machine.frames.release(mfn, self)
        while self.special_frames:
            self.machine.frames.free(self.special_frames.pop())

    # altp2m. Arguments are those of the hypercall; the gate has been passed.

    def convert_access(self, number: int) -> int:
        """``xenmem_access_to_p2m_access``: EINVAL for a number this release does not know."""
        if number == self.release.default_access_number:
            return self.host_default_access
        if not 0 <= number < self.release.default_access_number:
            raise HypercallError(EINVAL)
        return number

    def existing_view(self, index: int) -> View:
        """Return a live view; EINVAL otherwise."""
        if index < len(self.views) and self.views[index].exists:
            return self.views[index]
        raise HypercallError(EINVAL)

    def _table_of(self, index: int) -> P2m:
        """View 0 is the host p2m for access and suppress-#VE calls."""
        return self.existing_view(index).table if index else self.host

    def set_active(self, state: bool) -> None:
        """``HVMOP_altp2m_set_domain_state``."""
        if self.nested:
            raise HypercallError(EINVAL)
        if state == self.active:
            return
        if state:
            self.active = True
            try:
                self._activate(self.views[0], self.host_default_access)
            except HypercallError:
                self.active = not self.release.failed_enable_clears_active
                raise
            for vcpu in self.vcpus:
                vcpu.view = 0
            return
        self.active = False
        for vcpu in self.vcpus:
            vcpu.view = INVALID_VIEW
            vcpu.vm_functions = False
            self._forget_veinfo(vcpu)
        for view in self.views:
            view.reset()
            view.exists = view.visible = False

    def migrate(self, domid: int) -> None:
        """What is left of it in a domain restored from what was saved of this one."""
        if self.active:
            self.set_active(False)
        self.domid, self.pauses, self.access_required = domid, 0, False
        self.host_default_access = ACCESS_RWX
        for vcpu in self.vcpus:
            vcpu.migrate()
        entries = list(self.host.entries())
        self.host.flush()
        self.host.restart()
        for gfn, order, entry in entries:
            self.host.write(gfn, entry.mfn, order, entry.type, ACCESS_RWX)

    def _activate(self, view: View, default_access: int) -> None:
        """``p2m_activate_altp2m``."""
        if self.machine.xen_heap_exhausted:  # p2m_init_logdirty, rangeset_merge
            raise HypercallError(ENOMEM)
        view.default_access = default_access
        view.min_remapped = ALL_GFNS
        view.max_remapped = 0
        view.table.restart()
        view.exists = view.visible = True

    def create_view(self, access: int) -> int:
        """``p2m_init_next_altp2m``: the lowest free number; EINVAL where none is left."""
        default_access = self.convert_access(access)
        for index, view in enumerate(self.views):
            if not view.exists:
                self._activate(view, default_access)
                return index
        raise HypercallError(EINVAL)

    def destroy_view(self, index: int) -> None:
        """``p2m_destroy_altp2m_by_id``: every refusal is EBUSY."""
        if not 0 < index < len(self.views) or not self.views[index].exists:
            raise HypercallError(EBUSY)
        if any(vcpu.view == index for vcpu in self.vcpus):
            raise HypercallError(EBUSY)
        self.views[index].reset()
        self.views[index].exists = self.views[index].visible = False

    def switch_to_view(self, index: int) -> None:
        """``p2m_switch_domain_altp2m_by_id``: hidden views are refused."""
        if index >= len(self.views) or not self.views[index].visible:
            raise HypercallError(EINVAL)
        for vcpu in self.vcpus:
            vcpu.view = index

    def switch_vcpu(self, vcpu: Vcpu, index: int) -> None:
        """``p2m_switch_vcpu_altp2m_by_id``: hidden views are allowed, absent ones ignored."""
        if self.active and index < len(self.views) and self.views[index].exists:
            vcpu.view = index

    def set_visibility(self, index: int, visible: bool) -> None:
        """``p2m_set_altp2m_view_visibility``."""
        self.existing_view(index).visible = visible

    def vcpu_view(self, number: int) -> int:
        """``HVMOP_altp2m_get_p2m_idx``."""
        return self.vcpu(number).view

    def vcpu(self, number: int) -> Vcpu:
        """Return a vCPU; EINVAL if there is none."""
        if number >= len(self.vcpus):
            raise HypercallError(EINVAL)
        return self.vcpus[number]

    def effective_entry(self, table: P2m, view: View | None, gfn: int, *, copy: bool) -> Lookup:
        """``altp2m_get_effective_entry``: the view's entry, else the host's if it is plain RAM.

        ``copy`` puts a host superpage into the view first. The host itself answers with a hole
        where there is one, and no error.
        """
        found = table.lookup(gfn)
        if found.valid or view is None:
            return found
        found = self.host_lookup(gfn, populate=True, unshare=True)
        if not found.valid or found.type != PageType.RAM_RW:
            raise HypercallError(ESRCH)
        if copy and found.order != ORDER_4K:
            access = found.access
            if self.release.superpage_copy_takes_view_default:
                access = view.default_access
            mask = (1 << found.order) - 1
            error = table.write(
                gfn & ~mask, found.mfn & ~mask, found.order, found.type, access, True
            )
            if error:
                raise HypercallError(error)
        return found

    def set_mem_access(self, index: int, gfn: int, number: int) -> None:
        """``p2m_set_mem_access`` for one gfn; ~0 sets the host's default, whatever the view."""
        view = self.existing_view(index) if index else None
        access = self.convert_access(number)
        if gfn == ALL_GFNS:
            self.host_default_access = access
        else:
            self._set_one_access(view, gfn, access)

    def set_mem_access_multi(
        self, index: int, accesses: Iterable[int], gfns: Iterable[int]
    ) -> None:
        """``p2m_set_mem_access_multi``: in order, up to the first error; ~0 is a plain gfn."""
        view = self.existing_view(index) if index else None
        for gfn, number in zip(gfns, accesses, strict=True):
            self._set_one_access(view, gfn, self.convert_access(number))

    def _set_one_access(self, view: View | None, gfn: int, access: int) -> None:
        """``set_mem_access`` in ``mem_access.c``: a view skips what it cannot resolve."""
        if view is None:
            found = self.host_lookup(gfn, populate=True)
            error = self.host_write(gfn, found.mfn, ORDER_4K, found.type, access)
        else:
            try:
                found = self.effective_entry(view.table, view, gfn, copy=True)
            except HypercallError as refused:
                if refused.errno == ESRCH:
                    return
                raise
            error = view.table.write(gfn, found.mfn, ORDER_4K, found.type, access)
        if error:
            raise HypercallError(error)

    def get_mem_access(self, index: int, gfn: int) -> int:
        """``p2m_get_mem_access``: the table's own answer, no fallback to the host."""
        if gfn == ALL_GFNS:
            if index:
                return self.existing_view(index).default_access
            return self.host_default_access
        found = self._table_of(index).lookup(gfn)
        if not found.mapped:
            raise HypercallError(ESRCH)
        if not 0 <= found.access < self.release.default_access_number:
            raise HypercallError(ERANGE)
        return found.access

    def change_gfn(self, index: int, old_gfn: int, new_gfn: int) -> None:
        """``p2m_change_altp2m_gfn``: remap or revert; a failed final write goes unreported."""
        view = self.existing_view(index)
        table = view.table
        if new_gfn == ALL_GFNS:
            found = table.lookup(old_gfn)
            if found.valid and (error := self.remove_entry(view, old_gfn, found.mfn)):
                raise HypercallError(error)
            return
        self.effective_entry(table, view, old_gfn, copy=True)
        new = self.effective_entry(table, view, new_gfn, copy=False)
        if table.write(old_gfn, new.mfn, ORDER_4K, new.type, new.access, True):
            return
        view.min_remapped = min(view.min_remapped, new_gfn)
        view.max_remapped = max(view.max_remapped, new_gfn)

    def set_suppress_ve(self, index: int, gfn: int, suppress: bool) -> None:
        """``p2m_set_suppress_ve``."""
        if gfn == ALL_GFNS:
            raise Livelock("set_suppress_ve with gfn ~0 wraps its counter and never ends")
        failure = self._set_suppress_ve(index, gfn, gfn, suppress)
        if failure:
            raise HypercallError(failure[1])

    def set_suppress_ve_multi(
        self, index: int, first: int, last: int, suppress: bool
    ) -> tuple[int, int] | None:
        """``p2m_set_suppress_ve_multi``: tries every gfn, returns the first failure."""
        last = min(last, (1 << self.machine.physical_address_bits) - 1)
        if first > last:
            raise HypercallError(EINVAL)
        return self._set_suppress_ve(index, first, last, suppress)

    def _set_suppress_ve(
        self, index: int, first: int, last: int, suppress: bool
    ) -> tuple[int, int] | None:
        view = self.existing_view(index) if index else None
        table = view.table if view else self.host
        failure: tuple[int, int] | None = None
        beyond = None
        if view and last > self.host.max_mapped:
            # Above everything ever mapped each gfn fails alike; Xen walks them, we need not.
            beyond = max(first, self.host.max_mapped + 1)
            last = self.host.max_mapped
        if last - first >= LIVELOCK_STEPS:
            raise Livelock(f"suppress-#VE over {last - first + 1:#x} gfns would not end")
        for gfn in range(first, last + 1):
            try:
                found = self.effective_entry(table, view, gfn, copy=False)
                write = table.write if view else self.host_write
                error = write(gfn, found.mfn, ORDER_4K, found.type, found.access, suppress)
            except HypercallError as refused:
                error = refused.errno
            if error and failure is None:
                failure = gfn, error
        if failure is None and beyond is not None:
            failure = beyond, ESRCH
        return failure

    def get_suppress_ve(self, index: int, gfn: int) -> bool:
        """``p2m_get_suppress_ve``."""
        found = self._table_of(index).lookup(gfn)
        if not found.valid:
            raise HypercallError(ESRCH)
        return found.suppress_ve

    def enable_notify(self, number: int, gfn: int) -> None:
        """``altp2m_vcpu_enable_ve``, after the checks of ``do_altp2m_op``."""
        vcpu = self.vcpu(number)
        if not self.machine.has_virtualisation_exceptions:
            raise HypercallError(EOPNOTSUPP)
        if vcpu.veinfo is not None:
            raise HypercallError(EEXIST)
        found = self.host_lookup(gfn, populate=True, unshare=True)
        if found.type in PAGING_TYPES:
            raise HypercallError(EAGAIN)
        if found.type == PageType.MMIO_DIRECT:
            raise HypercallError(EPERM)
        if (
            not found.valid
            or found.type not in (PageType.RAM_RW, PageType.RAM_LOGDIRTY)
            or found.mfn in self.special_frames
        ):
            raise HypercallError(EINVAL)
        vcpu.veinfo = found.mfn
        vcpu.vm_functions = True  # vmx_vcpu_update_vmfunc_ve; disabling leaves it on
        self.machine.frames.pin(found.mfn)

    def disable_notify(self, number: int) -> None:
        """``altp2m_vcpu_disable_ve``: 0 even where it was not enabled."""
        vcpu = self.vcpu(number)
        if not self.machine.has_virtualisation_exceptions:
            raise HypercallError(EOPNOTSUPP)
        self._forget_veinfo(vcpu)

    def _forget_veinfo(self, vcpu: Vcpu) -> None:
        if vcpu.veinfo is not None:
            self.machine.frames.unpin(vcpu.veinfo)
            vcpu.veinfo = None


class Machine:
    """The hypervisor: its release, its boot options, its domains."""

    def __init__(
        self,
        release: Release,
        *,
        altp2m: bool,
        privileged: bool,
        vm_event: bool,
        library: Release | None,
        executable_superpages: bool,
        has_virtualisation_exceptions: bool,
        physical_address_bits: int,
        memory_pages: int,
    ) -> None:
        self.release = release
        self.altp2m_supported = altp2m
        self.privileged = privileged
        self.vm_event = vm_event or release.version < (4, 22)  # always there before
        self.library = library or release
        self.executable_superpages = executable_superpages
        self.has_virtualisation_exceptions = has_virtualisation_exceptions
        self.physical_address_bits = physical_address_bits
        self.xen_heap_exhausted = False
        self.frames = Frames(memory_pages)
        self.domains: dict[int, Domain] = {}

    def add_domain(
        self,
        name: str,
        *,
        kind: str = "pvh",
        mode: Altp2mMode = Altp2mMode.EXTERNAL,
        view_count: int = _DEFAULT_VIEWS,
        vcpus: int = 1,
        memory_kib: int = 16 << 10,
        max_kib: int | None = None,
        pool_pages: int = 4096,
        superpages: bool = True,
        nested: bool = False,
    ) -> Domain:
        """Create a domain as libxl would: RAM from gfn 0, special pages below 4 GiB, paused."""
        check_kind("name", name, str, "text")
        if any(one.name == name and not one.dying for one in self.domains.values()):
            raise InvalidArgumentError(f"there is a domain {name!r} already, as libxl says, too")
        if kind not in ("pvh", "hvm", "pv"):
            raise InvalidArgumentError(f'kind must be "pvh", "hvm" or "pv", not {kind!r}')
        if mode not in list(Altp2mMode):
            raise InvalidArgumentError(f"mode must be an Altp2mMode, not {mode!r}")
        check_number("view_count", view_count, most=_MOST_VIEWS)
        check_number("vcpus", vcpus, least=1, most=_MOST_VCPUS)
        check_number("memory_kib", memory_kib)
        if max_kib is not None:
            check_number("max_kib", max_kib, least=memory_kib)
        check_number("pool_pages", pool_pages, least=1)
        check_flag("superpages", superpages)
        check_flag("nested", nested)
        domid = max(self.domains, default=0) + 1
        if not self.release.view_count_is_setting:
            view_count = _DEFAULT_VIEWS
        domain = Domain(
            self,
            domid,
            name,
            kind=kind,
            mode=mode,
            view_count=view_count,
            vcpus=vcpus,
            memory_kib=memory_kib,
            max_kib=max_kib or memory_kib,
            pool_pages=pool_pages,
            nested=nested,
        )
        self.domains[domid] = domain
        limit, domain.max_pages = domain.max_pages, 1 << 40
        end = memory_kib * 1024 // PAGE_SIZE
        big = end >> ORDER_2M << ORDER_2M if superpages else 0
        if not (
            all(domain.add_page(gfn, ORDER_2M) for gfn in range(0, big, 1 << ORDER_2M))
            and domain.populate(big, end - big)
        ):
            raise MemoryError(f"the mock host has no {memory_kib} KiB for {name}")
        if domain.hvm:
            self._add_special_pages(domain)
        domain.max_pages = limit + _SPECIAL_PAGES
        domain.pauses = 1
        return domain

    def _add_special_pages(self, domain: Domain) -> None:
        first = _SPECIAL_PAGES_END - _SPECIAL_PAGES
        for gfn in range(first, _SPECIAL_PAGES_END):
            domain.add_page(gfn, ORDER_4K)
        domain.params |= {
            HVM_PARAM_MONITOR_RING_PFN: first + 1,
            HVM_PARAM_BUFIOREQ_PFN: first + 3,
            HVM_PARAM_STORE_PFN: first + 4,
            HVM_PARAM_IOREQ_PFN: first + 5,
            HVM_PARAM_IDENT_PT: (first + 6) << 12,
            HVM_PARAM_CONSOLE_PFN: first + 7,
        }
        if self.release.version < (4, 15):
            domain.map_apic_page()

    def domain(self, domid: int) -> Domain:
        """Return a domain; ESRCH if there is none."""
        found = self.domains.get(domid)
        if found is None:
            raise HypercallError(ESRCH)
        return found

    def controlled(self, domid: int) -> Domain:
        """Return a domain for the control domain alone; EPERM for anybody else."""
        found = self.domain(domid)
        if not self.privileged:
            raise HypercallError(EPERM)
        return found

    def altp2m(self, domid: int, *, needs_active: bool = True) -> Domain:
        """The gate of ``do_altp2m_op``: every check before the operation's own, in its order."""
        if not self.altp2m_supported:
            raise HypercallError(EOPNOTSUPP)
        domain = self.domain(domid)
        if not domain.hvm or (needs_active and not domain.active):
            raise HypercallError(EOPNOTSUPP)
        if domain.mode == Altp2mMode.DISABLED:
            raise HypercallError(EINVAL)
        if not domain.views:
            raise HypercallError(EOPNOTSUPP)
        if not self.privileged or domain.mode > Altp2mMode.LIMITED:
            raise HypercallError(EPERM)
        return domain
