# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's views as a value: what differs from the host p2m, to compare, keep and restore.

A :class:`State` has no numbers that mean something here and now only: views are told by their place
among the others, pages that were added to the domain by theirs. So the state of the same views is
the same in another domain, on another release, and equal states are the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, compress, pairwise
from operator import add, gt
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeGuard

from xenaltp2m.errors import LeftoverError, StateError, UnsupportedError
from xenaltp2m.events import (
    EVENTS,
    ControlRegister,
    InguestPagefault,
    MovToMsr,
    Subscription,
    WriteCtrlreg,
)
from xenaltp2m.handle import UndoList
from xenaltp2m.runs import FrozenRuns, Runs
from xenaltp2m.types import ALL_GFNS, GFN_LIMIT, HOST_VIEW, PAGE_SIZE, Access, VcpuId, ViewId
from xenaltp2m.view import existing_views, own_access

if TYPE_CHECKING:
    from xenaltp2m.altp2m import Altp2m
    from xenaltp2m.domain import Domain
    from xenaltp2m.monitor import Monitor
    from xenaltp2m.view import Progress, View

FORMAT = "xenaltp2m views"
VERSION = 1
MAX_FILE = 1 << 26
MAX_TEXT = 1 << 28
"""Bytes of a file, and of what is in it when it is unpacked."""
_MAX_VIEWS = 1 << 10
_MAX_PAGES = 1 << 16
_MAX_VCPUS = 1 << 13
_MAX_RUNS = 1 << 22
_MAX_LABEL = 1 << 10
_FOUR_GIB = 1 << 20
_UPPERMOST = 1 << 12
"""Both in pages."""
_SCANNED_AT_ONCE = 1 << 12
_PACKED_FROM = 1 << 16
_LEVEL = 1
"""Of gzip: the quickest makes a sixth of it already."""
_GZIP = b"\x1f\x8b"
_ACCESSES = {str(access): access for access in Access.__members__.values()}

_SUBSCRIPTIONS = {
    _event.__name__: _event.on()
    for _event in EVENTS.values()
    if _event not in (WriteCtrlreg, MovToMsr)
} | {
    "InguestPagefault": InguestPagefault,
    "WriteCtrlreg": WriteCtrlreg.on(ControlRegister.CR3),
    "MovToMsr": MovToMsr.on(0),
}
"""One of each event: what options it has."""

Place: TypeAlias = int
"""A gfn; or, below 0, a page that was added: -1 the first."""


@dataclass(frozen=True, slots=True)
class ViewState:
    """What of a view differs from the host p2m.

    Attributes:
        label: Its name for people.
        default_access: What pages get that it copies on first use.
        visible: Whether the guest's VMFUNC reaches it.
        access: Runs (first, count, access), in order.
        suppress_ve: Runs (first, count, bit), in order.
        remaps: (gfn, the one whose page it shows), in an order in which they can be made.
    """

    label: str
    default_access: Access
    visible: bool
    access: FrozenRuns[Access]
    suppress_ve: FrozenRuns[bool]
    remaps: tuple[tuple[Place, Place], ...]


@dataclass(frozen=True, slots=True)
class PageState:
    """A page that was added: a shadow, mostly."""

    sha256: str
    content: bytes | None = field(default=None, repr=False)
    """4096 bytes, where they were asked for."""


@dataclass(frozen=True, slots=True)
class MonitorState:
    """What a monitor hears of: for :meth:`Domain.monitor`, which takes both."""

    subscriptions: tuple[Subscription, ...]
    access_required: bool


