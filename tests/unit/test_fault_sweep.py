# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every operation, with its 1st, 2nd … last call to the hypervisor failing, each in every way.

Whatever fails: the domain is effectively as before, or the error names just what is not, and
closing takes that back, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from errno import EACCES, EBUSY, EINVAL, ENOMEM, EPERM, ESRCH, errorcode
from itertools import count
from typing import TypeAlias

import pytest

from xenaltp2m import Access, Altp2m, Domain, LeftoverError, View, Xen, XenError, connect
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.handles import view as view_module
from xenaltp2m.handles import view_entries
from xenaltp2m.testing import Failing, Plan
from xenaltp2m.values import gfns

from .effective import State, changes, met, names, state_of

ERRNOS = [EPERM, EINVAL, ENOMEM, EBUSY, ESRCH, EACCES]
FIRST_NEW = 0xFF000
GFNS = [*range(8), 0x1FF, 0x200, 0x201, 0x208, 0x209, *range(FIRST_NEW, FIRST_NEW + 4)]
RELEASES = [SUPPORTED[0], (4, 20), SUPPORTED[-1]]
"""One of each kind: they differ in whose access a page gets that is copied into a view."""


@dataclass
class Scene:
    """A guest in some state, and what of it is open."""

    mock: Failing
    xen: Xen
    dom: Domain
    others: Domain
    origin: State = field(default_factory=dict)
    """What everything must be again after the last close."""

    def open(self) -> Altp2m:
        return self.dom.altp2m()

    def view(self) -> View:
        return self.open().create_view()

    def states(self) -> State:
        """Both guests' states in one record; their names tell them apart."""
        return state_of(self.mock, 1, GFNS) | state_of(self.mock, 2, ())


Run: TypeAlias = Callable[[], object]
OPERATIONS: dict[str, Callable[[Scene], Run]] = {}
UNDOING: set[str] = set()
"""Operations that take something back: what they leave is what is not as they should have it."""
CLOSING: set[str] = set()
"""Those that must end in what was before, in the second try if not in the first."""
VACATING: set[str] = set()
"""Those that may have to move vCPUs to where they were not before."""
UNSURE: set[str] = set()
"""Those that have pages of which it takes a call to know if they are there."""


def operation(
    *kinds: set[str],
) -> Callable[[Callable[[Scene], Run]], Callable[[Scene], Run]]:
    def register(prepare: Callable[[Scene], Run]) -> Callable[[Scene], Run]:
        name = prepare.__name__.replace("_", " ")
        OPERATIONS[name] = prepare
        for kind in kinds:
            kind.add(name)
        return prepare

    return register


# altp2m.


@operation()
def open_altp2m(scene: Scene) -> Run:
    return scene.open


@operation()
def open_altp2m_that_is_on(scene: Scene) -> Run:
    foreign_view(scene)
    return scene.open


@operation()
def create_view(scene: Scene) -> Run:
    return scene.open().create_view


@operation()
def create_view_with_default_access(scene: Scene) -> Run:
    return functools.partial(scene.open().create_view, Access.DEFAULT)


@operation()
def switch(scene: Scene) -> Run:
    foreign_view(scene)
    altp2m = scene.open()
    return functools.partial(altp2m.switch_to_view, altp2m.create_view())


@operation()
def switch_to_view_0(scene: Scene) -> Run:
    altp2m = scene.open()
    altp2m.switch_to_view(altp2m.create_view())
    return functools.partial(altp2m.switch_to_view, None)


@operation()
def hide(scene: Scene) -> Run:
    return functools.partial(scene.view().set_visibility, False)


@operation()
def enable_notify(scene: Scene) -> Run:
    return functools.partial(scene.open().enable_notify, 1, 7)


@operation()
def disable_notify(scene: Scene) -> Run:
    altp2m = scene.open()
    altp2m.enable_notify(1, 7)
    return functools.partial(altp2m.disable_notify, 1)


# Views.


@operation()
def set_access_of_one_gfn(scene: Scene) -> Run:
    return functools.partial(scene.view().set_access, 5, Access.R)


