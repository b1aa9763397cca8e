# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views that are imported by a command stay on Xen when it ends, and are exported by another."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import xenaltp2m as xa
from tests.contract.guests import RunningGuest, running
from xenaltp2m.values.state import State, diff

UNUSED = range(0x300, 0x310)


def state(*words: object, code: int = 0) -> str:
    """Run ``xenaltp2m state``."""
    command = ["xenaltp2m", "state", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout


def captured(guest: RunningGuest, path: Path) -> State:
    """Views with remaps to an added page, in a file; nothing of them stays."""
    with guest.dom.altp2m() as altp2m:
        view = altp2m.create_view(label="own")
        [shadow] = guest.dom.add_pages()
        guest.dom.memory.write_page(shadow, b"\x5a" * xa.PAGE_SIZE)
        view.set_access(UNUSED[2:9], xa.Access.RX)
        view.remap(UNUSED[0], shadow, access=xa.Access.X)
        altp2m.create_view(label="other").set_access(UNUSED[3], xa.Access.R)
        altp2m.switch_to_view(view)
        found = xa.capture(altp2m, contents=True)
    for gfns in list(guest.dom.context.added):
        guest.dom.remove_pages(gfns)
    path.write_bytes(found.to_bytes())
    return found


def test_imported_verified_and_exported(tmp_path: Path) -> None:
    with running("xen", "hello") as guest:
        was = captured(guest, tmp_path / "a")
        before = guest.dom.info()
        state("import", tmp_path / "a", "hello")
        assert guest.dom.altp2m_active
        assert guest.dom.vcpu(0).view != 0
        assert guest.dom.info().pages == before.pages + 1
        shadow = guest.dom.maximum_gfn
        assert guest.dom.memory.read_page(shadow) == b"\x5a" * xa.PAGE_SIZE
        state("save", tmp_path / "seen", "hello")
        assert (
            json.loads(state("verify", tmp_path / "seen", "hello", "--json"))["differences"] == []
        )
        seen = State.from_bytes((tmp_path / "seen").read_bytes())
        assert [view.access.values for view in seen.views] == [
            (xa.Access.X, xa.Access.RX), (xa.Access.R,)
        ]  # fmt: skip
        guest.dom.memory.write(shadow << 12, b"changed")
        state("export", tmp_path / "b", "hello")
        assert not guest.dom.altp2m_active
        assert guest.dom.info() == before
        now = State.from_bytes((tmp_path / "b").read_bytes())
        assert diff(was, now) == ["the content of added page 0 differs"]
        state("export", tmp_path / "c", "hello", code=1)
