# SPDX-License-Identifier: LGPL-2.1-or-later
"""``list``: list the domains of a host and their altp2m."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.console import Console, Table
from xenaltp2m.cli.host import connect

SUMMARY = "list the domains and their altp2m"

KEYS = """\
--json prints {"xen", "backend", "domains": [...]}, each domain with
  domid, name, uuid, type ("hvm", also for PVH, or "pv"), state, memory_kib,
  vcpus (online now), max_vcpus, altp2m_mode (null for PV),
  altp2m_active (null if Xen or the domain has no altp2m)
"""

_SHUTDOWN_CRASH = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments: the command has none of its own."""


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    with connect(options, console) as xen:
        domains = []
        for info in xen.domains():
            with contextlib.suppress(xa.DomainNotFoundError), xen.domain(info.domid) as domain:
                domains.append(_facts(domain, info))
        console.result(
            {"xen": str(xen.release), "backend": xen.backend.name, "domains": domains},
            Table(
                ("id", "name", "type", "state", "memory", "vCPUs", "altp2m", "active"),
                [
                    (
                        str(facts["domid"]),
                        facts["name"] or "",
                        facts["type"],
                        facts["state"],
                        f"{facts['memory_kib'] // 1024} MiB",
                        _of(facts["vcpus"], facts["max_vcpus"]),
                        facts["altp2m_mode"] or "",
                        {True: "yes", False: "no", None: ""}[facts["altp2m_active"]],
                    )
                    for facts in domains
                ],
            ),
        )


def _facts(domain: xa.Domain, info: xa.DomainInfo) -> dict[str, Any]:
    mode = active = None
    if info.hvm:
        with contextlib.suppress(xa.UnsupportedError, xa.InvalidArgumentError):
            mode = domain.altp2m_mode.name.lower()
        with contextlib.suppress(xa.UnsupportedError, xa.InvalidArgumentError):
            active = domain.altp2m_active
    return {
        "domid": info.domid,
        "name": domain.name,
        "uuid": str(info.uuid),
        "type": "hvm" if info.hvm else "pv",
        "state": _state(info),
        "memory_kib": info.pages * xa.PAGE_SIZE // 1024,
        "vcpus": info.vcpus,
        "max_vcpus": info.max_vcpu_id + 1,
        "altp2m_mode": mode,
        "altp2m_active": active,
    }


def _of(online: int, most: int) -> str:
    return f"{online}/{most}" if online < most else str(online)


def _state(info: xa.DomainInfo) -> str:
    if info.dying:
        return "dying"
    if info.shutdown:
        return "crashed" if info.shutdown_reason == _SHUTDOWN_CRASH else "shut down"
    return "paused" if info.paused else "running"
