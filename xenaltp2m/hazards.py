# SPDX-License-Identifier: LGPL-2.1-or-later
"""What undermines views: what goes around them, takes them away, or may change them.

Where a view could fail to hold and nobody would be told, altp2m is not opened unless whoever opens
it accepts that by name. What is asked then is asked of Xen and of xenstore alone, in few and quick
calls; the rest is only told, by :meth:`Domain.hazards` and ``xenaltp2m doctor``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from xenaltp2m.arguments import check_kind, check_number
from xenaltp2m.domain import Domain
from xenaltp2m.errors import HazardError, InvalidArgumentError, XenError
from xenaltp2m.types import HVM_PARAM_ALTP2M, PAGE_SIZE, Altp2mMode, DomainInfo, MemoryType

if TYPE_CHECKING:
    from xenaltp2m.abi.releases import Release
    from xenaltp2m.backend import Backend

PAGE = "docs/hazards.md"
"""Has a section for each hazard, under its name."""

_MIB = 1 << 20
_SAMPLES = 4
_FIRST_SAMPLED = 0x100
"""From 1 MiB on: below lie ROMs, which are read-only for good."""
_TABLE_ENTRIES = 512
_MOST_DEVICES = 256


class Severity(enum.StrEnum):
    """What is done about a hazard where nobody has accepted it."""

    REFUSED = "refused"
    """altp2m is not opened, by this package or by Xen itself."""
    WARNED = "warned"
    """It is told by :meth:`Domain.hazards`, and nothing is refused."""


@dataclass(frozen=True, slots=True)
class Hazard:
    """Something that undermines the views of a domain.

    Attributes:
        name: What it is accepted by.
        severity: What is done about it.
        evidence: What was found, and where.
        cause: Why it undermines views.
        consequence: What happens then.
        cure: What to do.
        link: Where more is written.
    """

    name: str
    severity: Severity
    evidence: str
    cause: str
    consequence: str
    cure: str

    @property
    def link(self) -> str:
        """Its section."""
        return f"{PAGE}#{self.name}"

    @property
    def of_release(self) -> bool:
        """Whether it is the running release's, and every domain's."""
        return self.name in _BUGS


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a domain's hazards.

    Attributes:
        hazards: Those that were found, the refused ones first.
        unknown: By the name of a hazard, why it could not be looked for.
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
    """The release without it, or None where there is none yet."""
    kind: _Kind


_BALLOONED = "a change of the host p2m within the range of a view's remap targets resets that view"

_KINDS: dict[str, _Kind] = {
    "passthrough": _Kind(
        Severity.REFUSED,
        "the device's DMA goes through the IOMMU's tables, which are the host p2m or follow it",
        "the device reads and writes what every view forbids, and never sees a remap; where it "
        "shares its tables with the CPU, rights set in view 0 make its DMA fail",
        "take the device away: xl pci-detach, or remove pci=[...] from the domain's xl.cfg",
    ),
    "log-dirty": _Kind(
        Severity.REFUSED,
        "a page whose writes are logged is not plain RAM to Xen",
        "access set on such a page in a view is silently not set, a remap of it is refused, and "
        "what the domain is migrated or saved to has no views at all",
        "wait until the migration is over, then open altp2m where the domain runs then",
    ),
    "populate-on-demand": _Kind(
        Severity.REFUSED,
        "the domain began with less memory than its limit, and Xen finds it pages as it needs "
        f"them, taking zeroed ones away again; {_BALLOONED}",
        "a view loses its rights and remaps when Xen takes a page, without the guest's doing",
        "give the domain memory = maxmem in its xl.cfg and create it anew",
    ),
    "paging": _Kind(
        Severity.REFUSED,
        f"a page written to disk leaves the host p2m; {_BALLOONED}",
        "a view loses its rights and remaps when the pager takes a page",
        "end the pager (xenpaging), so that every page comes back",
    ),
    "sharing": _Kind(
        Severity.REFUSED,
        "a shared page gets a frame of its own at the first write, which is a change of the host "
        "p2m, and overwrites what views have for that gfn",
        "the right or the remap a view has there is lost at the guest's first write",
        "end the sharing of the domain's memory",
    ),
    "mixed": _Kind(
        Severity.REFUSED,
        "in mode mixed the guest's own kernel may make every altp2m call",
        "the guest can destroy, change or leave the views that watch it, and switch altp2m off",
        'altp2m="external" in its xl.cfg, or "limited" where the guest handles #VE, and create it '
        "anew",
    ),
    "nested": _Kind(
        Severity.REFUSED,
        "Xen has no altp2m for a domain that may run guests of its own",
        "Xen refuses to switch altp2m on (EINVAL)",
        "remove nestedhvm=1 from its xl.cfg and create it anew",
    ),
    "write-only": _Kind(
        Severity.REFUSED,
        "the CPU calls an entry that can be written and not read misconfigured",
        "the domain crashes at the first touch",
        "give R, too: View.set_access, View.remap and Altp2m.create_view refuse W and WX",
    ),
    "emulated-devices": _Kind(
        Severity.WARNED,
        "a device model reaches the guest's memory through the host p2m, as every backend of a "
        "paravirtual device does through grants",
        "what the guest has its disks, network cards and screen read or write is not stopped by a "
        "view, is not told, and shows the page below a remap; and a screen that is watched is "
        "log-dirty, so that views have no say on it",
        'type="pvh" where the guest can do with it; do not watch pages that devices use',
    ),
    "ballooning": _Kind(
        Severity.WARNED,
        f"the guest is told to give memory back, or may be given more; {_BALLOONED}",
        "a view whose remap targets lie around what the guest gives back loses rights and remaps; "
        "pages added by this library lie above all of it, and are safe",
        "memory = maxmem in its xl.cfg, and no xl mem-set; View.verify finds what was lost",
    ),
    "p2m-pool": _Kind(
        Severity.WARNED,
        "each view has tables of its own, from the pool that the host p2m is made of",
        "setting access fails with ENOMEM, a remap may silently not be made, and a page that a "
        "vCPU touches first in a view crashes the domain",
        "more shadow_memory=MBYTES in its xl.cfg and create it anew, or fewer views",
    ),
}

_BUGS: dict[str, _Bug] = {
    "decorative-default": _Bug(
        lambda release: not release.lazy_copy_takes_view_default,
        "4.19",
        _Kind(
            Severity.WARNED,
            "a view's default access is kept, and not used (7e5b662b28)",
            "pages that a view copies get the host's access",
            "set the access of every gfn: view.set_access(range(domain.maximum_gfn + 1), ...)",
        ),
    ),
    "superpage-default": _Bug(
        lambda release: (
            release.lazy_copy_takes_view_default and not release.superpage_copy_takes_view_default
        ),
        "4.22",
        _Kind(
            Severity.WARNED,
            "what a call copies along in a superpage takes the host's access (38a5bfc7f2)",
            "neighbours of a gfn that was set have not the view's default access",
            "set the access of every gfn, or boot Xen with hap_2mb=0 hap_1gb=0",
        ),
    ),
    "hidden-superpage": _Bug(
        lambda release: release.lazy_copy_takes_view_default,
        None,
        _Kind(
            Severity.WARNED,
            "a superpage copied with access n, n2rwx or, where Xen splits executable ones, x is "
            "taken for a hole",
            "a vCPU that touches it faults for ever, or its neighbours' access is lost",
            "let the default be RWX and set the access of every gfn, or boot Xen with hap_2mb=0 "
            "hap_1gb=0",
        ),
    ),
    "overwritten-neighbours": _Bug(
        lambda release: not release.lazy_copy_fits_view_order,
        "4.17",
        _Kind(
            Severity.WARNED,
            "a lazy copy is as large as the host's superpage, whatever the view has in it "
            "(ced5685208)",
            "rights and remaps within the 2 MiB around a page touched first may be lost",
            "boot Xen with hap_2mb=0 hap_1gb=0, and look by View.verify",
        ),
    ),
    "dropped-superpage": _Bug(
        lambda release: not release.drop_test_covers_order,
        "4.17",
        _Kind(
            Severity.WARNED,
            "of a superpage that leaves the host p2m only the first gfn is looked at (cbd0874fef)",
            "a view keeps remaps to pages that the guest no longer has",
            "do not balloon while views have remaps to pages of the guest's own",
        ),
    ),
    "failed-enable": _Bug(
        lambda release: not release.failed_enable_clears_active,
        "4.16",
        _Kind(
            Severity.WARNED,
            "altp2m stays on where switching it on has failed (5e97b97bc2)",
            "the domain has altp2m on and no view 0",
            "none is needed: opening altp2m switches it off then",
        ),
    ),
    "unheard-host-access": _Bug(
        lambda release: release.lazy_copy_takes_view_default,
        None,
        _Kind(
            Severity.WARNED,
            "view 0 copies pages with its own default access, not with the host's",
            "a right set in view 0 is not in force on a page that vCPUs in it have not touched",
            "set rights in a view of your own, and move the vCPUs there",
        ),
    ),
    "delayed-answers": _Bug(
        lambda release: release.removal_delays_answers,
        None,
        _Kind(
            Severity.WARNED,
            "after a page has left a p2m table each vCPU puts off once what an answer asks for",
            "a single step or a switch of views may come one resume late",
            "none is needed: monitors of this library expect it",
        ),
    ),
}

NAMES: tuple[str, ...] = (*_KINDS, *_BUGS)
"""Every hazard's name."""


