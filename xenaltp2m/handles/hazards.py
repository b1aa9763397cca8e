# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hazards: check a domain for what bypasses, invalidates or may change its views.

If a view could fail to hold and nothing would report it, altp2m is not opened unless the caller
accepts that hazard by name. The checks at opening make few and quick calls, to Xen and xenstore
only; :meth:`Domain.hazards` and ``xenaltp2m doctor`` report the other hazards, too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from xenaltp2m.errors import HazardError, InvalidArgumentError, XenError
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.types import HVM_PARAM_ALTP2M, PAGE_SIZE, Altp2mMode, DomainInfo, MemoryType
from xenaltp2m.values.arguments import check_kind, check_number

if TYPE_CHECKING:
    from xenaltp2m.abi.releases import Release
    from xenaltp2m.backend import Backend

PAGE = "docs/hazards.md"
"""The page with a section for each hazard, under its name."""

_MIB = 1 << 20
_SAMPLES = 4
_FIRST_SAMPLED = 0x100
"""From 1 MiB on: below are ROMs, which are always read-only."""
_TABLE_ENTRIES = 512
_MOST_DEVICES = 256


class Severity(enum.StrEnum):
    """The severity of a finding or a hazard."""

    OK = "ok"
    """Nothing is wrong."""
    NOTE = "note"
    """Worth knowing."""
    WARNING = "warning"
    """Something does not work, or may fail. A hazard of this severity refuses nothing."""
    PROBLEM = "problem"
    """Nothing works until it is cured. For a hazard: altp2m is not opened unless it is accepted."""


@dataclass(frozen=True, slots=True)
class Hazard:
    """A hazard to the views of a domain.

    Attributes:
        name: The name to accept it by.
        severity: Whether altp2m refuses to open because of it.
        evidence: What was found, and where.
        cause: Why it undermines views.
        consequence: What happens then.
        cure: What to do about it.
        link: Its section in the documentation.
    """

    name: str
    severity: Severity
    evidence: str
    cause: str
    consequence: str
    cure: str

    @property
    def link(self) -> str:
        """Its section in the documentation."""
        return f"{PAGE}#{self.name}"

    @property
    def of_release(self) -> bool:
        """Whether it is a bug of the running release, which affects every domain."""
        return self.name in _BUGS


@dataclass(frozen=True, slots=True)
class Survey:
    """The results of all checks of a domain.

    Attributes:
        hazards: The hazards that were found, the refused ones first.
        unknown: Why a hazard could not be checked for, by its name.
    """

    hazards: tuple[Hazard, ...]
    unknown: Mapping[str, str]


class _Kind(NamedTuple):
    severity: Severity
    cause: str
    consequence: str
    cure: str


class _Bug(NamedTuple):
    bites: Callable[[Release], bool]
    fixed: str | None
    """The first release without it, or None if there is none yet."""
    kind: _Kind


_BALLOONED = "a change of the host p2m within the range of a view's remap targets resets that view"

