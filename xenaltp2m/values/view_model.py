# SPDX-License-Identifier: LGPL-2.1-or-later
"""The model of a view: the access, remaps and suppress-#VE bits that were set; no hypercalls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import pairwise

from xenaltp2m.types import Access, Gfn
from xenaltp2m.values.intervals import IntervalMap


@dataclass(frozen=True, slots=True)
class Difference:
    """A run of gfns in which a view was set to differ from the host p2m."""

    first: Gfn
    count: int
    access: Access | None
    """The access that was set, or None if Xen's default applies."""
    remapped_to: Gfn | None
    """The new gfn of the first gfn; those of the others are consecutive. None without a remap."""
    suppress_ve: bool | None
    """The suppress-#VE bit that was set, or None if it was not set."""

    @property
    def last(self) -> Gfn:
        """The last gfn of the run."""
        return Gfn(self.first + self.count - 1)

    def goes_on_in(self, other: Difference) -> bool:
        """Check whether ``other`` continues this difference in the gfns that follow."""
        new = self.remapped_to
        expected = replace(
            self,
            first=Gfn(self.first + self.count),
            count=other.count,
            remapped_to=None if new is None else Gfn(new + self.count),
        )
        return other == expected


class ViewModel:
    """The contents of a view, as they were set.

    Attributes:
        access: The access rights, by gfn.
        suppress_ve: The suppress-#VE bits, by gfn.
        remaps: The new gfn of each remapped gfn.
    """

    def __init__(self) -> None:
        self.access: IntervalMap[Access] = IntervalMap()
        self.suppress_ve: IntervalMap[bool] = IntervalMap()
        self.remaps: dict[int, int] = {}

    def differences(self) -> list[Difference]:
        """List everything that was set, as runs of gfns."""
        edges = {gfn for run in self.access for gfn in (run.first, run.end)}
        edges |= {gfn for run in self.suppress_ve for gfn in (run.first, run.end)}
        edges |= {edge for gfn in self.remaps for edge in (gfn, gfn + 1)}
        found: list[Difference] = []
        for first, end in pairwise(sorted(edges)):
            new = self.remaps.get(first)
            this = Difference(
                Gfn(first),
                end - first,
                self.access.get(first),
                None if new is None else Gfn(new),
                self.suppress_ve.get(first),
            )
            if (this.access, this.remapped_to, this.suppress_ve) == (None, None, None):
                continue
            if found and found[-1].goes_on_in(this):
                found[-1] = replace(found[-1], count=found[-1].count + this.count)
            else:
                found.append(this)
        return found

    def renumber(self, gfns: Mapping[int, int]) -> None:
        """Replace gfns by others, for added pages that have new gfns after a migration."""
        self.access.move(gfns)
        self.suppress_ve.move(gfns)
        remaps = [(gfns.get(gfn, gfn), gfns.get(new, new)) for gfn, new in self.remaps.items()]
        self.remaps = dict(remaps)

    def remaps_in_order(self) -> list[tuple[int, int]]:
        """List the remaps in an order in which they can be made.

        A gfn comes before its own new gfn is remapped. Among those that can come next, the lowest
        gfn comes first, so that the order does not depend on the history. Gfns that show each
        other's pages are left out.
        """
        waiting = Counter(new for new in self.remaps.values() if new in self.remaps)
        ready = sorted(gfn for gfn in self.remaps if not waiting[gfn])
        found = []
        while ready:
            gfn = heappop(ready)
            new = self.remaps[gfn]
            found.append((gfn, new))
            waiting[new] -= 1
            if not waiting[new] and new in self.remaps:
                heappush(ready, new)
        return found
