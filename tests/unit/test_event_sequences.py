# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an agent hears of a guest on the mock: tests/live/test_sequences.py on real Xen."""

from __future__ import annotations

from pathlib import Path

import pytest

import xenaltp2m as xa
from tests.live.sequences import SCENES, Scene, end, program, trace
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.tools.symbols import Image

IMAGE = Path(__file__).parent.parent / "lab/guest/events.elf"


@pytest.mark.parametrize("release", SUPPORTED, ids=lambda release: ".".join(map(str, release)))
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_an_agent_hears_what_real_xen_has_it_hear(release: tuple[int, int], scene: Scene) -> None:
    mock, image = MockBackend(release), Image.open(IMAGE)
    domid = mock.add_domain("guest")
    with xa.connect(mock) as xen, xen.domain("guest") as dom:
        dom.memory.write(image.address("breakpoint"), b"\xcc")
        mock.domain_unpause(domid)

        def begin() -> None:
            with dom.paused():
                mock.load(domid, program(image, scene))

        found = trace(dom, image, scene, begin, lambda: dom.vcpu(0).registers().rip == end(image))
    assert found == list(scene.expected)
