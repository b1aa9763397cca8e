# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backend that answers as a recorded session was answered, as long as it is asked the same.

Strictly: each call must be the next one recorded, with the same arguments, after the same responses
in the ring and the same bytes in mapped pages. The first that is not raises
:class:`~xenaltp2m.errors.ReplayError`; from then on there are no domains any more, so that handles
let go of what they have without a word. Time is the recorded one: nothing waits.
"""

from __future__ import annotations

import os
import select
import stat
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from errno import ESRCH
from functools import partial
from pathlib import Path
from typing import Any, cast

from xenaltp2m.abi.layouts import VM_EVENT
from xenaltp2m.abi.ring import MASK, RSP_PROD
from xenaltp2m.abi.vm_event import HEAD, layout, words_of
from xenaltp2m.backend.clock import Clock, Poll
from xenaltp2m.backend.mapping import Mapping as MappedMemory
from xenaltp2m.backend.protocol import Backend, PortCalls
from xenaltp2m.backend.session.agent_ring import AgentRing
from xenaltp2m.backend.session.format import (
    MAX_FILE,
    OPERATIONS,
    RESULTS,
    Call,
    Contents,
    IntervalMap,
    Json,
    Reader,
    applied,
    encode,
    of_ring,
    same,
)
from xenaltp2m.errors import (
    BusyError,
    ClosedError,
    DomainNotFoundError,
    RecordingError,
    ReplayError,
)
from xenaltp2m.types import PAGE_SIZE

__all__ = ["ReplayBackend", "replay"]

_PENDING = "evtchn_pending"
_SHORT = 96
_COUNTED = ("domid", "first_domid", "limit", "view", "vcpu", "channel", "port", "pages", "ring")
"""Numbers that people read in decimal."""
_MOST_PAGES = 1 << 16


def replay(path: str | os.PathLike[str]) -> Backend:
    """Return a backend that replays a file.

    Raises:
        RecordingError: It cannot be read, is not a recording, or is damaged.
    """
    return cast("Backend", ReplayBackend(_reader(Path(path))))


def _reader(path: Path) -> Reader:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(file)
    except OSError as error:
        raise RecordingError(
            f"{path} cannot be read: {error.strerror}", errno=error.errno
        ) from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
        os.close(file)
        raise RecordingError(f"{path} is not a file, or larger than {MAX_FILE} bytes")
    stream = os.fdopen(file, "rb")
    try:
        return Reader(stream, path.name)
    except BaseException:
        stream.close()
        raise


class _ReplayClock(Clock):
    """The recorded time: what the clock said when it was asked, and between that when calls were.

    Attributes:
        now: Seconds since the session began.
        readings: What the clock said then, between the call before and the next.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.readings: deque[float] = deque()

    def monotonic(self) -> float:
        """Return what it was when the session was asked here."""
        if self.readings:
            self.now = max(self.now, self.readings.popleft())
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def polling(self, poller: select.epoll) -> Poll:
        """Return a function that polls descriptors; if none is ready, recorded time advances."""

        def poll(seconds: float) -> list[tuple[int, int]]:
            ready = poller.poll(0)
            if not ready:
                self.now += max(seconds, 0)
            return ready

        return poll


class _Pages:
    """Mapped pages."""

    def __init__(self, contents: Sequence[bytes], gfns: Sequence[int], *, writable: bool) -> None:
        memory = array("B", b"".join(contents))
        self._memory = memoryview(memory)
        self.mapping = MappedMemory(memory, writable=writable, unmap=lambda: None)
        self.handed = self.mapping.pages
        self.last = list(contents)
        self.gfns, self.writable, self._live = gfns, writable, True

    def now(self, page: int) -> bytes:
        """Return what a page is."""
        if not self._live:
            return self.last[page]
        return self._memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tobytes()

    def put(self, page: int, content: bytes) -> None:
        """Change a page."""
        self.last[page] = content
        if self._live:
            self._memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content

    def let_go(self) -> None:
        """Look at them no more: they are about to be unmapped."""
        self._live = False
        self._memory.release()


