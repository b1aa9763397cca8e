# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest would meet, and what else of a domain a caller can change, as one flat record.

Restated from Xen's rules, not asked through the handles: a view's own entry counts, or else what
the first access would copy from the host p2m (``p2m_altp2m_get_or_propagate``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import pytest

from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Domain

every_release = pytest.mark.parametrize("xen_version", SUPPORTED, ids="{0[0]}.{0[1]}".format)
"""Run a test on a host of each release."""

State: TypeAlias = dict[str, Any]


def met(domain: Domain, view: int, gfn: int) -> tuple[int, int] | None:
    """Return the (frame, access number) a vCPU in a view meets at a gfn, or None for a hole."""
    own = domain.views[view].table.lookup(gfn)
    if own.mapped:
        return own.mfn, own.access
    host = domain.host.lookup(gfn)
    if not host.mapped:
        return None
    if domain.release.version >= (4, 19):
        return host.mfn, domain.views[view].default_access
    return host.mfn, host.access


def state_of(mock: MockBackend, domid: int, gfns: Iterable[int]) -> State:
    """Record everything of a domain that handles change, by what an error would call it."""
    domain = mock.domain(domid)
    of = f"of domain {domid}"
    state: State = {
        f"altp2m {of}": domain.active,
        f"memory limit {of}": domain.max_pages,
        f"pages {of}": domain.pages,
        f"pause {of}": domain.pauses,
        "resources": mock.open_resources(),
    }
    for vcpu in domain.vcpus:
        state[f"vCPU {vcpu.number} {of}"] = vcpu.view
        state[f"#VE page of vCPU {vcpu.number} {of}"] = vcpu.veinfo
    for number, view in enumerate(domain.views):
        if view.exists:
            state[f"view {number} {of}"] = view.visible, view.default_access
    for gfn in gfns:
        host = domain.host.lookup(gfn)
        state[f"page {gfn:#x} {of}"] = (host.mfn, host.type, host.access) if host.mapped else None
        for number, view in enumerate(domain.views):
            if view.exists:
                state[f"gfn {gfn:#x} in view {number} {of}"] = met(domain, number, gfn)
    return state


def changes(before: State, after: State) -> set[str]:
    """Name what differs between two records."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def names(words: str, change: str) -> bool:
    """Tell whether an entry of ``LeftoverError.left`` speaks of a change."""
    if change in words or words in change:
        return True
    if words.startswith("altp2m of"):
        return re.search(r"view|vCPU", change) is not None
    if words.startswith(("vCPUs of", "view ")):  # a view that is left may have them in it
        return change.startswith("vCPU ")
    if words.startswith("mapping of"):
        return change == "resources"
    gfn = re.match(r"(?:gfn|page) (0x\w+) (?:in (view \d+) )?of", change)
    if found := re.match(r"pages (0x\w+)\.\.(0x\w+) added to", words):
        inside = gfn is not None and int(found[1], 16) <= int(gfn[1], 16) <= int(found[2], 16)
        return inside or change.startswith("pages of")
    if found := re.match(r"access of \d+ gfns from (0x\w+) to (0x\w+) in (view \d+)", words):
        inside = gfn is not None and int(found[1], 16) <= int(gfn[1], 16) <= int(found[2], 16)
        return inside and gfn is not None and gfn[2] == found[3]
    return False
