# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an agent hears of a guest on real Xen: tests/unit/test_event_sequences.py on the mock."""

from __future__ import annotations

import pytest

from .machine import EventsGuest
from .sequences import LSTAR, SCENES, Scene, trace


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_an_agent_hears_what_the_mock_has_it_hear(events: EventsGuest, scene: Scene) -> None:
    box, (name, argument, value) = events.box, scene.command
    box.command("cr3", box.command("cr3"))
    box.command("wrmsr", LSTAR, 0)

    def begin() -> None:
        box.command(name, argument, value, wait=False)

    found = trace(events.dom, events.image, scene, begin, lambda: not box.busy())
    assert found == list(scene.expected)
