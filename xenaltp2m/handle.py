# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every handle has: one owner, one end, and a list of what to undo."""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from xenaltp2m.errors import (
    ClosedError,
    InvalidArgumentError,
    LeftoverError,
    ReplayError,
    XenError,
    add_failure,
)
from xenaltp2m.signals import guard, uninterruptible

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_callback(callback: object) -> None:
    """Refuse what cannot be called while a vCPU waits.

    Raises:
        InvalidArgumentError: It is no function, or one that only returns a coroutine.
    """
    if not callable(callback):
        raise InvalidArgumentError(f"a callback is a function, not {callback!r}")
    if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(
        type(callback).__call__
    ):
        raise InvalidArgumentError(
            f"{callback!r} is async: a callback is called while the vCPU waits, and not awaited"
        )


class _Step(NamedTuple):
    """How to take something back."""

    what: str
    undo: Callable[[], object]
    needs_rest: bool = False


class UndoList:
    """Steps that take back what was done, last first.

    A step that fails stays in the list, so that a second try does just what is left; so does one
    that needs it. Signals wait while steps are taken.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def push(self, what: str, undo: Callable[[], None], *, needs_rest: bool = False) -> None:
        """Remember how to take something back.

        Args:
            what: What stays in place if ``undo`` fails, in words; empty where its LeftoverError
                tells.
            undo: Takes it back; raises a XenError where it cannot.
            needs_rest: Whether that is safe only once every later step has been taken.
        """
        self._steps.append(_Step(what, undo, needs_rest))

    def do(self, what: str, act: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
        """Do something and remember how to take it back, with no signal between the two.

        Args:
            what: As for :meth:`push`.
            act: Does it.
            undo: Takes back what ``act`` returned.
        """
        with guard.holding_back():
            done = act()
            self._steps.append(_Step(what, partial(undo, done)))
        return done

    @property
    def left(self) -> list[str]:
        """What stays in place if no step is taken, in words."""
        return [step.what for step in reversed(self._steps) if step.what]

    def drop(self) -> None:
        """Forget the latest step, because it has been taken already."""
        self._steps.pop()

    def adopt(self, other: UndoList) -> None:
        """Take over the steps of another list, which has none after it."""
        self._steps += other._steps
        other.forget()

    def forget(self) -> None:
        """Forget every step: their object is gone."""
        self._steps.clear()

    @uninterruptible
    def unwind(self, doing: str, heir: UndoList | None = None) -> None:
        """Take every step, last first; one that fails stops just those that need it.

        Args:
            doing: What this is part of, for the message.
            heir: Gets the steps that are left, to try again later.

        Raises:
            LeftoverError: Some failed; the first failure is its cause.
        """
        failed: list[_Step] = []
        failures: list[XenError] = []
        left: list[str] = []
        inside: tuple[str, ...]
        differs: ReplayError | None = None
        try:
            while self._steps:
                step, inside = self._steps[-1], ()
                waits = bool(failed) and step.needs_rest
                try:
                    if not waits:
                        step.undo()
                except ReplayError as error:
                    differs = differs or error  # nothing behind the others is left to be undone
                except XenError as error:
                    waits, inside = True, error.left if isinstance(error, LeftoverError) else ()
                    failures.append(error)
                if waits:
                    failed.append(step)
                    left += [*filter(None, [step.what]), *inside]
                self._steps.pop()
        finally:
            self._steps += reversed(failed)
            if heir is not None:
                heir.adopt(self)
        if differs is not None:
            raise differs
        if failures:
            first = failures[0]
            while isinstance(first, LeftoverError) and isinstance(first.__cause__, XenError):
                first = first.__cause__  # what a child could not close, and why
            _LOG.error("%s: %s; still in place: %s", doing, first.message, ", ".join(left))
            raise LeftoverError(
                f"{doing}: not everything could be undone: {first.message}",
                left=left,
                **first.context(),
            ) from first

    def roll_back(self, cause: BaseException, heir: UndoList | None = None) -> None:
        """Take every step because ``cause`` happened half-way; the caller then re-raises it.

        Args:
            cause: What happened.
            heir: Gets the steps that are left, to try again later.

        Raises:
            LeftoverError: Some step failed; its cause is ``cause``.
        """
        try:
            self.unwind(in_words(cause), heir)
        except LeftoverError as failure:
            raise failure from cause


class Handle:
    """Something open that must be closed: a context manager with an idempotent ``close()``.

    A handle that is never closed warns when it is collected; it makes no hypercall then, for the
    garbage collector does not decide when a guest changes.

    Thread-safety: one thread at a time may use a handle and its children.
    """

    def __init__(self) -> None:
        self._closed = False
        self._undo = UndoList()
        self._warn = weakref.finalize(self, _warn_unclosed, type(self).__name__)

    @property
    def closed(self) -> bool:
        """True once closed."""
        return self._closed

    @uninterruptible
    def close(self) -> None:
        """Take back what was done through this handle; again is harmless.

        Signals wait until it is done.

        Raises:
            LeftoverError: Something could not be taken back. The handle stays open and a second
                ``close()`` tries just that again.
            ReplayError: What is replayed took back something else, or went on.
        """
        if self._closed:
            return
        if not self._orphaned():
            try:
                self._take_back()
            except LeftoverError:
                if not self._gone():
                    raise
            except ReplayError:
                self.abandon()
                raise
        self.abandon()

    def abandon(self) -> None:
        """Close without undoing anything: what there was to undo is gone."""
        self._undo.forget()
        self._closed = True
        self._warn.detach()

    def _take_back(self) -> None:
        """Undo what was done; whatever fails is left for a second call."""
        self._undo.unwind(f"closing {self!r}")

    def _orphaned(self) -> bool:
        """Tell whether its domain has vanished: the number may be another domain's by now."""
        return False

    def _gone(self) -> bool:
        """Tell, after a failure, whether there is nothing left to do it to."""
        return self._orphaned()

    def _roll_back(
        self, undo: UndoList, cause: BaseException, heir: UndoList | None = None
    ) -> None:
        """As :meth:`UndoList.roll_back`, but silent where everything has vanished.

        Args:
            undo: What was done before ``cause`` happened.
            cause: Why it cannot be finished.
            heir: Gets the steps that fail, to try again on close.
        """
        try:
            undo.roll_back(cause)
        except LeftoverError:
            if self._gone():
                return
            if heir is not None:
                heir.adopt(undo)
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self!r} is closed")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    @uninterruptible
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except XenError as failure:
            if error is None:
                raise
            # The body's own error matters more; what is left must not be lost either.
            add_failure(error, failure)


def in_words(cause: BaseException) -> str:
    """Say in a line what happened."""
    return cause.message if isinstance(cause, XenError) else repr(cause)


def _warn_unclosed(name: str) -> None:
    warnings.warn(
        f"a {name} was never closed: what it changed in its domain is still in place; "
        "use it in a with statement",
        ResourceWarning,
        stacklevel=2,
    )
