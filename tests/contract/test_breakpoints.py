# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breakpoints: guests that look for them notice nothing, and no call is missed or counted twice.

The same on the simulator and on Xen; the guests are those of examples/guest.
"""

from __future__ import annotations

import json
import os
import random
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.breakpoints import Breakpoints
from xenaltp2m.hooks import Breakpoint, Hit, Touch

from .conftest import LIVE
from .guests import CALLS, LINE, PATIENCE, RunningGuest, hooked, running, serve

HOSTS = ["xen"] if LIVE else ["mock-4.14", "mock-4.17", "mock-4.20"]
WAYS = [(True, True), (False, True), (True, False)]
WAY_NAMES = ["fast", "toggle", "page"]
CHECKS = ("checksum", "read", "scan", "modify", "calls")


@pytest.fixture(params=HOSTS)
def host_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def checker(host_name: str) -> Iterator[RunningGuest]:
    with running(host_name, "checker") as guest:
        yield guest


@pytest.fixture(params=[1, 4])
def racer(host_name: str, request: pytest.FixtureRequest) -> Iterator[RunningGuest]:
    with running(host_name, "racer", request.param) as guest:
        yield guest


def stop_after(monitor: xa.Monitor, hits: int) -> Callable[[Hit], None]:
    def callback(hit: Hit) -> None:
        if hit.breakpoint.hits >= hits:
            monitor.stop()

    return callback


def leave_when_hot(hit: Hit) -> None:
    if hit.breakpoint.hits >= ENOUGH:
        hit.breakpoint.remove()


def noticed(guest: RunningGuest) -> dict[str, int]:
    return dict(zip(CHECKS, guest.words("noticed", 5), strict=True))


UNUSED = range(0x300, 0x314)
"""Memory of the guest's where nothing is; more pages than shadows are added at once."""
NOTHING = dict.fromkeys(CHECKS, 0)


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
def test_the_checker_notices_nothing(checker: RunningGuest, fast: bool, int3: bool) -> None:
    with hooked(checker, fast=fast, int3=int3) as (monitor, breakpoints):
        hook = breakpoints.insert(checker.address("target"), stop_after(monitor, CALLS))
        checker.start()
        serve(monitor, breakpoints, lambda: hook.hits >= CALLS)
        with checker.dom.paused():
            # It is in the call that it was stopped at, or behind that.
            assert checker.words("counter")[0] in (CALLS - 1, CALLS)
    assert checker.words("noticed", 6)[5] > CALLS // 16 - 1
    assert noticed(checker) == NOTHING


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
def test_every_call_of_every_vcpu_is_counted(racer: RunningGuest, fast: bool, int3: bool) -> None:
    calls = CALLS // racer.vcpus
    racer.write_word("go", calls)
    with hooked(racer, fast=fast, int3=int3) as (monitor, breakpoints):
        by_vcpu: dict[int, int] = {}

        def count(hit: Hit) -> None:
            by_vcpu[hit.vcpu] = by_vcpu.get(hit.vcpu, 0) + 1

        hook = breakpoints.insert(racer.address("hit"), count)
        racer.start()
        serve(monitor, breakpoints, lambda: racer.lines("done") == [calls] * racer.vcpus)
    assert racer.lines("made") == [calls] * racer.vcpus
    assert by_vcpu == dict.fromkeys(range(racer.vcpus), calls)
    assert hook.hits == racer.words("total")[0] == calls * racer.vcpus
    assert racer.lines("noticed") == [0] * racer.vcpus


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
@pytest.mark.parametrize("reads", [False, True], ids=["writes", "reads"])
def test_a_watched_variable(host_name: str, fast: bool, reads: bool) -> None:
    """A vCPU's counter, in a page with those of the others, beside a breakpoint."""
    calls, one = max(CALLS // 10, 20), 1
    with running(host_name, "racer", 4) as guest:
        guest.write_word("go", calls)
        written: list[int] = []
        vcpus = set()
        with hooked(guest, fast=fast) as (monitor, breakpoints):

            def note(touch: Touch) -> None:
                vcpus.add(touch.vcpu)
                if touch.written:
                    written.append(int.from_bytes(touch.watch.read(), "little"))
                if written and written[-1] == calls:
                    monitor.stop()  # it goes on reading

            watch = breakpoints.watch(
                guest.address("made") + one * LINE, 4, after=note, reads=reads
            )
            hook = breakpoints.insert(guest.address("hit"), lambda hit: None)
            guest.start()
            serve(monitor, breakpoints, lambda: guest.lines("done") == [calls] * 4)
        assert written == list(range(1, calls + 1))
        assert vcpus == {one}
        if not reads:
            assert (watch.hits, watch.passed) == (calls, 3 * calls)
        else:
            assert watch.hits > 2 * calls
        assert hook.hits == guest.words("total")[0] == 4 * calls
        assert guest.lines("noticed") == [0] * 4


ENOUGH = 60
"""Hits of a place in a loop, of which there are thousands that tell no more."""


def instructions(name: str, count: int) -> list[int]:
    """Some of the places where instructions begin: physical, paging being off; as objdump says."""
    places = json.loads(Path(__file__).with_name("instructions.json").read_text())[name]
    return random.Random(count).sample(places, count)


@pytest.mark.parametrize("count", [10, 200])
def test_the_checker_notices_none_of_many(host_name: str, count: int) -> None:
    chosen = instructions("checker", count)
    calls = max(CALLS // count, 20)
    with running(host_name, "checker") as guest:
        target = guest.address("target")
        with hooked(guest) as (monitor, breakpoints):
            hook = breakpoints.insert(target, stop_after(monitor, calls))
            others = [breakpoints.insert(place, leave_when_hot) for place in chosen]
            assert len(breakpoints) == count + 1
            guest.start()
            serve(monitor, breakpoints, lambda: hook.hits >= calls)
            assert sum(other.hits > 0 for other in others) > count // 2
        assert noticed(guest) == NOTHING
        assert guest.words("noticed", 6)[5] > 0


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("count", [10, 200])
def test_calls_are_exact_beside_many(host_name: str, count: int, vcpus: int) -> None:
    calls = max(CALLS // (vcpus * count), 4)
    with running(host_name, "racer", vcpus) as guest:
        guest.write_word("go", calls)
        with hooked(guest) as (monitor, breakpoints):
            for place in instructions("racer", count):
                breakpoints.insert(place, lambda hit: None)
            hook = breakpoints.insert(guest.address("hit"), lambda hit: None)

            def done() -> bool:
                return guest.lines("done") == [calls] * vcpus

            def look(event: xa.Event) -> xa.Response | None:
                answer = breakpoints(event)
                if hook.hits >= vcpus * calls and done():
                    monitor.stop()
                return answer

            guest.start()
            serve(monitor, look, done)
        assert hook.hits == guest.words("total")[0] == vcpus * calls
        assert guest.lines("noticed") == [0] * vcpus


@pytest.mark.parametrize("vcpus", [1, 4])
def test_inserting_and_removing_at_random_loses_nothing(host_name: str, vcpus: int) -> None:
    """Of the other hooks no call; of the guest's memory no byte."""
    chance = random.Random(vcpus)
    places = instructions("racer", 200)
    calls = CALLS // vcpus
    with running(host_name, "racer", vcpus) as guest:
        before = guest.sums()
        guest.write_word("go", calls)
        with hooked(guest) as (monitor, breakpoints):
            inserted: list[Breakpoint] = []
            churned = 0

            def churn(hit: Hit) -> None:
                nonlocal churned
                if chance.random() < 0.3:
                    churned += 1
                    if inserted and chance.random() < 0.5:
                        inserted.pop(chance.randrange(len(inserted))).remove()
                    else:
                        inserted.append(breakpoints.insert(chance.choice(places), lambda hit: None))

            hook = breakpoints.insert(guest.address("hit"), churn)
            done = [calls] * vcpus

            def look(event: xa.Event) -> xa.Response | None:
                answer = breakpoints(event)
                if hook.hits == sum(done) and guest.lines("done") == done:
                    monitor.stop()
                return answer

            guest.start()
            serve(monitor, look, lambda: guest.lines("done") == done)
        assert churned > CALLS // 10
        assert hook.hits == guest.words("total")[0] == sum(done)
        assert guest.lines("noticed") == [0] * vcpus
        after = guest.sums()
        changed = {gfn for gfn in after if after[gfn] != before[gfn]}
        assert changed <= guest.writable_gfns()


def test_views_that_xen_has_reset_are_made_again(host_name: str) -> None:
    """Taking a page from among the remap targets resets all three."""
    with running(host_name, "racer", 4) as guest:
        with hooked(guest) as (monitor, breakpoints):
            hook = breakpoints.insert(guest.address("hit"), stop_after(monitor, 40))
            guest.start()
            serve(monitor, breakpoints, lambda: hook.hits >= 40)
            assert breakpoints.verify() == []
            [between] = guest.dom.add_pages()
            others = [breakpoints.insert(gfn << 12, lambda hit: None) for gfn in UNUSED]
            assert breakpoints.verify() == []
            guest.xen.backend.domain_decrease_reservation_exact(
                int(guest.dom.domid), array("Q", [between])
            )
            assert breakpoints.hooks.access(hook.address >> 12) not in (xa.Access.X, xa.Access.N)
            hooked_gfns = {one.address >> 12 for one in (hook, *others)}
            assert set(breakpoints.verify()) == hooked_gfns
            assert breakpoints.verify() == []
            before, total = hook.hits, guest.words("total")[0]
            hook.callback = stop_after(monitor, before + 40)
            serve(monitor, breakpoints, lambda: hook.hits >= before + 40)
            # No call has been lost since: those in flight are not done yet.
            assert 0 <= hook.hits - before - (guest.words("total")[0] - total) <= 8
        assert guest.lines("noticed") == [0] * 4


def change_host_access(guest: RunningGuest, gfn: int) -> None:
    guest.xen.backend.altp2m_set_mem_access(int(guest.dom.domid), 0, gfn, 7)


def populate_anew(guest: RunningGuest, gfn: int) -> None:
    """As a balloon driver: the page is given back, and another one taken in its place.

    A page with breakpoints is mapped here, and stays the domain's as long.
    """
    domid, backend = int(guest.dom.domid), guest.xen.backend
    backend.domain_setmaxmem(domid, (guest.dom.info().max_pages + 1) * 4)
    content = guest.dom.memory.read_page(gfn)
    backend.domain_decrease_reservation_exact(domid, array("Q", [gfn]))
    backend.domain_populate_physmap_exact(domid, array("Q", [gfn]))
    guest.dom.memory.write_page(gfn, content)


def reset_the_view(guest: RunningGuest, _gfn: int) -> None:
    """A page is given to the domain among the remap targets, and taken from it."""
    [between] = guest.dom.add_pages()
    with hooks_around(guest, between):
        guest.xen.backend.domain_decrease_reservation_exact(
            int(guest.dom.domid), array("Q", [between])
        )


def views(guest: RunningGuest) -> tuple[xa.View, ...]:
    altp2m = guest.dom._open_altp2m
    assert altp2m is not None
    return altp2m.views


@contextmanager
def hooks_around(guest: RunningGuest, gfn: int) -> Iterator[None]:
    """Have a view remap something to above a gfn, too, so that it is among its targets."""
    [above] = guest.dom.add_pages()
    assert above == gfn + 1
    hooks = next(view for view in views(guest) if view.label == "hooks")
    hooks.remap(UNUSED[-1], above, access=xa.Access.RWX)
    yield
    assert hooks.access(UNUSED[-1]) is None


def count_to(monitor: xa.Monitor, breakpoints: Breakpoints, hook: Breakpoint, hits: int) -> None:
    hook.callback = stop_after(monitor, hits)
    serve(monitor, breakpoints, lambda: hook.hits >= hits)


@pytest.mark.parametrize("change", [change_host_access, populate_anew, reset_the_view])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
def test_what_the_host_changes_is_found_and_mended(
    host_name: str, fast: bool, change: Callable[[RunningGuest, int], None]
) -> None:
    """While the guest runs, with other breakpoints, and a watch, in other pages."""
    with running(host_name, "racer", 4) as guest:
        with hooked(guest, fast=fast) as (monitor, breakpoints):
            told: list[xa.Lost] = []
            breakpoints._altp2m.on_lost(told.append)
            hook = breakpoints.insert(guest.address("hit"), stop_after(monitor, 40))
            watch = breakpoints.watch(guest.address("made"), 4)
            unused = [breakpoints.insert(gfn << 12, lambda hit: None) for gfn in UNUSED[:-1]]
            changed = UNUSED[0] if change is populate_anew else hook.address >> 12
            guest.start()
            for turn in range(1, 4):
                count_to(monitor, breakpoints, hook, 40 * turn)
                assert breakpoints.verify() == []
                change(guest, changed)
                found = breakpoints.verify()
                assert changed in found
                if change is reset_the_view:
                    assert {hook.address >> 12, *(one.address >> 12 for one in unused)} <= {*found}
                assert breakpoints.verify() == []
                assert all(lost.reapplied for lost in told)
                assert {lost.view.label for lost in told} >= {"hooks"}
                told.clear()
                before = hook.hits, watch.hits, guest.words("total")[0], guest.lines("made")[0]
                count_to(monitor, breakpoints, hook, hook.hits + 40)
                after = hook.hits, watch.hits, guest.words("total")[0], guest.lines("made")[0]
                hits, touches, calls, made = (
                    now - was for now, was in zip(after, before, strict=True)
                )
                # Not one was lost since: those in flight are not done yet.
                assert 0 <= hits - calls <= 8
                assert 0 <= touches - made <= 2
        assert guest.lines("noticed") == [0] * 4


def test_a_page_with_breakpoints_that_is_given_back(host_name: str) -> None:
    """It is told of; once they are removed, the others are mended."""
    with running(host_name, "racer", 4) as guest:
        with hooked(guest) as (monitor, breakpoints):
            told: list[xa.Lost] = []
            breakpoints._altp2m.on_lost(told.append)
            hook = breakpoints.insert(guest.address("hit"), stop_after(monitor, 40))
            gone = breakpoints.insert(UNUSED[0] << 12, lambda hit: None)
            guest.start()
            serve(monitor, breakpoints, lambda: hook.hits >= 40)
            change_host_access(guest, hook.address >> 12)
            guest.xen.backend.domain_decrease_reservation_exact(
                int(guest.dom.domid), array("Q", [UNUSED[0]])
            )
            with pytest.raises(xa.XenError) as error:
                breakpoints.verify()
            assert isinstance(error.value, xa.NotMappedError | xa.InvalidArgumentError)
            assert not all(lost.reapplied for lost in told)
            assert any(lost.failure is not None for lost in told)
            gone.remove()
            breakpoints.verify()
            assert breakpoints.verify() == []
            before, total = hook.hits, guest.words("total")[0]
            hook.callback = stop_after(monitor, before + 40)
            serve(monitor, breakpoints, lambda: hook.hits >= before + 40)
            assert 0 <= hook.hits - before - (guest.words("total")[0] - total) <= 8
        assert guest.lines("noticed") == [0] * 4


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "toggle"])
def test_a_page_that_comes_and_goes(host_name: str, fast: bool) -> None:
    """paged.c maps pages when they are used, and unmaps them: a breakpoint goes along."""
    lazy = 0xFFFF_8100_0000_0000
    with running(host_name, "paged") as guest:
        frames = range(guest.address("lazy_frames"), guest.address("lazy_frames") + 6 * 4096, 4096)
        places: list[int | None] = []
        with hooked(guest, fast=fast) as (monitor, breakpoints):
            hooks = []

            def begin(hit: Hit) -> None:
                hit.breakpoint.remove()
                space = guest.dom.memory.address_space(hit.registers)
                hooks.append(breakpoints.insert_linear(space, lazy, lambda hit: None))
                # Heard of each time user_main() has run, which is once in a pass.
                breakpoints.insert(guest.address("user_target"), look)

            def look(hit: Hit) -> None:
                places.append(hooks[0].physical)
                if len(places) == PASSES:
                    monitor.stop()

            breakpoints.insert(guest.address("target64"), begin)
            guest.start()
            serve(monitor, breakpoints, lambda: len(places) >= PASSES)
        [hook] = hooks
        # Mapped once and unmapped once in each pass.
        assert 2 * (PASSES - 2) <= hook.moves <= 2 * (PASSES + 1)
        assert set(places) <= {None, *frames}
        assert hook.hits == 0
        assert set(guest.words("noticed", guest.image.symbol("noticed").size // 4)) == {0}
        assert guest.words("page_faults", size=8)[0] >= 8 * (PASSES - 2)


PASSES = 12


class Ended(Exception):
    """What a callback raises."""


def end_in_a_callback(guest: RunningGuest, fast: bool, int3: bool, chance: random.Random) -> None:
    """At a moment, in one of several ways; with vCPUs in the shadow, stepping and waiting."""
    way = chance.choice(["raise", "close", "close all", "stop", "leave a loop"])
    left = chance.randrange(1, 30)
    with hooked(guest, fast=fast, int3=int3) as (monitor, breakpoints):

        def count(_: Hit | Touch) -> None:
            nonlocal left
            left -= 1
            if left > 0:
                return
            if way == "raise":
                raise Ended
            if way.startswith("close"):
                breakpoints.close()
            if way == "close all":
                monitor.close()
            else:
                monitor.stop()

        breakpoints.insert(guest.address("hit"), count)
        breakpoints.insert(guest.address("wrong_after_hit"), lambda hit: None)
        kind = "after" if chance.random() < 0.5 else "before"
        if kind == "after":
            breakpoints.watch(guest.address("made") + LINE, 4, after=count)
        else:
            breakpoints.watch(guest.address("made"), 4, count, reads=True)
        if way == "leave a loop":
            for event in monitor.events(timeout=PATIENCE):
                answer = breakpoints(event)
                left -= 1
                if left < 0:
                    break
                if answer is not None:
                    event.reply(answer)
        else:
            monitor.run(breakpoints, timeout=PATIENCE)


@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
def test_ending_in_every_state(racer: RunningGuest, fast: bool, int3: bool) -> None:
    """Again and again, in a guest that goes on."""
    chance = random.Random(f"{racer.vcpus} {fast} {int3}")
    before, pages = racer.sums(), None
    if isinstance(racer.xen.backend, MockBackend):
        racer.xen.backend.steps_at_once = 200  # it runs at each call, and nobody waits for it
    racer.start()
    for _ in range(ENDINGS):
        with suppress(Ended):
            end_in_a_callback(racer, fast, int3, chance)
        assert not racer.dom.altp2m_active
        info = racer.dom.info()
        assert not info.paused
        assert pages in (None, (info.pages, info.max_pages))
        pages = info.pages, info.max_pages  # but the ring's page, at the first time
        totals = [racer.words("total")[0]]
        end = time.monotonic() + PATIENCE
        while totals[-1] < totals[0] + 50:
            assert time.monotonic() < end, "it does not go on"
            with racer.dom.monitor() as monitor:  # the simulator's goes on while somebody listens
                monitor.run(lambda event: None, timeout=0.01)
            totals.append(racer.words("total")[0])
    with racer.dom.paused():
        after = racer.sums()
    assert racer.lines("noticed") == [0] * racer.vcpus
    assert {gfn for gfn in after if after[gfn] != before[gfn]} <= racer.writable_gfns()


ENDINGS = int(os.environ.get("XENALTP2M_ENDINGS", "4" if LIVE else "2"))
