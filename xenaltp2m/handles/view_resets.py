# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports of views that Xen has reset, and the callbacks that receive them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xenaltp2m.errors import XenError
from xenaltp2m.handles.view import Mismatch, View

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ViewReset:
    """A report of a view that no longer was as it was set.

    Attributes:
        view: The view.
        mismatches: The gfns that were checked and found to differ; empty if altp2m had been
            switched off, and all of the view was gone.
        failure: Why part of the view could not be restored; the rest was. None if everything was
            restored, or nothing was to be.
        reapplied: Whether the view is fully restored.
    """

    view: View
    mismatches: tuple[Mismatch, ...]
    reapplied: bool
    failure: XenError | None = None

    def log(self) -> None:
        """Log what was found, and whether the view was restored."""
        what = (
            f"{len(self.mismatches)} gfns differ" if self.mismatches else "altp2m was switched off"
        )
        if self.reapplied:
            _LOG.warning("%r was reset, and is restored: %s", self.view, what)
        elif self.failure is not None:
            _LOG.error(
                "%r was reset, and only partly restored: %s", self.view, self.failure.message
            )
        else:
            _LOG.warning("%r was reset: %s", self.view, what)


class ResetListeners:
    """The callbacks for views that were reset."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[ViewReset], object]] = []

    def add(self, callback: Callable[[ViewReset], object]) -> None:
        """Add a callback."""
        self._callbacks.append(callback)

    def remove(self, callback: Callable[[ViewReset], object]) -> None:
        """Remove a callback; calling it again is harmless."""
        self._callbacks = [one for one in self._callbacks if one != callback]

    def report(self, found: Iterable[ViewReset]) -> None:
        """Call every callback, even if one raises; the first exception is raised afterwards."""
        failures: list[BaseException] = []
        for reset in found:
            for call in self._callbacks:
                try:
                    call(reset)
                except BaseException as error:  # noqa: BLE001 - raised below
                    failures.append(error)
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"another callback failed, too: {other!r}")
            raise failures[0]
