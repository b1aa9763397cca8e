# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the stand-in of ``fakexc.c`` and speaks to it."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from xenaltp2m.abi._ffi import ffi
from xenaltp2m.backend.libxc import LibxcBackend
from xenaltp2m.backend.libxc.loader import ENVIRONMENT, Loader

SOURCE: Final = Path(__file__).with_name("fakexc.c")
COMPILE: Final = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC")
SONAMES: Final = (
    "libxentoollog.so.1",
    "libxencall.so.1",
    "libxenevtchn.so.1",
    "libxenforeignmemory.so.1",
    "libxenstore.so.4",
)


class Call(NamedTuple):
    """One call as the stand-in saw it; arrays that came with it are joined in ``data``."""

    name: str
    handle: str
    args: tuple[int, ...]
    data: bytes


class _RawCall(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 48),
        ("count", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("args", ctypes.c_uint64 * 10),
        ("data", ctypes.c_ubyte * 8192),
    )


def have_compiler() -> bool:
    """Tell whether the stand-in can be built here."""
    return shutil.which("gcc") is not None


def build(directory: Path, *, without: Collection[str] = (), release: str = "4.17") -> Path:
    """Build the stand-in under the names of Xen's libraries.

    Args:
        directory: Where to; made if need be.
        without: Functions that the libraries shall not export.
        release: The Xen release that libxenctrl and libxenlight claim by their names.

    Returns:
        The path of libxenctrl.
    """
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / f"libxenctrl.so.{release}"
    exports = directory / "exports.map"
    hidden = "".join(f" {name};" for name in sorted(without))
    exports.write_text("{ global: *; local:" + (hidden or " none;") + " };\n")
    subprocess.run(
        [
            *COMPILE,
            "-Wno-unused-parameter",
            "-shared",
            f"-Wl,--version-script={exports}",
            "-o",
            str(library),
            str(SOURCE),
        ],
        check=True,
    )
    for name in (*SONAMES, f"libxenlight.so.{release}"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).hardlink_to(library)  # one file, so one set of notes for all
    return library


def connect(library: Path, sysfs: Path | None = None) -> LibxcBackend:
    """Open the libxc backend over a stand-in, on a machine that shows no hypervisor."""
    environ: Mapping[str, str] = {ENVIRONMENT: str(library)}
    return LibxcBackend(Loader(ffi.dlopen, environ, sysfs or library.parent / "no-sysfs"))


def pointer_to(address: int) -> ctypes.c_void_p:
    """Put an address into memory that lives as long as the process, and point to it."""
    cell = ctypes.c_void_p(address)
    _cells.append(cell)
    return ctypes.cast(ctypes.pointer(cell), ctypes.c_void_p)


_cells: list[ctypes.c_void_p] = []


class Fake:
    """The test's side of the stand-in."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self._c = ctypes.CDLL(str(library))
        self._c.fake_call.restype = ctypes.POINTER(_RawCall)
        self._c.fake_answer.argtypes = (
            ctypes.c_char_p,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_char_p,
            ctypes.c_uint32,
        )
        self._c.fake_mapped.argtypes = (ctypes.c_uint64,)
        self._c.fake_mapped.restype = ctypes.c_bool
        self.loop_single = self._c.fake_loop_single
        self.loop_single.argtypes = (
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_uint16,
            ctypes.c_uint64,
            ctypes.c_uint,
        )

    def reset(self) -> None:
        """Forget the calls noted and the answers prepared."""
        self._c.fake_reset()

    def answer(
        self,
        name: str,
        result: int = 0,
        *,
        errno: int = 0,
        outs: tuple[int, int] = (0, 0),
        data: bytes = b"",
    ) -> None:
        """Prepare the next call of a function; several for one function are used in order."""
        mask = (1 << 64) - 1
        first, second = (value & mask for value in outs)
        full = self._c.fake_answer(name.encode(), result, errno, first, second, data, len(data))
        assert not full

    def fail(self, name: str, number: int = errno.EINVAL) -> None:
        """Make the next call of a function fail with an errno."""
        self.answer(name, -1, errno=number)

    def say(self, words: str) -> None:
        """Have the next function that fails write this to its logger."""
        self._c.fake_say(words.encode())

    def quiet(self, on: bool = True) -> None:
        """Answer 0 and note nothing, as fast as C can."""
        self._c.fake_quiet(ctypes.c_bool(on))

    def mapped(self, address: int) -> bool:
        """Tell whether there is memory at an address."""
        return bool(self._c.fake_mapped(address))

    def address_of(self, name: str) -> int:
        """Where a function of the stand-in lies."""
        address = ctypes.cast(getattr(self._c, name), ctypes.c_void_p).value
        assert address is not None
        return address

    @property
    def count(self) -> int:
        """How many calls were made since the last reset, noted in full or not."""
        return int(self._c.fake_count())

    @property
    def calls(self) -> list[Call]:
        """The calls noted since the last reset, oldest first."""
        found = []
        for index in range(self._c.fake_count()):
            raw = self._c.fake_call(index).contents
            name, args = raw.name.decode(), tuple(raw.args[: raw.count])
            opens = name.startswith("xtl_") or name.endswith(("_open", "_alloc"))
            handle, args = ("", args) if opens else (chr(args[0]), args[1:])
            found.append(Call(name, handle, args, bytes(raw.data[: raw.size])))
        return found

    def names(self) -> list[str]:
        """The names of the calls noted."""
        return [call.name for call in self.calls]

    def only_call(self) -> Call:
        """The one call noted since the last reset."""
        (call,) = self.calls
        return call


def race(run: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Call a function with each number, in as many threads that take turns very often."""
    threads = [threading.Thread(target=run, args=[number]) for number in numbers]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
