# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a recorded session is: the lines of its file, and what of memory they tell.

docs/recording.md describes the format. Nothing in a file is believed: sizes are bounded, and every
line is checked before anything of it is used.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import json
import math
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from typing import Any, BinaryIO, TypeAlias, TypeVar
from uuid import UUID

from xenaltp2m import errors
from xenaltp2m.abi.releases import Release, release
from xenaltp2m.abi.ring import SLOTS
from xenaltp2m.abi.vm_event import as_line
from xenaltp2m.backend.arguments import Parameters
from xenaltp2m.backend.protocol import Backend
from xenaltp2m.errors import RecordingError, XenError
from xenaltp2m.types import PAGE_SIZE, DomainInfo, MemoryType, PodTarget, VcpuInfo
from xenaltp2m.values.jsontext import most_values

FORMAT = "xenaltp2m session"
VERSION = 1
MAX_LINE = 8 << 20
MAX_VALUES = 1 << 18
MAX_FILE = 1 << 30
"""Bytes of a line, values in it, and bytes of a file: where one would become larger the recording
ends; a larger one is not read."""

Json: TypeAlias = Any
IntervalMap: TypeAlias = "str | tuple[tuple[int, bytes], ...]"
"""A recorded page: whole and still compressed, because a line may have more pages than there is
memory; or the parts that differ from the page before, each with its offset."""

T = TypeVar("T")
OfRings: TypeAlias = Mapping["int | None", T]
"""By the number of the ring; None is the only one there is."""

_RECORDS = (DomainInfo, PodTarget, VcpuInfo)
_SHORT = 64
"""Numbers and bytes up to so many are written in plain."""
_PART = 64
_MOST_PARTS = 8
_MOST_KNOWN = 1024
_MOST_INFLATED = 1 << 24
_NOTHING = bytes(PAGE_SIZE)
_U64 = 1 << 64

OPERATIONS: Mapping[str, Parameters] = {
    name: Parameters(member)
    for name, member in vars(Backend).items()
    if inspect.isfunction(member) and name[0] != "_" and name != "close"
}
"""What can be called, with its parameters."""
RESULTS: Mapping[str, str] = {
    name: str(inspect.signature(getattr(Backend, name)).return_annotation) for name in OPERATIONS
}
"""What each gives, as the Protocol has it."""
_ERRORS: Mapping[str, Callable[..., XenError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, XenError)
}
_ABOUT = ("errno", "domid", "view", "gfn", "vcpu")


@dataclass(frozen=True, slots=True)
class Call:
    """A call, with what came before it and of it.

    Attributes:
        time: When it returned, in seconds since the session began.
        op: A method of the Protocol.
        arguments: As :func:`encode` writes them.
        result: What it gave, decoded; of mappings the recorded pages.
        error: What it raised instead.
        indices: Of a ring, those that the agent has changed since the call before, by number.
        responses: What the agent has written into a ring since then.
        wrote: What it has written into pages: number of the mapping, page in it, recorded form.
        requests: What Xen had written into a ring when the call returned.
        produced: A ring's number of requests, where it is not just these more.
        memory: What was different then in pages that are mapped.
    """

    time: float
    op: str
    arguments: list[Json]
    result: Any = None
    error: OSError | None = None
    indices: OfRings[Mapping[int, int]] = field(default_factory=dict)
    responses: OfRings[tuple[bytes, ...]] = field(default_factory=dict)
    wrote: tuple[tuple[int, int, IntervalMap], ...] = ()
    requests: OfRings[tuple[bytes, ...]] = field(default_factory=dict)
    produced: OfRings[int] = field(default_factory=dict)
    memory: tuple[tuple[int, int, IntervalMap], ...] = ()


# Values.


