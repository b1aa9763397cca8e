# SPDX-License-Identifier: LGPL-2.1-or-later
"""Capture a domain's views as a :class:`~xenaltp2m.values.state.State`, and restore them."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

from xenaltp2m.errors import LeftoverError, StateError, UnsupportedError, XenError
from xenaltp2m.handles.altp2m import Altp2m, warning_of_default
from xenaltp2m.handles.base import UndoList
from xenaltp2m.handles.context import DomainContext, EventListener
from xenaltp2m.handles.domain import Domain
from xenaltp2m.handles.memory import Memory
from xenaltp2m.handles.pages import AddedPages
from xenaltp2m.handles.probe import existing_views, own_access
from xenaltp2m.handles.signals import guard
from xenaltp2m.handles.view import View
from xenaltp2m.types import ALL_GFNS, GFN_LIMIT, HOST_VIEW, Access, MemoryType, VcpuId, ViewId
from xenaltp2m.values.arguments import check_flag, check_kind, check_progress, check_sample
from xenaltp2m.values.intervals import IntervalMap, Intervals
from xenaltp2m.values.state import Difference, MonitorState, PageState, Place, State, ViewState

if TYPE_CHECKING:
    from xenaltp2m.values.gfns import Progress

_LOG = logging.getLogger(__name__)
LOOKED_AT = 1 << 12
"""The gfns of each new view that are verified, because Xen may have skipped some."""
_FOUR_GIB = 1 << 20
_UPPERMOST = 1 << 12
"""Both in pages."""
_SCANNED_AT_ONCE = 1 << 12


def capture(
    altp2m: Altp2m,
    *,
    contents: bool = False,
    verify: bool | int = False,
    progress: Progress | None = None,
) -> State:
    """Capture the views created through a handle, as they were set.

    Args:
        altp2m: The handle.
        contents: Whether to include the content of added pages, to restore them elsewhere.
        verify: Whether to compare every gfn that was set with Xen's access; or the number of gfns
            to compare in each view, chosen at random.
        progress: Called during the verification.

    Raises:
        StateError: With ``verify``: Xen has reset views. ``View.reapply`` restores them.
    """
    check_kind("altp2m", altp2m, Altp2m, "an Altp2m")
    check_flag("contents", contents)
    check_progress(progress)
    if not isinstance(verify, bool):
        check_sample(verify)
    context, views = altp2m.context, altp2m.views
    if verify:
        sample = None if verify is True else verify
        lost = [one for view in views for one in view.verify(sample=sample, progress=progress)]
        if lost:
            raise StateError(
                f"Xen has other access at {len(lost)} gfns, the first {lost[0].gfn:#x}: views were "
                "reset",
                domid=int(context.domid),
                hint=("restore each view: view.reapply()",),
            )
    monitor = monitor_state(context.open_monitor)
    return describe(altp2m, monitor, altp2m.vcpu_views(), contents=contents)


def monitor_state(monitor: EventListener | None) -> MonitorState | None:
    """Describe a monitor's subscriptions."""
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
    """Capture like :func:`capture`, from given answers of Xen: the views may be gone already."""
    context, views = altp2m.context, altp2m.views
    added = sorted(gfn for gfns in context.added for gfn in gfns)
    places = {gfn: -1 - number for number, gfn in enumerate(added)}
    numbers = {int(view.id): number for number, view in enumerate(views)}
    pages, memory = [], Memory(context)
    for gfn in added:
        content = memory.read_page(gfn)
        digest = hashlib.sha256(content).hexdigest()
        pages.append(PageState(digest, content if contents else None))
    return State(
        tuple(_capture_view(view, places) for view in views),
        tuple(pages),
        tuple(numbers.get(int(vcpu_views[vcpu])) for vcpu in sorted(vcpu_views)),
        tuple((vcpu, places.get(gfn, gfn)) for vcpu, gfn in sorted(altp2m.notified.items())),
        monitor,
        {**_origin(context), "views": [int(view.id) for view in views], "added": added},
    )


def _capture_view(view: View, places: Mapping[int, Place]) -> ViewState:
    def place(gfn: int) -> Place:
        return places.get(gfn, gfn)

    return ViewState(
        view.label or "",
        view.default_access,
        view.visible,
        _placed(view.model.access, places),
        _placed(view.model.suppress_ve, places),
        tuple((place(gfn), place(new)) for gfn, new in view.remaps_in_order()),
    )


