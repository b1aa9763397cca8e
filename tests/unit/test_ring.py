# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ring against a front end of its own, written from public/io/ring.h."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xenaltp2m as xa
from xenaltp2m.abi.ring import SLOTS, Ring
from xenaltp2m.abi.vm_event import HEAD, encode_request

MASK = 0xFFFFFFFF
SIZES = {6: 384, 7: 400}


def request(version: int, vcpu: int, view: int = 0) -> bytes:
    return bytes(encode_request(version, xa.Reason.MEM_ACCESS, vcpu, flags=1, view=view))


class Front:
    """Xen's end: puts requests, takes responses, as RING_PUSH_REQUESTS and friends do."""

    def __init__(self, version: int, start: int) -> None:
        self.size = SIZES[version]
        self.page = memoryview(bytearray(4096))
        struct.pack_into("<IIII", self.page, 0, start, 0, start, 0)
        self.produced = self.consumed = start

    @property
    def free(self) -> int:
        return SLOTS - ((self.produced - self.consumed) & MASK)

    def put(self, raw: bytes) -> None:
        at = 64 + self.produced % SLOTS * self.size
        self.page[at : at + self.size] = raw
        self.produced = (self.produced + 1) & MASK
        struct.pack_into("<I", self.page, 0, self.produced)

    def take(self) -> list[tuple[int, ...]]:
        found = []
        while self.consumed != struct.unpack_from("<I", self.page, 8)[0]:
            at = 64 + self.consumed % SLOTS * self.size
            found.append(HEAD.unpack_from(self.page, at))
            self.consumed = (self.consumed + 1) & MASK
        return found


@pytest.mark.parametrize("version", [6, 7])
@given(data=st.data(), start=st.sampled_from([0, 5, MASK - 2, MASK]))
def test_every_request_comes_out_once_and_every_response_goes_in_once(
    version: int, data: st.DataObject, start: int
) -> None:
    front = Front(version, start)
    ring = Ring(front.page, SIZES[version])
    sent = taken = 0
    waiting: list[tuple[int, bytes]] = []
    answered: list[int] = []
    heard: list[int] = []
    for _ in range(data.draw(st.integers(1, 60))):
        step = data.draw(st.sampled_from(["put", "take", "answer", "publish"]))
        if step == "put" and front.free:
            front.put(request(version, sent))
            sent += 1
        elif step == "take":
            found = ring.take()
            assert (found is None) == (taken == sent)
            if found is not None:
                assert HEAD.unpack_from(found[1])[3] == taken
                waiting.append(found)
                taken += 1
        elif step == "answer" and waiting:
            chosen = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            head = HEAD.unpack_from(chosen[1])
            ring.answer(chosen, head, 1)
            answered.append(head[3])
        elif step == "publish":
            ring.publish()
            heard += [response[3] for response in front.take()]
            assert heard == answered
        assert ring.unread == sent - taken
        assert list(ring.outstanding) == sorted(
            waiting, key=lambda one: HEAD.unpack_from(one[1])[3]
        )
    ring.release()


def test_a_request_is_a_copy() -> None:
    front = Front(7, 0)
    ring = Ring(front.page, 400)
    front.put(request(7, 3))
    found = ring.take()
    front.page[64:464] = bytes(400)
    assert found is not None
    assert HEAD.unpack_from(found[1])[3] == 3


def test_an_answer_goes_out_only_when_published() -> None:
    front = Front(7, 0)
    ring = Ring(front.page, 400)
    front.put(request(7, 3))
    found = ring.take()
    assert found is not None
    ring.answer(found, HEAD.unpack_from(found[1]), 0x91, view=2, union=b"\5" * 32, data=b"\7" * 8)
    assert front.take() == []
    assert ring.publish() == 1
    assert bytes(front.page[64 + 24 : 64 + 65]) == b"\5" * 32 + b"\7" * 8 + b"\0"
    assert front.take() == [(7, 0x91, 1, 3, 2)]


def test_a_second_answer_is_refused_and_changes_nothing() -> None:
    front = Front(7, 0)
    ring = Ring(front.page, 400)
    front.put(request(7, 0))
    front.put(request(7, 1))
    first, second = ring.take(), ring.take()
    assert first is not None
    assert second is not None
    head = HEAD.unpack_from(first[1])
    ring.answer(first, head, 1)
    with pytest.raises(xa.AlreadyError):
        ring.answer(first, head, 1)
    assert ring.outstanding == (second,)
    ring.publish()
    assert len(front.take()) == 1


@pytest.mark.parametrize("produced", [9, 1000, MASK, 0x80000000])
def test_a_number_of_requests_that_cannot_be_is_an_error(produced: int) -> None:
    front = Front(7, 0)
    ring = Ring(front.page, 400)
    struct.pack_into("<I", front.page, 0, produced)
    with pytest.raises(xa.RingError, match="damaged"):
        ring.take()


def test_requests_that_are_answered_late_still_count_as_slots() -> None:
    front = Front(7, 0)
    ring = Ring(front.page, 400)
    for vcpu in range(8):
        front.put(request(7, vcpu))
    for _ in range(8):
        assert ring.take() is not None
    struct.pack_into("<I", front.page, 0, 9)  # none was answered: Xen has no slot for a ninth
    with pytest.raises(xa.RingError):
        ring.take()


def test_clearing_sets_up_what_xen_leaves_to_the_agent() -> None:
    page = memoryview(bytearray(b"\xff" * 4096))
    ring = Ring(page, 400)
    ring.clear()
    assert struct.unpack_from("<IIII", page, 0) == (0, 1, 0, 1)  # SHARED_RING_INIT
    assert bytes(page[16:64]) == bytes(48)
    assert ring.take() is None
