# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines made up from files, for ``doctor`` to look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.doctor import Machine

INTEL = "vendor_id\t: GenuineIntel\nvmx flags\t: vnmi ept vpid mtf vapic ept_violation_ve pml\n"


def absent(name: str) -> object:
    """Open no library."""
    raise OSError(f"{name}: cannot open shared object file")


def machine(
    place: Path,
    *,
    kind: str = "xen",
    running: tuple[int, int] = (4, 17),
    capabilities: str | None = "control_d\n",
    device: bool = True,
    may: bool = True,
    library: str = "libxenctrl.so.4.17",
    without: Collection[str] = (),
    environ: Mapping[str, str] | None = None,
    cpuinfo: str = INTEL,
    log: str = "",
    packages: Collection[str] = ("rich", "unicorn", "capstone"),
    connect: Callable[[], xa.Xen] | None = None,
) -> Machine:
    """Make one; what is not said is as it should be.

    Args:
        place: Where its files are made.
        kind: The hypervisor; none if empty.
        running: Its release.
        capabilities: What xenfs has; None where it is not mounted.
        device: Whether there is one for hypercalls,
        may: and this process may open it.
        library: The only libxenctrl there is.
        without: Companions that are missing, by the beginning of their names.
        environ: The environment.
        cpuinfo: What the kernel says of the CPU.
        log: What Xen has logged.
        packages: The Python packages installed.
        connect: Opens a connection; by default one to a mock of that release.
    """
    sysfs = place / "hypervisor"
    if kind:
        (sysfs / "version").mkdir(parents=True)
        (sysfs / "type").write_text(f"{kind}\n")
        for name, number in zip(("major", "minor"), running, strict=True):
            (sysfs / "version" / name).write_text(f"{number}\n")
    if capabilities is not None:
        (place / "capabilities").write_text(capabilities)
    if device:
        (place / "privcmd").touch()
    (place / "cpuinfo").write_text(cpuinfo)

    def dlopen(name: str) -> object:
        missing = any(name.startswith(one) for one in without)
        if missing or (name.startswith("libxenctrl") and name != library):
            return absent(name)
        return object()

    def on_mock() -> xa.Xen:
        mock = MockBackend(running, memory_pages=1 << 14)
        mock.domain_unpause(mock.add_domain("guest", memory_kib=4096))
        return xa.connect(mock)

    return Machine(
        sysfs=sysfs,
        capabilities=place / "capabilities",
        cpuinfo=place / "cpuinfo",
        privcmd=place / "privcmd",
        environ=environ or {},
        dlopen=dlopen,
        may=lambda _: may,
        xen_log=lambda: log,
        has_package=lambda name: name in packages,
        connect=connect or on_mock,
    )
