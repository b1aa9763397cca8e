# SPDX-License-Identifier: LGPL-2.1-or-later
"""On a Xen that was booted without ``altp2m=1``."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.tools.doctor import examine


@pytest.fixture
def dom() -> Iterator[xa.Domain]:
    subprocess.run(["xl", "create", "-p", "-q", "-e", "/lab/external-1.cfg"], check=True)
    with xa.connect("libxc") as xen, xen.domain("external-1") as dom:
        yield dom
    subprocess.run(["xl", "destroy", "external-1"], check=True)


def test_the_first_cause_named_is_the_boot_option(dom: xa.Domain) -> None:
    with pytest.raises(xa.UnsupportedError) as refused:
        dom.altp2m()
    assert "altp2m=1" in refused.value.hint[0]
    raw = dom.xen.backend
    for domid in (int(dom.domid), 0x7FE0):  # Xen says so before it looks at the domain
        with pytest.raises(xa.UnsupportedError, match="EOPNOTSUPP"):
            raw.altp2m_get_domain_state(domid)
        with pytest.raises(xa.UnsupportedError, match="EOPNOTSUPP"):
            raw.altp2m_create_view(domid, 7)


def test_the_rest_works(dom: xa.Domain) -> None:
    assert dom.info().paused
    dom.memory.write(0x5000, b"still here")
    assert dom.memory.read(0x5000, 10) == b"still here"


def test_doctor_says_so(dom: xa.Domain) -> None:
    found = examine(int(dom.domid))
    [finding] = (one for one in found if one.severity is Severity.PROBLEM)
    assert finding.check == "altp2m-option"
    assert 'GRUB_CMDLINE_XEN="altp2m=1"' in finding.cure
