# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the sdist and the wheel, and uses each as somebody who has nothing but it.

    dist.py [--output DIRECTORY]

Both are built twice, in different directories, and must be the same byte for byte. The wheel alone
is installed in an empty environment; the sdist, with all extras, in another, where its own tests
run against what was installed. The interpreter must have what the group `dev` names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from archives import Archives, CheckError, build, run, say

import xenaltp2m as xa

SUBSET = (
    "tests/examples/test_examples.py",
    "tests/examples/test_guests.py",
    "tests/unit/test_cli.py",
    "tests/unit/test_cli_simulated.py",
)
"""Tests of an sdist, run against what was installed from it: those that read no source."""
WITH_UNICORN = (
    *("--connect", "mock", "trace", "guest", "hit:1", "--count", "1"),
    *("--symbols", "examples/guest/racer.elf"),
)


def environment(target: Path) -> Path:
    """Make an empty environment; return its directory of programs."""
    run(sys.executable, "-m", "venv", target, cwd=target.parent)
    programs = target / "bin"
    run(programs / "pip", "install", "-qq", "pip>=25.1", cwd=target.parent, tries=3)
    return programs


def check_wheel(archives: Archives, scratch: Path) -> None:
    """Install the wheel alone, and use it from a directory that has nothing of ours."""
    say("the wheel, in an empty environment")
    programs = environment(scratch / "wheel")
    run(programs / "pip", "install", "-qq", archives.wheel, cwd=scratch, tries=3)
    run(programs / "pip", "check", cwd=scratch)
    where = installed(programs, scratch)
    if not where.is_relative_to(scratch / "wheel"):
        raise CheckError(f"not the wheel is imported but {where}")
    version = run(programs / "xenaltp2m", "--version", cwd=scratch).strip()
    if version != f"xenaltp2m {xa.__version__}":
        raise CheckError(f"the wheel says it is {version}")
    domains = run(programs / "xenaltp2m", "--connect", "mock", "list", cwd=scratch)
    if "guest" not in domains:
        raise CheckError(f"list shows no guest:\n{domains}")


def check_sdist(archives: Archives, scratch: Path) -> None:
    """Install the sdist with all extras, and run its tests without its package beside them."""
    say("the sdist, in an empty environment, with extras; its tests")
    programs = environment(scratch / "sdist")
    with tarfile.open(archives.sdist) as archive:
        archive.extractall(scratch, filter="data")
    tree = scratch / archives.sdist.name.removesuffix(".tar.gz")
    run(
        *(programs / "pip", "install", "-qq"),
        *(f"{archives.sdist}[cli,sim,decode]", "--group", f"{tree / 'pyproject.toml'}:test"),
        cwd=scratch,
        tries=3,
    )
    shutil.rmtree(tree / "xenaltp2m")
    for module in tree.glob("pytest_*.py"):
        module.unlink()
    where = installed(programs, tree)
    if not where.is_relative_to(scratch / "sdist"):
        raise CheckError(f"not the sdist is imported but {where}")
    run(programs / "xenaltp2m", *WITH_UNICORN, cwd=tree)
    subprocess.run(
        [programs / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUBSET],
        cwd=tree,
        check=True,
    )


def installed(programs: Path, cwd: Path) -> Path:
    """Where an environment imports the package from."""
    code = "import xenaltp2m; print(xenaltp2m.__file__)"
    return Path(run(programs / "python", "-c", code, cwd=cwd).strip())


def main() -> int:
    """Build, check, and leave the archives where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("dist"), help="default: dist")
    output = parser.parse_args().output
    # Neither is the tree's: what is installed has to be found without.
    for name in ("PYTHONPATH", "PYTHONHOME"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="xenaltp2m-dist-") as name:
        scratch = Path(name).resolve()
        try:
            archives = build(scratch)
            check_wheel(archives, scratch)
            check_sdist(archives, scratch)
        except CheckError as error:
            print(f"dist: {error}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError as error:
            print(f"dist: the tests of the sdist: {error}", file=sys.stderr)
            return 1
        output.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.tar.gz", "*.whl"):
            for old in output.glob(pattern):
                old.unlink()
        for path in archives:
            print(shutil.copy(path, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