@dataclass(frozen=True, slots=True)
class State:
    """All views of a domain.

    Attributes:
        views: They.
        pages: Pages that were added to the domain.
        vcpus: Of each vCPU its view's place among ``views``; None for view 0, and for others'.
        notify: vCPUs with a page for #VE, and its place.
        monitor: What the domain's monitor hears of; None where none is open.
        origin: Where it was captured: for people. It makes no difference between states.
        more: Fields that a later version of the format may have: kept, and written again.
    """

    views: tuple[ViewState, ...]
    pages: tuple[PageState, ...] = ()
    vcpus: tuple[int | None, ...] = ()
    notify: tuple[tuple[int, int], ...] = ()
    monitor: MonitorState | None = None
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_bytes(self, *, origin: bool = True) -> bytes:
        """Return the file: JSON, packed by gzip where it is long.

        Args:
            origin: Whether it says where it was captured; equal states differ in nothing else.

        Raises:
            StateError: It is past a limit, and could not be read again.
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
        text = _canonical(document)
        checksum = hashlib.sha256(text).hexdigest().encode()
        text = b'{"checksum":"%s",%s\n' % (checksum, text[1:])
        data = gzip.compress(text, _LEVEL, mtime=0) if len(text) >= _PACKED_FROM else text
        if len(text) > MAX_TEXT or len(data) > MAX_FILE:
            raise StateError(
                f"{len(text)} bytes, {len(data)} when packed; the limits are {MAX_TEXT} and "
                f"{MAX_FILE}"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Read a file's content.

        Raises:
            StateError: It is damaged, past a limit, or of a version this does not know.
        """
        return _Reader(data).state()


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


# Capturing.


def capture(
    altp2m: Altp2m,
    *,
    contents: bool = False,
    verify: bool | int = False,
    progress: Progress | None = None,
) -> State:
    """Describe the views made through a handle, by what was asked of them.

    Args:
        altp2m: The handle.
        contents: Whether the content of added pages is part of it, to restore them elsewhere.
        verify: Whether Xen is asked for the access of every gfn that was set; or of how many of
            each view, chosen at random.
        progress: Of that.

    Raises:
        StateError: With ``verify``: Xen has reset views. ``View.reapply`` makes them again.
    """
    domain, views = altp2m.domain, altp2m.views
    if verify:
        sample = None if verify is True else verify
        lost = [one for view in views for one in view.verify(sample=sample, progress=progress)]
        if lost:
            raise StateError(
                f"Xen has other access at {len(lost)} gfns, the first {lost[0].gfn:#x}: views were "
                "reset",
                domid=int(domain.domid),
                hint=("view.reapply() makes a view again",),
            )
    monitor = heard_by(domain._open_monitor)
    return describe(altp2m, monitor, altp2m.vcpu_views(), contents=contents)


def heard_by(monitor: Monitor | None) -> MonitorState | None:
    """Describe what a monitor hears of."""
    if monitor is None:
        return None
    return MonitorState(monitor.subscriptions, monitor.access_required)


def describe(
    altp2m: Altp2m,
    monitor: MonitorState | None,
    vcpu_views: Mapping[VcpuId, ViewId],
    *,
    contents: bool,
) -> State:
    """As :func:`capture`, with what it would ask Xen for given: the views may be gone by now."""
    domain, views = altp2m.domain, altp2m.views
    added = sorted(gfn for gfns in domain._added for gfn in gfns)
    places = {gfn: -1 - number for number, gfn in enumerate(added)}
    numbers = {int(view.id): number for number, view in enumerate(views)}
    pages = []
    for gfn in added:
        content = domain.memory.read_page(gfn)
        digest = hashlib.sha256(content).hexdigest()
        pages.append(PageState(digest, content if contents else None))
    return State(
        tuple(_capture_view(view, places) for view in views),
        tuple(pages),
        tuple(numbers.get(int(vcpu_views[vcpu])) for vcpu in sorted(vcpu_views)),
        tuple((vcpu, places.get(gfn, gfn)) for vcpu, gfn in sorted(altp2m._notified.items())),
        monitor,
        {**_origin(domain), "views": [int(view.id) for view in views], "added": added},
    )


