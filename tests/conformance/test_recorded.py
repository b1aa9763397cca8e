# SPDX-License-Identifier: LGPL-2.1-or-later
"""The simulator tells agents what real Xen told them: recordings from the lab, shortened.

`tests/lab/conformance.py --keep` made them; `make conformance` compares far more.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.compare import compare, differences, recordings
from tests.thorough import THOROUGH

RECORDED = Path(__file__).parent / "recorded"
RELEASES = ["4.14", "4.17", "4.20"]
ALL = [
    pytest.param(release, *recording, id=f"{release}-{recording[0]}-{recording[1]}")
    for release in RELEASES
    for recording in recordings(RECORDED / release)
]


LONG = ("4.14-hello-42", "4.17-hello-42")
"""Its guest executes 16 MiB of zeros, on each release: half a minute."""


@pytest.mark.parametrize(
    ("release", "guest", "seed", "events"), [one for one in ALL if THOROUGH or one.id not in LONG]
)
def test_an_agent_hears_what_it_heard(
    release: str, guest: str, seed: int, events: list[bytes]
) -> None:
    major, minor = map(int, release.split("."))
    compared, wrong = compare(guest, seed, events, (major, minor), shortened=True)
    assert not wrong, "\n".join(wrong)
    assert compared > len(events) // 2


def test_every_guest_is_there() -> None:
    found = {(release, guest) for release, guest, *_ in (one.values for one in ALL)}
    assert len(found) == 5 * len(RELEASES)


def test_a_bit_is_noticed() -> None:
    """In whichever byte."""
    _, _, _, events = ALL[0].values
    assert isinstance(events, list)
    event = events[len(events) // 2]
    noticed = 0
    for at in range(len(event)):
        changed = bytearray(event)
        changed[at] ^= 1
        noticed += bool(differences(event, bytes(changed)))
    assert noticed > len(event) - 24  # the two fields that are not compared
