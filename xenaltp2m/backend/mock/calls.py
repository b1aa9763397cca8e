# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every operation of the modelled host does: check, log, inject faults, refuse."""

from __future__ import annotations

import functools
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

from xenaltp2m import errors
from xenaltp2m.backend import arguments
from xenaltp2m.backend.mock.machine import HypercallError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_SomeLog = TypeVar("_SomeLog", bound="CallLog")

_LOG_LENGTH = 100_000
_LOGGED_ITEMS = 64
_ABOUT = {
    "domid": "domid",
    "view": "view",
    "vcpu": "vcpu",
    "gfn": "gfn",
    "old_gfn": "gfn",
    "first_gfn": "gfn",
}
"""The parameters that an error reports, with their names there."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that reached the hypervisor, as the log keeps it; ``errno`` 0 is success."""

    op: str
    arguments: tuple[object, ...]
    errno: int


@dataclass(slots=True)
class InjectedFault:
    """A failure to come: of the call that ends the countdown, of any operation where it is None."""

    op: str | None
    countdown: int
    errno: int


class CallLog:
    """The log of calls, and the faults to inject into coming ones."""

    def __init__(self) -> None:
        self.calls: deque[Call] = deque(maxlen=_LOG_LENGTH)
        self._faults: list[InjectedFault] = []
        self._closed = False

    def _check_open(self) -> None:
        """Raise if the backend is closed."""
        if self._closed:
            raise errors.ClosedError("the backend is closed")

    def _inject(self, op: str) -> None:
        """Count a call down, and raise the fault that is due."""
        counting = [fault for fault in self._faults if fault.op in (None, op)]
        for fault in counting:
            fault.countdown -= 1
        due = [fault for fault in counting if not fault.countdown]
        if due:
            self._faults = [fault for fault in self._faults if fault.countdown]
            raise HypercallError(due[0].errno)


def operation(
    method: Callable[Concatenate[_SomeLog, _P], _R],
) -> Callable[Concatenate[_SomeLog, _P], _R]:
    """Make a Protocol method: arguments checked, faults injected, call logged, refusals raised."""
    op = method.__name__
    parameters = arguments.Parameters(method)

    @functools.wraps(method)
    def call(self: _SomeLog, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self._check_open()
        named = parameters.bind(args, kwargs)
        arguments.check(op, named)
        logged = tuple(map(_logged, named.values()))
        try:
            self._inject(op)
            result = method(self, *args, **kwargs)
        except HypercallError as refused:
            self.calls.append(Call(op, logged, refused.errno))
            about = {_ABOUT[key]: named[key] for key in _ABOUT if key in named}
            raise errors.from_errno(op, refused.errno, **about) from None
        self.calls.append(Call(op, logged, 0))
        return result

    return call


def _logged(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview | array):
        if len(value) > _LOGGED_ITEMS:
            return f"<{len(value)} items>"
        return tuple(value)
    return value
