# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backend that writes down all that passes through it, for a replay.

What an agent shares with others changes between two calls, so that a replay could not tell it what
it saw. Here it gets copies, which change at calls only: of the ring, and of pages that it maps to
read. Pages that it maps to write are the domain's own, for what it writes must be there at once.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

from xenaltp2m.abi.layouts import VM_EVENT, VM_EVENT_RING
from xenaltp2m.abi.ring import MASK, REQ_PROD, RSP_PROD, SLOT_MASK, SLOTS, slots_of
from xenaltp2m.abi.vm_event import layout
from xenaltp2m.backend.arguments import unknown_mapping
from xenaltp2m.backend.clock import Clock
from xenaltp2m.backend.mapping import Mapping
from xenaltp2m.backend.protocol import Backend, PortCalls
from xenaltp2m.backend.session.agent_ring import AgentRing
from xenaltp2m.backend.session.format import (
    MAX_FILE,
    MAX_LINE,
    MAX_VALUES,
    OPERATIONS,
    Contents,
    Json,
    difference,
    encode,
    error_as_json,
    header,
    line,
    requests_as_json,
    responses_as_json,
)
from xenaltp2m.errors import RecordingError
from xenaltp2m.types import PAGE_SIZE
from xenaltp2m.values.jsontext import most_values

__all__ = ["record"]


def record(backend: Backend, path: str | os.PathLike[str]) -> Backend:
    """Return a backend that does what another does and writes it down.

    What is written may hold what the guest keeps secret: only this user may read the file. Where
    no more can be written the recording ends, and closing warns of it; the session goes on.

    Args:
        backend: Does it; closed with the result.
        path: A file, which must not be there yet.

    Raises:
        RecordingError: The file is there already, or cannot be made.
    """
    return cast("Backend", RecordingBackend(backend, Path(path)))


class _File:
    """A file that grows by whole lines, so that it can be read at any time."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags, 0o600)
        except FileExistsError as error:
            raise RecordingError(
                f"{path} is there already: record to another file", errno=error.errno
            ) from None
        except OSError as error:
            raise RecordingError(
                f"{path} cannot be recorded to: {error.strerror}", errno=error.errno
            ) from None
        self._path, self._size, self._process = path, 0, os.getpid()
        self._ended = ""

    def append(self, document: Json) -> None:
        """Write a line, if there is room for it."""
        if self._file < 0 or self._ended or os.getpid() != self._process:
            return
        raw = line(document)
        if len(raw) > MAX_LINE or most_values(raw) > MAX_VALUES or self._size + len(raw) > MAX_FILE:
            self._ended = "it has become too large"
            return
        try:
            written = os.write(self._file, raw)
        except OSError as error:
            self._ended, written = str(error.strerror), 0
        if 0 < written < len(raw):
            self._ended = "there is no room left"
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
        self._size += written

    def close(self) -> None:
        """Close it; again is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if self._ended:
                warnings.warn(
                    f"the recording {self._path} is not complete: {self._ended}",
                    RuntimeWarning,
                    stacklevel=2,
                )


class _RecordingClock(Clock):
    def __init__(self, file: _File, began: float) -> None:
        self._file, self._began = file, began

    def monotonic(self) -> float:
        """Return the seconds since the session began, and write them down."""
        now = round(time.monotonic() - self._began, 6)
        self._file.append({"clock": now})
        return now


class _Pages:
    """Mapped pages, with their content at the last comparison.

    Attributes:
        handed: What the agent has: a copy where it only reads.
        last: What they were.
        writable: Whether it may write.
        close: Unmaps them, given the operation for its error.
    """

    def __init__(
        self, real: list[memoryview], unmap: Callable[[], None], *, writable: bool
    ) -> None:
        """Look at them; ``unmap`` undoes the mapping."""
        self._real: list[memoryview] = real
        self.handed = real
        self.last = [page.tobytes() for page in real]
        self.writable = writable
        self.close: Callable[[str], None] = lambda _: unmap()
        self._copy: memoryview | None = None
        if not writable:
            memory = array("B", b"".join(self.last))
            self._copy = memoryview(memory)
            mapping = Mapping(memory, writable=False, unmap=unmap)
            self.handed, self.close = mapping.pages, mapping.close

    def changes(self) -> list[tuple[int, Json]]:
        """Look at them again: tell which are not as they were."""
        found = []
        for nth, page in enumerate(self._real):
            now = page.tobytes()
            if now != self.last[nth]:
                found.append((nth, difference(self.last[nth], now)))
                self.last[nth] = now
                if self._copy is not None:
                    self._copy[nth * PAGE_SIZE : (nth + 1) * PAGE_SIZE] = now
        return found

    def let_go(self) -> None:
        """Look at them no more: they are about to be unmapped."""
        self._real = []
        if self._copy is not None:
            self._copy.release()
            self._copy = None


