# SPDX-License-Identifier: LGPL-2.1-or-later
"""altp2m of one domain: switched on for as long as it is needed, with the views made in it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from xenaltp2m.arguments import check_flag, check_kind, check_progress, check_sample
from xenaltp2m.errors import (
    DomainNotFoundError,
    InvalidArgumentError,
    NotMappedError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handle import Handle, UndoList, check_callback
from xenaltp2m.signals import uninterruptible
from xenaltp2m.types import ALL_GFNS, HOST_VIEW, Access, VcpuId, ViewId
from xenaltp2m.view import (
    Mismatch,
    Progress,
    View,
    check_gfn,
    existing_views,
    refusal_of,
    view_exists,
)
from xenaltp2m.viewstate import MAX_LABEL, is_label

if TYPE_CHECKING:
    from xenaltp2m.abi.releases import Release
    from xenaltp2m.domain import Domain
    from xenaltp2m.viewstate import State


_LOG = logging.getLogger(__name__)


class DecorativeDefaultWarning(UserWarning):
    """The default access asked for has no effect on this release."""


class SuperpageDefaultWarning(UserWarning):
    """The default access asked for may stop the guest, if its memory is mapped in superpages."""


_NOTHING_OF_A_SUPERPAGE = (Access.N, Access.N2RWX, Access.X)
"""``X`` on CPUs where Xen lets no superpage be executed (XSA-304)."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A view that was found to be no more what was asked of it.

    Attributes:
        view: The view.
        mismatches: The gfns that were looked at and found to differ; empty where altp2m had been
            switched off, and all of the view was gone.
        failure: Why not all of it could be made again; the rest was. None where all was, or nobody
            wanted it.
        reapplied: Whether it is as it should be again.
    """

    view: View
    mismatches: tuple[Mismatch, ...]
    reapplied: bool
    failure: XenError | None = None


class Altp2m(Handle):
    """A domain's views. Made by :meth:`xenaltp2m.domain.Domain.altp2m`.

    Opening it switches altp2m on unless it is on already; closing it destroys the views made
    through it, moves the vCPUs back, and switches altp2m off if opening had switched it on.
    """

    def __init__(self, domain: Domain, accept: Collection[str] = ()) -> None:
        from xenaltp2m.hazards import check_names

        check_names(accept)
        self._accept = accept
        self.domain = domain
        self._backend = domain.xen.backend
        self._views: list[View] = []
        self._notified: dict[int, int] = {}
        """By vCPU, the gfn of its page for #VE."""
        self._current: View | None = None
        """Where the vCPUs were sent."""
        self._listeners: list[Callable[[Lost], object]] = []
        self._set_up()

    def _set_up(self) -> None:
        from xenaltp2m.hazards import refuse

        super().__init__()
        self._domid = self.domain.domid
        self._prior_views: set[ViewId] = set()
        self._switched_on = False
        self._moved = False
        try:
            active = self._backend.altp2m_get_domain_state(self._domid)
            refuse(self.domain, self._accept)
            if active:
                self._prior_views.update(self.vcpu_views().values())
                existing = tuple(map(int, existing_views(self._backend, self._domid)))
                self.domain._journal.write(
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
        """The views made through this handle and not yet destroyed, by number."""
        return tuple(sorted((view for view in self._views if not view.closed), key=_by_number))

    @uninterruptible
    def create_view(self, default_access: Access = Access.RWX, *, label: str | None = None) -> View:
        """Make a view.

        Args:
            default_access: What pages get that the view copies from the host p2m on first use.
                Xen ignores it before 4.19, and up to 4.21 for what it copies along in a superpage.
                ``N``, ``X`` and ``N2RWX`` may stop a guest whose memory is mapped in superpages.
            label: A name for people, of at most 1024 characters.

        Raises:
            InvalidArgumentError: No view is left, or the access would crash the guest.
            UnsupportedError: This Xen does not know the access.

        ``xc_altp2m_create_view``.
        """
        self._check_open()
        if label is not None and not is_label(label):
            raise InvalidArgumentError(
                f"a view's label is text of at most {MAX_LABEL} characters, not {label!r:.80}"
            )
        check_kind("default_access", default_access, Access, "an Access")
        release = self._backend.release
        if default_access is Access.DEFAULT:
            default_access = self._host_default()
        number = release.access_numbers.get(default_access)
        if number is None or default_access in (Access.W, Access.WX):
            raise refusal_of(default_access, release)
        if (warning := warning_of_default(default_access, release)) is not None:
            warnings.warn(warning, stacklevel=2)
        view_id = ViewId(self._backend.altp2m_create_view(self._domid, number))
        view = View(self, view_id, default_access, label)
        self._views = [*self.views, view]
        _LOG.info("%r: made", view)
        return view

    @uninterruptible
    def switch_to_view(self, view: View | None) -> None:
        """Move every vCPU of the domain to a view, or to view 0 where ``view`` is None.

        Raises:
            InvalidArgumentError: The view is hidden, closed, or of another domain.

        ``xc_altp2m_switch_to_view``.
        """
        self._check_open()
        target = HOST_VIEW
        if view is not None:
            if view not in self.views:
                raise InvalidArgumentError(f"{view!r} is not an open view of {self!r}")
            target = view.id
        if len(self._prior_views) > 1 and not self._moved:
            warnings.warn(
                f"the vCPUs of domain {self._domid} were in views {sorted(self._prior_views)}; Xen "
                "can only move all of them, so that closing will leave them in view 0",
                RuntimeWarning,
                stacklevel=2,
            )
        self._backend.altp2m_switch_to_view(self._domid, target)
        self._moved, self._current = True, view

    def vcpu_view(self, vcpu: int) -> ViewId:
        """Return the number of the view a vCPU is in. ``xc_altp2m_get_vcpu_p2m_idx``."""
        self._check_open()
        return ViewId(self._backend.altp2m_get_vcpu_p2m_idx(self._domid, vcpu))

    def vcpu_views(self) -> dict[VcpuId, ViewId]:
        """Return the view of every vCPU, by vCPU."""
        self._check_open()
        last = self.domain.info().max_vcpu_id
        return {VcpuId(vcpu): self.vcpu_view(vcpu) for vcpu in range(last + 1)}

    @uninterruptible
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
        self._notified[vcpu] = gfn

    @uninterruptible
    def disable_notify(self, vcpu: int) -> None:
        """Take a vCPU's #VE page back. ``xc_altp2m_set_vcpu_disable_notify``."""
        self._check_open()
        self._backend.altp2m_set_vcpu_disable_notify(self._domid, vcpu)
        self._notified.pop(vcpu, None)

    def capture(
        self,
        *,
        contents: bool = False,
        verify: bool | int = False,
        progress: Progress | None = None,
    ) -> State:
        """Describe the views as a value: see :func:`xenaltp2m.capturing.capture`."""
        from xenaltp2m.capturing import capture

        self._check_open()
        return capture(self, contents=contents, verify=verify, progress=progress)

    def tracking(self, gfn: int) -> list[View]:
        """List the views that Xen would reset if ``gfn`` were taken from the domain."""
        check_gfn(gfn)
        return [view for view in self.views if view.tracks(gfn)]

    # What may get lost.

    def on_lost(self, callback: Callable[[Lost], object]) -> None:
        """Have something called for each view that :meth:`verify` finds other than it should be.

        Xen resets a view, or an entry of it, where the host p2m changes; somebody may switch altp2m
        off; nothing tells of either.

        Args:
            callback: Called with a :class:`Lost`, once the view was made again or could not be.
        """
        self._check_open()
        check_callback(callback)
        self._listeners.append(callback)

    def _tell_no_more(self, callback: Callable[[Lost], object]) -> None:
        """Undo :meth:`on_lost`; again is harmless."""
        self._listeners = [one for one in self._listeners if one != callback]

    def verify(
        self,
        views: Iterable[View] | None = None,
        *,
        reapply: bool = True,
        sample: int | None = None,
        progress: Progress | None = None,
    ) -> list[Lost]:
        """Ask Xen whether the views are as they should be, and make those again that are not.

        The domain stands still while they are made.

        Args:
            views: Those to look at; all of them by default.
            reapply: Whether they are made again.
            sample: How many gfns of each are looked at; see :meth:`View.verify`.
            progress: Called after each batch of a view's gfns.

        Returns:
            Views that were otherwise; where altp2m had been switched off, all. What is told by
            :meth:`on_lost` is told before the domain goes on.

        Raises:
            DomainNotFoundError: The domain is gone, or was carried away: the hint says where it
                is. All views are lost, and told of.

        ``xc_altp2m_get_domain_state``, ``xc_altp2m_get_mem_access``.
        """
        self._check_open()
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
        with self.domain.paused() if reapply else nullcontext():
            failure = None if is_on or not reapply else self._try(self._make_again)
            found = []
            for view, mismatches in wrong.items():
                if is_on and reapply:
                    failure = self._try(partial(_mend, view, mismatches))
                found.append(Lost(view, mismatches, reapply and failure is None, failure))
                _log(found[-1])
            self._tell(found)
        return found

    def _check_it_is_there(self) -> None:
        """Raise where the domain is gone, or is elsewhere by now; that is told, too."""
        try:
            self.domain.info()
        except DomainNotFoundError as gone:
            for info in self.domain.xen.domains():
                if info.uuid == self.domain.uuid:
                    hint = (
                        f"it is domain {info.domid} now, with altp2m off: open it, and restore a "
                        "state that was captured; Domain.carried() would have carried all of it"
                    )
                    gone.hint = (hint, *gone.hint)
            self._tell(Lost(view, (), reapplied=False, failure=gone) for view in self.views)
            raise

    def _tell(self, found: Iterable[Lost]) -> None:
        """Call all listeners, even where one fails."""
        failures: list[BaseException] = []
        for lost in found:
            for tell in self._listeners:
                try:
                    tell(lost)
                except BaseException as error:  # noqa: BLE001 - raised below
                    failures.append(error)
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"another callback failed, too: {other!r}")
            raise failures[0]

    @staticmethod
    def _try(act: Callable[[], None]) -> XenError | None:
        try:
            act()
        except XenError as failure:
            return failure
        return None

    def _make_again(self) -> None:
        """Switch altp2m on, and make all that there was."""
        self._switched_on, self._prior_views = False, set()
        if self._backend.altp2m_get_domain_state(self._domid):
            raise XenError("altp2m is on already", domid=int(self._domid))
        try:
            self._switch_on()
            for view in self.views:
                view._create_again()
            for monitor in self.domain._open_monitors():
                monitor.forget_views()
            for vcpu, gfn in self._notified.items():
                self._backend.altp2m_set_vcpu_enable_notify(self._domid, vcpu, gfn)
            if self._current is not None and not self._current.closed:
                self.switch_to_view(self._current)
            for view in self.views:
                if not view.visible:
                    view.set_visibility(False)
        except BaseException as error:
            undo = UndoList()
            undo.push(f"altp2m of domain {self._domid}", self._switch_off)
            self._roll_back(undo, error, heir=self.domain._undo)
            raise

    # Being carried elsewhere.

    @uninterruptible
    def _lay_down(self) -> None:
        """Take all back but the model, for :meth:`_take_up`."""
        notified = dict(self._notified)
        self._take_back()
        self._notified = notified
        super().abandon()

    @uninterruptible  # half of it could not be closed: it would be open, with an old domid
    def _take_up(self, gfns: Mapping[int, int]) -> None:
        """Make all again, where the domain is now, with other gfns in place of some."""
        super().__init__()
        self.domain._altp2m = self
        self._domid = self.domain.domid
        self._moved = False
        self._notified = {vcpu: gfns.get(gfn, gfn) for vcpu, gfn in self._notified.items()}
        for view in self.views:
            view._renumber(gfns)
        try:
            self._make_again()
        except BaseException:
            if self._switched_on:
                self.close()
            self.abandon()  # none of it is there: what is, somebody else has made
            raise

    @uninterruptible
    def abandon(self) -> None:
        """Close without undoing anything: the views, too, are gone."""
        super().abandon()
        for view in self._views:
            view.abandon()

    @uninterruptible
    def _switch_on(self) -> None:
        """Switch altp2m on; up to 4.15 a failure may leave it on all the same."""
        undo = UndoList()
        undo.push(f"altp2m of domain {self._domid}", self._switch_off)
        self.domain._journal.write(altp2m=True)
        try:
            self._backend.altp2m_set_domain_state(self._domid, True)
        except BaseException as error:
            self._roll_back(undo, error, heir=self.domain._undo)
            raise
        self._switched_on = True
        _LOG.info("altp2m of domain %d: switched on", self._domid)

    def _switch_off(self) -> None:
        if self._backend.altp2m_get_domain_state(self._domid):
            self._backend.altp2m_set_domain_state(self._domid, False)
            _LOG.info("altp2m of domain %d: switched off", self._domid)
        self.domain._journal.undone(altp2m=False)

    def _take_back(self) -> None:
        """Semantics: vCPUs out, views gone, altp2m off; switching it off does all three."""
        undo = UndoList()
        if self._switched_on:
            undo.push(f"altp2m of domain {self._domid}", self._switch_off)
        else:
            undo.push(
                f"vCPUs of domain {self._domid} outside view {self._prior_view}",
                self._switch_back,
            )
            for vcpu in sorted(self._notified):
                undo.push(
                    f"#VE page of vCPU {vcpu} of domain {self._domid}",
                    partial(self.disable_notify, vcpu),
                )
            for view in self.views:
                undo.push("", view.close)
            with suppress(XenError):
                self._switch_back()  # tried again once the views are gone
        undo.unwind(f"closing {self!r}")
        self.domain._journal.undone(used=False, prior_views=(), prior_view=0)

    @property
    def _prior_view(self) -> ViewId:
        """The view all vCPUs were in; 0 where they were in several."""
        return min(self._prior_views) if len(self._prior_views) == 1 else HOST_VIEW

    @uninterruptible
    def _switch_back(self) -> None:
        """Move vCPUs that were moved to the view they were in; to view 0 if that is gone."""
        if not self._moved:
            return
        try:
            self._backend.altp2m_switch_to_view(self._domid, self._prior_view)
        except InvalidArgumentError:
            if view_exists(self._backend, self._domid, self._prior_view):
                raise  # its owner hid it
            self._backend.altp2m_switch_to_view(self._domid, HOST_VIEW)
        except UnsupportedError:
            if self._backend.altp2m_get_domain_state(self._domid):
                raise
            # Somebody has switched altp2m off: nobody is in a view.
        self._moved, self._current = False, None

    def _vacate(self) -> None:
        """Move the vCPUs out of our views, wherever they may go."""
        self._moved = True
        try:
            self._switch_back()
        except InvalidArgumentError:
            self._backend.altp2m_switch_to_view(self._domid, HOST_VIEW)

    def _orphaned(self) -> bool:
        return self.domain._orphaned()

    def _gone(self) -> bool:
        """With its domain, or because somebody switched altp2m off."""
        if self._orphaned():
            return True
        try:
            return not self._backend.altp2m_get_domain_state(self._domid)
        except XenError:
            return False  # not known

    def _host_default(self) -> Access:
        """What ``Access.DEFAULT`` means now."""
        number = self._backend.altp2m_get_mem_access(self._domid, HOST_VIEW, ALL_GFNS)
        return self._backend.release.access_by_number[number]


