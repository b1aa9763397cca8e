# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions on examples/guest/hello.elf, which are recorded and replayed: on real Xen, on the mock.

    python -m tests.recorded.sessions DIRECTORY

records each in the lab's dom0.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import xenaltp2m as xa
from xenaltp2m.symbols import Image

GUEST = Path(__file__).resolve().parents[2] / "examples" / "guest" / "hello.elf"
IMAGE = Image.open(GUEST)
NAME = "hello"

Session: TypeAlias = Callable[[xa.Domain], list[Any]]
"""What an agent does with a domain that has not begun, and all that it learns."""


def views(dom: xa.Domain) -> list[Any]:
    """Views, pages of one's own, what Xen refuses; the guest does not run."""
    learned: list[Any] = [dom.info(), dom.altp2m_mode, dom.maximum_gfn]
    with dom.altp2m() as altp2m:
        view = altp2m.create_view(label="hooks")
        view.set_access(range(0x100, 0x104), xa.Access.RX)
        gfns = dom.add_pages(2)
        dom.memory.write_page(gfns[0], dom.memory.read_page(0x101))
        dom.memory.write((gfns[0] << 12) + 0x123, b"shadow")
        learned.append(dom.memory.read((gfns[0] << 12) + 0x120, 16))
        view.remap(0x101, gfns[0], access=xa.Access.X)
        altp2m.switch_to_view(view)
        learned += [view.verify(), dom.vcpu(0).view, dom.vcpu(0).registers().rip]
        for refused in (99, 0xFFFF):
            try:
                dom.xen.backend.altp2m_destroy_view(int(dom.domid), refused)
            except xa.XenError as error:
                learned.append(str(error))
        try:
            dom.memory.read(dom.maximum_gfn + 1 << 12, 1)
        except xa.XenError as error:
            learned.append((type(error), error.errno))
    return learned


def events(dom: xa.Domain) -> list[Any]:
    """Writes to a page, each single-stepped."""
    learned: list[Any] = []
    with dom.altp2m() as altp2m, dom.monitor(xa.MemAccess) as monitor:
        view = altp2m.create_view()
        view.set_access(IMAGE.gfns("counter"), xa.Access.R)
        altp2m.switch_to_view(view)
        dom.xen.backend.domain_unpause(int(dom.domid))
        with closing(monitor.events(timeout=20.0)) as heard:
            for event in heard:
                assert isinstance(event, xa.MemAccess)
                learned.append((event.gfn, event.offset, event.registers.rip, event.vcpu))
                event.reply(xa.Response.fast_singlestep(through=0, back_to=view))
                if len(learned) == 12:
                    break
        dom.pause()
        learned.append(dom.memory.read(IMAGE.physical(IMAGE.symbol("counter")), 4))
    return learned


def trace(dom: xa.Domain) -> list[Any]:
    """Calls and returns of a function, with breakpoints that the guest cannot see."""
    learned: list[Any] = []
    with dom.trace("target", symbols=IMAGE, arguments=1, returns=True) as calls:
        dom.xen.backend.domain_unpause(int(dom.domid))
        told: Any = calls.calls(timeout=20.0)
        with closing(told):
            for seen in told:
                learned.append((type(seen).__name__, seen.vcpu, seen.time))
                if len(learned) == 10:
                    break
        dom.pause()
    return [*learned, dict(calls.hits)]


SESSIONS: dict[str, Session] = {"views": views, "events": events, "trace": trace}


def run(session: Session, xen: xa.Xen) -> list[Any]:
    """Do it from connecting to closing."""
    with xen, xen.domain(NAME) as dom:
        return session(dom)


def main() -> None:
    """Record each on the hypervisor underneath, with a guest of its own, and replay it there."""
    directory = Path(sys.argv[1])
    for name, session in SESSIONS.items():
        config = [f'kernel="{GUEST}"', f'name="{NAME}"', 'on_crash="preserve"']
        subprocess.run(
            ["xl", "create", "-p", "-q", "-e", "/lab/external-1.cfg", *config], check=True
        )
        path = directory / f"{name}.session"
        try:
            learned = run(session, xa.connect(record=path))
        finally:
            subprocess.run(["xl", "destroy", NAME], check=True)
        print(name, path.stat().st_size, "bytes:", learned)
        assert run(session, xa.connect(f"replay:{path}")) == learned
        (directory / f"{name}.learned").write_text(repr(learned) + "\n")


if __name__ == "__main__":
    main()
