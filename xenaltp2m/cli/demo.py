# SPDX-License-Identifier: LGPL-2.1-or-later
"""``demo``: trace a function of a guest that searches for observers and finds none."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.arguments import add_count
from xenaltp2m.cli.console import Console, Table
from xenaltp2m.cli.host import MOCK_DOMAIN, StopRequest, connect, is_altp2m_active, note_undone
from xenaltp2m.cli.pages import counted
from xenaltp2m.tools.symbols import Image
from xenaltp2m.tools.tracing import Call, Seen, Trace

SUMMARY = "trace a function of a guest that searches for observers and finds none"

IMAGE = Path(__file__).parent / "checker.elf"
_NAME = "checker"

KEYS = """\
The guest is a small one that comes with this package. It sums its own code up, reads it byte by
byte, patches it, counts its calls, and searches for added pages beyond its memory; it counts every
difference that it finds. A breakpoint in a shadow page of its function `target` reports each call,
while the guest still reads its own code.

It runs in a simulator (the extra sim). With --connect libxc it is a real guest, checker, which you
start, and which keeps running untraced afterwards; if there is none, the error says how to start
it.

--json prints one object:
  xen, backend, domid, name, image, function
  calls      [{"number", "vcpu", "rip", "rsp", "rbx", "rsi", "caller", "caller_symbol"}]
  noticed    the number of differences that the guest has found; null before its first check ends
  passes     the number of its checks
"""

_START = (
    f"""xl create -p /dev/null 'name="{_NAME}"' 'type="pvh"' 'kernel="{IMAGE}"' """
    """memory=16 vcpus=1 'altp2m="external"'"""
)
_FUNCTION = "target"
_REGISTERS = ("rip", "rsp", "rbx", "rsi")
_CALLS = 200
_SHOWN = 10
_TICK_SECONDS = 0.25
_PATIENCE = 10.0
"""Seconds without a call after which the demo gives up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.set_defaults(usage_error=parser.error, usual_connect="mock")
    add_count(parser, "calls", _CALLS)


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    if options.connect not in ("libxc", "mock"):
        options.usage_error("the demo runs on libxc or mock")
    if options.connect == "mock" and find_spec("unicorn") is None:
        raise xa.UnsupportedError(
            "the guest is simulated by unicorn, which is not installed",
            hint=("pip install 'xenaltp2m[sim]'",),
        )
    image = Image.open(str(IMAGE))
    name = MOCK_DOMAIN if options.connect == "mock" else _NAME
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        xen = stack.enter_context(connect(options, console, image, start=False))
        domain = stack.enter_context(_domain(xen, name))
        was_active = is_altp2m_active(domain, console)
        stop.hold_back()
        console.note(
            f"Tracing {_FUNCTION} of domain {domain.domid} ({name}) on Xen {xen.release} "
            f"({xen.backend.name}): {counted(options.count, 'call')}."
        )
        demo = _Demo(domain, image, options.count)
        trace = stack.enter_context(Trace(domain, _FUNCTION, symbols=image))
        stop.wake = trace.stop
        if domain.info().paused:
            xen.backend.domain_unpause(domain.domid)
        demo.listen(trace, stop)
        noticed, passes = demo.self_check()
        document = {
            "xen": str(xen.release),
            "backend": xen.backend.name,
            "domid": domain.domid,
            "name": name,
            "image": str(IMAGE),
            "function": _FUNCTION,
            "calls": demo.calls,
            "noticed": noticed if passes else None,
            "passes": passes,
        }
    undone = "breakpoint removed", "vCPUs moved back", "monitor closed"
    note_undone(console, *undone, was_active=was_active)
    console.result(document, demo.table())
    if not console.as_json:
        if more := demo.calls[_SHOWN:]:
            console.line(f"and {len(more)} more")
        found = f"noticed {noticed or 'nothing'} in {counted(passes, 'pass', 'passes')}"
        console.line(f"The guest's self-check {found if passes else 'has not finished once'}.")


def _domain(xen: xa.Xen, name: str) -> xa.Domain:
    try:
        return xen.domain(name)
    except xa.DomainNotFoundError as error:
        raise xa.DomainNotFoundError(
            f"there is no domain {name!r}, the demo's guest",
            hint=(f"start it: {_START}", "without Xen: omit --connect"),
        ) from error


class _Demo:
    """Collects calls, and reads at the end what the guest has noticed."""

    def __init__(self, domain: xa.Domain, image: Image, count: int) -> None:
        self._domain, self._image, self._count = domain, image, count
        self.calls: list[dict[str, Any]] = []
        self._checked: tuple[int, int] | None = None

    @property
    def _enough(self) -> bool:
        return len(self.calls) >= self._count

    def listen(self, trace: Trace, stop: StopRequest) -> None:
        """Collect calls, until there are enough and the guest has checked itself once.

        A signal, or the domain's end, ends it, too.

        Raises:
            UnsupportedError: The function is not called.
        """
        clock = self._domain.xen.backend.clock
        patience = clock.monotonic() + _PATIENCE
        while not (stop.came or self._checked or trace.ended):
            seen = trace.hits.total()
            trace.run(partial(self._take, trace), _TICK_SECONDS)
            if trace.hits.total() > seen:
                patience = clock.monotonic() + _PATIENCE
            elif clock.monotonic() > patience:
                raise xa.UnsupportedError(
                    f"{_FUNCTION} was not called in {_PATIENCE:g} s",
                    domid=self._domain.domid,
                    hint=(f"is it the demo's guest? start that: {_START}",),
                )

    def _take(self, trace: Trace, seen: Seen) -> None:
        """Record a call, while its vCPU waits; stop once the guest has checked itself."""
        if isinstance(seen, Call) and not self._enough:
            symbol = None if seen.caller is None else self._image.locate(seen.caller)
            self.calls.append(
                {
                    "number": len(self.calls) + 1,
                    "vcpu": seen.vcpu,
                    **{name: getattr(seen.registers, name) for name in _REGISTERS},
                    "caller": seen.caller,
                    "caller_symbol": None if symbol is None else str(symbol),
                }
            )
        if self._enough and self._checked is None:
            found = self._read()
            self._checked = found if found[1] else None
        if self._checked is not None:
            trace.stop()

    def self_check(self) -> tuple[int, int]:
        """Return how many differences the guest has noticed, and in how many passes."""
        return self._checked or self._read()

    def _read(self) -> tuple[int, int]:
        symbol = self._image.symbol("noticed")
        raw = self._domain.memory.read(self._image.physical(symbol), symbol.size)
        *counters, passes = (
            int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)
        )
        return sum(counters), passes

    def table(self) -> Table:
        """Return a table of the first calls."""
        return Table(
            ("call", "vCPU", *_REGISTERS, "returns to"),
            [
                (
                    str(call["number"]),
                    str(call["vcpu"]),
                    *(f"{call[name]:#x}" for name in _REGISTERS),
                    f"{call['caller']:#x} {call['caller_symbol'] or ''}" if call["caller"] else "",
                )
                for call in self.calls[:_SHOWN]
            ],
        )
