# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every check of ``doctor``: what it says where all is well, and where it is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from errno import EACCES, EIO
from pathlib import Path
from typing import Any

import pytest

import xenaltp2m as xa
from tests.contract.machines import INTEL, machine
from xenaltp2m import cli
from xenaltp2m.backend.libxc.loader import ENVIRONMENT
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Domain as Model
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.handles.journal import Journal
from xenaltp2m.tools.doctor import (
    Finding,
    Machine,
    boot_option,
    examine,
    examine_xen,
    healthy,
)
from xenaltp2m.tools.doctor import machine as machine_module
from xenaltp2m.tools.doctor.finding import PAGE
from xenaltp2m.tools.migration import import_views

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = re.findall(r"^## (\S+)$", (ROOT / PAGE).read_text(), re.MULTILINE)
XEN_LOG = """\
(XEN) VMX: Supported advanced features:
(XEN)  - APIC MMIO access virtualisation
(XEN)  - Extended Page Tables (EPT)
(XEN)  - VM Functions
(XEN) HVM: ASIDs enabled.
"""


def of(check: str, found: list[Finding]) -> list[Finding]:
    """The findings of one check."""
    assert check in SECTIONS
    return [finding for finding in found if finding.check == check]


def one(check: str, found: list[Finding]) -> Finding:
    """The only finding of a check; whatever is wrong has a cause and a cure."""
    [finding] = of(check, found)
    if finding.severity in (Severity.WARNING, Severity.PROBLEM):
        assert finding.cause
        assert finding.cure
        assert finding.link == f"docs/doctor.md#{check}"
    return finding


def checks(found: list[Finding]) -> list[str]:
    return list(dict.fromkeys(finding.check for finding in found))


# The whole.


def test_a_machine_as_it_should_be(tmp_path: Path) -> None:
    found = examine("guest", machine(tmp_path))
    assert healthy(found)
    assert not [one for one in found if one.severity in (Severity.WARNING, Severity.PROBLEM)]
    assert checks(found) == [name for name in SECTIONS if name != "without-xen"]


def test_without_a_domain_none_is_looked_at(tmp_path: Path) -> None:
    found = examine(machine=machine(tmp_path))
    assert healthy(found)
    first, last = SECTIONS.index("domain"), SECTIONS.index("symbols")
    assert checks(found) == [*SECTIONS[:first], *SECTIONS[last + 1 : -1]]


def test_every_finding_has_its_section(tmp_path: Path) -> None:
    folder = ROOT / "xenaltp2m" / "tools" / "doctor"
    source = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    names = set(re.findall(r'check(?:, \w+)* = "([a-z0-9-]+)"', source))
    names |= set(re.findall(r'(?:Finding|of_error)\(\s*"([a-z0-9-]+)"', source))
    assert names == set(SECTIONS)


# The machine.


@pytest.mark.parametrize("kind", ["", "kvm"])
def test_no_xen(tmp_path: Path, kind: str) -> None:
    found = examine("guest", machine(tmp_path, kind=kind))
    finding = one("hypervisor", found)
    assert finding.severity is Severity.PROBLEM
    assert "does not run on Xen" in finding.cause
    assert checks(found) == ["hypervisor", "cpu", "extras", "without-xen"]


def test_a_guest_is_no_control_domain(tmp_path: Path) -> None:
    found = examine(machine=machine(tmp_path, capabilities=""))
    finding = one("hypervisor", found)
    assert finding.severity is Severity.PROBLEM
    assert finding.cure == "run this in dom0"


def test_where_xenfs_is_not_mounted_it_is_taken_for_dom0(tmp_path: Path) -> None:
    found = examine(machine=machine(tmp_path, capabilities=None))
    assert one("hypervisor", found).severity is Severity.OK


@pytest.mark.parametrize(
    ("options", "cure"), [({"device": False}, "modprobe"), ({"may": False}, "sudo xenaltp2m")]
)
def test_no_privilege(tmp_path: Path, options: dict[str, bool], cure: str) -> None:
    found = examine("guest", machine(tmp_path, **options))  # type: ignore[arg-type]
    finding = one("privileges", found)
    assert finding.severity is Severity.PROBLEM
    assert cure in finding.cure
    assert checks(found) == ["hypervisor", "privileges", "cpu", "extras", "without-xen"]


