# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that the mock executes: how they are run, and that single steps leave no trace."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.mock import Instruction, MockBackend
from xenaltp2m.tools.symbols import Image

CHECKER = Path(__file__).parents[2] / "examples" / "guest" / "checker.elf"
RACER = CHECKER.with_name("racer.elf")
HLT, JMP_SELF = b"\xf4", b"\xeb\xfe"


def beginning_with(code: bytes) -> bytes:
    """The checker, with something else as its first instructions."""
    content, image = CHECKER.read_bytes(), Image.open(CHECKER)
    first = image.segment(image.symbol("_start")).data
    assert content.count(first) == 1
    return content.replace(first, code + first[len(code) :])


def booted(mock: MockBackend, image: bytes | Path) -> int:
    domid = mock.add_domain("guest")
    mock.boot(domid, image)
    return domid


def test_it_runs_until_nothing_can() -> None:
    mock = MockBackend()
    mock.steps_at_once = 0
    domid = booted(mock, beginning_with(HLT))
    mock.domain_unpause(domid)
    mock.run(domid)
    [info] = mock.domain_getinfolist(domid, 1)
    assert info.shutdown
    assert info.shutdown_reason == 0


def test_fault_26_it_runs_so_many_instructions() -> None:
    mock = MockBackend()
    mock.steps_at_once = 0
    domid = booted(mock, beginning_with(JMP_SELF))
    mock.domain_unpause(domid)
    assert mock.run(domid, 1) == 0  # the p2m gets an entry for the page
    assert mock.run(domid, 3) == 3
    assert mock.domain(domid).vcpus[0].register("rip") == Image.open(CHECKER).address("_start")


def test_time_is_the_vcpu_s_own() -> None:
    """RDTSC, MOV, RDTSCP, HLT: the same in every run, and it goes on."""
    program = b"\x0f\x31" + b"\x89\xc6" + b"\x0f\x01\xf9" + HLT
    times = []
    for _ in range(2):
        mock = MockBackend()
        domid = booted(mock, beginning_with(program))
        mock.domain_unpause(domid)
        mock.run(domid)
        register = mock.domain(domid).vcpus[0].register
        assert register("rax") > register("rsi") > 0
        assert (register("rdx"), register("rcx")) == (0, 0)
        times.append(register("rax"))
    assert len(set(times)) == 1


def test_no_number_of_steps_means_until_the_next_event() -> None:
    mock, image = MockBackend(), Image.open(CHECKER)
    mock.steps_at_once = None
    domid = booted(mock, CHECKER)
    with (
        xa.connect(mock) as xen,
        xen.domain(domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor(xa.MemAccess) as monitor,
    ):
        view = altp2m.create_view()
        view.set_access(image.gfns("target2"), xa.Access.RW)
        altp2m.switch_to_view(view)
        mock.domain_unpause(domid)
        event = next(monitor.events(timeout=1.0))
        assert event.registers.rip == image.address("target2")
        mock.steps_at_once = 0


@pytest.mark.parametrize(
    "access", [xa.Access.RX, xa.Access.R, xa.Access.RW, xa.Access.X, xa.Access.N]
)
@pytest.mark.parametrize("fast", [True, False])
def test_single_steps_through_code_that_changes(access: xa.Access, fast: bool) -> None:
    """The guest writes its code, in a single step or not, and executes what it has written."""
    mock, image = MockBackend(), Image.open(CHECKER)
    domid = booted(mock, CHECKER)
    left = 150
    with (
        xa.connect(mock) as xen,
        xen.domain(domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor(xa.MemAccess, xa.Singlestep) as monitor,
    ):
        view = altp2m.create_view()
        view.set_access(image.gfns("target"), access)
        altp2m.switch_to_view(view)
        step = xa.Response.fast_singlestep(through=0, back_to=view)
        if not fast:
            step = xa.Response.singlestep(view=0)

        def handler(event: xa.Event) -> xa.Response:
            nonlocal left
            left -= 1
            if not left:
                monitor.stop()
            return step if isinstance(event, xa.MemAccess) else xa.Response.resume(view=view)

        mock.domain_unpause(domid)
        monitor.run(handler, timeout=1.0)
        words = struct.unpack("<6I", dom.memory.read(image.address("noticed"), 24))
    assert not left
    assert words[:5] == (0,) * 5


def recorded(seed: int, hits: int = 200) -> tuple[str, list[str], list[int]]:
    """Of a guest with four vCPUs: the recording, and what the agent heard, from whom."""
    mock, image = MockBackend(seed=seed), Image.open(RACER)
    domid = mock.add_domain("racer", vcpus=4)
    mock.boot(domid, RACER)
    heard: list[xa.Event] = []
    with (
        xa.connect(mock) as xen,
        xen.domain(domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor(xa.MemAccess) as monitor,
        mock.recording(domid, io.StringIO()) as file,
    ):
        view = altp2m.create_view()
        view.set_access(image.gfns("hit"), xa.Access.RW)
        altp2m.switch_to_view(view)

        def handler(event: xa.Event) -> xa.Response:
            heard.append(event)
            if len(heard) == hits:
                monitor.stop()
            return xa.Response.fast_singlestep(through=0, back_to=view)

        mock.domain_unpause(domid)
        monitor.run(handler, timeout=1.0)
    return file.getvalue(), [event.raw.hex() for event in heard], [int(e.vcpu) for e in heard]


def test_a_recording_has_what_was_told_and_answered() -> None:
    text, heard, vcpus = recorded(seed=1)
    lines = [json.loads(line) for line in text.splitlines()]
    requests = [line for line in lines if "request" in line]
    responses = [line for line in lines if "response" in line]
    assert [line["raw"] for line in requests][: len(heard)] == heard
    assert [line["vcpu"] for line in requests][: len(heard)] == vcpus
    assert {line["request"] for line in requests} == {"MEM_ACCESS"}
    assert {"VCPU_PAUSED", "FAST_SINGLESTEP"} <= set(responses[0]["response"])
    again = xa.Event.of(bytes.fromhex(requests[0]["raw"]))
    assert isinstance(again, xa.MemAccess)
    answered = [line["vcpu"] for line in responses]
    assert sorted(answered[: len(heard)]) == sorted(vcpus)


def test_the_same_seed_gives_the_same_recording() -> None:
    (first, _, vcpus), (again, _, _), (other, _, others) = map(recorded, (1, 1, 2))
    assert first == again
    assert first != other
    assert {*vcpus} == {*others} == {0, 1, 2, 3}


def test_a_recording_ends() -> None:
    mock = MockBackend()
    domid = booted(mock, CHECKER)
    with mock.recording(domid, io.StringIO()) as file:
        again = mock.recording(domid, file)
        with pytest.raises(xa.InvalidArgumentError, match="is being recorded"):
            again.__enter__()
    with mock.recording(domid, file):
        pass


def test_a_script_goes_on_no_further_beside_a_guest_of_machine_code() -> None:
    mock = MockBackend()
    mock.boot(mock.add_domain("racer"), RACER)
    scripted = mock.add_domain("scripted")
    mock.load(scripted, [Instruction(at, 1) for at in range(0x1000, 0x2000)])
    mock.domain_unpause(scripted)
    assert mock.domain(scripted).vcpus[0].register("rip") - 0x1000 in (255, 256)
