# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeps altp2m from working here: each thing looked at, in order, with its cause and cure.

The machine is looked at first: is there a Xen, may this process speak to it, with which libraries.
What needs a missing thing is not looked at. Then Xen, then the domain if one is named. Nothing is
changed, but that a ring somebody has left is looked at, see :func:`xenaltp2m.rescue.diagnose`.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xenaltp2m import hazards
from xenaltp2m.abi.releases import NEWEST_MINOR, release
from xenaltp2m.backend.arguments import DOMID_LIMIT
from xenaltp2m.backend.loader import COMPANIONS, ENVIRONMENT, Loader, mismatch
from xenaltp2m.errors import (
    DomainNotFoundError,
    LibraryError,
    LibraryMismatchWarning,
    UnsupportedError,
    XenError,
)
from xenaltp2m.hazards import pool_size, tables_of
from xenaltp2m.rescue import Diagnosis, diagnose
from xenaltp2m.symbols import Symbols
from xenaltp2m.types import PAGE_SIZE, Altp2mMode, VcpuInfo
from xenaltp2m.view import existing_views
from xenaltp2m.xen import Xen, connect

if TYPE_CHECKING:
    from uuid import UUID

    from xenaltp2m.domain import Domain

PAGE = "docs/doctor.md"
"""Has a section for each check, under its name."""

_SINGLESTEP = 2
"""``XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP``."""
_LOOKS, _PAUSE = 4, 0.02
"""How often, and how many seconds apart, vCPUs are looked at."""

_FEATURES = {
    "EPT": ("ept", "Extended Page Tables (EPT)", "altp2m"),
    "MTF": ("mtf", "", "single steps, which most agents need"),
    "VMFUNC": ("", "VM Functions", "a guest that switches views itself"),
    "#VE": ("ept_violation_ve", "Virtualisation Exceptions", "a guest that handles violations"),
}
"""What Linux calls each in ``vmx flags``, what Xen calls it in its log (``vmx_display_features``),
and what needs it."""

_EXTRAS = {
    "rich": ("cli", "tables on a terminal"),
    "unicorn": ("sim", "guests that execute on the mock"),
    "capstone": ("decode", "watches of bytes that tell how much an instruction used"),
}
"""Packages that more can be done with: the extra each is of, and what it is for."""


