# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of a handle: one owner, one end, whatever happens in between."""

from __future__ import annotations

import gc
import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from errno import EINVAL, EPERM
from functools import partial
from types import GeneratorType
from typing import Any

import pytest

import xenaltp2m as xa
from xenaltp2m import (
    Access,
    Altp2m,
    ClosedError,
    Domain,
    DomainNotFoundError,
    LeftoverError,
    NotMappedError,
    View,
    Xen,
    connect,
)
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Domain as Model
from xenaltp2m.handles.base import Handle, UndoList

from .effective import changes, state_of

KINDS = [Xen, Domain, Altp2m, View]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)

WITHOUT_HYPERVISOR = {
    "closed", "close", "abandon", "release", "views", "tracking", "remaps", "tracks", "visible",
    "differences", "domid", "id", "open_altp2m", "open_monitor", "close_children", "is_gone",
    "note_vcpus_moved", "move_vcpus_back", "remaps_in_order", "remove_listener",
}  # fmt: skip
"""What still answers after the close: facts that handles hold themselves."""


@pytest.fixture
def handles(xen: Xen, dom: Domain, altp2m: Altp2m, view: View) -> dict[type[Handle], Handle]:
    return {Xen: xen, Domain: dom, Altp2m: altp2m, View: view}


def uses(handle: Handle) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every public property and method of a handle, the methods with a 1 for each argument."""
    for name, member in inspect.getmembers(type(handle)):
        if name == "reattach":
            continue  # it is for what was detached
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield name, partial(getattr, handle, name)
        elif callable(member):
            needed = [
                parameter
                for parameter in inspect.signature(member).parameters.values()
                if parameter.default is parameter.empty and parameter.name != "self"
            ]
            yield name, partial(used, getattr(handle, name), len(needed))


def used(method: Callable[..., object], count: int) -> object:
    result = method(*[1] * count)
    if isinstance(result, AbstractContextManager):
        with result:
            return result
    if isinstance(result, GeneratorType):
        return next(result)
    return result


@kinds
def test_a_second_close_does_nothing(
    kind: type[Handle], handles: dict[type[Handle], Handle], mock: MockBackend
) -> None:
    handle = handles[kind]
    assert not handle.closed
    handle.close()
    assert handle.closed
    calls = len(mock.calls)
    handle.close()
    assert len(mock.calls) == calls


@kinds
def test_a_closed_handle_is_of_no_use(
    kind: type[Handle], handles: dict[type[Handle], Handle], mock: MockBackend
) -> None:
    handle = handles[kind]
    handle.close()
    calls = len(mock.calls)
    found = set()
    for name, use in uses(handle):
        if name not in WITHOUT_HYPERVISOR:
            with pytest.raises(ClosedError, match=rf"^<{kind.__name__} .*> is closed$"):
                use()
            found.add(name)
    assert len(found) >= 2
    with pytest.raises(ClosedError), handle:
        pytest.fail("entered a closed handle")
    assert len(mock.calls) == calls


@kinds
def test_what_needs_no_hypervisor_answers_after_the_close(
    kind: type[Handle], handles: dict[type[Handle], Handle]
) -> None:
    handle = handles[kind]
    handle.close()
    for name, use in uses(handle):
        if name in WITHOUT_HYPERVISOR:
            use()


@kinds
def test_with_closes_at_the_end(kind: type[Handle], handles: dict[type[Handle], Handle]) -> None:
    with handles[kind] as handle:
        assert handle is handles[kind]
        assert not handle.closed
    assert handle.closed


@kinds
def test_a_parent_closes_its_children(
    kind: type[Handle], handles: dict[type[Handle], Handle]
) -> None:
    handles[kind].close()
    for at, other in enumerate(KINDS):
        assert handles[other].closed == (at >= KINDS.index(kind))


@kinds
def test_with_keeps_the_error_of_its_body(
    kind: type[Handle], handles: dict[type[Handle], Handle]
) -> None:
    with pytest.raises(ZeroDivisionError) as caught, handles[kind]:
        _ = 1 / 0
    assert handles[kind].closed
    assert not hasattr(caught.value, "__notes__")


def test_the_error_of_the_body_carries_what_the_close_could_not_do(
    dom: Domain, guest: Model, mock: MockBackend
) -> None:
    prior = guest.pauses
    dom.pause()
    mock.fail("domain_unpause", 1, EPERM)
    with pytest.raises(ZeroDivisionError) as caught, dom:
        _ = 1 / 0
    (note,) = caught.value.__notes__
    assert "still in place: pause of domain 1" in note
    assert guest.pauses == prior + 1
    assert not dom.closed
    dom.close()
    assert guest.pauses == prior


def test_a_failing_close_is_raised_where_the_body_is_fine(
    dom: Domain, guest: Model, mock: MockBackend
) -> None:
    prior = guest.pauses
    mock.fail("domain_unpause", 1, EPERM)
    with pytest.raises(LeftoverError) as caught, dom:
        dom.pause()
    assert caught.value.left == ("pause of domain 1",)
    assert isinstance(caught.value.__cause__, PermissionError)
    assert (caught.value.op, caught.value.errno) == ("domain_unpause", EPERM)
    dom.close()
    assert guest.pauses == prior


def test_one_domain_that_cannot_be_closed_does_not_keep_the_others_open(
    mock: MockBackend, xen: Xen, dom: Domain, guest: Model
) -> None:
    mock.add_domain("other")
    other = xen.domain("other")
    for domain in dom, other:
        domain.pause()
    mock.fail("domain_unpause", 2, EPERM)  # the first is other's: last opened, first closed
    with pytest.raises(LeftoverError) as caught:
        xen.close()
    assert caught.value.left == ("pause of domain 1",)
    assert (xen.closed, dom.closed, other.closed) == (False, False, True)
    assert (guest.pauses, mock.domain(2).pauses) == (2, 1)
    assert dom.info().paused  # for what is open the backend stays open, too
    xen.close()
    assert guest.pauses == 1


def test_a_handle_never_closed_warns_and_makes_no_call() -> None:
    mock = MockBackend(memory_pages=1 << 13)
    mock.add_domain("guest")
    xen = connect(mock)
    view = xen.domain("guest").altp2m().create_view()
    view.set_access(5, Access.R)
    before, calls = state_of(mock, 1, range(8)), len(mock.calls)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del xen, view
        gc.collect()
    assert {warning.category for warning in caught} == {ResourceWarning}
    assert sorted(str(warning.message).split()[1] for warning in caught) == [
        "Altp2m", "Domain", "View", "Xen",
    ]  # fmt: skip
    assert all("never closed" in str(warning.message) for warning in caught)
    assert len(mock.calls) == calls
    assert changes(before, state_of(mock, 1, range(8))) == set()


@kinds
def test_a_closed_handle_is_collected_without_a_word(
    kind: type[Handle], recwarn: pytest.WarningsRecorder
) -> None:
    mock = MockBackend(memory_pages=1 << 13)
    mock.add_domain("guest")
    xen = connect(mock)
    xen.domain("guest").altp2m().create_view()
    xen.close()
    del xen
    gc.collect()
    assert list(recwarn) == []


# A domain that goes away.


@pytest.fixture(params=["altp2m was off", "altp2m was on"])
def busy(request: pytest.FixtureRequest, mock: MockBackend, dom: Domain) -> Domain:
    """A domain with something of each kind to take back."""
    if request.param == "altp2m was on":
        mock.altp2m_set_domain_state(1, True)
    altp2m = dom.altp2m()
    (shadow,) = dom.add_pages()
    view = altp2m.create_view()
    view.remap(0x10, shadow, access=Access.X)
    altp2m.switch_to_view(view)
    altp2m.enable_notify(0, 0x20)
    dom.pause()
    return dom


@pytest.mark.parametrize("first", [View, Altp2m, Domain, Xen])
@pytest.mark.parametrize("successor", [False, True])
def test_closing_is_silent_where_the_domain_is_gone(
    busy: Domain, mock: MockBackend, xen: Xen, successor: bool, first: type[Handle]
) -> None:
    altp2m = busy.open_altp2m
    assert altp2m is not None
    (view,) = altp2m.views
    del mock.machine.domains[1]
    if successor:  # Xen counts domids up and around
        assert mock.add_domain("successor", memory_kib=8 << 10) == 1
        mock.altp2m_set_domain_state(1, True)
        for number in (1, 2):
            assert mock.altp2m_create_view(1, 7) == number
        mock.altp2m_switch_to_view(1, 2)
        before = state_of(mock, 1, range(0x30))
    {View: view, Altp2m: altp2m, Domain: busy, Xen: xen}[first].close()
    xen.close()
    assert busy.closed
    assert altp2m.closed
    assert view.closed
    if successor:
        assert changes(before, state_of(mock, 1, range(0x30))) == set()


def test_closing_is_silent_where_the_domain_is_dying(
    busy: Domain, mock: MockBackend, guest: Model
) -> None:
    guest.dying = True  # a destroyed domain stays listed while somebody maps its memory
    calls = len(mock.calls)
    busy.close()
    assert {call.op for call in list(mock.calls)[calls:]} == {"domain_getinfolist"}


def test_whoever_asks_of_a_domain_that_is_gone_is_told_so(busy: Domain, mock: MockBackend) -> None:
    altp2m = busy.open_altp2m
    assert altp2m is not None
    (view,) = altp2m.views
    del mock.machine.domains[1]
    asked: list[Callable[[], Any]] = [
        busy.info,
        busy.pause,
        lambda: busy.maximum_gfn,
        lambda: busy.host_access(5),
        lambda: busy.memory.read(0, 1),
        altp2m.create_view,
        lambda: altp2m.switch_to_view(None),
        altp2m.vcpu_views,
        lambda: view.access(5),
        lambda: view.suppress_ve(5),
        lambda: view.set_access([5, 6], Access.R),
        view.verify,
    ]
    for ask in asked:
        with pytest.raises(DomainNotFoundError):
            ask()
    with pytest.raises(NotMappedError, match="the domain is gone"):
        view.set_access(5, Access.R)
    with pytest.raises(NotMappedError, match="the domain is gone"):
        view.remap(5, 6)
    with pytest.raises(DomainNotFoundError):
        view.revert(0x10)


# The list of what to undo.


def test_undo_takes_the_last_step_first_and_keeps_what_fails(mock: MockBackend) -> None:
    undo, taken = UndoList(), []

    def refused() -> None:
        mock.domain_unpause(1)

    undo.push("first", lambda: taken.append("first"))
    undo.push("second", refused)
    undo.push("third", lambda: taken.append("third"))
    mock.fail("domain_unpause", 1, EINVAL)
    with pytest.raises(LeftoverError, match="testing: not everything could be undone") as caught:
        undo.unwind("testing")
    assert taken == ["third", "first"]
    assert caught.value.left == ("second",)
    assert undo
    undo.unwind("testing")
    assert taken == ["third", "first"]
    assert not undo


def test_fault_28_what_needs_the_rest_waits_for_it(mock: MockBackend) -> None:
    undo, heir, taken = UndoList(), UndoList(), []
    undo.push("safe", lambda: taken.append("safe"))
    undo.push("needs the rest", lambda: taken.append("needs the rest"), needs_rest=True)
    undo.push("refused", lambda: mock.domain_unpause(1))
    undo.push("needs nothing", lambda: taken.append("needs nothing"), needs_rest=True)
    mock.fail("domain_unpause", 1, EINVAL)
    with pytest.raises(LeftoverError) as caught:
        undo.unwind("testing", heir)
    assert taken == ["needs nothing", "safe"]
    assert caught.value.left == ("refused", "needs the rest")
    assert not undo
    heir.unwind("testing")
    assert taken == ["needs nothing", "safe", "needs the rest"]


def test_undo_interrupted_goes_on_where_it_was() -> None:
    undo, taken = UndoList(), []

    def interrupted() -> None:
        taken.append("second")
        if taken.count("second") == 1:
            raise KeyboardInterrupt

    undo.push("first", lambda: taken.append("first"))
    undo.push("second", interrupted)
    undo.push("third", lambda: taken.append("third"))
    with pytest.raises(KeyboardInterrupt):
        undo.unwind("testing")
    undo.unwind("testing")
    assert taken == ["third", "second", "second", "first"]


# What they log.


def test_fault_29_handles_log_what_they_change_and_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "xenaltp2m")
    mock = MockBackend()
    mock.add_domain("guest", superpages=False)
    with xa.connect(mock) as xen, xen.domain(1) as dom:
        altp2m = dom.altp2m()
        view = altp2m.create_view(label="hooks")
        view.set_access(range(4), xa.Access.R)
        pages = dom.add_pages(2)
        dom.remove_pages(pages)
        mock.altp2m_set_mem_access(1, int(view.id), 2, 7)
        altp2m.verify()
        mock.altp2m_set_mem_access(1, int(view.id), 2, 7)
        altp2m.verify(reapply=False)
        mock.fail("altp2m_set_domain_state", 1, EPERM)
        with pytest.raises(xa.LeftoverError):
            altp2m.close()
        altp2m.close()
    first, last = pages[0], pages[-1]
    assert {one.name for one in caplog.records} <= {
        f"xenaltp2m.handles.{name}" for name in ("altp2m", "base", "pages", "view", "view_resets")
    }
    told = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert told[:-2] == [
        ("INFO", "altp2m of domain 1: switched on"),
        ("INFO", "<View 1 'hooks' of domain 1>: created"),
        ("INFO", f"<Domain 1>: pages {first:#x}..{last:#x} added"),
        ("INFO", f"<Domain 1>: pages {first:#x}..{last:#x} removed"),
        ("WARNING", "<View 1 'hooks' of domain 1> was reset, and is restored: 1 gfns differ"),
        ("WARNING", "<View 1 'hooks' of domain 1> was reset: 1 gfns differ"),
    ]
    assert told[-2][0] == "ERROR"
    assert told[-2][1].endswith("still in place: altp2m of domain 1")
    assert told[-1] == ("INFO", "altp2m of domain 1: switched off")


def test_fault_29_nothing_is_written_where_logging_is_not_set_up() -> None:
    code = "import logging, xenaltp2m; logging.getLogger('xenaltp2m.handles.base').error('left')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
