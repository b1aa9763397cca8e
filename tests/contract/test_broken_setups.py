# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ten set-ups that do not work: what is raised, and what ``doctor`` says, name cause and cure.

Six of them a host can be brought into, the mock and Xen alike. For the other four, which are of the
machine or of its boot, the mock and made-up files stand in here; on real Xen three of them are in
``tests/live/environment``, which is booted for each. That there is no Xen cannot be shown on Xen.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.backend.libxc.loader import Loader
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.tools.doctor import Finding, Machine, examine, examine_xen, healthy
from xenaltp2m.tools.rescue import rescue
from xenaltp2m.types import Altp2mMode

from .hosts import Host, XenHost
from .machines import absent, machine

ABSENT = 0x7FE0


@pytest.fixture
def xen(host: Host, tmp_path: Path) -> Iterator[xa.Xen]:
    xen = xa.Xen(host.backend, tmp_path / "journals")
    yield xen
    xen.abandon()


def problem(found: list[Finding], check: str) -> Finding:
    """The one problem, which must be of a check, with cause, cure and link."""
    [finding] = (finding for finding in found if finding.severity is Severity.PROBLEM)
    assert finding.check == check
    assert finding.cause
    assert finding.cure
    assert finding.link == f"docs/doctor.md#{check}"
    return finding


def test_unknown_domain(xen: xa.Xen) -> None:
    for which in (ABSENT, "nobody", "7b0d2f5c-5f0e-4c0e-9d1e-000000000000"):
        with pytest.raises(xa.DomainNotFoundError) as refused:
            xen.domain(which)
        assert "xenaltp2m list" in str(refused.value)
        assert "xenaltp2m list" in problem(examine_xen(xen, which), "domain").cure


def test_pv_domain(host: Host, xen: xa.Xen) -> None:
    domid = host.pv_domain()
    with xen.domain(domid) as dom, pytest.raises(xa.UnsupportedError) as refused:
        dom.altp2m()
    assert any("the domain is PV" in cause for cause in refused.value.hint)
    finding = problem(examine_xen(xen, domid), "type")
    assert 'type="pvh"' in finding.cure


def test_domain_without_altp2m(host: Host, xen: xa.Xen) -> None:
    """No word of altp2m in its configuration."""
    domid = host.create_plain()
    try:
        _has_no_altp2m(xen, domid)
    finally:
        host.destroy(domid)


def test_mode_disabled(host: Host, xen: xa.Xen) -> None:
    _has_no_altp2m(xen, host.shared_domain(Altp2mMode.DISABLED))


def _has_no_altp2m(xen: xa.Xen, domid: int) -> None:
    with xen.domain(domid) as dom, pytest.raises(xa.InvalidArgumentError) as refused:
        dom.altp2m()
    assert "created without altp2m" in refused.value.hint[0]
    assert 'altp2m="external"' in refused.value.hint[0]
    finding = problem(examine_xen(xen, domid), "mode")
    assert "created without altp2m" in finding.cause
    assert 'altp2m="external"' in finding.cure


def test_views_exhausted(host: Host, xen: xa.Xen) -> None:
    domid = host.shared_domain()
    with xen.domain(domid) as dom, dom.altp2m() as altp2m:
        for _ in range(9):
            altp2m.create_view()
        with pytest.raises(xa.InvalidArgumentError) as refused:
            altp2m.create_view()
        assert "no view is left" in refused.value.hint[0]
        [finding] = (one for one in examine_xen(xen, domid) if one.check == "views")
        assert finding.severity is Severity.PROBLEM
        assert "all 10 views" in finding.evidence
        assert "rescue" in finding.cure
        altp2m.views[0].close()
        [finding] = (one for one in examine_xen(xen, domid) if one.check == "views")
        assert finding.severity is Severity.OK
        assert "9 of 10 views exist" in finding.evidence


AGENT = """
import sys, time
from pathlib import Path
from uuid import UUID
import xenaltp2m as xa
from xenaltp2m.handles.journal import Journal

kind, directory, domid, uuid = sys.argv[1:]
if kind == "xen":
    xen = xa.connect(journal=directory)
    dom = xen.domain(int(domid))
    monitor = dom.monitor(xa.MemAccess)
else:  # the mock is the test's process's
    Journal(Path(directory), int(domid), UUID(uuid)).write(monitor=True)
print("ready", flush=True)
time.sleep(600)
"""