def test_no_library(tmp_path: Path) -> None:
    found = examine(machine=machine(tmp_path, library=""))
    finding = one("libraries", found)
    assert finding.severity is Severity.PROBLEM
    assert "libxenctrl.so.4.17: cannot open" in finding.evidence
    assert "libxenmisc4.17" in finding.cure
    assert not of("library-release", found)
    assert not of("connection", found)


def test_a_companion_is_missing(tmp_path: Path) -> None:
    found = examine(machine=machine(tmp_path, without=["libxenlight"]))
    chosen, missing = of("libraries", found)
    assert (chosen.severity, missing.severity) == (Severity.OK, Severity.WARNING)
    assert "libxenlight" in missing.cause
    assert "libxenlight.so.4.17" in missing.cure
    assert healthy(found)


def test_the_library_that_was_named(tmp_path: Path) -> None:
    name = "libxenctrl.so.4.17"
    found = examine(machine=machine(tmp_path, environ={ENVIRONMENT: name}))
    assert f"{name} is used, because {ENVIRONMENT}" in of("libraries", found)[0].evidence
    (tmp_path / "other").mkdir()
    found = examine(machine=machine(tmp_path / "other", environ={ENVIRONMENT: "libxenctrl.so.9"}))
    assert "no other is tried" in one("libraries", found).cure


@pytest.mark.parametrize(
    ("library", "running", "severity"),
    [
        ("4.17", (4, 17), Severity.OK),
        ("4.17", (4, 18), Severity.PROBLEM),
        ("4.19", (4, 20), Severity.WARNING),  # their domctls have one number
    ],
)
def test_the_librarys_release(
    tmp_path: Path, library: str, running: tuple[int, int], severity: Severity
) -> None:
    name = f"libxenctrl.so.{library}"
    found = examine(machine=machine(tmp_path, library=name, running=running))
    assert one("library-release", found).severity is severity
    assert of("connection", found), "altp2m's own calls work all the same"


def test_a_library_whose_name_tells_nothing(tmp_path: Path) -> None:
    library = "/opt/xen/libxenctrl.so"
    found = examine(machine=machine(tmp_path, environ={ENVIRONMENT: library}, library=library))
    assert one("library-release", found).severity is Severity.NOTE


def test_the_connection_is_refused(tmp_path: Path) -> None:
    def refuse() -> xa.Xen:
        raise xa.errors.from_errno("interface_open", EACCES)

    finding = one("connection", examine("guest", machine(tmp_path, connect=refuse)))
    assert finding.severity is Severity.PROBLEM
    assert "EACCES" in finding.evidence
    assert finding.cure == "run as root in dom0"


def test_a_mismatch_is_told_and_not_warned_of(tmp_path: Path) -> None:
    """Warnings are errors here."""
    import warnings

    def warn() -> xa.Xen:
        warnings.warn("another release", xa.LibraryMismatchWarning, stacklevel=1)
        return xa.connect("mock")

    assert of("connection", examine(machine=machine(tmp_path, connect=warn)))


# The CPU.


@pytest.mark.parametrize(
    ("cpuinfo", "log", "expected"),
    [
        (INTEL, "", {}),
        ("vendor_id\t: AuthenticAMD\n", XEN_LOG, {"AuthenticAMD": Severity.PROBLEM}),
        (INTEL.replace(" ept ", " "), "", {"EPT": Severity.PROBLEM}),
        (INTEL.replace(" mtf ", " "), "", {"MTF": Severity.WARNING}),
        (INTEL.replace(" ept_violation_ve ", " "), "", {"#VE": Severity.WARNING}),
        ("vendor_id\t: GenuineIntel\n", XEN_LOG, {"#VE": Severity.WARNING}),
        (
            "",
            XEN_LOG.replace("Extended Page Tables (EPT)", ""),
            {"EPT": Severity.PROBLEM, "#VE": Severity.WARNING},
        ),
        ("vendor_id\t: GenuineIntel\n", "", {"neither": Severity.NOTE}),
        ("", "", {"neither": Severity.NOTE}),
    ],
    ids=str,
)  # fmt: skip
def test_the_cpu(tmp_path: Path, cpuinfo: str, log: str, expected: dict[str, Severity]) -> None:
    found = of("cpu", examine(machine=machine(tmp_path, cpuinfo=cpuinfo, log=log)))
    wrong = [finding for finding in found if finding.severity is not Severity.OK]
    assert len(wrong) == len(expected)
    for finding, (word, severity) in zip(wrong, expected.items(), strict=True):
        assert word in finding.evidence
        assert finding.severity is severity
        assert finding.cause
        assert finding.cure


