# SPDX-License-Identifier: LGPL-2.1-or-later
"""A p2m table as Xen keeps it for EPT: a radix tree of 512-entry tables with superpage leaves.

The shape matters because callers can see it: a superpage whose rights leave nothing present
hides its gfns, splitting one resets the suppress-#VE bit of the gfn written, and every table
costs a page of the domain's pool. Rules are those of ``xen/arch/x86/mm/p2m-ept.c``
(``ept_get_entry``, ``ept_set_entry``, ``ept_split_super_page``), alike from 4.14 to 4.22.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from errno import EINVAL, ENOMEM
from typing import NamedTuple, TypeAlias

INVALID_MFN = (1 << 64) - 1
MMIO_MFN_BASE = 1 << 32
"""Frames from here on are not memory: Xen's ``mfn_valid`` is false for them."""

ORDER_4K, ORDER_2M, ORDER_1G = 0, 9, 18
_TABLE_ORDER = 9
_TOP_LEVEL = 3
_INDEX_MASK = (1 << _TABLE_ORDER) - 1
_MOST_KNOWN = 256
MAX_GFN_BITS = (_TOP_LEVEL + 1) * _TABLE_ORDER


class PageType(enum.IntEnum):
    """What a gfn is (Xen: ``p2m_type_t``, ``asm/p2m.h``)."""

    RAM_RW = 0
    INVALID = 1
    RAM_LOGDIRTY = 2
    RAM_RO = 3
    MMIO_DM = 4
    """Emulated MMIO, and what a lookup says of any hole."""
    MMIO_DIRECT = 5
    POPULATE_ON_DEMAND = 6
    GRANT_MAP_RW = 7
    GRANT_MAP_RO = 8
    PAGING_OUT = 9
    PAGED = 10
    PAGING_IN = 11
    SHARED = 12
    BROKEN = 13
    FOREIGN = 14
    IOREQ_SERVER = 15


RAM_TYPES = frozenset(
    {
        PageType.RAM_RW,
        PageType.RAM_LOGDIRTY,
        PageType.RAM_RO,
        PageType.PAGING_OUT,
        PageType.PAGED,
        PageType.PAGING_IN,
        PageType.SHARED,
        PageType.IOREQ_SERVER,
    }
)
SPECIAL_TYPES = frozenset(
    {PageType.GRANT_MAP_RW, PageType.GRANT_MAP_RO, PageType.FOREIGN, PageType.MMIO_DIRECT}
)
ANY_RAM_TYPES = RAM_TYPES | {PageType.GRANT_MAP_RW, PageType.GRANT_MAP_RO, PageType.FOREIGN}
PAGING_TYPES = frozenset({PageType.PAGING_OUT, PageType.PAGED, PageType.PAGING_IN})
_NEEDS_NO_FRAME = PAGING_TYPES | {PageType.POPULATE_ON_DEMAND, PageType.MMIO_DIRECT}

R, W, X = 1, 2, 4
_TYPE_RIGHTS = {
    PageType.RAM_RW: R | W | X,
    PageType.MMIO_DIRECT: R | W | X,
    PageType.RAM_LOGDIRTY: R | X,
    PageType.RAM_RO: R | X,
    PageType.SHARED: R | X,
    PageType.IOREQ_SERVER: R,
    PageType.GRANT_MAP_RW: R | W,
    PageType.FOREIGN: R | W,
    PageType.GRANT_MAP_RO: R,
}
ACCESS_RWX, ACCESS_RX2RW, ACCESS_N2RWX = 7, 8, 9
_ACCESS_RIGHTS = (0, R, W, R | W, X, R | X, W | X, R | W | X, R | X, 0, R)
"""Rights by access number; 0..7 are their own bit sets."""


def access_rights(access: int) -> int:
    """Return the R, W and X bits an access number leaves (``ept_p2m_type_to_flags``)."""
    return _ACCESS_RIGHTS[access]


def entry_rights(kind: PageType, access: int) -> int:
    """Return the R, W and X bits the CPU sees in a 4K entry: the type's and the access's both."""
    return _TYPE_RIGHTS.get(kind, 0) & _ACCESS_RIGHTS[access]


class Entry(NamedTuple):
    """A leaf: what one gfn, or one superpage, maps to."""

    mfn: int
    type: PageType
    access: int
    suppress_ve: bool