def _placed(runs: IntervalMap[Any], places: Mapping[int, Place]) -> Intervals[Any]:
    """Return runs with added pages split into single ones, before the others."""
    if not places:
        return runs.frozen()
    added = sorted(places)
    own: list[tuple[Place, int, Any]] = []
    rest: list[tuple[Place, int, Any]] = []
    for first, end, value in runs:
        at = first
        for gfn in added[bisect_left(added, first) : bisect_left(added, end)]:
            own.append((places[gfn], 1, value))
            if at < gfn:
                rest.append((at, gfn - at, value))
            at = gfn + 1
        if at < end:
            rest.append((at, end - at, value))
    return Intervals.of(sorted(own, key=lambda run: run[0]) + rest)


def _origin(domain: DomainContext) -> dict[str, Any]:
    return {
        "xen": str(domain.release),
        "domain": str(domain.uuid),
        "name": domain.name or "",
    }


def scan(domain: Domain, *, progress: Progress | None = None) -> State:
    """Describe the views of a domain as Xen reports them, for views of another owner.

    Xen does not report remaps, labels, and which views are hidden. Access that was set cannot be
    told apart from equal access that Xen has copied from the host p2m. It takes two calls for each
    gfn and view, with the domain paused. It scans the gfns where memory is: as many as the domain
    may have pages, from 0 and from 4 GiB on, and the uppermost 4096, where special pages and added
    ones are.

    Args:
        domain: The domain.
        progress: Called after each batch of a view's gfns.

    Raises:
        StateError: altp2m is off.

    ``xc_altp2m_get_mem_access``, ``xc_altp2m_get_suppress_ve``.
    """
    check_kind("domain", domain, Domain, "a Domain")
    check_progress(progress)
    if not domain.altp2m_active:
        raise StateError(f"altp2m of domain {domain.domid} is off: there are no views")
    with domain.paused():
        numbers = [view for view in existing_views(domain.xen.backend, domain.domid) if view]
        vcpus = [vcpu.view for vcpu in domain.vcpus()]
        return State(
            tuple(_scan_view(domain, ViewId(number), progress) for number in numbers),
            (),
            tuple(numbers.index(view) if view in numbers else None for view in vcpus),
            origin={
                **_origin(domain.context),
                "views": numbers,
                "added": [],
                "by": "what Xen reports",
            },
        )


def _scan_view(domain: Domain, number: ViewId, progress: Progress | None) -> ViewState:
    backend, domid = domain.xen.backend, domain.domid
    access_of = backend.release.access_by_number
    default = access_of[backend.altp2m_get_mem_access(domid, number, ALL_GFNS)]
    access: IntervalMap[Access] = IntervalMap()
    suppress_ve: IntervalMap[bool] = IntervalMap()
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
    """Return the ranges of gfns where a domain's memory may be."""
    found: IntervalMap[bool] = IntervalMap()
    upper = max(last + 1 - _UPPERMOST, 0)
    for first, count in ((0, min(pages, _FOUR_GIB)), (_FOUR_GIB, pages), (upper, _UPPERMOST)):
        found.set_many(range(first, min(first + count, last + 1)), True)
    return [range(run.first, run.end) for run in found]


def compare(
    domain: Domain, state: State, *, sample: int | None = None, progress: Progress | None = None
) -> list[Difference]:
    """Compare a state that was captured from this domain with Xen's; list the differences.

    Args:
        domain: The domain; the owner of its views may go on.
        state: The captured state.
        sample: The number of gfns to compare in each view, chosen at random; None compares all.
        progress: Called after each batch of a view's gfns.

    Raises:
        StateError: It was captured from another domain.
    """
    check_kind("domain", domain, Domain, "a Domain")
    check_kind("state", state, State, "a State")
    check_sample(sample)
    check_progress(progress)
    numbers, added = state.origin.get("views"), state.origin.get("added")
    if state.origin.get("domain") != str(domain.uuid) or not (
        _are_numbers(numbers) and _are_numbers(added)
        and len(numbers) == len(state.views) and len(added) == len(state.pages)
    ):  # fmt: skip
        raise StateError(
            f"the state was not captured from domain {domain.domid}, {domain.uuid}, but from "
            f"{state.origin.get('domain')!r}",
            hint=("to compare two files: xenaltp2m state diff",),
        )
    if not domain.altp2m_active:
        return [Difference("altp2m is off", "altp2m", before=True, after=False)]
    if beyond := _beyond(domain.context, state):
        return [Difference(words, "beyond") for words in beyond]
    found: list[Difference] = []
    existing = existing_views(domain.xen.backend, domain.domid)
    for number, wanted in zip(numbers, state.views, strict=True):
        if number not in existing:
            words = f"view {number} is gone"
            found.append(Difference(words, "view", before=wanted.label, view=number))
            continue
        found += _compare_view(domain, number, wanted, added, sample, progress)
    for vcpu, where in zip(domain.vcpus(), state.vcpus, strict=False):
        if where is not None and vcpu.view != numbers[where]:
            expected, view = numbers[where], int(vcpu.view)
            words = f"vCPU {vcpu.number} is in view {view}, not {expected}"
            found.append(Difference(words, "vcpu", expected, view, vcpu=vcpu.number))
    return found


