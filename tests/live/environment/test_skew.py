# SPDX-License-Identifier: LGPL-2.1-or-later
"""With a libxenctrl of another release than the hypervisor's, named in XENALTP2M_LIBXENCTRL."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator

import pytest

import xenaltp2m as xa
from xenaltp2m.backend import Backend, open_backend
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.tools.doctor import examine


@pytest.fixture
def backend() -> Iterator[Backend]:
    with pytest.warns(xa.LibraryMismatchWarning):
        backend = open_backend("libxc")
    yield backend
    backend.close()


@pytest.fixture
def domid() -> Iterator[int]:
    subprocess.run(["xl", "create", "-p", "-q", "-e", "/lab/external-1.cfg"], check=True)
    found = subprocess.run(
        ["xl", "domid", "external-1"], check=True, capture_output=True, text=True
    )
    yield int(found.stdout)
    subprocess.run(["xl", "destroy", "external-1"], check=True)


def test_altp2m_calls_work(backend: Backend, domid: int) -> None:
    backend.altp2m_set_domain_state(domid, True)
    view = backend.altp2m_create_view(domid, 7)
    backend.altp2m_set_mem_access(domid, view, 0x123, 5)
    assert backend.altp2m_get_mem_access(domid, view, 0x123) == 5
    backend.altp2m_set_domain_state(domid, False)


def test_domctls_are_refused_with_the_cause(backend: Backend, domid: int) -> None:
    for call in (
        lambda: backend.domain_pause(domid),
        lambda: backend.domain_setmaxmem(domid, 64 << 10),
        lambda: backend.monitor_enable(domid),
        lambda: backend.monitor_singlestep(domid, True),
    ):
        with pytest.raises(xa.AccessDeniedError, match="EACCES") as refused:
            call()
        assert "XENALTP2M_LIBXENCTRL" in refused.value.hint[0]


def test_the_handles_say_so(domid: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", xa.LibraryMismatchWarning)
        xen = xa.connect("libxc")
    with xen, pytest.raises(xa.AccessDeniedError, match="EACCES"):
        xen.domain(domid).pause()  # up to 4.16 and from 4.21 not even the listing works


def test_doctor_says_so(backend: Backend, domid: int) -> None:
    [finding] = (one for one in examine() if one.check == "library-release")
    assert finding.severity is Severity.PROBLEM
    assert f"but Xen {backend.release} is running" in finding.evidence
    assert f"libxenmisc{backend.release}" in finding.cure
