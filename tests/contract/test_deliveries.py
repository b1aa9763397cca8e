# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exceptions whose delivery leaves guest mode, on the simulator and on Xen.

Xen delivers a hardware exception again. An instruction that raises a software one executes again
(``hvm_event_needs_reinjection``).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.abi.x86 import NO_ERROR_CODE

from .guests import RunningGuest, hooked, running, serve, write_image
from .test_breakpoints import BASE, HOSTS, WAY_NAMES, WAYS, YIELD_FOR_EVER, word

GDT, IDT, RESULTS, STACKS = (BASE + 0x1000 * n for n in range(1, 5))
DONE, NEXT, AFTER = (RESULTS + 4 * n for n in range(3))
"""Where the program ends, where the handler returns to, and where to the next time."""
COUNTS, FRAMES = RESULTS + 0x100, RESULTS + 0x200
"""Of each kind: how often its handler ran, and to where the last frame returned."""
KINDS = {
    "int3": "cc", "int3 with a prefix": "f3cc", "int n": "cd20", "int 3": "cd03", "into": "ce",
    "int1": "f1", "ud2": "0f0b",
}  # fmt: skip
EXITS = {
    "int3": "SoftwareBreakpoint",
    "int3 with a prefix": "SoftwareBreakpoint",
    "int1": "DebugException",
}
"""Of which kinds Xen tells whenever they are executed."""
TURNS = 3


class Program:
    """Executes each kind, with a stack of its own each turn.

    Attributes:
        places: Where each kind's instruction is.
        behind: Where the next one is.
    """

    def __init__(self, turns: int, *, twice: bool) -> None:
        """``twice``: the handler returns to the instruction once."""
        self.places: dict[str, int] = {}
        self.behind: dict[str, int] = {}
        code = bytearray(b"\x0f\x01\x15" + word(GDT + 0x80) + b"\x0f\x01\x1d" + word(GDT + 0x88))
        code += b"\xea" + word(BASE + 21) + b"\x08\x00"
        code += b"\x66\xb8\x10\x00\x8e\xd8\x8e\xc0\x8e\xd0"
        for index, (kind, instruction) in enumerate(KINDS.items()):
            code += b"\xbe" + word(index) + b"\xbf" + word(turns)  # mov to ESI, EDI
            start = len(code)
            code += b"\x0f\xa2"  # CPUID, which the agent hears
            code += b"\x89\xf8\xc1\xe0\x0c\x8d\xa0" + word(STACKS)  # ESP = STACKS + (EDI << 12)
            place = BASE + len(code) + 24
            self.places[kind], raw = place, bytes.fromhex(instruction)
            self.behind[kind] = behind = place + len(raw)
            for at, value in (NEXT, place if twice else behind), (AFTER, behind):
                code += b"\xc7\x05" + word(at) + word(value)
            code += b"\xb0\x7f\x04\x01" + raw  # OF is set
            code += b"\x4f\x0f\x85" + word(start - (len(code) + 7))  # DEC EDI, JNZ
        code += b"\xc7\x05" + word(DONE) + word(1) + YIELD_FOR_EVER
        handler = BASE + len(code)
        code += b"\x50\x8b\x44\x24\x04\x89\x04\xb5" + word(FRAMES)
        code += b"\xa1" + word(NEXT) + b"\x89\x44\x24\x04\xa1" + word(AFTER) + b"\xa3" + word(NEXT)
        code += b"\xff\x04\xb5" + word(COUNTS) + b"\x58\xcf"
        gdt = struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF).ljust(0x80, b"\0")
        gdt += struct.pack("<HI2xHI", 23, GDT, 0x21 * 8 - 1, IDT)
        gate = struct.pack("<HHHH", handler & 0xFFFF, 8, 0x8E00, handler >> 16)
        pages = bytes(code), gdt, gate * 0x21, *[b""] * (1 + turns)
        self.image = b"".join(page.ljust(0x1000, b"\0") for page in pages)


@contextmanager
def executing(host: str, program: Program, path: Path) -> Iterator[RunningGuest]:
    """Have a guest that executes it, in small pages, so that Xen fills each of a view alone."""
    write_image(path, BASE, program.image)
    with running(host, str(path)) as guest:
        with guest.dom.altp2m():
            for gfn in range(BASE >> 12, BASE + len(program.image) >> 12):
                guest.xen.backend.altp2m_set_mem_access(
                    int(guest.dom.domid), 0, gfn, xa.Access.RWX.value
                )
        yield guest


def results(guest: RunningGuest, at: int) -> dict[str, int]:
    """Read a number of each kind."""
    data = guest.dom.memory.read(at, 4 * len(KINDS))
    return dict(zip(KINDS, struct.unpack(f"<{len(KINDS)}I", data), strict=True))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("last", ["resume", "jump", "inject"])