def _are_numbers(found: object) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(
        type(one) is int and 0 <= one < GFN_LIMIT for one in found
    )


def _compare_view(
    domain: Domain, number: int, wanted: ViewState, added: Sequence[int], sample: int | None,
    progress: Progress | None,
) -> Iterator[Difference]:  # fmt: skip
    access: IntervalMap[Access] = IntervalMap()
    for first, count, value in wanted.access:
        start = first if first >= 0 else added[-1 - first]
        access.set_many(range(start, start + count), value)
    chosen = access.sample(sample)
    backend = domain.xen.backend
    for done, (gfn, expected) in enumerate(chosen, 1):
        own = own_access(backend, domain.domid, ViewId(number), gfn)
        if own != expected:
            now = "no entry" if own is None else str(own)
            words = f"view {number}: gfn {gfn:#x} has {now}, not {expected}"
            after = None if own is None else str(own)
            yield Difference(words, "access", str(expected), after, view=number, gfn=gfn, count=1)
        if progress is not None and (done % _SCANNED_AT_ONCE == 0 or done == len(chosen)):
            progress(done, len(chosen))


def obstacles(domain: Domain, state: State) -> list[str]:
    """List the obstacles to restoring a state in a domain; empty if there are none."""
    check_kind("state", state, State, "a State")
    check_kind("domain", domain, Domain, "a Domain")
    return _obstacles(domain.context, state)


def _obstacles(context: DomainContext, state: State) -> list[str]:
    release, found = context.release, []
    wanted = {access for view in state.views for access in set(view.access.values)}
    wanted |= {view.default_access for view in state.views}
    found += [
        f"Xen {release} does not know the access {access}"
        for access in sorted(wanted - release.access_numbers.keys(), key=str)
    ]
    missing = sum(page.content is None for page in state.pages)
    if missing:
        found.append(f"the content of {missing} added pages was not captured")
    found += _too_many(context, state)
    found += _beyond(context, state)
    found += _not_ram(context, state)
    vcpus = context.info().max_vcpu_id + 1
    if len({number for number in state.vcpus if number is not None}) > 1:
        found.append("its vCPUs are in several views, but Xen moves all of them or none")
    if any(vcpu >= vcpus for vcpu, _ in state.notify):
        found.append(f"it has a #VE page for a vCPU that the domain, with {vcpus}, does not have")
    return found


def differences(domain: Domain, state: State) -> list[str]:
    """List what would have another effect if a state were restored in a domain."""
    check_kind("state", state, State, "a State")
    check_kind("domain", domain, Domain, "a Domain")
    return [
        f"view {number}: {warning}"
        for number, view in enumerate(state.views)
        if (warning := warning_of_default(view.default_access, domain.xen.release)) is not None
    ]


def _too_many(context: DomainContext, state: State) -> Iterator[str]:
    """Report if there are more views than the domain can still have."""
    most = context.view_count()
    if most is None or not state.views:
        return
    made = 1
    if context.altp2m_active:
        made = len(existing_views(context.backend, context.domid))
    if len(state.views) > most - made:
        yield f"it has {len(state.views)} views, but the domain can have {most - made} more"


