# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of a domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from xenaltp2m.errors import (
    DomainNotFoundError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handles import hazards
from xenaltp2m.handles.domain import Domain
from xenaltp2m.handles.hazards import Severity, pool_size, tables_of
from xenaltp2m.handles.probe import existing_views
from xenaltp2m.handles.xen import Xen
from xenaltp2m.tools.doctor.finding import Finding, of_error
from xenaltp2m.tools.doctor.host import boot_option
from xenaltp2m.tools.rescue import Diagnosis, diagnose
from xenaltp2m.tools.symbols import Symbols
from xenaltp2m.types import PAGE_SIZE, Altp2mMode, VcpuInfo

_SINGLESTEP = 2
"""``XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP``."""
_LOOKS, _PAUSE = 4, 0.02
"""The number of samples of the vCPUs' states, and the seconds between them."""


def domain_findings(xen: Xen, which: int | str | UUID) -> Iterator[Finding]:
    """Check a domain: its existence, type, mode, views, agents, vCPUs and hazards."""
    try:
        domain = xen.domain(which)
    except DomainNotFoundError as error:
        yield Finding(
            "domain",
            Severity.PROBLEM,
            error.message,
            "it was not created, has ended, or has another name",
            "list the domains: xenaltp2m list",
        )
        return
    except XenError as error:
        yield of_error("domain", error)
        return
    with domain:
        try:
            yield from _of_domain(domain)
        except XenError as error:
            yield of_error("domain", error)


def _of_domain(domain: Domain) -> Iterator[Finding]:
    info, backend = domain.info(), domain.xen.backend
    domid = int(domain.domid)
    name = None
    with suppress(XenError):
        name = domain.name
    called = f"domain {domid}" + (f" ({name})" if name else "")
    if info.dying or info.shutdown:
        how = "is being destroyed" if info.dying else "has shut down"
        yield Finding(
            "domain",
            Severity.PROBLEM,
            f"{called} {how}",
            "its guest does not run any more",
            f"xl destroy {domid}, then create it again",
        )
        return
    yield Finding("domain", Severity.OK, f"{called} exists")
    if not info.hvm:
        yield Finding(
            "type",
            Severity.PROBLEM,
            f"{called} is PV",
            "only HVM and PVH guests have a p2m that the CPU uses, and views of it",
            'set type="pvh" or type="hvm" in its xl.cfg, and create it again',
        )
        return
    stored = ""
    with suppress(XenError):
        stored = (backend.xs_read(f"/libxl/{domid}/type") or b"").decode(errors="replace")
    yield Finding("type", Severity.OK, f"{called} is {stored.upper() or 'HVM or PVH'}")
    enabled = False
    for finding in _mode(domain):
        enabled = finding.severity is Severity.OK
        yield finding
    if enabled:
        yield from _views(domain)
    found = diagnose(domain.xen, domid)
    yield from _agents(domid, found)
    yield from _vcpus(domain, found)
    yield from _steps(domain)
    yield from _pool(domain)
    yield from _hazards(domain)
    yield from _symbols(domain)


def _mode(domain: Domain) -> Iterator[Finding]:
    mode = domain.altp2m_mode
    if mode is not Altp2mMode.DISABLED:
        yield Finding("mode", Severity.OK, f"its altp2m mode is {mode.name.lower()}")
        return
    yield Finding(
        "mode",
        Severity.PROBLEM,
        "its altp2m mode is disabled",
        "the domain was created without altp2m, and the mode is fixed at creation",
        'set altp2m="external" in its xl.cfg, and create it again (xl destroy, xl create)',
    )


def _views(domain: Domain) -> Iterator[Finding]:
    check, backend, domid = "views", domain.xen.backend, int(domain.domid)
    counted = domain.xen.release.view_count_is_setting
    try:
        active = domain.altp2m_active
    except UnsupportedError as error:
        if counted and boot_option(backend.xen_commandline(), "altp2m"):
            yield Finding(
                check,
                Severity.PROBLEM,
                error.message,
                "the domain was created with no views (Xen 4.21 and later)",
                "set altp2m_count=10 in its xl.cfg, and create it again",
            )
        return  # the check altp2m-option reports all other causes
    most = domain.context.view_count()
    known = "an unknown number of" if most is None else str(most)
    if not active:
        yield Finding(
            check,
            Severity.OK,
            f"altp2m is off; the domain can have {known} views, view 0 included",
        )
        return
    made = len(existing_views(backend, domain.domid))
    if most is None or made < most:
        yield Finding(check, Severity.OK, f"{made} of {known} views exist, view 0 included")
        return
    more = "; or set altp2m_count=N in its xl.cfg, with a larger N" if counted else ""
    yield Finding(
        check,
        Severity.PROBLEM,
        f"all {most} views exist, view 0 included",
        "no further view can be created: Xen answers EINVAL",
        f"close views that are not needed; xenaltp2m rescue {domid} if an agent has left them"
        f"{more}",
    )


