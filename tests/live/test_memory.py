# SPDX-License-Identifier: LGPL-2.1-or-later
"""Foreign mappings as only the real backend has them: a touch after munmap would be a SIGSEGV."""

from __future__ import annotations

import pytest

from xenaltp2m.backend import Backend
from xenaltp2m.errors import BusyError, InvalidArgumentError

from .conftest import Guest


def test_pages_in_use_are_not_unmapped(backend: Backend, guest: Guest) -> None:
    pages = backend.foreignmemory_map(guest.domid, True, [0x205])
    part = pages[0][8:12]
    with pytest.raises(BusyError):
        backend.foreignmemory_unmap(pages)
    part.release()
    backend.foreignmemory_unmap(pages)
    with pytest.raises(InvalidArgumentError):
        backend.foreignmemory_unmap(pages)
