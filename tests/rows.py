# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many rows checked by one test, which reports each row that fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

Row = TypeVar("Row")


class Rows:
    """The rows of a test; a row that fails does not keep the next one from being checked.

    pytest's own ``subtests`` cost as much a row as a test does: a report, sent between processes.
    """

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[BaseException] = []

    @contextmanager
    def row(self, name: object) -> Iterator[None]:
        """Check a row in the body; its name is in the report of a failure."""
        self.count += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - raised by each()
            error.add_note(f"in the row {name}")
            self.failures.append(error)

    def each(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield each row; raise at the end what failed within :meth:`row`, or that there was none.

        Raises:
            BaseExceptionGroup: Rows failed.
        """
        yield from rows
        assert self.count, "no row was checked"
        if self.failures:
            raise BaseExceptionGroup(
                f"{len(self.failures)} of {self.count} rows fail", self.failures
            )