def _agents(domid: int, found: Diagnosis) -> Iterator[Finding]:
    check = "agents"
    killed = [line for line in found.lines() if "was killed" in line or "of no use" in line]
    if found.killed:
        yield Finding(
            check,
            Severity.PROBLEM,
            "; ".join(killed),
            "an agent was killed, by SIGKILL or by the OOM killer, and could not undo its changes",
            f"xenaltp2m rescue {domid}",
        )
    elif not found.healthy:
        yield Finding(
            check,
            Severity.PROBLEM,
            "; ".join(found.lines()),
            "an agent without a journal uses the domain or was killed: a new agent gets EBUSY for "
            "the ring, and shares the views",
            f"end that agent if it runs; else xenaltp2m rescue {domid}",
        )
    elif found.working:
        yield Finding(check, Severity.NOTE, "; ".join(found.lines()), "another agent uses it")
    elif found.imported:
        yield Finding(
            check,
            Severity.NOTE,
            "; ".join(found.lines()),
            "a toolstack has imported views, without an agent",
            f"to remove them: xenaltp2m state export FILE {domid}",
        )
    else:
        yield Finding(check, Severity.OK, "no agent uses it or has left anything")


def _vcpus(domain: Domain, found: Diagnosis) -> Iterator[Finding]:
    check = "vcpus"
    if found.paused:
        yield Finding(
            check,
            Severity.WARNING,
            "the domain is paused",
            "it was paused by an administrator, by xl create -p, or by an agent",
            f"xl unpause {int(domain.domid)}",
        )
        return
    still = _standing_still(domain)
    if not still:
        yield Finding(check, Severity.OK, "its vCPUs run or are idle")
        return
    yield Finding(
        check,
        Severity.WARNING,
        f"vCPUs {still} neither run nor are idle",
        "they wait for an agent's response, or the host is too busy to run them",
        f"if no agent uses the domain: xenaltp2m rescue --force {int(domain.domid)}",
    )


def _standing_still(domain: Domain) -> list[int]:
    """List the vCPUs that are runnable but do not run in any of the samples."""

    def look() -> list[VcpuInfo]:
        return [domain.xen.backend.vcpu_getinfo(int(domain.domid), one) for one in numbers]

    numbers = range(domain.info().max_vcpu_id + 1)
    looks = [look()]
    for _ in range(_LOOKS - 1):
        domain.xen.backend.clock.sleep(_PAUSE)
        looks.append(look())
    return [
        number
        for number in numbers
        if all(each[number].online for each in looks)
        and not any(each[number].blocked or each[number].running for each in looks)
        and looks[0][number].cpu_time == looks[-1][number].cpu_time
    ]


def _steps(domain: Domain) -> Iterator[Finding]:
    with suppress(XenError):
        able = domain.xen.backend.monitor_get_capabilities(int(domain.domid)) >> _SINGLESTEP & 1
        if not able:
            yield Finding(
                "cpu",
                Severity.WARNING,
                "Xen cannot single-step the domain",
                "the CPU has no monitor trap flag (MTF), which single-stepping needs",
                "use a CPU of Haswell's generation or later",
            )


def _pool(domain: Domain) -> Iterator[Finding]:
    """Report the pool's size; a pool too small for a view is reported as a hazard, too."""
    backend, domid = domain.xen.backend, int(domain.domid)
    try:
        size = pool_size(backend, domid)
    except XenError as error:
        yield of_error("p2m-pool", error, Severity.NOTE)
        return
    each = tables_of(domain.info().pages) * PAGE_SIZE
    yield Finding(
        "p2m-pool",
        Severity.OK,
        f"its p2m pool has {size // 1024} KiB; its host p2m and each view need up to "
        f"{each // 1024} KiB of it",
    )


def _hazards(domain: Domain) -> Iterator[Finding]:
    check = "hazards"
    found = hazards.survey(domain.context)
    if not any(hazard.severity is Severity.PROBLEM for hazard in found.hazards):
        yield Finding(check, Severity.OK, "it has no hazard for which altp2m is refused")
    for hazard in found.hazards:
        severity = hazard.severity
        accept = ""
        if severity is Severity.PROBLEM:
            accept = f"; or --accept {hazard.name}" if hazard.name != "nested" else ""
        yield Finding(
            check,
            Severity.NOTE if hazard.of_release else severity,
            f"{hazard.name}: {hazard.evidence}",
            f"{hazard.cause}: {hazard.consequence}",
            f"{hazard.cure}{accept}",
            hazard.link,
        )
    for name, why in found.unknown.items():
        yield Finding(check, Severity.NOTE, f"{name}: this hazard could not be checked: {why}")


def _symbols(domain: Domain) -> Iterator[Finding]:
    check = "symbols"
    kernel = ""
    with suppress(XenError, ValueError, AttributeError):
        kernel = str(domain.config().get("b_info", {}).get("kernel") or "")
    path = Path(kernel)
    if not kernel or not path.is_file():
        yield Finding(
            check,
            Severity.NOTE,
            "libxl's configuration of the guest names no kernel file that can be read",
            "the guest boots from its own disk",
            "as root in the guest: cat /proc/kallsyms > kallsyms; or its vmlinux with debugging "
            "information; then --symbols FILE",
        )
        return
    try:
        Symbols.open(path)
    except (XenError, OSError) as error:
        yield Finding(
            check,
            Severity.NOTE,
            f"{kernel} has no symbols: {str(error).splitlines()[0]}",
            "the kernel was stripped or is compressed",
            "as root in the guest: cat /proc/kallsyms > kallsyms; then --symbols kallsyms",
        )
        return
    yield Finding(check, Severity.OK, f"{kernel} has symbols: --symbols {kernel}")
