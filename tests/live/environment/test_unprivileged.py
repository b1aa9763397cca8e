# SPDX-License-Identifier: LGPL-2.1-or-later
"""In dom0, but not as root."""

from __future__ import annotations

import os

import pytest

import xenaltp2m as xa
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.tools.doctor import examine


def test_connecting_is_denied() -> None:
    assert os.getuid() != 0
    with pytest.raises(xa.AccessDeniedError, match="run as root in dom0") as refused:
        xa.connect("libxc")
    assert refused.value.errno is not None
    assert isinstance(refused.value, PermissionError)


def test_the_mock_needs_no_privilege() -> None:
    with xa.connect("mock") as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
        assert altp2m.create_view().id == 1


def test_doctor_says_so() -> None:
    [finding] = (one for one in examine() if one.check == "privileges")
    assert finding.severity is Severity.PROBLEM
    assert "privcmd" in finding.evidence
    assert "sudo" in finding.cure
