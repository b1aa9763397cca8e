# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of a domain's views: how they differ from the host p2m, to compare, save and restore.

A :class:`State` contains no identifier that is valid only in the running session: views and added
pages are identified by their index. So equal views have an equal state, even in another domain or
on another release, and equal states have the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from operator import add, gt
from typing import Any, NoReturn, Self, TypeAlias, TypeGuard

from xenaltp2m.errors import InvalidArgumentError, StateError
from xenaltp2m.types import GFN_LIMIT, PAGE_SIZE, Access
from xenaltp2m.values.arguments import check_kind
from xenaltp2m.values.events import (
    EVENTS,
    ControlRegister,
    InguestPagefault,
    MovToMsr,
    Subscription,
    WriteCtrlreg,
)
from xenaltp2m.values.intervals import Intervals
from xenaltp2m.values.jsontext import most_values

FORMAT = "xenaltp2m views"
VERSION = 1
MAX_FILE = 1 << 26
MAX_TEXT = 1 << 27
"""The limits of a file in bytes: as it is, and after decompression."""
_MAX_VIEWS = 1 << 10
_MAX_PAGES = 1 << 16
_MAX_VCPUS = 1 << 13
_MAX_RUNS = 1 << 22
"""The limit of runs and remaps of all views together."""
_MAX_VALUES = 2 * _MAX_RUNS + (1 << 21)
_MAX_QUOTES = 1 << 21
"""Counted before a text is parsed; punctuation within labels counts, too."""
MAX_LABEL = 1 << 10
_PACKED_FROM = 1 << 16
_LEVEL = 1
"""gzip's level: the fastest reduces the size to a sixth already."""
_SHOWN = 80
_GZIP = b"\x1f\x8b"
_HEAD = re.compile(rb'\{"checksum":"([0-9a-f]{64})",')
_ACCESSES = {str(access): access for access in Access.__members__.values()}

_OF_STATE = frozenset(
    ("format", "version", "views", "pages", "vcpus", "notify", "monitor", "origin")
)
_OF_VIEW = frozenset(("label", "default", "visible", "access", "suppress_ve", "remaps"))
_OF_PAGE = frozenset(("sha256", "content"))
_OF_MONITOR = frozenset(("access_required", "subscriptions"))
_OF_SUBSCRIPTION = frozenset(("event", "options", "deniable"))
"""The fields of each object in this version of the format."""

_SUBSCRIPTIONS = {
    _event.__name__: _event.on()
    for _event in EVENTS.values()
    if _event not in (WriteCtrlreg, MovToMsr)
} | {
    "InguestPagefault": InguestPagefault,
    "WriteCtrlreg": WriteCtrlreg.on(ControlRegister.CR3),
    "MovToMsr": MovToMsr.on(0),
}
"""A subscription to each event, which shows the options that it has."""

Place: TypeAlias = int
"""A gfn, or an added page as a negative number: -1 is the first."""


@dataclass(frozen=True, slots=True)
class ViewState:
    """How a view differs from the host p2m.

    Attributes:
        label: Its name for people.
        default_access: The access of pages that Xen copies on first use.
        visible: Whether the guest's VMFUNC can reach it.
        access: Runs (first, count, access), in order.
        suppress_ve: Runs (first, count, bit), in order.
        remaps: Pairs (gfn, new gfn), in an order in which they can be made.
        more: Fields of a later version of the format, which are kept and written again.
    """

    label: str
    default_access: Access
    visible: bool
    access: Intervals[Access]
    suppress_ve: Intervals[bool]
    remaps: tuple[tuple[Place, Place], ...]
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class PageState:
    """A page that was added to the domain, usually a shadow page."""

    sha256: str
    content: bytes | None = field(default=None, repr=False)
    """4096 bytes, if contents were captured."""
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Fields of a later version of the format, which are kept and written again."""


@dataclass(frozen=True, slots=True)
class MonitorState:
    """The options of an open monitor, as arguments of :meth:`Domain.monitor`."""

    subscriptions: tuple[Subscription, ...]
    access_required: bool
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Fields of a later version of the format, which are kept and written again."""


