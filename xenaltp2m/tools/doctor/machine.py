# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of this machine: whether it runs Xen, this process may use it, and its libraries load."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xenaltp2m.abi.releases import release
from xenaltp2m.backend.libxc.loader import COMPANIONS, ENVIRONMENT, Loader, mismatch
from xenaltp2m.errors import (
    LibraryError,
)
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.handles.xen import Xen, connect
from xenaltp2m.tools.doctor.finding import Finding

_FEATURES = {
    "EPT": ("ept", "Extended Page Tables (EPT)", "altp2m"),
    "MTF": ("mtf", "", "single-stepping, which most agents use"),
    "VMFUNC": ("", "VM Functions", "guests that switch views themselves"),
    "#VE": ("ept_violation_ve", "Virtualisation Exceptions", "guests that handle violations"),
}
"""Each feature's name in Linux's ``vmx flags``, its name in Xen's log (``vmx_display_features``),
and what needs it."""

_EXTRAS = {
    "rich": ("cli", "tables on a terminal"),
    "unicorn": ("sim", "guests that execute on the mock"),
    "capstone": ("decode", "the length of an instruction's accesses in watchpoint hits"),
}
"""Optional packages: the extra that installs each, and its use."""


def _xen_log() -> str:
    """Return Xen's log, as much of it as Xen has kept."""
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
    """The sources of the facts about this machine.

    Attributes:
        sysfs: The kernel's directory about the hypervisor.
        capabilities: The xenfs file that lists what this domain may do.
        cpuinfo: The kernel's description of the CPU.
        privcmd: The device for hypercalls.
        environ: The environment.
        dlopen: Opens a library by its name; raises OSError if it cannot.
        may: Returns whether this process may read and write a file.
        xen_log: Returns Xen's log.
        has_package: Returns whether a Python package is installed.
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
        """Return the loader, which chooses the libraries."""
        return Loader(self.dlopen, self.environ, self.sysfs)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def hypervisor(machine: Machine) -> Iterator[Finding]:
    """Check that this is a Xen control domain."""
    check = "hypervisor"
    loader = machine.loader()
    kind, version = _read(machine.sysfs / "type").strip(), loader.hypervisor_version()
    if kind != "xen":
        seen = f"{machine.sysfs}/type is {kind!r}" if kind else f"there is no {machine.sysfs}/type"
        yield Finding(
            check,
            Severity.PROBLEM,
            seen,
            "this kernel does not run on Xen",
            "on Debian: apt-get install xen-system-amd64, then select the entry with Xen at boot",
        )
        return
    capabilities = _read(machine.capabilities)
    if machine.capabilities.exists() and "control_d" not in capabilities:
        yield Finding(
            check,
            Severity.PROBLEM,
            f"{machine.capabilities} has no control_d",
            "this is a guest on Xen, not its control domain",
            "run this in dom0",
        )
        return
    running = "Xen" if version is None else f"Xen {version[0]}.{version[1]}"
    yield Finding(check, Severity.OK, f"{running} is running, and this is its control domain")


def privileges(machine: Machine) -> Iterator[Finding]:
    """Check that this process may make hypercalls."""
    check, device = "privileges", machine.privcmd
    if not device.exists():
        yield Finding(
            check,
            Severity.PROBLEM,
            f"there is no {device}",
            "the kernel's module for hypercalls is not loaded",
            "modprobe xen-privcmd",
        )
    elif not machine.may(device):
        yield Finding(
            check,
            Severity.PROBLEM,
            f"{device} cannot be opened for reading and writing",
            "this user may not make hypercalls",
            "run as root: sudo xenaltp2m doctor",
        )
    else:
        yield Finding(check, Severity.OK, f"{device} can be opened")


def libraries(machine: Machine) -> Iterator[Finding]:
    """Check that libxenctrl and its companions load."""
    check = "libraries"
    loader = machine.loader()
    try:
        library = loader.xenctrl()
    except LibraryError as error:
        yield Finding(
            check,
            Severity.PROBLEM,
            error.message,
            "no libxenctrl of a release from 4.14 on was found",
            "; or ".join(error.hint),
        )
        return
    chosen = f", because {ENVIRONMENT} names it" if machine.environ.get(ENVIRONMENT) else ""
    yield Finding(check, Severity.OK, f"{library.name} is used{chosen}")
    for name in COMPANIONS:
        try:
            loader.companion(name, library)
        except LibraryError as error:
            yield Finding(
                check,
                Severity.WARNING,
                error.message,
                f"{name} is not installed: calls that need it are refused",
                "; or ".join(error.hint),
            )


def library_release(machine: Machine) -> Iterator[Finding]:
    """Check that the library and the hypervisor have the same release."""
    check = "library-release"
    loader = machine.loader()
    library, running = loader.xenctrl().version, loader.hypervisor_version()
    if library is None or running is None:
        unknown = "the library's release" if library is None else "the hypervisor's release"
        yield Finding(check, Severity.NOTE, f"{unknown} is unknown")
        return
    difference = mismatch(library, running)
    if difference is None:
        yield Finding(check, Severity.OK, "the library and the hypervisor have the same release")
        return
    alike = release(*library).domctl_version == release(*running).domctl_version
    xen = f"{running[0]}.{running[1]}"
    yield Finding(
        check,
        Severity.WARNING if alike else Severity.PROBLEM,
        difference,
        "the library was built for another release of Xen",
        f"install the libraries of Xen {xen} (Debian: libxenmisc{xen}), "
        f"or {ENVIRONMENT}=/path/to/libxenctrl.so.{xen}",
    )


def cpu(machine: Machine) -> Iterator[Finding]:
    """Check that the CPU has the features that altp2m needs."""
    check, cpuinfo = "cpu", _read(machine.cpuinfo)
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", cpuinfo, re.MULTILINE)
    if vendor is not None and vendor[1] != "GenuineIntel":
        yield Finding(
            check,
            Severity.PROBLEM,
            f"the CPU is {vendor[1]}",
            "Xen supports altp2m on Intel CPUs with EPT only",
            "use an Intel CPU, Haswell or later; the mock and the lab work on any CPU",
        )
        return
    flags = re.search(r"^vmx flags\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    log = "" if flags else machine.xen_log()
    if flags is None and "VMX: Supported advanced features" not in log:
        yield Finding(
            check,
            Severity.NOTE,
            "neither the kernel nor Xen's log reports the CPU's features",
            "under Xen the kernel does not see them, and Xen's log has lost its beginning, or "
            "omits them",
            "xl dmesg | grep -A 12 VMX, soon after a boot with loglvl=all",
        )
        return
    has = flags[1].split() if flags else re.findall(r"^\(XEN\).* - (.+)$", log, re.MULTILINE)
    column = 0 if flags else 1
    asked = {name: row[column] for name, row in _FEATURES.items() if row[column]}
    missing = [name for name, called in asked.items() if called not in has]
    where = "/proc/cpuinfo" if flags else "Xen's log"
    present = ", ".join(name for name in asked if name not in missing) or "no needed feature"
    yield Finding(check, Severity.OK, f"{where} reports {present}")
    for name in missing:
        yield Finding(
            check,
            Severity.PROBLEM if name == "EPT" else Severity.WARNING,
            f"{where} does not report {name}",
            f"the CPU lacks it, or the firmware has disabled it; needed for {_FEATURES[name][2]}",
            "enable VT-x in the firmware, or use a CPU of Haswell's generation or later",
        )


def extras(machine: Machine) -> Iterator[Finding]:
    """Check which optional packages are installed."""
    check = "extras"
    there = [name for name in _EXTRAS if machine.has_package(name)]
    found = f"symbols of ELF images, System.map, kallsyms and DWARF can be read; {_list(there)}"
    yield Finding(check, Severity.OK, found)
    for name, (extra, use) in _EXTRAS.items():
        if name not in there:
            yield Finding(
                check,
                Severity.NOTE,
                f"{name} is not installed",
                f"it is needed for {use}",
                f"pip install 'xenaltp2m[{extra}]'",
            )


def _list(names: list[str]) -> str:
    return f"installed: {', '.join(names)}" if names else "no extra is installed"


def without_xen(machine: Machine) -> Finding:
    """Report what works on a machine without Xen."""
    simulator = "" if machine.has_package("unicorn") else ", once unicorn is installed"
    return Finding(
        "without-xen",
        Severity.NOTE,
        "this works without Xen: xenaltp2m --connect mock list, and agents and their tests on the "
        f"mock; xenaltp2m --connect mock watch guest --image ELF executes a guest{simulator}",
        "",
        "for real Xen in an emulator, on Debian as root: make lab-shell in the source tree",
    )