def test_xens_log_is_read_by_xl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_module._xen_log() == ""
    xl = tmp_path / "xl"
    xl.write_text('#!/bin/sh\n[ "$*" = dmesg ] && echo "(XEN) VMX"\n')
    xl.chmod(0o755)
    assert machine_module._xen_log() == "(XEN) VMX\n"
    xl.write_text("#!/bin/sh\necho no\nexit 1\n")
    assert machine_module._xen_log() == ""


# Extras.


def test_extras_that_are_not_there(tmp_path: Path) -> None:
    found = of("extras", examine(machine=machine(tmp_path, packages=["rich"])))
    assert "installed: rich" in found[0].evidence
    assert [finding.cure for finding in found[1:]] == [
        "pip install 'xenaltp2m[sim]'", "pip install 'xenaltp2m[decode]'",
    ]  # fmt: skip
    (tmp_path / "bare").mkdir()
    found = examine(machine=machine(tmp_path / "bare", packages=[], kind=""))
    assert "no extra is installed" in of("extras", found)[0].evidence
    assert "once unicorn is installed" in one("without-xen", found).evidence


# Xen.


@pytest.fixture
def mock() -> MockBackend:
    mock = MockBackend(memory_pages=1 << 14)
    mock.add_domain("guest", memory_kib=4096, vcpus=2)
    mock.domain_unpause(1)
    return mock


@pytest.fixture
def guest(mock: MockBackend) -> Model:
    return mock.domain(1)


@pytest.fixture
def xen(mock: MockBackend, tmp_path: Path) -> Iterator[xa.Xen]:
    with xa.Xen(mock, tmp_path / "journals") as xen:
        yield xen


def test_a_release_that_is_too_new(xen: xa.Xen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xen.backend.machine, "release", replace(xen.release, minor=99))  # type: ignore[attr-defined]
    _, newer = of("connection", examine_xen(xen))
    assert newer.severity is Severity.WARNING
    assert "4.99 is newer" in newer.evidence


def test_xenstore_does_not_answer(xen: xa.Xen, mock: MockBackend) -> None:
    mock.fail("xs_read", 1, EIO)
    finding = one("xenstore", examine_xen(xen))
    assert finding.severity is Severity.PROBLEM
    assert finding.cure == "systemctl start xenstored"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", None),
        ("altp2m", True),
        ("console=com1 altp2m=1 loglvl=all", True),
        ("altp2m=yes", True),
        ("altp2m=off", False),
        ("altp2m=0", False),
        ("no-altp2m", False),
        ("no-altp2m=0", True),
        ("altp2m=1 altp2m=0", False),
        ("altp2m=0 altp2m", True),
        ("altp2m=perhaps", None),
        ("altp2mhvm=1 xaltp2m=1", None),
    ],
)
def test_boot_options(line: str, expected: bool | None) -> None:
    assert boot_option(line, "altp2m") is expected


