# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every C function gets its arguments intact, and its answer comes back right."""

from __future__ import annotations

import ast
import errno
import re
from pathlib import Path

import pytest

import xenaltp2m.backend.libxc
from xenaltp2m import errors
from xenaltp2m.abi._ffi import ffi
from xenaltp2m.backend.libxc import LibxcBackend

from .cases import CASES, ELSEWHERE, EVTCHN, Case
from .fake import Fake

ERRNOS = range(1, 134)
NAME = re.compile(r"\b(?:xc|xencall|xenevtchn|xenforeignmemory|xs|xtl|libxl)_\w+|\bxencall[12]\b")


@pytest.fixture
def ready(backend: LibxcBackend, fake: Fake) -> LibxcBackend:
    backend.evtchn_open()
    fake.reset()
    return backend


def declared(library: Path) -> set[str]:
    return set(filter(NAME.fullmatch, dir(ffi.dlopen(str(library)))))


def test_every_declared_function_is_accounted_for(library: Path) -> None:
    tested = {case.function for case in CASES} | ELSEWHERE
    assert tested == declared(library)


def test_the_lists_follow_the_sources(library: Path) -> None:
    words: set[object] = set()
    for path in Path(xenaltp2m.backend.libxc.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant):
                words.add(node.value)
    assert words & declared(library) == {case.function for case in CASES} | ELSEWHERE


def test_the_other_files_have_the_functions_left_to_them() -> None:
    here = Path(__file__)
    text = "".join(
        path.read_text() for path in here.parent.glob("test_*.py") if path.name != here.name
    )
    assert {name for name in ELSEWHERE if f'"{name}"' not in text} == set()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arguments_arrive_and_results_return(case: Case, ready: LibxcBackend, fake: Fake) -> None:
    fake.answer(case.function, case.result, outs=case.outs)

    assert case.call(ready) == case.value

    call = fake.only_call()
    pointers = call.args[len(case.args) :]
    assert call._replace(args=call.args[: len(case.args)]) == (
        case.function,
        "e" if case in EVTCHN else "c",
        case.args,
        case.data,
    )
    assert bool(pointers) == case.function.endswith("access_multi")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_types_are_exact(case: Case, ready: LibxcBackend, fake: Fake) -> None:
    fake.answer(case.function, case.result, outs=case.outs)
    assert type(case.call(ready)) is type(case.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_errno_becomes_its_error(case: Case, ready: LibxcBackend, fake: Fake) -> None:
    for number in ERRNOS:
        if (case.function, number) == ("xenevtchn_pending", errno.EINTR):
            continue
        if not ready._channels:
            ready.evtchn_open()
        fake.fail(case.function, number)

        with pytest.raises(errors.XenError) as caught:
            case.call(ready)

        error = caught.value
        expected = errors.from_errno(case.operation, number, **dict(case.about))
        assert type(error) is type(expected)
        assert str(error) == str(expected)
        assert error.context() == expected.context()


@pytest.mark.parametrize(
    "case",
    # A channel is gone whether closing it failed or not, as close(2) has it.
    [case for case in CASES if case.function != "xenevtchn_close"],
    ids=str,
)
def test_a_failure_leaves_nothing_behind(case: Case, ready: LibxcBackend, fake: Fake) -> None:
    fake.fail(case.function)
    with pytest.raises(errors.XenError):
        case.call(ready)
    fake.answer(case.function, case.result, outs=case.outs)
    assert case.call(ready) == case.value


def test_results_are_not_read_after_a_failure(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_altp2m_set_supress_ve_multi", -1, errno=errno.EINVAL, outs=(5, -3))
    with pytest.raises(errors.InvalidArgumentError):
        backend.altp2m_set_suppress_ve_multi(1, 1, 0, 9, True)


def test_suppress_ve_multi_without_a_failure(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_altp2m_set_supress_ve_multi", 0)
    assert backend.altp2m_set_suppress_ve_multi(1, 1, 0, 9, True) is None


def test_errno_is_that_of_the_call_and_not_an_older_one(backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xc_domain_pause", errno.EACCES)
    with pytest.raises(errors.AccessDeniedError):
        backend.domain_pause(1)
    fake.answer("xc_domain_unpause", -1, errno=errno.ENOMEM)
    with pytest.raises(errors.OutOfMemoryError):
        backend.domain_unpause(1)


def test_flags_can_be_false(backend: LibxcBackend, fake: Fake) -> None:
    backend.altp2m_set_domain_state(1, False)
    backend.altp2m_set_visibility(1, 2, False)
    backend.altp2m_set_suppress_ve(1, 2, 3, False)
    backend.monitor_singlestep(1, False)
    assert [call.args for call in fake.calls] == [(1, 0), (1, 2, 0), (1, 2, 3, 0), (1, 0)]
