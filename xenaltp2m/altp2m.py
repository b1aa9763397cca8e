# SPDX-License-Identifier: LGPL-2.1-or-later
"""altp2m of one domain: switched on for as long as it is needed, with the views made in it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from xenaltp2m.errors import InvalidArgumentError, XenError
from xenaltp2m.handle import Handle, UndoList
from xenaltp2m.types import ALL_GFNS, HOST_VIEW, Access, VcpuId, ViewId
from xenaltp2m.view import View, check_gfn, refusal_of

if TYPE_CHECKING:
    from xenaltp2m.domain import Domain


class DecorativeDefaultWarning(UserWarning):
    """The default access asked for has no effect on this release."""


class Altp2m(Handle):
    """A domain's views. Made by :meth:`xenaltp2m.domain.Domain.altp2m`.

    Opening it switches altp2m on unless it is on already; closing it destroys the views made
    through it, moves the vCPUs back, and switches altp2m off if opening had switched it on.
    """

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self.domain = domain
        self._backend = domain.xen.backend
        self._domid = domain.domid
        self._views: dict[ViewId, View] = {}
        self._prior_view: ViewId | None = None
        self._switched_on = False
        try:
            if not self._backend.altp2m_get_domain_state(self._domid):
                self._backend.altp2m_set_domain_state(self._domid, True)
                self._switched_on = True
        except XenError:
            self._warn.detach()
            self._closed = True
            raise
        self._undo.push(f"altp2m of domain {self._domid}", self._tear_down)

    def __repr__(self) -> str:
        return f"<Altp2m of domain {self._domid}>"

    @property
    def views(self) -> tuple[View, ...]:
        """The views made through this handle and not yet destroyed, by number."""
        return tuple(view for _, view in sorted(self._views.items()) if not view.closed)

    def create_view(self, default_access: Access = Access.RWX, *, label: str | None = None) -> View:
        """Make a view.

        Args:
            default_access: What pages get that the view copies from the host p2m on first use.
                Xen ignores it before 4.19, and up to 4.21 for what it copies along in a superpage.
            label: A name for people.

        Raises:
            InvalidArgumentError: No view is left, or the access would crash the guest.
            UnsupportedError: This Xen does not know the access.

        ``xc_altp2m_create_view``.
        """
        self._check_open()
        release = self._backend.release
        number = release.access_numbers.get(default_access)
        if number is None or default_access in (Access.W, Access.WX):
            raise refusal_of(default_access, release)
        if default_access != Access.RWX and not release.lazy_copy_takes_view_default:
            warnings.warn(
                f"Xen {release} gives pages the host's access, not the view's default "
                f"{default_access}: set it with view.set_access(range(domain.maximum_gfn + 1), …)",
                DecorativeDefaultWarning,
                stacklevel=2,
            )
        undo = UndoList()
        view_id = ViewId(self._backend.altp2m_create_view(self._domid, number))
        undo.push(
            f"view {view_id} of domain {self._domid}",
            lambda: self._backend.altp2m_destroy_view(self._domid, view_id),
        )
        if default_access is Access.DEFAULT:
            try:
                found = self._backend.altp2m_get_mem_access(self._domid, view_id, ALL_GFNS)
            except XenError as error:
                undo.roll_back(error)
                raise
            default_access = release.access_by_number[found]
        view = self._views[view_id] = View(self, view_id, default_access, label)
        return view

    def switch_to_view(self, view: View | None) -> None:
        """Move every vCPU of the domain to a view, or to view 0 where ``view`` is None.

        Raises:
            InvalidArgumentError: The view is hidden, closed, or of another domain.

        ``xc_altp2m_switch_to_view``.
        """
        self._check_open()
        target = HOST_VIEW
        if view is not None:
            if self._views.get(view.id) is not view or view.closed:
                raise InvalidArgumentError(f"{view!r} is not an open view of {self!r}")
            target = view.id
        if self._prior_view is None and not self._switched_on:
            self._prior_view = self._common_view()
        self._backend.altp2m_switch_to_view(self._domid, target)

    def vcpu_view(self, vcpu: int) -> ViewId:
        """Return the number of the view a vCPU is in. ``xc_altp2m_get_vcpu_p2m_idx``."""
        self._check_open()
        return ViewId(self._backend.altp2m_get_vcpu_p2m_idx(self._domid, vcpu))

    def vcpu_views(self) -> dict[VcpuId, ViewId]:
        """Return the view of every vCPU, by vCPU."""
        last = self.domain.info().max_vcpu_id
        return {VcpuId(vcpu): self.vcpu_view(vcpu) for vcpu in range(last + 1)}

    def enable_notify(self, vcpu: int, gfn: int) -> None:
        """Name the page where a vCPU finds what a #VE was about; undone on close.

        Raises:
            InvalidArgumentError: No such vCPU, or the gfn is not ordinary RAM.
            AlreadyError: The vCPU has such a page already.
            UnsupportedError: The CPU has no #VE.

        ``xc_altp2m_set_vcpu_enable_notify``.
        """
        self._check_open()
        check_gfn(gfn)
        self._backend.altp2m_set_vcpu_enable_notify(self._domid, vcpu, gfn)
        self._undo.push(_notify_page(self._domid, vcpu), lambda: self._disable_notify(vcpu))

    def disable_notify(self, vcpu: int) -> None:
        """Take a vCPU's #VE page back. ``xc_altp2m_set_vcpu_disable_notify``."""
        self._check_open()
        self._disable_notify(vcpu)
        self._undo.drop(_notify_page(self._domid, vcpu))

    def tracking(self, gfn: int) -> list[View]:
        """List the views that Xen would reset if ``gfn`` were taken from the domain."""
        return [view for view in self.views if view.tracks(gfn)]

    def _disable_notify(self, vcpu: int) -> None:
        self._backend.altp2m_set_vcpu_disable_notify(self._domid, vcpu)

    def _common_view(self) -> ViewId:
        """The view all vCPUs are in; 0, with a warning, where they are in several."""
        views = set(self.vcpu_views().values())
        if len(views) == 1:
            return views.pop()
        warnings.warn(
            f"the vCPUs of domain {self._domid} are in views {sorted(views)}; Xen can only move "
            "all of them, so that closing will leave them in view 0",
            RuntimeWarning,
            stacklevel=3,
        )
        return HOST_VIEW

    def _tear_down(self) -> None:
        """Semantics: vCPUs out, views gone, altp2m off; switching it off does all three."""
        if self._switched_on:
            self._backend.altp2m_set_domain_state(self._domid, False)
            for view in self._views.values():
                view.abandon()
            self._views.clear()
            self._switched_on = False
            return
        if self._prior_view is not None:
            self._backend.altp2m_switch_to_view(self._domid, self._prior_view)
        undo = UndoList()
        for view in self.views:
            undo.push(f"{view!r}", view.close)
        undo.unwind(f"closing {self!r}")
        self._views.clear()


def _notify_page(domid: int, vcpu: int) -> str:
    return f"#VE page of vCPU {vcpu} of domain {domid}"
