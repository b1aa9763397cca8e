# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions that were recorded on real Xen come to the same here.

A recording is of one way to use Xen: where the library comes to make other calls, look why, and
record them anew with ``make recordings``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.abi.vm_event import Reason

from .sessions import IMAGE, SESSIONS, run

RECORDED = sorted(Path(__file__).parent.glob("xen-*/*.session"))


def test_each_session_was_recorded() -> None:
    assert {path.stem for path in RECORDED} == {"events", "views"} < SESSIONS.keys()


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_recorded_on_xen_is_replayed(path: Path) -> None:
    xen = xa.connect(f"replay:{path}")
    assert f"xen-{xen.release}" == path.parent.name
    learned = run(SESSIONS[path.stem], xen)
    if path.stem == "events":
        *hits, counter = learned
        assert len(hits) == 12
        assert {gfn for gfn, _, _, _ in hits} == set(IMAGE.gfns("counter"))
        assert int.from_bytes(counter, "little") == len(hits)
        assert path.read_text().count(f'"request":"{Reason.MEM_ACCESS.name}"') >= len(hits)
    else:
        _, mode, _, written, differences, view, *_ = learned
        assert (mode, written[3:9], differences, view) == (xa.Altp2mMode.EXTERNAL, b"shadow", [], 1)


def test_another_agent_is_told_apart() -> None:
    path = Path(__file__).parent / "xen-4.17" / "views.session"
    with pytest.raises(xa.ReplayError, match=r"came: +altp2m_get_domain_state"):
        run(SESSIONS["events"], xa.connect(f"replay:{path}"))