@dataclass(frozen=True, slots=True)
class State:
    """The state of all views of a domain.

    Attributes:
        views: The views.
        pages: Pages that were added to the domain.
        vcpus: The index in ``views`` of each vCPU's view; None for view 0 or another agent's view.
        notify: Pairs of a vCPU with a #VE page, and the place of that page.
        monitor: The open monitor's options; None if no monitor is open.
        origin: Where it was captured, for people; it is not compared.
        more: Fields of a later version of the format, which are kept and written again.
    """

    views: tuple[ViewState, ...]
    pages: tuple[PageState, ...] = ()
    vcpus: tuple[int | None, ...] = ()
    notify: tuple[tuple[int, int], ...] = ()
    monitor: MonitorState | None = None
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_bytes(self, *, origin: bool = True) -> bytes:
        """Return the content of a file: JSON, compressed by gzip if it is long.

        Args:
            origin: Whether to include where it was captured. Except for this and for fields of a
                later version, equal states have the same bytes.

        Raises:
            StateError: It could not be read again: it exceeds a limit, its runs are not in order,
                or ``origin`` or ``more`` contain something that JSON does not support.
        """
        document = {
            **self.more,
            "format": FORMAT,
            "version": VERSION,
            "views": [_view_document(view) for view in self.views],
            "pages": [_page_document(page) for page in self.pages],
            "vcpus": list(self.vcpus),
            "notify": [list(one) for one in self.notify],
            "monitor": None if self.monitor is None else _monitor_document(self.monitor),
        }
        if origin:
            document["origin"] = dict(self.origin)
        try:
            text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise StateError(f"JSON does not support a value of the state: {error}") from error
        text = b'{"checksum":"%s",%s\n' % (hashlib.sha256(text).hexdigest().encode(), text[1:])
        _check_size(text)
        if _Reader().state(document) != self:
            raise StateError("a state of views cannot have runs or subscriptions out of order")
        data = gzip.compress(text, _LEVEL, mtime=0) if len(text) >= _PACKED_FROM else text
        if len(data) > MAX_FILE:
            raise StateError(f"the file would have {len(data)} bytes; the limit is {MAX_FILE}")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Read a state from a file's content.

        Raises:
            StateError: It is damaged, exceeds a limit, or has an unknown version.
        """
        if not isinstance(data, bytes):
            raise InvalidArgumentError(f"a file's content must be bytes, not {type(data).__name__}")
        return _Reader().state(_document(data))


def _document(data: bytes) -> dict[str, Any]:
    """Return a file's JSON object, after its checksum was verified and removed."""
    if len(data) > MAX_FILE:
        raise StateError(f"the file has {len(data)} bytes; the limit is {MAX_FILE}")
    if data.startswith(_GZIP):
        unpacker = zlib.decompressobj(31)
        try:
            data = unpacker.decompress(data, MAX_TEXT)
        except zlib.error as error:
            raise StateError("its gzip data is damaged") from error
        if not unpacker.eof or unpacker.unused_data:
            raise StateError(
                f"it has more than {MAX_TEXT} bytes after decompression, or is truncated"
            )
    _check_size(data)
    head = _HEAD.match(data)
    if head is None:
        raise StateError('not a state of views: it does not start with {"checksum":"')
    checksum = hashlib.sha256(b"{")
    checksum.update(memoryview(data)[head.end() : len(data) - data.endswith(b"\n")])
    if checksum.hexdigest().encode() != head[1]:
        raise StateError("checksum mismatch: it was altered or damaged")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateError("it is not JSON, or is nested too deeply") from error
    assert isinstance(document, dict)
    del document["checksum"]
    return document


def _check_size(text: bytes) -> None:
    """Check that parsing a text will not take too much memory."""
    values = most_values(text)
    if len(text) > MAX_TEXT or values > _MAX_VALUES or text.count(b'"') > _MAX_QUOTES:
        raise StateError(
            f"{len(text)} bytes, {values} values; the limits are {MAX_TEXT} and {_MAX_VALUES}"
        )
    if not text.isascii():
        raise StateError("a state of views must be ASCII: JSON has \\u for other characters")


class Difference(str):
    """A difference between two states, in words for people.

    Attributes:
        facts: The same for programs, as a JSON object: ``what`` differs, its place (``view``,
            ``gfn`` and ``count``, or the number of an added ``page``; ``vcpu``), and its value
            ``before`` and ``after``, null if there is none.
    """

    __slots__ = ("facts",)
    facts: dict[str, Any]

    def __new__(
        cls, words: str, what: str, before: Any = None, after: Any = None, **where: int
    ) -> Self:
        """Make a difference from its words and its facts."""
        self = super().__new__(cls, words)
        self.facts = {"what": what, **where, "before": before, "after": after}
        return self


