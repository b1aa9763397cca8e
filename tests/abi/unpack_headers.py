# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lay out releases' headers from Xen's git, so that the proofs can run against all of them.

    XENALTP2M_HEADER_DIRS=$(python tests/abi/unpack_headers.py xen.git /tmp/headers)

Needs git and perl. Runs Xen's own generator of libxl's types, out of the tag it unpacks.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

MINORS: Final = range(14, 23)

#: Directories with headers. Which of them a release has is its own affair: 4.15 moved most into
#: tools/include.
_FLAT: Final = ("tools/include", "tools/libxc/include", "tools/xenstore/include", "tools/libxl")
_PUBLIC: Final = "xen/include/public"
_TYPES: Final = ("_libxl_types.h", "_libxl_types_json.h", "_libxl_types_private.h", "types.c")


def unpack(git: Path, minor: int, target: Path) -> None:
    """Lay out one release's headers in ``target`` as an installation has them."""
    command = ["git", "-C", str(git), "archive", f"RELEASE-4.{minor}.0", "tools", _PUBLIC]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(scratch, filter="data")
        tree = Path(scratch)
        shutil.copytree(tree / _PUBLIC, target / "xen")
        for directory in (*(tree / each for each in _FLAT), *tree.glob("tools/libs/*/include")):
            for header in directory.glob("*.h"):
                shutil.copy(header, target)
        _generate_libxl_types(tree, target)


def _generate_libxl_types(tree: Path, target: Path) -> None:
    directory = next(tree.glob("tools/**/libxl_types.idl")).parent
    subprocess.run(
        [sys.executable, "gentypes.py", "libxl_types.idl", *_TYPES],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    shutil.copy(directory / _TYPES[0], target)
    queues = tree / "tools/include/xen-external"  # up to 4.16 libxl had queues of its own
    if queues.is_dir():
        command = ["perl", "bsd-sys-queue-h-seddery", "bsd-sys-queue.h", "--prefix=libxl"]
        made = subprocess.run(command, cwd=queues, capture_output=True, check=True).stdout
        (target / "_libxl_list.h").write_bytes(made)


def main() -> None:
    """Unpack every supported release that is not there yet, and print where they are."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("git", type=Path, help="a clone of Xen, bare or not")
    parser.add_argument("target", type=Path, help="where the headers go, one directory a release")
    options = parser.parse_args()
    for minor in MINORS:
        target = options.target / f"4.{minor}"
        if not target.is_dir():
            unfinished = target.with_name(f"{target.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            unpack(options.git, minor, unfinished)
            unfinished.rename(target)
    print(":".join(f"4.{minor}={options.target.resolve() / f'4.{minor}'}" for minor in MINORS))


if __name__ == "__main__":
    main()
