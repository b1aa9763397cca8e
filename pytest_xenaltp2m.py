# SPDX-License-Identifier: LGPL-2.1-or-later
"""pytest fixtures for agents that use xenaltp2m: a modelled host, its guests, and live domains.

It is a separate module because pytest imports it in every run: it imports nothing of the package
until a test requests a fixture. docs/testing.md describes the fixtures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import os

    from xenaltp2m import Domain, Xen
    from xenaltp2m.testing import Agent, Failing

_NEWEST_DEFAULT = "4.17"
_GUEST = "guest"
_recording = pytest.StashKey[Path]()
_failed = pytest.StashKey[bool]()
_before = pytest.StashKey[dict[str, object]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options."""
    group = parser.getgroup("xenaltp2m", "agents of Xen's altp2m")
    group.addoption(
        "--xen-release",
        action="append",
        metavar="RELEASE",
        help="release of the modelled host, 4.14 to 4.22, or 'all'; may be given again "
        f"(default: the ini option xen_releases, or {_NEWEST_DEFAULT})",
    )
    group.addoption(
        "--xen-domain",
        metavar="NAME",
        help="domain of this Xen host for tests marked xen_live: a name, domid or uuid",
    )
    group.addoption(
        "--xen-recordings",
        metavar="DIR",
        help="directory for the recorded sessions of failed tests (default: beside tmp_path)",
    )
    parser.addini("xen_releases", "releases of the modelled host, as --xen-release", type="args")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker xen_live."""
    config.addinivalue_line(
        "markers",
        "xen_live: run on the domain of --xen-domain; skip if there is none",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests that use the modelled host by release."""
    own = any(
        "xen_release" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "xen_release" in metafunc.fixturenames and not own and not _is_live(metafunc.definition):
        releases = _releases(metafunc.config)
        metafunc.parametrize(
            "xen_release", releases, ids=["{}.{}".format(*one) for one in releases]
        )


def _releases(config: pytest.Config) -> list[tuple[int, int]]:
    from xenaltp2m.abi.releases import SUPPORTED

    wanted = config.getoption("xen_release") or config.getini("xen_releases") or [_NEWEST_DEFAULT]
    known = {f"{major}.{minor}": (major, minor) for major, minor in SUPPORTED}
    names = [name for one in wanted for name in (known if one == "all" else [one])]
    for name in names:
        if name not in known:
            raise pytest.UsageError(
                f"{name!r} is not a release of the modelled host: {', '.join(known)}"
            )
    return [known[name] for name in dict.fromkeys(names)]


def _is_live(node: pytest.Item | Any) -> bool:
    return node.get_closest_marker("xen_live") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a live domain if there is none."""
    if _is_live(item) and not item.config.getoption("xen_domain"):
        pytest.skip("it needs a live domain: run pytest as root in dom0 with --xen-domain NAME")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Add the path of the recorded session to the report of a failed test."""
    report = (yield).get_result()
    path = item.stash.get(_recording, None)
    if path is not None and report.failed:
        item.stash[_failed] = True
        report.sections.append(
            ("Xen session", f'recorded in {path}\nreplay: xenaltp2m.connect("replay:{path}")')
        )


@pytest.fixture
def xen_release() -> tuple[int, int]:
    """The host's release: each selected release of the modelled host, or the live host's."""
    import xenaltp2m

    with xenaltp2m.connect("libxc") as xen:  # a live test: all others are parametrized
        return xen.release.version


@pytest.fixture
def xen_host(xen_release: tuple[int, int]) -> Failing:
    """A modelled host with a domain called ``guest``: 2 vCPUs, 16 MiB, paused.

    It is a :class:`xenaltp2m.testing.Failing`, which is a
    :class:`xenaltp2m.backend.mock.MockBackend` with fault injection.
    """
    return _make_host(xen_release)


def _make_host(release: tuple[int, int]) -> Failing:
    from xenaltp2m.testing import Failing

    host = Failing(release, memory_pages=1 << 16)
    host.add_domain(_GUEST, vcpus=2, memory_kib=16 << 10)
    return host


@pytest.fixture
def xen_session(
    request: pytest.FixtureRequest,
    xen_release: tuple[int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Xen]:
    """A connection to the modelled host or, in a test marked xen_live, to this Xen host.

    The session is recorded; if the test fails, the file is kept and its path is shown. After the
    test, everything opened through the connection is closed; a modelled host must then be as it
    was before.
    """
    import xenaltp2m
    from xenaltp2m.testing import footprint, left_behind

    del xen_release  # requested so that the test is parametrized
    item = request.node
    host = None if _is_live(item) else request.getfixturevalue("xen_host")
    if host is not None:
        item.stash[_before] = footprint(host)
    path = _path_of(item, tmp_path_factory)
    session = xenaltp2m.connect("libxc" if host is None else host, record=path)
    item.stash[_recording] = path
    try:
        yield session
    finally:
        if host is not None:
            host.plan = {}
        session.close()
    if host is not None:
        left = left_behind(item.stash[_before], footprint(host))
        left = [what for what in left if ": pauses " not in what]  # the test itself starts guests
        if left:
            pytest.fail("\n  ".join(["the test has left in place:", *left]), pytrace=False)
    if not item.stash.get(_failed, False):
        path.unlink()


def _path_of(item: pytest.Item, factory: pytest.TempPathFactory) -> Path:
    name = re.sub(r"[^\w.-]+", "-", item.nodeid)[-100:].strip("-") + ".session"
    kept = item.config.getoption("xen_recordings")
    if kept is None:
        return factory.mktemp("xen") / name
    directory = Path(kept)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.unlink(missing_ok=True)
    return path.absolute()


@pytest.fixture
def xen_domain(request: pytest.FixtureRequest, xen_session: Xen) -> Domain:
    """The domain ``guest`` of the modelled host, or the domain of --xen-domain."""
    live = _is_live(request.node)
    return xen_session.domain(request.config.getoption("xen_domain") if live else _GUEST)


@pytest.fixture
def xen_boot(
    request: pytest.FixtureRequest, xen_host: Failing, xen_session: Xen
) -> Callable[..., Domain]:
    """Boot a simulated guest: ``xen_boot(image, vcpus=1, memory_kib=16384, name="simulated")``.

    It executes the image of a PVH guest, and is paused at the first instruction:
    ``xen_host.domain_unpause(int(domain.domid))`` starts it. Needs the extra ``sim``.
    """
    from xenaltp2m.testing import footprint

    def boot(
        image: str | os.PathLike[str] | bytes,
        *,
        vcpus: int = 1,
        memory_kib: int = 16 << 10,
        name: str = "simulated",
    ) -> Domain:
        domid = xen_host.add_domain(name, vcpus=vcpus, memory_kib=memory_kib)
        xen_host.boot(domid, image)
        request.node.stash[_before] |= footprint(xen_host)
        return xen_session.domain(domid)

    return boot


@pytest.fixture
def xen_fail_each_call(xen_release: tuple[int, int]) -> Callable[..., int]:
    """Run an agent once for each failing call: ``xen_fail_each_call(agent, prepare=None)``.

    Each run has a new host like that of ``xen_host``, for which ``prepare(host)`` is called first.
    :func:`xenaltp2m.testing.fail_each_call` describes what must hold afterwards.
    """
    from xenaltp2m.testing import fail_each_call

    def run(
        agent: Agent, prepare: Callable[[Failing], object] | None = None, **options: Any
    ) -> int:
        def make() -> Failing:
            host = _make_host(xen_release)
            if prepare is not None:
                prepare(host)
            return host

        return fail_each_call(agent, make, **options)

    return run
