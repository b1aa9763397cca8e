# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the sdist and the wheel, twice, and checks that they are the same and complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_PACKED = {".gitignore"}
GENERATED = ("PKG-INFO", "setup.cfg", "xenaltp2m.egg-info/")
"""What setuptools adds to an sdist."""
MADE_BY_CFFI = "xenaltp2m/abi/_ffi.py"
TIMES = ("Etc/UTC", "Pacific/Kiritimati")
"""Time zones of the first and the second build; no two dates of files are alike either."""

PAUSES = (5, 20, 60)
"""Seconds before a command is tried again that has failed, as networks do now and then."""
TAIL = 50
"""Lines of what a command that failed has said."""


class CheckError(Exception):
    """An archive is not what it should be."""


class Archives(NamedTuple):
    """What a build leaves."""

    sdist: Path
    wheel: Path


def say(text: str) -> None:
    """Tell what is done now."""
    print(f"package: {text}", file=sys.stderr, flush=True)


def run(*command: str | Path, cwd: Path, tries: int = 1, **environment: str) -> str:
    """Run a command and return its output; fail with it, after so many tries.

    Raises:
        CheckError: It failed each time.
    """
    for pause in (*PAUSES[: tries - 1], 0):
        done = subprocess.run(
            command,
            check=False,
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode == 0:
            return done.stdout
        time.sleep(pause)
    tail = "\n".join(done.stdout.splitlines()[-TAIL:])
    raise CheckError(f"{' '.join(map(str, command))} failed:\n{tail}")


def tracked() -> list[str]:
    """Return the files that git tracks and that are there, which are what is packed.

    Raises:
        CheckError: This is not a git checkout.
    """
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


def epoch() -> str:
    """Seconds of the last commit: the date of all that is packed."""
    return run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()


def copy_tree(target: Path, age: int) -> None:
    """Copy what git tracks, with dates of its own: so many seconds old."""
    for number, name in enumerate(tracked()):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)
        date = time.time() - age - number
        os.utime(path, (date, date))


def build(scratch: Path) -> Archives:
    """Build the archives in two directories, and return the first if both are the same.

    Raises:
        CheckError: They differ, lack a file or have one too many.
    """
    results = []
    for number, zone in enumerate(TIMES):
        say(f"building sdist and wheel, {number + 1} of {len(TIMES)}")
        tree = scratch / f"build-{number}" / ("deeper" * number) / "tree"
        copy_tree(tree, age=number * 86400)
        umask = os.umask(0o022)
        try:
            if number:
                run("chmod", "-R", "go-rwx", ".", cwd=tree)
            run(
                *(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree.parent, tree),
                cwd=scratch,
                SOURCE_DATE_EPOCH=epoch(),
                TZ=zone,
                PYTHONHASHSEED=str(number),
            )
        finally:
            os.umask(umask)
        [sdist], [wheel] = tree.parent.glob("*.tar.gz"), tree.parent.glob("*.whl")
        results.append(Archives(sdist, wheel))
    for first, second in zip(*results, strict=True):
        same(first, second)
    check_sdist(results[0].sdist)
    check_wheel(results[0].wheel)
    return results[0]


def same(first: Path, second: Path) -> None:
    """Fail unless two files have one name and the same bytes.

    Raises:
        CheckError: They have not.
    """
    if first.name != second.name or first.read_bytes() != second.read_bytes():
        raise CheckError(f"two builds differ: {first} and {second}")
    say(f"{first.name} is the same both times")


def check_sdist(sdist: Path) -> None:
    """Compare what an sdist holds with what git tracks."""
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if not member.isdir()]
    wanted = set(tracked()) - NOT_PACKED
    compare(sdist, wanted, (name for name in names if not name.startswith(GENERATED)))


def check_wheel(wheel: Path) -> None:
    """Compare what a wheel holds with what pyproject.toml names; it must fit every machine."""
    if not wheel.name.endswith("-py3-none-any.whl"):
        raise CheckError(f"not for every machine: {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        shared = f"{wheel.name.removesuffix('-py3-none-any.whl')}.data/data/"
        names = [
            name.removeprefix(shared) for name in archive.namelist() if ".dist-info/" not in name
        ]
        made = archive.read(MADE_BY_CFFI).partition(b"import")[2]
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = {f"{name}.py" for name in wanted["py-modules"]}
    packed = {name for name in tracked() if name.startswith("xenaltp2m/") or name in modules}
    for place, files in wanted["data-files"].items():
        packed |= {f"{place}/{Path(name).name}" for name in files}
    compare(wheel, packed, names)
    if made != (ROOT / MADE_BY_CFFI).read_bytes().partition(b"import")[2]:
        raise CheckError(f"{MADE_BY_CFFI} of the wheel is not the committed one")


def compare(archive: Path, wanted: set[str], found: Iterable[str]) -> None:
    """Fail unless an archive holds just what it should."""
    names = set(found)
    missing, more = sorted(wanted - names), sorted(names - wanted)
    if missing or more:
        raise CheckError(f"{archive.name} lacks {missing} and has {more} too many")
