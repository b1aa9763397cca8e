# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds Debian's source and binary package from the sdist, and checks them.

    deb.py [--output DIRECTORY]

Both are built twice, in different directories, and must be the same byte for byte; the second
build leaves the tests out. lintian must find nothing. The binary package's command must run by
Debian's Python alone. `tests/lab/package.py` installs it in a dom0.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from archives import CheckError, build, run, same, say

REPRODUCED = ("*.dsc", "*.orig.tar.gz", "*.debian.tar.xz", "*.deb")
KEPT = (*REPRODUCED, "*.changes", "*.buildinfo")


def build_packages(sdist: Path, place: Path, profile: str, zone: str) -> Path:
    """Build in a directory of its own; return that, with what came out."""
    place.mkdir(parents=True)
    name, _, version = sdist.name.removesuffix(".tar.gz").rpartition("-")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    # Debian's name for a release candidate, 1.0~rc1, sorts before 1.0.
    tree = place / f"{name}-{version}"
    upstream = run("dpkg-parsechangelog", "-S", "Version", cwd=tree).strip().rpartition("-")[0]
    shutil.copy(sdist, place / f"{name}_{upstream}.orig.tar.gz")
    run(
        *("dpkg-buildpackage", "--no-sign", "--build=full"),
        cwd=tree,
        DEB_BUILD_OPTIONS=profile,
        TZ=zone,
        PATH="/usr/sbin:/usr/bin:/sbin:/bin",
    )
    return place


def check_by_lintian(place: Path) -> None:
    """Fail on any finding of lintian's that debian/ gives no reason for."""
    say("lintian")
    [changes] = place.glob("*.changes")
    # Its status counts what is overridden, too.
    words = ("lintian", "--fail-on=none", "--display-info", "--pedantic", "--allow-root")
    if found := run(*words, changes, cwd=place):
        raise CheckError(f"lintian says:\n{found}")


def check_content(package: Path, scratch: Path) -> None:
    """Run what the package holds, unpacked, with Debian's Python."""
    say("running it with Debian's Python")
    root = scratch / "unpacked"
    run("dpkg-deb", "--extract", package, root, cwd=scratch)
    run(
        *("/usr/bin/python3", root / "usr/bin/xenaltp2m", "--connect", "mock", "list"),
        cwd=scratch,
        PYTHONPATH=str(root / "usr/lib/python3/dist-packages"),
        PYTHONDONTWRITEBYTECODE="1",
    )


def main() -> int:
    """Build, check, and leave the packages where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("dist/debian"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="xenaltp2m-deb-") as name:
        scratch = Path(name).resolve()
        try:
            sdist = build(scratch / "sdist").sdist
            say("building the packages, with tests")
            first = build_packages(sdist, scratch / "first", "", "Etc/UTC")
            say("building the packages again, elsewhere")
            second = build_packages(
                sdist, scratch / "another/place", "nocheck", "Pacific/Kiritimati"
            )
            for pattern in REPRODUCED:
                [one], [other] = first.glob(pattern), second.glob(pattern)
                same(one, other)
            check_by_lintian(first)
            check_content(next(first.glob("*.deb")), scratch)
        except CheckError as error:
            print(f"deb: {error}", file=sys.stderr)
            return 1
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        for pattern in KEPT:
            for path in first.glob(pattern):
                print(shutil.copy(path, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