class _Ring:
    """A monitor's ring."""

    def __init__(self, content: bytes, entry_size: int) -> None:
        self.agent: AgentRing | None = AgentRing(content, entry_size)
        self.mapping = MappedMemory(self.agent.memory, writable=True, unmap=lambda: None)
        self.handed = self.mapping.whole

    def let_go(self) -> None:
        """Look at it no more: it is about to be unmapped."""
        if self.agent is not None:
            self.agent.release()
            self.agent = None


class ReplayBackend:
    """What :func:`replay` returns. See :class:`xenaltp2m.backend.Backend`."""

    name = "replay"

    def __init__(self, reader: Reader) -> None:
        """Begin with the first call."""
        self._reader = reader
        self._lines = reader.lines()
        self.release = reader.release
        self.clock = _ReplayClock()
        self._closed = False
        self._over: ReplayError | None = None
        """Why it is over, once it is."""
        self._contents = Contents()
        self._mapped: dict[int, _Pages] = {}
        self._rings: dict[int, _Ring] = {}
        self._numbers = 0
        self._event_version = self.release.vm_event_version
        self._channels: dict[int, int] = {}
        """The descriptor of each: readable if it was then, when the next call was made."""
        self._signalled: set[int] = set()
        self._next: Call | None = None
        self._line = 0
        self._advance()

    def __repr__(self) -> str:
        return f"<ReplayBackend of {self._reader.name}>"

    def close(self) -> None:
        """End; again is harmless.

        Raises:
            ReplayError: The recorded session went on; or it has differed before, because the first
                error may have been lost, as in a generator that is collected.
        """
        if self._closed:
            return
        self._closed = True
        for descriptor in self._channels.values():
            os.close(descriptor)
        shared: list[_Ring | _Pages] = [*self._rings.values(), *self._mapped.values()]
        for one in shared:
            one.let_go()
            one.mapping.release()
        expected, self._next = self._next, None
        self._lines.close()  # type: ignore[attr-defined]
        self._reader.close()
        if self._over is None and expected is not None:
            self._difference(_words(expected.op, expected.arguments), "the end")
        if self._over is not None:
            raise self._over

    # What is recorded.

    def _advance(self) -> None:
        """Look at the next call."""
        self.clock.readings.clear()
        self._next = None
        for found in self._lines:
            if isinstance(found, Call):
                self._next, self._line = found, self._reader.number
                break
            self.clock.readings.append(found)
        else:
            self._line = self._reader.number
        self._signal()

    def _signal(self) -> None:
        """Have a channel's descriptor readable where the next call takes an event from it."""
        wanted = set()
        if self._next is not None and self._next.op == _PENDING:
            wanted = {channel for channel in self._channels if channel == self._next.arguments[0]}
        for channel in wanted - self._signalled:
            os.eventfd_write(self._channels[channel], 1)
        for channel in self._signalled - wanted:
            os.eventfd_read(self._channels[channel])
        self._signalled = wanted

    def _take(self, op: str, given: list[Json]) -> Call:
        """Take the next call, which must be this one."""
        call = self._next
        if call is None:
            raise self._difference(None, _words(op, given))
        if call.op != op or not all(map(same, call.arguments, given)):
            raise self._difference(_words(call.op, call.arguments), _words(op, given))
        for number, ring in self._rings.items():
            self._compare_responses(number, ring, call)
        for number, pages in self._mapped.items():
            if pages.writable:
                recorded = {page: runs for at, page, runs in call.wrote if at == number}
                self._compare_memory(pages, recorded)
        self.clock.now = max(self.clock.now, call.time)
        return call

    def _finish(self, call: Call) -> None:
        """Have what Xen and the guest wrote meanwhile, and look at the next call."""
        for number, ring in self._rings.items():
            if ring.agent is not None:
                requests = of_ring(call.requests, number, ())
                produced = (ring.agent.produced + len(requests)) & MASK
                ring.agent.put(requests, of_ring(call.produced, number, produced))
        for number, page, runs in call.memory:
            pages = self._mapped.get(number)
            if pages is None or page >= len(pages.last):
                raise self._misfit("it has pages that are not mapped")
            pages.put(page, applied(pages.last[page], runs))
        self._advance()

    def _compare_responses(self, number: int, ring: _Ring, call: Call) -> None:
        if ring.agent is None:
            return
        changed, responses = ring.agent.take()
        recorded, came = of_ring(call.responses, number, ()), [raw for _, raw in responses]
        for then, now in zip(recorded, came, strict=False):
            if then != now:
                raise self._difference(_response(then, now, call.op), _response(now, then, call.op))
        if len(recorded) != len(came):
            raise self._difference(
                f"{len(recorded)} responses before {call.op}", f"{len(came)} responses"
            )
        indices = of_ring(call.indices, number, {})
        if not changed.keys() <= {RSP_PROD} and changed != indices:
            raise self._difference(f"indices {indices}", f"indices {changed}")

    def _compare_memory(self, pages: _Pages, recorded: Mapping[int, IntervalMap]) -> None:
        """Compare what was written; what only the recording has is taken for the guest's."""
        for page, before in enumerate(pages.last):
            now = pages.now(page)
            then = applied(before, recorded[page]) if page in recorded else before
            if now == then:
                pages.last[page] = now
                continue
            for at in range(PAGE_SIZE):
                if now[at] != before[at] and now[at] != then[at]:
                    where = f"gfn {pages.gfns[page]:#x}, offset {at:#x}: "
                    raise self._difference(
                        f"{where}{then[at : at + 16].hex(' ')} written before {self._op()}",
                        f"{where}{now[at : at + 16].hex(' ')}",
                    )
            pages.put(page, then)

    def _op(self) -> str:
        return "the end" if self._next is None else self._next.op

    def _difference(self, expected: str | None, came: str) -> ReplayError:
        name, now = self._reader.name, self.clock.now
        recorded = "nothing more: the recording ends" if expected is None else expected
        message = (
            f"the replay of {name} differs at line {self._line}, {now:.6f} s after its start\n"
            f"  recorded: {recorded}\n"
            f"  came:     {came}"
        )
        self._over = ReplayError(message, line=self._line, expected=expected, came=came)
        return self._over

    def _misfit(self, why: str) -> ReplayError:
        return self._difference(f"what does not fit what was before: {why}", self._op())

    def _run(
        self, op: str, given: list[Json], act: Callable[[Call], Any] = lambda call: call.result
    ) -> Any:
        """Answer a call as then; ``act`` does what is this process's own, and has the result."""
        if self._closed:
            raise ClosedError("the backend is closed", op=op)
        if self._over is not None:
            return self._afterwards(op)
        call = self._take(op, given)
        if call.error is not None:
            self._finish(call)
            raise call.error
        result = act(call)
        self._finish(call)
        return result

    def _afterwards(self, op: str) -> Any:
        """Answer where the domains are gone."""
        if RESULTS[op] == "None":
            return None
        if RESULTS[op] == "list[DomainInfo]":
            return []
        told = str(self._over).partition("\n")[0]
        raise DomainNotFoundError(f"{op}: {told}", op=op, errno=ESRCH)

    # What is more than to look it up.

    def vm_event_get_version(self) -> int:
        version: int = self._run("vm_event_get_version", [])
        if version in VM_EVENT:
            self._event_version = version
        return version

    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        def act(call: Call) -> tuple[int, memoryview]:
            port, runs = call.result
            ring = _Ring(applied(bytes(PAGE_SIZE), runs), layout(self._event_version).size)
            self._rings[self._next_number()] = ring
            return port, ring.handed

        return cast("tuple[int, memoryview]", self._run("monitor_enable", [encode(domid)], act))

    def monitor_unmap_ring(self, ring: memoryview) -> None:
        self._unmap("monitor_unmap_ring", ring, self._rings)

    def foreignmemory_map(
        self, domid: int, writable: bool, gfns: Sequence[int]
    ) -> list[memoryview]:
        def act(call: Call) -> list[memoryview]:
            if len(call.result) != len(gfns):
                raise self._misfit("it has more or fewer pages than were mapped")
            mapped = sum(len(pages.last) for pages in self._mapped.values())
            if mapped + len(gfns) > _MOST_PAGES:
                raise self._misfit("it maps too many pages")
            contents = [
                self._contents.take(domid, gfn, runs)
                for gfn, runs in zip(gfns, call.result, strict=True)
            ]
            pages = _Pages(contents, list(gfns), writable=writable)
            self._mapped[self._next_number()] = pages
            return pages.handed

        given = [encode(domid), encode(writable), encode(gfns)]
        return cast("list[memoryview]", self._run("foreignmemory_map", given, act))

    def foreignmemory_unmap(self, pages: list[memoryview]) -> None:
        self._unmap("foreignmemory_unmap", pages, self._mapped)

    def _unmap(self, op: str, handed: object, known: dict[int, Any]) -> None:
        number = next((number for number, one in known.items() if one.handed is handed), None)

        def act(_: Call | None = None) -> None:
            if number is None:
                return
            known[number].let_go()
            known[number].mapping.close(op)
            del known[number]

        if self._over and not self._closed:
            with suppress(BusyError):
                act()
            return
        self._run(op, [number], act)

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers - 1

    def evtchn_open(self) -> int:
        def act(call: Call) -> int:
            channel: int = call.result
            if channel in self._channels:
                raise self._misfit("it opens a channel twice")
            self._channels[channel] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return channel

        return cast("int", self._run("evtchn_open", [], act))

    def evtchn_close(self, channel: int) -> None:
        def act(_: Call | None = None) -> None:
            if channel in self._channels:
                os.close(self._channels.pop(channel))
                self._signalled.discard(channel)

        if self._over and not self._closed:
            act()
            return
        self._run("evtchn_close", [encode(channel)], act)

    def evtchn_fd(self, channel: int) -> int:
        if self._over and not self._closed and channel in self._channels:
            return self._channels[channel]

        def act(_: Call) -> int:
            if channel not in self._channels:
                raise self._misfit("it has a channel that is not open")
            return self._channels[channel]

        return cast("int", self._run("evtchn_fd", [encode(channel)], act))

    def evtchn_calls(self, channel: int, port: int) -> PortCalls:
        given = [encode(channel), encode(port)]
        self._run("evtchn_calls", given)

        def notify() -> int:
            return self._run("evtchn_notify", given) or 0

        def pending() -> object:
            return None if self._over else self._run(_PENDING, given[:1])

        return PortCalls(pending, partial(self._run, "evtchn_unmask", given), notify)


