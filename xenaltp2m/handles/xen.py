# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handle of a host: connect to it, list and open its domains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from xenaltp2m.abi.releases import Release
from xenaltp2m.backend import open_backend
from xenaltp2m.backend.protocol import Backend
from xenaltp2m.errors import (
    DomainNotFoundError,
    InvalidArgumentError,
    RecordingError,
    XenError,
)
from xenaltp2m.handles.base import Handle, UndoList
from xenaltp2m.handles.context import DomainContext, SharedDomain, domains_of
from xenaltp2m.handles.domain import Domain
from xenaltp2m.handles.journal import DIRECTORY
from xenaltp2m.types import DomainInfo
from xenaltp2m.values.arguments import check_kind

_LIST = "it was not created, or has ended: xenaltp2m list shows the domains"


def connect(
    backend: str | Backend = "libxc",
    *,
    journal: str | os.PathLike[str] | None = "",
    record: str | os.PathLike[str] | None = None,
) -> Xen:
    """Open a connection to a hypervisor.

    Args:
        backend: ``"libxc"`` for the Xen that this process runs on, as root in dom0; ``"mock"`` for
            a modelled host with one domain called ``guest``; ``"replay:FILE"`` for a recorded
            session; or a backend object, such as a
            :class:`xenaltp2m.backend.mock.MockBackend` with your own domains. Closing the
            connection closes the backend, too.
        journal: The directory for journals, with which :func:`xenaltp2m.tools.rescue.rescue`
            recovers a domain whose agent was killed; by default
            :data:`xenaltp2m.handles.journal.DIRECTORY` on Xen and none on a mock. None disables
            journals.
        record: A new file to record the session in, so that it can be replayed. Only this user may
            read it, because it contains guest memory that was read.

    Raises:
        RecordingError: The file of ``record`` exists, or the file to replay is not a recording.
        LibraryError: No usable libxenctrl was found.
        XenError: This is not a Xen control domain.
    """
    for name, value in ("journal", journal), ("record", record):
        check_kind(name, value, str | os.PathLike | None, "a path, or None")
    opened = open_backend(backend) if isinstance(backend, str) else backend
    if not callable(getattr(opened, "altp2m_create_view", None)):
        raise InvalidArgumentError(
            f'a backend is "libxc", "mock", "replay:FILE" or a backend object, not {backend!r:.80}'
        )
    if journal == "":
        journal = DIRECTORY if opened.name == "libxc" else None
    if record is not None:
        from xenaltp2m.backend.session import recording

        try:
            opened = recording.record(opened, record)
        except RecordingError:
            opened.close()
            raise
    return Xen(opened, None if journal is None else Path(journal))


class Xen(Handle):
    """A host. Made by :func:`connect`. Closing it closes its domains, then the backend.

    Attributes:
        backend: The backend, for calls that the handles do not offer.
        journals: The directory for journals, or None.
    """

    def __init__(self, backend: Backend, journals: Path | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.journals = journals
        self._shared: dict[UUID, SharedDomain] = {}
        self._domains: list[Domain] = []
        self._undo.push(f"connection to {backend.name}", backend.close)

    def __repr__(self) -> str:
        return f"<Xen {self.release} through {self.backend.name}>"

    @property
    def release(self) -> Release:
        """The hypervisor's release, and how it differs from others."""
        return self.backend.release

    def domains(self) -> Iterator[DomainInfo]:
        """Yield every domain on the host, in order of domid. ``xc_domain_getinfolist``."""
        self.check_open()
        yield from domains_of(self.backend)

    def domain(self, which: int | str | UUID) -> Domain:
        """Open a domain.

        Args:
            which: A domid, a name, or a uuid; a string of digits is a domid, as for xl.

        Raises:
            DomainNotFoundError: There is no such domain.
            InvalidArgumentError: Several domains have this name.
        """
        self.check_open()
        info = self.find(which)
        shared = self._shared.get(info.uuid)
        if shared is None:
            shared = self._shared[info.uuid] = SharedDomain(self.journals, info)
        domain = Domain(self, DomainContext(self.backend, self.journals, info, shared))
        self._domains = [known for known in self._domains if not known.closed]
        self._domains.append(domain)
        return domain

    def find(self, which: int | str | UUID) -> DomainInfo:
        """Return the hypervisor's information about a domain, without opening it.

        Args:
            which: As for :meth:`domain`, which raises the same errors.
        """
        self.check_open()
        if isinstance(which, str):
            which = _parse(which)
        if isinstance(which, UUID):
            for info in self.domains():
                if info.uuid == which:
                    return info
            raise DomainNotFoundError(f"no domain has the uuid {which}", hint=(_LIST,))
        if isinstance(which, str):
            domid = self.backend.name_to_domid(which)
            if domid is None:
                raise DomainNotFoundError(f"no domain is called {which!r}", hint=(_LIST,))
        elif isinstance(which, int) and not isinstance(which, bool):
            domid = which
        else:
            raise InvalidArgumentError(f"a domain is a domid, a name or a uuid, not {which!r}")
        for info in self.backend.domain_getinfolist(domid, 1):
            if info.domid == domid:
                return info
        raise DomainNotFoundError(f"there is no domain {domid}", domid=domid, hint=(_LIST,))

    def abandon(self) -> None:
        """Close without undoing anything; the journals stay, for a later rescue."""
        for shared in self._shared.values():
            shared.journal.close()
        super().abandon()

    def _take_back(self) -> None:
        """Close every domain of this connection, then the backend, which they need."""
        undo = UndoList()
        for domain in self._domains:
            undo.push("", domain.close)
            if domain.open_altp2m is not None:  # views first: they may use another handle's pages
                with suppress(XenError):
                    domain.open_altp2m.close()  # its domain tries again, and reports a failure
        undo.unwind(f"closing {self!r}")
        super()._take_back()


def _parse(text: str) -> int | str | UUID:
    try:
        if text.isdecimal():
            return int(text)
    except ValueError as error:
        raise InvalidArgumentError(f"a domid does not have {len(text)} digits") from error
    try:
        return UUID(text)
    except ValueError:
        return text
