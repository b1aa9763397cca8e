# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent's end of a monitor's ring (public/io/ring.h): requests out, responses in.

A page of indices and eight slots, shared with Xen, which puts requests into the slots and takes
responses out of them. Indices run freely over 2^32; a slot is an index modulo 8. A response goes
into the slot of the oldest request that has none yet, whichever request it answers.

Order of stores: the slot is filled before the index that publishes it is written, with one aligned
store of 4 bytes. x86 keeps stores in order, and loads as well, so that no fence is needed; the
package runs on nothing else.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from xenaltp2m.abi.layouts import VM_EVENT_RING
from xenaltp2m.abi.vm_event import RESPONSE_HEAD
from xenaltp2m.errors import AlreadyError, RingError

SLOTS: Final = 8
NOTHING: Final = bytes(32)
"""An empty ``u``."""
MASK: Final = 0xFFFF_FFFF
SLOT_MASK: Final = SLOTS - 1
_INDICES = VM_EVENT_RING.fields
REQ_PROD, _REQ_EVENT, RSP_PROD, _RSP_EVENT = (
    _INDICES[name].offset // 4 for name in ("req_prod", "req_event", "rsp_prod", "rsp_event")
)


Request: TypeAlias = tuple[int, bytes]
"""A request taken from the ring, by its index: a copy that Xen cannot change any more."""

Head: TypeAlias = tuple[int, int, int, int, int]
"""A request's version, flags, reason, vcpu_id and altp2m_idx (:data:`HEAD` unpacked)."""


def slots_of(page: memoryview, entry_size: int) -> list[memoryview]:
    """Return the slots of a ring's page, given the size of a request."""
    starts = range(VM_EVENT_RING.size, len(page), entry_size)[:SLOTS]
    return [page[start : start + entry_size] for start in starts]


class Ring:
    """The back end of a ring over any writable page.

    An exception that a signal handler raises, between any two steps, leaves every request either
    unread, or taken and unanswered, or answered: all that changes changes in one assignment.

    Attributes:
        indices: The four indices, as numbers: :data:`REQ_PROD`, :data:`RSP_PROD`.
        slots: The eight slots.
        state: How many requests were taken, how many responses were written (both modulo 2^32),
            the requests between, and a number that the caller wants to change together with them.
    """

    def __init__(self, page: memoryview, entry_size: int) -> None:
        """Take a ring over as it is.

        Args:
            page: 4096 writable bytes.
            entry_size: Of a request and of a response.
        """
        self._page = page
        self.indices = page[: VM_EVENT_RING.size].cast("I")
        self.slots = slots_of(page, entry_size)
        produced = self.indices[RSP_PROD]
        self.state: tuple[int, int, tuple[Request, ...], int] = (produced, produced, (), 0)

    def clear(self) -> None:
        """Initialise it (``SHARED_RING_INIT``), which Xen leaves to the agent."""
        self._page[: VM_EVENT_RING.size] = bytes(VM_EVENT_RING.size)
        self.indices[_REQ_EVENT] = self.indices[_RSP_EVENT] = 1
        self.state = (0, 0, (), 0)

    def release(self) -> None:
        """Let go of the page, so that it can be unmapped; nothing can be answered any more."""
        self.state = (0, 0, (), 0)
        for view in (self.indices, *self.slots):
            view.release()

    @property
    def outstanding(self) -> tuple[Request, ...]:
        """Requests that were taken and not answered, oldest first."""
        return self.state[2]

    @property
    def unread(self) -> int:
        """How many requests wait to be taken.

        Raises:
            RingError: There can be no such number.
        """
        taken, answered, _, _ = self.state
        produced = self.indices[REQ_PROD]
        if (produced - answered) & MASK > SLOTS or (produced - taken) & MASK > SLOTS:
            raise RingError(
                f"the ring is damaged: {produced} requests put, {taken} taken, {answered} answered"
            )
        return (produced - taken) & MASK

    def take(self) -> Request | None:
        """Take the next request, or None where there is none.

        Raises:
            RingError: The ring is damaged.
        """
        taken, answered, outstanding, note = self.state
        if self.indices[REQ_PROD] == taken or not self.unread:
            return None
        request = (taken, self.slots[taken & SLOT_MASK].tobytes())
        outstanding = (*outstanding, request) if outstanding else (request,)
        self.state = ((taken + 1) & MASK, answered, outstanding, note)
        return request

    def answer(
        self,
        request: Request,
        head: Head,
        flags: int,
        view: int = 0,
        union: bytes = NOTHING,
        data: bytes | bytearray = b"",
        new_note: int | None = None,
    ) -> None:
        """Write the response to a request into its slot; :meth:`publish` shows it to Xen.

        Args:
            request: One that was taken.
            head: Its first five fields.
            flags: ``VM_EVENT_FLAG_*``.
            view: ``altp2m_idx``.
            union: ``u``, 32 bytes.
            data: Registers, or data for the emulator.
            new_note: The caller's number in :attr:`state` from now on.

        Raises:
            AlreadyError: It was answered already.
        """
        taken, answered, outstanding, note = self.state
        rest = tuple(other for other in outstanding if other is not request)
        if len(rest) == len(outstanding):
            raise AlreadyError("the event was answered already")
        version, _, reason, vcpu, _ = head
        slot = self.slots[answered & SLOT_MASK]
        RESPONSE_HEAD.pack_into(slot, 0, version, flags, reason, vcpu, view, union)
        if data:
            slot[RESPONSE_HEAD.size : RESPONSE_HEAD.size + len(data)] = data
        self.state = (taken, (answered + 1) & MASK, rest, note if new_note is None else new_note)

    def publish(self) -> int:
        """Show Xen every response written; an event channel's notification makes it look.

        Returns:
            How many responses it has been shown, modulo 2^32.
        """
        answered = self.state[1]
        self.indices[RSP_PROD] = answered
        return answered

    def force(self, version: int, vcpu: int, flags: int) -> None:
        """Publish a response to no request, for a ring whose requests cannot be read any more."""
        taken, answered, outstanding, note = self.state
        slot = self.slots[answered % SLOTS]
        RESPONSE_HEAD.pack_into(slot, 0, version, flags, 0, vcpu, 0, NOTHING)
        self.state = (taken, (answered + 1) & MASK, outstanding, note)
        self.publish()