def encode(value: object) -> Json:
    """Write an argument, or a result, as JSON has it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, bytes | bytearray) or (
        isinstance(value, memoryview) and value.format == "B"
    ):
        raw = bytes(value)
        return {"bytes": raw.hex()} if len(raw) <= _SHORT else {"packed": _packed(raw)}
    if isinstance(value, _RECORDS):
        told = asdict(value)
        return {name: str(one) if isinstance(one, UUID) else one for name, one in told.items()}
    if isinstance(value, list) and value and isinstance(value[0], _RECORDS):
        return [encode(each) for each in value]
    if isinstance(value, array | memoryview | Sequence):
        try:
            numbers = array("Q", value)
        except (TypeError, OverflowError):
            return {"other": repr(value)[:_SHORT]}
        if len(numbers) <= _SHORT:
            return numbers.tolist()
        return {"numbers": _packed(numbers.tobytes())}
    return {"other": repr(value)[:_SHORT]}


def same(recorded: Json, came: Json) -> bool:
    """Whether two encoded arguments are equal; what was packed may have been so otherwise."""
    return bool(recorded == came or _plain(recorded) == _plain(came))


def _plain(value: Json) -> Json:
    """A packed value unpacked."""
    if isinstance(value, dict) and len(value) == 1:
        [(kind, text)] = value.items()
        if kind in ("packed", "numbers"):
            with suppress(_Unsound):  # then it is like nothing else
                return kind, _unpacked(text)
    return value


def _packed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 1)).decode()


def _unpacked(text: object, most: int = _MOST_INFLATED) -> bytes:
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(base64.b64decode(_text(text), validate=True), most)
    except (zlib.error, binascii.Error):
        raise _Unsound("something packed is damaged") from None
    if not inflate.eof or inflate.unused_data:
        raise _Unsound("something packed is damaged, or too large")
    return raw


class _Unsound(Exception):  # noqa: N818 - it never leaves this module
    """What is wrong with a line."""


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise _Unsound(f"{_shown(value)} stands where text should")
    return value


def _number(value: Json, limit: int = _U64) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise _Unsound(f"{_shown(value)} is no number that can stand there")
    return value


def _flag(value: Json) -> bool:
    if not isinstance(value, bool):
        raise _Unsound(f"{_shown(value)} stands where true or false should")
    return value


def _list(value: Json, length: int | None = None) -> list[Json]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise _Unsound(f"{_shown(value)} stands where a list should")
    return value


def _object(value: Json, *keys: str) -> dict[str, Json]:
    if not isinstance(value, dict) or (keys and value.keys() != set(keys)):
        raise _Unsound(f"{_shown(value)} stands where an object should")
    return value


def _hexadecimal(value: Json, most: int = PAGE_SIZE) -> bytes:
    try:
        raw = bytes.fromhex(_text(value))
    except ValueError:
        raise _Unsound("a hexadecimal text is none") from None
    if len(raw) > most:
        raise _Unsound("a hexadecimal text is too long")
    return raw


def _shown(value: Json) -> str:
    return repr(value)[:_SHORT]


def _raw(value: Json) -> bytes:
    if isinstance(value, dict) and value.keys() == {"bytes"}:
        return _hexadecimal(value["bytes"])
    return _unpacked(_object(value, "packed")["packed"])


def _record(kind: type[Any], value: Json) -> Any:
    """A value of one of the classes whose fields are numbers, flags and uuids."""
    known = {one.name: one for one in fields(kind)}
    found = _object(value)
    needed = {name for name, one in known.items() if one.default is MISSING}
    if not needed <= found.keys() <= known.keys():
        raise _Unsound(f"{_shown(value)} is no {kind.__name__}")
    readers: Mapping[object, Callable[[Json], Any]] = {"bool": _flag, "UUID": _uuid}
    return kind(
        **{name: readers.get(known[name].type, _number)(value) for name, value in found.items()}
    )


def _uuid(value: Json) -> UUID:
    try:
        return UUID(_text(value))
    except ValueError:
        raise _Unsound("a uuid is none") from None


def _memory_type(value: Json) -> MemoryType:
    try:
        return MemoryType(_number(value))
    except ValueError:
        raise _Unsound(f"{_shown(value)} is no type of memory") from None


def _pair(value: Json) -> tuple[int, int]:
    first, second = _list(value, 2)
    return _number(first), _number(second)


def _nothing(value: Json) -> int | None:
    """Of a notification a number, where it failed and did not raise."""
    return value if value is None or type(value) is int else _number(value)


def error_as_json(error: OSError) -> Json:
    """Write what a call raised."""
    if not isinstance(error, XenError):
        return {"type": "OSError", "message": str(error.strerror), "errno": error.errno}
    told = {"type": type(error).__name__, "message": error.message} | error.context()
    told |= {"notes": list(getattr(error, "__notes__", ())) or None}
    if error.hint != errors.hint(str(error.op), error.errno or 0):
        told["hint"] = list(error.hint)
    return {name: value for name, value in told.items() if value is not None}


def _error(value: Json) -> OSError:
    told = _object(value)
    message, kind = _text(told.get("message")), _text(told.get("type"))
    about = {name: told[name] for name in _ABOUT if name in told}
    for number in about.values():
        _number(number)
    if kind == "OSError":
        return OSError(_number(told.get("errno")), message)
    if kind not in _ERRORS:
        raise _Unsound(f"there is no error {_shown(kind)}")
    op = None if told.get("op") is None else _text(told["op"])
    hint: Sequence[str] = errors.hint(str(op), about.get("errno", 0))
    if "hint" in told:
        hint = [_text(each) for each in _list(told["hint"])]
    error = _ERRORS[kind](message, op=op, hint=hint, **about)
    for note in _list(told.get("notes", [])):
        error.add_note(_text(note))
    return error


# Memory.


def difference(before: bytes, now: bytes) -> Json:
    """Tell what a page is, given what it was."""
    parts = [
        [at, now[at : at + _PART].hex()]
        for at in range(0, PAGE_SIZE, _PART)
        if before[at : at + _PART] != now[at : at + _PART]
    ]
    return parts if len(parts) <= _MOST_PARTS else _packed(now)


def runs_of(told: Json) -> IntervalMap:
    """Read what :func:`difference` told."""
    if isinstance(told, str):
        whole = _unpacked(told, PAGE_SIZE)
        if len(whole) != PAGE_SIZE:
            raise _Unsound("a page has not the size of one")
        return told
    runs = []
    for part in _list(told):
        at, text = _list(part, 2)
        start, raw = _number(at, PAGE_SIZE), _hexadecimal(text)
        if start + len(raw) > PAGE_SIZE:
            raise _Unsound("a part of a page goes beyond it")
        runs.append((start, raw))
    return tuple(runs)


_READERS: Mapping[str, Callable[[Json], Any]] = {
    "None": _nothing,
    "PortCalls": _nothing,
    "bool": _flag,
    "int": _number,
    "str": _text,
    "bytes": _raw,
    "tuple[int, int]": _pair,
    "MemoryType": _memory_type,
    "tuple[int, memoryview]": lambda value: (
        _number(_object(value, "port", "ring")["port"]), runs_of(value["ring"]),
    ),
    "memoryview": runs_of,
} | {kind.__name__: partial(_record, kind) for kind in _RECORDS}  # fmt: skip


def _decoded(kind: str, value: Json) -> Any:
    """Read a result of a kind that is written as in an annotation of the Protocol."""
    inner = kind.removesuffix(" | None")
    if value is None and inner != kind:
        return None
    if inner.startswith("list["):
        return [_READERS[inner[5:-1]](each) for each in _list(value)]
    return _READERS[inner](value)


def applied(before: bytes, runs: IntervalMap) -> bytes:
    """Return what a page is."""
    if isinstance(runs, str):
        return _unpacked(runs, PAGE_SIZE)
    now = bytearray(before)
    for at, part in runs:
        now[at : at + len(part)] = part
    return bytes(now)


class Contents:
    """The last recorded content of each page, so that a line records only differences.

    The writer and the reader forget pages at the same moment, because both keep the same ones.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bytes] = {}

    def tell(self, domid: int, gfn: int, now: bytes) -> Json:
        """Tell what a page is."""
        told = difference(self._known.get((domid, gfn), _NOTHING), now)
        self._keep(domid, gfn, now)
        return told

    def take(self, domid: int, gfn: int, runs: IntervalMap) -> bytes:
        """Return the content of a page from its recorded form."""
        now = applied(self._known.get((domid, gfn), _NOTHING), runs)
        self._keep(domid, gfn, now)
        return now

    def _keep(self, domid: int, gfn: int, now: bytes) -> None:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[domid, gfn] = now


