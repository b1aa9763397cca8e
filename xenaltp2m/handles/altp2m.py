# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handle of a domain's altp2m: switch it on and off, create views, and verify them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import partial

from xenaltp2m.abi.releases import Release
from xenaltp2m.errors import (
    DomainNotFoundError,
    InvalidArgumentError,
    NotMappedError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handles.base import Handle, UndoList, check_callback
from xenaltp2m.handles.context import DomainContext, domains_of
from xenaltp2m.handles.hazards import check_names, refuse
from xenaltp2m.handles.probe import existing_views, view_exists
from xenaltp2m.handles.signals import uninterruptible
from xenaltp2m.handles.view import Mismatch, View
from xenaltp2m.handles.view_entries import refusal_of
from xenaltp2m.handles.view_resets import ResetListeners, ViewReset
from xenaltp2m.types import ALL_GFNS, HOST_VIEW, Access, VcpuId, ViewId
from xenaltp2m.values.arguments import check_flag, check_kind, check_progress, check_sample
from xenaltp2m.values.gfns import Progress, check_gfn
from xenaltp2m.values.state import MAX_LABEL, is_label

_LOG = logging.getLogger(__name__)


class DecorativeDefaultWarning(UserWarning):
    """The view's default access has no effect on this release."""


class SuperpageDefaultWarning(UserWarning):
    """The view's default access may stop the guest, if its memory is mapped in superpages."""


_NOTHING_OF_A_SUPERPAGE = (Access.N, Access.N2RWX, Access.X)
"""Accesses with which Xen takes a superpage for a hole. ``X``: on CPUs where Xen makes superpages
non-executable (XSA-304)."""


class Altp2m(Handle):
    """A domain's views. Made by :meth:`xenaltp2m.handles.domain.Domain.altp2m`.

    Opening it switches altp2m on unless it is on already; closing it destroys the views made
    through it, moves the vCPUs back, and switches altp2m off if opening had switched it on.

    Attributes:
        context: The domain's context.
        notified: The gfn of each vCPU's #VE page, by vCPU.
        current: The view that the vCPUs were moved to, or None.
        switched_on: Whether this handle switched altp2m on, so that closing switches it off.
    """

    def __init__(self, context: DomainContext, accept: Collection[str] = ()) -> None:
        check_names(accept)
        self._accept = accept
        self.context = context
        self._backend = context.backend
        self._views: list[View] = []
        self.notified: dict[int, int] = {}
        self.current: View | None = None
        self._resets = ResetListeners()
        self._set_up()

    def _set_up(self) -> None:
        super().__init__()
        self._domid = self.context.domid
        self._prior_views: set[ViewId] = set()
        self.switched_on = False
        self._moved = False
        try:
            active = self._backend.altp2m_get_domain_state(self._domid)
            refuse(self.context, self._accept)
            if active:
                self._prior_views.update(self.vcpu_views().values())
                existing = tuple(map(int, existing_views(self._backend, self._domid)))
                self.context.journal.write(
                    used=True, prior_views=existing, prior_view=int(self._prior_view)
                )
            else:
                self._switch_on()
        except BaseException:
            self.abandon()
            raise

    def __repr__(self) -> str:
        return f"<Altp2m of domain {self._domid}>"

    @property
    def views(self) -> tuple[View, ...]:
        """The views made through this handle and not destroyed yet, in order of number."""
        return tuple(sorted((view for view in self._views if not view.closed), key=_by_number))

    @uninterruptible
    def create_view(self, default_access: Access = Access.RWX, *, label: str | None = None) -> View:
        """Create a view.

        Args:
            default_access: The access of pages that Xen copies from the host p2m on first use.
                Xen ignores it before 4.19, and up to 4.21 for the rest of a superpage that it
                copies with the page. ``N``, ``X`` and ``N2RWX`` may stop a guest whose memory is
                mapped in superpages.
            label: A name for people, of at most 1024 characters.

        Raises:
            InvalidArgumentError: No view is left, or the access would crash the guest.
            UnsupportedError: This Xen does not support the access.

        ``xc_altp2m_create_view``.
        """
        self.check_open()
        if label is not None and not is_label(label):
            raise InvalidArgumentError(
                f"a view's label is text of at most {MAX_LABEL} characters, not {label!r:.80}"
            )
        check_kind("default_access", default_access, Access, "an Access")
        release = self._backend.release
        if default_access is Access.DEFAULT:
            default_access = self.host_default()
        number = release.access_numbers.get(default_access)
        if number is None or default_access in (Access.W, Access.WX):
            raise refusal_of(default_access, release)
        if (warning := warning_of_default(default_access, release)) is not None:
            warnings.warn(warning, stacklevel=2)
        view_id = ViewId(self._backend.altp2m_create_view(self._domid, number))
        view = View(self.context, self, view_id, default_access, label)
        self._views = [*self.views, view]
        _LOG.info("%r: created", view)
        return view

    @uninterruptible
    def switch_to_view(self, view: View | None) -> None:
        """Move every vCPU of the domain to a view, or to view 0 if ``view`` is None.

        Raises:
            InvalidArgumentError: The view is hidden, closed, or of another domain.

        ``xc_altp2m_switch_to_view``.
        """
        self.check_open()
        target = HOST_VIEW
        if view is not None:
            if view not in self.views:
                raise InvalidArgumentError(f"{view!r} is not an open view of {self!r}")
            target = view.id
        if len(self._prior_views) > 1 and not self._moved:
            warnings.warn(
                f"the vCPUs of domain {self._domid} were in views {sorted(self._prior_views)}; Xen "
                "can only move all of them together, so closing will leave them in view 0",
                RuntimeWarning,
                stacklevel=2,
            )
        self._backend.altp2m_switch_to_view(self._domid, target)
        self._moved, self.current = True, view

    def vcpu_view(self, vcpu: int) -> ViewId:
        """Return the number of the view that a vCPU is in. ``xc_altp2m_get_vcpu_p2m_idx``."""
        self.check_open()
        return ViewId(self._backend.altp2m_get_vcpu_p2m_idx(self._domid, vcpu))

    def vcpu_views(self) -> dict[VcpuId, ViewId]:
        """Return the number of every vCPU's view, by vCPU."""
        self.check_open()
        last = self.context.info().max_vcpu_id
        return {VcpuId(vcpu): self.vcpu_view(vcpu) for vcpu in range(last + 1)}

    @uninterruptible
    def enable_notify(self, vcpu: int, gfn: int) -> None:
        """Set a vCPU's virtualization exception (#VE) information page; undone on close.

        Raises:
            InvalidArgumentError: There is no such vCPU, or the gfn is not ordinary RAM.
            AlreadyError: The vCPU has a #VE page already.
            UnsupportedError: The CPU has no #VE.

        ``xc_altp2m_set_vcpu_enable_notify``.
        """
        self.check_open()
        check_gfn(gfn)
        self._backend.altp2m_set_vcpu_enable_notify(self._domid, vcpu, gfn)
        self.notified[vcpu] = gfn

    @uninterruptible
    def disable_notify(self, vcpu: int) -> None:
        """Unset a vCPU's #VE information page. ``xc_altp2m_set_vcpu_disable_notify``."""
        self.check_open()
        self._backend.altp2m_set_vcpu_disable_notify(self._domid, vcpu)
        self.notified.pop(vcpu, None)

    def tracking(self, gfn: int) -> list[View]:
        """List the views that Xen would reset if ``gfn`` were removed from the domain."""
        check_gfn(gfn)
        return [view for view in self.views if view.tracks(gfn)]

    # Views that Xen resets.

    def on_view_reset(self, callback: Callable[[ViewReset], object]) -> None:
        """Register a callback for each view that :meth:`verify` finds reset.

        Xen resets a view, or an entry of it, when the host p2m changes, and another program may
        switch altp2m off. Xen reports neither.

        Args:
            callback: Called with a :class:`ViewReset`, after :meth:`verify` has restored the view,
                or has failed to.
        """
        self.check_open()
        check_callback(callback)
        self._resets.add(callback)

    def remove_listener(self, callback: Callable[[ViewReset], object]) -> None:
        """Undo :meth:`on_view_reset`; calling it again is harmless."""
        self._resets.remove(callback)

    def verify(
        self,
        views: Iterable[View] | None = None,
        *,
        reapply: bool = True,
        sample: int | None = None,
        progress: Progress | None = None,
    ) -> list[ViewReset]:
        """Check the views against Xen, and restore those that differ from what was set.

        The domain is paused while views are restored.

        Args:
            views: The views to check; all of them by default.
            reapply: Whether to restore views that differ.
            sample: How many gfns of each view to check; see :meth:`View.verify`.
            progress: Called after each batch of a view's gfns.

        Returns:
            A report for each view that differed; for all views if altp2m had been switched off.
            Callbacks of :meth:`on_view_reset` have run by then, before the domain is unpaused.

        Raises:
            DomainNotFoundError: The domain is gone, or was migrated: then the hint names its new
                domid. The callbacks have been called for all views.

        ``xc_altp2m_get_domain_state``, ``xc_altp2m_get_mem_access``.
        """
        self.check_open()
        check_flag("reapply", reapply)
        check_sample(sample)
        check_progress(progress)
        if views is not None:
            check_kind("views", views, Iterable, "views")
            views = list(views)
            for view in views:
                check_kind("one of views", view, View, "a view")
        self._check_it_is_there()
        wrong: dict[View, tuple[Mismatch, ...]] = {}
        is_on = self._backend.altp2m_get_domain_state(self._domid)
        if is_on:
            for view in self.views if views is None else views:
                if found_wrong := view.verify(sample=sample, progress=progress):
                    wrong[view] = tuple(found_wrong)
        else:
            wrong = dict.fromkeys(self.views, ())
        if not wrong:
            return []
        with self.context.paused() if reapply else nullcontext():
            failure = None if is_on or not reapply else _error_of(self._make_again)
            found = []
            for view, mismatches in wrong.items():
                if is_on and reapply:
                    failure = _error_of(partial(_mend, view, mismatches))
                found.append(ViewReset(view, mismatches, reapply and failure is None, failure))
                found[-1].log()
            self._resets.report(found)
        return found

    def _check_it_is_there(self) -> None:
        """Raise if the domain is gone or has another domid; report all views as reset then."""
        try:
            self.context.info()
        except DomainNotFoundError as gone:
            gone.hint = (*_migration_hint(self.context), *gone.hint)
            self._resets.report(
                [ViewReset(view, (), reapplied=False, failure=gone) for view in self.views]
            )
            raise

    def _make_again(self) -> None:
        """Switch altp2m on again, and restore all views, #VE pages and the vCPUs' view."""
        self.switched_on, self._prior_views = False, set()
        if self._backend.altp2m_get_domain_state(self._domid):
            raise XenError("altp2m is on already", domid=int(self._domid))
        try:
            self._switch_on()
            for view in self.views:
                view.create_again()
            self.context.note_views_renumbered()
            for vcpu, gfn in self.notified.items():
                self._backend.altp2m_set_vcpu_enable_notify(self._domid, vcpu, gfn)
            if self.current is not None and not self.current.closed:
                self.switch_to_view(self.current)
            for view in self.views:
                if not view.visible:
                    view.set_visibility(False)
        except BaseException as error:
            undo = UndoList()
            undo.push(f"altp2m of domain {self._domid}", self._switch_off)
            undo.roll_back(error, self.context.undo, unless=self._gone)
            raise

    # Migration.

    @uninterruptible
    def detach(self) -> None:
        """Undo everything, but keep the views' models for :meth:`reattach`."""
        self.check_open()
        notified = dict(self.notified)
        self._take_back()
        self.notified = notified
        super().abandon()

    @uninterruptible  # half of it could not be closed: it would be open, with an old domid
    def reattach(self, gfns: Mapping[int, int]) -> None:
        """Restore everything in the migrated domain, and replace gfns by the mapping ``gfns``."""
        check_kind("gfns", gfns, Mapping, "gfns by gfn")
        self._reopen()
        self.context.altp2m = self
        self._domid = self.context.domid
        self._moved = False
        self.notified = {vcpu: gfns.get(gfn, gfn) for vcpu, gfn in self.notified.items()}
        for view in self.views:
            view.model.renumber(gfns)
        try:
            self._make_again()
        except BaseException:
            if self.switched_on:
                self.close()
            self.abandon()  # nothing of ours exists: another program has made what does
            raise

    @uninterruptible
    def abandon(self) -> None:
        """Close without undoing anything: the views have vanished, too."""
        super().abandon()
        for view in self._views:
            view.abandon()

    @uninterruptible
    def _switch_on(self) -> None:
        """Switch altp2m on; up to 4.15 it may be on even if the call fails."""
        undo = UndoList()
        undo.push(f"altp2m of domain {self._domid}", self._switch_off)
        self.context.journal.write(altp2m=True)
        with undo.rolling_back(heir=self.context.undo, unless=self._gone):
            self._backend.altp2m_set_domain_state(self._domid, True)
        self.switched_on = True
        _LOG.info("altp2m of domain %d: switched on", self._domid)

    def _switch_off(self) -> None:
        if self._backend.altp2m_get_domain_state(self._domid):
            self._backend.altp2m_set_domain_state(self._domid, False)
            _LOG.info("altp2m of domain %d: switched off", self._domid)
        self.context.journal.undone(altp2m=False)

    def _take_back(self) -> None:
        """Move vCPUs out, destroy views, switch altp2m off; switching it off does all three."""
        undo = UndoList()
        if self.switched_on:
            undo.push(f"altp2m of domain {self._domid}", self._switch_off)
        else:
            undo.push(
                f"vCPUs of domain {self._domid} outside view {self._prior_view}",
                self.move_vcpus_back,
            )
            for vcpu in sorted(self.notified):
                undo.push(
                    f"#VE page of vCPU {vcpu} of domain {self._domid}",
                    partial(self.disable_notify, vcpu),
                )
            for view in self.views:
                undo.push("", view.close)
            with suppress(XenError):
                self.move_vcpus_back()  # tried again after the views are destroyed
        undo.unwind(f"closing {self!r}")
        self.context.journal.undone(used=False, prior_views=(), prior_view=0)

    @property
    def _prior_view(self) -> ViewId:
        """The view that all vCPUs were in; 0 if they were in several."""
        return min(self._prior_views) if len(self._prior_views) == 1 else HOST_VIEW

    @uninterruptible
    def move_vcpus_back(self) -> None:
        """Move the vCPUs back to their prior view, or to view 0 if that is gone."""
        if not self._moved:
            return
        try:
            self._backend.altp2m_switch_to_view(self._domid, self._prior_view)
        except InvalidArgumentError:
            if view_exists(self._backend, self._domid, self._prior_view):
                raise  # its owner has hidden it
            self._backend.altp2m_switch_to_view(self._domid, HOST_VIEW)
        except UnsupportedError:
            if self._backend.altp2m_get_domain_state(self._domid):
                raise
            # Another program has switched altp2m off: no vCPU is in a view.
        self._moved, self.current = False, None

    def note_vcpus_moved(self) -> None:
        """Make closing move the vCPUs back, because a response to an event has moved some."""
        self._moved = True

    def vacate(self) -> None:
        """Move the vCPUs out of our views: to their prior view, or else to view 0."""
        self.check_open()
        self._moved = True
        try:
            self.move_vcpus_back()
        except InvalidArgumentError:
            self._backend.altp2m_switch_to_view(self._domid, HOST_VIEW)

    def _orphaned(self) -> bool:
        return self.context.is_gone()

    def _gone(self) -> bool:
        return self.is_gone()

    def is_gone(self) -> bool:
        """Check whether it has vanished: the domain is gone, or altp2m was switched off."""
        if self.closed or self._orphaned():
            return True
        try:
            return not self._backend.altp2m_get_domain_state(self._domid)
        except XenError:
            return False  # unknown

    def host_default(self) -> Access:
        """Return the access that ``Access.DEFAULT`` stands for now."""
        self.check_open()
        number = self._backend.altp2m_get_mem_access(self._domid, HOST_VIEW, ALL_GFNS)
        return self._backend.release.access_by_number[number]


def warning_of_default(access: Access, release: Release) -> UserWarning | None:
    """Return the warning that a view's default access deserves on a release, or None."""
    if access != Access.RWX and not release.lazy_copy_takes_view_default:
        return DecorativeDefaultWarning(
            f"Xen {release} gives pages the host's access, not the view's default {access}: set it "
            "with view.set_access(range(domain.maximum_gfn + 1), …)"
        )
    if access in _NOTHING_OF_A_SUPERPAGE and release.lazy_copy_takes_view_default:
        return SuperpageDefaultWarning(
            f"Xen {release} copies the host's superpages into a view, and with access {access} "
            "takes them for holes: a vCPU that touches one faults for ever, and setting one gfn "
            "undoes its neighbours (4.22). Boot Xen with hap_2mb=0 hap_1gb=0, or use the default "
            "RWX and set the access of every gfn"
        )
    return None


def _mend(view: View, mismatches: Iterable[Mismatch]) -> None:
    """Restore a view, and check that Xen has not skipped any of the mismatches."""
    view.reapply()
    for one in mismatches:
        if view.access(one.gfn) != one.expected:
            raise NotMappedError(
                f"Xen skips gfn {one.gfn:#x} of {view!r}: it is not ordinary RAM any more",
                op="altp2m_set_mem_access_multi",
                domid=view.domid,
                view=view.id,
                gfn=one.gfn,
            )


def _migration_hint(context: DomainContext) -> tuple[str, ...]:
    """Return a hint that names the new domid of a domain that was migrated, if it was."""
    return tuple(
        f"it is domain {info.domid} now, with altp2m off: open that domain and "
        "restore a captured state; next time, xa.Migration keeps the views"
        for info in domains_of(context.backend)
        if info.uuid == context.uuid
    )


def _by_number(view: View) -> int:
    return int(view.id)


def _error_of(act: Callable[[], None]) -> XenError | None:
    try:
        act()
    except XenError as failure:
        return failure
    return None
