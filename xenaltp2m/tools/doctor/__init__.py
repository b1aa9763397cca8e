# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check what keeps altp2m from working, with cause and cure: this machine, its Xen, a domain.

The machine is checked first: whether it runs Xen, whether this process may use it, and with which
libraries. A check is skipped if something it needs is missing. Then Xen is checked, and the domain
if one is given. The checks change nothing, with one exception: Xen reads a ring that an agent has
left, see :func:`xenaltp2m.tools.rescue.diagnose`.
"""

from __future__ import annotations

import warnings
from uuid import UUID

from xenaltp2m.errors import LibraryMismatchWarning, XenError
from xenaltp2m.handles.xen import Xen
from xenaltp2m.tools.doctor import host
from xenaltp2m.tools.doctor import machine as machine_checks
from xenaltp2m.tools.doctor.domain import domain_findings
from xenaltp2m.tools.doctor.finding import Finding, healthy, of_error
from xenaltp2m.tools.doctor.host import boot_option
from xenaltp2m.tools.doctor.machine import Machine

__all__ = ["Finding", "Machine", "boot_option", "examine", "examine_xen", "healthy"]


def examine(which: int | str | UUID | None = None, machine: Machine | None = None) -> list[Finding]:
    """Check this machine, its Xen, and a domain.

    Args:
        which: The domain, as for :meth:`Xen.domain`; None checks none.
        machine: The source of the facts; by default this machine.
    """
    machine = machine or Machine()
    found = [*machine_checks.hypervisor(machine)]
    if healthy(found):
        found += machine_checks.privileges(machine)
    if healthy(found):
        found += machine_checks.libraries(machine)
    reachable = healthy(found)
    if reachable:
        found += machine_checks.library_release(machine)
    found += machine_checks.cpu(machine)
    if reachable:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LibraryMismatchWarning)
                xen = machine.connect()
        except XenError as error:
            found.append(of_error("connection", error))
        else:
            with xen:
                found += examine_xen(xen, which)
    found += machine_checks.extras(machine)
    if not reachable:
        found.append(machine_checks.without_xen(machine))
    return found


def examine_xen(xen: Xen, which: int | str | UUID | None = None) -> list[Finding]:
    """Check a Xen through an open connection, and a domain.

    Args:
        xen: The host.
        which: The domain, as for :meth:`Xen.domain`; None checks none.
    """
    found = [*host.connection(xen), *host.xenstore(xen), *host.option(xen)]
    if which is not None:
        found += domain_findings(xen, which)
    return found
