# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handles' promises, on the mock and on Xen alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from xenaltp2m.types import Altp2mMode

from .hosts import Host


class Borrowed:
    """A backend that a connection's close leaves open, for the tests after it."""

    def __init__(self, host: Host) -> None:
        self._backend = host.backend

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def close(self) -> None:
        """Stay open."""


@pytest.fixture
def xen(host: Host) -> Iterator[xa.Xen]:
    with xa.connect(Borrowed(host)) as xen:  # type: ignore[arg-type]
        yield xen


@pytest.fixture
def dom(xen: xa.Xen, own_domain: int) -> Iterator[xa.Domain]:
    with xen.domain(own_domain) as dom:
        yield dom


def test_a_domain_by_number_name_and_uuid(xen: xa.Xen, dom: xa.Domain) -> None:
    name = dom.name
    assert name is not None
    for which in (dom.domid, str(dom.domid), name, dom.uuid, str(dom.uuid)):
        with xen.domain(which) as found:
            assert (found.domid, found.uuid) == (dom.domid, dom.uuid)
    with pytest.raises(xa.DomainNotFoundError):
        xen.domain("no such domain")
    assert dom.domid in {info.domid for info in xen.domains()}


def test_facts(dom: xa.Domain) -> None:
    assert dom.altp2m_mode is Altp2mMode.EXTERNAL
    assert dom.config()["b_info"]["altp2m"] == "external"
    assert dom.info().paused
    assert dom.maximum_gfn >= 0xFFF


def test_a_hidden_page(dom: xa.Domain) -> None:
    """The main job: a page shown as a patched copy, and everything undone at the end."""
    dom.memory.write(0x105 << 12, b"original")
    with dom.altp2m() as altp2m:
        view = altp2m.create_view(label="hooks")
        view.set_access(range(0x100, 0x110), xa.Access.RX)
        [shadow] = dom.add_pages()
        dom.memory.write_page(shadow, dom.memory.read_page(0x105))
        dom.memory.write(shadow << 12, b"PATCHED!")
        view.remap(0x105, shadow, access=xa.Access.X)
        altp2m.switch_to_view(view)
        assert altp2m.vcpu_views() == {0: view.id}
        assert view.access(0x105) is xa.Access.X
        assert view.access(0x104) is xa.Access.RX
        assert view.effective_access(0x200) is xa.Access.RWX
        assert view.effective_access(0x3000) is None
        assert dom.memory.read(0x105 << 12, 8) == b"original"  # the host p2m shows no remap
        assert view.verify() == []
        assert view.differences() == [
            xa.Difference(xa.Gfn(0x100), 5, xa.Access.RX, None, None),
            xa.Difference(xa.Gfn(0x105), 1, xa.Access.X, xa.Gfn(shadow), None),
            xa.Difference(xa.Gfn(0x106), 10, xa.Access.RX, None, None),
        ]
    dom.close()
    with pytest.raises(xa.ClosedError):
        dom.info()


def test_what_was_added_is_taken_back(xen: xa.Xen, own_domain: int) -> None:
    with xen.domain(own_domain) as dom:
        before = dom.info()
        pages = dom.add_pages(3)
        assert dom.info().pages == before.pages + 3
        dom.memory.write_page(pages[2], bytes(range(256)) * 16)
        assert dom.memory.read((pages[2] << 12) + 1, 3) == b"\1\2\3"
        dom.remove_pages(pages)
        assert (dom.info().pages, dom.info().max_pages) == (before.pages, before.max_pages)
        dom.add_pages()
        dom.pause()
    with xen.domain(own_domain) as dom:
        assert dom.info() == before


def test_the_prior_state_is_restored(xen: xa.Xen, dom: xa.Domain) -> None:
    raw = xen.backend
    raw.altp2m_set_domain_state(dom.domid, True)
    theirs = raw.altp2m_create_view(dom.domid, 7)
    raw.altp2m_switch_to_view(dom.domid, theirs)
    with dom.altp2m() as altp2m:
        mine = altp2m.create_view()
        altp2m.switch_to_view(mine)
        altp2m.switch_to_view(None)
        altp2m.switch_to_view(mine)
    assert raw.altp2m_get_domain_state(dom.domid)
    assert raw.altp2m_get_vcpu_p2m_idx(dom.domid, 0) == theirs
    assert raw.altp2m_create_view(dom.domid, 7) == mine.id  # it was destroyed


def test_a_view_with_vcpus_in_it_can_be_closed(dom: xa.Domain) -> None:
    with dom.altp2m() as altp2m:
        with altp2m.create_view() as view:
            altp2m.switch_to_view(view)
        assert altp2m.vcpu_view(0) == 0
        assert altp2m.views == ()


def test_no_view_is_left(dom: xa.Domain) -> None:
    with dom.altp2m() as altp2m:
        views = [altp2m.create_view() for _ in range(9)]
        with pytest.raises(xa.InvalidArgumentError, match="no view is left"):
            altp2m.create_view()
        views[3].close()
        assert altp2m.create_view().id == views[3].id


def test_xen_wipes_and_verify_tells(xen: xa.Xen, dom: xa.Domain) -> None:
    with dom.altp2m() as altp2m:
        view = altp2m.create_view()
        pages = dom.add_pages(2)
        view.set_access(0x120, xa.Access.R)
        view.remap(0x121, pages[1], access=xa.Access.X)
        assert view.verify() == []
        xen.backend.altp2m_set_mem_access(dom.domid, 0, 0x120, 5)  # the host's access overwrites
        assert view.verify() == [xa.Mismatch(xa.Gfn(0x120), xa.Access.R, xa.Access.RX)]
        with pytest.raises(xa.BusyError, match="destroy the view first"):
            dom.remove_pages(pages)


def test_bulk_access(dom: xa.Domain) -> None:
    with dom.altp2m() as altp2m:
        view = altp2m.create_view()
        seen: list[tuple[int, int]] = []
        view.set_access(range(0x1000), xa.Access.RX, progress=lambda *now: seen.append(now))
        assert seen[-1] == (0x1000, 0x1000)
        view.set_access((gfn for gfn in (0x801, 0x900)), xa.Access.RW)
        assert [view.access(gfn) for gfn in (0, 0x800, 0x801, 0x900, 0xFFF)] == [
            xa.Access.RX, xa.Access.RX, xa.Access.RW, xa.Access.RW, xa.Access.RX,
        ]  # fmt: skip


def test_what_kills_guests_is_refused(dom: xa.Domain) -> None:
    with dom.altp2m() as altp2m:
        view = altp2m.create_view()
        for deadly in (xa.Access.W, xa.Access.WX):
            with pytest.raises(xa.InvalidArgumentError, match="crash"):
                view.set_access(0x120, deadly)
        for nonsense in (-1, 1 << 36, (1 << 64) - 1):
            with pytest.raises(xa.InvalidArgumentError, match="gfn"):
                view.set_access(nonsense, xa.Access.R)
        with pytest.raises(xa.NotMappedError, match="not ordinary RAM"):
            view.remap(0x3000, 0x120)
        assert view.differences() == []


def test_a_domain_that_dies(host: Host, xen: xa.Xen) -> None:
    domid = host.create()
    with xen.domain(domid) as dom, dom.altp2m() as altp2m:
        altp2m.switch_to_view(altp2m.create_view())
        dom.add_pages()
        dom.pause()
        host.destroy(domid)
        assert is_gone(dom)
    assert dom.closed


def is_gone(dom: xa.Domain) -> bool:
    """Whether a domain was destroyed, or is dying and beyond reach."""
    try:
        return dom.info().dying
    except xa.DomainNotFoundError:
        return True
