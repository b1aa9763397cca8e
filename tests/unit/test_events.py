# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events and responses: every reason and register decoded, every impossible answer refused."""

from __future__ import annotations

import struct

import pytest

import xenaltp2m as xa
from xenaltp2m.abi import layouts
from xenaltp2m.abi.vm_event import encode_request, patch_registers
from xenaltp2m.values.events import EVENTS

VERSIONS = [6, 7]

# Reason, class, and where each field lies in struct vm_event_st (public/vm_event.h): the request
# is written here by offset, not by the package's own layout.
Q, L, H, B = "<Q", "<I", "<H", "<B"
FIELDS = [
    (1, xa.MemAccess, {"gfn": (24, Q), "offset": (32, Q), "gla": (40, Q), "access_flags": (48, L)}),
    (2, xa.MemSharing, {"gfn": (24, Q), "p2mt": (32, L)}),
    (3, xa.MemPaging, {"gfn": (24, Q), "p2mt": (32, L), "paging_flags": (36, L)}),
    (4, xa.WriteCtrlreg, {"index": (24, L), "new_value": (32, Q), "old_value": (40, Q)}),
    (5, xa.MovToMsr, {"msr": (24, Q), "new_value": (32, Q), "old_value": (40, Q)}),
    (6, xa.SoftwareBreakpoint, {"gfn": (24, Q), "insn_length": (40, L), "type": (44, B)}),
    (7, xa.Singlestep, {"gfn": (24, Q)}),
    (8, xa.GuestRequest, {}),
    (
        9,
        xa.DebugException,
        {"gfn": (24, Q), "pending_dbg": (32, Q), "insn_length": (40, L), "type": (44, B)},
    ),
    (10, xa.Cpuid, {"insn_length": (24, L), "leaf": (28, L), "subleaf": (32, L)}),
    (11, xa.PrivilegedCall, {}),
    (12, xa.Interrupt, {"vector": (24, L), "type": (28, L), "error_code": (32, L), "cr2": (40, Q)}),
    (
        13,
        xa.DescriptorAccess,
        {
            "instr_info": (24, L), "exit_qualification": (32, Q), "descriptor": (40, B),
            "is_write": (41, B),
        },
    ),
    (14, xa.EmulUnimplemented, {}),
    (15, xa.VmExit, {"exit_reason": (24, Q), "exit_qualification": (32, Q)}),
    (16, xa.Io, {"bytes": (24, L), "port": (28, H), "is_in": (30, B), "is_string": (31, B)}),
]  # fmt: skip


def blank(version: int, reason: int, flags: int = 1, vcpu: int = 5, view: int = 0) -> bytearray:
    raw = bytearray({6: 384, 7: 400}[version])
    struct.pack_into("<IIIIH", raw, 0, version, flags, reason, vcpu, view)
    return raw


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("reason", "kind", "fields"), FIELDS)
def test_each_reason_has_its_class_and_each_field_its_place(
    version: int, reason: int, kind: type[xa.Event], fields: dict[str, tuple[int, str]]
) -> None:
    assert kind.reason == reason
    assert set(kind.fields) == set(fields)
    for chosen, (offset, code) in fields.items():
        raw = blank(version, reason)
        struct.pack_into(code, raw, offset, 1)
        event = xa.Event.of(raw)
        assert type(event) is kind
        assert event.vcpu == 5
        assert {name: int(getattr(event, name)) for name in fields} == {
            name: int(name == chosen) for name in fields
        }


def test_all_seventeen_reasons_are_known() -> None:
    assert sorted(EVENTS) == list(range(1, 17))
    assert [reason.value for reason in xa.Reason] == list(range(17))


def test_a_reason_nobody_knows_is_an_event_all_the_same() -> None:
    event = xa.Event.of(blank(7, 99))
    assert isinstance(event, xa.UnknownEvent)
    assert event.number == 99
    assert event.default_response == xa.Response.resume()
    assert isinstance(xa.Event.of(blank(7, 0)), xa.UnknownEvent)


@pytest.mark.parametrize("raw", [b"", bytes(24), bytes(400), bytes(384), b"\7" * 400])
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(xa.InvalidArgumentError):
        xa.Event.of(raw)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_register_has_its_place(version: int) -> None:
    # regs_x86 offsets within data (56), from public/vm_event.h: rax .. r15, rflags, dr6, dr7, rip.
    order = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rflags dr6 dr7 rip cr0"
    later = {
        6: {"gdtr_base": 240, "cs_base": 248, "fs_base": 264, "shadow_gs": 304, "cs_sel": 314},
        7: {"gdtr_base": 240, "npt_base": 248, "vmtrace_pos": 256, "cs_base": 264, "fs_base": 280,
            "shadow_gs": 320, "cs_sel": 330},
    }[version]  # fmt: skip
    places = {name: 8 * at for at, name in enumerate(order.split())} | later
    for chosen, offset in places.items():
        raw = blank(version, 1)
        raw[56 + offset] = 0xAB
        registers = xa.Event.of(raw).registers
        assert {name for name in registers if getattr(registers, name)} == {chosen}
        assert getattr(registers, chosen) == 0xAB