def test_fault_23_what_comes_again_when_a_view_denies_a_delivery(
    host: str, last: str, tmp_path: Path
) -> None:
    """IDT, GDT and stack are denied one after another.

    At the last the agent may send the vCPU on, or inject INT n; that is lost where Xen delivers the
    guest's own exception again (``hvm_do_resume``).
    """
    program, names, length = Program(1, twice=False), list(KINDS), 2
    denied = {IDT >> 12: "IDT", GDT >> 12: "GDT", STACKS >> 12: "stack"}
    told: dict[str, list[str]] = {name: [] for name in names}
    kinds = xa.MemAccess, xa.SoftwareBreakpoint, xa.DebugException, xa.Cpuid
    with (
        executing(host, program, tmp_path / "program.elf") as guest,
        guest.dom.altp2m() as altp2m,
        guest.dom.monitor(*kinds) as monitor,
    ):
        view = altp2m.create_view()
        altp2m.switch_to_view(view)

        def answer(event: xa.Event) -> xa.Response | None:
            if isinstance(event, xa.Cpuid):
                view.set_access(list(denied), xa.Access.N)
                return None
            name = names[event.registers.rsi]
            if not isinstance(event, xa.MemAccess):
                told[name].append(type(event).__name__)
                return xa.Response.reinject()
            told[name].append(denied[event.gfn])
            view.set_access(event.gfn, xa.Access.RWX)
            response = xa.Response.resume()
            if denied[event.gfn] == "stack" and last == "jump":
                return response.with_registers(rip=program.behind[name])
            if denied[event.gfn] == "stack" and last == "inject":
                domid, kind = int(guest.dom.domid), int(xa.TrapType.SOFTWARE_INTERRUPT)
                guest.xen.backend.hvm_inject_trap(domid, 0, 0x20, kind, NO_ERROR_CODE, length, 0)
            return response

        guest.start()
        serve(monitor, answer, lambda: guest.dom.memory.read(DONE, 1) == b"\1")
        counts, frames = results(guest, COUNTS), results(guest, FRAMES)
    for name in names:
        exit_, is_fault, place = EXITS.get(name), name == "ud2", program.places[name]
        steps = [exit_, "IDT", exit_, "GDT", exit_, "stack", exit_ if last == "resume" else None]
        assert told[name] == [step for step in steps if step], name
        assert counts[name] == (is_fault or last != "jump"), name
        if last == "jump":
            expected = program.behind[name] if is_fault else 0
        elif is_fault:
            expected = place
        else:
            expected = place + length if last == "inject" else program.behind[name]
        assert frames[name] == expected, name


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("fast", "int3"), WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize("beside", [False, True], ids=["Xen fills views", "our views deny"])
def test_fault_11_an_execution_whose_delivery_leaves_guest_mode_is_one_hit(
    host: str, fast: bool, int3: bool, beside: bool, tmp_path: Path
) -> None:
    """Each is executed twice a turn, the second time directly after the first."""
    program = Program(TURNS, twice=True)
    with executing(host, program, tmp_path / "program.elf") as guest:
        with hooked(guest, fast=fast, int3=int3) as (monitor, breakpoints):
            hooks = {
                name: breakpoints.insert(place, lambda hit: None)
                for name, place in program.places.items()
            }
            tables = IDT, GDT, *range(STACKS, STACKS + 0x1000 * TURNS, 0x1000)
            for page in tables if beside else ():
                breakpoints.insert(page + 0x800, lambda hit: None)
            events = count(1)

            def answer(event: xa.Event) -> xa.Response | None:
                if next(events) % 64 == 0:
                    monitor.stop()  # at its end it goes on in a page that may be stepped
                return breakpoints(event)

            guest.start()
            serve(monitor, answer, lambda: guest.dom.memory.read(DONE, 1) == b"\1")
        executions = dict.fromkeys(KINDS, 2 * TURNS)
        assert results(guest, COUNTS) == executions
        assert {name: hook.hits for name, hook in hooks.items()} == executions


@pytest.mark.parametrize("host", HOSTS)
def test_fault_01_an_int3_that_is_reinjected_while_another_trap_waits(
    host: str, tmp_path: Path
) -> None:
    """Somebody takes a page: the vCPU goes on without what was injected, since Xen 4.15.

    So the int3 comes again while its trap waits, and no other can be injected: EBUSY
    (``vcpu_ioreq_handle_completion``, ``hvm_do_resume``).
    """
    program, told = Program(1, twice=False), []
    with (
        executing(host, program, tmp_path / "program.elf") as guest,
        guest.dom.monitor(xa.SoftwareBreakpoint) as monitor,
    ):
        unused = iter(range((BASE >> 12) + 0x80, (BASE >> 12) + 0x82))

        def answer(event: xa.Event) -> xa.Response:
            told.append(event.registers.rip)
            if told.count(event.registers.rip) == 1:
                gfns = array("Q", [next(unused)])
                guest.xen.backend.domain_decrease_reservation_exact(int(guest.dom.domid), gfns)
            return xa.Response.reinject()

        guest.start()
        serve(monitor, answer, lambda: guest.dom.memory.read(DONE, 1) == b"\1")
        counts = results(guest, COUNTS)
    places = [program.places[name] for name in ("int3", "int3 with a prefix")]
    times = 1 + guest.xen.release.removal_delays_answers
    assert told == [places[0]] * times + [places[1]] * times
    assert counts == dict.fromkeys(KINDS, 1)