def test_stale_ring_after_kill_9(host: Host, xen: xa.Xen) -> None:
    domid = host.create()
    try:
        kind = "xen" if isinstance(host, XenHost) else "mock"
        uuid = host.backend.domain_getinfolist(domid, 1)[0].uuid
        assert xen.journals is not None
        command = [sys.executable, "-c", AGENT, kind, str(xen.journals), str(domid), str(uuid)]
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert agent.stdout is not None
        with agent.stdout:
            assert agent.stdout.readline() == "ready\n"
            if kind == "mock":
                _, ring = host.backend.monitor_enable(domid)
                host.backend.monitor_unmap_ring(ring)
            agent.kill()
            agent.wait()
        with xen.domain(domid) as dom:
            for begin in (dom.monitor, dom.altp2m):
                with pytest.raises(xa.BusyError, match="was killed") as refused:
                    begin()
                assert f"xenaltp2m rescue {domid}" in refused.value.hint[0]
        finding = problem(examine_xen(xen, domid), "agents")
        assert f"process {agent.pid} was killed" in finding.evidence
        assert finding.cure == f"xenaltp2m rescue {domid}"
        assert rescue(xen, domid).failed == ()
        assert healthy(examine_xen(xen, domid))
    finally:
        host.destroy(domid)


def test_stale_ring_without_a_journal(host: Host, xen: xa.Xen) -> None:
    domid = host.create()
    try:
        _, ring = host.backend.monitor_enable(domid)
        host.backend.monitor_unmap_ring(ring)
        finding = problem(examine_xen(xen, domid), "agents")
        assert "a monitor's ring is enabled" in finding.evidence
        assert f"xenaltp2m rescue {domid}" in finding.cure
        with xen.domain(domid) as dom, pytest.raises(xa.BusyError) as refused:
            dom.monitor()
        assert f"if its agent was killed: xenaltp2m rescue {domid}" in refused.value.hint
    finally:
        host.backend.monitor_disable(domid)
        host.destroy(domid)


# Those of the machine, and of its boot.


def test_no_xen(tmp_path: Path) -> None:
    with pytest.raises(xa.LibraryError) as refused:
        Loader(absent, {}, tmp_path / "sysfs").xenctrl()
    assert "does not run Xen" in refused.value.hint[0]
    assert "mock" in refused.value.hint[0]
    error = xa.errors.from_errno("interface_open", 2)  # with a library, but no device
    assert "boot Xen" in error.hint[0]
    assert "mock" in error.hint[0]
    found = examine(machine=machine(tmp_path, kind=""))
    assert problem(found, "hypervisor").cure.startswith("on Debian: apt-get install xen-system")
    assert found[-1].check == "without-xen"
    assert "--connect mock" in found[-1].evidence


def test_no_privilege(tmp_path: Path) -> None:
    mock = MockBackend(privileged=False)
    domid = mock.add_domain()
    with xa.connect(mock) as xen, pytest.raises(xa.AccessDeniedError) as refused:
        xen.domain(domid)
    assert "run as root in dom0" in refused.value.hint[0]
    found = examine(machine=machine(tmp_path, may=False))
    assert "sudo" in problem(found, "privileges").cure


def test_altp2m_off(tmp_path: Path) -> None:
    mock = MockBackend(altp2m=False)
    domid = mock.add_domain()
    with xa.connect(mock) as xen, xen.domain(domid) as dom:
        with pytest.raises(xa.UnsupportedError) as refused:
            dom.altp2m()
        assert "altp2m=1" in refused.value.hint[0]
        finding = problem(examine_xen(xen, domid), "altp2m-option")
        assert 'GRUB_CMDLINE_XEN="altp2m=1"' in finding.cure


def test_wrong_library_version(tmp_path: Path) -> None:
    mock = MockBackend((4, 20), library=(4, 17))
    domid = mock.add_domain()
    with xa.connect(mock) as xen, xen.domain(domid) as dom:  # its listing is alike
        with pytest.raises(xa.AccessDeniedError) as refused:
            dom.pause()
        assert "XENALTP2M_LIBXENCTRL" in refused.value.hint[0]
    wrong: Machine = machine(tmp_path, running=(4, 20), library="libxenctrl.so.4.17")
    finding = problem(examine(machine=wrong), "library-release")
    assert "libxenctrl is of Xen 4.17, but Xen 4.20 is running" in finding.evidence
    assert "libxenmisc4.20" in finding.cure
    assert "XENALTP2M_LIBXENCTRL=" in finding.cure
