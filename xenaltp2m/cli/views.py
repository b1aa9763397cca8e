# SPDX-License-Identifier: LGPL-2.1-or-later
"""``views``: list the views that a domain has now, and the vCPUs in them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.arguments import add_domain
from xenaltp2m.cli.console import Console, Table
from xenaltp2m.cli.host import connect
from xenaltp2m.handles.journal import Found, find

SUMMARY = "list the views that a domain has now, and the vCPUs in them"

KEYS = """\
Lists all views, whoever created them; changes nothing, and does not switch altp2m on. View 0 is the
host p2m. state save reads the access of views; Xen does not report their remaps, and whether they
are hidden from the guest.

--json prints one object:
  xen, backend, domid, name
  altp2m_mode      who may use altp2m: disabled, mixed, external, limited
  altp2m_active    whether it is on; if it is off, there are no views
  views            [{"id", "default_access", "vcpus": [numbers], "visible": null, as Xen does not
                   report it}]
  agents           [{"pid", "running", "imported"}]: processes of this package with a journal of
                   this domain; one that is not running has imported views or was killed: see rescue
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_domain(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    with connect(options, console) as xen, xen.domain(options.domain) as domain:
        info = domain.info()
        if not info.hvm:
            raise xa.UnsupportedError(
                f"domain {info.domid} is PV, and has no altp2m",
                domid=info.domid,
                hint=("HVM and PVH guests have one",),
            )
        mode, views = domain.altp2m_mode.name.lower(), _views(domain)
        journals = [] if xen.journals is None else find(xen.journals, info.domid, info.uuid)
        agents = [found for found in journals if found.record and not found.why_not]
        name = domain.name
        console.result(
            {
                "xen": str(xen.release),
                "backend": xen.backend.name,
                "domid": info.domid,
                "name": name,
                "altp2m_mode": mode,
                "altp2m_active": views is not None,
                "views": [_document(view) for view in views or ()],
                "agents": [
                    {"pid": found.pid, "running": found.alive, "imported": found.kept}
                    for found in agents
                ],
            },
            _table(f"Domain {info.domid} ({name}): altp2m {mode}", views, agents),
        )
    if views:
        console.note("Xen does not report which views are hidden from the guest.")


def _views(domain: xa.Domain) -> list[xa.ViewInfo] | None:
    """Return the views; None if altp2m is off, or not available."""
    try:
        return domain.existing_views() if domain.altp2m_active else None
    except xa.InvalidArgumentError:
        return None  # the domain was created without altp2m


def _document(view: xa.ViewInfo) -> dict[str, Any]:
    return {
        "id": view.id,
        "default_access": str(view.default_access),
        "vcpus": list(view.vcpus),
        "visible": None,
    }


def _table(title: str, views: Sequence[xa.ViewInfo] | None, agents: Sequence[Found]) -> Table:
    words = [title, "off" if views is None else "on"]
    for found in agents:
        gone = "has imported views" if found.kept else "was killed"
        words.append(f"process {found.pid} {'works on it' if found.alive else gone}")
    if views is None:
        return Table((", ".join(words),), [])
    rows = [
        (str(view.id), str(view.default_access), ", ".join(map(str, view.vcpus))) for view in views
    ]
    return Table(("view", "default access", "vCPUs in it"), rows, title=", ".join(words))
