# SPDX-License-Identifier: LGPL-2.1-or-later
"""The declarations and tables are true of every release whose headers are at hand."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from cdefs import build
from xenaltp2m.abi import layouts, releases

from . import proof, sites
from .proof import Claim, Headers

HEADERS = sites.headers()


@functools.cache
def claimed(headers: Headers) -> tuple[Claim, ...]:
    return (*proof.claims(headers.version), *proof.table_claims(headers.version))


@functools.cache
def refuted(headers: Headers) -> dict[str, str]:
    return proof.refute(claimed(headers), headers)


def cases() -> list[object]:
    return [
        pytest.param(headers, group, id=f"{headers}-{group}")
        for headers in HEADERS
        for group in dict.fromkeys(claim.group for claim in claimed(headers))
    ]


def test_there_is_something_to_prove_against() -> None:
    if not proof.have_compiler():
        sites.missing("no gcc")
    if not HEADERS:
        sites.missing("no Xen headers (Debian: libxen-dev)")


@pytest.mark.parametrize(("headers", "group"), cases())
def test_true_of(headers: Headers, group: str) -> None:
    names = [claim.name for claim in claimed(headers) if claim.group == group]
    wrong = {name: refuted(headers)[name] for name in names if name in refuted(headers)}
    assert not wrong


@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_bit_fields_lie_where_the_ffi_has_them(headers: Headers) -> None:
    assert not proof.misplaced_bits(headers)


@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_what_is_marked_newer_is_not_there_yet(headers: Headers) -> None:
    newer = list(proof.absences(headers.version))
    assert {claim.name for claim in newer} == set(proof.refute(newer, headers))


@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_every_bound_function_is_claimed(headers: Headers) -> None:
    groups = {claim.group for claim in claimed(headers)}
    for name, function in build.functions().items():
        assert (f"function {name}" in groups) == (function.since <= headers.version)


# --- the proof can fail --------------------------------------------------------------------


class Lie(NamedTuple):
    """A change that makes the declarations untrue, and every claim that must expose it."""

    file: str
    truth: str
    lie: str
    exposed_by: set[str]


LIES = {
    "argument narrower": Lie(
        "altp2m.h",
        "xc_altp2m_get_domain_state(xc_interface *handle, uint32_t dom,",
        "xc_altp2m_get_domain_state(xc_interface *handle, uint16_t dom,",
        {"function xc_altp2m_get_domain_state"},
    ),
    "argument wider": Lie(
        "monitor.h",
        "xc_monitor_cpuid(xc_interface *xch, uint32_t domain_id",
        "xc_monitor_cpuid(xc_interface *xch, uint64_t domain_id",
        {"function xc_monitor_cpuid"},
    ),
    "argument missing": Lie(
        "evtchn.h",
        "int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port);",
        "int xenevtchn_notify(xenevtchn_handle *xce);",
        {"function xenevtchn_notify"},
    ),
    "argument invented": Lie(
        "libxl.h",
        "int libxl_ctx_free(libxl_ctx *ctx);",
        "int libxl_ctx_free(libxl_ctx *ctx, int flags);",
        {"function libxl_ctx_free"},
    ),
    "sign behind a pointer": Lie(
        "altp2m.h",
        "int32_t *error_code",
        "uint32_t *error_code",
        {"function xc_altp2m_set_supress_ve_multi"},
    ),
    "byte for bool": Lie(
        "altp2m.h",
        "bool visible",
        "uint8_t visible",
        {"function xc_altp2m_set_visibility"},
    ),
    "another type of the same width": Lie(
        "xenctrl.h",
        "uint32_t param, uint64_t *value",
        "uint32_t param, unsigned long long *value",
        {"function xc_hvm_param_get"},
    ),
    "argument of a compatibility function": Lie(
        "xenctrl.h",
        "int vcpu, uint8_t vector",
        "uint32_t vcpu, uint8_t vector",
        {"function xc_hvm_inject_trap"},
    ),
    "const lost": Lie(
        "xenstore.h",
        "xs_transaction_t t, const char *path",
        "xs_transaction_t t, char *path",
        {"function xs_read"},
    ),
    "another library's handle": Lie(
        "foreignmemory.h",
        "int xenforeignmemory_close(xenforeignmemory_handle *fmem);",
        "int xenforeignmemory_close(xenevtchn_handle *fmem);",
        {"function xenforeignmemory_close"},
    ),
    "result": Lie(
        "monitor.h",
        "void *xc_monitor_enable",
        "char *xc_monitor_enable",
        {"function xc_monitor_enable"},
    ),
    "name spelled as it should have been": Lie(
        "altp2m.h",
        "xc_altp2m_set_supress_ve_multi",
        "xc_altp2m_set_suppress_ve_multi",
        {"function xc_altp2m_set_suppress_ve_multi"},
    ),
    "function that is newer than its mark says": Lie(
        "monitor.h",
        "int xc_vm_event_get_version(xc_interface *xch);",
        "int xc_vm_event_get_version(xc_interface *xch);\nint xc_from_the_future(void);",
        {"function xc_from_the_future"},
    ),
    "constant": Lie(
        "xenctrl.h",
        "HVM_PARAM_ALTP2M                 = 35",
        "HVM_PARAM_ALTP2M                 = 36",
        {"constant HVM_PARAM_ALTP2M"},
    ),
    "flag": Lie(
        "vm_event.h",
        "VM_EVENT_FLAG_DENY               = 1 << 6",
        "VM_EVENT_FLAG_DENY               = 1 << 5",
        {"constant VM_EVENT_FLAG_DENY"},
    ),
    "members swapped": Lie(
        "vm_event.h",
        "uint64_t rax, rcx, rdx, rbx,",
        "uint64_t rax, rdx, rcx, rbx,",
        {"struct vm_event_v7_regs_x86 rcx", "struct vm_event_v7_regs_x86 rdx"},
    ),
    "members swapped in a nameless structure": Lie(
        "vm_event.h",
        "uint32_t instr_info;\n            uint32_t _pad1;",
        "uint32_t _pad1;\n            uint32_t instr_info;",
        {
            "struct vm_event_desc_access arch.vmx.instr_info",
            "struct vm_event_desc_access arch.vmx._pad1",
        },
    ),
    "sign of a member": Lie(
        "vm_event.h",
        "uint64_t gla;",
        "int64_t gla;",
        {"struct vm_event_mem_access gla"},
    ),
    "structure of a member": Lie(
        "vm_event.h",
        "struct vm_event_debug debug_exception;",
        "struct vm_event_cpuid debug_exception;",
        {"struct vm_event_v7 u.debug_exception"},
    ),
    "length of an array": Lie(
        "vm_event.h",
        "uint8_t data[340];",
        "uint8_t data[336];",
        {
            "size of struct vm_event_v7_emul_read_data",
            "struct vm_event_v7_emul_read_data data",
        },
    ),
    "ring": Lie(
        "vm_event.h",
        "uint32_t rsp_prod, rsp_event;",
        "uint32_t rsp_event, rsp_prod;",
        {"struct vm_event_sring rsp_prod", "struct vm_event_sring rsp_event"},
    ),
}


@pytest.fixture
def headers() -> Headers:
    """The first headers that have the vm_event version most releases have."""
    found = [each for each in HEADERS if releases.release(*each.version).vm_event_version == 7]
    if not found:
        sites.missing("no Xen headers (Debian: libxen-dev)")
    return found[0]


@pytest.fixture
def cdefs(tmp_path: Path) -> Path:
    """A copy of the declarations, to be lied in."""
    return shutil.copytree(build.HERE, tmp_path / "cdefs")


def tell(cdefs: Path, file: str, truth: str, lie: str) -> None:
    text = (cdefs / file).read_text()
    assert truth in text
    (cdefs / file).write_text(text.replace(truth, lie))


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_is_exposed(lie: Lie, headers: Headers, cdefs: Path) -> None:
    tell(cdefs, lie.file, lie.truth, lie.lie)
    found = proof.refute(proof.claims(headers.version, cdefs), headers)
    assert set(found) == lie.exposed_by


def test_a_bit_field_of_another_width_is_exposed(headers: Headers, cdefs: Path) -> None:
    tell(cdefs, "vm_event.h", "limit : 20", "limit : 16")
    tell(cdefs, "vm_event.h", "ar    : 12", "ar    : 16")
    assert set(proof.misplaced_bits(headers, cdefs)) == {
        "vm_event_x86_selector_reg_limit",
        "vm_event_x86_selector_reg_ar",
    }


def test_a_mark_that_is_too_late_is_exposed(headers: Headers, cdefs: Path) -> None:
    tell(
        cdefs,
        "monitor.h",
        "int xc_monitor_cpuid(",
        "/* since 4.99 */\nint xc_monitor_cpuid(",
    )
    newer = list(proof.absences(headers.version, cdefs))
    unrefuted = {claim.name for claim in newer} - set(proof.refute(newer, headers))
    assert unrefuted == {"presence of xc_monitor_cpuid"}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("tot_pages", layouts.Field(12, 8)),
        ("flags", layouts.Field(4, 2)),
    ],
)
def test_a_wrong_table_is_exposed(
    field: str, wrong: layouts.Field, headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layouts.DOMAIN_INFO.at(headers.version)
    fields = {**right.fields, field: wrong}
    monkeypatch.setattr(
        layouts, "DOMAIN_INFO", layouts.Steps(((4, 14), right._replace(fields=fields)))
    )
    found = proof.refute(proof.table_claims(headers.version), headers)
    assert set(found) == {f"tabled struct xen_domctl_getdomaininfo {field}"}


def test_headers_that_do_not_compile_prove_nothing(tmp_path: Path, headers: Headers) -> None:
    (tmp_path / "xenctrl.h").write_text("this is not C\n")
    with pytest.raises(proof.ProofError):
        proof.refute(proof.claims(headers.version), Headers(headers.version, tmp_path))
