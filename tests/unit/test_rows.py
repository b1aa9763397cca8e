# SPDX-License-Identifier: LGPL-2.1-or-later
"""A test of many rows fails where one of them does, and says which."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests.rows import Rows


def check_each(numbers: Iterable[int], check: Callable[[int], None]) -> None:
    rows = Rows()
    for number in rows.each(numbers):
        with rows.row(f"number {number}"):
            check(number)


def test_each_row_that_fails_is_reported() -> None:
    checked: list[int] = []

    def check(number: int) -> None:
        checked.append(number)
        assert number % 2 == 0

    with pytest.raises(BaseExceptionGroup, match="2 of 4 rows fail") as caught:
        check_each(range(4), check)
    assert checked == [0, 1, 2, 3]
    assert [error.__notes__[-1] for error in caught.value.exceptions] == [
        "in the row number 1",
        "in the row number 3",
    ]


def test_an_exception_that_does_not_come_fails_its_row() -> None:
    def check(number: int) -> None:
        with pytest.raises(KeyError):
            del number

    with pytest.raises(BaseExceptionGroup, match="1 of 1 rows fail"):
        check_each([0], check)


def test_rows_that_are_none_prove_nothing() -> None:
    with pytest.raises(AssertionError, match="no row was checked"):
        check_each([], print)


def test_ctrl_c_ends_it_at_once() -> None:
    def check(number: int) -> None:
        assert number == 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_each([0, 1], check)
