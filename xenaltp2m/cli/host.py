# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host a command works on, and the signals that wait until it is as it was."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from typing import Self

import xenaltp2m as xa
from xenaltp2m.cli.console import Console
from xenaltp2m.symbols import Image
from xenaltp2m.view import Progress

MOCK_DOMAIN = "guest"
_MOCK_VCPUS = 2
_MIB = 1 << 20
_MOCK_MEMORY = 16 * _MIB
_MOCK_MEMORY_LIMIT = 2048 * _MIB
_MOCK_SPARE = 512 * _MIB
"""The mock host's memory besides the guest's, for copies of pages."""


@contextlib.contextmanager
def connect(
    options: argparse.Namespace, console: Console, image: Image | None = None
) -> Iterator[xa.Xen]:
    """Open what ``--connect`` names; on the mock, with a guest that the image is loaded into."""
    if options.connect == "libxc":
        with xa.connect("libxc") as xen:
            yield xen
        return
    from xenaltp2m.backend import mock

    end = max((part.address + part.size for part in image.segments), default=0) if image else 0
    memory = max(_MOCK_MEMORY, -(-end // _MIB) * _MIB)
    if image is not None and memory > _MOCK_MEMORY_LIMIT:
        raise xa.SymbolError(
            f"{image.name} is loaded at up to {end:#x}: the mock's guest has at most "
            f"{_MOCK_MEMORY_LIMIT // _MIB} MiB"
        )
    backend = mock.MockBackend(
        options.xen or (4, 17), memory_pages=(memory + _MOCK_SPARE) // xa.PAGE_SIZE
    )
    domid = backend.add_domain(MOCK_DOMAIN, vcpus=_MOCK_VCPUS, memory_kib=memory // 1024)
    with xa.connect(backend) as xen:
        if image is not None:
            with xen.domain(domid) as domain:
                _load(domain, image, console.progress("loading the image"))
        backend.domain_unpause(domid)
        yield xen


def _load(domain: xa.Domain, image: Image, progress: Progress) -> None:
    total, done = sum(len(part.data) for part in image.segments), 0
    for part in image.segments:
        for at in range(0, len(part.data), _MIB):
            piece = part.data[at : at + _MIB]
            domain.memory.write(part.address + at, piece)
            done += len(piece)
            progress(done, total)


class Signals:
    """Keeps Ctrl-C, SIGTERM and SIGHUP waiting, so that nothing is left half done or half undone.

    Nothing is held back before :meth:`hold_back`; those that came meanwhile end with the context.
    """

    _ALL = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    def __init__(self) -> None:
        self._before: set[int | signal.Signals] | None = None

    def __enter__(self) -> Self:
        return self

    def hold_back(self) -> None:
        """Keep them waiting from now on."""
        # Asked for first: the call that blocks them raises what is on its way already.
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, self._ALL)

    def arrived(self, seconds: float) -> bool:
        """Wait for one to come, so long at most."""
        return signal.sigtimedwait(self._ALL, seconds) is not None

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            while self.arrived(0):
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