class Lookup(NamedTuple):
    """An answer of ``ept_get_entry``; ``order`` is the size of the entry or of the hole."""

    mfn: int
    type: PageType
    access: int
    suppress_ve: bool
    order: int

    @property
    def mapped(self) -> bool:
        """True if there is an entry, whatever it points at."""
        return self.mfn != INVALID_MFN

    @property
    def valid(self) -> bool:
        """True if it points at memory (Xen: ``mfn_valid``)."""
        return self.mfn < MMIO_MFN_BASE


class Pool:
    """The domain's paging pool, from which every table takes a page."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.used = 0

    def take(self) -> bool:
        """Take a page; False if none is left."""
        if self.used >= self.pages:
            return False
        self.used += 1
        return True


_Table: TypeAlias = "dict[int, Entry | _Table]"


class P2m:
    """One table. ``write`` returns an errno, 0 for success, as the C functions do."""

    def __init__(self, pool: Pool, *, executable_superpages: bool) -> None:
        self._pool = pool
        self._executable_superpages = executable_superpages
        self._root: _Table = {}
        self.max_mapped = 0
        """The highest gfn ever written; it never shrinks."""
        self.generation = 0
        """Counts what was written, for those who remember lookups."""
        self._known: dict[int, Lookup] = {}

    def lookup(self, gfn: int) -> Lookup:
        """Return the entry at ``gfn``, or a hole (``ept_get_entry``)."""
        found = self._known.get(gfn)
        if found is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[gfn] = self._lookup(gfn)
        return found

    def _changes(self) -> None:
        self.generation += 1
        self._known.clear()

    def _lookup(self, gfn: int) -> Lookup:
        if gfn > self.max_mapped:
            return _hole(self._order_beyond(gfn))
        table = self._root
        for level in (3, 2, 1):
            shift = level * _TABLE_ORDER
            child = table.get(gfn >> shift & _INDEX_MASK)
            if isinstance(child, dict):
                table = child
            elif child is not None and self._present(child, level):
                offset = gfn & ((1 << shift) - 1)
                return Lookup(child.mfn + offset, *child[1:], shift)
            else:
                kind = PageType.MMIO_DM
                if child is not None and child.type == PageType.POPULATE_ON_DEMAND:
                    kind = child.type
                return _hole(shift, kind)
        leaf = table.get(gfn & _INDEX_MASK)
        if leaf is None:
            return _hole(ORDER_4K)
        assert isinstance(leaf, Entry)
        if leaf.type == PageType.POPULATE_ON_DEMAND:
            return _hole(ORDER_4K, leaf.type)
        return Lookup(*leaf, ORDER_4K)

    def _order_beyond(self, gfn: int) -> int:
        for level in (3, 2, 1):
            if gfn & ~((1 << level * _TABLE_ORDER) - 1) > self.max_mapped:
                return level * _TABLE_ORDER
        return ORDER_4K

    def write(
        self,
        gfn: int,
        mfn: int,
        order: int,
        kind: PageType,
        access: int,
        suppress_ve: bool | None = None,
    ) -> int:
        """Write one entry of ``order`` (``ept_set_entry``).

        Args:
            gfn: Aligned to ``order``.
            mfn: The first frame, or :data:`INVALID_MFN` to make the entry empty.
            order: 0, 9 or 18.
            kind: The type; an invalid one clears.
            access: The access number, 0..10.
            suppress_ve: None to keep what the entry had, 1 if it had none.

        Returns:
            0, EINVAL for a misaligned or too high gfn, ENOMEM for an exhausted pool.
        """
        self._changes()
        aligned = gfn if mfn == INVALID_MFN else gfn | mfn
        if aligned & ((1 << order) - 1) or gfn >> MAX_GFN_BITS:
            return EINVAL
        target = order // _TABLE_ORDER
        table = self._root
        split = False
        for level in range(_TOP_LEVEL, target, -1):
            index = gfn >> level * _TABLE_ORDER & _INDEX_MASK
            child = table.get(index)
            if not isinstance(child, dict):
                if child is not None and (
                    child.type == PageType.POPULATE_ON_DEMAND or self._present(child, level)
                ):
                    subtree = self._split(child, level, target)
                    split = True
                else:
                    # Also where a superpage with no rights stood: it is lost with all its gfns.
                    subtree = {} if self._pool.take() else None
                if subtree is None:
                    return ENOMEM
                table[index] = child = subtree
            table = child
        index = gfn >> order & _INDEX_MASK
        old = table.get(index)
        if isinstance(old, dict):
            self._pool.used -= _count_tables(old)
        if mfn < MMIO_MFN_BASE or (kind in _NEEDS_NO_FRAME):
            if suppress_ve is None:
                # A split loses the old bit: ept_set_entry remembers the entry only where the
                # walk ended at it.
                suppress_ve = old.suppress_ve if isinstance(old, Entry) and not split else True
            table[index] = Entry(mfn, kind, access, suppress_ve)
        else:
            table.pop(index, None)
        if kind != PageType.INVALID:
            self.max_mapped = max(self.max_mapped, gfn + (1 << order) - 1)
        return 0

    def write_range(self, gfn: int, mfn: int, order: int, kind: PageType, access: int) -> int:
        """Write 2^order gfns in the largest entries that fit (``p2m_set_entry``); last errno."""
        error = 0
        for part, frame, size in pieces(gfn, mfn, order):
            error = self.write(part, frame, size, kind, access) or error
        return error

    def fill(self, gfn: int, mfns: Sequence[int], kind: PageType, access: int) -> int:
        """Write a 4K entry for each frame, from a gfn on, as many calls of :meth:`write` would.

        Args:
            gfn: The first; none of them has an entry.
            mfns: The frames, all valid.
            kind: The type of all.
            access: The access number of all.

        Returns:
            0, ENOMEM for an exhausted pool.
        """
        at = 0
        while at < len(mfns):
            if error := self.write(gfn + at, mfns[at], ORDER_4K, kind, access):
                return error
            table = self._root
            for level in range(_TOP_LEVEL, 0, -1):
                child = table[gfn + at >> level * _TABLE_ORDER & _INDEX_MASK]
                assert isinstance(child, dict)
                table = child
            index = gfn + at & _INDEX_MASK
            rest = mfns[at : at + _INDEX_MASK + 1 - index]
            table.update(
                (index + offset, Entry(mfn, kind, access, suppress_ve=True))
                for offset, mfn in enumerate(rest)
            )
            at += len(rest)
            self.max_mapped = max(self.max_mapped, gfn + at - 1)
        return 0

    def restart(self) -> None:
        """As if nothing had ever been written to it, empty as it is."""
        self._changes()
        self.max_mapped = 0

    def flush(self) -> None:
        """Forget every entry and give the tables back to the pool."""
        self._changes()
        self._pool.used -= _count_tables(self._root) - 1  # the root itself is kept
        self._root.clear()

    def entries(self) -> Iterator[tuple[int, int, Entry]]:
        """Yield every leaf as (first gfn, order, entry), by gfn; invisible superpages left out."""
        yield from self._entries(self._root, _TOP_LEVEL, 0)

    def _entries(self, table: _Table, level: int, base: int) -> Iterator[tuple[int, int, Entry]]:
        order = level * _TABLE_ORDER
        for index in sorted(table):
            child = table[index]
            gfn = base + (index << order)
            if isinstance(child, dict):
                yield from self._entries(child, level - 1, gfn)
            elif level == 0 or self._present(child, level):
                yield gfn, order, child

    def _present(self, entry: Entry, level: int) -> bool:
        rights = entry_rights(entry.type, entry.access)
        if level and not self._executable_superpages:
            rights &= ~X
        return bool(rights)

    def _split(self, entry: Entry, level: int, target: int) -> _Table | None:
        if not self._pool.take():
            return None
        step = 1 << (level - 1) * _TABLE_ORDER
        table: _Table = {
            index: entry
            if entry.mfn == INVALID_MFN
            else entry._replace(mfn=entry.mfn + index * step)
            for index in range(_INDEX_MASK + 1)
        }
        if level - 1 > target:
            for index, child in table.items():
                assert isinstance(child, Entry)
                subtree = self._split(child, level - 1, target)
                if subtree is None:
                    self._pool.used -= _count_tables(table)
                    return None
                table[index] = subtree
        return table


def pieces(gfn: int, mfn: int, order: int) -> Iterator[tuple[int, int, int]]:
    """Cut 2^order gfns into the entries ``p2m_set_entry`` writes: (gfn, frame, order) of each."""
    todo = 1 << order
    while todo:
        bits = gfn | todo | (0 if mfn == INVALID_MFN else mfn)
        size = next(o for o in (ORDER_1G, ORDER_2M, ORDER_4K) if not bits & ((1 << o) - 1))
        yield gfn, mfn, size
        gfn += 1 << size
        if mfn != INVALID_MFN:
            mfn += 1 << size
        todo -= 1 << size


def _hole(order: int, kind: PageType = PageType.MMIO_DM) -> Lookup:
    return Lookup(INVALID_MFN, kind, 0, True, order)


def _count_tables(table: _Table) -> int:
    return 1 + sum(_count_tables(child) for child in table.values() if isinstance(child, dict))
