# SPDX-License-Identifier: LGPL-2.1-or-later
"""What undermines views: found where it is, refused where it must be, accepted by name."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from errno import EACCES, EIO, EPERM
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.abi.releases import SUPPORTED, release
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Domain as Model
from xenaltp2m.backend.mock.p2m import ORDER_4K, PageType
from xenaltp2m.handles import hazards
from xenaltp2m.handles.hazards import NAMES, Severity, Survey, survey, tables_of

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 4096  # KiB
PAGES = range(0x100, 0x400)
"""Those of a guest with that memory that are looked at."""


def retype(guest: Model, gfns: range, kind: PageType) -> None:
    for gfn in gfns:
        found = guest.host.lookup(gfn)
        guest.host_write(gfn, found.mfn, ORDER_4K, kind, found.access)


def pass_through(guest: Model) -> None:
    guest.passed_through = ["0000:03:00.0", "0000:03:00.1"]


def log_writes(guest: Model) -> None:
    retype(guest, PAGES, PageType.RAM_LOGDIRTY)


def leave_to_demand(guest: Model) -> None:
    for gfn in (0x200, 0x201, 0x202):
        guest.set_aside(gfn, PageType.POPULATE_ON_DEMAND)


def page_out(guest: Model) -> None:
    guest.set_aside(0x200, PageType.PAGED)


def share(guest: Model) -> None:
    for gfn in PAGES:
        guest.set_aside(gfn, PageType.SHARED)


def mix(guest: Model) -> None:
    guest.params[xa.types.HVM_PARAM_ALTP2M] = xa.Altp2mMode.MIXED


def balloon(guest: Model) -> None:
    guest.memory_target = 3072


def nest(guest: Model) -> None:
    guest.nested = True


def emulate(guest: Model) -> None:
    guest.kind = "hvm"


REFUSED: dict[str, tuple[Callable[[Model], None], str]] = {
    "passthrough": (pass_through, "0000:03:00.0, 0000:03:00.1"),
    "log-dirty": (log_writes, "4 of 4"),
    "populate-on-demand": (leave_to_demand, "3 pages"),
    "paging": (page_out, "1 pages"),
    "sharing": (share, "768 pages"),
    "mixed": (mix, "mode is mixed"),
}
"""How each comes about, and what its evidence tells."""
TOLD: dict[str, tuple[Callable[[Model], None], str]] = {
    "nested": (nest, "nested_hvm"),
    "emulated-devices": (emulate, "hvm, not pvh"),
    "ballooning": (balloon, "domain's target as 3072 KiB, of 4096 KiB"),
}


@pytest.fixture(params=[(4, 14), (4, 17), (4, 22)], ids="{0[0]}.{0[1]}".format)
def mock(request: pytest.FixtureRequest) -> MockBackend:
    mock = MockBackend(request.param, memory_pages=1 << 13)
    mock.add_domain("guest", memory_kib=MEMORY)
    return mock


@pytest.fixture
def guest(mock: MockBackend) -> Model:
    return mock.domain(1)


@pytest.fixture
def dom(mock: MockBackend) -> Iterator[xa.Domain]:
    with xa.connect(mock) as xen, xen.domain(1) as dom:
        yield dom


def of_domains(dom: xa.Domain) -> list[str]:
    """The hazards found that are not the release's."""
    return [hazard.name for hazard in dom.hazards() if hazard.name in hazards._KINDS]


# What is found.


def test_an_ordinary_guest_has_none(dom: xa.Domain, guest: Model) -> None:
    assert of_domains(dom) == []
    assert not any(hazard.severity is Severity.PROBLEM for hazard in dom.hazards())
    with dom.altp2m():
        assert guest.active
        assert of_domains(dom) == []


def test_an_hvm_guest_opens_as_well(mock: MockBackend) -> None:
    domid = mock.add_domain("windows", kind="hvm", memory_kib=MEMORY)
    with xa.connect(mock) as xen, xen.domain(domid) as dom:
        assert of_domains(dom) == ["emulated-devices"]
        dom.altp2m().close()


