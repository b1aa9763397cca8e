# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much memory a JSON text takes when it is parsed, found out before it is."""

from __future__ import annotations


def most_values(text: bytes) -> int:
    """Return how many values a text has at most: each but the first follows one of these.

    An empty object takes 80 bytes of memory, and three of text: a limit on bytes alone is none.
    """
    return sum(map(text.count, (b",", b"[", b"{")))