class _Ring:
    """Xen's ring and the agent's copy of it.

    Attributes:
        handed: What the agent has.
        close: Unmaps it, given the operation for its error.
    """

    def __init__(self, real: memoryview, entry_size: int, unmap: Callable[[], None]) -> None:
        self._released = False
        self._words = real[: VM_EVENT_RING.size].cast("I")
        self._slots = slots_of(real, entry_size)
        self.agent = AgentRing(real.tobytes(), entry_size)
        mapping = Mapping(self.agent.memory, writable=True, unmap=unmap)
        self.handed, self.close = mapping.whole, mapping.close

    def show_xen(self) -> dict[str, Json]:
        """Give Xen what the agent has written."""
        if self._released:
            return {}
        changed, responses = self.agent.take()
        for slot, raw in responses:
            self._slots[slot][:] = raw
        for at in sorted(changed, key=lambda at: at == RSP_PROD):  # last: it publishes the slots
            self._words[at] = changed[at]
        told: dict[str, Json] = {}
        if responses:
            told["responses"] = responses_as_json([raw for _, raw in responses])
        if changed.keys() - {RSP_PROD}:
            told["indices"] = [[at, word] for at, word in changed.items()]
        return told

    def show_agent(self) -> dict[str, Json]:
        """Give the agent what Xen has written."""
        if self._released:
            return {}
        produced, seen = self._words[REQ_PROD], self.agent.produced
        count = (produced - seen) & MASK
        if not count:
            return {}
        if count > SLOTS:
            self.agent.put([], produced)
            return {"produced": produced}
        found = [self._slots[(seen + nth) & SLOT_MASK].tobytes() for nth in range(count)]
        self.agent.put(found, produced)
        return {"requests": requests_as_json(found)}

    def let_go(self) -> None:
        """Look at both no more: the ring is about to be unmapped. Again is harmless."""
        if not self._released:
            self._released = True
            for view in (self._words, *self._slots):
                view.release()
            self.agent.release()


