# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions on examples/guest/hello.elf, which are recorded and replayed: on real Xen, on the mock.

    python -m tests.recorded.sessions DIRECTORY

records each in the lab's dom0, and replays it there. The first, ``calls``, uses the backend alone,
so that its recording stays good whatever the handles come to ask Xen: it is kept beside this.
"""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import xenaltp2m as xa
from xenaltp2m.abi.ring import Ring
from xenaltp2m.abi.vm_event import HEAD, Flag, layout
from xenaltp2m.backend import Backend, open_backend
from xenaltp2m.backend.session.recording import record
from xenaltp2m.tools.symbols import Image

GUEST = Path(__file__).resolve().parents[2] / "examples" / "guest" / "hello.elf"
IMAGE = Image.open(GUEST)
NAME = "hello"

Session: TypeAlias = Callable[[xa.Domain], list[Any]]
"""What an agent does with a domain that has not begun, and all that it learns."""


def calls(backend: Backend) -> list[Any]:
    """What there is: views, refusals, memory, a monitor's events and their answers."""
    domid = backend.name_to_domid(NAME)
    assert domid is not None
    learned: list[Any] = [backend.domain_getinfolist(domid, 1), backend.domain_maximum_gpfn(domid)]
    learned += [backend.hvm_param_get(domid, 35), backend.supports("xc_monitor_io")]
    backend.altp2m_set_domain_state(domid, True)
    view = backend.altp2m_create_view(domid, 7)
    [watched] = IMAGE.gfns("counter")
    backend.altp2m_set_mem_access_multi(domid, view, b"\5" * 100, array("Q", range(0x200, 0x264)))
    learned += [view, backend.altp2m_get_mem_access(domid, view, 0x263)]
    for refused in (
        partial(backend.altp2m_destroy_view, domid, 99),
        partial(backend.altp2m_get_mem_access, domid, view, 0x3000),
        partial(backend.foreignmemory_map, domid, False, [1 << 30]),
        partial(backend.monitor_disable, domid),
    ):
        try:
            learned.append(refused())
        except xa.XenError as error:
            learned.append((type(error), error.errno, str(error)))
    pages = backend.foreignmemory_map(domid, True, [0x300])
    pages[0][0x123:0x129] = b"shadow"
    backend.foreignmemory_unmap(pages)
    pages = backend.foreignmemory_map(domid, False, [0x300, watched])
    learned.append(pages[0][0x120:0x130].tobytes())

    version = backend.vm_event_get_version()
    remote, page = backend.monitor_enable(domid)
    ring = Ring(page, layout(version).size)
    ring.clear()
    channel = backend.evtchn_open()
    port = backend.evtchn_bind_interdomain(channel, domid, remote)
    pending, unmask, notify = backend.evtchn_calls(channel, port)
    backend.monitor_singlestep(domid, True)  # up to 4.18 a fast single-step needs it
    backend.altp2m_set_mem_access(domid, view, watched, 1)
    backend.altp2m_switch_to_view(domid, view)
    backend.domain_unpause(domid)
    while len(learned) < 30:
        pending()
        unmask()
        while (request := ring.take()) is not None:
            event = xa.Event.of(request[1])
            assert isinstance(event, xa.MemAccess)
            counter = int.from_bytes(pages[1][:4], "little")
            learned.append((event.gfn, event.offset, event.registers.rip, event.vcpu, counter))
            flags = Flag.VCPU_PAUSED | Flag.ALTERNATE_P2M | Flag.FAST_SINGLESTEP
            ring.answer(
                request, HEAD.unpack_from(request[1]), flags, 0, view.to_bytes(32, "little")
            )
        ring.publish()
        assert notify() == 0
    backend.domain_pause(domid)
    backend.altp2m_switch_to_view(domid, 0)
    while (request := ring.take()) is not None:
        ring.answer(request, HEAD.unpack_from(request[1]), Flag.VCPU_PAUSED)
    ring.publish()
    notify()
    backend.monitor_singlestep(domid, False)
    backend.monitor_disable(domid)
    ring.release()
    backend.evtchn_close(channel)
    backend.monitor_unmap_ring(page)
    learned.append(int.from_bytes(pages[1][:4], "little"))
    backend.foreignmemory_unmap(pages)
    backend.altp2m_set_domain_state(domid, False)
    return learned


def run_calls(backend: Backend) -> list[Any]:
    """Do that, and close the backend."""
    try:
        return calls(backend)
    finally:
        backend.close()


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
    with xa.Trace(dom, "target", symbols=IMAGE, arguments=1, returns=True, trust=True) as calls:
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
    both: dict[str, tuple[Callable[[Path], list[Any]], Callable[[Path], list[Any]]]] = {
        "calls": (
            lambda path: run_calls(record(open_backend("libxc"), path)),
            lambda path: run_calls(open_backend(f"replay:{path}")),
        )
    }
    for name, session in SESSIONS.items():
        both[name] = (
            lambda path, session=session: run(session, xa.connect(record=path)),  # type: ignore[misc]
            lambda path, session=session: run(session, xa.connect(f"replay:{path}")),  # type: ignore[misc]
        )
    for name, (recorded, replayed) in both.items():
        config = [f'kernel="{GUEST}"', f'name="{NAME}"', 'on_crash="preserve"']
        subprocess.run(
            ["xl", "create", "-p", "-q", "-e", "/lab/external-1.cfg", *config], check=True
        )
        path = directory / f"{name}.session"
        try:
            learned = recorded(path)
        finally:
            subprocess.run(["xl", "destroy", NAME], check=True)
        print(name, path.stat().st_size, "bytes:", learned, flush=True)
        assert replayed(path) == learned


if __name__ == "__main__":
    main()