def _looked_up(op: str) -> Callable[..., Any]:
    """Make a method of the Protocol that is answered as then."""
    parameters = OPERATIONS[op]

    def call(self: ReplayBackend, *args: Any, **keywords: Any) -> Any:
        return self._run(op, list(map(encode, parameters.bind(args, keywords).values())))

    return call


for _op in OPERATIONS:
    if _op not in vars(ReplayBackend):
        setattr(ReplayBackend, _op, _looked_up(_op))


# Words.


def _words(op: str, given: Sequence[Json]) -> str:
    """A call, as people read it."""
    names = OPERATIONS[op].names
    shown = [
        f"{name}={value if name in _COUNTED else _value(value)}"
        for name, value in zip(names, given, strict=True)
    ]
    return f"{op}({', '.join(shown)})"


def _value(value: Json) -> str:
    if type(value) is int and value > 9:
        return hex(value)
    if isinstance(value, list):
        shown = f"[{', '.join(map(_value, value))}]"
    elif isinstance(value, dict):
        [(_, found)] = value.items()
        shown = str(found)
    else:
        shown = repr(value)
    return shown if len(shown) <= _SHORT else f"{shown[:_SHORT]}..."


def _response(raw: bytes, other: bytes, op: str) -> str:
    """A response, and where it differs from another."""
    if len(raw) < HEAD.size:
        return f"{len(raw)} bytes"
    _, flags, _, vcpu, view = HEAD.unpack_from(raw)
    at = next((at for at, (a, b) in enumerate(zip(raw, other, strict=False)) if a != b), len(other))
    return (
        f"before {op} a response to vCPU {vcpu}: {' | '.join(words_of(flags)) or 'nothing'}, "
        f"view {view}; from byte {at} on {raw[at : at + 8].hex(' ')}"
    )