def diff(before: State, after: State) -> list[Difference]:
    """List the differences between two states, in words and as facts; empty if they are equal."""
    check_kind("before", before, State, "a State")
    check_kind("after", after, State, "a State")
    found = []
    for number in range(max(len(before.views), len(after.views))):
        if number >= len(after.views):
            label = before.views[number].label
            words = f"view {number} ({label!r}) is gone"
            found.append(Difference(words, "view", before=label, view=number))
        elif number >= len(before.views):
            label = after.views[number].label
            words = f"view {number} ({label!r}) is new"
            found.append(Difference(words, "view", after=label, view=number))
        else:
            found += _view_diff(number, before.views[number], after.views[number])
    was, now = len(before.pages), len(after.pages)
    if was != now:
        found.append(Difference(f"{was} added pages, now {now}", "pages", was, now))
    found += [
        Difference(
            f"the content of added page {number} differs", "content", one.sha256, other.sha256,
            page=number,
        )
        for number, (one, other) in enumerate(zip(before.pages, after.pages, strict=False))
        if one.sha256 != other.sha256
    ]  # fmt: skip
    found += [
        Difference(
            f"vCPU {vcpu} was in {_of(one)}, now {_of(other)}", "vcpu", one, other, vcpu=vcpu
        )
        for vcpu, (one, other) in enumerate(zip(before.vcpus, after.vcpus, strict=False))
        if one != other
    ]
    was, now = len(before.vcpus), len(after.vcpus)
    if was != now:
        found.append(Difference(f"{was} vCPUs, now {now}", "vcpus", was, now))
    if before.notify != after.notify:
        words = f"#VE pages {dict(before.notify)}, now {dict(after.notify)}"
        pages = [[list(pair) for pair in state.notify] for state in (before, after)]
        found.append(Difference(words, "notify", *pages))
    if before.monitor != after.monitor:
        words = f"{_monitor_words(before.monitor)}, now {_monitor_words(after.monitor)}"
        monitors = [one and _monitor_document(one) for one in (before.monitor, after.monitor)]
        found.append(Difference(words, "monitor", *monitors))
    return found


def _view_diff(number: int, was: ViewState, now: ViewState) -> Iterator[Difference]:
    head = f"view {number}: "
    for name in ("label", "default_access", "visible"):
        before, after = getattr(was, name), getattr(now, name)
        if before != after:
            words = f"{head}{name} {before}, now {after}"
            yield Difference(words, name, _plain(before), _plain(after), view=number)
    for name in ("access", "suppress_ve"):
        for run, is_new in getattr(was, name).changes(getattr(now, name)):
            first, count, value = run
            words = f"{head}{name} {value} of {_run(run)} is {'new' if is_new else 'gone'}"
            values = (None, _plain(value)) if is_new else (_plain(value), None)
            yield Difference(words, name, *values, view=number, gfn=first, count=count)
    remaps, remaps_now = dict(was.remaps), dict(now.remaps)
    for gfn in sorted(remaps.keys() | remaps_now.keys()):
        one, other = remaps.get(gfn), remaps_now.get(gfn)
        if one != other:
            shown = ["itself" if place is None else _place(place) for place in (one, other)]
            words = f"{head}{_place(gfn)} shows {shown[1]}, before {shown[0]}"
            yield Difference(words, "remap", one, other, view=number, gfn=gfn)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Access) else value


def _run(run: tuple[Place, int, Any]) -> str:
    first, count, _ = run
    return _place(first) if count == 1 else f"gfns {first:#x}..{first + count - 1:#x}"


def _place(place: Place) -> str:
    return f"gfn {place:#x}" if place >= 0 else f"added page {-1 - place}"


def _monitor_words(monitor: MonitorState | None) -> str:
    if monitor is None:
        return "no monitor"
    events = [_event_of(one) + (f" {dict(one.options)}" if one.options else "")
             for one in monitor.subscriptions]  # fmt: skip
    required = ", with access_required" if monitor.access_required else ""
    return f"a monitor subscribed to {', '.join(events) or 'nothing'}{required}"


def _event_of(subscription: Subscription) -> str:
    return "InguestPagefault" if subscription.event is None else subscription.event.__name__


def _of(number: int | None) -> str:
    return "none of these views" if number is None else f"view {number}"


def _view_document(view: ViewState) -> dict[str, Any]:
    access = {str(value): flat for value, flat in _by_value(view.access).items()}
    bits = {"on" if bit else "off": flat for bit, flat in _by_value(view.suppress_ve).items()}
    return {
        **view.more,
        "label": view.label,
        "default": str(view.default_access),
        "visible": view.visible,
        "access": access,
        "suppress_ve": bits,
        "remaps": [number for remap in view.remaps for number in remap],
    }


