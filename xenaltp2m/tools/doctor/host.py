# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of a connected Xen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from xenaltp2m.abi.releases import NEWEST_MINOR
from xenaltp2m.backend.arguments import DOMID_LIMIT
from xenaltp2m.errors import (
    DomainNotFoundError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.handles.xen import Xen
from xenaltp2m.tools.doctor.finding import Finding, of_error


def connection(xen: Xen) -> Iterator[Finding]:
    """Report which Xen answers."""
    check, version = "connection", xen.release
    extra = ""
    with suppress(XenError):
        extra = xen.backend.xen_extraversion()
    yield Finding(check, Severity.OK, f"Xen {version}{extra} answers, through {xen.backend.name}")
    if version.minor > NEWEST_MINOR:
        yield Finding(
            check,
            Severity.WARNING,
            f"Xen {version} is newer than 4.{NEWEST_MINOR}",
            "this package does not know the release, and treats it as the newest known one",
            "upgrade this package: pip install --upgrade xenaltp2m",
        )


def xenstore(xen: Xen) -> Iterator[Finding]:
    """Check that xenstore answers."""
    check = "xenstore"
    try:
        xen.backend.xs_read("/local/domain/0/name")
    except XenError as error:
        yield Finding(
            check,
            Severity.PROBLEM,
            error.message,
            "xenstored does not run, or does not answer this user: domains have no names, and "
            "altp2m is not opened, because passed-through devices cannot be checked",
            "systemctl start xenstored",
        )
    else:
        yield Finding(check, Severity.OK, "xenstore answers")


def boot_option(line: str, name: str) -> bool | None:
    """Return the value of a boolean option on Xen's command line; None if it is not set.

    Follows ``_cmdline_parse`` and ``parse_bool`` (``common/kernel.c``): the last occurrence counts.
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


def option(xen: Xen) -> Iterator[Finding]:
    """Check that altp2m is enabled: every altp2m call first tests the option and the CPU."""
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
            yield of_error(check, error)
            return
        yield Finding(check, Severity.OK, "altp2m is enabled in Xen, and the CPU supports it")
        return
    else:
        yield Finding(check, Severity.OK, "altp2m is enabled in Xen, and the CPU supports it")
        return
    if not boot_option(line, "altp2m"):
        yield Finding(
            check,
            Severity.PROBLEM,
            f"Xen was booted with {line!r}",
            "Xen disables altp2m unless it is booted with altp2m=1",
            'set GRUB_CMDLINE_XEN="altp2m=1" in /etc/default/grub, beside its other options, then '
            "run update-grub, and reboot",
        )
        return
    yield Finding(
        check,
        Severity.PROBLEM,
        "Xen was booted with altp2m=1, but has no altp2m",
        "the CPU has no EPT, the firmware has disabled VT-x, or Xen was built without "
        "CONFIG_ALTP2M (from 4.20)",
        "enable VT-x in the firmware; use an Intel CPU with EPT",
    )