_KINDS: dict[str, _Kind] = {
    "passthrough": _Kind(
        Severity.PROBLEM,
        "the device's DMA goes through the IOMMU's tables, which are the host p2m or follow it",
        "the device reads and writes pages that a view protects, and ignores remaps; if the IOMMU "
        "shares its tables with the CPU, rights set in view 0 make the device's DMA fail",
        "remove the device: xl pci-detach, or remove pci=[...] from the domain's xl.cfg",
    ),
    "log-dirty": _Kind(
        Severity.PROBLEM,
        "for Xen, a page whose writes are logged is not plain RAM",
        "setting the access of such a page in a view has no effect and no error, remapping it "
        "fails, and the domain has no views after it is migrated or saved",
        "wait until the migration is over, then open altp2m on the host that the domain runs on",
    ),
    "populate-on-demand": _Kind(
        Severity.PROBLEM,
        "the domain was created with less memory than its limit: Xen adds pages on first access, "
        f"and removes pages that contain only zeros; {_BALLOONED}",
        "a view loses its rights and remaps when Xen removes a page, without the guest's doing",
        "set memory = maxmem in the domain's xl.cfg and create it again",
    ),
    "paging": _Kind(
        Severity.PROBLEM,
        f"a page that is paged out to disk is removed from the host p2m; {_BALLOONED}",
        "a view loses its rights and remaps when the pager removes a page",
        "stop the pager (xenpaging), so that every page comes back",
    ),
    "sharing": _Kind(
        Severity.PROBLEM,
        "the first write to a shared page gives the gfn a new frame, which changes the host p2m "
        "and overwrites the entries of views for that gfn",
        "a view loses its right or remap on the page at the guest's first write",
        "stop sharing the domain's memory",
    ),
    "mixed": _Kind(
        Severity.PROBLEM,
        "in mode mixed the guest's own kernel may make every altp2m call",
        "the guest can destroy, change or leave the views that watch it, and switch altp2m off",
        'set altp2m="external" in its xl.cfg, or "limited" if the guest handles #VE, and create '
        "it again",
    ),
    "nested": _Kind(
        Severity.PROBLEM,
        "Xen does not support altp2m for a domain with nested virtualization",
        "Xen refuses to switch altp2m on (EINVAL)",
        "remove nestedhvm=1 from its xl.cfg and create it again",
    ),
    "write-only": _Kind(
        Severity.PROBLEM,
        "an EPT entry that is writable but not readable is a misconfiguration for the CPU",
        "the domain crashes at the first access",
        "add R: View.set_access, View.remap and Altp2m.create_view refuse W and WX",
    ),
    "emulated-devices": _Kind(
        Severity.WARNING,
        "a device model accesses the guest's memory through the host p2m, and the backends of "
        "paravirtual devices access it through grants",
        "views do not stop transfers of disks, network cards and the screen, no event reports "
        "them, and they use the original page of a remap; video memory that a viewer displays is "
        "log-dirty, so that views cannot protect it",
        'use type="pvh" if the guest supports it; do not watch pages that devices use',
    ),
    "ballooning": _Kind(
        Severity.WARNING,
        f"the guest's balloon driver may give up pages, or get more; {_BALLOONED}",
        "a view loses rights and remaps if the guest gives up a page within the range of its remap "
        "targets; pages added by this library lie above all such pages, and are safe",
        "set memory = maxmem in its xl.cfg, and do not use xl mem-set; View.verify finds what was "
        "lost",
    ),
    "p2m-pool": _Kind(
        Severity.WARNING,
        "each view has its own tables, from the same pool as the host p2m's",
        "setting access fails with ENOMEM, a remap may fail without an error, and the domain "
        "crashes when a vCPU first accesses a page in a view",
        "raise shadow_memory=MBYTES in its xl.cfg and create it again, or use fewer views",
    ),
}

_BUGS: dict[str, _Bug] = {
    "decorative-default": _Bug(
        lambda release: not release.lazy_copy_takes_view_default,
        "4.19",
        _Kind(
            Severity.WARNING,
            "Xen stores a view's default access, but does not use it (7e5b662b28)",
            "pages that Xen copies into a view get the host's access",
            "set the access of every gfn: view.set_access(range(domain.maximum_gfn + 1), ...)",
        ),
    ),
    "superpage-default": _Bug(
        lambda release: (
            release.lazy_copy_takes_view_default and not release.superpage_copy_takes_view_default
        ),
        "4.22",
        _Kind(
            Severity.WARNING,
            "if a call copies a superpage, the other gfns in it get the host's access (38a5bfc7f2)",
            "neighbours of a gfn that was set do not have the view's default access",
            "set the access of every gfn, or boot Xen with hap_2mb=0 hap_1gb=0",
        ),
    ),
    "hidden-superpage": _Bug(
        lambda release: release.lazy_copy_takes_view_default,
        None,
        _Kind(
            Severity.WARNING,
            "Xen takes a superpage for a hole if it was copied with access n, n2rwx or, if Xen "
            "splits executable superpages, x",
            "a vCPU that accesses it faults for ever, or its neighbours' access is lost",
            "use the default RWX and set the access of every gfn, or boot Xen with hap_2mb=0 "
            "hap_1gb=0",
        ),
    ),
    "overwritten-neighbours": _Bug(
        lambda release: not release.lazy_copy_fits_view_order,
        "4.17",
        _Kind(
            Severity.WARNING,
            "a lazy copy is as large as the host's superpage, even if the view has entries in it "
            "(ced5685208)",
            "when a page is first accessed, rights and remaps within the same 2 MiB may be lost",
            "boot Xen with hap_2mb=0 hap_1gb=0, and check by View.verify",
        ),
    ),
    "dropped-superpage": _Bug(
        lambda release: not release.drop_test_covers_order,
        "4.17",
        _Kind(
            Severity.WARNING,
            "when a superpage leaves the host p2m, Xen checks only its first gfn (cbd0874fef)",
            "a view keeps remaps to pages that the guest no longer has",
            "do not balloon while views have remaps to the guest's own pages",
        ),
    ),
    "failed-enable": _Bug(
        lambda release: not release.failed_enable_clears_active,
        "4.16",
        _Kind(
            Severity.WARNING,
            "if switching altp2m on fails, it stays on (5e97b97bc2)",
            "the domain has altp2m on and no view 0",
            "none is needed: the library switches it off then",
        ),
    ),
    "unheard-host-access": _Bug(
        lambda release: release.lazy_copy_takes_view_default,
        None,
        _Kind(
            Severity.WARNING,
            "view 0 copies pages with its own default access, not with the host's",
            "a right set in view 0 does not apply to a page that no vCPU in it has accessed yet",
            "set rights in your own view, and move the vCPUs to it",
        ),
    ),
    "delayed-answers": _Bug(
        lambda release: release.removal_delays_answers,
        None,
        _Kind(
            Severity.WARNING,
            "after a page has left a p2m table, each vCPU's next resume ignores all of the "
            "response but the resume itself",
            "a response, such as a single step or a switch of views, may take effect a resume late",
            "none is needed: this library's monitors handle it",
        ),
    ),
}