def scan(domain: Domain, *, progress: Progress | None = None) -> State:
    """Describe the views of a domain by what Xen tells: somebody else has made them.

    Xen does not tell what is remapped, nor labels, nor which views are hidden; nor is what was set
    told from what Xen has copied from the host p2m, where they are alike. Two calls for each gfn
    and view; the domain stands still meanwhile. Looked at is where memory is: as many gfns as the
    domain may have pages, from 0 and from 4 GiB on, and the uppermost 4096, where special pages
    and added ones are.

    Args:
        domain: The domain.
        progress: Called after each batch of a view's gfns.

    Raises:
        StateError: altp2m is off.

    ``xc_altp2m_get_mem_access``, ``xc_altp2m_get_suppress_ve``.
    """
    if not domain.altp2m_active:
        raise StateError(f"altp2m of domain {domain.domid} is off: there are no views")
    with domain.paused():
        numbers = [view for view in existing_views(domain.xen.backend, domain.domid) if view]
        vcpus = [vcpu.view for vcpu in domain.vcpus()]
        return State(
            tuple(_scan_view(domain, ViewId(number), progress) for number in numbers),
            (),
            tuple(numbers.index(view) if view in numbers else None for view in vcpus),
            origin={**_origin(domain), "views": numbers, "added": [], "by": "what Xen tells"},
        )


def _scan_view(domain: Domain, number: ViewId, progress: Progress | None) -> ViewState:
    backend, domid = domain.xen.backend, domain.domid
    access_of = backend.release.access_by_number
    default = access_of[backend.altp2m_get_mem_access(domid, number, ALL_GFNS)]
    access: Runs[Access] = Runs()
    suppress_ve: Runs[bool] = Runs()
    places = _places_of_memory(domain.info().max_pages, domain.maximum_gfn)
    total = sum(map(len, places))
    for done, gfn in enumerate(chain.from_iterable(places), 1):
        own = own_access(backend, domid, number, gfn)
        if own is not None:
            lazy = default
            if not backend.release.lazy_copy_takes_view_default:
                lazy = own_access(backend, domid, HOST_VIEW, gfn) or default
            if own != lazy:
                access.set(gfn, own)
            if not backend.altp2m_get_suppress_ve(domid, number, gfn):
                suppress_ve.set(gfn, False)
        if progress is not None and (done % _SCANNED_AT_ONCE == 0 or done == total):
            progress(done, total)
    return ViewState("", default, True, access.frozen(), suppress_ve.frozen(), ())


def _places_of_memory(pages: int, last: int) -> list[range]:
    """Tell where a domain's memory may be, by gfn."""
    found: Runs[bool] = Runs()
    upper = max(last + 1 - _UPPERMOST, 0)
    for first, count in ((0, min(pages, _FOUR_GIB)), (_FOUR_GIB, pages), (upper, _UPPERMOST)):
        found.set_many(range(first, min(first + count, last + 1)), True)
    return [range(run.first, run.end) for run in found]


