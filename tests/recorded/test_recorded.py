# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session that was recorded on real Xen comes to the same here; ``make recordings`` made it."""

from __future__ import annotations

from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.backend import open_backend

from .sessions import IMAGE, NAME, SESSIONS, run, run_calls

RECORDED = sorted(Path(__file__).parent.glob("xen-*/calls.session"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_what_was_recorded_on_xen_is_replayed(path: Path) -> None:
    backend = open_backend(f"replay:{path}")
    assert f"xen-{backend.release}" == path.parent.name
    [info], _, mode, _, view, access, *refused = (learned := run_calls(backend))[:10]
    assert (info.hvm, info.max_vcpu_id, mode, view, access) == (True, 0, 2, 1, 5)
    assert [kind for kind, _, _ in refused] == [
        xa.BusyError, xa.NotMappedError, xa.InvalidArgumentError, xa.InvalidArgumentError,
    ]  # fmt: skip
    written, *hits, counter = learned[10:]
    assert written[3:9] == b"shadow"
    assert {gfn for gfn, *_ in hits} == set(IMAGE.gfns("counter"))
    assert [count for *_, count in hits] == list(range(len(hits)))
    assert counter == len(hits)


def test_it_was_recorded() -> None:
    assert [path.parent.name for path in RECORDED] == ["xen-4.17"]


def test_another_agent_is_told_apart() -> None:
    with pytest.raises(xa.ReplayError) as differs:
        run(SESSIONS["events"], xa.connect(f"replay:{RECORDED[0]}"))
    assert str(differs.value.expected).startswith("domain_maximum_gpfn")


def test_a_domain_of_another_name_is_told_apart() -> None:
    backend = open_backend(f"replay:{RECORDED[0]}")
    with pytest.raises(xa.ReplayError) as differs:
        backend.name_to_domid("another")
    assert (differs.value.expected, differs.value.came) == (
        f"name_to_domid(name={NAME!r})", "name_to_domid(name='another')",
    )  # fmt: skip
    with pytest.raises(xa.ReplayError):
        backend.close()
