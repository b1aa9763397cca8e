# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example guests: left alone they notice nothing, and they do notice what is done to them."""

from __future__ import annotations

import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.backend import Backend
from xenaltp2m.tools.symbols import Image

from .conftest import Shelf
from .machine import wait_until

KINDS = ("checksum", "read", "scan", "modify", "calls")
SELDOM = 16  # passes in which the checker does everything at least once
LINE = 64
CALLS = 50
R, RWX = 1, 7  # XENMEM_access_*


class Example:
    """A guest that runs one of examples/guest."""

    def __init__(self, backend: Backend, name: str, vcpus: int, mode: str) -> None:
        path = Path(f"examples/guest/{name}.elf").resolve()
        config = [f'kernel="{path}"', f'name="{name}"', 'on_crash="preserve"']
        subprocess.run(
            ["xl", "create", "-q", "-e", f"/lab/{mode}-{vcpus}.cfg", *config], check=True
        )
        self.name = name
        self.vcpus = vcpus
        self.xen = xa.Xen(backend)
        self.dom = self.xen.domain(name)
        self.image = Image.open(path)

    def words(self, symbol: str, count: int, size: int = 4) -> tuple[int, ...]:
        """Numbers in the guest's memory."""
        data = self.dom.memory.read(self.address(symbol), count * size)
        return struct.unpack(f"<{count}{'I' if size == 4 else 'Q'}", data)

    def lines(self, symbol: str) -> list[int]:
        """A number of each vCPU."""
        return list(self.words(symbol, self.vcpus * LINE // 4)[:: LINE // 4])

    def address(self, symbol: str) -> int:
        return self.image.physical(self.image.symbol(symbol))

    @contextmanager
    def changed(self, symbol: str, offset: int, old: int, new: int) -> Iterator[None]:
        """Change a byte of the guest within the block."""
        address, memory = self.address(symbol) + offset, self.dom.memory
        assert memory.read(address, 1) == bytes([old])
        memory.write(address, bytes([new]))
        try:
            yield
        finally:
            memory.write(address, bytes([old]))

    def destroy(self) -> None:
        subprocess.run(["xl", "destroy", self.name], check=True)
        self.dom.abandon()
        self.xen.abandon()


@contextmanager
def example(
    backend: Backend, name: str, vcpus: int = 1, mode: str = "external"
) -> Iterator[Example]:
    guest = Example(backend, name, vcpus, mode)
    yield guest
    guest.destroy()


@pytest.fixture(scope="module")
def checker(backend: Backend) -> Iterator[Example]:
    with example(backend, "checker") as guest:
        yield guest


@pytest.fixture(scope="module")
def racer(backend: Backend, shelf: Shelf) -> Iterator[Example]:  # the shelf leaves dom0 the CPU
    with example(backend, "racer", 4) as guest:
        yield guest


@pytest.fixture(scope="module")
def paged(backend: Backend) -> Iterator[Example]:
    with example(backend, "paged") as guest:
        yield guest


@pytest.fixture(scope="module")
def insider(backend: Backend) -> Iterator[Example]:
    with example(backend, "insider", mode="mixed") as guest:
        yield guest


def noticed_by_checker(guest: Example) -> set[str]:
    """What it notices in passes that begin from now on, each kind of check being made."""

    def passes(count: int) -> dict[str, int]:
        end = guest.words("noticed", 6)[5] + count
        wait_until(lambda: guest.words("noticed", 6)[5] >= end)
        return dict(zip(KINDS, guest.words("noticed", 5), strict=True))

    before, after = passes(1), passes(SELDOM + 1)
    return {kind for kind in KINDS if after[kind] != before[kind]}


def test_the_checker_notices_nothing(checker: Example) -> None:
    assert noticed_by_checker(checker) == set()
    assert checker.words("noticed", 5) == (0, 0, 0, 0, 0)
    [count] = checker.words("holes", 1)
    gfns = checker.words("holes", 1 + count)[1:]
    assert checker.dom.maximum_gfn + 1 in gfns
    assert len(set(gfns)) == count


@contextmanager
def page_above_all(guest: Example) -> Iterator[None]:
    gfns = guest.dom.add_pages()
    try:
        yield
    finally:
        guest.dom.remove_pages(gfns)


Interference = Callable[[Example], AbstractContextManager[None]]
INTERFERENCES: dict[str, tuple[Interference, set[str]]] = {
    "code": (lambda guest: guest.changed("_start", 0xFFF, 0, 1), {"checksum"}),
    "breakpoint": (lambda guest: guest.changed("target", 0x800, 0, 0xCC), {"checksum"}),
    "counting": (lambda guest: guest.changed("target", 2, 0, 8), {"checksum", "read", "calls"}),
    "patched": (lambda guest: guest.changed("patched", 0, 0xB8, 0xB9), {"checksum", "modify"}),
    "target2": (lambda guest: guest.changed("target2", 0, 0xB8, 0xB9), {"checksum", "modify"}),
    "page": (page_above_all, {"scan"}),
}


@pytest.mark.parametrize(("interfere", "kinds"), INTERFERENCES.values(), ids=INTERFERENCES)
def test_the_checker_notices(checker: Example, interfere: Interference, kinds: set[str]) -> None:
    with interfere(checker):
        assert noticed_by_checker(checker) == kinds
    assert noticed_by_checker(checker) == set()


def race(guest: Example, calls: int, wait: Callable[[], object] = lambda: None) -> int:
    """Let every vCPU have made so many calls; return how many there were in all, by `total`."""
    guest.dom.memory.write(guest.address("go"), struct.pack("<I", calls))

    def over() -> bool:
        wait()
        return guest.lines("done") == [calls] * guest.vcpus

    wait_until(over)
    made = guest.lines("made")
    [total] = guest.words("total", 1)
    assert total == sum(made)
    return total


def halt(guest: Example) -> int:
    """Have no vCPU make calls; return the most that one has made."""
    race(guest, 1)
    return max(guest.lines("made"))


def test_racers_notice_nothing_and_count_exactly(racer: Example) -> None:
    assert racer.words("vcpus", 1) == (4,)
    wait_until(lambda: min(racer.lines("made")) > 1000)
    limit = halt(racer) + CALLS
    assert race(racer, limit) == 4 * limit
    assert racer.lines("made") == [limit] * 4
    assert racer.lines("noticed") == [0] * 4


def test_every_call_of_every_racer_is_traced(racer: Example) -> None:
    """All instructions of hit() trip; those at its start are the calls."""
    limit = halt(racer)
    race(racer, limit)
    hit, entered = racer.address("hit"), Counter[int]()

    def handler(event: xa.Event) -> xa.Response:
        entered[int(event.vcpu)] += event.registers.rip == hit
        return xa.Response.fast_singlestep(back_to=view)

    with racer.dom.altp2m() as altp2m, racer.dom.monitor(xa.MemAccess) as monitor:
        view = altp2m.create_view()
        view.set_access(hit >> 12, xa.Access.RW)
        altp2m.switch_to_view(view)
        race(racer, limit + CALLS, lambda: monitor.run(handler, timeout=0.003))
    assert entered == dict.fromkeys(range(4), CALLS)
    assert racer.lines("noticed") == [0] * 4


def test_racers_notice_a_wrong_result(racer: Example) -> None:
    limit = halt(racer)
    race(racer, limit)
    with racer.changed("hit", 7, 1, 2):  # 3n + 2
        race(racer, limit + CALLS)
    assert racer.lines("noticed") == [CALLS] * 4
    race(racer, limit + 2 * CALLS)
    assert racer.lines("noticed") == [CALLS] * 4


def passes_of_paged(guest: Example) -> int:
    """Let it make a pass from its start to its end; return what it noticed so far."""
    end = guest.words("passes", 1, 8)[0] + 2
    wait_until(lambda: guest.words("passes", 1, 8)[0] >= end)
    return guest.words("noticed", 1, 8)[0]


def test_paged_notices_nothing(paged: Example) -> None:
    wait_until(lambda: paged.words("passes", 1, 8)[0] > 100)
    with paged.dom.paused():
        [passes], [calls] = paged.words("passes", 1, 8), paged.words("calls", 1, 8)
        [user_calls], [noticed] = paged.words("user_calls", 1, 8), paged.words("noticed", 1, 8)
        [faults], errors = paged.words("page_faults", 1, 8), paged.words("page_fault_errors", 8, 8)
    assert noticed == 0
    assert 0 <= user_calls - passes <= 1
    assert 0 <= calls - 16 * passes <= 16
    assert 0 <= faults - 8 * passes <= 8
    assert {error for error in range(8) if errors[error]} == {0, 2, 3, 5}


@pytest.mark.parametrize(
    ("symbol", "offset", "old", "new"),
    [("target64", 3, 0x77, 0x37), ("user_target", 4, 7, 8), ("target64", 0, 0x48, 0xCC)],
    ids=["kernel", "user", "breakpoint"],
)
def test_paged_notices(paged: Example, symbol: str, offset: int, old: int, new: int) -> None:
    before = passes_of_paged(paged)
    with paged.changed(symbol, offset, old, new):
        assert passes_of_paged(paged) > before
    passes_of_paged(paged)
    assert passes_of_paged(paged) == passes_of_paged(paged)


def passes_of_insider(guest: Example) -> tuple[int, int, int]:
    """Let it make a pass from its start to its end; return its counts: passes, trips, noticed."""
    end = guest.words("passes", 1)[0] + 2
    wait_until(lambda: guest.words("passes", 1)[0] >= end)
    with guest.dom.paused():
        [passes], [trips] = guest.words("passes", 1), guest.words("trips", 1)
        [noticed] = guest.words("noticed", 1)
    return passes, trips, noticed


def test_the_insider_trips_once_in_each_pass_and_notices_nothing(insider: Example) -> None:
    wait_until(lambda: insider.words("passes", 1)[0] > 100)
    passes, trips, noticed = passes_of_insider(insider)
    assert noticed == 0
    assert 0 <= trips - passes <= 1


def test_the_insider_notices_what_is_allowed_in_its_view(insider: Example) -> None:
    backend, domid, gfn = (
        insider.xen.backend,
        int(insider.dom.domid),
        insider.address("secret") >> 12,
    )
    assert backend.altp2m_get_mem_access(domid, 1, gfn) == R
    _, _, before = passes_of_insider(insider)
    backend.altp2m_set_mem_access(domid, 1, gfn, RWX)
    assert passes_of_insider(insider)[2] > before
    backend.altp2m_set_mem_access(domid, 1, gfn, R)
    _, _, after = passes_of_insider(insider)
    assert passes_of_insider(insider)[2] == after
