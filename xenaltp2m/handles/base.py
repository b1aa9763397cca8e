# SPDX-License-Identifier: LGPL-2.1-or-later
"""The base class of all handles, and the list of steps that undo what a handle has changed."""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from xenaltp2m.handles.signals import guard, uninterruptible

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_callback(callback: object) -> None:
    """Check that a callback can be called while a vCPU waits.

    Raises:
        InvalidArgumentError: It is not callable, or it only returns a coroutine.
    """
    if not callable(callback):
        raise InvalidArgumentError(f"a callback must be callable, not {callback!r}")
    if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(
        type(callback).__call__
    ):
        raise InvalidArgumentError(
            f"{callback!r} is async: a callback is called while the vCPU waits, and is not awaited"
        )


class _Step(NamedTuple):
    """A step that undoes a change."""

    what: str
    undo: Callable[[], object]
    needs_rest: bool = False


class UndoList:
    """A list of steps that undo changes, last change first.

    A step that fails stays in the list, and so does a step that needs it: a second try runs only
    what is left. Signals are held back while steps run.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def push(self, what: str, undo: Callable[[], None], *, needs_rest: bool = False) -> None:
        """Add a step that undoes a change.

        Args:
            what: What stays in place if ``undo`` fails, in words; empty if the LeftoverError of
                ``undo`` says it.
            undo: Undoes the change; raises a XenError if it cannot.
            needs_rest: Whether the step is safe only after every later step has succeeded.
        """
        self._steps.append(_Step(what, undo, needs_rest))

    def do(self, what: str, act: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
        """Make a change and add the step that undoes it, with no signal between the two.

        Args:
            what: As for :meth:`push`.
            act: Makes the change.
            undo: Undoes it; its argument is the result of ``act``.
        """
        with guard.holding_back():
            done = act()
            self._steps.append(_Step(what, partial(undo, done)))
        return done

    @property
    def left(self) -> list[str]:
        """What stays in place if no step runs, in words."""
        return [step.what for step in reversed(self._steps) if step.what]

    def drop(self) -> None:
        """Remove the latest step, because it has run already."""
        self._steps.pop()

    def adopt(self, other: UndoList) -> None:
        """Move all steps of another list into this one."""
        self._steps += other._steps
        other.forget()

    def forget(self) -> None:
        """Remove every step: what they would undo is gone."""
        self._steps.clear()

    @uninterruptible
    def unwind(self, doing: str, heir: UndoList | None = None) -> None:
        """Run every step, last first; a step that fails blocks only the steps that need it.

        Args:
            doing: The operation that this is part of, for the message.
            heir: Receives the steps that are left, to try again later.

        Raises:
            LeftoverError: Some steps failed; the first failure is its cause.
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
                    differs = differs or error  # a replay has no domain that must be restored
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
                first = first.__cause__  # why a child could not close
            _LOG.error("%s: %s; still in place: %s", doing, first.message, ", ".join(left))
            raise LeftoverError(
                f"{doing}: not everything could be undone: {first.message}",
                left=left,
                **first.context(),
            ) from first

    @contextmanager
    def rolling_back(
        self, heir: UndoList | None = None, *, unless: Callable[[], bool] | None = None
    ) -> Iterator[None]:
        """Run every step if the ``with`` block raises, and raise the block's exception again.

        Args:
            heir: Receives the steps that fail, to try again later.
            unless: Called if a step fails; returns True if nothing is left to undo, because
                what was changed has vanished.

        Raises:
            LeftoverError: Some step failed; its cause is the block's exception.
        """
        try:
            yield
        except BaseException as cause:
            self.roll_back(cause, heir, unless=unless)
            raise

    def roll_back(
        self,
        cause: BaseException,
        heir: UndoList | None = None,
        *,
        unless: Callable[[], bool] | None = None,
    ) -> None:
        """Do as :meth:`rolling_back` after the exception ``cause``; the caller re-raises it."""
        try:
            self.unwind(in_words(cause))
        except LeftoverError as failure:
            if unless is not None and unless():
                return
            if heir is not None:
                heir.adopt(self)
            raise failure from cause


class Handle:
    """An open object that must be closed: a context manager with an idempotent ``close()``.

    A handle that is never closed warns when it is garbage-collected. It makes no hypercall then,
    so that the garbage collector never decides when a guest changes.

    Thread-safety: one thread at a time may use a handle and its children.

    Attributes:
        closed: True once closed.
    """

    def __init__(self) -> None:
        self._undo = UndoList()
        self._reopen()

    def _reopen(self) -> None:
        """Mark it open, for the first time or again."""
        self.closed = False
        self._warn = weakref.finalize(self, _warn_unclosed, type(self).__name__)

    @uninterruptible
    def close(self) -> None:
        """Undo what was done through this handle; calling it again is harmless.

        Signals are held back until it returns.

        Raises:
            LeftoverError: Something could not be undone. The handle stays open, and a second
                ``close()`` tries only that again.
            ReplayError: The recorded session undid something else, or went on.
        """
        if self.closed:
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
        """Close without undoing anything: what there was to undo has vanished."""
        self._undo.forget()
        self.closed = True
        self._warn.detach()

    def _take_back(self) -> None:
        """Undo what was done; a step that fails is left for a second call."""
        self._undo.unwind(f"closing {self!r}")

    def _orphaned(self) -> bool:
        """Check whether its domain has vanished: the domid may belong to another domain now."""
        return False

    def _gone(self) -> bool:
        """Check, after a failure to undo, whether there is nothing left to undo."""
        return self._orphaned()

    def check_open(self) -> None:
        """Raise if it is closed.

        Raises:
            ClosedError: It is closed.
        """
        if self.closed:
            raise ClosedError(f"{self!r} is closed")

    def __enter__(self) -> Self:
        self.check_open()
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
            # The body's error matters more, but the failure to undo must not be lost.
            add_failure(error, failure)


def in_words(cause: BaseException) -> str:
    """Describe an exception in one line."""
    return cause.message if isinstance(cause, XenError) else repr(cause)


def _warn_unclosed(name: str) -> None:
    warnings.warn(
        f"a {name} was never closed: what it changed in its domain is still in place; "
        "use it in a with statement",
        ResourceWarning,
        stacklevel=2,
    )
