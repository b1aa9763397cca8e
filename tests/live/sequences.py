# SPDX-License-Identifier: LGPL-2.1-or-later
"""One agent, and what it hears of one guest's doings: on real Xen, and on the mock.

tests/live/test_sequences.py runs the scenes in tests/lab/guest/events.elf,
tests/unit/test_event_sequences.py has the mock's vCPU perform the same instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import xenaltp2m as xa
from xenaltp2m.abi.ring import SLOTS
from xenaltp2m.backend.mock import (
    Access,
    Cpuid,
    GuestRequest,
    Instruction,
    SetRegisters,
    WriteControlRegister,
    WriteMsr,
)
from xenaltp2m.tools.symbols import Image

R, W, X = xa.AccessFlag.R, xa.AccessFlag.W, xa.AccessFlag.X
LINEAR = xa.AccessFlag.GLA_VALID | xa.AccessFlag.FAULT_WITH_GLA
CR3 = xa.ControlRegister.CR3
LSTAR = 0xC0000082
_IDLE = 0.003
_RETURN = 26
"""Where in attempt() a command returns to."""


class Row(NamedTuple):
    """What is told of an event, with addresses as symbols and offsets.

    Attributes:
        reason: Which event.
        view: The vCPU's view.
        rip: Where the vCPU was.
        at: Which address was accessed, of a :class:`MemAccess`.
        access: How.
        details: Its other fields.
    """

    reason: str
    view: int
    rip: tuple[str, int]
    at: tuple[str, int] | None = None
    access: xa.AccessFlag | None = None
    details: tuple[int, ...] = ()


Place = tuple[str, int]
Answer = Callable[[xa.Event, xa.View], xa.Response | None]


@dataclass(frozen=True)
class Scene:
    """What is forbidden, what the guest is told to do, what the agent answers, what it hears.

    Attributes:
        name: In words.
        command: What the guest is told: the command, its argument, its value.
        code: What its vCPU executes, as far as it is heard of: where, and the instruction made
            for that address.
        expected: What is heard.
        access: What the view forbids, by symbol.
        subscriptions: What else is heard of.
        later: What else is heard of once the guest has done all of it once in the view: an
            exception is told of again where its handler's pages were not in the view yet.
        answer: The agent's.
    """

    name: str
    command: tuple[str, str | int, int]
    code: Sequence[tuple[Place, int, Callable[[Image], dict[str, object]]]]
    expected: Sequence[Row]
    access: dict[str, xa.Access] = field(default_factory=dict)
    subscriptions: Sequence[xa.Subscription | type[xa.Event]] = ()
    later: Sequence[xa.Subscription | type[xa.Event]] = ()
    answer: Answer = lambda event, view: None


def trace(
    dom: xa.Domain,
    image: Image,
    scene: Scene,
    begin: Callable[[], None],
    over: Callable[[], bool],
) -> list[Row]:
    """Be the agent.

    Args:
        dom: The domain.
        image: What runs in it.
        scene: What to do.
        begin: Lets the guest begin.
        over: Whether it has done what it was told.
    """
    rows: list[Row] = []

    def handler(event: xa.Event) -> xa.Response | None:
        rows.append(_row(event, image))
        return scene.answer(event, view)

    with dom.altp2m() as altp2m, dom.monitor(xa.MemAccess, *scene.subscriptions) as monitor:
        view = altp2m.create_view()
        for symbol, access in scene.access.items():
            [gfn] = image.gfns(symbol)
            view.set_access(gfn, access)
        altp2m.switch_to_view(view)
        for rehearsal in [True, False] if scene.later else [False]:
            if not rehearsal:
                for subscription in scene.later:
                    monitor.enable(subscription)
            begin()
            while not over():
                monitor.run(handler, timeout=_IDLE)
            assert not (rehearsal and rows)
        rows += [_row(event, image) for event in islice(monitor.events(timeout=0), SLOTS)]
    return rows


def program(image: Image, scene: Scene) -> Iterator[Instruction]:
    """The scene's instructions for the mock's vCPU, which ends where commands return to."""
    for (symbol, offset), length, more in scene.code:
        yield Instruction(image.address(symbol) + offset, length, **more(image))  # type: ignore[arg-type]
    yield Instruction(end(image) - 1, 1)


def end(image: Image) -> int:
    """Where the program is over."""
    return int(image.address("attempt")) + _RETURN + 1


_SYMBOLS = (
    "target", "constant", "stepped", "breakpoint", "data", "scratch", "counter", "attempt",
    "command_read", "command_write", "command_cr3", "command_cpuid", "command_wrmsr",
    "command_guest_request",
)  # fmt: skip


def _place(address: int, image: Image) -> Place:
    """The symbol before an address, and how far it is."""
    known = {symbol: int(image.address(symbol)) for symbol in _SYMBOLS}
    symbol = max((name for name in known if known[name] <= address), key=known.__getitem__)
    return symbol, address - known[symbol]


def _row(event: xa.Event, image: Image) -> Row:
    rip = _place(event.registers.rip, image)
    row = Row(type(event).__name__, -1 if event.view is None else event.view, rip)
    match event:
        case xa.MemAccess():
            assert (event.gfn, event.offset) == divmod(event.gla, xa.PAGE_SIZE)
            return row._replace(at=_place(event.gla, image), access=event.access_flags)
        case xa.Singlestep() | xa.SoftwareBreakpoint():
            assert event.gfn == event.registers.rip // xa.PAGE_SIZE
        case xa.WriteCtrlreg():
            row = row._replace(details=(event.index, event.old_value, event.new_value))
        case xa.MovToMsr():
            row = row._replace(details=(event.msr, event.old_value, event.new_value))
        case xa.Cpuid():
            row = row._replace(details=(event.leaf, event.subleaf, event.insn_length))
        case _:
            pass
    return row


# Code, as the mock's vCPU executes it.


def _plain(_: Image) -> dict[str, object]:
    return {}


def _return(image: Image) -> dict[str, object]:
    return {"effect": SetRegisters({"rip": end(image) - 1})}


def _accessing(
    kind: str, symbol: str, data: bytes = b"\0\0\0\0"
) -> Callable[[Image], dict[str, object]]:
    return lambda image: {"accesses": [Access(kind, image.address(symbol), data, "rax")]}


def _doing(effect: object) -> Callable[[Image], dict[str, object]]:
    return lambda _: {"effect": effect}


# incl reads and writes: the CPU tells of it as of one write.
TARGET = [(("target", 0), 6, _accessing("w", "counter")), (("target", 6), 1, _return)]
STEPPED = [
    (("stepped", 0), 2, _plain),
    *[(("stepped", offset), 1, _plain) for offset in range(2, 10)],
    (("stepped", 10), 1, _return),
]
BREAKPOINT = [
    (("breakpoint", 0), 1, _plain),
    (("breakpoint", 1), 5, _plain),
    (("breakpoint", 6), 1, _return),
]
STEPS = [0, *range(2, 11)]


def _fetch(symbol: str, offset: int, view: int = 1) -> Row:
    return Row("MemAccess", view, (symbol, offset), (symbol, offset), X | LINEAR)


def _toggle(event: xa.Event, view: xa.View) -> xa.Response:
    if isinstance(event, xa.MemAccess):
        return xa.Response.singlestep(0)
    return xa.Response.resume(view)


def _step_through(event: xa.Event, view: xa.View) -> xa.Response:
    if event.registers.rip >> 12 == STEPPED_GFN:
        return xa.Response.singlestep(0)
    return xa.Response.resume(view)


STEPPED_GFN = 0x104


def _only(kind: type[xa.Event], response: xa.Response) -> Answer:
    return lambda event, view: response if isinstance(event, kind) else None


EMULATE = _only(xa.MemAccess, xa.Response.emulate())
NOP = _only(xa.SoftwareBreakpoint, xa.Response.emulate(instruction=b"\x90"))

SCENES = [
    Scene(
        "fetches, each let through by a fast single-step",
        ("call", "target", 0), TARGET,
        [_fetch("target", 0), _fetch("target", 6)],
        access={"target": xa.Access.RW},
    ),
    Scene(
        "fetches, each let through by a single-step",
        ("call", "target", 0), TARGET,
        [
            _fetch("target", 0), Row("Singlestep", 0, ("target", 6)),
            _fetch("target", 6), Row("Singlestep", 0, ("attempt", _RETURN)),
        ],
        access={"target": xa.Access.RW}, answer=_toggle,
    ),
    Scene(
        "fetches, each emulated",
        ("call", "stepped", 0), STEPPED,
        [_fetch("stepped", offset) for offset in STEPS],
        access={"stepped": xa.Access.RW}, answer=EMULATE,
    ),
    Scene(
        "single-steps as long as the page is executed",
        ("call", "stepped", 0), STEPPED,
        [
            _fetch("stepped", 0),
            *[Row("Singlestep", 0, ("stepped", offset)) for offset in STEPS[1:]],
            Row("Singlestep", 0, ("attempt", _RETURN)),
        ],
        access={"stepped": xa.Access.RW}, answer=_step_through,
    ),
    Scene(
        "a fetch answered by leaving the view",
        ("call", "stepped", 0), STEPPED,
        [_fetch("stepped", 0)],
        access={"stepped": xa.Access.N}, answer=_only(xa.MemAccess, xa.Response.resume(0)),
    ),
    Scene(
        "data and code forbidden at once",
        ("call", "target", 0), TARGET,
        [
            _fetch("target", 0),
            _fetch("target", 6),
        ],
        access={"target": xa.Access.RW, "counter": xa.Access.R},
    ),
    Scene(
        "an instruction that reads and writes",
        ("call", "target", 0), TARGET,
        [Row("MemAccess", 1, ("target", 0), ("counter", 0), R | W | LINEAR)],
        access={"counter": xa.Access.N},
    ),
    Scene(
        "a write that is emulated",
        ("call", "target", 0), TARGET,
        [Row("MemAccess", 1, ("target", 0), ("counter", 0), R | W | LINEAR)],
        access={"counter": xa.Access.R}, answer=EMULATE,
    ),
    Scene(
        "a write that is lost",
        ("write", "scratch", 0), [(("command_write", 9), 2, _accessing("w", "scratch"))],
        [Row("MemAccess", 1, ("command_write", 9), ("scratch", 0), R | W | LINEAR)],
        access={"scratch": xa.Access.RX},
        answer=_only(xa.MemAccess, xa.Response.emulate(write=False)),
    ),
    Scene(
        "a read with data",
        ("read", "scratch", 0), [(("command_read", 7), 2, _accessing("r", "scratch"))],
        [Row("MemAccess", 1, ("command_read", 7), ("scratch", 0), R | LINEAR)],
        access={"scratch": xa.Access.X},
        answer=_only(xa.MemAccess, xa.Response.emulate(read_data=b"\1\2\3\4")),
    ),
    Scene(
        "a breakpoint, emulated",
        ("call", "breakpoint", 0), BREAKPOINT,
        [Row("SoftwareBreakpoint", 1, ("breakpoint", 0))],
        subscriptions=[xa.SoftwareBreakpoint], answer=NOP,
    ),
    Scene(
        "a breakpoint, given to the guest's handler",
        ("call", "breakpoint", 0), BREAKPOINT,
        [Row("SoftwareBreakpoint", 1, ("breakpoint", 0))],
        later=[xa.SoftwareBreakpoint],
    ),
    Scene(
        "a breakpoint in a page that is not executable",
        ("call", "breakpoint", 0), BREAKPOINT,
        [
            _fetch("breakpoint", 0),
            Row("SoftwareBreakpoint", 0, ("breakpoint", 0)),
            # The step that was begun at the int3, which never happened, is that of the next.
            _fetch("breakpoint", 6),
        ],
        access={"breakpoint": xa.Access.RW}, subscriptions=[xa.SoftwareBreakpoint], answer=NOP,
    ),
    Scene(
        "cr3",
        ("cr3", 0x5000, 0), [(("command_cr3", 9), 3, _doing(WriteControlRegister(1, 0x5000)))],
        [Row("WriteCtrlreg", 1, ("command_cr3", 9), details=(CR3, 0, 0x5000))],
        subscriptions=[xa.WriteCtrlreg.on(CR3)],
    ),
    Scene(
        "an MSR",
        ("wrmsr", LSTAR, 0x1234), [(("command_wrmsr", 14), 2, _doing(WriteMsr(LSTAR, 0x1234)))],
        [Row("MovToMsr", 1, ("command_wrmsr", 14), details=(LSTAR, 0, 0x1234))],
        subscriptions=[xa.MovToMsr.on(LSTAR)],
    ),
    Scene(
        "cpuid",
        ("cpuid", 0, 0), [(("command_cpuid", 32), 2, _doing(Cpuid()))],
        [Row("Cpuid", 1, ("command_cpuid", 32), details=(0, 0, 2))],
        subscriptions=[xa.Cpuid],
    ),
    Scene(
        "a guest's request",
        ("guest_request", 0, 0), [(("command_guest_request", 18), 3, _doing(GuestRequest()))],
        [Row("GuestRequest", 1, ("command_guest_request", 18))],
        subscriptions=[xa.GuestRequest],
    ),
]  # fmt: skip