class RecordingBackend:
    """What :func:`record` returns. See :class:`xenaltp2m.backend.Backend`.

    Threads: any number may call at a time, but a replay has its calls in the order of their lines:
    that in which they returned.
    """

    def __init__(self, backend: Backend, path: Path) -> None:
        """Begin a file."""
        self._backend = backend
        self.name, self.release = backend.name, backend.release
        self._file = _File(path)
        self._began = time.monotonic()
        self._file.append(header(backend, datetime.now(UTC).isoformat()))
        self.clock = _RecordingClock(self._file, self._began)
        self._lock = threading.RLock()
        self._contents = Contents()
        self._mapped: dict[int, _Pages] = {}
        """By number, as the rings: both are counted together."""
        self._rings: dict[int, _Ring] = {}
        self._numbers = itertools.count()
        self._event_version = backend.release.vm_event_version

    def __repr__(self) -> str:
        return f"<RecordingBackend of {self._backend!r}>"

    def close(self) -> None:
        """Close the backend, then the file; again is harmless."""
        with self._lock:
            shared: list[_Ring | _Pages] = [*self._rings.values(), *self._mapped.values()]
            for one in shared:
                one.let_go()
            try:
                self._backend.close()
            finally:
                self._file.close()

    def _run(self, op: str, given: Sequence[Json], act: Callable[[], tuple[Any, Json]]) -> Any:
        """Call, and record: ``act`` returns the agent's result, and its recorded form."""
        with self._lock:
            told: dict[str, Json] = {"call": op, "arguments": given, **self._before()}
        try:
            result, shown = act()
        except OSError as error:
            told["error"] = error_as_json(error)
            self._write(told)
            raise
        if shown is not None:
            told["result"] = shown
        self._write(told)
        return result

    def _write(self, told: dict[str, Json]) -> None:
        with self._lock:
            told |= self._after()
            now = round(time.monotonic() - self._began, 6)
            self._file.append({"time": now, **told})

    def _before(self) -> dict[str, Json]:
        """Look at what the agent has written since the call before."""
        told = self._of_rings(_Ring.show_xen)
        wrote = [
            [number, *change]
            for number, pages in self._mapped.items()
            if pages.writable
            for change in pages.changes()
        ]
        return told | {"wrote": wrote} if wrote else told

    def _after(self) -> dict[str, Json]:
        """Look at what others have written meanwhile."""
        told = self._of_rings(_Ring.show_agent)
        memory = [
            [number, *change]
            for number, pages in self._mapped.items()
            for change in pages.changes()
        ]
        return told | {"memory": memory} if memory else told

    def _of_rings(self, show: Callable[[_Ring], dict[str, Json]]) -> dict[str, Json]:
        """Tell what the only ring does, or of several which one does what."""
        told: dict[str, Json] = {}
        for number, ring in self._rings.items():
            for what, found in show(ring).items():
                if len(self._rings) == 1:
                    told[what] = found
                else:
                    told.setdefault(what, {})[number] = found
        return told

    # What is more than to pass it on.

    def vm_event_get_version(self) -> int:
        def act() -> tuple[int, Json]:
            version = self._backend.vm_event_get_version()
            if version in VM_EVENT:
                self._event_version = version
            return version, version

        return cast("int", self._run("vm_event_get_version", [], act))

    def monitor_enable(self, domid: int) -> tuple[int, memoryview]:
        def act() -> tuple[tuple[int, memoryview], Json]:
            port, real = self._backend.monitor_enable(domid)
            told = {"port": port, "ring": difference(bytes(PAGE_SIZE), real.tobytes())}
            unmap = partial(self._backend.monitor_unmap_ring, real)
            ring = _Ring(real, layout(self._event_version).size, unmap)
            with self._lock:
                self._rings[next(self._numbers)] = ring
            return (port, ring.handed), told

        return cast("tuple[int, memoryview]", self._run("monitor_enable", [encode(domid)], act))

    def monitor_unmap_ring(self, ring: memoryview) -> None:
        self._unmap("monitor_unmap_ring", ring, self._rings)

    def foreignmemory_map(
        self, domid: int, writable: bool, gfns: Sequence[int]
    ) -> list[memoryview]:
        def act() -> tuple[list[memoryview], Json]:
            real = self._backend.foreignmemory_map(domid, writable, gfns)
            unmap = partial(self._backend.foreignmemory_unmap, real)
            pages = _Pages(real, unmap, writable=writable)
            with self._lock:
                told = [
                    self._contents.tell(domid, gfn, now)
                    for gfn, now in zip(gfns, pages.last, strict=True)
                ]
                self._mapped[next(self._numbers)] = pages
            return pages.handed, told

        given = [encode(domid), encode(writable), encode(gfns)]
        return cast("list[memoryview]", self._run("foreignmemory_map", given, act))

    def foreignmemory_unmap(self, pages: list[memoryview]) -> None:
        self._unmap("foreignmemory_unmap", pages, self._mapped)

    def _unmap(self, op: str, handed: object, known: dict[int, Any]) -> None:
        number = next((number for number, one in known.items() if one.handed is handed), None)

        def act() -> tuple[None, Json]:
            if number is None:
                raise unknown_mapping(op)
            with self._lock:
                known[number].let_go()
                known[number].close(op)
                del known[number]
            return None, None

        self._run(op, [number], act)

    def evtchn_calls(self, channel: int, port: int) -> PortCalls:
        def act() -> tuple[PortCalls, Json]:
            return self._backend.evtchn_calls(channel, port), None

        given = [encode(channel), encode(port)]
        calls = self._run("evtchn_calls", given, act)

        def notify() -> tuple[int, Json]:
            status = calls.notify()
            return status, status if status < 0 else None

        return PortCalls(
            partial(self._run, "evtchn_pending", given[:1], lambda: (calls.pending(), port)),
            partial(self._run, "evtchn_unmask", given, lambda: (calls.unmask(), None)),
            partial(self._run, "evtchn_notify", given, notify),
        )


def _passed_on(op: str) -> Callable[..., Any]:
    """Make a method of the Protocol that is passed on as it is."""
    parameters = OPERATIONS[op]

    def call(self: RecordingBackend, *args: Any, **keywords: Any) -> Any:
        given = list(parameters.bind(args, keywords).values())

        def act() -> tuple[Any, Json]:
            result = getattr(self._backend, op)(*given)
            return result, encode(result)

        return self._run(op, list(map(encode, given)), act)

    return call


for _op in OPERATIONS:
    if _op not in vars(RecordingBackend):
        setattr(RecordingBackend, _op, _passed_on(_op))