class Grade(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing."""
    WARNING = "warning"
    """Something may not work, or not hold."""
    PROBLEM = "problem"
    """altp2m cannot be used so."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look has found.

    Attributes:
        check: What was looked at, a section of ``docs/doctor.md``.
        severity: How bad it is.
        evidence: What was seen.
        cause: Why it is so; empty where all is well.
        cure: What to do, as a command or as a line to add.
        link: Where more is written.
    """

    check: str
    severity: Grade
    evidence: str
    cause: str = ""
    cure: str = ""
    link: str = ""

    def __post_init__(self) -> None:
        if not self.link:
            object.__setattr__(self, "link", f"{PAGE}#{self.check}")


def healthy(findings: list[Finding]) -> bool:
    """Tell whether altp2m can be used: there is no problem."""
    return not any(finding.severity is Grade.PROBLEM for finding in findings)


def _xen_log() -> str:
    """What Xen has logged, as far as it still has it."""
    try:
        done = subprocess.run(
            ["xl", "dmesg"],  # noqa: S607
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


@dataclass(frozen=True)
class Machine:
    """Where the facts about this machine come from.

    Attributes:
        sysfs: The kernel's directory about the hypervisor.
        capabilities: What xenfs says this domain may do.
        cpuinfo: The kernel's description of the CPU.
        privcmd: The device through which hypercalls are made.
        environ: The environment.
        dlopen: Opens a library by its name; raises OSError if it cannot.
        may: Tells whether this process may read and write a file.
        xen_log: Returns what Xen has logged.
        has_package: Tells whether a Python package is installed.
        connect: Opens a connection.
    """

    sysfs: Path = Path("/sys/hypervisor")
    capabilities: Path = Path("/proc/xen/capabilities")
    cpuinfo: Path = Path("/proc/cpuinfo")
    privcmd: Path = Path("/dev/xen/privcmd")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    dlopen: Callable[[str], Any] = ctypes.CDLL
    may: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)
    xen_log: Callable[[], str] = _xen_log
    has_package: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None
    connect: Callable[[], Xen] = connect

    def loader(self) -> Loader:
        """Return what chooses the libraries."""
        return Loader(self.dlopen, self.environ, self.sysfs)


def examine(which: int | str | UUID | None = None, machine: Machine | None = None) -> list[Finding]:
    """Look at this machine, its Xen, and a domain.

    Args:
        which: The domain, as :meth:`Xen.domain`; None looks at none.
        machine: Where facts come from; by default this machine.
    """
    machine = machine or Machine()
    found = [*_hypervisor(machine)]
    if healthy(found):
        found += _privileges(machine)
    if healthy(found):
        found += _libraries(machine)
    reachable = healthy(found)
    if reachable:
        found += _library_release(machine)
    found += _cpu(machine)
    if reachable:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LibraryMismatchWarning)
                xen = machine.connect()
        except XenError as error:
            found.append(_of_error("connection", error))
        else:
            with xen:
                found += examine_xen(xen, which)
    found += _extras(machine)
    if not reachable:
        found.append(_without_xen(machine))
    return found


def examine_xen(xen: Xen, which: int | str | UUID | None = None) -> list[Finding]:
    """Look at a Xen that one is connected to, and at a domain.

    Args:
        xen: The host.
        which: The domain, as :meth:`Xen.domain`; None looks at none.
    """
    found = [*_connection(xen), *_xenstore(xen), *_option(xen)]
    if which is not None:
        found += _domain(xen, which)
    return found


def _of_error(check: str, error: XenError, severity: Grade = Grade.PROBLEM) -> Finding:
    """A refusal as a finding: its hints name cause and cure, each in one."""
    cause, _, cure = (error.hint[0] if error.hint else "").partition(": ")
    cures = [text for text in (cure, *error.hint[1:]) if text]
    return Finding(check, severity, error.message, cause, "; or ".join(cures))


# This machine.


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _hypervisor(machine: Machine) -> Iterator[Finding]:
    check = "hypervisor"
    loader = machine.loader()
    kind, version = _read(machine.sysfs / "type").strip(), loader.hypervisor_version()
    if kind != "xen":
        seen = f"{machine.sysfs}/type is {kind!r}" if kind else f"there is no {machine.sysfs}/type"
        yield Finding(
            check,
            Grade.PROBLEM,
            seen,
            "this kernel does not run on Xen",
            "on Debian: apt-get install xen-system-amd64, then choose the entry with Xen at boot",
        )
        return
    capabilities = _read(machine.capabilities)
    if machine.capabilities.exists() and "control_d" not in capabilities:
        yield Finding(
            check,
            Grade.PROBLEM,
            f"{machine.capabilities} has no control_d",
            "this is a guest on Xen, not its control domain",
            "run this in dom0",
        )
        return
    running = "Xen" if version is None else f"Xen {version[0]}.{version[1]}"
    yield Finding(check, Grade.OK, f"{running} is running, and this is its control domain")


def _privileges(machine: Machine) -> Iterator[Finding]:
    check, device = "privileges", machine.privcmd
    if not device.exists():
        yield Finding(
            check,
            Grade.PROBLEM,
            f"there is no {device}",
            "the kernel's module for hypercalls is not loaded",
            "modprobe xen-privcmd",
        )
    elif not machine.may(device):
        yield Finding(
            check,
            Grade.PROBLEM,
            f"{device} cannot be opened for reading and writing",
            "this user may not make hypercalls",
            "run as root: sudo xenaltp2m doctor",
        )
    else:
        yield Finding(check, Grade.OK, f"{device} can be opened")


def _libraries(machine: Machine) -> Iterator[Finding]:
    check = "libraries"
    loader = machine.loader()
    try:
        library = loader.xenctrl()
    except LibraryError as error:
        yield Finding(
            check,
            Grade.PROBLEM,
            error.message,
            "no libxenctrl of a release from 4.14 on was found",
            "; or ".join(error.hint),
        )
        return
    chosen = f", for {ENVIRONMENT} names it" if machine.environ.get(ENVIRONMENT) else ""
    yield Finding(check, Grade.OK, f"{library.name} is used{chosen}")
    for name in COMPANIONS:
        try:
            loader.companion(name, library)
        except LibraryError as error:
            yield Finding(
                check,
                Grade.WARNING,
                error.message,
                f"{name} is not installed: calls that need it will be refused",
                "; or ".join(error.hint),
            )


def _library_release(machine: Machine) -> Iterator[Finding]:
    check = "library-release"
    loader = machine.loader()
    library, running = loader.xenctrl().version, loader.hypervisor_version()
    if library is None or running is None:
        unknown = "the library's release" if library is None else "the hypervisor's release"
        yield Finding(check, Grade.NOTE, f"{unknown} could not be found out")
        return
    difference = mismatch(library, running)
    if difference is None:
        yield Finding(check, Grade.OK, "the library and the hypervisor are of one release")
        return
    alike = release(*library).domctl_version == release(*running).domctl_version
    xen = f"{running[0]}.{running[1]}"
    yield Finding(
        check,
        Grade.WARNING if alike else Grade.PROBLEM,
        difference,
        "the library was built for another release of Xen",
        f"install the libraries of Xen {xen} (Debian: libxenmisc{xen}), "
        f"or {ENVIRONMENT}=/path/to/libxenctrl.so.{xen}",
    )


def _cpu(machine: Machine) -> Iterator[Finding]:
    check, cpuinfo = "cpu", _read(machine.cpuinfo)
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", cpuinfo, re.MULTILINE)
    if vendor is not None and vendor[1] != "GenuineIntel":
        yield Finding(
            check,
            Grade.PROBLEM,
            f"the CPU is {vendor[1]}",
            "Xen has altp2m for Intel's EPT only",
            "a machine with an Intel CPU, Haswell or later; the mock and the lab work on any",
        )
        return
    flags = re.search(r"^vmx flags\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    log = "" if flags else machine.xen_log()
    if flags is None and "VMX: Supported advanced features" not in log:
        yield Finding(
            check,
            Grade.NOTE,
            "neither the kernel nor Xen's log tells what the CPU has",
            "under Xen the kernel does not see it, and Xen's log has lost its beginning, or leaves "
            "it out",
            "xl dmesg | grep -A 12 VMX, soon after a boot with loglvl=all",
        )
        return
    has = flags[1].split() if flags else re.findall(r"^\(XEN\).* - (.+)$", log, re.MULTILINE)
    column = 0 if flags else 1
    asked = {name: row[column] for name, row in _FEATURES.items() if row[column]}
    missing = [name for name, called in asked.items() if called not in has]
    where = "/proc/cpuinfo" if flags else "Xen's log"
    present = ", ".join(name for name in asked if name not in missing) or "none of what is needed"
    yield Finding(check, Grade.OK, f"{where} tells of {present}")
    for name in missing:
        yield Finding(
            check,
            Grade.PROBLEM if name == "EPT" else Grade.WARNING,
            f"{where} does not tell of {name}",
            f"the CPU lacks it, or the firmware has switched it off; {_FEATURES[name][2]} needs it",
            "switch VT-x on in the firmware, or use a CPU of Haswell's generation or later",
        )


def _extras(machine: Machine) -> Iterator[Finding]:
    check = "extras"
    there = [name for name in _EXTRAS if machine.has_package(name)]
    found = f"symbols of ELF images, System.map, kallsyms and DWARF can be read; {_list(there)}"
    yield Finding(check, Grade.OK, found)
    for name, (extra, use) in _EXTRAS.items():
        if name not in there:
            yield Finding(
                check,
                Grade.NOTE,
                f"{name} is not installed",
                f"it is for {use}",
                f"pip install 'xenaltp2m[{extra}]'",
            )


def _list(names: list[str]) -> str:
    return f"installed: {', '.join(names)}" if names else "no extra is installed"


def _without_xen(machine: Machine) -> Finding:
    simulator = "" if machine.has_package("unicorn") else ", once unicorn is installed"
    return Finding(
        "without-xen",
        Grade.NOTE,
        "this works without Xen: xenaltp2m --connect mock list, and agents and their tests on the "
        f"mock; xenaltp2m --connect mock watch guest --image ELF executes a guest{simulator}",
        "",
        "real Xen in an emulator, on Debian as root: make lab-shell in the source tree",
    )


# Xen.


def _connection(xen: Xen) -> Iterator[Finding]:
    check, version = "connection", xen.release
    extra = ""
    with suppress(XenError):
        extra = xen.backend.xen_extraversion()
    yield Finding(check, Grade.OK, f"Xen {version}{extra} answers, through {xen.backend.name}")
    if version.minor > NEWEST_MINOR:
        yield Finding(
            check,
            Grade.WARNING,
            f"Xen {version} is newer than 4.{NEWEST_MINOR}",
            "this package does not know the release, and takes it to behave as the newest known",
            "a newer xenaltp2m: pip install --upgrade xenaltp2m",
        )


def _xenstore(xen: Xen) -> Iterator[Finding]:
    check = "xenstore"
    try:
        xen.backend.xs_read("/local/domain/0/name")
    except XenError as error:
        yield Finding(
            check,
            Grade.PROBLEM,
            error.message,
            "xenstored does not run, or does not speak to this user: domains have no names, and "
            "altp2m is not opened without a look for passed-through devices",
            "systemctl start xenstored",
        )
    else:
        yield Finding(check, Grade.OK, "xenstore answers")


def boot_option(line: str, name: str) -> bool | None:
    """Return what a boolean option of Xen's command line is set to; None where it is not there.

    As ``_cmdline_parse`` and ``parse_bool`` (``common/kernel.c``) have it: the last one counts.
    """
    found = None
    for word in line.split():
        key, equals, value = word.partition("=")
        positive = not key.startswith("no-")
        if key.removeprefix("no-") != name:
            continue
        if not equals or value in ("1", "on", "yes", "true", "enable"):
            found = positive
        elif value in ("0", "no", "off", "false", "disable"):
            found = not positive
    return found


def _option(xen: Xen) -> Iterator[Finding]:
    """The gate of every altp2m call looks at the option and at the CPU before anything else."""
    check = "altp2m-option"
    line = ""
    with suppress(XenError):
        line = xen.backend.xen_commandline()
    try:
        xen.backend.altp2m_get_domain_state(DOMID_LIMIT - 1)
    except UnsupportedError:
        pass
    except XenError as error:
        if not isinstance(error, DomainNotFoundError):
            yield _of_error(check, error)
            return
        yield Finding(check, Grade.OK, "Xen has altp2m switched on, and the CPU can do it")
        return
    else:
        yield Finding(check, Grade.OK, "Xen has altp2m switched on, and the CPU can do it")
        return
    if not boot_option(line, "altp2m"):
        yield Finding(
            check,
            Grade.PROBLEM,
            f"Xen was booted with {line!r}",
            "altp2m is off in Xen unless it is asked for",
            'GRUB_CMDLINE_XEN="altp2m=1" in /etc/default/grub, beside what is there; then '
            "update-grub, and reboot",
        )
        return
    yield Finding(
        check,
        Grade.PROBLEM,
        "Xen was booted with altp2m=1, and has no altp2m",
        "the CPU has no EPT, or the firmware has switched VT-x off, or Xen was built without "
        "CONFIG_ALTP2M (from 4.20)",
        "switch VT-x on in the firmware; use an Intel CPU with EPT",
    )


# A domain.


def _domain(xen: Xen, which: int | str | UUID) -> Iterator[Finding]:
    try:
        domain = xen.domain(which)
    except DomainNotFoundError as error:
        yield Finding(
            "domain",
            Grade.PROBLEM,
            error.message,
            "it was not created, has ended, or is called otherwise",
            "xenaltp2m list shows the domains there are",
        )
        return
    except XenError as error:
        yield _of_error("domain", error)
        return
    with domain:
        try:
            yield from _of_domain(domain)
        except XenError as error:
            yield _of_error("domain", error)


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
            Grade.PROBLEM,
            f"{called} {how}",
            "its guest runs no more",
            f"xl destroy {domid}, then create it anew",
        )
        return
    yield Finding("domain", Grade.OK, f"{called} is there")
    if not info.hvm:
        yield Finding(
            "type",
            Grade.PROBLEM,
            f"{called} is PV",
            "only HVM and PVH guests have a p2m that the CPU uses, and views of it",
            'type="pvh" or type="hvm" in its xl.cfg, and create it anew',
        )
        return
    stored = ""
    with suppress(XenError):
        stored = (backend.xs_read(f"/libxl/{domid}/type") or b"").decode(errors="replace")
    yield Finding("type", Grade.OK, f"{called} is {stored.upper() or 'HVM or PVH'}")
    enabled = False
    for finding in _mode(domain):
        enabled = finding.severity is Grade.OK
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
        yield Finding("mode", Grade.OK, f"its altp2m mode is {mode.name.lower()}")
        return
    yield Finding(
        "mode",
        Grade.PROBLEM,
        "its altp2m mode is disabled",
        "the domain was created without altp2m, and the mode is fixed then",
        'altp2m="external" in its xl.cfg, and create it anew (xl destroy, xl create)',
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
                Grade.PROBLEM,
                error.message,
                "the domain was created with no views (Xen 4.21 and later)",
                "altp2m_count=10 in its xl.cfg, and create it anew",
            )
        return  # else altp2m-option tells
    most = domain._view_count()
    known = "an unknown number of" if most is None else str(most)
    if not active:
        yield Finding(check, Grade.OK, f"altp2m is off; it has {known} views, with view 0")
        return
    made = len(existing_views(backend, domain.domid))
    if most is None or made < most:
        yield Finding(check, Grade.OK, f"{made} views are made of {known}, with view 0")
        return
    more = "; or altp2m_count=N in its xl.cfg, with a larger N" if counted else ""
    yield Finding(
        check,
        Grade.PROBLEM,
        f"all {most} views are made, with view 0",
        "no further view can be made, which Xen answers with EINVAL",
        f"close views that are not needed; xenaltp2m rescue {domid} where an agent has left them"
        f"{more}",
    )


def _agents(domid: int, found: Diagnosis) -> Iterator[Finding]:
    check = "agents"
    killed = [line for line in found.lines() if "was killed" in line or "of no use" in line]
    if found.killed:
        yield Finding(
            check,
            Grade.PROBLEM,
            "; ".join(killed),
            "an agent was killed, by SIGKILL or for want of memory, and could undo nothing",
            f"xenaltp2m rescue {domid}",
        )
    elif not found.healthy:
        yield Finding(
            check,
            Grade.PROBLEM,
            "; ".join(found.lines()),
            "an agent that keeps no journal works on it or was killed: a new one gets EBUSY for "
            "the ring, and shares the views",
            f"end that agent if it runs; else xenaltp2m rescue {domid}",
        )
    elif found.working:
        yield Finding(check, Grade.NOTE, "; ".join(found.lines()), "another agent works on it")
    elif found.imported:
        yield Finding(
            check,
            Grade.NOTE,
            "; ".join(found.lines()),
            "a toolstack has views of its own there, without an agent",
            f"xenaltp2m state export FILE {domid} takes them out",
        )
    else:
        yield Finding(check, Grade.OK, "nothing is left of any agent")


def _vcpus(domain: Domain, found: Diagnosis) -> Iterator[Finding]:
    check = "vcpus"
    if found.paused:
        yield Finding(
            check,
            Grade.WARNING,
            "the domain is paused",
            "somebody has paused it: an administrator, xl create -p, or an agent",
            f"xl unpause {int(domain.domid)}",
        )
        return
    still = _standing_still(domain)
    if not still:
        yield Finding(check, Grade.OK, "its vCPUs run, or wait for work")
        return
    yield Finding(
        check,
        Grade.WARNING,
        f"vCPUs {still} neither run nor wait for work",
        "they wait for an agent's answer, or the host is too busy to let them run",
        f"where no agent works on it: xenaltp2m rescue --force {int(domain.domid)}",
    )


def _standing_still(domain: Domain) -> list[int]:
    """The vCPUs that could run, and do not, all the time that they are looked at."""

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
                Grade.WARNING,
                "Xen cannot single-step the domain",
                "the CPU has no monitor trap flag (MTF), which single steps need",
                "use a CPU of Haswell's generation or later",
            )


def _pool(domain: Domain) -> Iterator[Finding]:
    """The pool's size; where it may not do for a view, the hazard of that name is told, too."""
    backend, domid = domain.xen.backend, int(domain.domid)
    try:
        size = pool_size(backend, domid)
    except XenError as error:
        yield _of_error("p2m-pool", error, Grade.NOTE)
        return
    each = tables_of(domain.info().pages) * PAGE_SIZE
    yield Finding(
        "p2m-pool",
        Grade.OK,
        f"its p2m pool has {size // 1024} KiB; its host p2m and each view need up to "
        f"{each // 1024} KiB of it",
    )


def _hazards(domain: Domain) -> Iterator[Finding]:
    check = "hazards"
    found = hazards.survey(domain)
    if not any(hazard.severity is hazards.Severity.REFUSED for hazard in found.hazards):
        yield Finding(check, Grade.OK, "it has no hazard with which altp2m is refused")
    for hazard in found.hazards:
        grade = Grade.NOTE if hazard.of_release else Grade.WARNING
        accept = ""
        if hazard.severity is hazards.Severity.REFUSED:
            grade = Grade.PROBLEM
            accept = f"; or --accept {hazard.name}" if hazard.name != "nested" else ""
        yield Finding(
            check,
            grade,
            f"{hazard.name}: {hazard.evidence}",
            f"{hazard.cause}: {hazard.consequence}",
            f"{hazard.cure}{accept}",
            hazard.link,
        )
    for name, why in found.unknown.items():
        yield Finding(check, Grade.NOTE, f"{name}: it could not be looked for: {why}")


def _symbols(domain: Domain) -> Iterator[Finding]:
    check = "symbols"
    kernel = ""
    with suppress(XenError, ValueError, AttributeError):
        kernel = str(domain.config().get("b_info", {}).get("kernel") or "")
    path = Path(kernel)
    if not kernel or not path.is_file():
        yield Finding(
            check,
            Grade.NOTE,
            "libxl names no kernel of the guest's that could be read",
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
            Grade.NOTE,
            f"{kernel} has no symbols: {str(error).splitlines()[0]}",
            "the kernel was stripped or is compressed",
            "as root in the guest: cat /proc/kallsyms > kallsyms; then --symbols kallsyms",
        )
        return
    yield Finding(check, Grade.OK, f"{kernel} has symbols: --symbols {kernel}")
