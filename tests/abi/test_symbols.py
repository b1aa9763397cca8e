# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every library at hand exports what we bind of it, and nothing that we say came later."""

from __future__ import annotations

import pytest

from cdefs import build

from . import sites
from .sites import Library

BOUND = build.functions()
LIBRARIES = [
    library
    for library in sites.libraries()
    if any(function.library == library.name for function in BOUND.values())
]


def test_there_is_a_library_of_each_kind() -> None:
    absent = {function.library for function in BOUND.values()} - {"libc"}
    absent -= {library.name for library in LIBRARIES}
    if absent:
        sites.missing(f"no {', '.join(sorted(absent))} (Debian: libxen-dev)")


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_exports(library: Library) -> None:
    names = sites.exported(library)
    bound = {
        name: function.since for name, function in BOUND.items() if function.library == library.name
    }
    if library.version is None:  # its soname outlives releases, and we bind its oldest part only
        assert set(bound.values()) == {build.OLDEST}
        assert set(bound) <= names
        return
    due = {name for name, since in bound.items() if since <= library.version}
    assert due - names == set()
    assert (set(bound) - due) & names == set()
