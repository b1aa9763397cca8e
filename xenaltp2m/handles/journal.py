# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal: a record of every change in a domain, written before the change is made.

Rescue reads it after an agent was killed. Each domain and connection has its own journal file, in a
directory that only root may use. Each line is the whole record, with a checksum; the last valid
line counts. So a process may be killed at any instruction, even while it writes a line: the line
before is still true then, because the change has not been made yet.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from errno import ENOSPC
from pathlib import Path
from typing import Any
from uuid import UUID

from xenaltp2m.errors import JournalError
from xenaltp2m.types import GFN_LIMIT
from xenaltp2m.values.jsontext import most_values

DIRECTORY = Path("/run/xenaltp2m")
"""The directory of journals on a dom0. A reboot removes it, and all domains with it."""
MAX_FILE = 1 << 20
"""The largest journal in bytes that is read; a journal stays far smaller."""
_REWRITTEN_AT = 1 << 16
_MOST_RUNS = 1 << 12
_MOST_VIEWS = 1 << 10
_MOST_VALUES = 5 * _MOST_RUNS + _MOST_VIEWS + 64
_NAME = re.compile(r"([0-9]{1,5})-([0-9]{1,10})-[0-9]{1,20}-[0-9]{1,10}\.journal")
_FORMAT = 1
_SERIAL = itertools.count()
"""Numbers the journals of this process, which may have several connections."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages that were added to a domain, and the change of its memory limit for them."""

    first: int
    count: int
    raised: int
    """The pages by which the limit was raised."""
    limit: int
    """The limit before, in pages."""


@dataclass(frozen=True, slots=True)
class Record:
    """The changes that are in place, or may be: each is recorded before it is made."""

    pauses: int = 0
    """The number of pauses of the domain."""
    pages: tuple[Pages, ...] = ()
    monitor: bool = False
    """Whether a ring is enabled, whose requests must be answered."""
    access_required: bool = False
    altp2m: bool = False
    """Whether altp2m was switched on."""
    used: bool = False
    """Whether views may have been created in an altp2m that was on already."""
    prior_views: tuple[int, ...] = ()
    """The views that existed before."""
    prior_view: int = 0
    """The view that the vCPUs were in before."""
    kept: bool = False
    """Whether all of this was left on purpose (:func:`xenaltp2m.tools.migration.import_views`)."""

    def __bool__(self) -> bool:
        return self != _NOTHING


_NOTHING = Record()
_OF_PAGES = {one.name for one in fields(Pages)}


@dataclass(frozen=True, slots=True)
class Found:
    """A journal found in the directory."""

    path: Path
    pid: int
    alive: bool
    """Whether the process that wrote it runs, and has not left its changes on purpose."""
    record: Record | None
    """The last valid record, or None."""
    why_not: str = ""
    """Why it is not valid for this domain: damaged, of another domain, or from before the boot."""

    @property
    def kept(self) -> bool:
        """Whether its changes were left on purpose."""
        return self.record is not None and self.record.kept

    def state(self, most: int) -> bytes:
        """Return the content that :meth:`Journal.keep` wrote; empty if the file is not valid.

        Raises:
            OSError: It cannot be read.
        """
        return _content(beside(self.path), most)

    def remove(self) -> None:
        """Remove the journal and its state file."""
        beside(self.path).unlink(missing_ok=True)
        self.path.unlink()


