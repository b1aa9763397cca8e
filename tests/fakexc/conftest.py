# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stand-in, built once a session, and a backend over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xenaltp2m.backend.libxc import LibxcBackend

from . import fake as fakexc
from .fake import Fake


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    return fakexc.build(tmp_path_factory.mktemp("fakexc"))


@pytest.fixture
def fake(library: Path) -> Iterator[Fake]:
    fake = Fake(library)
    fake.reset()
    yield fake
    fake.reset()


@pytest.fixture
def backend(library: Path, fake: Fake) -> Iterator[LibxcBackend]:
    backend = fakexc.connect(library)
    fake.reset()
    yield backend
    fake.reset()
    backend.close()