@operation()
def set_access_in_batches(scene: Scene) -> Run:
    view = scene.view()
    view.set_access([3, 0x200], Access.N)
    view.remap(4, 0x208, access=Access.X)
    return functools.partial(view.set_access, [*range(8), 0x1FF, 0x200, 0x201], Access.RX)


@operation()
def set_access_to_default_in_batches(scene: Scene) -> Run:
    view = scene.view()
    view.set_access([3, 0x200], Access.N)
    return functools.partial(view.set_access, range(6), Access.DEFAULT)


@operation()
def set_suppress_ve(scene: Scene) -> Run:
    return functools.partial(scene.view().set_suppress_ve, 5, False)


@operation()
def set_suppress_ve_in_runs(scene: Scene) -> Run:
    return functools.partial(scene.view().set_suppress_ve, [1, 2, 5, 0x200], False)


@operation()
def remap_a_fresh_gfn(scene: Scene) -> Run:
    return functools.partial(scene.view().remap, 5, 0x208, access=Access.X)


@operation()
def remap_a_fresh_gfn_that_keeps_its_access(scene: Scene) -> Run:
    return functools.partial(scene.view().remap, 5, 0x208)


@operation()
def remap_a_gfn_that_the_host_maps_alone(scene: Scene) -> Run:
    view = scene.view()
    scene.mock.domain(1).set_mem_access(0, 5, 5)  # which splits its superpage
    scene.origin["page 0x5 of domain 1"] = scene.states()["page 0x5 of domain 1"]
    return functools.partial(view.remap, 5, 0x208, access=Access.X)


@operation()
def remap_a_gfn_with_access_set(scene: Scene) -> Run:
    view = scene.view()
    view.set_access([4, 5], Access.N)
    return functools.partial(view.remap, 5, 0x208, access=Access.X)


@operation()
def remap_a_gfn_remapped_already(scene: Scene) -> Run:
    view = scene.view()
    view.remap(5, 0x209, access=Access.N)
    return functools.partial(view.remap, 5, 0x208, access=Access.X)


@operation()
def remap_a_gfn_whose_page_is_remapped_by_now(scene: Scene) -> Run:
    view = scene.view()
    view.remap(5, 6)
    view.remap(6, 0x209)
    return functools.partial(view.remap, 5, 0x208, access=Access.X)


@operation()
def remap_with_suppress_ve(scene: Scene) -> Run:
    view = scene.view()
    view.set_suppress_ve(5, False)
    return functools.partial(view.remap, 5, 0x208)


@operation()
def remap_to_default_access(scene: Scene) -> Run:
    return functools.partial(scene.view().remap, 5, 0x208, access=Access.DEFAULT)


@operation(UNDOING)
def revert(scene: Scene) -> Run:
    view = scene.view()
    view.remap(5, 0x208, access=Access.X)
    view.set_access(6, Access.N)
    return functools.partial(view.revert, 5)


@operation()
def ask_a_view(scene: Scene) -> Run:
    view = scene.view()
    view.set_access([1, 2], Access.R)

    def ask() -> None:
        view.verify()
        view.access(5)
        view.effective_access(5)
        view.suppress_ve(5)

    return ask


# The domain.


@operation()
def ask_a_domain(scene: Scene) -> Run:
    altp2m = scene.open()

    def ask() -> None:
        scene.dom.info()
        scene.dom.host_access(5)
        altp2m.vcpu_views()
        list(scene.xen.domains())

    return ask


@operation()
def add_pages(scene: Scene) -> Run:
    return functools.partial(scene.dom.add_pages, 3)


@operation(UNSURE)
def add_pages_that_do_not_fit(scene: Scene) -> Run:
    frames = scene.mock.machine.frames
    while (frame := frames.allocate()) is not None:
        last = frame
    frames.release(last, scene.mock.domain(2))
    scene.mock.domain(2).pages += 1

    def add() -> None:
        with pytest.raises(XenError) as caught:
            scene.dom.add_pages(3)
        if scene.mock.plan:
            raise caught.value

    return add


@operation(UNDOING, UNSURE)
def remove_pages(scene: Scene) -> Run:
    return functools.partial(scene.dom.remove_pages, scene.dom.add_pages(3))


