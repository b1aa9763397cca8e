# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errors say what was asked, what Xen said, and the likely cause of exactly that refusal."""

from __future__ import annotations

import copy
import errno
import functools
import inspect
import pickle
from pathlib import Path

import pytest

from xenaltp2m import errors
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend import Backend
from xenaltp2m.errors import (
    HINTS,
    AccessDeniedError,
    AlreadyError,
    BusyError,
    ClosedError,
    DomainNotFoundError,
    HazardError,
    InvalidArgumentError,
    JournalError,
    LeftoverError,
    LibraryError,
    NotMappedError,
    OutOfMemoryError,
    RecordingError,
    RingError,
    StateError,
    SymbolError,
    UnsupportedError,
    XenError,
)

from .test_semantics import ROWS, New

PYTHONS: dict[type[XenError], type[Exception]] = {
    AccessDeniedError: PermissionError,
    DomainNotFoundError: ProcessLookupError,
    NotMappedError: LookupError,
    InvalidArgumentError: ValueError,
    AlreadyError: FileExistsError,
    UnsupportedError: NotImplementedError,
    ClosedError: ValueError,
    SymbolError: ValueError,
    BusyError: OSError,
    OutOfMemoryError: OSError,
    LibraryError: OSError,
    LeftoverError: OSError,
    JournalError: OSError,
    HazardError: OSError,
    RingError: OSError,
    StateError: ValueError,
    RecordingError: ValueError,
}
"""Each error and the built-in one that code knowing nothing of this package would catch."""

CLASSES = {
    errno.EPERM: AccessDeniedError,
    errno.EACCES: AccessDeniedError,
    errno.EINVAL: InvalidArgumentError,
    errno.EBUSY: BusyError,
    errno.EEXIST: AlreadyError,
    errno.ENOMEM: OutOfMemoryError,
    errno.EOPNOTSUPP: UnsupportedError,
    errno.ENOSYS: UnsupportedError,
    errno.EILSEQ: XenError,
    errno.ENODEV: XenError,
}


@pytest.mark.parametrize(("kind", "builtin"), PYTHONS.items(), ids=lambda kind: kind.__name__)
def test_each_error_is_one_of_ours_and_one_of_python_s(
    kind: type[XenError], builtin: type[Exception]
) -> None:
    with pytest.raises(builtin) as caught:
        raise kind("it failed", op="altp2m_create_view", errno=errno.EINVAL)
    assert isinstance(caught.value, XenError)
    assert isinstance(caught.value, OSError)


def test_the_tree_is_listed_whole() -> None:
    ours = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, XenError) and kind is not XenError
    }
    assert ours == set(PYTHONS)


@pytest.mark.parametrize(("number", "kind"), CLASSES.items(), ids=errno.errorcode.get)
def test_an_errno_chooses_the_class(number: int, kind: type[XenError]) -> None:
    error = errors.from_errno("altp2m_change_gfn", number, domid=1)
    assert type(error) is kind
    assert error.errno == number


def test_esrch_is_a_missing_domain_or_a_missing_gfn() -> None:
    assert type(errors.from_errno("domain_pause", errno.ESRCH, domid=1)) is DomainNotFoundError
    error = errors.from_errno("altp2m_get_mem_access", errno.ESRCH, domid=1, view=2, gfn=0)
    assert type(error) is NotMappedError


def test_what_it_was_about() -> None:
    error = errors.from_errno("op", errno.EINVAL, domid=3, view=0, gfn=0x1F, vcpu=2)
    assert error.context() == {
        "op": "op",
        "errno": errno.EINVAL,
        "domid": 3,
        "view": 0,
        "gfn": 0x1F,
        "vcpu": 2,
    }
    assert error.message == "op (domain 3, view 0, gfn 0x1f, vCPU 2): EINVAL, Invalid argument"
    bare = errors.from_errno("op", errno.EOPNOTSUPP)
    assert bare.message.startswith("op: EOPNOTSUPP, ")  # errorcode calls it ENOTSUP
    assert errors.from_errno("op", 12345).message.startswith("op: 12345, ")


def test_text_without_with_one_and_with_many_causes() -> None:
    assert str(XenError("it failed")) == "it failed"
    assert str(XenError("it failed", hint=("rain",))) == "it failed\n  likely cause: rain"
    assert str(XenError("it failed", hint=("rain", "snow"))) == (
        "it failed\n  likely causes:\n    1. rain\n    2. snow"
    )
    left = LeftoverError("it failed", left=["view 1", "a page"], hint=["rain"])
    assert str(left) == (
        "it failed\n  likely cause: rain\n  still in place: view 1\n  still in place: a page"
    )


