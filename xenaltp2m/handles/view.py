# SPDX-License-Identifier: LGPL-2.1-or-later
"""A view of a domain's memory: its own access rights and its own remaps.

Xen may drop a view's entries without notice, so each view keeps a model of what was set in it: to
list how it differs from the host p2m, to verify it, and to roll back.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from xenaltp2m.errors import (
    InvalidArgumentError,
    NotMappedError,
)
from xenaltp2m.handles.base import Handle, UndoList
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.signals import guard, uninterruptible
from xenaltp2m.handles.view_entries import Owner, ViewEntries
from xenaltp2m.types import (
    ALL_GFNS,
    PAGE_SHIFT,
    Access,
    DomId,
    Gfn,
    SuppressVeFailure,
    ViewId,
)
from xenaltp2m.values.arguments import check_flag, check_kind, check_progress, check_sample
from xenaltp2m.values.gfns import (
    BATCH,
    Progress,
    check_gfn,
    check_gfns,
    gfn_array,
    neighbours,
)
from xenaltp2m.values.view_model import Difference, ViewModel

_LOG = logging.getLogger(__name__)

_BELOW_4_GIB = (1 << 20) - 1
_DEADLY = (Access.W, Access.WX)
_SUPERPAGE_ORDER = 9


class HoleWarning(UserWarning):
    """An access was set on a gfn that is not memory, and Xen has ignored it."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A gfn whose access in Xen differs from what was set."""

    gfn: Gfn
    expected: Access
    found: Access | None
    """None if the view has no entry for the gfn: Xen has skipped it when it was set, or has wiped
    it since."""


