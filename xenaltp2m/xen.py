# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host: connect to it, find its domains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from xenaltp2m.abi.releases import Release
from xenaltp2m.arguments import check_kind
from xenaltp2m.backend import Backend, open_backend
from xenaltp2m.backend.arguments import DOMID_LIMIT
from xenaltp2m.domain import Domain
from xenaltp2m.errors import (
    DomainNotFoundError,
    InvalidArgumentError,
    RecordingError,
    XenError,
)
from xenaltp2m.handle import Handle, UndoList
from xenaltp2m.journal import DIRECTORY, Journal
from xenaltp2m.signals import uninterruptible
from xenaltp2m.types import DomainInfo

_DOMAINS_AT_ONCE = 256
_LIST = "it was not created, or has ended: xenaltp2m list shows the domains"


def connect(
    backend: str | Backend = "libxc",
    *,
    journal: str | os.PathLike[str] | None = "",
    record: str | os.PathLike[str] | None = None,
) -> Xen:
    """Open a connection to a hypervisor.

    Args:
        backend: ``"libxc"`` for the Xen this runs on, as root in dom0; ``"mock"`` for a modelled
            host with one domain called ``guest``; ``"replay:FILE"`` for a recorded session; or a
            backend object, such as a :class:`xenaltp2m.backend.mock.MockBackend` with domains of
            your own. Closing the connection closes it, too.
        journal: The directory for journals, with which :func:`xenaltp2m.rescue.rescue` brings a
            domain back whose agent was killed; by default :data:`xenaltp2m.journal.DIRECTORY` on
            Xen and none on a mock. None does without.
        record: A file to write the session to, so that it can be replayed; it must not be there
            yet. Only this user may read it, for it has what was read of the guest's memory.

    Raises:
        RecordingError: There is such a file, or the one to replay is not a recording.
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
        from xenaltp2m.backend import recording

        try:
            opened = recording.record(opened, record)
        except RecordingError:
            opened.close()
            raise
    return Xen(opened, None if journal is None else Path(journal))


class Xen(Handle):
    """A host. Closing it closes its domains, then the backend.

    Attributes:
        backend: The backend underneath, for what the handles do not offer.
        journals: The directory for journals, or None.
    """

    def __init__(self, backend: Backend, journals: Path | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.journals = journals
        self._journals: dict[UUID, Journal] = {}
        self._domains: list[Domain] = []
        self._undo.push(f"connection to {backend.name}", backend.close)

    def __repr__(self) -> str:
        return f"<Xen {self.release} through {self.backend.name}>"

    @property
    def release(self) -> Release:
        """The hypervisor's release, and what is different in it."""
        return self.backend.release

    def domains(self) -> Iterator[DomainInfo]:
        """Yield every domain on the host, by number. ``xc_domain_getinfolist``."""
        self._check_open()
        first = 0
        while first < DOMID_LIMIT:
            found = self.backend.domain_getinfolist(first, _DOMAINS_AT_ONCE)
            yield from found
            if len(found) < _DOMAINS_AT_ONCE:
                return
            first = found[-1].domid + 1

    def domain(self, which: int | str | UUID) -> Domain:
        """Open a domain.

        Args:
            which: A domid, a name, or a uuid; a string of digits is a domid, as for xl.

        Raises:
            DomainNotFoundError: There is none.
            InvalidArgumentError: Several domains have this name.
        """
        self._check_open()
        domain = Domain(self, self._find(which))
        self._domains = [known for known in self._domains if not known.closed]
        self._domains.append(domain)
        return domain

    def _journal_of(self, info: DomainInfo) -> Journal:
        """The journal of a domain, which all its handles share."""
        found = self._journals.get(info.uuid)
        if found is None:
            found = self._journals[info.uuid] = Journal(self.journals, info.domid, info.uuid)
        return found

    @uninterruptible
    def _moved(self, info: DomainInfo) -> None:
        """A domain has another number now, with nothing of it changed yet."""
        self._journals.pop(info.uuid).close()
        for domain in self._domains:
            if domain.uuid == info.uuid:
                domain.domid, domain._journal = info.domid, self._journal_of(info)

    def _find(self, which: int | str | UUID) -> DomainInfo:
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
        """Close without undoing anything; what journals say to be undone stays."""
        for journal in self._journals.values():
            journal.close()
        super().abandon()

    def _take_back(self) -> None:
        """Close every domain opened here; then the backend, which till then they need."""
        undo = UndoList()
        for domain in self._domains:
            undo.push("", domain.close)
            if domain._open_altp2m is not None:  # views first: pages may be another handle's
                with suppress(XenError):
                    domain._open_altp2m.close()  # tried again, and told of, by its domain
        undo.unwind(f"closing {self!r}")
        super()._take_back()


def _parse(text: str) -> int | str | UUID:
    try:
        if text.isdecimal():
            return int(text)
    except ValueError as error:
        raise InvalidArgumentError(f"there is no domid of {len(text)} digits") from error
    try:
        return UUID(text)
    except ValueError:
        return text
