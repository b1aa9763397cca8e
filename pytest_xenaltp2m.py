# SPDX-License-Identifier: LGPL-2.1-or-later
"""pytest fixtures for agents that use xenaltp2m: a modelled host, its guests, and live domains.

A module of its own, for pytest imports it in every run: nothing of the package is imported before
a test asks for a fixture. docs/testing.md describes them.
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
    """Add the options."""
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
        help="a domain of the Xen this runs on, for the tests marked xen_live: name, domid or uuid",
    )
    group.addoption(
        "--xen-recordings",
        metavar="DIR",
        help="where the recorded sessions of tests that fail are kept (default: with tmp_path)",
    )
    parser.addini("xen_releases", "releases of the modelled host, as --xen-release", type="args")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        "xen_live: runs on the domain that --xen-domain names, and is skipped without one",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses the modelled host once for each release."""
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
                f"{name!r} is no release of the modelled host: {', '.join(known)}"
            )
    return [known[name] for name in dict.fromkeys(names)]


def _is_live(node: pytest.Item | Any) -> bool:
    return node.get_closest_marker("xen_live") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a live domain where there is none."""
    if _is_live(item) and not item.config.getoption("xen_domain"):
        pytest.skip("it needs a live domain: run pytest as root in dom0 with --xen-domain NAME")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Say where the session of a test that failed is recorded."""
    report = (yield).get_result()
    path = item.stash.get(_recording, None)
    if path is not None and report.failed:
        item.stash[_failed] = True
        report.sections.append(
            ("Xen session", f'recorded in {path}\nagain: xenaltp2m.connect("replay:{path}")')
        )


@pytest.fixture
def xen_release() -> tuple[int, int]:
    """The host's release: a test runs once for each that was chosen, or on what is there."""
    import xenaltp2m

    with xenaltp2m.connect("libxc") as xen:  # a live test: all others are parametrized
        return xen.release.version


@pytest.fixture
def xen_host(xen_release: tuple[int, int]) -> Failing:
    """A modelled host with a domain called ``guest``: 2 vCPUs, 16 MiB, paused.

    A :class:`xenaltp2m.testing.Failing`: a :class:`xenaltp2m.backend.mock.MockBackend`, whose calls
    can be made to fail.
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
    """A connection to the modelled host, or, of a test marked xen_live, to the Xen this runs on.

    The session is recorded; where the test fails, the file is kept and its path is shown. After the
    test everything opened through the connection is closed; a modelled host must then be as it was.
    """
    import xenaltp2m
    from xenaltp2m.testing import footprint, left_behind

    del xen_release  # named for the sake of who is parametrized
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
            pytest.fail("\n  ".join(["the test has left behind:", *left]), pytrace=False)
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
    """The domain ``guest`` of the modelled host, or the one that --xen-domain names."""
    live = _is_live(request.node)
    return xen_session.domain(request.config.getoption("xen_domain") if live else _GUEST)


@pytest.fixture
def xen_boot(
    request: pytest.FixtureRequest, xen_host: Failing, xen_session: Xen
) -> Callable[..., Domain]:
    """Makes simulated guests: ``xen_boot(image, vcpus=1, memory_kib=16384, name="simulated")``.

    They execute a PVH guest's image, and stand before its first instruction:
    ``xen_host.domain_unpause(int(domain.domid))`` starts one. Needs the extra ``sim``.
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
    """Runs an agent with each of its calls failing: ``xen_fail_each_call(agent, prepare=None)``.

    Each time on a host as ``xen_host`` makes it, upon which ``prepare(host)`` is called first. See
    :func:`xenaltp2m.testing.fail_each_call`, which says what must hold afterwards.
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