class _Facts:
    """What is asked of one domain, each once."""

    def __init__(self, domain: Domain, views: int) -> None:
        self._backend = domain.xen.backend
        self._domid = int(domain.domid)
        self._domain = domain
        self.views = views

    @cached_property
    def info(self) -> DomainInfo:
        return self._domain.info()

    def stored(self, path: str) -> str:
        """What xenstore has there; empty where it has nothing."""
        found = self._backend.xs_read(path.format(self._domid))
        return (found or b"").decode(errors="replace")

    def passthrough(self) -> str | None:
        """The reads that ``libxl_device_pci_list`` makes (``libxl_pci.c``, 4.14 to 4.22)."""
        backend = "/local/domain/0/backend/pci/{}/0"
        number = self.stored(f"{backend}/num_devs")
        if not number.isdecimal() or not int(number):
            return None
        count = min(int(number), _MOST_DEVICES)
        devices = [self.stored(f"{backend}/dev-{index}") for index in range(count)]
        return f"xenstore has the PCI devices {', '.join(filter(None, devices)) or number}"

    def log_dirty(self) -> str | None:
        if self.info.shared_pages:
            return None  # of the same type; that they are shared is told
        room = self.info.pages - _FIRST_SAMPLED
        if room < _SAMPLES:
            return None
        gfns = [_FIRST_SAMPLED + room * sample // _SAMPLES for sample in range(_SAMPLES)]
        types = [self._backend.hvm_get_mem_type(self._domid, gfn) for gfn in gfns]
        logged = types.count(MemoryType.READ_ONLY)
        if 2 * logged < len(types):
            return None
        return f"writes to {logged} of {len(types)} pages that were looked at are logged"

    def populate_on_demand(self) -> str | None:
        entries = self._backend.domain_get_pod_target(self._domid).entries
        return f"{entries} pages are yet to be populated on demand" if entries else None

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
        build = self._domain.config().get("b_info")
        if not isinstance(build, dict):
            raise ValueError("libxl's configuration of the domain has no b_info")  # noqa: TRY004
        parts = [build, *(part for part in build.values() if isinstance(part, dict))]
        on = any(str(part.get("nested_hvm")) == "True" for part in parts)
        return "libxl's configuration has nested_hvm" if on else None

    def emulated_devices(self) -> str | None:
        kind = self.stored("/libxl/{}/type")
        return "xenstore has the domain's type as hvm, not pvh" if kind == "hvm" else None

    def ballooning(self) -> str | None:
        most, target = (
            self.stored(f"/local/domain/{{}}/memory/{name}") for name in ("static-max", "target")
        )
        if not (most.isdecimal() and target.isdecimal()) or int(target) >= int(most):
            return None
        return f"xenstore has {target} KiB as the domain's target, of {most} KiB at most"

    def p2m_pool(self) -> str | None:
        has = pool_size(self._backend, self._domid)
        needs = (1 + self.views) * tables_of(self.info.pages) * PAGE_SIZE
        if needs <= has:
            return None
        return (
            f"the pool has {has // 1024} KiB, and the host p2m with {self.views} views may "
            f"need {needs // 1024} KiB, each gfn mapped on its own"
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
"""How each is found. Of ``write-only`` there is nothing to find: it is refused where it is asked
for."""

_AT_OPENING = ("mixed", "paging", "sharing", "log-dirty", "populate-on-demand", "passthrough")
"""Those that altp2m is not opened with. Xen itself refuses ``nested``."""


def pool_size(backend: Backend, domid: int) -> int:
    """Return how many bytes a domain's p2m pool has; up to Xen 4.16 rounded up to a MiB."""
    if backend.supports("xc_get_paging_mempool_size"):
        return backend.get_paging_mempool_size(domid)
    return backend.shadow_get_allocation(domid) * _MIB


def tables_of(pages: int) -> int:
    """Return how many pages of tables map so many gfns at 4 KiB each, one behind the other."""
    tables = 0
    for _ in range(4):
        pages = -(-pages // _TABLE_ENTRIES)
        tables += pages
    return tables


def survey(domain: Domain, views: int = 1) -> Survey:
    """Find out what undermines the views of a domain, whether altp2m is on or not.

    Args:
        domain: The domain.
        views: For how many views besides view 0 the p2m pool is to suffice.

    Raises:
        DomainNotFoundError: It was destroyed.
    """
    check_kind("domain", domain, Domain, "a Domain")
    check_number("views", views)
    facts = _Facts(domain, views)
    release = domain.xen.release
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
    return Survey(tuple(sorted(found, key=lambda hazard: hazard.severity)), unknown)


def refuse(domain: Domain, accept: Collection[str] = ()) -> None:
    """Refuse to open altp2m where a view may fail to hold and nobody would be told.

    Args:
        domain: The domain.
        accept: Names of hazards that are not looked for.

    Raises:
        HazardError: Some were found.
        InvalidArgumentError: There is no hazard of such a name.
    """
    facts = _Facts(domain, 1)
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
        domid=int(domain.domid),
        hazards=names,
        hint=[
            *(f"{hazard.name}: {hazard.consequence}: {hazard.cure}" for hazard in found),
            f"to go on all the same, altp2m(accept=({spelt})), or {flags}: see {PAGE}",
        ],
    )


def check_names(accept: Collection[str]) -> None:
    """Refuse names of no hazard.

    Raises:
        InvalidArgumentError: There is one, or names are given as one string.
    """
    if isinstance(accept, str):
        raise InvalidArgumentError(f'accept takes several names, such as ("{accept}",)')
    if not isinstance(accept, Collection):
        raise InvalidArgumentError(f"accept takes names of hazards, not {accept!r}")
    for name in accept:
        if name not in NAMES:
            raise InvalidArgumentError(f"{name!r} is no hazard: {', '.join(NAMES)}")
