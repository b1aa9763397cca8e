# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which Xen libraries to open: the candidates in order, and why each one failed.

Policy only: what opens a file and where sysfs lies are given by the caller, so that every path
through it runs without Xen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from xenaltp2m.abi.releases import SUPPORTED, release
from xenaltp2m.errors import LibraryError

Version: TypeAlias = tuple[int, int]

ENVIRONMENT = "XENALTP2M_LIBXENCTRL"
"""Names the libxenctrl to open; if it is set, no other is tried."""

_XENCTRL_NAME = re.compile(r"libxenctrl(?:\.so\.|-)(\d+)\.(\d+)")

COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "libxentoollog": ("libxentoollog.so.1",),
    "libxencall": ("libxencall.so.1",),
    "libxenevtchn": ("libxenevtchn.so.1",),
    "libxenforeignmemory": ("libxenforeignmemory.so.1",),
    "libxenlight": ("libxenlight.so.{0}.{1}",),
    "libxenstore": ("libxenstore.so.4", "libxenstore.so.3.0"),
}
"""Sonames of the other libraries, best first. libxenlight's follows the release as libxenctrl's
does; libxenstore's became 4 with Xen 4.16 (``tools/libs/store/Makefile``)."""


@dataclass(frozen=True, slots=True)
class Library:
    """An open library."""

    name: str
    """What was opened: a soname, or a path."""
    handle: Any
    """Whatever the caller's ``dlopen`` returned."""
    version: Version | None = None
    """The Xen release it belongs to, where its name tells."""


class Loader:
    """Chooses library files; opens nothing before it is asked to."""

    def __init__(
        self,
        dlopen: Callable[[str], Any],
        environ: Mapping[str, str],
        sysfs: Path = Path("/sys/hypervisor"),
    ) -> None:
        """Remember where to look.

        Args:
            dlopen: Opens a library by soname or path; raises OSError if it cannot.
            environ: The environment, for :data:`ENVIRONMENT`.
            sysfs: The kernel's directory about the hypervisor.
        """
        self._dlopen = dlopen
        self._environ = environ
        self._sysfs = sysfs

    def hypervisor_version(self) -> Version | None:
        """Return the running Xen's release as the kernel tells it, None where there is no Xen."""
        try:
            major, minor = (
                int((self._sysfs / "version" / name).read_text()) for name in ("major", "minor")
            )
        except (OSError, ValueError):
            return None
        return major, minor

    def xenctrl_candidates(self) -> list[str]:
        """Return the names under which to look for libxenctrl, best first."""
        if path := self._environ.get(ENVIRONMENT):
            return [path]
        versions = list(reversed(SUPPORTED))
        running = self.hypervisor_version()
        if running is not None:
            versions.insert(0, running)
        names = []
        for major, minor in dict.fromkeys(versions):
            names += [f"libxenctrl.so.{major}.{minor}", f"libxenctrl-{major}.{minor}.so"]
        return names

    def xenctrl(self) -> Library:
        """Open libxenctrl: the one the environment names, else the hypervisor's, else any known.

        Raises:
            LibraryError: None could be opened; it lists each and why.
        """
        candidates = self.xenctrl_candidates()
        if self._environ.get(ENVIRONMENT):
            hint = f"{ENVIRONMENT} names one library, and no other is tried"
        elif (running := self.hypervisor_version()) is not None:
            xen = f"{running[0]}.{running[1]}"
            hint = (
                f"install the libraries of Xen {xen} (Debian: libxenmisc{xen}), "
                f"or name libxenctrl in {ENVIRONMENT}"
            )
        else:
            hint = 'this machine does not run Xen: use the mock backend, connect("mock")'
        return self._first("libxenctrl", candidates, hint)

    def companion(self, which: str, xenctrl: Library) -> Library:
        """Open another library of the same installation.

        A libxenctrl opened by path may lie outside the linker's directories; its companions then
        lie beside it, and the loader searches there first.

        Args:
            which: A key of :data:`COMPANIONS`.
            xenctrl: The open libxenctrl.

        Raises:
            LibraryError: It could not be opened; it lists each candidate and why.
        """
        version = xenctrl.version or self.hypervisor_version() or SUPPORTED[-1]
        names = [name.format(*version) for name in COMPANIONS[which]]
        if "/" in xenctrl.name:
            beside = Path(xenctrl.name).parent
            names = [str(beside / name) for name in names] + names
        return self._first(which, names, f"install the package that has {names[-1]}")

    def _first(self, what: str, candidates: Iterable[str], hint: str) -> Library:
        failures = []
        for name in candidates:
            version = _version_of(name) if what == "libxenctrl" else None
            if version is not None and version < SUPPORTED[0]:
                oldest = ".".join(map(str, SUPPORTED[0]))
                failures.append(f"{name}: older than Xen {oldest}, the oldest supported")
                continue
            try:
                return Library(name, self._dlopen(name), version)
            except OSError as error:
                failures.append(f"{name}: {_reason(error, name)}")
        raise LibraryError(
            f"no usable {what}; tried:\n" + "\n".join(f"  {failure}" for failure in failures),
            op="connect",
            hint=(hint,),
        )


def mismatch(library: Version | None, running: Version) -> str | None:
    """Say what a library of another release than the hypervisor's will fail at, or None.

    Domctls and sysctls carry an interface version that Xen compares with its own
    (``do_domctl``, ``xen/common/domctl.c``); altp2m and memory access calls carry none.
    """
    if library is None or library == running:
        return None
    ours, theirs = (".".join(map(str, version)) for version in (library, running))
    text = f"libxenctrl is of Xen {ours}, but Xen {theirs} is running"
    if release(*library).domctl_version == release(*running).domctl_version:
        return f"{text}: the domctls agree, but other calls may be refused with EACCES"
    return f"{text}: it refuses pause, monitor and other domctls with EACCES"


def _version_of(name: str) -> Version | None:
    """The release in a libxenctrl's name, or in that of the file a link leads to."""
    for candidate in (Path(name).name, Path(name).resolve().name if "/" in name else ""):
        if found := _XENCTRL_NAME.match(candidate):
            return int(found[1]), int(found[2])
    return None


def _reason(error: OSError, name: str) -> str:
    """The linker's words without the name it repeats, nor what cffi puts in front."""
    text = str(error.strerror or error)
    for prefix in (f"cannot load library '{name}': ", f"{name}: "):
        text = text.removeprefix(prefix)
    return text.partition("  Additionally, ")[0].rstrip(". ") or repr(error)