@operation(UNDOING, UNSURE)
def remove_pages_of_which_one_is_gone(scene: Scene) -> Run:
    gfns = scene.dom.add_pages(3)
    scene.mock.domain(1).remove_page(gfns[1])
    return functools.partial(scene.dom.remove_pages, gfns)


@operation()
def pause(scene: Scene) -> Run:
    return scene.dom.pause


@operation()
def unpause(scene: Scene) -> Run:
    scene.dom.pause()
    return scene.dom.unpause


@operation()
def paused(scene: Scene) -> Run:
    def block() -> None:
        with scene.dom.paused():
            pass

    return block


@operation()
def read_memory(scene: Scene) -> Run:
    return functools.partial(scene.dom.memory.read, 0x800, 0x2000)


@operation()
def write_memory(scene: Scene) -> Run:
    return functools.partial(scene.dom.memory.write, 0x800, bytes(0x2000))


# Closing.


def foreign_view(scene: Scene) -> None:
    """Let another agent have altp2m on, a view, and the vCPUs in it."""
    mock = scene.mock
    mock.altp2m_set_domain_state(1, True)
    view = mock.altp2m_create_view(1, 7)
    mock.altp2m_set_mem_access(1, view, 5, 1)
    mock.altp2m_switch_to_view(1, view)
    scene.origin = scene.states()


def furnished(scene: Scene) -> Altp2m:
    """Use everything there is to take back."""
    altp2m = scene.open()
    first, second = altp2m.create_view(), altp2m.create_view()
    gfns = scene.dom.add_pages(2)
    first.remap(5, gfns[0], access=Access.X)
    second.set_access(range(4), Access.N)
    altp2m.enable_notify(0, 7)
    altp2m.switch_to_view(second)
    scene.dom.add_pages(1)
    scene.dom.pause()
    return altp2m


@operation(UNDOING, CLOSING)
def close_a_view(scene: Scene) -> Run:
    altp2m = scene.open()
    view = altp2m.create_view()
    view.remap(5, 0x208, access=Access.X)
    altp2m.switch_to_view(altp2m.create_view())
    return view.close


@operation(UNDOING, CLOSING)
def close_a_view_with_vcpus_in_it(scene: Scene) -> Run:
    altp2m = scene.open()
    view = altp2m.create_view()
    altp2m.switch_to_view(view)
    return view.close


@operation(UNDOING, CLOSING, VACATING)
def close_a_view_with_vcpus_in_it_that_were_elsewhere(scene: Scene) -> Run:
    foreign_view(scene)
    return close_a_view_with_vcpus_in_it(scene)


@operation(UNDOING, CLOSING)
def close_altp2m(scene: Scene) -> Run:
    return furnished(scene).close


@operation(UNDOING, CLOSING)
def close_altp2m_that_was_on(scene: Scene) -> Run:
    foreign_view(scene)
    return furnished(scene).close


@operation(UNDOING, CLOSING)
def close_altp2m_that_was_on_with_vcpus_moved_by_events(scene: Scene) -> Run:
    foreign_view(scene)
    altp2m = scene.open()
    view = altp2m.create_view()
    guest = scene.mock.domain(1)
    guest.switch_vcpu(guest.vcpus[0], view.id)
    guest.switch_vcpu(guest.vcpus[1], view.id)
    return altp2m.close


@operation(UNDOING, CLOSING)
def close_a_domain(scene: Scene) -> Run:
    furnished(scene)
    return scene.dom.close


@operation(UNDOING, CLOSING)
def close_a_domain_whose_altp2m_was_on(scene: Scene) -> Run:
    foreign_view(scene)
    furnished(scene)
    return scene.dom.close


@operation(UNDOING, CLOSING)
def close_xen(scene: Scene) -> Run:
    furnished(scene)
    scene.others.altp2m().create_view()
    scene.others.pause()
    return scene.xen.close


# The sweep.


@pytest.fixture(autouse=True)
def small_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (view_module, view_entries, gfns):
        monkeypatch.setattr(module, "BATCH", 4)


