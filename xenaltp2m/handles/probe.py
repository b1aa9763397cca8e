# SPDX-License-Identifier: LGPL-2.1-or-later
"""Probe a domain's views and ring, whoever made them, without changing anything."""

from __future__ import annotations

from errno import ENODEV

from xenaltp2m.backend.protocol import Backend
from xenaltp2m.errors import InvalidArgumentError, NotMappedError, XenError
from xenaltp2m.types import Access, DomId, ViewId


def own_access(backend: Backend, domid: DomId, view: ViewId, gfn: int) -> Access | None:
    """Return the access of a view's own entry for a gfn, or None if it has none."""
    try:
        number = backend.altp2m_get_mem_access(domid, view, gfn)
    except NotMappedError:
        return None
    return backend.release.access_by_number[number]


def view_exists(backend: Backend, domid: DomId, view: ViewId) -> bool:
    """Check whether a view exists, by a call whose error differs from that for an absent entry."""
    try:
        backend.altp2m_get_suppress_ve(domid, view, 0)
    except InvalidArgumentError:
        return False
    except NotMappedError:
        return True  # it has no entry for gfn 0
    return True


def existing_views(backend: Backend, domid: DomId) -> list[ViewId]:
    """List the numbers of all views, view 0 included."""
    numbers = map(ViewId, range(backend.release.most_views))
    return [number for number in numbers if view_exists(backend, domid, number)]


def has_ring(backend: Backend, domid: int) -> bool:
    """Check whether a ring is enabled, by a resume, which also processes its responses."""
    try:
        backend.monitor_resume(domid)
    except XenError as error:
        return error.errno != ENODEV
    return True
