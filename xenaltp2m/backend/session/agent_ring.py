# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ring page that an agent sees while its session is recorded or replayed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from xenaltp2m.abi.layouts import VM_EVENT_RING
from xenaltp2m.abi.ring import MASK, REQ_PROD, RSP_PROD, SLOT_MASK, SLOTS, slots_of


class AgentRing:
    """A copy of a monitor's ring for the agent alone, which changes only when a call is made.

    Attributes:
        memory: The page.
    """

    def __init__(self, content: bytes, entry_size: int) -> None:
        """Begin with what the page is, given how large a request is."""
        self.memory = array("B", content)
        self._page = memoryview(self.memory)
        self._words = self._page[: VM_EVENT_RING.size].cast("I")
        self.slots = slots_of(self._page, entry_size)
        self._known = self._words.tolist()

    def release(self) -> None:
        """Let go of the page, for whoever holds it besides."""
        for view in (self._words, *self.slots, self._page):
            view.release()
        del self.memory

    @property
    def produced(self) -> int:
        """How many requests the agent can see."""
        return self._known[REQ_PROD]

    def take(self) -> tuple[dict[int, int], list[tuple[int, bytes]]]:
        """Return the indices that the agent has changed, and its new responses by their slots."""
        words = self._words.tolist()
        if words == self._known:
            return {}, []
        changed = {at: word for at, word in enumerate(words) if word != self._known[at]}
        shown = self._known[RSP_PROD]
        count = (words[RSP_PROD] - shown) & MASK
        slots = [(shown + nth) & SLOT_MASK for nth in range(count if count <= SLOTS else 0)]
        self._known = words
        return changed, [(slot, self.slots[slot].tobytes()) for slot in slots]

    def put(self, requests: Sequence[bytes], produced: int) -> None:
        """Show the agent requests, and how many there have been."""
        for nth, request in enumerate(requests):
            slot = self.slots[(self._known[REQ_PROD] + nth) & SLOT_MASK]
            slot[: len(request)] = request[: len(slot)]
        self._words[REQ_PROD] = self._known[REQ_PROD] = produced