NAMES: tuple[str, ...] = (*_KINDS, *_BUGS)
"""Every hazard's name."""


class _Facts:
    """The checks of one domain; each query is made once."""

    def __init__(self, context: DomainContext, views: int) -> None:
        self._backend = context.backend
        self._domid = int(context.domid)
        self._context = context
        self.views = views

    @cached_property
    def info(self) -> DomainInfo:
        return self._context.info()

    def stored(self, path: str) -> str:
        """Read a node of xenstore; empty if there is none."""
        found = self._backend.xs_read(path.format(self._domid))
        return (found or b"").decode(errors="replace")

    def passthrough(self) -> str | None:
        """Read the nodes that ``libxl_device_pci_list`` reads (``libxl_pci.c``, 4.14 to 4.22)."""
        backend = "/local/domain/0/backend/pci/{}/0"
        number = self.stored(f"{backend}/num_devs")
        if not number.isdecimal() or not int(number):
            return None
        count = min(int(number), _MOST_DEVICES)
        devices = [self.stored(f"{backend}/dev-{index}") for index in range(count)]
        return f"xenstore lists the PCI devices {', '.join(filter(None, devices)) or number}"

    def log_dirty(self) -> str | None:
        if self.info.shared_pages:
            return None  # shared pages have the same type; the check for sharing reports them
        room = self.info.pages - _FIRST_SAMPLED
        if room < _SAMPLES:
            return None
        gfns = [_FIRST_SAMPLED + room * sample // _SAMPLES for sample in range(_SAMPLES)]
        types = [self._backend.hvm_get_mem_type(self._domid, gfn) for gfn in gfns]
        logged = types.count(MemoryType.READ_ONLY)
        if 2 * logged < len(types):
            return None
        return f"writes to {logged} of {len(types)} sampled pages are logged"

    def populate_on_demand(self) -> str | None:
        entries = self._backend.domain_get_pod_target(self._domid).entries
        return f"{entries} pages are not populated yet" if entries else None

    def paging(self) -> str | None:
        paged = self.info.paged_pages
        return f"{paged} pages are paged out" if paged else None

    def sharing(self) -> str | None:
        shared = self.info.shared_pages
        return f"{shared} pages are shared" if shared else None

    def mixed(self) -> str | None:
        mode = self._backend.hvm_param_get(self._domid, HVM_PARAM_ALTP2M)
        return "the domain's altp2m mode is mixed" if mode == Altp2mMode.MIXED else None

    def nested(self) -> str | None:
        build = self._context.config().get("b_info")
        if not isinstance(build, dict):
            raise ValueError("libxl's configuration of the domain has no b_info")  # noqa: TRY004
        parts = [build, *(part for part in build.values() if isinstance(part, dict))]
        on = any(str(part.get("nested_hvm")) == "True" for part in parts)
        return "libxl's configuration has nested_hvm" if on else None

    def emulated_devices(self) -> str | None:
        kind = self.stored("/libxl/{}/type")
        return "xenstore gives the domain's type as hvm, not pvh" if kind == "hvm" else None

    def ballooning(self) -> str | None:
        most, target = (
            self.stored(f"/local/domain/{{}}/memory/{name}") for name in ("static-max", "target")
        )
        if not (most.isdecimal() and target.isdecimal()) or int(target) >= int(most):
            return None
        return f"xenstore gives the domain's target as {target} KiB, of {most} KiB at most"

    def p2m_pool(self) -> str | None:
        has = pool_size(self._backend, self._domid)
        needs = (1 + self.views) * tables_of(self.info.pages) * PAGE_SIZE
        if needs <= has:
            return None
        return (
            f"the pool has {has // 1024} KiB, and the host p2m with {self.views} views may "
            f"need {needs // 1024} KiB, if each gfn is mapped on its own"
        )


_LOOK: dict[str, Callable[[_Facts], str | None]] = {
    "passthrough": _Facts.passthrough,
    "log-dirty": _Facts.log_dirty,
    "populate-on-demand": _Facts.populate_on_demand,
    "paging": _Facts.paging,
    "sharing": _Facts.sharing,
    "mixed": _Facts.mixed,
    "nested": _Facts.nested,
    "emulated-devices": _Facts.emulated_devices,
    "ballooning": _Facts.ballooning,
    "p2m-pool": _Facts.p2m_pool,
}
"""The check for each hazard. ``write-only`` has none: the calls that would set it refuse it."""

_AT_OPENING = ("mixed", "paging", "sharing", "log-dirty", "populate-on-demand", "passthrough")
"""The hazards that altp2m refuses to open with. Xen itself refuses ``nested``."""


def pool_size(backend: Backend, domid: int) -> int:
    """Return the size of a domain's p2m pool in bytes; up to Xen 4.16 rounded up to a MiB."""
    if backend.supports("xc_get_paging_mempool_size"):
        return backend.get_paging_mempool_size(domid)
    return backend.shadow_get_allocation(domid) * _MIB


def tables_of(pages: int) -> int:
    """Return how many pages of tables map that many consecutive gfns at 4 KiB each."""
    tables = 0
    for _ in range(4):
        pages = -(-pages // _TABLE_ENTRIES)
        tables += pages
    return tables


def survey(context: DomainContext, views: int = 1) -> Survey:
    """Check a domain for all hazards, whether altp2m is on or off.

    Args:
        context: The domain's context.
        views: The number of views besides view 0 that the p2m pool must suffice for.

    Raises:
        DomainNotFoundError: The domain was destroyed.
    """
    check_kind("context", context, DomainContext, "a domain's context")
    check_number("views", views)
    facts = _Facts(context, views)
    release = context.release
    if not facts.info.hvm:
        return Survey((), {})  # it has no views to undermine
    found, unknown = [], {}
    for name, look in _LOOK.items():
        try:
            evidence = look(facts)
        except (XenError, ValueError) as error:
            unknown[name] = error.message if isinstance(error, XenError) else str(error)
            continue
        if evidence is not None:
            found.append(Hazard(name, evidence=evidence, **_KINDS[name]._asdict()))
    for name, bug in _BUGS.items():
        if bug.bites(release):
            until = f"fixed in Xen {bug.fixed}" if bug.fixed else "not fixed in any release so far"
            evidence = f"Xen {release} is running; {until}"
            found.append(Hazard(name, evidence=evidence, **bug.kind._asdict()))
    return Survey(
        tuple(sorted(found, key=lambda hazard: hazard.severity is not Severity.PROBLEM)), unknown
    )


def refuse(context: DomainContext, accept: Collection[str] = ()) -> None:
    """Raise if a view might be bypassed or invalidated, and nothing would report it.

    Args:
        context: The domain's context.
        accept: Names of hazards that are not checked for.

    Raises:
        HazardError: Some hazards were found.
        InvalidArgumentError: A name is not a hazard's.
    """
    facts = _Facts(context, 1)
    found = [
        Hazard(name, evidence=evidence, **_KINDS[name]._asdict())
        for name in _AT_OPENING
        if name not in accept and (evidence := _LOOK[name](facts)) is not None
    ]
    if not found:
        return
    names = tuple(hazard.name for hazard in found)
    evidence = "; ".join(f"{hazard.name}: {hazard.evidence}" for hazard in found)
    spelt = "".join(f'"{name}", ' for name in names).rstrip()
    flags = " ".join(f"--accept {name}" for name in names)
    raise HazardError(
        f"views of domain {facts.info.domid} would be undermined: {evidence}",
        op="altp2m",
        domid=int(context.domid),
        hazards=names,
        hint=[
            *(f"{hazard.name}: {hazard.consequence}: {hazard.cure}" for hazard in found),
            f"to continue all the same: altp2m(accept=({spelt})), or {flags}; see {PAGE}",
        ],
    )


def check_names(accept: Collection[str]) -> None:
    """Check that all names are names of hazards.

    Raises:
        InvalidArgumentError: One is not, or the names are given as a single string.
    """
    if isinstance(accept, str):
        raise InvalidArgumentError(f'accept takes several names, such as ("{accept}",)')
    if not isinstance(accept, Collection):
        raise InvalidArgumentError(f"accept takes names of hazards, not {accept!r}")
    for name in accept:
        if name not in NAMES:
            raise InvalidArgumentError(f"{name!r} is not a hazard: {', '.join(NAMES)}")