LONG, BIG, LMA = 1 << 9, 1 << 10, 1 << 10
"""CS.L, CS.D or SS.B, EFER.LMA."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("code", "efer", "rip", "base", "size", "linear"),
    [
        (BIG, 0, 0x10, 0x7C08, 4, 0x7C18),
        (0, 0, 0x10, 0x7C08, 2, 0x7C18),
        (BIG, 0, 0x2_0000, 0xFFFF_F000, 4, 0x1_F000),  # the sum has 32 bits
        (BIG, LMA, 0x10, 0x7C08, 4, 0x7C18),  # compatibility mode
        (LONG, 0, 0x10, 0x7C08, 2, 0x7C18),  # CS.L means nothing outside IA-32e mode
        (LONG, LMA, 0xFFFF_8000_0000_0010, 0x7C08, 8, 0xFFFF_8000_0000_0010),
    ],
)
def test_fault_02_where_code_and_stack_are(
    version: int, code: int, efer: int, rip: int, base: int, size: int, linear: int
) -> None:
    """SDM 3A, 3.4.4 and 5.2.1: 64-bit code ignores the bases of CS and SS."""
    raw = encode_request(
        version,
        6,
        0,
        registers={"rip": rip, "rsp": rip, "msr_efer": efer, "cs_base": base, "ss_base": base,
                   "cs": code << 20 | 0xFFFFF, "ss": BIG << 20 | 0xFFFFF},
    )  # fmt: skip
    registers = xa.Event.of(raw).registers
    assert registers.word_size == size
    assert registers.rip_va == linear
    assert registers.rsp_va == linear


@pytest.mark.parametrize("version", VERSIONS)
def test_fault_02_a_stack_of_16_bits(version: int) -> None:
    """SS.B is clear: SP is used, and the rest of ESP is anything (SDM 3A, 6.2.3)."""
    registers = {"rsp": 0xABCD_1000, "ss_base": 0x9_0008, "cs": 0xFFFF, "ss": 0xFFFF}
    found = xa.Event.of(encode_request(version, 6, 0, registers=registers)).registers
    assert found.rsp_va == 0x9_1008


def test_a_register_of_another_version_is_an_attribute_error() -> None:
    registers = xa.Event.of(blank(6, 1)).registers
    assert "npt_base" not in dir(registers)
    with pytest.raises(AttributeError, match="npt_base"):
        _ = registers.npt_base


def test_events_are_frozen_and_compare_by_what_they_tell() -> None:
    one, same, other = (xa.Event.of(blank(7, 1, vcpu=vcpu)) for vcpu in (1, 1, 2))
    assert one == same != other
    assert len({one, same, other}) == 2
    for name in ("gfn", "vcpu", "view", "raw", "registers"):
        with pytest.raises(AttributeError):
            setattr(one, name, 1)


def test_the_view_is_known_only_where_altp2m_is_on() -> None:
    assert xa.Event.of(blank(7, 1, flags=0x1, view=3)).view is None
    assert xa.Event.of(blank(7, 1, flags=0x81, view=3)).view == 3


def test_an_event_shows_what_it_is() -> None:
    raw = encode_request(
        7, xa.Reason.MEM_ACCESS, 2, flags=0x81, view=3,
        fields={"mem_access.gfn": 0x101, "mem_access.offset": 0x10, "mem_access.flags": 5},
    )  # fmt: skip
    event = xa.Event.of(raw)
    assert repr(event) == (
        "MemAccess(vcpu=2, view=3, gfn=0x101, offset=0x10, gla=0x0, access_flags=R|X)"
    )
    assert event.as_dict() == {
        "event": "MemAccess", "vcpu": 2, "view": 3, "gfn": 0x101, "offset": 0x10, "gla": 0,
        "access_flags": "R|X",
    }  # fmt: skip


def test_numbers_without_a_name_stay_numbers() -> None:
    raw = blank(7, xa.Reason.WRITE_CTRLREG)
    struct.pack_into("<I", raw, 24, 77)
    event = xa.Event.of(raw)
    assert isinstance(event, xa.WriteCtrlreg)
    assert event.index == 77


# Responses. Flags: public/vm_event.h.


@pytest.mark.parametrize(
    ("response", "flags"),
    [
        (xa.Response.resume(), 0),
        (xa.Response.resume(2), 1 << 7),
        (xa.Response.deny(), 1 << 6),
        (xa.Response.emulate(), 1 << 2),
        (xa.Response.emulate(write=False), 1 << 2 | 1 << 3),
        (xa.Response.emulate(read_data=b"a"), 1 << 2 | 1 << 5),
        (xa.Response.emulate(instruction=b"\x90"), 1 << 2 | 1 << 9),
        (xa.Response.fast_singlestep(back_to=1), 1 << 7 | 1 << 11),
        (xa.Response.fast_singlestep(through=None, back_to=1), 1 << 11),
        (xa.Response.resume().with_registers(rip=1), 1 << 8),
        (xa.Response.resume().with_next_interrupt(), 1 << 10),
    ],
)
def test_each_response_has_its_flags(response: xa.Response, flags: int) -> None:
    assert response.flags == flags


def test_data_for_the_emulator_is_laid_out_as_xen_reads_it() -> None:
    assert xa.Response.emulate(read_data=b"abc").data == b"\3\0\0\0abc"  # size, data
    assert xa.Response.emulate(instruction=b"\xc3").data == b"\xc3" + b"\x90" * 15


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: xa.Response(xa.Action.FAST_SINGLESTEP), "back_to"),
        (lambda: xa.Response(xa.Action.EMULATE, back_to=xa.ViewId(1)), "back_to"),
        (lambda: xa.Response.emulate(read_data=bytes(325)), "324"),
        (lambda: xa.Response.emulate(instruction=bytes(17)), "16"),
        (lambda: xa.Response.emulate(read_data=b"a", write=False), "one of"),
        (lambda: xa.Response.emulate(read_data=b"a", instruction=b"b"), "one of"),
        (lambda: xa.Response.emulate(instruction=b"a", write=False), "ignores"),
        (lambda: xa.Response.emulate(read_data=b"a").with_registers(rip=1), "both use one field"),
        (lambda: xa.Response.emulate(instruction=b"a").with_registers(rip=1), "both use one field"),
        (lambda: xa.Response(xa.Action.RESUME, write=False), "belong to emulate"),
        (
            lambda: xa.Response.resume().with_registers(cr3=1),  # type: ignore[call-arg]
            "cannot set cr3",
        ),
        (lambda: xa.Response.resume().with_registers(rip=1 << 64), "64 bits"),
        (lambda: xa.Response.resume().with_registers(rip=-1), "64 bits"),
        (lambda: xa.Response.resume(view=-1), "not a view"),
        (lambda: xa.Response.resume(view=1 << 16), "not a view"),
        (lambda: xa.Response.resume(view="hooks"), "not 'hooks'"),  # type: ignore[arg-type]
        (lambda: xa.Response.resume(view=True), "not True"),
    ],
)
def test_what_cannot_be_answered_is_refused_when_it_is_made(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(xa.InvalidArgumentError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: xa.Response("resume"), "an Action, not 'resume'"),  # type: ignore[arg-type]
        (lambda: xa.Response(view=True), "not True"),  # type: ignore[arg-type]
        (lambda: xa.Response(view="hooks"), "not 'hooks'"),  # type: ignore[arg-type]
        (lambda: xa.Response(view=-1), "not a view"),  # type: ignore[arg-type]
        (lambda: xa.Response(xa.Action.FAST_SINGLESTEP, back_to=2.5), "2.5"),  # type: ignore[arg-type]
        (lambda: xa.Response.emulate(read_data="abc"), "read_data must be bytes"),  # type: ignore[arg-type]
        (lambda: xa.Response.emulate(instruction=5), "instruction must be bytes"),  # type: ignore[arg-type]
        (lambda: xa.Response(registers=5), "by name, not 5"),  # type: ignore[arg-type]
    ],
)
def test_fault_27_what_is_no_part_of_a_response_is_refused(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(xa.InvalidArgumentError, match=words):
        make()


@pytest.mark.parametrize(
    ("subscribe", "words"),
    [
        (lambda: xa.WriteCtrlreg.on(3), "register must be a ControlRegister, not 3"),  # type: ignore[arg-type]
        (lambda: xa.WriteCtrlreg.on("CR3"), "a ControlRegister, not 'CR3'"),  # type: ignore[arg-type]
        (lambda: xa.WriteCtrlreg.on(xa.ControlRegister.CR3, sync=0), "sync must be True"),  # type: ignore[arg-type]
        (lambda: xa.WriteCtrlreg.on(xa.ControlRegister.CR3, ignored_bits=-1), "ignored_bits must"),
        (lambda: xa.WriteCtrlreg.on(xa.ControlRegister.CR3, deniable=None), "deniable must"),  # type: ignore[arg-type]
        (lambda: xa.MovToMsr.on(1 << 32), "msr must be 0x0 to 0xffffffff"),
        (lambda: xa.MovToMsr.on("LSTAR"), "msr must be an integer"),  # type: ignore[arg-type]
        (lambda: xa.MovToMsr.on(0x10, only_changes="no"), "only_changes must"),  # type: ignore[arg-type]
        (lambda: xa.GuestRequest.on(allow_userspace=1), "allow_userspace must"),  # type: ignore[arg-type]
        (lambda: xa.DebugException.on(sync="no"), "sync must"),  # type: ignore[arg-type]
        (lambda: xa.VmExit.on(sync=None), "sync must"),  # type: ignore[arg-type]
    ],
)
def test_fault_27_what_is_no_option_of_a_subscription_is_refused(  # type: ignore[no-untyped-def]
    subscribe, words: str
) -> None:
    with pytest.raises(xa.InvalidArgumentError, match=words):
        subscribe()


def test_a_closed_view_cannot_be_gone_to() -> None:
    with xa.connect("mock") as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
        view = altp2m.create_view()
        xa.Response.fast_singlestep(back_to=view)
        view.close()
        with pytest.raises(xa.InvalidArgumentError, match="closed"):
            xa.Response.fast_singlestep(back_to=view)
        with pytest.raises(xa.InvalidArgumentError, match="closed"):
            xa.Response.resume(view)


@pytest.mark.parametrize("version", VERSIONS)
def test_registers_that_are_not_named_keep_the_event_s_values(version: int) -> None:
    raw = bytes(encode_request(version, 1, 0, registers={"rax": 7, "rip": 8, "r15": 9}))
    data = patch_registers(version, raw, {"rip": 0x55})
    rip = layouts.VM_EVENT[version].fields["data.regs.x86.rip"].offset - 56
    assert struct.unpack_from("<Q", data, 0)[0] == 7
    assert struct.unpack_from("<Q", data, 15 * 8)[0] == 9
    assert struct.unpack_from("<Q", data, rip)[0] == 0x55
    assert len(data) == rip + 8


def test_the_defaults_let_the_guest_go_on() -> None:
    def default(reason: int, rip: int = 0x100, **request: int) -> xa.Response:
        fields = {"cpuid.insn_length": 2} if reason == xa.Reason.CPUID else None
        return xa.Event.of(
            encode_request(7, reason, 0, fields=fields, registers={"rip": rip}, **request)
        ).default_response

    step = xa.Response.fast_singlestep(through=0, back_to=3)
    assert default(xa.Reason.MEM_ACCESS, flags=0x81, view=3) == step
    assert default(xa.Reason.MEM_ACCESS, flags=0x01) == xa.Response.emulate()
    assert default(xa.Reason.EMUL_UNIMPLEMENTED, flags=0x81, view=3) == step
    assert default(xa.Reason.SOFTWARE_BREAKPOINT) == xa.Response.reinject()
    assert default(xa.Reason.DEBUG_EXCEPTION) == xa.Response.reinject()
    assert default(xa.Reason.DESCRIPTOR_ACCESS) == xa.Response.emulate()
    assert default(xa.Reason.CPUID).registers == {"rip": 0x102}
    assert default(xa.Reason.CPUID, (1 << 64) - 2).registers == {"rip": 0}, "the CPU's own sum"
    assert default(xa.Reason.WRITE_CTRLREG) == xa.Response.resume()


def test_subscriptions_say_what_they_need() -> None:
    with pytest.raises(xa.InvalidArgumentError, match="CR3"):
        xa.WriteCtrlreg.on()
    with pytest.raises(xa.InvalidArgumentError, match="MSR"):
        xa.MovToMsr.on()
    assert xa.WriteCtrlreg.on(xa.ControlRegister.CR3).key != (
        xa.WriteCtrlreg.on(xa.ControlRegister.CR4).key
    )
    assert xa.WriteCtrlreg.on(xa.ControlRegister.CR3).key == (
        xa.WriteCtrlreg.on(xa.ControlRegister.CR3, sync=False).key
    )


def test_what_can_be_denied() -> None:
    cr3 = xa.ControlRegister.CR3
    assert not xa.WriteCtrlreg.on(cr3).deniable
    assert xa.WriteCtrlreg.on(cr3, deniable=True).deniable
    assert xa.WriteCtrlreg.on(cr3, deniable=True).options == xa.WriteCtrlreg.on(cr3).options
    assert xa.WriteCtrlreg.on(cr3, deniable=True).key == xa.WriteCtrlreg.on(cr3).key
    assert xa.MovToMsr.on(0x174, deniable=True).deniable
    assert not xa.MovToMsr.on(0x174).deniable
    with pytest.raises(xa.InvalidArgumentError, match="cannot be denied"):
        xa.WriteCtrlreg.on(cr3, sync=False, deniable=True)
    with pytest.raises(xa.InvalidArgumentError, match="despite the response"):
        xa.WriteCtrlreg.on(xa.ControlRegister.XCR0, deniable=True)