def _by_value(runs: Intervals[Any]) -> dict[Any, list[int]]:
    """Return the runs of each value as a flat list: first, count, first, count."""
    found = {}
    for value in set(runs.values):
        chosen = [one is value for one in runs.values]
        pairs = zip(compress(runs.firsts, chosen), compress(runs.counts, chosen), strict=True)
        found[value] = list(chain.from_iterable(pairs))
    return found


def _monitor_document(monitor: MonitorState) -> dict[str, Any]:
    return {
        **monitor.more,
        "access_required": monitor.access_required,
        "subscriptions": [
            {"event": _event_of(one), "options": dict(one.options), "deniable": one.deniable}
            for one in monitor.subscriptions
        ],
    }


def _page_document(page: PageState) -> dict[str, Any]:
    found = {**page.more, "sha256": page.sha256}
    if page.content is not None:
        found["content"] = base64.b64encode(page.content).decode()
    return found


def is_label(label: object) -> TypeGuard[str]:
    """Check that a label is text that UTF-8 can encode, and not too long."""
    return (
        isinstance(label, str)
        and len(label) <= MAX_LABEL
        and label == label.encode(errors="replace").decode()
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class _Reader:
    """Reads a file's JSON object, and validates everything in it."""

    def __init__(self) -> None:
        self._runs_left = _MAX_RUNS

    def state(self, document: Mapping[str, Any]) -> State:
        if document.get("format") != FORMAT:
            raise StateError(
                f"not a state of views: its format is {_shown(document.get('format'))}"
            )
        if document.get("version") != VERSION:
            raise StateError(
                f"its version is {_shown(document.get('version'))}; this package reads {VERSION}"
            )
        pages = tuple(map(self._page, self._list(document, "pages", _MAX_PAGES)))
        self._pages = len(pages)
        views = tuple(map(self._view, self._list(document, "views", _MAX_VIEWS)))
        vcpus = self._vcpus(document, len(views))
        notify = self._notify(document)
        origin = document.get("origin", {})
        if not isinstance(origin, dict):
            self._refuse("an origin that is not an object")
        monitor = document.get("monitor")
        if monitor is not None:
            monitor = self._monitor(monitor)
        more = self._more(document, _OF_STATE)
        return State(views, pages, tuple(vcpus), tuple(notify), monitor, origin, more)

    def _vcpus(self, document: Mapping[str, Any], views: int) -> list[int | None]:
        vcpus = self._list(document, "vcpus", _MAX_VCPUS)
        for number in vcpus:
            if number is not None and not self._is_number(number, 0, views - 1):
                self._refuse(f"a vCPU in view {_shown(number)}")
        return vcpus

    def _notify(self, document: Mapping[str, Any]) -> list[tuple[int, int]]:
        notify: list[tuple[int, int]] = []
        for one in self._list(document, "notify", _MAX_VCPUS):
            if not (isinstance(one, list) and len(one) == 2):
                self._refuse("a #VE page that is not a pair")
            vcpu, gfn = one
            if not (
                self._is_number(vcpu, 0, _MAX_VCPUS)
                and self._is_number(gfn, -self._pages, GFN_LIMIT - 1)
            ):
                self._refuse("a #VE page with an invalid vCPU or gfn")
            notify.append((vcpu, gfn))
        if notify != sorted(set(notify)) or len({vcpu for vcpu, _ in notify}) < len(notify):
            self._refuse("#VE pages out of order")
        return notify

    def _view(self, document: Any) -> ViewState:
        if not isinstance(document, dict):
            self._refuse("a view that is not an object")
        label, visible = document.get("label"), document.get("visible")
        if not is_label(label):
            self._refuse(
                f"the label {_shown(label)}: it must be text of at most {MAX_LABEL} characters"
            )
        if not isinstance(visible, bool):
            self._refuse("a view that is neither visible nor hidden")
        default = document.get("default")
        if not isinstance(default, str) or default not in _ACCESSES or default == "default":
            self._refuse(f"a default access {_shown(default)}")
        access = self._runs(document.get("access"), {
            name: value for name, value in _ACCESSES.items() if value is not Access.DEFAULT
        })  # fmt: skip
        bits = self._runs(document.get("suppress_ve"), {"on": True, "off": False})
        flat = self._numbers(document.get("remaps"))
        remaps = tuple(zip(flat[::2], flat[1::2], strict=True))
        if len({gfn for gfn, _ in remaps}) < len(remaps) or any(gfn == new for gfn, new in remaps):
            self._refuse("a gfn that is remapped twice, or to itself")
        made = set()
        for gfn, new in remaps:
            for place in (gfn, new):
                if not self._is_number(place, -self._pages, GFN_LIMIT - 1):
                    self._refuse(f"a remap of {_shown(place)}")
            if new in made:
                self._refuse(f"a remap to {new}, which is remapped before it")
            made.add(gfn)
        more = self._more(document, _OF_VIEW)
        return ViewState(label, _ACCESSES[default], visible, access, bits, remaps, more)

    def _runs(self, document: Any, values: Mapping[str, Any]) -> Intervals[Any]:
        if not isinstance(document, dict):
            self._refuse("runs that are not an object")
        firsts: list[int] = []
        counts: list[int] = []
        held: list[Any] = []
        for name, numbers in document.items():
            if name not in values:
                self._refuse(f"runs of {_shown(name)}")
            flat = self._numbers(numbers)
            firsts += flat[::2]
            counts += flat[1::2]
            held += [values[name]] * (len(flat) // 2)
        order = sorted(range(len(firsts)), key=firsts.__getitem__)
        firsts, counts, held = ([column[at] for at in order] for column in (firsts, counts, held))
        ends = list(map(add, firsts, counts))
        own = bisect_left(firsts, 0)
        if firsts and (
            firsts[0] < -self._pages
            or ends[-1] > GFN_LIMIT
            or min(counts) < 1
            or max(counts[:own], default=1) > 1
            or any(map(gt, ends, firsts[1:]))
        ):
            self._refuse("runs that overlap, are empty, or exceed the range of gfns")
        return Intervals(tuple(firsts), tuple(counts), tuple(held))

    def _monitor(self, document: Any) -> MonitorState:
        if not isinstance(document, dict) or not isinstance(document.get("access_required"), bool):
            self._refuse("a monitor that is not an object, or has no access_required")
        found = tuple(map(self._subscription, self._list(document, "subscriptions", 1 << 8)))
        if [one.key for one in found] != sorted({one.key for one in found}, key=str):
            self._refuse("subscriptions out of order")
        more = self._more(document, _OF_MONITOR)
        return MonitorState(found, document["access_required"], more)

    def _subscription(self, document: Any) -> Subscription:
        if not isinstance(document, dict) or not isinstance(document.get("options"), dict):
            self._refuse("a subscription that is not an object, or has no options")
        event = document.get("event")
        plain = _SUBSCRIPTIONS.get(event) if isinstance(event, str) else None
        options, deniable = document["options"], document.get("deniable")
        # Ignoring an unknown field would subscribe to something else.
        if plain is None or not isinstance(deniable, bool) or document.keys() - _OF_SUBSCRIPTION:
            self._refuse(f"a subscription to {_shown(event)}")
        if {name: type(value) for name, value in options.items()} != {
            name: type(value) for name, value in plain.options.items()
        } or not all(0 <= value < 1 << 64 for value in options.values()):
            self._refuse(f"a subscription with options {_shown(options)}")
        return replace(plain, options=options, deniable=deniable)

    def _page(self, document: Any) -> PageState:
        if not isinstance(document, dict) or not isinstance(document.get("sha256"), str):
            self._refuse("a page without its checksum")
        digest, text = document["sha256"], document.get("content")
        more = self._more(document, _OF_PAGE)
        if text is None:
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                self._refuse(f"a checksum {_shown(digest)}")
            return PageState(digest, more=more)
        try:
            content = base64.b64decode(text, validate=True)
        except (ValueError, TypeError) as error:
            raise StateError("a page's content is damaged") from error
        if len(content) != PAGE_SIZE or hashlib.sha256(content).hexdigest() != digest:
            self._refuse("a page's content that does not match its checksum")
        return PageState(digest, content, more)

    @staticmethod
    def _more(document: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
        return {name: value for name, value in document.items() if name not in known}

    def _list(self, document: Mapping[str, Any], name: str, most: int) -> list[Any]:
        found = document.get(name)
        if not isinstance(found, list) or len(found) > most:
            self._refuse(f"{name} that are not a list, or more than {most}")
        return found

    def _numbers(self, found: Any) -> list[int]:
        if not isinstance(found, list) or len(found) % 2:
            self._refuse("a list of pairs that is not a list, or has an odd length")
        self._runs_left -= len(found) // 2
        if self._runs_left < 0:
            self._refuse(f"more than {_MAX_RUNS} runs and remaps")
        if set(map(type, found)) - {int}:
            self._refuse("a list of numbers with something else in it")
        return found

    @staticmethod
    def _is_number(value: object, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise StateError(f"a state of views cannot have {what}")