class Journal:
    """The journal of this process for a domain.

    Attributes:
        directory: Its directory; None keeps the record in memory only.
        name: The file's name.
        record: The current record.
    """

    def __init__(self, directory: Path | None, domid: int, uuid: UUID) -> None:
        """Begin a journal; its file is created by the first write.

        Args:
            directory: Its directory; None keeps the record in memory only.
            domid: The domain's number.
            uuid: The domain's uuid.
        """
        self.directory = directory
        self._head = {
            "format": _FORMAT,
            "uuid": str(uuid),
            "boot": _boot(),
            **_this_process(),
        }
        process = f"{self._head['pid']}-{self._head['started']}"
        self.name = f"{domid}-{process}-{next(_SERIAL)}.journal"
        self.record = _NOTHING
        self._file = -1
        self._size = 0

    def __repr__(self) -> str:
        return f"<Journal {self.name}>"

    @contextlib.contextmanager
    def about_to(self, **changes: Any) -> Iterator[None]:
        """Record the changes of a ``with`` block before it; take them out if the block raises.

        Raises:
            JournalError: The journal cannot be written: the block is not entered.
        """
        before = {name: getattr(self.record, name) for name in changes}
        self.write(**changes)
        try:
            yield
        except BaseException:
            self.undone(**before)
            raise

    def undone(self, **changes: Any) -> None:
        """Record that changes are undone; a failure to write is ignored."""
        with contextlib.suppress(JournalError):
            self.write(**changes)
        self.record = replace(self.record, **changes)

    def write(self, **changes: Any) -> None:
        """Record changes that are about to be made.

        Raises:
            JournalError: The journal cannot be written: do not make the changes.
        """
        record = replace(self.record, **changes)
        if record == self.record:
            return
        if len(record.pages) > _MOST_RUNS or len(record.prior_views) > _MOST_VIEWS:
            raise JournalError(
                f"a journal can record at most {_MOST_RUNS} ranges of added pages and "
                f"{_MOST_VIEWS} views",
                hint=("add more pages at a time",),
            )
        try:
            if self.directory is not None:
                self._append(self.directory, _line({**self._head, **asdict(record)}))
        except JournalError:
            raise
        except OSError as error:
            raise JournalError(
                f"{self.directory}/{self.name} cannot be written, so nothing was changed: "
                f"{error.strerror}",
                errno=error.errno,
                hint=("free space in /run, or connect with journal=None, without rescue",),
            ) from error
        self.record = record

    def close(self) -> None:
        """Close the journal; its file stays if a change in it is not undone yet."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if not self.record:
                assert self.directory is not None
                with contextlib.suppress(OSError):
                    (self.directory / self.name).unlink()

    def keep(self, content: bytes) -> None:
        """Record that all changes are left on purpose, and write their description.

        Args:
            content: The description.

        Raises:
            JournalError: There is no directory, or it cannot be written to.
        """
        if self.directory is None:
            raise JournalError(
                "importing views requires a journal: connect again with journal=DIRECTORY"
            )
        path = beside(self.directory / self.name)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(file, "wb") as stream:
                stream.write(content)
            self.write(kept=True)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise JournalError(f"{path}: {error.strerror}", errno=error.errno) from error

    def forget(self) -> None:
        """Record that nothing is left to undo, because the domain is gone."""
        self.undone(**{one.name: getattr(_NOTHING, one.name) for one in fields(Record)})

    def _append(self, directory: Path, line: bytes) -> None:
        if self._file < 0 or self._size + len(line) > _REWRITTEN_AT:
            self._rewrite(directory, line)
            return
        try:
            _write_all(self._file, line)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def _rewrite(self, directory: Path, line: bytes) -> None:
        """Replace the file by a new one with a single line, atomically."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_safe(directory)
        new = directory / f"{self.name}.new"
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(new, flags, 0o600)
        try:
            _write_all(file, line)
            new.rename(directory / self.name)
        except BaseException:
            os.close(file)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = file, len(line)


def beside(path: Path) -> Path:
    """Return the path of the state file that may belong to a journal."""
    return path.with_name(f"{path.name}.state")


def _write_all(file: int, line: bytes) -> None:
    if os.write(file, line) != len(line):
        raise OSError(ENOSPC, os.strerror(ENOSPC))