def warning_of_default(access: Access, release: Release) -> UserWarning | None:
    """Say what a view's default access does not do on a release; None where it does all."""
    if access != Access.RWX and not release.lazy_copy_takes_view_default:
        return DecorativeDefaultWarning(
            f"Xen {release} gives pages the host's access, not the view's default {access}: set it "
            "with view.set_access(range(domain.maximum_gfn + 1), …)"
        )
    if access in _NOTHING_OF_A_SUPERPAGE and release.lazy_copy_takes_view_default:
        return SuperpageDefaultWarning(
            f"Xen {release} copies the host's superpages into a view, and with access {access} "
            "takes them for holes: a vCPU that touches one faults for ever, and setting one gfn "
            "undoes its neighbours (4.22). Boot Xen with hap_2mb=0 hap_1gb=0, or let the default "
            "be RWX and set the access of every gfn"
        )
    return None


def _log(lost: Lost) -> None:
    what = f"{len(lost.mismatches)} gfns differ" if lost.mismatches else "altp2m was switched off"
    if lost.reapplied:
        _LOG.warning("%r was reset, and is made again: %s", lost.view, what)
    elif lost.failure is not None:
        _LOG.error("%r was reset, and not all is made again: %s", lost.view, lost.failure.message)
    else:
        _LOG.warning("%r was reset: %s", lost.view, what)


def _mend(view: View, mismatches: Iterable[Mismatch]) -> None:
    """Make a view again, and look whether Xen has passed over some of it."""
    view.reapply()
    for one in mismatches:
        if view.access(one.gfn) != one.expected:
            raise NotMappedError(
                f"Xen passes over gfn {one.gfn:#x} of {view!r}: it is no ordinary RAM any more",
                op="altp2m_set_mem_access_multi",
                domid=view._domid,
                view=view.id,
                gfn=one.gfn,
            )


def _by_number(view: View) -> int:
    return int(view.id)