def of_ring(told: OfRings[T], number: int, otherwise: T) -> T:
    """Return the recorded value for a ring."""
    return told.get(number, told.get(None, otherwise))


# Lines.


def header(backend: Backend, began: str) -> Json:
    """Return the first line."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "backend": backend.name,
        "release": list(backend.release.version),
        "began": began,
    }


def line(document: Json) -> bytes:
    """Return a line of a file."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def requests_as_json(requests: Sequence[bytes]) -> Json:
    """Describe requests as JSON."""
    return [as_line(raw) for raw in requests]


def responses_as_json(responses: Sequence[bytes]) -> Json:
    """Describe responses as JSON."""
    return [as_line(raw, response=True) for raw in responses]


class Reader:
    """Reads a session, a line at a time; everything was checked once when it is made.

    Attributes:
        name: The file's.
        release: Of the hypervisor.
        number: Of the line that was read last, from 1.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """Check it.

        Args:
            stream: The file, which can be read again.
            name: For messages.

        Raises:
            RecordingError: It is not a recording, is damaged, or of a version not known.
        """
        self._stream, self.name = stream, name
        self.release = self._begin()
        for _ in self.lines():
            pass
        self._begin()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def lines(self) -> Iterator[Call | float]:
        """Yield calls, and between them what the clock was when it was asked.

        Raises:
            RecordingError: A line is damaged.
        """
        while (text := self._line()) is not None:
            try:
                yield _parsed(text)
            except _Unsound as why:
                raise self._refusal(str(why)) from None

    def _line(self) -> Json | None:
        raw = self._stream.readline(MAX_LINE + 1)
        self.number += 1
        if len(raw) > MAX_LINE or most_values(raw) > MAX_VALUES:
            raise self._refusal("it is too long")
        if not raw.endswith(b"\n"):
            return None  # the end; or who wrote it was killed meanwhile
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise self._refusal("it is not JSON") from None

    def _begin(self) -> Release:
        self._stream.seek(0)
        self.number = 0
        try:
            found = self._line()
        except RecordingError:
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise RecordingError(f"{self.name} is not the recording of a session")
        if found.get("version") != VERSION:
            raise RecordingError(
                f"{self.name} is a recording of version {_shown(found.get('version'))}, and only "
                f"{VERSION} is known"
            )
        try:
            major, minor = (_number(each, 1 << 8) for each in _list(found.get("release"), 2))
            return release(major, minor)
        except (_Unsound, ValueError) as why:
            raise self._refusal(str(why)) from None

    def _refusal(self, why: str) -> RecordingError:
        return RecordingError(f"line {self.number} of {self.name} is damaged: {why}")


_KEYS = {one.name for one in fields(Call)} - {"op"} | {"call"}


def _parsed(found: Json) -> Call | float:
    told = _object(found)
    if told.keys() == {"clock"}:
        return _seconds(told["clock"])
    op = _text(told.get("call"))
    if op not in OPERATIONS or not told.keys() <= _KEYS:
        raise _Unsound(f"there is no call {_shown(op)}, or more beside it")
    error = _error(told["error"]) if "error" in told else None
    result = _decoded(RESULTS[op], told.get("result")) if error is None else None
    return Call(
        time=_seconds(told.get("time")),
        op=op,
        arguments=_list(told.get("arguments"), len(OPERATIONS[op].names)),
        result=result,
        error=error,
        indices=_of_rings(told.get("indices", {}), _indices),
        responses=_of_rings(told.get("responses", {}), _events),
        wrote=_pages(told.get("wrote", [])),
        requests=_of_rings(told.get("requests", {}), _events),
        produced=_of_rings(told.get("produced", {}), _word),
        memory=_pages(told.get("memory", [])),
    )


def _seconds(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unsound(f"{_shown(value)} is no time")
    if not math.isfinite(value) or value < 0:
        raise _Unsound(f"{_shown(value)} is no time")
    return float(value)


def _of_rings(value: Json, read: Callable[[Json], T]) -> OfRings[T]:
    if not isinstance(value, dict):
        return {None: read(value)}
    try:
        return {_number(int(ring)): read(told) for ring, told in value.items()}
    except ValueError:
        raise _Unsound("a ring is not told by its number") from None


def _indices(value: Json) -> dict[int, int]:
    pairs = (_list(each, 2) for each in _list(value))
    return {_number(at, SLOTS): _word(word) for at, word in pairs}


def _word(value: Json) -> int:
    return _number(value, 1 << 32)


def _events(value: Json) -> tuple[bytes, ...]:
    found = tuple(_hexadecimal(_object(each).get("raw")) for each in _list(value))
    if len(found) > SLOTS:
        raise _Unsound("more events than a ring has room for")
    return found


def _pages(value: Json) -> tuple[tuple[int, int, IntervalMap], ...]:
    return tuple(
        (_number(mapping), _number(page), runs_of(told))
        for mapping, page, told in (_list(each, 3) for each in _list(value))
    )
