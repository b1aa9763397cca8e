# SPDX-License-Identifier: LGPL-2.1-or-later
"""``doctor`` in dom0: nothing is wrong with the lab, and what is wrong with a guest is told."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable

import xenaltp2m as xa
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.tools.doctor import examine

from .conftest import Guest
from .machine import PATIENCE, EventsGuest, Process, storm, wait_until


def of(check: str, which: int) -> list[tuple[Severity, str]]:
    return [(one.severity, one.evidence) for one in examine(which) if one.check == check]


def test_the_lab_is_as_it_should_be(guest: Guest) -> None:
    found = {one.check: one for one in examine(guest.domid)}
    sound = {
        "hypervisor", "privileges", "libraries", "library-release", "connection", "xenstore",
        "altp2m-option", "domain", "type", "mode", "views", "agents", "p2m-pool", "symbols",
    }  # fmt: skip
    assert {check: found[check].severity for check in sound} == dict.fromkeys(sound, Severity.OK)
    assert found["type"].evidence.endswith("PVH")
    assert found["vcpus"].cure == f"xl unpause {guest.domid}"  # as the fixture leaves it
    assert not any(one.severity is Severity.PROBLEM for one in found.values())


def test_the_command(guest: Guest) -> None:
    command = ["xenaltp2m", "doctor", "live", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    document = json.loads(done.stdout)
    assert document["healthy"]
    assert {one["check"] for one in document["findings"]} >= {"cpu", "agents", "hazards"}
    missing = subprocess.run(
        ["xenaltp2m", "doctor", "nobody", "--quiet"], check=False, capture_output=True, text=True
    )
    assert missing.returncode == 1
    assert "no domain is called 'nobody'" in missing.stdout


def test_a_killed_agent_and_the_vcpu_that_waits_for_it(mortal: EventsGuest) -> None:
    """Its vCPU was stopped by an event that nobody answers."""

    def listen(dom: xa.Domain, say: Callable[[], None]) -> None:
        with dom.altp2m() as altp2m, dom.monitor(xa.MemAccess) as monitor:
            view = altp2m.create_view()
            view.set_access(mortal.gfn("target"), xa.Access.R)
            altp2m.switch_to_view(view)
            for _ in monitor.events(PATIENCE):
                say()
                time.sleep(PATIENCE)  # and is killed meanwhile

    with storm(mortal):
        agent = Process(mortal.name, listen)
        assert agent.ready
        agent.wait(signal.SIGKILL)
        [(severity, evidence)] = of("agents", mortal.domid)
        assert severity is Severity.PROBLEM
        assert f"process {agent.pid} was killed" in evidence
        wait_until(lambda: of("vcpus", mortal.domid)[0][0] is Severity.WARNING)
        [(_, evidence)] = of("vcpus", mortal.domid)
        assert "vCPUs [0]" in evidence
        subprocess.run(["xenaltp2m", "rescue", mortal.name], check=True, capture_output=True)
        assert of("agents", mortal.domid)[0][0] is Severity.OK
        assert of("vcpus", mortal.domid)[0][0] is Severity.OK
