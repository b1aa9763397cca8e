# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of bench_xen.py that runs in dom0: measures each agent on a guest of its own.

python3 measure.py SECONDS RESULT
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xenaltp2m as xa
from xenaltp2m.tools.symbols import Image

HERE = Path(__file__).resolve().parent
CODE = ("_start", "target")
"""The guest executes in these pages, and nowhere else."""
SETTLE = 0.2
LIMIT = 400
"""Virtual seconds for anything: xen-access takes 98 to protect a guest."""
FAILURES = (OSError, RuntimeError, ValueError, subprocess.SubprocessError, xa.XenError)


@contextmanager
def guest() -> Iterator[xa.Domain]:
    """Run hello.elf in a fresh domain, which must live when the agent is done."""
    subprocess.run(["xl", "create", "-q", "-e", "hello.cfg"], cwd=HERE, check=True)
    try:
        with xa.connect() as xen, xen.domain("hello") as dom:
            time.sleep(SETTLE)
            yield dom
            counter = Image.open(HERE / "hello.elf").address("counter")
            before = dom.memory.read(counter, 4)
            time.sleep(SETTLE)
            if dom.memory.read(counter, 4) == before:
                raise RuntimeError("the guest does not go on")
    finally:
        subprocess.run(["xl", "destroy", "hello"], check=True)


def xen_access(seconds: float) -> dict[str, Any]:
    """Run xen-access altp2m_exec: how long until its first event, and how many then."""
    with guest() as dom, (HERE / "events.txt").open("w+b") as out:
        gfns = dom.maximum_gfn + 1
        default_suffices = dom.xen.release.lazy_copy_takes_view_default  # else it sets every gfn
        start = time.perf_counter()
        environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{tools()}"}
        with subprocess.Popen(
            ["xen-access", str(dom.domid), "altp2m_exec"],
            stdout=out,
            stderr=subprocess.DEVNULL,
            env=environment,
        ) as agent:
            try:
                # Its events come a buffer of 4096 bytes at a time, all else goes to stderr.
                while os.fstat(out.fileno()).st_size == 0:
                    if agent.poll() is not None or time.perf_counter() - start > LIMIT:
                        raise RuntimeError(f"xen-access shows no event: status {agent.returncode}")
                    time.sleep(0.02)
                first, begun = os.fstat(out.fileno()).st_size, time.perf_counter()
                time.sleep(seconds)
                last, ended = os.fstat(out.fileno()).st_size, time.perf_counter()
            finally:
                agent.terminate()
                agent.wait(LIMIT)
        text = os.pread(out.fileno(), last, 0)
    found: dict[str, Any] = {
        "hits": text.count(b"PAGE ACCESS", first),
        "steps": text.count(b"Singlestep: ", first),
        "seconds": ended - begun,
    }
    if not default_suffices:
        found["protecting"] = {"gfns": gfns, "seconds": begun - start}
    return found


def tools() -> str:
    """Where the tools of this release lie that are not in the path."""
    return f"/usr/lib/xen-{os.environ['XEN_RELEASE']}/bin"


def output(*command: object) -> Any:
    """Run an agent of ours, which prints JSON."""
    words = [str(word) for word in command]
    return json.loads(subprocess.check_output(words, cwd=HERE, timeout=LIMIT))


def code() -> list[int]:
    """The guest's code: protecting that, it trips on every instruction."""
    image = Image.open(HERE / "hello.elf")
    return sorted({gfn for symbol in CODE for gfn in image.gfns(symbol)})


def c_loop(way: str, seconds: float) -> Any:
    with guest() as dom:
        return output("./loop", dom.domid, way, seconds, *code())


def monitor(way: str, seconds: float) -> Any:
    with guest():
        return output("python3", "monitor.py", "hello", way, seconds, *code())


def c_breakpoint(way: str, seconds: float) -> Any:
    """An int3 in a copy of the page of target(), made here."""
    with guest() as dom:
        place = Image.open(HERE / "hello.elf").address("target")
        gfn, offset = divmod(place, xa.PAGE_SIZE)
        added = dom.add_pages(1)
        [shadow] = added
        copy = bytearray(dom.memory.read_page(gfn))
        copy[offset] = 0xCC
        dom.memory.write_page(shadow, copy)
        try:
            return output("./loop", dom.domid, way, seconds, "shadow", gfn, shadow)
        finally:
            dom.remove_pages(added)


def breakpoints(way: str, seconds: float) -> Any:
    with guest():
        place = Image.open(HERE / "hello.elf").address("target")
        return output("python3", "breakpoints.py", "hello", way, seconds, place)


def c_bulk() -> Any:
    with guest() as dom:
        return output("./loop", dom.domid, "bulk")


def set_access() -> dict[str, Any]:
    with guest() as dom, dom.altp2m() as altp2m:
        view = altp2m.create_view()
        wanted = range(dom.maximum_gfn + 1)
        start = time.perf_counter()
        view.set_access(wanted, xa.Access.RW)
        return {"gfns": len(wanted), "seconds": time.perf_counter() - start}


def main() -> int:
    """Measure everything; what fails is told and does not keep the rest from being measured."""
    seconds = float(sys.argv[1])
    found: dict[str, dict[str, Any]] = {"hits": {}, "breakpoints": {}, "protecting": {}}
    ways: list[tuple[str, str, Callable[[], Any]]] = [
        ("hits", "xen-access", lambda: xen_access(seconds)),
        ("hits", "C, toggle", lambda: c_loop("toggle", seconds)),
        ("hits", "C, fast", lambda: c_loop("fast", seconds)),
        ("hits", "xenaltp2m, toggle", lambda: monitor("toggle", seconds)),
        ("hits", "xenaltp2m, fast", lambda: monitor("fast", seconds)),
        ("breakpoints", "C, toggle", lambda: c_breakpoint("toggle", seconds)),
        ("breakpoints", "C, fast", lambda: c_breakpoint("fast", seconds)),
        ("breakpoints", "Breakpoints, toggle", lambda: breakpoints("toggle", seconds)),
        ("breakpoints", "Breakpoints, fast", lambda: breakpoints("fast", seconds)),
        ("breakpoints", "Trace, fast", lambda: breakpoints("trace", seconds)),
        ("protecting", "C, one call", c_bulk),
        ("protecting", "xenaltp2m", set_access),
    ]
    failed = False
    for kind, name, measure in ways:
        print(f"{name} ({kind})", flush=True)
        try:
            found[kind][name] = measure()
        except FAILURES as error:
            found[kind][name] = {"error": f"{type(error).__name__}: {error}"}
            failed = True
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    if protecting := found["hits"]["xen-access"].pop("protecting", None):
        found["protecting"] = {"xen-access": protecting, **found["protecting"]}
    Path(sys.argv[2]).write_text(json.dumps(found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
