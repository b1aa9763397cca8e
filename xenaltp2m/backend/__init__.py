# SPDX-License-Identifier: LGPL-2.1-or-later
"""What speaks to a hypervisor: the real one, a model of it, or a recorded session."""

from __future__ import annotations

from xenaltp2m.backend.protocol import Backend, PortCalls
from xenaltp2m.errors import InvalidArgumentError

__all__ = ["REPLAY", "Backend", "PortCalls", "open_backend"]

REPLAY = "replay:"
"""What the name of a backend begins with that replays a file."""


def open_backend(name: str) -> Backend:
    """Open a backend by name: ``"libxc"``, or ``"mock"`` with one domain called ``guest``.

    ``"replay:FILE"`` is a recorded session.

    Raises:
        InvalidArgumentError: There is no such backend.
        LibraryError: No usable libxenctrl was found.
        RecordingError: The file is not a recording.
    """
    # Imported here, so that naming the Protocol loads neither the FFI nor the model.
    if name == "libxc":
        from xenaltp2m.backend.libxc import LibxcBackend

        return LibxcBackend()
    if name == "mock":
        from xenaltp2m.backend.mock import MockBackend

        mock = MockBackend()
        mock.add_domain("guest")
        return mock
    if name.startswith(REPLAY):
        from xenaltp2m.backend.session.replay import replay

        return replay(name.removeprefix(REPLAY))
    raise InvalidArgumentError(
        f'there is no backend {name!r}: use "libxc", "mock" or "{REPLAY}FILE"'
    )
