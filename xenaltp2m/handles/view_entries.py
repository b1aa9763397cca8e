# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entries of one view's p2m table in Xen: read, write, and restore them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from xenaltp2m.abi.releases import Release
from xenaltp2m.errors import (
    BusyError,
    InvalidArgumentError,
    LeftoverError,
    NotMappedError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handles.base import in_words
from xenaltp2m.handles.context import DomainContext
from xenaltp2m.handles.probe import own_access, view_exists
from xenaltp2m.handles.signals import guard, uninterruptible
from xenaltp2m.types import ALL_GFNS, HOST_VIEW, Access, Gfn, SuppressVeFailure, VcpuId, ViewId
from xenaltp2m.values.gfns import BATCH, Progress, batches, gfn_array
from xenaltp2m.values.view_model import ViewModel

_DEADLY = (Access.W, Access.WX)
_SUPERPAGE_ORDER = 9


class Owner(Protocol):
    """The altp2m that a view belongs to, as the view uses it."""

    def host_default(self) -> Access:
        """Return the access that ``Access.DEFAULT`` stands for now."""

    def is_gone(self) -> bool:
        """Check whether it has vanished."""

    def vcpu_views(self) -> dict[VcpuId, ViewId]:
        """Return the number of every vCPU's view, by vCPU."""

    def vacate(self) -> None:
        """Move the vCPUs out of the views."""


class ViewEntries:
    """The entries of a view's p2m table in Xen.

    Attributes:
        domid: The domain's number.
        id: The view's number within the domain.
        default_access: The access of pages that Xen copies from the host p2m on first use.
    """

    def __init__(
        self, context: DomainContext, view_id: ViewId, default_access: Access, model: ViewModel
    ) -> None:
        self._context, self.model = context, model
        self._backend = context.backend
        self._numbers = context.release.access_numbers
        self.domid, self.id = context.domid, view_id
        self.default_access = default_access

    def number(self, access: Access) -> int:
        """Return Xen's number for an access; raise if it cannot be set."""
        number = self._numbers.get(access)
        if number is None or access in _DEADLY:
            raise refusal_of(access, self._backend.release)
        return number

    def write(self, gfn: int, access: Access) -> None:
        """Set the access of one gfn."""
        self._backend.altp2m_set_mem_access(self.domid, self.id, gfn, self.number(access))

    def own(self, gfn: int) -> Access | None:
        """Return the access of the view's own entry for a gfn, or None if it has none."""
        return own_access(self._backend, self.domid, self.id, gfn)

    def lazy(self, gfn: int) -> Access | None:
        """Return the access that a gfn without an own entry gets on first use."""
        host = own_access(self._backend, self.domid, HOST_VIEW, gfn)
        if host is not None and self._backend.release.lazy_copy_takes_view_default:
            return self.default_access
        return host

    def set_suppress_runs(
        self, runs: Iterable[tuple[int, int]], suppress: bool
    ) -> list[SuppressVeFailure]:
        """Set the suppress-#VE bit of runs of gfns, given as (first, last), one call per run.

        Returns:
            The first failure of each run.
        """
        failures = []
        for first, last in runs:
            self.populate(first, min(last, self._context.maximum_gfn))
            with guard.holding_back():
                failure = self._backend.altp2m_set_suppress_ve_multi(
                    self.domid, self.id, first, last, suppress
                )
                self.model.suppress_ve.set_many(range(first, last + 1), suppress)
            if failure is not None:
                failures.append(SuppressVeFailure(Gfn(failure[0]), failure[1]))
        return failures

    def remaps_in_order(self) -> list[tuple[int, int]]:
        """See :meth:`View.remaps_in_order`."""
        found = self.model.remaps_in_order()
        if len(found) < len(self.model.remaps):
            some = min(self.model.remaps.keys() - dict(found).keys())
            raise BusyError(
                f"gfn {some:#x} and others show each other's pages in view {self.id} of domain "
                f"{self.domid}, which takes a third gfn to make: revert one, and remap them again",
                op="altp2m_change_gfn",
                domid=self.domid,
                view=self.id,
                gfn=some,
            )
        return found

    def destroy(self, owner: Owner) -> None:
        """Destroy the view; vCPUs in it are moved out first."""
        try:
            self._backend.altp2m_destroy_view(self.domid, self.id)
        except BusyError:
            if self.id not in owner.vcpu_views().values():
                if view_exists(self._backend, self.domid, self.id):
                    raise
                return  # Xen returns EBUSY also if there is no such view
            owner.vacate()
            self._backend.altp2m_destroy_view(self.domid, self.id)

    def words(self, what: str, gfn: int) -> str:
        """Describe a property of a gfn, for messages."""
        return f"{what} of gfn {gfn:#x} in view {self.id} of domain {self.domid}"

    def show_again(self, gfn: int, shown: int | None, own: Access | None) -> None:
        """Restore the entry that a gfn had before a remap.

        Args:
            gfn: The gfn.
            shown: The gfn whose page it showed; None if it showed its own.
            own: The access of its entry; None if it had no entry.
        """
        if shown in self.model.remaps:
            raise BusyError(
                f"gfn {gfn:#x} showed the page of gfn {shown:#x}, which is itself remapped now",
                op="altp2m_change_gfn",
                domid=self.domid,
                view=self.id,
                gfn=gfn,
            )
        if shown is None:
            self.revert(gfn)
            self.fill(gfn)
        else:
            self._backend.altp2m_change_gfn(self.domid, self.id, gfn, shown)
        if self.model.suppress_ve.get(gfn) is False:
            self._backend.altp2m_set_suppress_ve(self.domid, self.id, gfn, False)
        if own is not None:
            self.write(gfn, own)

    def show_own(self, gfn: int) -> None:
        """Make a gfn show its own page, so that another can be remapped to that page."""
        if self.own(gfn) is None:
            return
        # Remap it first: the entry may show the gfn's own page, and reverting that would do harm.
        self._backend.altp2m_change_gfn(self.domid, self.id, gfn, self.model.remaps[gfn])
        self.revert(gfn)
        self.fill(gfn)

    def revert(self, gfn: int) -> None:
        """Drop the entry of a remapped gfn, which removes a page from the view's p2m table."""
        self._backend.altp2m_change_gfn(self.domid, self.id, gfn, ALL_GFNS)
        self._context.note_page_removed()

    def fill(self, gfn: int) -> None:
        """Give a reverted gfn the entry that it would get on first use.

        Without an entry, setting its access or remapping it again would make Xen first copy the
        host's whole superpage into the view (``altp2m_get_effective_entry``) and overwrite the
        entries of its neighbours; up to 4.16 the guest's first use would do so, too. Only the
        suppress-#VE call makes a 4K entry without that copy.
        """
        try:
            self._backend.altp2m_set_suppress_ve(self.domid, self.id, gfn, True)
        except NotMappedError:
            return  # the host p2m does not map it any more
        if self._backend.release.lazy_copy_takes_view_default:
            self.write(gfn, self.default_access)

    def populate(self, first: int, last: int) -> None:
        """Make Xen copy the host's superpages of a run of gfns, before a suppress-#VE call.

        That call does not copy them. A later call that does would overwrite its entries.
        """
        for block in range(first >> _SUPERPAGE_ORDER, (last >> _SUPERPAGE_ORDER) + 1):
            gfn = max(first, block << _SUPERPAGE_ORDER)
            if self.own(gfn) is None and (lazy := self.lazy(gfn)) is not None:
                self.write(gfn, lazy)

    def set_back(self, gfns: memoryview, cause: BaseException, is_gone: Callable[[], bool]) -> None:
        """Restore the access of gfns after a bulk call that failed at one of them."""
        try:
            for done in range(0, len(gfns), BATCH):
                batch = gfns[done : done + BATCH]
                numbers = bytes(self._numbers[self._prior(gfn)] for gfn in batch)
                self._backend.altp2m_set_mem_access_multi(self.domid, self.id, numbers, batch)
        except XenError as failure:
            if is_gone():
                return
            left = self._not_back(gfns)
            if not left:
                return  # memory ran out at the same gfn as before; all before it are restored
            words = f"access of {len(left)} gfns from {min(left):#x} to {max(left):#x}"
            raise LeftoverError(
                f"{in_words(cause)}; and setting back failed: {failure.message}",
                left=[f"{words} in view {self.id} of domain {self.domid}"],
                **failure.context(),
            ) from cause

    def _prior(self, gfn: int) -> Access:
        """Return the access that a gfn had, or would get on first use; DEFAULT for a hole."""
        held = self.model.access.get(gfn)
        if held is None:
            held = self.lazy(gfn)
        return Access.DEFAULT if held is None else held

    def _not_back(self, gfns: memoryview) -> list[int]:
        """List the gfns whose access is not the prior one, or cannot be read."""
        left = []
        for gfn in gfns:
            try:
                found = self.own(gfn)
                if found is None or found == self._prior(gfn):
                    continue
            except XenError:
                pass
            left.append(gfn)
        return left

    @uninterruptible
    def set_many(
        self,
        gfns: range | array[int],
        access: Access,
        progress: Progress | None,
        is_gone: Callable[[], bool],
    ) -> None:
        """Set the access of many gfns; on error none of them has changed.

        Args:
            gfns: The gfns.
            access: Their new access.
            progress: Called after each batch.
            is_gone: Called after a failure; returns whether the view has vanished.
        """
        total = len(gfns)
        numbers = bytes([self.number(access)]) * min(total, BATCH)
        reached = 0
        try:
            for batch in batches(gfns):
                reached += len(batch)
                self._backend.altp2m_set_mem_access_multi(
                    self.domid, self.id, numbers[: len(batch)], batch
                )
                _so_far(progress, reached, total)
        except BaseException as error:
            self.set_back(memoryview(gfn_array(gfns[:reached])), error, is_gone)
            raise
        self.model.access.set_many(gfns, access)

    def reapply(self, remaps: Iterable[tuple[int, int]], progress: Progress | None) -> None:
        """Restore everything that the model contains.

        Args:
            remaps: The model's remaps, in an order in which they can be made.
            progress: Called after each batch of gfns whose access is set.
        """
        failures: list[XenError] = []
        for gfn, new_gfn in remaps:
            # Through a remap without its access the guest would write to the new page.
            with _noting(failures):
                if new_gfn in self.model.remaps:
                    self.show_own(new_gfn)
                self._backend.altp2m_change_gfn(self.domid, self.id, gfn, new_gfn)
        total, done = self.model.access.count(), 0
        for run in self.model.access:
            numbers = bytes([self.number(run.value)]) * min(run.end - run.first, BATCH)
            for batch in batches(range(run.first, run.end)):
                with _noting(failures):
                    self._backend.altp2m_set_mem_access_multi(
                        self.domid, self.id, numbers[: len(batch)], batch
                    )
                done += len(batch)
                _so_far(progress, done, total)
        for bit in self.model.suppress_ve:
            with _noting(failures):
                self._backend.altp2m_set_suppress_ve_multi(
                    self.domid, self.id, bit.first, bit.end - 1, bit.value
                )
        if failures:
            raise failures[0]


def refusal_of(access: Access, release: Release) -> XenError:
    """Return the exception for an access that cannot be set on this release."""
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
        return UnsupportedError(f"access r_pw needs Xen 4.20; this is {release}", op=op)
    return InvalidArgumentError(f"{access!r} is not an access: its modes do not combine", op=op)


def _so_far(progress: Progress | None, done: int, total: int) -> None:
    """Report the progress of a long operation, and let pending signals be handled."""
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