def _not_ram(context: DomainContext, state: State) -> Iterator[str]:
    """Report gfns that Xen would not remap."""
    places = {place for view in state.views for remap in view.remaps for place in remap}
    last, backend = context.maximum_gfn, context.backend
    missing = [gfn for gfn in places if gfn > last]
    with suppress(XenError):  # if Xen cannot answer, restoring finds out
        missing += [
            gfn
            for gfn in places
            if 0 <= gfn <= last
            and backend.hvm_get_mem_type(context.domid, gfn) is not MemoryType.RAM
        ]
    if missing:
        yield (
            f"{len(missing)} gfns that are remapped, or remapped to, are not ordinary RAM, the "
            f"first {min(missing):#x}"
        )


def _beyond(context: DomainContext, state: State) -> list[str]:
    """List what is beyond the domain's last gfn, which may be far more than the domain has."""
    last, found = context.maximum_gfn, []
    for what, name in ("access", "access"), ("a suppress-#VE bit", "suppress_ve"):
        every: list[Intervals[Any]] = [getattr(view, name) for view in state.views]
        highest = max((runs.firsts[-1] + runs.counts[-1] - 1 for runs in every if runs), default=0)
        if highest > last:
            found.append(f"it has {what} for gfn {highest:#x}, but the domain ends at {last:#x}")
    return found


def restore(
    altp2m: Altp2m, state: State, *, switch: bool = True, progress: Progress | None = None
) -> list[View]:
    """Create the views of a state: all of them, or on error none.

    The domain is paused meanwhile.

    Args:
        altp2m: The handle of the domain's altp2m.
        state: The state.
        switch: Whether to move the vCPUs to the view they were in.
        progress: Called after each batch of gfns whose access is set.

    Returns:
        The views, in the order of ``state``.

    Raises:
        UnsupportedError: :func:`obstacles` finds some.
        LeftoverError: Undoing a failed restoration has failed, too.
    """
    check_kind("altp2m", altp2m, Altp2m, "an Altp2m")
    altp2m.check_open()
    check_kind("state", state, State, "a State")
    check_flag("switch", switch)
    check_progress(progress)
    problems = _obstacles(altp2m.context, state)
    if problems:
        raise UnsupportedError(
            f"the state cannot be restored: {'; '.join(problems)}",
            domid=int(altp2m.context.domid),
        )
    views = _Restorer(altp2m, state, progress).run(switch)
    _LOG.info("%r: %d views restored, with %d pages", altp2m, len(views), len(state.pages))
    return views


class _Restorer:
    """Creates the views of one state."""

    def __init__(self, altp2m: Altp2m, state: State, progress: Progress | None) -> None:
        self._altp2m, self._context, self._state = altp2m, altp2m.context, state
        self._progress = progress
        self._undo = UndoList()
        self._added: Sequence[int] = ()

    def run(self, switch: bool) -> list[View]:
        with self._context.paused():
            try:
                return self._make(switch)
            except BaseException as error:
                try:
                    self._undo.roll_back(error)
                except LeftoverError:
                    self._context.undo.adopt(self._undo)
                    raise
                raise

    def _make(self, switch: bool) -> list[View]:
        state, context = self._state, self._context
        if state.pages:
            pages, memory = AddedPages(context), Memory(context)
            added = self._undo.do("", partial(pages.add, len(state.pages)), pages.remove)
            self._added = added
            for gfn, page in zip(added, state.pages, strict=True):
                assert page.content is not None
                memory.write_page(gfn, page.content)
        views = []
        for wanted in state.views:
            view = self._undo.do("", partial(self._create, wanted), View.close)
            views.append(view)
            self._fill(view, wanted)
        for vcpu, gfn in state.notify:
            with guard.holding_back():
                self._altp2m.enable_notify(vcpu, self._gfn(gfn))
                what = f"#VE page of vCPU {vcpu} of domain {context.domid}"
                self._undo.push(what, partial(self._altp2m.disable_notify, vcpu))
        places = {number for number in state.vcpus if number is not None}
        if switch and places:
            with guard.holding_back():
                self._altp2m.switch_to_view(views[places.pop()])
                self._undo.push("", lambda: self._altp2m.switch_to_view(None))
        for view, wanted in zip(views, state.views, strict=True):
            if not wanted.visible:
                view.set_visibility(False)
        return views

    def _create(self, wanted: ViewState) -> View:
        return self._altp2m.create_view(wanted.default_access, label=wanted.label or None)

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