def compare(
    domain: Domain, state: State, *, sample: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Say in words where Xen has something else than a state that was captured of this domain.

    Args:
        domain: The domain; whoever has its views goes on.
        state: What was captured.
        sample: How many gfns of each view are looked at, chosen at random; None looks at all.
        progress: Called after each batch of a view's gfns.

    Raises:
        StateError: It was captured of another domain.
    """
    numbers, added = state.origin.get("views"), state.origin.get("added")
    if state.origin.get("domain") != str(domain.uuid) or not (
        _are_numbers(numbers) and _are_numbers(added)
        and len(numbers) == len(state.views) and len(added) == len(state.pages)
    ):  # fmt: skip
        raise StateError(
            f"it was not captured of domain {domain.domid}, {domain.uuid}, but of "
            f"{state.origin.get('domain')!r}",
            hint=("state diff compares two files",),
        )
    if not domain.altp2m_active:
        return ["altp2m is off"]
    found = _beyond(domain, state)
    if found:
        return found
    existing = existing_views(domain.xen.backend, domain.domid)
    for number, wanted in zip(numbers, state.views, strict=True):
        if number not in existing:
            found.append(f"view {number} is gone")
            continue
        found += _compare_view(domain, number, wanted, added, sample, progress)
    for vcpu, where in zip(domain.vcpus(), state.vcpus, strict=False):
        if where is not None and vcpu.view != numbers[where]:
            found.append(f"vCPU {vcpu.number} is in view {vcpu.view}, not {numbers[where]}")
    return found


def _are_numbers(found: object) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(
        type(one) is int and 0 <= one < GFN_LIMIT for one in found
    )


def _compare_view(
    domain: Domain, number: int, wanted: ViewState, added: Sequence[int], sample: int | None,
    progress: Progress | None,
) -> Iterator[str]:  # fmt: skip
    access: Runs[Access] = Runs()
    for first, count, value in wanted.access:
        start = first if first >= 0 else added[-1 - first]
        access.set_many(range(start, start + count), value)
    chosen = access.sample(sample)
    backend = domain.xen.backend
    for done, (gfn, expected) in enumerate(chosen, 1):
        own = own_access(backend, domain.domid, ViewId(number), gfn)
        if own != expected:
            now = "no entry" if own is None else str(own)
            yield f"view {number}: gfn {gfn:#x} has {now}, not {expected}"
        if progress is not None and (done % _SCANNED_AT_ONCE == 0 or done == len(chosen)):
            progress(done, len(chosen))


def _origin(domain: Domain) -> dict[str, Any]:
    return {
        "xen": str(domain.xen.release),
        "domain": str(domain.uuid),
        "name": domain.name or "",
    }


def _capture_view(view: View, places: Mapping[int, Place]) -> ViewState:
    def place(gfn: int) -> Place:
        return places.get(gfn, gfn)

    return ViewState(
        view.label or "",
        view.default_access,
        view.visible,
        _placed(view._access, places),
        _placed(view._suppress_ve, places),
        tuple((place(gfn), place(new)) for gfn, new in view._remaps_in_order()),
    )


def _placed(runs: Runs[Any], places: Mapping[int, Place]) -> FrozenRuns[Any]:
    """Return runs, those of added pages one by one, before the others."""
    if not places:
        return runs.frozen()
    low, high = min(places), max(places)
    own: list[tuple[Place, int, Any]] = []
    rest: list[tuple[Place, int, Any]] = []
    for first, end, value in runs:
        if end <= low or first > high:
            rest.append((first, end - first, value))
            continue
        edges = sorted({first, end, *(gfn for gfn in places if first <= gfn < end)} | {
            gfn + 1 for gfn in places if first <= gfn < end
        })  # fmt: skip
        for start, stop in pairwise(edges):
            if start in places:
                own.append((places[start], 1, value))
            else:
                rest.append((start, stop - start, value))
    return FrozenRuns.of(sorted(own, key=lambda run: run[0]) + rest)


# Comparing.


def diff(before: State, after: State) -> list[str]:
    """Say in words what is different; nothing where they are equal."""
    found = []
    for number in range(max(len(before.views), len(after.views))):
        if number >= len(after.views):
            found.append(f"view {number} ({before.views[number].label!r}) is gone")
        elif number >= len(before.views):
            found.append(f"view {number} ({after.views[number].label!r}) is new")
        else:
            found += [
                f"view {number}: {what}"
                for what in _view_diff(before.views[number], after.views[number])
            ]
    if len(before.pages) != len(after.pages):
        found.append(f"{len(before.pages)} added pages, now {len(after.pages)}")
    found += [
        f"added page {number} has another content"
        for number, (was, now) in enumerate(zip(before.pages, after.pages, strict=False))
        if was.sha256 != now.sha256
    ]
    found += [
        f"vCPU {vcpu} was in {_of(was)}, now {_of(now)}"
        for vcpu, (was, now) in enumerate(zip(before.vcpus, after.vcpus, strict=False))
        if was != now
    ]
    if len(before.vcpus) != len(after.vcpus):
        found.append(f"{len(before.vcpus)} vCPUs, now {len(after.vcpus)}")
    if before.notify != after.notify:
        found.append(f"#VE pages {dict(before.notify)}, now {dict(after.notify)}")
    if before.monitor != after.monitor:
        found.append(f"the monitor {_heard(before.monitor)}, now {_heard(after.monitor)}")
    return found


def _view_diff(was: ViewState, now: ViewState) -> Iterator[str]:
    for name in ("label", "default_access", "visible"):
        if getattr(was, name) != getattr(now, name):
            yield f"{name} {getattr(was, name)}, now {getattr(now, name)}"
    for name in ("access", "suppress_ve"):
        for run, is_new in getattr(was, name).changes(getattr(now, name)):
            yield f"{name} {run[2]} of {_run(run)} is {'new' if is_new else 'gone'}"
    before, after = dict(was.remaps), dict(now.remaps)
    for gfn in sorted(before.keys() | after.keys()):
        if before.get(gfn) != after.get(gfn):
            shown = [_place(one) if one is not None else "itself" for one in
                     (before.get(gfn), after.get(gfn))]  # fmt: skip
            yield f"{_place(gfn)} shows {shown[1]}, before {shown[0]}"


def _run(run: tuple[Place, int, Any]) -> str:
    first, count, _ = run
    return _place(first) if count == 1 else f"gfns {first:#x}..{first + count - 1:#x}"


def _place(place: Place) -> str:
    return f"gfn {place:#x}" if place >= 0 else f"added page {-1 - place}"


def _heard(monitor: MonitorState | None) -> str:
    if monitor is None:
        return "is none"
    heard = [_event_of(one) + (f" {dict(one.options)}" if one.options else "")
             for one in monitor.subscriptions]  # fmt: skip
    required = " and is required" if monitor.access_required else ""
    return f"hears of {', '.join(heard) or 'nothing'}{required}"


def _event_of(subscription: Subscription) -> str:
    return "InguestPagefault" if subscription.event is None else subscription.event.__name__


def _of(number: int | None) -> str:
    return "none of these views" if number is None else f"view {number}"


# Restoring.


def obstacles(altp2m: Altp2m, state: State) -> list[str]:
    """Say what keeps a state from being restored there; nothing where it can be."""
    domain, release = altp2m.domain, altp2m.domain.xen.release
    found = []
    wanted = {access for view in state.views for access in set(view.access.values)}
    wanted |= {view.default_access for view in state.views}
    found += [
        f"Xen {release} does not know the access {access}"
        for access in sorted(wanted - release.access_numbers.keys(), key=str)
    ]
    missing = sum(page.content is None for page in state.pages)
    if missing:
        found.append(f"the content of {missing} added pages was not captured")
    found += _beyond(domain, state)
    vcpus = domain.info().max_vcpu_id + 1
    if len({number for number in state.vcpus if number is not None}) > 1:
        found.append("its vCPUs are in several views, and Xen moves all or none")
    if any(vcpu >= vcpus for vcpu, _ in state.notify):
        found.append(f"it has a #VE page for a vCPU of which the domain has {vcpus}")
    return found


def _beyond(domain: Domain, state: State) -> list[str]:
    """Say what is past the domain's end: there may be far more of it than of the domain."""
    last, found = domain.maximum_gfn, []
    for what, name in ("access", "access"), ("a suppress-#VE bit", "suppress_ve"):
        every: list[FrozenRuns[Any]] = [getattr(view, name) for view in state.views]
        highest = max((runs.firsts[-1] + runs.counts[-1] - 1 for runs in every if runs), default=0)
        if highest > last:
            found.append(f"it has {what} for gfn {highest:#x}, and the domain ends at {last:#x}")
    return found


def restore(
    altp2m: Altp2m, state: State, *, switch: bool = True, progress: Progress | None = None
) -> list[View]:
    """Make the views of a state: all of them, or on error none.

    The domain stands still meanwhile.

    Args:
        altp2m: Where.
        state: What.
        switch: Whether the vCPUs go to the view they were in.
        progress: Called after each batch of gfns whose access is set.

    Returns:
        The views, as ``state`` has them.

    Raises:
        UnsupportedError: :func:`obstacles` has some.
        LeftoverError: Taking back what was made has failed, too.
    """
    altp2m._check_open()
    problems = obstacles(altp2m, state)
    if problems:
        raise UnsupportedError(
            f"the state cannot be restored: {'; '.join(problems)}",
            domid=int(altp2m.domain.domid),
        )
    return _Restorer(altp2m, state, progress).run(switch)


class _Restorer:
    """Makes the views of one state."""

    def __init__(self, altp2m: Altp2m, state: State, progress: Progress | None) -> None:
        self._altp2m, self._domain, self._state = altp2m, altp2m.domain, state
        self._progress = progress
        self._undo = UndoList()
        self._added: Sequence[int] = ()

    def run(self, switch: bool) -> list[View]:
        with self._domain.paused():
            try:
                return self._make(switch)
            except BaseException as error:
                try:
                    self._undo.roll_back(error)
                except LeftoverError:
                    self._domain._undo.adopt(self._undo)
                    raise
                raise

    def _make(self, switch: bool) -> list[View]:
        state, domain = self._state, self._domain
        if state.pages:
            added = domain.add_pages(len(state.pages))
            self._undo.push("", lambda: domain.remove_pages(added))
            self._added = added
            for gfn, page in zip(added, state.pages, strict=True):
                assert page.content is not None
                domain.memory.write_page(gfn, page.content)
        views = []
        for wanted in state.views:
            view = self._altp2m.create_view(wanted.default_access, label=wanted.label or None)
            self._undo.push("", view.close)
            views.append(view)
            self._fill(view, wanted)
        for vcpu, gfn in state.notify:
            self._altp2m.enable_notify(vcpu, self._gfn(gfn))
            what = f"#VE page of vCPU {vcpu} of domain {domain.domid}"
            self._undo.push(what, partial(self._altp2m.disable_notify, vcpu))
        places = {number for number in state.vcpus if number is not None}
        if switch and places:
            self._altp2m.switch_to_view(views[places.pop()])
            self._undo.push("", lambda: self._altp2m.switch_to_view(None))
        for view, wanted in zip(views, state.views, strict=True):
            if not wanted.visible:
                view.set_visibility(False)
        return views

    def _fill(self, view: View, wanted: ViewState) -> None:
        remapped = sorted(gfn for gfn, _ in wanted.remaps)
        later: dict[Place, Access] = {}
        for first, count, access in wanted.access:
            inside = remapped[bisect_left(remapped, first) : bisect_left(remapped, first + count)]
            later |= dict.fromkeys(inside, access)
            at = first
            for gfn in [*inside, first + count]:
                if gfn > at:
                    self._set(view, at, gfn - at, access)
                at = gfn + 1
        for gfn, new in wanted.remaps:
            view.remap(self._gfn(gfn), self._gfn(new), access=later.get(gfn))
        for first, count, bit in wanted.suppress_ve:
            start = self._gfn(first)
            view.set_suppress_ve(start if count == 1 else range(start, start + count), bit)

    def _set(self, view: View, first: Place, count: int, access: Access) -> None:
        start = self._gfn(first)
        gfns = start if count == 1 else range(start, start + count)
        view.set_access(gfns, access, progress=self._progress if count > 1 else None)

    def _gfn(self, place: Place) -> int:
        return place if place >= 0 else self._added[-1 - place]


# The file.


def _view_document(view: ViewState) -> dict[str, Any]:
    access = {str(value): flat for value, flat in _by_value(view.access).items()}
    bits = {"on" if bit else "off": flat for bit, flat in _by_value(view.suppress_ve).items()}
    return {
        "label": view.label,
        "default": str(view.default_access),
        "visible": view.visible,
        "access": access,
        "suppress_ve": bits,
        "remaps": [number for remap in view.remaps for number in remap],
    }


def _by_value(runs: FrozenRuns[Any]) -> dict[Any, list[int]]:
    """Of each value its runs, one after another: first, count, first, count."""
    found = {}
    for value in set(runs.values):
        chosen = [one is value for one in runs.values]
        pairs = zip(compress(runs.firsts, chosen), compress(runs.counts, chosen), strict=True)
        found[value] = list(chain.from_iterable(pairs))
    return found


def _monitor_document(monitor: MonitorState) -> dict[str, Any]:
    return {
        "access_required": monitor.access_required,
        "subscriptions": [
            {"event": _event_of(one), "options": dict(one.options), "deniable": one.deniable}
            for one in monitor.subscriptions
        ],
    }


def _page_document(page: PageState) -> dict[str, str]:
    found = {"sha256": page.sha256}
    if page.content is not None:
        found["content"] = base64.b64encode(page.content).decode()
    return found


class _Reader:
    """Reads a file, and believes nothing of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def state(self) -> State:
        document = self._document()
        if document.get("format") != FORMAT:
            raise StateError(f"not a state of views: its format is {document.get('format')!r}")
        if document.get("version") != VERSION:
            raise StateError(
                f"its version is {document.get('version')!r}; this package knows {VERSION}"
            )
        checksum = document.pop("checksum", None)
        if checksum != hashlib.sha256(_canonical(document)).hexdigest():
            raise StateError("its checksum is another: it was altered, or damaged")
        pages = tuple(map(self._page, self._list(document, "pages", _MAX_PAGES)))
        self._pages = len(pages)
        views = tuple(map(self._view, self._list(document, "views", _MAX_VIEWS)))
        vcpus = self._list(document, "vcpus", _MAX_VCPUS)
        for number in vcpus:
            if number is not None and not self._is_number(number, 0, len(views) - 1):
                self._refuse(f"a vCPU in view {number!r}")
        notify = []
        for one in self._list(document, "notify", _MAX_VCPUS):
            if not (isinstance(one, list) and len(one) == 2):
                self._refuse("a #VE page that is not a pair")
            vcpu, gfn = one
            if not (
                self._is_number(vcpu, 0, _MAX_VCPUS)
                and self._is_number(gfn, -self._pages, GFN_LIMIT - 1)
            ):
                self._refuse("a #VE page of nobody")
            notify.append((vcpu, gfn))
        if notify != sorted(set(notify)) or len({vcpu for vcpu, _ in notify}) < len(notify):
            self._refuse("#VE pages out of order")
        origin = document.get("origin", {})
        if not isinstance(origin, dict):
            self._refuse("an origin that is none")
        monitor = document.get("monitor")
        if monitor is not None:
            monitor = self._monitor(monitor)
        known = {"format", "version", "views", "pages", "vcpus", "notify", "monitor", "origin"}
        more = {name: value for name, value in document.items() if name not in known}
        return State(views, pages, tuple(vcpus), tuple(notify), monitor, origin, more)

    def _document(self) -> dict[str, Any]:
        data = self._data
        if len(data) > MAX_FILE:
            raise StateError(f"{len(data)} bytes; the limit is {MAX_FILE}")
        try:
            if data.startswith(_GZIP):
                unpacker = zlib.decompressobj(31)
                data = unpacker.decompress(data, MAX_TEXT)
                if not unpacker.eof or unpacker.unused_data:
                    self._refuse("a packed text that is too long, or was cut off")
            document = json.loads(data)
        except (ValueError, RecursionError, zlib.error) as error:
            raise StateError("neither JSON nor JSON packed by gzip, or damaged") from error
        if not isinstance(document, dict):
            self._refuse("no object")
        return document

    def _view(self, document: Any) -> ViewState:
        if not isinstance(document, dict):
            self._refuse("a view that is no object")
        label, visible = document.get("label"), document.get("visible")
        if not (isinstance(label, str) and len(label) <= _MAX_LABEL and isinstance(visible, bool)):
            self._refuse("a view without label or visibility")
        default = _ACCESSES.get(str(document.get("default")))
        if default is None or default is Access.DEFAULT:
            self._refuse(f"a default access {document.get('default')!r}")
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
                    self._refuse(f"a remap of {place}")
            if new in made:
                self._refuse(f"a remap to {new}, which is remapped itself by then")
            made.add(gfn)
        return ViewState(label, default, visible, access, bits, remaps)

    def _runs(self, document: Any, values: Mapping[str, Any]) -> FrozenRuns[Any]:
        if not isinstance(document, dict):
            self._refuse("runs that are none")
        firsts: list[int] = []
        counts: list[int] = []
        held: list[Any] = []
        for name, numbers in document.items():
            if name not in values:
                self._refuse(f"runs of {name!r}")
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
            self._refuse("runs that overlap, or of no gfn")
        return FrozenRuns(tuple(firsts), tuple(counts), tuple(held))

    def _monitor(self, document: Any) -> MonitorState:
        if not isinstance(document, dict) or not isinstance(document.get("access_required"), bool):
            self._refuse("a monitor that is none")
        found = tuple(map(self._subscription, self._list(document, "subscriptions", 1 << 8)))
        if [one.key for one in found] != sorted({one.key for one in found}, key=str):
            self._refuse("subscriptions out of order")
        return MonitorState(found, document["access_required"])

    def _subscription(self, document: Any) -> Subscription:
        if not isinstance(document, dict) or not isinstance(document.get("options"), dict):
            self._refuse("a subscription that is none")
        plain = _SUBSCRIPTIONS.get(str(document.get("event")))
        options, deniable = document["options"], document.get("deniable")
        if plain is None or not isinstance(deniable, bool):
            self._refuse(f"a subscription to {str(document.get('event'))[:80]!r}")
        if {name: type(value) for name, value in options.items()} != {
            name: type(value) for name, value in plain.options.items()
        } or not all(0 <= value < 1 << 64 for value in options.values()):
            self._refuse(f"a subscription with options {str(options)[:80]}")
        return replace(plain, options=options, deniable=deniable)

    def _page(self, document: Any) -> PageState:
        if not isinstance(document, dict) or not isinstance(document.get("sha256"), str):
            self._refuse("a page without its checksum")
        digest, text = document["sha256"], document.get("content")
        if text is None:
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                self._refuse(f"a checksum {digest[:80]!r}")
            return PageState(digest)
        try:
            content = base64.b64decode(text, validate=True)
        except (ValueError, TypeError) as error:
            raise StateError("a page's content is damaged") from error
        if len(content) != PAGE_SIZE or hashlib.sha256(content).hexdigest() != digest:
            self._refuse("a page's content that is not what its checksum says")
        return PageState(digest, content)

    def _list(self, document: dict[str, Any], name: str, most: int) -> list[Any]:
        found = document.get(name)
        if not isinstance(found, list) or len(found) > most:
            self._refuse(f"{name} that are none, or more than {most}")
        return found

    def _numbers(self, found: Any) -> list[int]:
        if not isinstance(found, list) or len(found) % 2 or len(found) > 2 * _MAX_RUNS:
            self._refuse("pairs of numbers that are none")
        if set(map(type, found)) - {int}:
            self._refuse("something that should be a number")
        return list(found)

    @staticmethod
    def _is_number(value: object, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise StateError(f"a state of views cannot have {what}")