@pytest.mark.parametrize(
    ("line", "word"), [("", "GRUB_CMDLINE_XEN"), ("altp2m=0", "GRUB_CMDLINE_XEN"),
                       ("altp2m=1", "firmware")]
)  # fmt: skip
def test_altp2m_is_off_in_xen(line: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mock = MockBackend(altp2m=False, memory_pages=1 << 13)
    monkeypatch.setattr(mock, "xen_commandline", lambda: line)
    with xa.connect(mock) as xen:
        finding = one("altp2m-option", examine_xen(xen))
    assert finding.severity is Severity.PROBLEM
    assert word in finding.cure


def test_altp2m_cannot_be_asked_for(xen: xa.Xen, mock: MockBackend) -> None:
    mock.fail("altp2m_get_domain_state", 1, EACCES)
    assert one("altp2m-option", examine_xen(xen)).severity is Severity.PROBLEM


# A domain.


@pytest.mark.parametrize("which", [9, "nobody"])
def test_an_unknown_domain(xen: xa.Xen, which: int | str) -> None:
    finding = one("domain", examine_xen(xen, which))
    assert finding.severity is Severity.PROBLEM
    assert "xenaltp2m list" in finding.cure


def test_a_domain_that_may_not_be_asked_for(xen: xa.Xen, mock: MockBackend) -> None:
    mock.fail("domain_getinfolist", 1, EACCES)
    finding = one("domain", examine_xen(xen, 1))
    assert finding.severity is Severity.PROBLEM
    assert ENVIRONMENT in finding.cure


def test_a_domain_that_is_lost_meanwhile(xen: xa.Xen, mock: MockBackend) -> None:
    mock.fail("hvm_param_get", 1, 3)
    first, last = of("domain", examine_xen(xen, 1))
    assert (first.severity, last.severity) == (Severity.OK, Severity.PROBLEM)


def test_a_domain_that_has_ended(xen: xa.Xen, mock: MockBackend) -> None:
    mock.shut_down(1)
    finding = one("domain", examine_xen(xen, 1))
    assert finding.severity is Severity.PROBLEM
    assert "has shut down" in finding.evidence


def test_a_pv_domain(xen: xa.Xen, mock: MockBackend) -> None:
    domid = mock.add_domain("pv", kind="pv", mode=xa.Altp2mMode.DISABLED)
    found = examine_xen(xen, domid)
    assert one("type", found).severity is Severity.PROBLEM
    assert found[-1].check == "type"


@pytest.mark.parametrize("mode", list(xa.Altp2mMode))
def test_the_mode(xen: xa.Xen, mock: MockBackend, mode: xa.Altp2mMode) -> None:
    domid = mock.add_domain("other", mode=mode)
    found = examine_xen(xen, domid)
    off = mode is xa.Altp2mMode.DISABLED
    assert one("mode", found).severity is (Severity.PROBLEM if off else Severity.OK)
    assert bool(of("views", found)) is not off


@pytest.mark.parametrize(
    ("count", "made", "severity", "word"),
    [
        (3, 0, Severity.OK, "can have 3 views"),
        (3, 1, Severity.OK, "2 of 3 views exist"),
        (3, 2, Severity.PROBLEM, "all 3 views"),
        (100, 2, Severity.OK, "3 of 100 views exist"),
    ],
)
def test_views_are_counted_from_4_21(count: int, made: int, severity: Severity, word: str) -> None:
    mock = MockBackend((4, 21), memory_pages=1 << 13)
    domid = mock.add_domain("few", view_count=count, memory_kib=1024)
    if made:
        mock.altp2m_set_domain_state(domid, True)
    for _ in range(made):
        mock.altp2m_create_view(domid, 7)
    with xa.connect(mock) as xen:
        finding = one("views", examine_xen(xen, domid))
    assert finding.severity is severity
    assert word in finding.evidence
    assert ("altp2m_count=N" in finding.cure) is (severity is Severity.PROBLEM)


@pytest.mark.parametrize("line", ["altp2m=1", "dom0_mem=4G altp2m", "altp2m=on"])
def test_a_domain_made_with_no_views(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MockBackend, "xen_commandline", lambda _: line)
    mock = MockBackend((4, 21), memory_pages=1 << 13)
    domid = mock.add_domain("none", view_count=0, memory_kib=1024)
    with xa.connect(mock) as xen:
        finding = one("views", examine_xen(xen, domid))
    assert finding.severity is Severity.PROBLEM
    assert "altp2m_count=10" in finding.cure


def test_how_many_views_may_be_unknown(xen: xa.Xen, monkeypatch: pytest.MonkeyPatch) -> None:
    mock = MockBackend((4, 21), memory_pages=1 << 13)
    domid = mock.add_domain("guest", memory_kib=1024)
    for text in ("{}", "[]", '{"b_info": 5}', '{"b_info": {"altp2m_count": "x"}}'):
        monkeypatch.setattr(mock, "domain_config_json", lambda _, text=text: text)
        with xa.Xen(mock) as other:
            assert "unknown number" in one("views", examine_xen(other, domid)).evidence
            other._undo.forget()  # the backend is needed again


# Agents.


def test_an_agent_that_works_is_a_note(xen: xa.Xen) -> None:
    with xen.domain(1) as dom, dom.monitor(), dom.altp2m() as altp2m:
        altp2m.create_view()
        finding = one("agents", examine_xen(xen, 1))
    assert finding.severity is Severity.NOTE
    assert "works on it, and is running" in finding.evidence


def test_views_that_were_imported_are_a_note(xen: xa.Xen) -> None:
    with xa.connect("mock") as other, other.domain("guest") as dom, dom.altp2m() as altp2m:
        altp2m.create_view()
        state = xa.capture(altp2m)
    import_views(xen, 1, state)
    finding = one("agents", examine_xen(xen, 1))
    assert finding.severity is Severity.NOTE
    assert "views were imported" in finding.evidence
    assert "state export" in finding.cure


def test_altp2m_left_on_by_somebody(xen: xa.Xen, mock: MockBackend) -> None:
    mock.altp2m_set_domain_state(1, True)
    finding = one("agents", examine_xen(xen, 1))
    assert finding.severity is Severity.PROBLEM
    assert "altp2m is on" in finding.evidence
    assert "xenaltp2m rescue 1" in finding.cure


def test_a_journals_directory_that_is_not_to_be_trusted(xen: xa.Xen) -> None:
    assert xen.journals is not None
    Journal(xen.journals, 1, xen.domain(1).uuid).write(pauses=1)
    xen.journals.chmod(0o777)
    last = examine_xen(xen, 1)[-1]
    assert last.severity is Severity.PROBLEM
    assert "only this user may write to" in last.evidence
    assert "chmod" in f"{last.cause}{last.cure}"
    xen.journals.chmod(0o700)


# vCPUs.


def test_a_paused_domain(xen: xa.Xen, mock: MockBackend) -> None:
    mock.domain_pause(1)
    finding = one("vcpus", examine_xen(xen, 1))
    assert finding.severity is Severity.WARNING
    assert finding.cure == "xl unpause 1"


def test_a_vcpu_that_waits_for_an_answer(xen: xa.Xen, mock: MockBackend, guest: Model) -> None:
    from xenaltp2m.backend.mock import Instruction

    guest.vcpus[1].online = True
    mock.load(1, [Instruction(0x5000)], loop=True)
    mock.load(1, [Instruction(0x6000)], vcpu=1, loop=True)
    mock.domain_pause(1)
    mock.domain_unpause(1)
    assert one("vcpus", examine_xen(xen, 1)).severity is Severity.OK
    guest.vcpus[1].event_pauses += 1
    finding = one("vcpus", examine_xen(xen, 1))
    assert finding.severity is Severity.WARNING
    assert "vCPUs [1]" in finding.evidence
    assert "rescue --force 1" in finding.cure


def test_a_cpu_that_cannot_single_step(
    xen: xa.Xen, mock: MockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not of("cpu", examine_xen(xen, 1))
    monkeypatch.setattr(mock, "monitor_get_capabilities", lambda _: ~(1 << 2))
    finding = one("cpu", examine_xen(xen, 1))
    assert finding.severity is Severity.WARNING
    assert "MTF" in finding.cause


# The pool, hazards, symbols.


@pytest.mark.parametrize("version", [(4, 14), (4, 17)])
def test_the_pool(version: tuple[int, int]) -> None:
    mock = MockBackend(version, memory_pages=1 << 13)
    domid = mock.add_domain("guest", memory_kib=1024, pool_pages=512)
    with xa.connect(mock) as xen:
        assert "has 2048 KiB" in one("p2m-pool", examine_xen(xen, domid)).evidence
        for op in ("get_paging_mempool_size", "shadow_get_allocation"):
            mock.fail(op, 1, EACCES)
        assert of("p2m-pool", examine_xen(xen, domid))[0].severity is Severity.NOTE


def test_hazards(xen: xa.Xen, guest: Model) -> None:
    guest.passed_through = ["0000:03:00.0"]
    guest.memory_target = 1024
    found = {one.evidence.partition(":")[0]: one for one in of("hazards", examine_xen(xen, 1))}
    assert found["passthrough"].severity is Severity.PROBLEM
    assert "--accept passthrough" in found["passthrough"].cure
    assert found["passthrough"].link == "docs/hazards.md#passthrough"
    assert found["ballooning"].severity is Severity.WARNING
    assert found["delayed-answers"].severity is Severity.NOTE
    for finding in found.values():
        assert finding.cause
        assert finding.cure


def test_a_hazard_that_could_not_be_looked_for(xen: xa.Xen, mock: MockBackend) -> None:
    mock.fail("domain_get_pod_target", 1, EIO)
    notes = [one.evidence for one in of("hazards", examine_xen(xen, 1))]
    assert any(
        note.startswith("populate-on-demand: this hazard could not be checked") for note in notes
    )


def test_the_guests_kernel(
    xen: xa.Xen, mock: MockBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def kernel(path: object) -> Finding:
        text = json.dumps({"b_info": {"kernel": str(path)}})
        monkeypatch.setattr(mock, "domain_config_json", lambda _: text)
        return one("symbols", examine_xen(xen, 1))

    image = ROOT / "examples/guest/hello.elf"
    assert kernel(image).evidence == f"{image} has symbols: --symbols {image}"
    (tmp_path / "vmlinuz").write_bytes(b"MZ" + bytes(1000))
    for bad in (tmp_path / "vmlinuz", tmp_path, tmp_path / "none", ""):
        finding = kernel(bad)
        assert finding.severity is Severity.NOTE
        assert "kallsyms" in finding.cure


# The command.


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--connect", "mock", "doctor", "guest"]) == cli.DONE
    out = capsys.readouterr().out
    assert "ok       mode: its altp2m mode is external\n" in out
    assert "problem" not in out
    assert cli.main(["--connect", "mock", "--quiet", "doctor"]) == cli.DONE
    assert capsys.readouterr().out == ""


def test_the_command_where_there_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as over:
        cli.main(["--connect", "mock", "--quiet", "doctor", "nobody"])
    assert over.value.code == 1
    assert capsys.readouterr().out == (
        "problem  domain: no domain is called 'nobody'\n"
        "         cause: it was not created, has ended, or has another name\n"
        "         cure: list the domains: xenaltp2m list\n"
        "         see: docs/doctor.md#domain\n"
    )


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--connect", "mock", "--json", "doctor", "nobody"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["healthy"] is False
    assert document["findings"][-1] == {
        "check": "domain",
        "severity": "problem",
        "evidence": "no domain is called 'nobody'",
        "cause": "it was not created, has ended, or has another name",
        "cure": "list the domains: xenaltp2m list",
        "link": "docs/doctor.md#domain",
    }


def test_the_command_looks_at_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def look(which: object, machine: Machine) -> list[Finding]:
        assert machine.sysfs == Path("/sys/hypervisor")
        asked.append(which)
        return [Finding("hypervisor", Severity.OK, "a name\x1b[2J\nand more")]

    monkeypatch.setattr("xenaltp2m.cli.doctor.examine", look)
    assert cli.main(["doctor"]) == cli.DONE
    assert capsys.readouterr().out == "ok       hypervisor: a name\\x1b[2J\n         and more\n"
    assert cli.main(["doctor", "win10"]) == cli.DONE
    assert asked == [None, "win10"]


def test_nothing_is_changed(xen: xa.Xen, mock: MockBackend, guest: Model) -> None:
    before = guest.active, guest.pauses, guest.pages, guest.max_pages, dict(guest.params)
    mock.calls.clear()
    examine_xen(xen, 1)
    assert before == (guest.active, guest.pauses, guest.pages, guest.max_pages, dict(guest.params))
    asks = re.compile("get|config|name|xs_read|version|extra|commandline|resume|capab")
    assert [call.op for call in mock.calls if not asks.search(call.op)] == []
