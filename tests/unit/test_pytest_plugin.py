# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pytest plugin, in runs of pytest of their own."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_xenaltp2m
import xenaltp2m as xa
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.testing import Failing, fail_each_call, footprint, left_behind

ROOT = Path(xa.__file__).parents[1]
HELLO = ROOT / "examples" / "guest" / "hello.elf"


_WITHOUT = [f"-pno:{plugin}" for plugin in ("cacheprovider", "hypothesispytest", "timeout")]


def run(pytester: pytest.Pytester, text: str, *options: str) -> pytest.RunResult:
    """Run tests that are in a text."""
    pytester.makepyfile(text)
    return pytester.runpytest_inprocess(*_WITHOUT, *options)


def test_pytest_finds_it() -> None:
    found = importlib.metadata.entry_points(group="pytest11", name="xenaltp2m")
    assert {entry.value for entry in found} == {pytest_xenaltp2m.__name__}


def test_it_imports_nothing_where_it_is_not_used(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_one():
            assert "pytest_xenaltp2m" in sys.modules
            assert not [name for name in sys.modules if name.partition(".")[0] == "xenaltp2m"]
        """
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", str(pytester.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# The modelled host.

USES = """
    import xenaltp2m as xa

    def test_it(xen_domain, xen_host, xen_session, xen_release):
        assert xen_session.release.version == xen_host.release.version == xen_release
        assert xen_domain.name == "guest"
        with xen_domain.altp2m() as altp2m:
            altp2m.create_view().set_access(5, xa.Access.R)
        print("release", "%d.%d" % xen_release)
"""


@pytest.mark.parametrize(
    ("options", "ini", "releases"),
    [
        ([], "", ["4.17"]),
        (["--xen-release", "4.20", "--xen-release=4.14"], "", ["4.20", "4.14"]),
        ([], "xen_releases = 4.19 4.22", ["4.19", "4.22"]),
        (["--xen-release=4.15"], "xen_releases = 4.19", ["4.15"]),
        (["--xen-release=all"], "", [f"{major}.{minor}" for major, minor in SUPPORTED]),
    ],
)
def test_releases_are_chosen(
    options: list[str], ini: str, releases: list[str], pytester: pytest.Pytester
) -> None:
    pytester.makeini(f"[pytest]\n{ini}")
    result = run(pytester, USES, "-v", "-s", *options)
    result.assert_outcomes(passed=len(releases))
    assert re.findall(r"release (\S+)", result.stdout.str()) == releases
    assert re.findall(r"test_it\[(.*?)\]", result.stdout.str()) == releases


def test_a_release_that_is_none_is_refused(pytester: pytest.Pytester) -> None:
    result = run(pytester, USES, "--xen-release=4.6")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*'4.6' is not a release of the modelled host: 4.14, *"])


def test_a_test_may_choose_its_releases(pytester: pytest.Pytester) -> None:
    text = """
    import pytest

    @pytest.mark.parametrize("xen_release", [(4, 14), (4, 16)])
    def test_it(xen_host, xen_release):
        assert xen_host.release.version == xen_release
    """
    run(pytester, text, "--xen-release=all").assert_outcomes(passed=2)


def test_simulated_guests(pytester: pytest.Pytester) -> None:
    text = f"""
    def test_it(xen_boot, xen_host):
        guest, other = xen_boot({str(HELLO)!r}), xen_boot({str(HELLO)!r}, vcpus=2, name="other")
        assert (guest.name, other.name, len(other.vcpus())) == ("simulated", "other", 2)
        xen_host.domain_unpause(int(guest.domid))
        xen_host.run(int(guest.domid), 5000)
        assert xen_host.console(int(guest.domid)).startswith("hello")
        assert xen_host.console(int(other.domid)) == ""
    """
    run(pytester, text).assert_outcomes(passed=1)


def test_what_is_left_behind_is_told(pytester: pytest.Pytester) -> None:
    text = """
    def test_it(xen_host, xen_domain):
        xen_host.altp2m_set_domain_state(1, True)
        xen_host.domain_setmaxmem(1, 1 << 20)
        xen_host.domain_unpause(1)
        xen_host.add_domain("made by the test")
    """
    result = run(pytester, text)
    result.assert_outcomes(passed=1, errors=1)
    altp2m, limit, *_ = result.stdout.str().partition("has left in place:\n")[2].splitlines()
    assert altp2m == "  domain 1: altp2m is on, and was off"
    assert limit.startswith("  domain 1: limit in pages is 262144, and was 4")
    [path] = re.findall(r"recorded in (.*)", result.stdout.str())
    assert Path(path).exists()


# What fails is recorded.

FAILS = """
    import pytest

    @pytest.mark.parametrize("bad", [False, True])
    def test_it(xen_domain, bad):
        with xen_domain.altp2m() as altp2m:
            altp2m.create_view(label="one")
            assert not bad
"""


@pytest.mark.parametrize("named", [False, True])
def test_the_session_of_a_failure_is_kept(named: bool, pytester: pytest.Pytester) -> None:
    directory = pytester.path / "kept" / "here"
    options = [f"--xen-recordings={directory}"] if named else []
    for _ in range(2):  # the second run puts its files in the first one's place
        result = run(pytester, FAILS, *options)
        result.assert_outcomes(passed=1, failed=1)
        [path] = map(Path, re.findall(r"recorded in (.*)", result.stdout.str()))
        [kept] = [found for found in path.parent.parent.rglob("*.session") if "True" in found.name]
        assert kept == path
        assert not list(path.parent.rglob("*False*.session"))
        assert (path.parent == directory) is named
    assert f'replay: xenaltp2m.connect("replay:{path}")' in result.stdout.str()
    with xa.connect(f"replay:{path}") as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
        altp2m.create_view(label="one")


def test_a_failure_before_there_is_a_session_tells_of_none(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test_it():\n    assert False")
    result.assert_outcomes(failed=1)
    assert "Xen session" not in result.stdout.str()


# Live domains.

LIVE = """
    import pytest

    @pytest.mark.xen_live
    def test_live(xen_domain, xen_session, xen_release):
        assert xen_session.backend.name == "libxc"
        assert (xen_domain.name, xen_release) == ("victim", (4, 19))

    def test_modelled(xen_session):
        assert xen_session.backend.name == "mock"
"""


def test_without_a_domain_a_live_test_is_skipped(pytester: pytest.Pytester) -> None:
    result = run(pytester, LIVE, "-rs", "--strict-markers", "--xen-release=all")
    result.assert_outcomes(passed=len(SUPPORTED), skipped=1)
    result.stdout.fnmatch_lines(["*it needs a live domain: run pytest as root in dom0 with *"])


def test_with_a_domain_it_runs_there(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it can be shown without Xen."""

    def opened(name: str) -> Failing:
        assert name == "libxc"
        host = Failing((4, 19))
        host.add_domain("victim")
        host.name = "libxc"
        return host

    monkeypatch.setattr("xenaltp2m.handles.xen.open_backend", opened)
    monkeypatch.setattr("xenaltp2m.handles.xen.DIRECTORY", pytester.path / "journals")
    run(pytester, LIVE, "--xen-domain=victim").assert_outcomes(passed=2)


def test_where_there_is_no_xen_a_live_test_is_an_error(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XENALTP2M_LIBXENCTRL", "/nowhere/libxenctrl.so")
    result = run(pytester, LIVE, "--xen-domain=victim")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*LibraryError: no usable libxenctrl*"])


# Faults.


def host() -> Failing:
    made = Failing(memory_pages=1 << 12)
    made.add_domain("guest", memory_kib=1 << 10)
    return made


def tidy(xen: xa.Xen) -> None:
    with xen.domain("guest") as dom, dom.altp2m() as altp2m:
        altp2m.create_view().set_access(5, xa.Access.R)


def untidy(xen: xa.Xen) -> None:
    backend = xen.backend
    backend.domain_pause(1)
    backend.altp2m_get_domain_state(1)
    backend.domain_unpause(1)


def test_calls_fail_by_plan() -> None:
    made = host()
    made.start({2: 16})
    made.domain_pause(1)
    with pytest.raises(xa.BusyError):
        made.domain_pause(1)
    made.domain_pause(1)
    assert (made.made, made.failed, made.domain(1).pauses) == (3, ("domain_pause",), 3)
    made.start({})
    made.domain_unpause(1)
    assert (made.made, made.failed) == (1, ())


def test_each_call_of_an_agent_fails() -> None:
    made = host()
    with xa.connect(made) as xen:
        made.start({})
        tidy(xen)
        calls = made.made
    assert fail_each_call(tidy, host, errnos=[16]) >= calls - 2  # those of closing xen's domain
    assert fail_each_call(tidy, host) > 3 * calls


def test_what_an_agent_leaves_is_told_with_the_call() -> None:
    with pytest.raises(AssertionError) as left:
        fail_each_call(untidy, host, errnos=[1])
    assert str(left.value).splitlines() == [
        "call 2, altp2m_get_domain_state, has failed with EPERM:",
        "  domain 1: pauses is 2, and was 1",
    ]


def test_what_an_agent_raises_tells_of_the_call() -> None:
    def clumsy(xen: xa.Xen) -> None:
        try:
            xen.backend.xen_commandline()
        except xa.XenError as error:
            raise ZeroDivisionError from error

    with pytest.raises(ZeroDivisionError) as raised:
        fail_each_call(clumsy, host, errnos=[12])
    [note] = raised.value.__notes__
    assert note == "call 1, xen_commandline, has failed with ENOMEM:"


def test_the_fixture_fails_calls_on_hosts_that_were_prepared(pytester: pytest.Pytester) -> None:
    text = """
    import pytest
    import xenaltp2m as xa

    def prepare(host):
        host.add_domain("second")

    def agent(xen):
        with xen.domain("second") as dom:
            dom.pause()

    def untidy(xen):
        xen.backend.domain_pause(2)

    def test_it(xen_fail_each_call, xen_release):
        assert xen_release == (4, 20)
        assert xen_fail_each_call(agent, prepare, errnos=[1]) > 3
        with pytest.raises(AssertionError, match="no call has failed"):
            xen_fail_each_call(untidy, prepare, errnos=[1])
    """
    run(pytester, text, "--xen-release=4.20").assert_outcomes(passed=1)


def test_footprints_are_compared_where_both_have_a_domain() -> None:
    made = host()
    before = footprint(made)
    assert left_behind(before, before) == []
    made.add_domain("other", memory_kib=1 << 10)
    assert left_behind(before, footprint(made)) == []
    assert left_behind({"a": 1, "b": 2}, {"a": 2, "c": 3}) == ["a is 2, and was 1"]
