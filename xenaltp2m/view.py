# SPDX-License-Identifier: LGPL-2.1-or-later
"""A view of a domain's memory: its own access rights and its own remaps.

Xen may forget a view's entries behind its owner's back, so each view keeps a model of what was
asked of it: to say what differs from the host p2m, to verify it, and to roll back.
"""

from __future__ import annotations

import logging
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from xenaltp2m.abi.releases import Release
from xenaltp2m.arguments import check_flag, check_kind, check_progress, check_sample
from xenaltp2m.errors import (
    BusyError,
    InvalidArgumentError,
    LeftoverError,
    NotMappedError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handle import Handle, UndoList, in_words
from xenaltp2m.runs import Runs
from xenaltp2m.signals import guard, uninterruptible
from xenaltp2m.types import (
    ALL_GFNS,
    GFN_LIMIT,
    HOST_VIEW,
    PAGE_SHIFT,
    Access,
    DomId,
    Gfn,
    SuppressVeFailure,
    ViewId,
)

if TYPE_CHECKING:
    from xenaltp2m.altp2m import Altp2m
    from xenaltp2m.backend import Backend

_LOG = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (gfns done, gfns in all) as a long operation goes on."""

BATCH = 1 << 16
"""Gfns in one bulk call: Xen preempts itself within it, and progress is shown between."""

_BELOW_4_GIB = (1 << 20) - 1
_BLOCK = 1 << 16
_DEADLY = (Access.W, Access.WX)
_SUPERPAGE_ORDER = 9


class HoleWarning(UserWarning):
    """An access was asked for where there is no memory, and Xen has ignored it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A run of gfns in which a view differs from the host p2m, as far as it was asked to."""

    first: Gfn
    count: int
    access: Access | None
    """The access set, or None where only Xen's default applies."""
    remapped_to: Gfn | None
    """What the first gfn shows instead of its own page; the others follow on."""
    suppress_ve: bool | None
    """The suppress-#VE bit set, or None where it was left alone."""

    @property
    def last(self) -> Gfn:
        """The last gfn of the run."""
        return Gfn(self.first + self.count - 1)

    def goes_on_in(self, other: Difference) -> bool:
        """Tell whether ``other`` is the same difference, in the gfns that follow."""
        new = self.remapped_to
        expected = replace(
            self,
            first=Gfn(self.first + self.count),
            count=other.count,
            remapped_to=None if new is None else Gfn(new + self.count),
        )
        return other == expected


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A gfn whose access in Xen is not what was set."""

    gfn: Gfn
    expected: Access
    found: Access | None
    """None where the view has no entry for the gfn: never taken, or wiped by Xen."""


class View(Handle):
    """A view made by :meth:`xenaltp2m.altp2m.Altp2m.create_view`; closing it destroys it.

    Attributes:
        id: Its number within the domain.
        label: A name for people.
        default_access: What pages get that the view copies from the host on first use (from Xen
            4.19; before, they get the host's access).
    """

    def __init__(
        self, altp2m: Altp2m, view_id: ViewId, default_access: Access, label: str | None
    ) -> None:
        super().__init__()
        self._altp2m = altp2m
        self._backend = altp2m.domain.xen.backend
        self._domid = altp2m.domain.domid
        self._numbers = self._backend.release.access_numbers
        self._access: Runs[Access] = Runs()
        self._remaps: dict[int, int] = {}
        self._remap_low = ALL_GFNS
        self._remap_high = 0
        self._suppress_ve: Runs[bool] = Runs()
        self._highest = _BELOW_4_GIB
        """Up to which gfn there may be memory, as far as is known."""
        self._visible = True
        self.id = view_id
        self.label = label
        self.default_access = default_access
        self._undo.push(f"view {view_id} of domain {self._domid}", self._destroy)

    def __repr__(self) -> str:
        label = f" {self.label!r}" if self.label else ""
        return f"<View {self.id}{label} of domain {self._domid}>"

    # Access.

    def set_access(
        self, gfns: int | Iterable[int], access: Access, *, progress: Progress | None = None
    ) -> None:
        """Set what the guest may do with one gfn, or with many in bulk.

        Xen passes over gfns that are not ordinary RAM (holes, MMIO, log-dirty pages) and calls
        that success: :meth:`verify` finds them. One from 4 GiB on that is behind all memory of the
        domain warns: it may be an address.

        On error nothing has changed: what was set already is set back, to what the view had, or
        would show by itself.

        Args:
            gfns: One gfn, a range, or any iterable of gfns.
            access: Any but ``W`` and ``WX``, which EPT cannot express: the guest would crash.
            progress: Called after each batch of a bulk operation; what it raises ends that, as an
                error would.

        Raises:
            InvalidArgumentError: A gfn is not in 0..2^36-1, or the access kills the guest.
            UnsupportedError: This Xen does not know the access.
            OutOfMemoryError: The domain's p2m pool is exhausted.
            LeftoverError: Setting back failed too.

        Warns:
            HoleWarning: A gfn is behind all memory.

        ``xc_altp2m_set_mem_access``, ``xc_altp2m_set_mem_access_multi``.
        """
        self._check_open()
        check_progress(progress)
        access = self._settled(access)
        number = self._number(access)
        if isinstance(gfns, int):
            check_gfn(gfns)
            with guard.holding_back():
                self._backend.altp2m_set_mem_access(self._domid, self.id, gfns, number)
                self._access.set(gfns, access)
            self._warn_behind(gfns)
            return
        if isinstance(gfns, range):
            check_gfns(gfns)
        else:
            gfns = gfn_array(gfns)
        self._set_many(gfns, access, number, progress)
        if len(gfns):
            ends = (gfns[0], gfns[-1]) if isinstance(gfns, range) else gfns
            self._warn_behind(max(ends))

    @uninterruptible
    def _set_many(
        self, gfns: range | array[int], access: Access, number: int, progress: Progress | None
    ) -> None:
        total = len(gfns)
        numbers = bytes([number]) * min(total, BATCH)
        reached = 0
        try:
            for batch in batches(gfns):
                reached += len(batch)
                self._backend.altp2m_set_mem_access_multi(
                    self._domid, self.id, numbers[: len(batch)], batch
                )
                _so_far(progress, reached, total)
        except BaseException as error:
            self._set_back(memoryview(gfn_array(gfns[:reached])), error)
            raise
        self._access.set_many(gfns, access)

    def access(self, gfn: int) -> Access | None:
        """Return the access of the view's own entry, or None if it has none yet.

        ``xc_altp2m_get_mem_access``: there is no fallback to the host p2m.
        """
        self._check_open()
        check_gfn(gfn)
        found = self._own_access(gfn)
        if found is None:
            # The errno does not tell an absent entry from an absent domain; this call does.
            self._backend.altp2m_get_domain_state(self._domid)
        return found

    def effective_access(self, gfn: int) -> Access | None:
        """Return the access a vCPU in this view meets, or None if the gfn is a hole.

        That is the access of the view's own entry, or else what Xen gives the page when it
        copies it on first use: the view's default from 4.19, the host's access before.
        """
        found = self.access(gfn)
        return self._lazy_access(gfn) if found is None else found

    # Remaps.

    @uninterruptible
    def remap(self, gfn: int, new_gfn: int, *, access: Access | None = None) -> None:
        """Let ``gfn`` show the page of ``new_gfn`` in this view.

        Xen gives the remapped page the new gfn's rights, so its access is set afterwards; vCPUs
        that run in the view may meet those rights in between. Pause the domain
        (:meth:`xenaltp2m.domain.Domain.paused`) where that matters.

        On error the gfn is as before.

        Args:
            gfn: The gfn whose page is replaced; ordinary RAM.
            new_gfn: The gfn whose page is shown; ordinary RAM. If this view remaps it, too, what
                it shows is shown.
            access: The access the gfn gets; None keeps the rights it has in the view.

        Raises:
            NotMappedError: One of the gfns is not ordinary RAM in the host p2m.
            OutOfMemoryError: The domain's p2m pool is exhausted.
            LeftoverError: Setting it back failed too.

        ``xc_altp2m_change_gfn``, ``xc_altp2m_set_mem_access``.
        """
        self._check_open()
        check_gfn(gfn)
        check_gfn(new_gfn)
        own = self._own_access(gfn)
        held = self._lazy_access(gfn) if own is None else own
        wanted = held if access is None else self._settled(access)
        shown = None if own is None else self._remaps.get(gfn)
        undo = UndoList()
        try:
            if held is not None and wanted is not None:
                # change_gfn reports no failure of its last write (p2m_change_altp2m_gfn, 4.13 to
                # 4.22). With an entry of 4K there before, that write needs no memory.
                self._write_access(gfn, wanted)
                undo.push(self._words("access", gfn), lambda: self._write_access(gfn, held))
            self._backend.altp2m_change_gfn(self._domid, self.id, gfn, new_gfn)
            self._remap_low = min(self._remap_low, new_gfn)
            self._remap_high = max(self._remap_high, new_gfn)
            undo.forget()
            undo.push(self._words("remap", gfn), lambda: self._show_again(gfn, shown, own))
            if wanted is not None:
                self._write_access(gfn, wanted)
        except BaseException as error:
            self._roll_back(undo, error)
            raise
        target = self._remaps.get(new_gfn, new_gfn)
        self._remaps.pop(gfn, None)
        if target != gfn:  # of its own page, reverting would do harm
            self._remaps[gfn] = target
        self._access.set(gfn, wanted)
        self._suppress_ve.set(gfn, None)  # Xen sets it, for a caller outside the domain

    @uninterruptible
    def revert(self, gfn: int) -> None:
        """Let a remapped gfn show its own page again; an access set on it is forgotten with it.

        Only gfns this view remapped: reverting another would cut Xen's reverse map of the
        guest's own page, and a live migration would lose what is written to it.

        Raises:
            InvalidArgumentError: The view does not remap the gfn.
            LeftoverError: It is reverted, but the view has no entry for it: do not set its access
                or remap it again in this view, for Xen would forget what neighbours have.

        ``xc_altp2m_change_gfn`` with ``~0``.
        """
        self._check_open()
        check_gfn(gfn)
        if gfn not in self._remaps:
            raise InvalidArgumentError(
                f"{self!r} does not remap gfn {gfn:#x}: there is nothing to revert",
                op="altp2m_change_gfn",
                domid=self._domid,
                view=self.id,
                gfn=gfn,
            )
        wiped = self.access(gfn) is None
        if not wiped:
            self._revert(gfn)
        del self._remaps[gfn]
        self._access.set(gfn, None)
        self._suppress_ve.set(gfn, None)
        if not wiped:
            undo = UndoList()
            undo.push(self._words("missing entry", gfn), lambda: self._fill(gfn))
            undo.unwind(f"reverting gfn {gfn:#x} of {self!r}")

    @property
    def remaps(self) -> dict[Gfn, Gfn]:
        """What is remapped to what: a copy."""
        return {Gfn(old): Gfn(new) for old, new in sorted(self._remaps.items())}

    def tracks(self, gfn: int) -> bool:
        """Tell whether Xen resets this view when ``gfn`` is taken from the domain.

        Xen keeps the lowest and highest gfn ever remapped to, and never shrinks that range.
        """
        check_gfn(gfn)
        return self._remap_low <= gfn <= self._remap_high

    # Suppress #VE.

    def set_suppress_ve(
        self, gfns: int | Iterable[int], suppress: bool = True
    ) -> list[SuppressVeFailure]:
        """Choose whether a violation on these gfns is Xen's (True) or may become the guest's #VE.

        On error the runs of neighbours before the failing one are set.

        Args:
            gfns: One gfn, a range, or any iterable of gfns; each run of neighbours is one call.
            suppress: The bit. Where the view has no entry yet, Xen may make one with the host's
                access (``p2m_set_suppress_ve_multi``), which the view's default then no longer
                covers: set the access of such gfns as well.

        Returns:
            The first failure of each run of neighbours, for Xen tries every gfn and tells the
            first that failed. Empty for one gfn: its failure is raised.

        Raises:
            NotMappedError: The one gfn is not ordinary RAM.

        ``xc_altp2m_set_suppress_ve``, ``xc_altp2m_set_supress_ve_multi``.
        """
        self._check_open()
        check_flag("suppress", suppress)
        if isinstance(gfns, int):
            check_gfn(gfns)
            self._populate(gfns, gfns)
            with guard.holding_back():
                self._backend.altp2m_set_suppress_ve(self._domid, self.id, gfns, suppress)
                self._suppress_ve.set(gfns, suppress)
            return []
        failures = []
        if isinstance(gfns, range) and gfns.step == 1:
            check_gfns(gfns)
            runs = iter([(gfns.start, gfns.stop - 1)] if gfns else [])
        else:
            runs = neighbours(gfn_array(gfns))
        for first, last in runs:
            self._populate(first, min(last, self._altp2m.domain.maximum_gfn))
            with guard.holding_back():
                failure = self._backend.altp2m_set_suppress_ve_multi(
                    self._domid, self.id, first, last, suppress
                )
                self._suppress_ve.set_many(range(first, last + 1), suppress)
            if failure is not None:
                failures.append(SuppressVeFailure(Gfn(failure[0]), failure[1]))
        return failures

    def suppress_ve(self, gfn: int) -> bool | None:
        """Return the suppress-#VE bit of the view's own entry, or None if it has none.

        ``xc_altp2m_get_suppress_ve``.
        """
        self._check_open()
        check_gfn(gfn)
        try:
            return self._backend.altp2m_get_suppress_ve(self._domid, self.id, gfn)
        except NotMappedError:
            self._backend.altp2m_get_domain_state(self._domid)  # as for access()
            return None

    # Visibility.

    @property
    def visible(self) -> bool:
        """Whether the guest's VMFUNC and a domain-wide switch reach the view."""
        return self._visible

    @uninterruptible
    def set_visibility(self, visible: bool) -> None:
        """Hide the view or show it again; vCPUs in it stay. ``xc_altp2m_set_visibility``."""
        self._check_open()
        check_flag("visible", visible)
        self._backend.altp2m_set_visibility(self._domid, self.id, visible)
        self._visible = visible

    # What it should be, and what it is.

    def differences(self) -> list[Difference]:
        """List what was asked of this view, as runs of gfns; no hypercall is made."""
        edges = {gfn for run in self._access for gfn in (run.first, run.end)}
        edges |= {gfn for run in self._suppress_ve for gfn in (run.first, run.end)}
        edges |= {edge for gfn in self._remaps for edge in (gfn, gfn + 1)}
        found: list[Difference] = []
        for first, end in pairwise(sorted(edges)):
            new = self._remaps.get(first)
            this = Difference(
                Gfn(first),
                end - first,
                self._access.get(first),
                None if new is None else Gfn(new),
                self._suppress_ve.get(first),
            )
            if (this.access, this.remapped_to, this.suppress_ve) == (None, None, None):
                continue
            if found and found[-1].goes_on_in(this):
                found[-1] = replace(found[-1], count=found[-1].count + this.count)
            else:
                found.append(this)
        return found

    def verify(
        self, *, sample: int | None = None, progress: Progress | None = None
    ) -> list[Mismatch]:
        """Ask Xen for the access of gfns it was set on, and list where it differs.

        One call for each gfn: Xen has no bulk query. Nor does it tell what a gfn is remapped to: a
        remap that was undone shows where the gfn's access is another than the host's.

        Args:
            sample: How many gfns are looked at, chosen at random; None looks at all of them. Xen
                resets all of a view, or the entries that the host p2m has changed.
            progress: Called after each batch of gfns.

        ``xc_altp2m_get_mem_access``.
        """
        self._check_open()
        check_sample(sample)
        check_progress(progress)
        self._backend.altp2m_get_domain_state(self._domid)  # an absent domain is not a mismatch
        self._backend.altp2m_get_mem_access(self._domid, self.id, ALL_GFNS)
        chosen = self._access.sample(sample)
        mismatches = []
        for done, (gfn, expected) in enumerate(chosen, 1):
            found = self._own_access(gfn)
            if found != expected:
                mismatches.append(Mismatch(Gfn(gfn), expected, found))
            if progress is not None and (done % BATCH == 0 or done == len(chosen)):
                progress(done, len(chosen))
        return mismatches

    @uninterruptible
    def reapply(self, *, progress: Progress | None = None) -> None:
        """Ask Xen again for all that was asked of this view, because Xen has reset it.

        Remaps come first, and show their new pages with these pages' rights until the access is
        set; gfns that are remapped to may show their own pages meanwhile. Pause the domain where
        that matters.

        On error what else can be made is made.

        Args:
            progress: Called after each batch of gfns whose access is set.

        Raises:
            NotMappedError: A gfn that is remapped, or its new gfn, is no ordinary RAM any more.
            BusyError: Some gfns show each other's pages: nothing was made.

        ``xc_altp2m_change_gfn``, ``xc_altp2m_set_mem_access_multi``.
        """
        self._check_open()
        check_progress(progress)
        failures: list[XenError] = []
        for gfn, new_gfn in self._remaps_in_order():
            # Of a remap without its access the guest would write to the new page, not to its own.
            with _noting(failures):
                if new_gfn in self._remaps:
                    self._show_own(new_gfn)
                self._backend.altp2m_change_gfn(self._domid, self.id, gfn, new_gfn)
        total, done = self._access.count(), 0
        for run in self._access:
            numbers = bytes([self._number(run.value)]) * min(run.end - run.first, BATCH)
            for batch in batches(range(run.first, run.end)):
                with _noting(failures):
                    self._backend.altp2m_set_mem_access_multi(
                        self._domid, self.id, numbers[: len(batch)], batch
                    )
                done += len(batch)
                _so_far(progress, done, total)
        for bit in self._suppress_ve:
            with _noting(failures):
                self._backend.altp2m_set_suppress_ve_multi(
                    self._domid, self.id, bit.first, bit.end - 1, bit.value
                )
        if failures:
            raise failures[0]

    def _create_again(self) -> None:
        """Make it anew: altp2m was off meanwhile, and Xen has forgotten it, or never had it."""
        release = self._backend.release
        self._domid = self._altp2m.domain.domid
        number = release.access_numbers[self.default_access]
        with guard.holding_back():
            self.id = ViewId(self._backend.altp2m_create_view(self._domid, number))
            self._undo.forget()
            self._undo.push(f"view {self.id} of domain {self._domid}", self._destroy)
        self._remap_low = min(self._remaps.values(), default=ALL_GFNS)
        self._remap_high = max(self._remaps.values(), default=0)
        self.reapply()

    def _renumber(self, gfns: Mapping[int, int]) -> None:
        """Have other gfns in place of some: added pages that are elsewhere now."""
        self._access.move(gfns)
        self._suppress_ve.move(gfns)
        remaps = [(gfns.get(gfn, gfn), gfns.get(new, new)) for gfn, new in self._remaps.items()]
        self._remaps = dict(remaps)

    # Inside.

    def _number(self, access: Access) -> int:
        number = self._numbers.get(access)
        if number is None or access in _DEADLY:
            raise refusal_of(access, self._backend.release)
        return number

    def _warn_behind(self, gfn: int) -> None:
        """Warn of a gfn behind all memory; below 4 GiB that is not worth a hypercall."""
        if gfn <= self._highest:
            return
        last = self._altp2m.domain.maximum_gfn
        self._highest = max(self._highest, last)
        if gfn <= last:
            return
        words = f"gfn {gfn:#x} is not memory, and Xen has ignored it: the highest gfn is {last:#x}"
        if gfn >> PAGE_SHIFT <= last:
            words += f". If {gfn:#x} is an address, its gfn is {gfn >> PAGE_SHIFT:#x}"
        warnings.warn(words, HoleWarning, stacklevel=3)

    def _write_access(self, gfn: int, access: Access) -> None:
        self._backend.altp2m_set_mem_access(self._domid, self.id, gfn, self._number(access))

    def _own_access(self, gfn: int) -> Access | None:
        return own_access(self._backend, self._domid, self.id, gfn)

    def _lazy_access(self, gfn: int) -> Access | None:
        """What a gfn without an entry of its own gets when it is first used."""
        host = own_access(self._backend, self._domid, HOST_VIEW, gfn)
        if host is not None and self._backend.release.lazy_copy_takes_view_default:
            return self.default_access
        return host

    def _settled(self, access: Access) -> Access:
        """What ``DEFAULT`` means now; any other access is itself."""
        check_kind("access", access, Access, "an Access")
        if access is not Access.DEFAULT:
            return access
        return self._altp2m._host_default()

    def _words(self, what: str, gfn: int) -> str:
        return f"{what} of gfn {gfn:#x} in view {self.id} of domain {self._domid}"

    def _show_again(self, gfn: int, shown: int | None, own: Access | None) -> None:
        """Put back the entry that a gfn had before a remap.

        Args:
            gfn: The gfn.
            shown: The gfn whose page it showed; None if its own.
            own: The access it had; None if it had no entry.
        """
        if shown in self._remaps:
            raise BusyError(
                f"gfn {gfn:#x} showed the page of gfn {shown:#x}, which is remapped itself by now",
                op="altp2m_change_gfn",
                domid=self._domid,
                view=self.id,
                gfn=gfn,
            )
        if shown is None:
            self._revert(gfn)
            self._fill(gfn)
        else:
            self._backend.altp2m_change_gfn(self._domid, self.id, gfn, shown)
        if self._suppress_ve.get(gfn) is False:
            self._backend.altp2m_set_suppress_ve(self._domid, self.id, gfn, False)
        if own is not None:
            self._write_access(gfn, own)

    def _remaps_in_order(self) -> list[tuple[int, int]]:
        """List what is remapped to what, each before its new gfn is remapped itself.

        For Xen takes the page that the view shows at the new gfn then. What can come first comes
        by gfn, so that it does not matter how it came to be.
        """
        waiting = Counter(new for new in self._remaps.values() if new in self._remaps)
        ready = sorted(gfn for gfn in self._remaps if not waiting[gfn])
        found = []
        while ready:
            gfn = heappop(ready)
            new = self._remaps[gfn]
            found.append((gfn, new))
            waiting[new] -= 1
            if not waiting[new] and new in self._remaps:
                heappush(ready, new)
        if len(found) < len(self._remaps):
            some = min(gfn for gfn, count in waiting.items() if count > 0)
            raise BusyError(
                f"gfn {some:#x} and others show each other's pages in {self!r}, which takes a "
                "third gfn to make: revert one, and remap them again",
                op="altp2m_change_gfn",
                domid=self._domid,
                view=self.id,
                gfn=some,
            )
        return found

    def _show_own(self, gfn: int) -> None:
        """Have a gfn that is to be remapped show its own page, for another to be remapped to it."""
        if self._own_access(gfn) is None:
            return
        # What Xen has made of the guest's own page: to revert that would do harm.
        self._backend.altp2m_change_gfn(self._domid, self.id, gfn, self._remaps[gfn])
        self._revert(gfn)
        self._fill(gfn)

    def _revert(self, gfn: int) -> None:
        """Have Xen drop the entry of a remapped gfn, which takes a page from the view's table."""
        self._backend.altp2m_change_gfn(self._domid, self.id, gfn, ALL_GFNS)
        self._altp2m.domain._removed()

    def _fill(self, gfn: int) -> None:
        """Give a reverted gfn the entry that it would get on first use.

        Without one, setting its access or remapping it again would have Xen copy the host's whole
        superpage into the view first (``altp2m_get_effective_entry``), over all that its
        neighbours have there; up to 4.16 the guest's first use would, too. The suppress-#VE call
        is the one that makes a 4K entry without that copy.
        """
        try:
            self._backend.altp2m_set_suppress_ve(self._domid, self.id, gfn, True)
        except NotMappedError:
            return  # the host has it no more
        if self._backend.release.lazy_copy_takes_view_default:
            self._write_access(gfn, self.default_access)

    def _populate(self, first: int, last: int) -> None:
        """Have Xen copy the host's superpages of a run of gfns before a call that does not.

        Else a later call that does would copy them over the entries made by this one.
        """
        for block in range(first >> _SUPERPAGE_ORDER, (last >> _SUPERPAGE_ORDER) + 1):
            gfn = max(first, block << _SUPERPAGE_ORDER)
            if self._own_access(gfn) is None and (lazy := self._lazy_access(gfn)) is not None:
                self._write_access(gfn, lazy)

    def _set_back(self, gfns: memoryview, cause: BaseException) -> None:
        """Put back the access of gfns of which Xen may have set some, up to the failing one."""
        try:
            for done in range(0, len(gfns), BATCH):
                batch = gfns[done : done + BATCH]
                numbers = bytes(self._numbers[self._prior_access(gfn)] for gfn in batch)
                self._backend.altp2m_set_mem_access_multi(self._domid, self.id, numbers, batch)
        except XenError as failure:
            if self._gone():
                return
            left = self._not_back(gfns)
            if not left:
                return  # memory ran out at the same gfn as before, with all before it back
            words = f"access of {len(left)} gfns from {min(left):#x} to {max(left):#x}"
            raise LeftoverError(
                f"{in_words(cause)}; and setting back failed: {failure.message}",
                left=[f"{words} in view {self.id} of domain {self._domid}"],
                **failure.context(),
            ) from cause

    def _prior_access(self, gfn: int) -> Access:
        """What the view had for a gfn, or would show by itself; DEFAULT for a hole."""
        held = self._access.get(gfn)
        if held is None:
            held = self._lazy_access(gfn)
        return Access.DEFAULT if held is None else held

    def _not_back(self, gfns: memoryview) -> list[int]:
        """List the gfns whose access is not the prior one, or cannot be known."""
        left = []
        for gfn in gfns:
            try:
                found = self._own_access(gfn)
                if found is None or found == self._prior_access(gfn):
                    continue
            except XenError:
                pass
            left.append(gfn)
        return left

    def _orphaned(self) -> bool:
        return self._altp2m._orphaned()

    def _gone(self) -> bool:
        return self._altp2m._gone()

    def _destroy(self) -> None:
        try:
            self._backend.altp2m_destroy_view(self._domid, self.id)
        except BusyError:
            if self.id not in self._altp2m.vcpu_views().values():
                if view_exists(self._backend, self._domid, self.id):
                    raise
                return  # EBUSY is also Xen's word for no such view
            self._altp2m._vacate()
            self._backend.altp2m_destroy_view(self._domid, self.id)
        _LOG.info("%r: destroyed", self)


def _so_far(progress: Progress | None, done: int, total: int) -> None:
    """Tell how far a long operation is, and let signals through."""
    if progress is None:
        guard.checkpoint()
    else:
        guard.checkpoint(partial(progress, done, total))


@contextmanager
def _noting(failures: list[XenError]) -> Iterator[None]:
    try:
        yield
    except XenError as failure:
        failures.append(failure)


def own_access(backend: Backend, domid: DomId, view: ViewId, gfn: int) -> Access | None:
    """Return the access of a view's own entry, or None if it has none."""
    try:
        number = backend.altp2m_get_mem_access(domid, view, gfn)
    except NotMappedError:
        return None
    return backend.release.access_by_number[number]


def view_exists(backend: Backend, domid: DomId, view: ViewId) -> bool:
    """Tell whether a view exists, by a call that tells it from an absent entry."""
    try:
        backend.altp2m_get_suppress_ve(domid, view, 0)
    except InvalidArgumentError:
        return False
    except NotMappedError:
        return True  # and has no entry for gfn 0
    return True


def existing_views(backend: Backend, domid: DomId) -> list[ViewId]:
    """List the views there are, view 0 included."""
    numbers = map(ViewId, range(backend.release.most_views))
    return [number for number in numbers if view_exists(backend, domid, number)]


def refusal_of(access: Access, release: Release) -> XenError:
    """Make the error for an access that cannot be set on this release."""
    op = "altp2m_set_mem_access"
    if not isinstance(access, Access):
        return InvalidArgumentError(f"access must be an xenaltp2m.Access, not {access!r}", op=op)
    if access in _DEADLY:
        return InvalidArgumentError(
            f"access {access} is writable but not readable, which EPT cannot express: "
            "the guest would crash",
            op=op,
        )
    if access == Access.R_PW:
        return UnsupportedError(f"access r_pw came with Xen 4.20; this is {release}", op=op)
    return InvalidArgumentError(f"{access!r} is not an access: its modes do not combine", op=op)


def check_gfn(gfn: int) -> None:
    """Check that a number can be a gfn.

    Raises:
        InvalidArgumentError: It is not an integer in 0..2^36-1, what Xen's tables hold.
    """
    if not isinstance(gfn, int) or isinstance(gfn, bool):
        raise InvalidArgumentError(f"a gfn must be an integer, not {gfn!r}")
    if not 0 <= gfn < GFN_LIMIT:
        raise InvalidArgumentError(
            f"gfn {gfn:#x} is not in 0..{GFN_LIMIT - 1:#x}: a gfn is an address shifted right by 12"
        )


def gfn_array(gfns: Iterable[int]) -> array[int]:
    """Turn gfns into the array that bulk calls take.

    Raises:
        InvalidArgumentError: One of them is not a gfn.
    """
    if not isinstance(gfns, Iterable) or isinstance(gfns, str | bytes | bytearray):
        raise InvalidArgumentError(f"gfns must be an integer or an iterable of them, not {gfns!r}")
    if isinstance(gfns, range):
        check_gfns(gfns)
    else:
        gfns = list(gfns)
        if bool in set(map(type, gfns)):
            raise InvalidArgumentError("gfns must be integers, not booleans")
    try:
        found = array("Q", gfns)
    except (TypeError, OverflowError) as error:
        raise InvalidArgumentError(f"gfns must be integers in 0..2^36-1: {error}") from None
    if found and not isinstance(gfns, range):
        check_gfn(max(found))
    return found


def check_gfns(gfns: range) -> None:
    """Check that all of a range can be gfns, before memory is taken for them.

    Raises:
        InvalidArgumentError: One is not.
    """
    for gfn in (*gfns[:1], *gfns[-1:]):
        check_gfn(gfn)


def batches(gfns: range | array[int]) -> Iterator[memoryview]:
    """Yield gfns as bulk calls take them, :data:`BATCH` at a time.

    Each is good until the next. Of a long range all share one buffer, in which only what changes
    is written: to make a million integers takes Python half as long as it takes Xen to use them.
    """
    if not isinstance(gfns, range) or gfns.step != 1 or len(gfns) < _BLOCK or BATCH != _BLOCK:
        for first in range(0, len(gfns), BATCH):
            yield memoryview(gfn_array(gfns[first : first + BATCH]))
        return
    buffer = bytearray(array("Q", range(256)).tobytes()) * 256
    octets = memoryview(buffer)
    low = bytes(range(256))
    buffer[1::8] = bytearray().join([low[value : value + 1] * 256 for value in low])
    before = bytes(3)
    for base in range(gfns.start & -_BLOCK, gfns.stop, _BLOCK):
        upper = (base >> 16).to_bytes(3, "little")
        for at, value in enumerate(upper):
            if value != before[at]:
                buffer[2 + at :: 8] = bytearray([value]) * _BLOCK
        before = upper
        yield octets.cast("Q")[max(gfns.start - base, 0) : min(gfns.stop - base, _BLOCK)]


def neighbours(gfns: array[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of neighbouring gfns as (first, last), by gfn, each gfn once."""
    first = last = None
    for gfn in sorted(set(gfns)):
        if first is None or last is None:
            first = gfn
        elif gfn != last + 1:
            yield first, last
            first = gfn
        last = gfn
    if first is not None and last is not None:
        yield first, last