@pytest.mark.parametrize("kind", PYTHONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("again", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_errors_travel_between_processes(kind: type[XenError], again: object) -> None:
    assert callable(again)
    error = kind("it failed", op="op", errno=5, domid=1, view=2, gfn=3, vcpu=4, hint=("rain",))
    if isinstance(error, LeftoverError):
        error.left = ("view 1",)
    error.add_note("still in place: a page")
    copied = again(error)
    assert type(copied) is kind
    assert (str(copied), copied.context()) == (str(error), error.context())
    assert vars(copied) == vars(error)


def test_a_missing_symbol_names_the_release() -> None:
    error = errors.missing_symbol("monitor_io", "xc_monitor_io", (4, 18))
    assert isinstance(error, UnsupportedError)
    assert error.errno is None
    assert "xc_monitor_io" in str(error)
    assert "older than Xen 4.18" in str(error)


# Hints.

OPERATIONS = {name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if name[0] != "_"}
GATE = {
    errno.EPERM: "run as root in dom0",
    errno.ESRCH: "the domain is gone",
    errno.EOPNOTSUPP: "altp2m is off in the hypervisor",
    errno.EINVAL: "no such view",
    errno.ENOMEM: "p2m pool is exhausted",
}
MONITOR = {
    errno.EACCES: "library's release",
    errno.ESRCH: "the domain is gone",
    errno.EEXIST: "already enabled",
    errno.EOPNOTSUPP: "cannot send the event",
}
REST = {errno.EACCES: "library's release"}
FIRST_CAUSES: dict[str, dict[int, str]] = {
    "altp2m_get_domain_state": {errno.EINVAL: "created without altp2m"},
    "altp2m_set_domain_state": {
        errno.EINVAL: "created without altp2m",
        errno.ENOMEM: "log-dirty ranges",
    },
    "altp2m_create_view": {errno.EINVAL: "no view is left", errno.ENOMEM: "log-dirty ranges"},
    "altp2m_destroy_view": {errno.EBUSY: "a vCPU is in the view"},
    "altp2m_get_vcpu_p2m_idx": {errno.EINVAL: "no such vCPU"},
    "altp2m_change_gfn": {errno.ESRCH: "not ordinary RAM", errno.EILSEQ: "not RAM (direct MMIO)"},
    "altp2m_get_mem_access": {errno.ESRCH: "no own entry"},
    "altp2m_set_suppress_ve": {errno.ESRCH: "not ordinary RAM"},
    "altp2m_get_suppress_ve": {errno.ESRCH: "no own entry"},
    "altp2m_set_suppress_ve_multi": {errno.EINVAL: "above the last"},
    "altp2m_set_vcpu_enable_notify": {
        errno.EPERM: "direct MMIO",
        errno.EINVAL: "no such vCPU",
        errno.EOPNOTSUPP: "no #VE",
        errno.EEXIST: "has a #VE page already",
        errno.EAGAIN: "paged out",
    },
    "altp2m_set_vcpu_disable_notify": {errno.EINVAL: "no such vCPU", errno.EOPNOTSUPP: "no #VE"},
    "hvm_param_set": {errno.EEXIST: "when a domain is created", errno.EINVAL: "nested"},
    "monitor_enable": {
        errno.EBUSY: "is, or was, active",
        errno.EINVAL: "not HVM or PVH",
        errno.EOPNOTSUPP: "no page for the ring",
    },
    "monitor_disable": {errno.EINVAL: "no monitor is enabled", errno.EBUSY: "wait for a free slot"},
    "monitor_resume": {errno.ENODEV: "no monitor is enabled"},
    "monitor_write_ctrlreg": {errno.EINVAL: "index"},
    "monitor_mov_to_msr": {errno.ENXIO: "no monitor is enabled", errno.EINVAL: "MSR is outside"},
    "monitor_control_registers": {errno.EOPNOTSUPP: "CONFIG_VM_EVENT"},
    "monitor_emulate_each_rep": {errno.EINVAL: "no monitor is enabled"},
    "set_mem_access": {
        errno.ENODEV: "no monitor is enabled",
        errno.EINVAL: "beyond the domain's maximum gfn",
        errno.ENOSYS: "CONFIG_VM_EVENT",
    },
    "set_mem_access_multi": {
        errno.ENODEV: "no monitor is enabled",
        errno.EINVAL: "an access that this release does not support",
        errno.ENOSYS: "CONFIG_VM_EVENT",
    },
    "get_mem_access": {
        errno.ENODEV: "no monitor is enabled",
        errno.ESRCH: "a hole",
        errno.EINVAL: "beyond the domain's maximum gfn",
        errno.ENOSYS: "CONFIG_VM_EVENT",
    },
    "domain_set_access_required": {errno.ENOSYS: "CONFIG_VM_EVENT"},
    "vm_event_get_version": {errno.EOPNOTSUPP: "CONFIG_VM_EVENT"},
    "domain_populate_physmap_exact": {errno.EBUSY: "memory limit"},
    "domain_decrease_reservation_exact": {errno.EINVAL: "a hole"},
}
"""What the first cause of a refusal must speak of, where it is not the family's."""


def first_cause(op: str, number: int) -> str | None:
    """What the first hint must contain; None for a refusal nobody thought of."""
    family = GATE if op.startswith("altp2m_") else MONITOR if op.startswith("monitor_") else REST
    return FIRST_CAUSES.get(op, {}).get(number, family.get(number))


@functools.cache
def refusals(xen: tuple[int, int]) -> frozenset[tuple[str, int]]:
    """Every (operation, errno) that the rules of a release came upon."""
    found: set[tuple[str, int]] = set()
    for row in ROWS:
        if row.since <= xen <= row.until:
            new = New(xen)
            row.check(new)
            for guest in new.made:
                found |= {(call.op, call.errno) for call in guest.backend.calls if call.errno}
                guest.close()
    return frozenset(found)


@pytest.mark.parametrize("xen", [SUPPORTED[0], SUPPORTED[-1]], ids="{0[0]}.{0[1]}".format)
def test_every_refusal_has_a_cause_that_fits(xen: tuple[int, int]) -> None:
    seen = refusals(xen)
    assert len(seen) > 100
    for op, number in sorted(seen):
        name = f"{op} {errno.errorcode[number]}"
        fragment = first_cause(op, number)
        assert fragment is not None, f"{name}: which cause should come first?"
        causes = errors.hint(op, number)
        assert causes, f"{name}: no hint"
        assert fragment in causes[0], f"{name}: {causes[0]}"


def test_every_cause_in_the_list_is_one_xen_came_upon() -> None:
    seen = refusals(SUPPORTED[0]) | refusals(SUPPORTED[-1])
    listed = {(op, number) for op, causes in FIRST_CAUSES.items() for number in causes}
    assert listed <= seen


def listed_on_the_page() -> dict[str, dict[str, list[str]]]:
    """Read docs/errors.md: the causes by operation, or family, and by errno's name."""
    found: dict[str, dict[str, list[str]]] = {}
    number = ""
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
    for line in text.partition("## By operation")[2].splitlines():
        if line.startswith("### "):
            here = found.setdefault(line.removeprefix("### ").strip("`"), {})
        elif line.startswith("| ") and not line.startswith(("| errno", "| ---")):
            first, cause = line.strip("| ").split(" | ")[:2] if line[2] != " " else ("", line)
            number = first or number
            here.setdefault(number, []).append(cause.strip("| "))
    return found


def test_the_page_of_errors_has_every_refusal_of_the_mock_with_its_causes() -> None:
    page = listed_on_the_page()
    assert len(page) > 30
    for op, number in refusals(SUPPORTED[0]) | refusals(SUPPORTED[-1]):
        name = "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode[number]
        family = f"Each `{op.partition('_')[0]}_` operation"
        places = (page.get(place, {}) for place in (op, family, "Every operation"))
        [causes, *_] = [place[name] for place in places if name in place] or [[]]
        told = errors.from_errno(op, number).hint
        assert causes == list(told) != [], f"{op} {name}"


@pytest.mark.parametrize(("op", "number"), HINTS, ids=str)
def test_hints_are_for_operations_that_exist(op: str, number: int) -> None:
    families = {"altp2m", "monitor", "*"}
    before = {"interface_open"}  # while there is no backend yet
    assert op in OPERATIONS | families | before
    assert number in errno.errorcode


@pytest.mark.parametrize("causes", HINTS.values(), ids=lambda causes: causes[0][:30])
def test_hints_say_something(causes: tuple[str, ...]) -> None:
    assert causes
    assert all(cause and not cause.endswith(".") for cause in causes)
    assert len(set(causes)) == len(causes)


def test_a_hint_is_the_operation_s_else_the_family_s_else_everybody_s() -> None:
    assert errors.hint("altp2m_destroy_view", errno.EBUSY)[0].startswith("a vCPU is in the view")
    assert errors.hint("altp2m_set_visibility", errno.EINVAL) == HINTS["altp2m", errno.EINVAL]
    assert errors.hint("domain_pause", errno.EACCES) == HINTS["*", errno.EACCES]
    assert errors.hint("domain_pause", errno.ERANGE) == ()
