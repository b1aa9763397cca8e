# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turn the C declarations beside this file into ``xenaltp2m/abi/_ffi.py``.

One out-of-line ABI-mode FFI: no C compiler, no Xen headers, nothing opened. The result is
committed, because an editable install does not generate it.

    python cdefs/build.py            write xenaltp2m/abi/_ffi.py
    python cdefs/build.py --check    exit 1 when the committed file differs

setuptools runs this file by path (``cffi_modules=["cdefs/build.py:ffibuilder"]``), so it imports
nothing of ours and finds its neighbours by ``__file__``.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, cast

from cffi import FFI

Version: TypeAlias = tuple[int, int]

HERE: Final = Path(__file__).resolve().parent
MODULE: Final = "xenaltp2m.abi._ffi"
TARGET: Final = HERE.parent.joinpath(*MODULE.split(".")).with_suffix(".py")

#: Declarations in order of use, and the library whose functions each file declares.
FILES: Final[dict[str, str]] = {
    "types.h": "",
    "libc.h": "libc",
    "toollog.h": "libxentoollog",
    "xenctrl.h": "libxenctrl",
    "altp2m.h": "libxenctrl",
    "monitor.h": "libxenctrl",
    "vm_event.h": "",
    "evtchn.h": "libxenevtchn",
    "foreignmemory.h": "libxenforeignmemory",
    "xencall.h": "libxencall",
    "xenstore.h": "libxenstore",
    "libxl.h": "libxenlight",
}

#: The oldest release bound; what carries no ``/* since 4.NN */`` mark has been there since.
OLDEST: Final[Version] = (4, 14)

#: Functions whose prototype changed under the same name: the release of the one declared, and the
#: function type that holds before it.
EARLIER: Final[dict[str, tuple[Version, str]]] = {
    "xc_shadow_control": ((4, 16), "xc_shadow_control_4_14_t"),
}

_HEADER: Final = """\
# SPDX-License-Identifier: LGPL-2.1-or-later AND MIT
# Written by cdefs/build.py from cdefs/*.h: edit those, then run `python cdefs/build.py`.
# ruff: noqa
# mypy: ignore-errors
"""

_SINCE: Final = r"/\* since (\d+)\.(\d+) \*/"
#: A mark on a line of its own belongs to the function declared next ...
_FUNCTION_MARK: Final = re.compile(rf"^{_SINCE}\n[^;(]*?\b(\w+)\(", re.MULTILINE)
#: ... one behind code to the constant, structure or member that the line declares.
_OTHER_MARK: Final = re.compile(rf"^.*?(\w+)\s*(?:=[^,]*,?|;|\{{)\s*{_SINCE}$", re.MULTILINE)


class Function(NamedTuple):
    """A bound C function: the library that exports it and the release it came with."""

    library: str
    since: Version


def parse(directory: Path = HERE) -> FFI:
    """Parse the declarations in ``directory``; errors name the file and the line."""
    ffi = FFI()
    ffi.cdef("".join(_marked(directory, name) for name in FILES))
    return ffi


def prototypes(ffi: FFI) -> dict[str, Any]:
    """Return the function types that an FFI has parsed, as cffi's model has them."""
    # cffi keeps what it parsed to itself; there is no public way to ask for it.
    declarations = cast("Any", ffi)._parser._declarations
    return {
        key.removeprefix("function "): model
        for key, (model, _) in declarations.items()
        if key.startswith("function ")
    }


def constants(ffi: FFI) -> dict[str, int]:
    """Return the constants that an FFI has parsed."""
    return dict(cast("Any", ffi)._parser._int_constants)


def functions(directory: Path = HERE) -> dict[str, Function]:
    """Return every bound function, in order of declaration."""
    marks = since_marks(directory)
    ffi = FFI()
    found: dict[str, Function] = {}
    for name, library in FILES.items():
        ffi.cdef(_marked(directory, name))
        for symbol in prototypes(ffi):
            if symbol not in found:
                found[symbol] = Function(library, marks.get(symbol, OLDEST))
    return found


def since_marks(directory: Path = HERE) -> dict[str, Version]:
    """Return the functions newer than 4.14, as the declarations mark them."""
    return {
        name: (int(major), int(minor))
        for text in _texts(directory)
        for major, minor, name in _FUNCTION_MARK.findall(text)
    }


def other_marks(directory: Path = HERE) -> dict[str, Version]:
    """Return the constants, structures and members newer than 4.14, as marked."""
    return {
        name: (int(major), int(minor))
        for text in _texts(directory)
        for name, major, minor in _OTHER_MARK.findall(text)
    }


def generate(directory: Path = HERE) -> str:
    """Return the text of the generated module; the same for the same declarations."""
    ffi = parse(directory)
    ffi.set_source(MODULE, None)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "_ffi.py")
        with contextlib.redirect_stdout(io.StringIO()):  # cffi announces the file's name
            ffi.emit_python_code(str(path))
        return _HEADER + path.read_text(encoding="utf-8")


def difference(committed: str, generated: str) -> str:
    """Return a short account of how two generated modules differ; empty when they do not."""
    changes = [
        _clipped(line, 160)
        for line in difflib.ndiff(_entries(committed), _entries(generated))
        if line.startswith(("-", "+"))
    ]
    rest = [f"... and {len(changes) - 40} more"] if len(changes) > 40 else []
    return "\n".join(changes[:40] + rest)


def main(arguments: list[str] | None = None) -> int:
    """Write the generated module, or with ``--check`` compare it."""
    parser = argparse.ArgumentParser(description="Generate xenaltp2m/abi/_ffi.py from cdefs/.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    generated = generate()
    if not options.check:
        TARGET.write_text(generated, encoding="utf-8")
        print(f"{TARGET.name}: {len(functions())} functions")
        return 0
    committed = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
    if committed == generated:
        return 0
    print(difference(committed, generated))
    print(f"{TARGET.name} is not what cdefs/ says: run `python cdefs/build.py`")
    return 1


def _texts(directory: Path) -> list[str]:
    return [(directory / name).read_text(encoding="utf-8") for name in FILES]


def _marked(directory: Path, name: str) -> str:
    # The line marker is what lets cffi's parser report "altp2m.h:12" instead of a line of the sum.
    return f'# 1 "{name}"\n{(directory / name).read_text(encoding="utf-8")}'


def _entries(module: str) -> list[str]:
    """Break a generated module's few long lines into entries, less their indices of types.

    One new type shifts the indices of everything behind it; the names and values tell more.
    """
    broken = re.sub(r",(?=\(?\(?b')", ",\n", module)
    return [re.sub(r"^([^']*b')(?:\\x[0-9A-F]{2}){4}", r"\1", line) for line in broken.splitlines()]


def _clipped(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 3]}..."


ffibuilder: Final = parse()
ffibuilder.set_source(MODULE, None)

if __name__ == "__main__":
    sys.exit(main())
