# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an agent has changed in a domain, written down before it does, for who finds it killed.

A journal is a file of its own for each domain and connection, in a directory that only root may
use. Each line is the whole record, with a checksum; the last line that is sound counts. So a
process may be killed at any instruction, also while it writes: what the line before says is still
true then, for the change that was about to be made has not been made.
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
from xenaltp2m.jsontext import most_values
from xenaltp2m.types import GFN_LIMIT

DIRECTORY = Path("/run/xenaltp2m")
"""Where journals are on a dom0: gone after a boot, as is what they tell of."""
MAX_FILE = 1 << 20
"""Bytes of a journal that are read; one that is written stays far below."""
_REWRITTEN_AT = 1 << 16
_MOST_RUNS = 1 << 12
_MOST_VIEWS = 1 << 10
_MOST_VALUES = 5 * _MOST_RUNS + _MOST_VIEWS + 64
_NAME = re.compile(r"([0-9]{1,5})-([0-9]{1,10})-[0-9]{1,20}-[0-9]{1,10}\.journal")
_FORMAT = 1
_SERIAL = itertools.count()
"""A process may have several connections, each with a journal."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages that were added to a domain, and for how many its limit was raised."""

    first: int
    count: int
    raised: int
    limit: int
    """What it was before, in pages."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is changed, or may be: each thing is written down before it is done."""

    pauses: int = 0
    """How often the domain is paused."""
    pages: tuple[Pages, ...] = ()
    monitor: bool = False
    """Whether there is a ring, whose requests somebody has to answer."""
    access_required: bool = False
    altp2m: bool = False
    """Whether it was switched on."""
    used: bool = False
    """Whether views may have been made in an altp2m that was on already."""
    prior_views: tuple[int, ...] = ()
    """The views there were then, and"""
    prior_view: int = 0
    """the one that vCPUs were in."""
    kept: bool = False
    """Whether all of it was left on purpose (:func:`xenaltp2m.carrying.import_views`)."""

    def __bool__(self) -> bool:
        return self != _NOTHING


_NOTHING = Record()
_OF_PAGES = {one.name for one in fields(Pages)}


@dataclass(frozen=True, slots=True)
class Found:
    """A journal that lies there."""

    path: Path
    pid: int
    alive: bool
    """Whether the process that wrote it runs, and has not left on purpose what is in it."""
    record: Record | None
    """None where no line is sound."""
    why_not: str = ""
    """Why it tells nothing of this domain: it is damaged, of another, or from before the boot."""

    @property
    def kept(self) -> bool:
        """Whether what is in it was left on purpose."""
        return self.record is not None and self.record.kept

    def state(self, most: int) -> bytes:
        """Return what was left, as :meth:`Journal.keep` got it; nothing where it is not sound.

        Raises:
            OSError: It cannot be read.
        """
        return _content(beside(self.path), most)

    def remove(self) -> None:
        """Remove it, and what belongs to it."""
        beside(self.path).unlink(missing_ok=True)
        self.path.unlink()


class Journal:
    """The journal of this process for a domain.

    Attributes:
        name: The file's.
        record: What it says.
    """

    def __init__(self, directory: Path | None, domid: int, uuid: UUID) -> None:
        """Begin one; the file is made when there is something to write.

        Args:
            directory: Where it is; None keeps the record to this process.
            domid: The domain's number.
            uuid: The domain's uuid.
        """
        self._directory = directory
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
        """Write down what the block is to change; if it fails, that nothing has changed.

        Raises:
            JournalError: It cannot be written: the block is not entered.
        """
        before = {name: getattr(self.record, name) for name in changes}
        self.write(**changes)
        try:
            yield
        except BaseException:
            self.undone(**before)
            raise

    def undone(self, **changes: Any) -> None:
        """Write down what is undone; where that fails, it is undone all the same."""
        with contextlib.suppress(JournalError):
            self.write(**changes)
        self.record = replace(self.record, **changes)

    def write(self, **changes: Any) -> None:
        """Write down what is about to be changed.

        Raises:
            JournalError: It cannot be written: do not make the change.
        """
        record = replace(self.record, **changes)
        if record == self.record:
            return
        if len(record.pages) > _MOST_RUNS or len(record.prior_views) > _MOST_VIEWS:
            raise JournalError(
                f"a journal can tell of {_MOST_RUNS} ranges of added pages and {_MOST_VIEWS} views",
                hint=("add more pages at a time",),
            )
        try:
            if self._directory is not None:
                self._append(self._directory, _line({**self._head, **asdict(record)}))
        except JournalError:
            raise
        except OSError as error:
            raise JournalError(
                f"{self._directory}/{self.name} cannot be written, so that nothing was changed: "
                f"{error.strerror}",
                errno=error.errno,
                hint=("make room in /run, or connect with journal=None and do without rescue",),
            ) from error
        self.record = record

    def close(self) -> None:
        """End it; the file stays if something in it is still to be undone."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if not self.record:
                assert self._directory is not None
                with contextlib.suppress(OSError):
                    (self._directory / self.name).unlink()

    def keep(self, content: bytes) -> None:
        """Write down that all of it is left on purpose, with what it is.

        Raises:
            JournalError: There is no directory, or nothing can be written there.
        """
        if self._directory is None:
            raise JournalError(
                "without a journal nobody could tell what was left: connect with one"
            )
        path = beside(self._directory / self.name)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(file, "wb") as stream:
                stream.write(content)
            self.write(kept=True)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise JournalError(f"{path}: {error.strerror}", errno=error.errno) from error

    def forget(self) -> None:
        """Write down that nothing is to be undone: the domain is gone."""
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
        """Have a new file with one line, in place of the old one at once."""
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
    """Return where a journal's state of views is, if it has one."""
    return path.with_name(f"{path.name}.state")


def _write_all(file: int, line: bytes) -> None:
    if os.write(file, line) != len(line):
        raise OSError(ENOSPC, os.strerror(ENOSPC))


def _check_safe(directory: Path) -> None:
    """Refuse a directory that somebody else may write to: he could have us undo what he likes."""
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
    """A process, so that it can be told from a later one with its number."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
        started = int(status[status.rindex(b")") + 2 :].split()[19])
    except (OSError, ValueError, IndexError):
        started = 0
    return {"pid": pid, "started": started}


# Reading.


def find(directory: Path, domid: int, uuid: UUID) -> list[Found]:
    """Return the journals that lie there for a domain, by process.

    Raises:
        JournalError: The directory is not one to be trusted.
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
        return Found(path, pid, _process(pid)["started"] != 0, None, "no line of it is sound")
    head, record = document
    why_not = ""
    if head["boot"] != _boot():
        why_not = "it is from before this boot"
    elif head["uuid"] != str(uuid):
        why_not = f"it is of another domain, {head['uuid']}"
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
    """Return the head and the record of a line that is sound."""
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
    """Yield the journals of a domain whose processes were killed, with something in them."""
    for found in () if directory is None else find(directory, domid, uuid):
        if found.record and not found.alive and not found.why_not:
            yield found