def scenes(version: tuple[int, int]) -> Iterator[Scene]:
    while True:
        mock = Failing(version, memory_pages=1 << 12)
        # 512 views that are asked for are 512 calls that fail, each on a host of its own.
        mock.machine.release = replace(mock.release, most_views=10)
        mock.add_domain("guest", vcpus=2, memory_kib=(2 << 10) + 64)
        mock.add_domain("other", memory_kib=0)
        xen = connect(mock)
        scene = Scene(mock, xen, xen.domain("guest"), xen.domain("other"))
        scene.origin = scene.states()
        yield scene


def check_models(scene: Scene) -> None:
    """Every open view's model is what the view is."""
    for domain in scene.dom, scene.others:
        altp2m = domain.open_altp2m
        for view in altp2m.views if altp2m is not None else ():
            assert view.verify() == []
            for gfn, new_gfn in view.remaps.items():
                model = scene.mock.domain(domain.domid)
                page = met(model, view.id, gfn)
                assert page is not None
                assert page[0] == model.host.lookup(new_gfn).mfn


def check(name: str, scene: Scene, goal: State, plan: Plan) -> bool:
    """Run an operation with calls failing; tell whether it made all the calls of the plan."""
    try:
        return checked(name, scene, goal, plan)
    except BaseException as error:
        error.add_note(f"failing: { {call: errorcode[errno] for call, errno in plan.items()} }")
        raise


def checked(name: str, scene: Scene, goal: State, plan: Plan) -> bool:
    scene.mock.start({})
    run = OPERATIONS[name](scene)
    before = scene.states()
    scene.mock.start(plan)
    error: XenError | None = None
    try:
        run()
    except XenError as caught:
        error = caught
    reached = scene.mock.made >= max(plan)
    scene.mock.start({})
    after = scene.states()
    if error is None:
        amiss = changes(goal, after)
        if name in VACATING:  # to view 0, until altp2m is closed
            amiss -= {change for change in amiss if change.startswith("vCPU ")}
        assert amiss == set(), "it was not done, and no error says so"
    elif isinstance(error, LeftoverError):
        assert error.left
        for change in changes(goal if name in UNDOING else before, after):
            assert any(names(words, change) for words in error.left), f"nobody tells of {change}"
        told = changes(goal, after) | changes(before, after)
        for words in error.left if name not in UNSURE else ():
            assert any(names(words, change) for change in told), f"not so: {words}"
    else:
        assert name not in CLOSING, "a close that fails tells what is left"
        assert changes(before, after) == set(), "an error that leaves something behind"
    if not isinstance(error, LeftoverError) or name in UNDOING:
        check_models(scene)
    if isinstance(error, LeftoverError) and name in UNDOING and name != "revert":
        run()
        amiss = changes(goal, scene.states())
        if any(words.startswith("mapping") for words in error.left):
            amiss -= {"resources", "pages of domain 1"}  # which is for the domain's close
        assert amiss == set(), "the second try did not do the rest"
    scene.xen.close()
    assert changes(scene.origin, scene.states()) == set(), "not all was taken back"
    return reached


def outcome(name: str, scene: Scene) -> tuple[State, int]:
    """What an operation comes to where nothing fails, and how many calls it makes."""
    run = OPERATIONS[name](scene)
    scene.mock.start({})
    run()
    made, goal = scene.mock.made, scene.states()
    check_models(scene)
    scene.xen.close()
    assert changes(scene.origin, scene.states()) == set()
    return goal, made


@pytest.mark.parametrize("version", RELEASES, ids="{0[0]}.{0[1]}".format)
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_call_may_fail(name: str, version: tuple[int, int]) -> None:
    fresh = scenes(version)
    goal, made = outcome(name, next(fresh))
    assert made > 0
    for errno in ERRNOS:
        for nth in count(1):
            if not check(name, next(fresh), goal, {nth: errno}):
                break
        assert nth > made


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_takes_it_back_may_fail_too(name: str) -> None:
    fresh = scenes(SUPPORTED[-1])
    goal, made = outcome(name, next(fresh))
    for errno in (EPERM, ENOMEM, ESRCH):
        for first in range(1, made + 1):
            for second in count(first + 1):
                if not check(name, next(fresh), goal, {first: errno, second: errno}):
                    break
