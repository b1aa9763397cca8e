# SPDX-License-Identifier: LGPL-2.1-or-later
"""Modelled hosts for every test, and a check after each that nothing was left open."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from xenaltp2m import Altp2m, Domain, View, Xen, connect
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock import machine as model
from xenaltp2m.handles.base import Handle

HOST_PAGES = 1 << 14
"""Memory of a modelled host for tests, for several guests."""


def pytest_configure() -> None:
    """Have SIGINT as a foreground process has it: a shell's background jobs begin ignoring it.

    And hypothesis must not call an example a failure that took long on a busy machine.
    """
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves a handle open, or something of a mock's that was not given back.

    A handle that was collected unclosed has warned by then, which is an error, too.
    """
    handles: weakref.WeakSet[Handle] = weakref.WeakSet()
    mocks: weakref.WeakSet[MockBackend] = weakref.WeakSet()
    make_handle, make_mock = Handle.__init__, MockBackend.__init__

    def handle(self: Handle) -> None:
        make_handle(self)
        handles.add(self)

    def mock(self: MockBackend, *args: Any, **keywords: Any) -> None:
        make_mock(self, *args, **keywords)
        mocks.add(self)

    monkeypatch.setattr(Handle, "__init__", handle)
    monkeypatch.setattr(MockBackend, "__init__", mock)
    yield
    assert [handle for handle in handles if not handle.closed] == []
    assert [resource for mock in mocks for resource in mock.open_resources()] == []


@pytest.fixture
def foreground() -> Iterator[None]:
    """Have signals as a foreground process has them: under nohup it, and its children, ignore some.

    Only for tests that send them: the suite itself should live on where it was told to.
    """
    dispositions: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, one) for number, one in dispositions.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def xen_version() -> tuple[int, int]:
    """The Xen release of the host; a test that concerns more of them is parametrized with it."""
    return 4, 17


@pytest.fixture
def mock(xen_version: tuple[int, int]) -> MockBackend:
    """A host with a guest of two vCPUs and 6 MiB, called ``guest``, its domid 1."""
    backend = MockBackend(xen_version, memory_pages=HOST_PAGES)
    backend.add_domain("guest", vcpus=2, memory_kib=6 << 10)
    return backend


@pytest.fixture
def guest(mock: MockBackend) -> model.Domain:
    """The model of the guest, to look into and to change behind the handles' back."""
    return mock.domain(1)


@pytest.fixture
def xen(mock: MockBackend) -> Iterator[Xen]:
    """A connection to the host."""
    with connect(mock) as xen:
        yield xen


@pytest.fixture
def dom(xen: Xen) -> Domain:
    """The guest."""
    return xen.domain("guest")


@pytest.fixture
def altp2m(dom: Domain) -> Altp2m:
    """Its altp2m, which was off."""
    return dom.altp2m()


@pytest.fixture
def view(altp2m: Altp2m) -> View:
    """A view with the default access RWX."""
    return altp2m.create_view()