def _check_safe(directory: Path) -> None:
    """Raise if another user may write to the directory, and so make root undo arbitrary things."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise JournalError(
            f"{directory} is not a directory that only this user may write to",
            hint=("remove it, or chown it to this user and chmod it to 700",),
        )


def _line(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _this_process() -> dict[str, Any]:
    return _process(os.getpid())


def _process(pid: int) -> dict[str, Any]:
    """Identify a process by its pid and start time, because pids are reused."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
        started = int(status[status.rindex(b")") + 2 :].split()[19])
    except (OSError, ValueError, IndexError):
        started = 0
    return {"pid": pid, "started": started}


# Reading.


def find(directory: Path, domid: int, uuid: UUID) -> list[Found]:
    """Return the journals of a domain in a directory, sorted by file name.

    Raises:
        JournalError: The directory cannot be trusted.
    """
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError:
        return []
    _check_safe(directory)
    found = []
    for name in names:
        parts = _NAME.fullmatch(name)
        if parts is not None and int(parts[1]) == domid:
            found.append(_read(directory / name, int(parts[2]), uuid))
    return found


def _read(path: Path, pid: int, uuid: UUID) -> Found:
    document = None
    with contextlib.suppress(OSError):
        for line in _lines_from_the_end(_content(path, MAX_FILE)):
            document = _parse(line)
            if document is not None:
                break
    if document is None:
        return Found(path, pid, _process(pid)["started"] != 0, None, "it has no valid line")
    head, record = document
    why_not = ""
    if head["boot"] != _boot():
        why_not = "it is from before this boot"
    elif head["uuid"] != str(uuid):
        why_not = f"it belongs to another domain, {head['uuid']}"
    alive = head["boot"] == _boot() and head["started"] != 0 and _process(pid) == {
        "pid": head["pid"], "started": head["started"]
    }  # fmt: skip
    return Found(path, pid, alive and not record.kept, record, why_not)


def _content(path: Path, most: int) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return b""
        content = stream.read(most + 1)
        return content if len(content) <= most else b""


def _lines_from_the_end(content: bytes) -> Iterator[bytes]:
    end = len(content)
    while end >= 0:
        start = content.rfind(b"\n", 0, end) + 1
        yield content[start:end]
        end = start - 1


def _parse(line: bytes) -> tuple[dict[str, Any], Record] | None:
    """Return the head and the record of a line, or None if the line is not valid."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text) or most_values(text) > _MOST_VALUES:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return None
    head = {name: document.get(name) for name in ("uuid", "boot", "pid", "started")}
    if not (_is_text(head["uuid"], head["boot"]) and _is_count(head["pid"], head["started"])):
        return None
    record = _record(document)
    return None if record is None else (head, record)


def _record(document: dict[str, Any]) -> Record | None:
    values: dict[str, Any] = {one.name: document.get(one.name) for one in fields(Record)}
    flags = [values[name] for name in ("monitor", "access_required", "altp2m", "used", "kept")]
    if not all(isinstance(flag, bool) for flag in flags):
        return None
    if not _is_count(values["pauses"], values["prior_view"]):
        return None
    views, runs = values["prior_views"], values["pages"]
    if not (isinstance(views, list) and len(views) <= _MOST_VIEWS and _is_count(*views)):
        return None
    if not (isinstance(runs, list) and len(runs) <= _MOST_RUNS):
        return None
    pages = []
    for run in runs:
        if not (isinstance(run, dict) and run.keys() == _OF_PAGES):
            return None
        if not _is_count(*run.values()) or run["first"] + run["count"] > GFN_LIMIT:
            return None
        pages.append(Pages(**run))
    values |= {"pages": tuple(pages), "prior_views": tuple(views)}
    return Record(**values)


def _is_text(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_count(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def dead(directory: Path | None, domid: int, uuid: UUID) -> Iterator[Found]:
    """Yield the journals of a domain whose process was killed and left changes in place."""
    for found in () if directory is None else find(directory, domid, uuid):
        if found.record and not found.alive and not found.why_not:
            yield found
