# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hosts the contract holds on: the mock at every release, and Xen itself where it runs.

With ``XENALTP2M_LIVE=1`` (set in the lab's dom0) the same tests run on the hypervisor underneath,
and on nothing else: a missing hypervisor is then a failure, not a skip.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend import open_backend
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.errors import XenError

from .hosts import Host, MockHost, XenHost

LIVE = os.environ.get("XENALTP2M_LIVE") == "1"
HOSTS = ["xen"] if LIVE else [f"mock-{major}.{minor}" for major, minor in SUPPORTED]


@pytest.fixture(scope="session", params=HOSTS)
def session_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host that lives through the run."""
    kind, _, release = request.param.partition("-")
    if kind == "xen":
        host: Host = XenHost(open_backend("libxc"))
    else:
        major, minor = map(int, release.split("."))
        host = MockHost(MockBackend((major, minor)))
    yield host
    host.close()


@pytest.fixture
def host(session_host: Host) -> Iterator[Host]:
    """The host, with altp2m off in every shared domain before and after."""
    session_host.reset()
    yield session_host
    session_host.reset()


@pytest.fixture
def own_domain(host: Host) -> Iterator[int]:
    """A domain no other test has touched."""
    domid = host.create()
    yield domid
    host.destroy(domid)


@pytest.fixture
def answer() -> Callable[..., Any]:
    """Makes a backend call; gives its result, or its errno's name where it is refused."""

    def make(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except XenError as error:
            if error.errno is None:
                raise
            name = errno.errorcode[error.errno]
            return "EOPNOTSUPP" if name == "ENOTSUP" else name

    return make