@pytest.mark.parametrize("mode", [xa.Altp2mMode.EXTERNAL, xa.Altp2mMode.LIMITED])
def test_modes_in_which_the_guest_cannot_change_views(dom: xa.Domain, mode: xa.Altp2mMode) -> None:
    backend = dom.xen.backend
    assert isinstance(backend, MockBackend)
    backend.domain(1).params[xa.types.HVM_PARAM_ALTP2M] = mode
    dom.altp2m().close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(dom: xa.Domain, guest: Model, mock: MockBackend, name: str) -> None:
    make, evidence = REFUSED[name]
    make(guest)
    [hazard] = (hazard for hazard in dom.hazards() if hazard.severity is Severity.PROBLEM)
    assert hazard.name == name
    assert evidence in hazard.evidence
    mock.calls.clear()
    with pytest.raises(xa.HazardError) as refused:
        dom.altp2m()
    assert refused.value.hazards == (name,)
    assert hazard.evidence in str(refused.value)
    assert hazard.consequence in refused.value.hint[0]
    assert hazard.cure in refused.value.hint[0]
    assert f'accept=("{name}",)' in refused.value.hint[-1]
    assert f"--accept {name}" in refused.value.hint[-1]
    assert not guest.active
    assert not {call.op for call in mock.calls} & {"altp2m_set_domain_state", "altp2m_create_view"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_accepted(dom: xa.Domain, guest: Model, name: str) -> None:
    REFUSED[name][0](guest)
    with dom.altp2m(accept=(name,)) as altp2m:
        assert guest.active
        altp2m.create_view()
    assert not guest.active


@pytest.mark.parametrize("name", TOLD)
def test_what_is_only_told(dom: xa.Domain, guest: Model, name: str) -> None:
    make, evidence = TOLD[name]
    make(guest)
    [hazard] = (hazard for hazard in dom.hazards() if hazard.name in hazards._KINDS)
    assert hazard.name == name
    assert evidence in hazard.evidence
    if name == "nested":  # which Xen refuses
        with pytest.raises(xa.InvalidArgumentError, match="nested"):
            dom.altp2m()
    else:
        dom.altp2m().close()


def test_each_hazard_has_a_test() -> None:
    assert {*REFUSED, *TOLD, "p2m-pool", "write-only"} == set(hazards._KINDS)
    assert set(REFUSED) == set(hazards._AT_OPENING)


def test_several_are_told_at_once(dom: xa.Domain, guest: Model) -> None:
    mix(guest)
    pass_through(guest)
    balloon(guest)
    with pytest.raises(xa.HazardError) as refused:
        dom.altp2m(accept=["ballooning"])
    assert refused.value.hazards == ("mixed", "passthrough")
    assert 'accept=("mixed", "passthrough",)' in refused.value.hint[-1]
    with pytest.raises(xa.HazardError) as refused:
        dom.altp2m(accept=["mixed"])
    assert refused.value.hazards == ("passthrough",)
    dom.altp2m(accept={"mixed", "passthrough"}).close()


def test_also_where_altp2m_is_on_already(dom: xa.Domain, guest: Model, mock: MockBackend) -> None:
    mock.altp2m_set_domain_state(1, True)
    pass_through(guest)
    with pytest.raises(xa.HazardError):
        dom.altp2m()
    assert guest.active


@pytest.mark.parametrize("number", ["0", "", "many"])
def test_devices_that_were_taken_away_again(
    dom: xa.Domain, mock: MockBackend, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mock, "xs_read", lambda _: number.encode())
    dom.altp2m().close()


def test_a_device_whose_name_is_not_told(
    dom: xa.Domain, mock: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []

    def read(path: str) -> bytes | None:
        paths.append(path)
        return b"999999999" if path.endswith("num_devs") else None

    monkeypatch.setattr(mock, "xs_read", read)
    with pytest.raises(xa.HazardError, match="PCI devices 999999999"):
        dom.altp2m()
    assert len(paths) < 1000


def test_a_few_dirty_pages_do_not_hide_that_writes_are_logged(dom: xa.Domain, guest: Model) -> None:
    log_writes(guest)
    guest.write_logdirty(0x100)
    with pytest.raises(xa.HazardError, match="3 of 4"):
        dom.altp2m()


def test_a_rom_is_not_log_dirty(dom: xa.Domain, guest: Model) -> None:
    retype(guest, range(0xC0, 0x101), PageType.RAM_RO)
    assert "log-dirty" not in of_domains(dom)
    dom.altp2m().close()


@pytest.mark.parametrize("kib", [0, 4, 1024, 1028, 1032, 1040])
def test_guests_too_small_to_look_at(kib: int) -> None:
    mock = MockBackend(memory_pages=1 << 13)
    domid = mock.add_domain("small", memory_kib=kib)
    with xa.connect(mock) as xen, xen.domain(domid) as dom:
        dom.altp2m().close()


def test_what_touching_populates_is_no_longer_on_demand(dom: xa.Domain, guest: Model) -> None:
    leave_to_demand(guest)
    assert of_domains(dom) == ["populate-on-demand"]
    for gfn in (0x200, 0x201, 0x202):
        dom.memory.read(gfn << 12, 1)
    assert of_domains(dom) == []


def test_a_shared_page_that_is_written_to_is_shared_no_longer(dom: xa.Domain, guest: Model) -> None:
    guest.set_aside(0x200, PageType.SHARED)
    assert of_domains(dom) == ["sharing"]
    dom.memory.write(0x200 << 12, b"mine")
    assert of_domains(dom) == []


# The p2m pool.


@pytest.mark.parametrize(
    ("pages", "tables"),
    [(1, 4), (512, 4), (513, 5), (512 * 512, 512 + 3), (1 << 20, 2048 + 4 + 1 + 1)],
)
def test_tables_of_a_view(pages: int, tables: int) -> None:
    assert tables_of(pages) == tables


@pytest.mark.parametrize("mock", [(4, 17)], indirect=True)
def test_a_pool_may_do_for_few_views(dom: xa.Domain, guest: Model) -> None:
    guest.pool.pages = 3 * tables_of(guest.pages)
    assert [hazard.name for hazard in dom.hazards(views=2)].count("p2m-pool") == 0
    [found] = (hazard for hazard in dom.hazards(views=3) if hazard.name == "p2m-pool")
    assert f"the pool has {guest.pool.pages * 4} KiB" in found.evidence
    assert "3 views" in found.evidence
    dom.altp2m().close()


@pytest.mark.parametrize("mock", [(4, 14)], indirect=True)
def test_up_to_4_16_a_pool_is_told_in_whole_mib(dom: xa.Domain, guest: Model) -> None:
    guest.pool.pages = 1
    assert "p2m-pool" not in of_domains(dom), "1 MiB, rounded up, would do"
    assert "p2m-pool" in {hazard.name for hazard in dom.hazards(views=256)}


# What cannot be asked.


@pytest.mark.parametrize("mock", [(4, 17)], indirect=True)
def test_what_could_not_be_found_out_is_said(dom: xa.Domain, mock: MockBackend) -> None:
    mock.fail("domain_config_json", 1, EIO)
    mock.fail("get_paging_mempool_size", 1, EACCES)
    found = survey(dom.context)
    assert set(found.unknown) == {"nested", "p2m-pool"}
    assert "EIO" in found.unknown["nested"]
    assert not {"nested", "p2m-pool"} & {hazard.name for hazard in found.hazards}


def test_a_configuration_that_is_no_json(
    dom: xa.Domain, mock: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("", "[]", '{"b_info": 3}', "{"):
        monkeypatch.setattr(mock, "domain_config_json", lambda _, text=text: text)
        assert "nested" in survey(dom.context).unknown


def test_an_opening_that_cannot_find_out_is_refused_unless_accepted(
    dom: xa.Domain, guest: Model, mock: MockBackend
) -> None:
    mock.fail("xs_read", 1, EPERM)
    with pytest.raises(xa.AccessDeniedError):
        dom.altp2m()
    assert not guest.active
    mock.fail("xs_read", 1, EPERM)
    dom.altp2m(accept=("passthrough",)).close()


def test_a_pv_domain_has_no_views_to_undermine() -> None:
    mock = MockBackend(memory_pages=1 << 13)
    domid = mock.add_domain("pv", kind="pv", mode=xa.Altp2mMode.DISABLED, memory_kib=MEMORY)
    with xa.connect(mock) as xen, xen.domain(domid) as dom:
        assert survey(dom.context) == Survey((), {})


def test_a_domain_that_is_gone(dom: xa.Domain, mock: MockBackend) -> None:
    mock.destroy(1)
    with pytest.raises(xa.DomainNotFoundError):
        dom.hazards()


# What it costs.


def test_opening_asks_little(dom: xa.Domain, mock: MockBackend) -> None:
    mock.calls.clear()
    dom.altp2m()
    asked = [call.op for call in mock.calls if not call.op.startswith("altp2m_")]
    assert sorted(asked) == [
        "domain_get_pod_target",
        "domain_getinfolist",
        *["hvm_get_mem_type"] * 4,
        "hvm_param_get",
        "xs_read",
    ]


def test_what_is_accepted_is_not_asked(dom: xa.Domain, mock: MockBackend) -> None:
    mock.calls.clear()
    dom.altp2m(accept=tuple(REFUSED))
    assert {call.op for call in mock.calls} == {
        "altp2m_get_domain_state",
        "altp2m_set_domain_state",
    }


# Releases.


@pytest.mark.parametrize(
    ("xen", "expected"),
    [
        (
            (4, 14),
            {"decorative-default", "overwritten-neighbours", "dropped-superpage", "failed-enable"},
        ),
        (
            (4, 16),
            {
                "decorative-default", "overwritten-neighbours", "dropped-superpage",
                "delayed-answers",
            },
        ),
        ((4, 17), {"decorative-default", "delayed-answers"}),
        (
            (4, 20),
            {"superpage-default", "hidden-superpage", "unheard-host-access", "delayed-answers"},
        ),
        ((4, 22), {"hidden-superpage", "unheard-host-access", "delayed-answers"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)  # fmt: skip
def test_bugs_of_a_release(xen: tuple[int, int], expected: set[str]) -> None:
    mock = MockBackend(xen, memory_pages=1 << 13)
    mock.add_domain("guest", memory_kib=MEMORY)
    with xa.connect(mock) as connection, connection.domain(1) as dom:
        found = {hazard.name: hazard for hazard in dom.hazards()}
        assert set(found) == expected
        for hazard in found.values():
            assert hazard.severity is Severity.WARNING
            assert f"Xen {xen[0]}.{xen[1]} is running" in hazard.evidence


@pytest.mark.parametrize("name", hazards._BUGS)
def test_a_bug_is_gone_in_the_release_that_is_named(name: str) -> None:
    bug = hazards._BUGS[name]
    bitten = [version for version in SUPPORTED if bug.bites(release(*version))]
    assert bitten
    if bug.fixed is None:
        assert bitten[-1] == SUPPORTED[-1]
    else:
        major, _, minor = bug.fixed.partition(".")
        assert bitten[-1] == (int(major), int(minor) - 1)


# Names and words.


@pytest.mark.parametrize("accept", ["passthrough", ("dma",), ["passthrough", ""]])
def test_names_of_no_hazard(dom: xa.Domain, guest: Model, accept: object) -> None:
    with pytest.raises(xa.InvalidArgumentError):
        dom.altp2m(accept=accept)  # type: ignore[arg-type]
    assert not guest.active


def test_every_hazard_has_its_section() -> None:
    text = (ROOT / hazards.PAGE).read_text()
    sections = re.findall(r"^## ([a-z0-9-]+)$", text, re.MULTILINE)
    assert sections == list(NAMES)
    kinds = hazards._KINDS | {name: bug.kind for name, bug in hazards._BUGS.items()}
    for name, section in zip(
        sections, re.split(r"^## .*$", text, flags=re.MULTILINE)[1:], strict=True
    ):
        severity = "Problem" if kinds[name].severity is Severity.PROBLEM else "Warning"
        assert section.lstrip().startswith(severity), name


def test_a_hazard_is_a_value(dom: xa.Domain, guest: Model) -> None:
    pass_through(guest)
    first, again = dom.hazards()[0], dom.hazards()[0]
    assert first == again
    assert hash(first) == hash(again)
    assert first.link == "docs/hazards.md#passthrough"
    with pytest.raises(FrozenInstanceError):
        first.name = "other"  # type: ignore[misc]


def test_the_error_survives_pickling(dom: xa.Domain, guest: Model) -> None:
    pass_through(guest)
    with pytest.raises(xa.HazardError) as refused:
        dom.altp2m()
    copy = pickle.loads(pickle.dumps(refused.value))
    assert (copy.hazards, copy.hint, str(copy)) == (
        refused.value.hazards, refused.value.hint, str(refused.value),
    )  # fmt: skip


def test_a_trace_is_refused_and_accepted_alike(dom: xa.Domain, guest: Model) -> None:
    from xenaltp2m.tools.symbols import Image

    image = Image.open(ROOT / "examples/guest/hello.elf")
    guest.passed_through = ["0000:03:00.0"]
    with pytest.raises(xa.HazardError):
        xa.Trace(dom, "target", symbols=image, trust=True)
    assert not guest.active
    xa.Trace(dom, "target", symbols=image, trust=True, accept=("passthrough",)).close()