class View(Handle):
    """A view made by :meth:`xenaltp2m.handles.altp2m.Altp2m.create_view`; closing it destroys it.

    Attributes:
        label: A name for people.
        model: What was set in it.
        default_access: The access of pages that Xen copies from the host p2m on first use (from
            Xen 4.19; before, they get the host's access).
    """

    def __init__(
        self,
        context: DomainContext,
        owner: Owner,
        view_id: ViewId,
        default_access: Access,
        label: str | None,
    ) -> None:
        super().__init__()
        self._context, self._owner = context, owner
        self._backend = context.backend
        self.model = ViewModel()
        self._entries = ViewEntries(context, view_id, default_access, self.model)
        self._remap_low, self._remap_high = ALL_GFNS, 0
        self._highest = _BELOW_4_GIB
        """The highest gfn that may be memory, as far as is known."""
        self._visible = True
        self.label = label
        self.default_access = default_access
        self._undo.push(f"view {view_id} of domain {self.domid}", self._destroy)

    @property
    def id(self) -> ViewId:
        """Its number within the domain; it may change when altp2m is switched off and on."""
        return self._entries.id

    @property
    def domid(self) -> DomId:
        """The domain's number."""
        return self._entries.domid

    def __repr__(self) -> str:
        label = f" {self.label!r}" if self.label else ""
        return f"<View {self.id}{label} of domain {self.domid}>"

    # Access.

    def set_access(
        self, gfns: int | Iterable[int], access: Access, *, progress: Progress | None = None
    ) -> None:
        """Set the access of one gfn, or of many in bulk.

        Xen skips gfns that are not ordinary RAM (holes, MMIO, log-dirty pages) and reports
        success: :meth:`verify` finds them. A gfn from 4 GiB on that lies beyond all memory of the
        domain causes a warning, because it may be an address.

        On error nothing has changed: gfns that were set already are set back to the access that
        the view had, or would get on first use.

        Args:
            gfns: One gfn, a range, or any iterable of gfns.
            access: Any but ``W`` and ``WX``, which EPT cannot express: the guest would crash.
            progress: Called after each batch of a bulk operation; if it raises, the operation ends
                as on an error.

        Raises:
            InvalidArgumentError: A gfn is not in 0..2^36-1, or the access would crash the guest.
            UnsupportedError: This Xen does not support the access.
            OutOfMemoryError: The domain's p2m pool is exhausted.
            LeftoverError: Setting back failed, too.

        Warns:
            HoleWarning: A gfn lies beyond all memory.

        ``xc_altp2m_set_mem_access``, ``xc_altp2m_set_mem_access_multi``.
        """
        self.check_open()
        check_progress(progress)
        access = self._settled(access)
        self._entries.number(access)  # raises if it cannot be set
        if isinstance(gfns, int):
            check_gfn(gfns)
            with guard.holding_back():
                self._entries.write(gfns, access)
                self.model.access.set(gfns, access)
            self._warn_behind(gfns)
            return
        if isinstance(gfns, range):
            check_gfns(gfns)
        else:
            gfns = gfn_array(gfns)
        self._entries.set_many(gfns, access, progress, self._gone)
        if len(gfns):
            ends = (gfns[0], gfns[-1]) if isinstance(gfns, range) else gfns
            self._warn_behind(max(ends))

    def access(self, gfn: int) -> Access | None:
        """Return the access of the view's own entry for a gfn, or None if it has none.

        ``xc_altp2m_get_mem_access``: there is no fallback to the host p2m.
        """
        self.check_open()
        check_gfn(gfn)
        found = self._entries.own(gfn)
        if found is None:
            # The errno is the same for an absent entry and an absent domain; this call's is not.
            self._backend.altp2m_get_domain_state(self.domid)
        return found

    def effective_access(self, gfn: int) -> Access | None:
        """Return the access that applies to a vCPU in this view, or None if the gfn is a hole.

        This is the access of the view's own entry. Without one, it is the access that the page
        gets when Xen copies it on first use: the view's default from 4.19, the host's before.
        """
        found = self.access(gfn)
        return self._entries.lazy(gfn) if found is None else found

    # Remaps.

    @uninterruptible
    def remap(self, gfn: int, new_gfn: int, *, access: Access | None = None) -> None:
        """Remap a gfn in this view: ``gfn`` then shows the page of ``new_gfn``.

        Xen gives the remapped gfn the rights of the new gfn, so the access is set afterwards, and
        for a moment vCPUs in the view run with the new gfn's rights. Pause the domain
        (:meth:`xenaltp2m.handles.domain.Domain.paused`) if that matters.

        On error the gfn is as before.

        Args:
            gfn: The gfn whose page is replaced; ordinary RAM.
            new_gfn: The gfn whose page is shown; ordinary RAM. If this view remaps ``new_gfn``,
                too, ``gfn`` shows the page that ``new_gfn`` shows.
            access: The access of ``gfn`` from then on; None keeps its rights in the view.

        Raises:
            NotMappedError: One of the gfns is not ordinary RAM in the host p2m.
            OutOfMemoryError: The domain's p2m pool is exhausted.
            LeftoverError: Setting it back failed, too.

        ``xc_altp2m_change_gfn``, ``xc_altp2m_set_mem_access``.
        """
        self.check_open()
        check_gfn(gfn)
        check_gfn(new_gfn)
        own = self._entries.own(gfn)
        held = self._entries.lazy(gfn) if own is None else own
        wanted = held if access is None else self._settled(access)
        shown = None if own is None else self.model.remaps.get(gfn)
        undo = UndoList()
        with undo.rolling_back(unless=self._gone):
            if held is not None and wanted is not None:
                # change_gfn does not report if its last write fails (p2m_change_altp2m_gfn, 4.13
                # to 4.22). If a 4K entry exists before, that write needs no memory.
                self._entries.write(gfn, wanted)
                undo.push(
                    self._entries.words("access", gfn), lambda: self._entries.write(gfn, held)
                )
            self._backend.altp2m_change_gfn(self.domid, self.id, gfn, new_gfn)
            self._remap_low = min(self._remap_low, new_gfn)
            self._remap_high = max(self._remap_high, new_gfn)
            undo.forget()
            undo.push(
                self._entries.words("remap", gfn), lambda: self._entries.show_again(gfn, shown, own)
            )
            if wanted is not None:
                self._entries.write(gfn, wanted)
        target = self.model.remaps.get(new_gfn, new_gfn)
        self.model.remaps.pop(gfn, None)
        if target != gfn:  # reverting a gfn that shows its own page would do harm
            self.model.remaps[gfn] = target
        self.model.access.set(gfn, wanted)
        self.model.suppress_ve.set(gfn, None)  # Xen sets the bit if the caller is another domain

    @uninterruptible
    def revert(self, gfn: int) -> None:
        """Revert a remap: the gfn shows its own page again. Its access is reset, too.

        Only gfns that this view has remapped can be reverted: reverting any other would cut Xen's
        reverse map of the guest's own page, and a live migration would lose writes to that page.

        Raises:
            InvalidArgumentError: The view does not remap the gfn.
            LeftoverError: It is reverted, but the view has no entry for it: do not set its access
                or remap it again in this view, because Xen would drop its neighbours' entries.

        ``xc_altp2m_change_gfn`` with ``~0``.
        """
        self.check_open()
        check_gfn(gfn)
        if gfn not in self.model.remaps:
            raise InvalidArgumentError(
                f"{self!r} does not remap gfn {gfn:#x}: there is nothing to revert",
                op="altp2m_change_gfn",
                domid=self.domid,
                view=self.id,
                gfn=gfn,
            )
        wiped = self.access(gfn) is None
        if not wiped:
            self._entries.revert(gfn)
        del self.model.remaps[gfn]
        self.model.access.set(gfn, None)
        self.model.suppress_ve.set(gfn, None)
        if not wiped:
            undo = UndoList()
            undo.push(self._entries.words("missing entry", gfn), lambda: self._entries.fill(gfn))
            undo.unwind(f"reverting gfn {gfn:#x} of {self!r}")

    @property
    def remaps(self) -> dict[Gfn, Gfn]:
        """The view's remaps, gfn to new gfn: a copy."""
        return {Gfn(old): Gfn(new) for old, new in sorted(self.model.remaps.items())}

    def tracks(self, gfn: int) -> bool:
        """Check whether Xen resets this view when ``gfn`` is removed from the domain.

        Xen keeps the lowest and highest gfn ever remapped to, and never shrinks that range.
        """
        check_gfn(gfn)
        return self._remap_low <= gfn <= self._remap_high

    # Suppress #VE.

    def set_suppress_ve(
        self, gfns: int | Iterable[int], suppress: bool = True
    ) -> list[SuppressVeFailure]:
        """Set the suppress-#VE bit: whether violations go to Xen (True) or may raise #VE.

        On error the runs of consecutive gfns before the failing run are set.

        Args:
            gfns: One gfn, a range, or any iterable of gfns; each run of consecutive gfns is one
                call.
            suppress: The bit. If the view has no entry for a gfn yet, Xen may make one with the
                host's access (``p2m_set_suppress_ve_multi``), to which the view's default no
                longer applies: set the access of such gfns as well.

        Returns:
            The first failure of each run, because Xen tries every gfn and reports only the first
            that failed. Empty for one gfn, whose failure is raised.

        Raises:
            NotMappedError: The one gfn is not ordinary RAM.

        ``xc_altp2m_set_suppress_ve``, ``xc_altp2m_set_supress_ve_multi``.
        """
        self.check_open()
        check_flag("suppress", suppress)
        if isinstance(gfns, int):
            check_gfn(gfns)
            self._entries.populate(gfns, gfns)
            with guard.holding_back():
                self._backend.altp2m_set_suppress_ve(self.domid, self.id, gfns, suppress)
                self.model.suppress_ve.set(gfns, suppress)
            return []
        if isinstance(gfns, range) and gfns.step == 1:
            check_gfns(gfns)
            runs = iter([(gfns.start, gfns.stop - 1)] if gfns else [])
        else:
            runs = neighbours(gfn_array(gfns))
        return self._entries.set_suppress_runs(runs, suppress)

    def suppress_ve(self, gfn: int) -> bool | None:
        """Return the suppress-#VE bit of the view's own entry for a gfn, or None without one.

        ``xc_altp2m_get_suppress_ve``.
        """
        self.check_open()
        check_gfn(gfn)
        try:
            return self._backend.altp2m_get_suppress_ve(self.domid, self.id, gfn)
        except NotMappedError:
            self._backend.altp2m_get_domain_state(self.domid)  # as for access()
            return None

    # Visibility.

    @property
    def visible(self) -> bool:
        """Whether the guest's VMFUNC and domain-wide switches can reach the view."""
        return self._visible

    @uninterruptible
    def set_visibility(self, visible: bool) -> None:
        """Hide the view, or show it again; vCPUs in it stay. ``xc_altp2m_set_visibility``."""
        self.check_open()
        check_flag("visible", visible)
        self._backend.altp2m_set_visibility(self.domid, self.id, visible)
        self._visible = visible

    # Verify and restore.

    def differences(self) -> list[Difference]:
        """List what was set in this view, as runs of gfns, without a hypercall."""
        return self.model.differences()

    def verify(
        self, *, sample: int | None = None, progress: Progress | None = None
    ) -> list[Mismatch]:
        """Compare the access that was set with the access in Xen, and list the differences.

        Xen has no bulk query, so this makes one call per gfn. Xen does not report remaps: a remap
        that was reset is found only if its gfn's access differs from the host's.

        Args:
            sample: How many gfns to check, chosen at random; None checks all of them. Xen
                resets either a whole view, or the entries that changed in the host p2m.
            progress: Called after each batch of gfns.

        ``xc_altp2m_get_mem_access``.
        """
        self.check_open()
        check_sample(sample)
        check_progress(progress)
        self._backend.altp2m_get_domain_state(self.domid)  # an absent domain is not a mismatch
        self._backend.altp2m_get_mem_access(self.domid, self.id, ALL_GFNS)
        chosen = self.model.access.sample(sample)
        mismatches = []
        for done, (gfn, expected) in enumerate(chosen, 1):
            found = self._entries.own(gfn)
            if found != expected:
                mismatches.append(Mismatch(Gfn(gfn), expected, found))
            if progress is not None and (done % BATCH == 0 or done == len(chosen)):
                progress(done, len(chosen))
        return mismatches

    @uninterruptible
    def reapply(self, *, progress: Progress | None = None) -> None:
        """Restore everything that was set in this view, after Xen has reset it.

        Remaps are restored first: until its access is set, a remapped gfn has the rights of its new
        gfn, and a gfn that others are remapped to may show its own page. Pause the domain if that
        matters.

        On error the rest is restored all the same.

        Args:
            progress: Called after each batch of gfns whose access is set.

        Raises:
            NotMappedError: A remapped gfn, or its new gfn, is not ordinary RAM any more.
            BusyError: Some gfns show each other's pages: nothing was restored.

        ``xc_altp2m_change_gfn``, ``xc_altp2m_set_mem_access_multi``.
        """
        self.check_open()
        check_progress(progress)
        self._entries.reapply(self.remaps_in_order(), progress)

    def create_again(self) -> None:
        """Create the view again, because altp2m was switched off or the domain was migrated."""
        self.check_open()
        self._entries.domid = self._context.domid
        number = self._backend.release.access_numbers[self.default_access]
        with guard.holding_back():
            self._entries.id = ViewId(self._backend.altp2m_create_view(self.domid, number))
            self._undo.forget()
            self._undo.push(f"view {self.id} of domain {self.domid}", self._destroy)
        self._remap_low = min(self.model.remaps.values(), default=ALL_GFNS)
        self._remap_high = max(self.model.remaps.values(), default=0)
        self.reapply()

    # Inside.

    def _warn_behind(self, gfn: int) -> None:
        """Warn of a gfn beyond all memory; below 4 GiB the check is not worth a hypercall."""
        if gfn <= self._highest:
            return
        last = self._context.maximum_gfn
        self._highest = max(self._highest, last)
        if gfn > last:
            warnings.warn(_hole_words(gfn, last), HoleWarning, stacklevel=3)

    def _settled(self, access: Access) -> Access:
        """Replace ``DEFAULT`` by the access that it stands for now."""
        check_kind("access", access, Access, "an Access")
        return self._owner.host_default() if access is Access.DEFAULT else access

    def remaps_in_order(self) -> list[tuple[int, int]]:
        """List the remaps in an order in which they can be made.

        A gfn comes before its own new gfn is remapped, because Xen remaps to the page that the view
        shows at the new gfn.

        Raises:
            BusyError: Some gfns show each other's pages.
        """
        return self._entries.remaps_in_order()

    def _orphaned(self) -> bool:
        return self._context.is_gone()

    def _gone(self) -> bool:
        return self._owner.is_gone()

    def _destroy(self) -> None:
        self._entries.destroy(self._owner)
        _LOG.info("%r: destroyed", self)


def _hole_words(gfn: int, last: int) -> str:
    words = f"gfn {gfn:#x} is not memory, so Xen has ignored it: the highest gfn is {last:#x}"
    if gfn >> PAGE_SHIFT <= last:
        words += f". If {gfn:#x} is an address, its gfn is {gfn >> PAGE_SHIFT:#x}"
    return words
