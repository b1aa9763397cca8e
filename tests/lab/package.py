# SPDX-License-Identifier: LGPL-2.1-or-later
"""Installs the Debian package in dom0 of real Xen, by dpkg, and runs an agent that comes with it.

    package.py --xen 4.17 [PACKAGE]

The lab's dom0 is unpacked from Debian's packages and has no dpkg. It is given one, and the list of
the packages it is made of, so that dpkg checks dependencies against what is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from boot import STATUS_OF_LAB
from images import (
    NOT_UNPACKED,
    PYTHON_PACKAGES,
    RELEASES,
    LabError,
    apt,
    command,
    require,
)

from xenaltp2m.tools.symbols import Image

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
GUEST = TREE / "examples" / "guest"
TOOLS = ("dpkg", "libc-bin", "tar", "python3-minimal")
"""What dom0 is given; of the last it has all but what compiles packages when they are installed."""
OF_ONE_SUITE = [name for name, release in RELEASES.items() if release.suite == release.root_suite]
"""The others' dom0 is of packages that do not fit together, as dpkg sees them."""
HITS = 4

JOB = """
set -e
# dom0's shell is busybox, which prefers its own dpkg: paths say which is meant.
(cd tools && find . ! -type d) | while read -r name; do rm -f "/$name"; done # links to busybox
for part in tools/*; do cp -a $part/. /${{part#tools/}}/; done
mkdir -p /var/lib/dpkg/updates /var/lib/dpkg/triggers
cp status /var/lib/dpkg/status
if python3 -c 'import xenaltp2m' 2> /dev/null; then echo 'xenaltp2m was there before'; exit 1; fi
cd /
/usr/bin/dpkg --install /job/package.deb
/usr/bin/dpkg --verify python3-xenaltp2m
dpkg-query --show --showformat='${{Package}} ${{Version}}: ${{Status}}\\n' python3-xenaltp2m
(cd /job && xl create -q -e hello.cfg)
xenaltp2m list
agent=/usr/share/doc/python3-xenaltp2m/examples/watch_page.py
python3 $agent --connect libxc --domain hello --gfn {gfn} --hits {hits} | tee /tmp/hits
test "$(grep -c '^rip 0x' /tmp/hits)" = {hits}
xenaltp2m list --json | tee /tmp/after
xl destroy hello
/usr/bin/dpkg --purge python3-xenaltp2m
if python3 -c 'import xenaltp2m' 2> /dev/null; then echo 'purging has left it'; exit 1; fi
"""


def prepare(xen: str, work: Path) -> None:
    """Write what turns dom0 into one that dpkg knows: programs and the list of packages."""
    release = RELEASES[xen]
    suite = apt(release.root_suite)
    there = suite.closure([*PYTHON_PACKAGES, "busybox-static", *release.xen_packages])
    there = [deb for deb in there if deb.name.partition("_")[0] not in NOT_UNPACKED]
    wanted = suite.closure(TOOLS)
    more = [deb for deb in wanted if deb not in there or deb.name.startswith("python3-minimal_")]
    for deb in more:
        command(["dpkg-deb", "--extract", deb, work / "tools"])
    lists = work / "tools/var/lib/dpkg/info"
    lists.mkdir(parents=True, exist_ok=True)
    with (work / "status").open("w") as out:
        for deb in dict.fromkeys([*there, *more]):
            fields = command(["dpkg-deb", "--field", deb]).strip()
            out.write(f"{fields}\nStatus: install ok installed\n\n")
            name = deb.name.partition("_")[0]
            if "\nMulti-Arch: same\n" in f"{fields}\n":
                name += ":amd64"
            paths = [line.split()[5].removeprefix(".").rstrip("/") for line in contents(deb)]
            (lists / f"{name}.list").write_text("".join(f"{path or '/.'}\n" for path in paths))


def contents(deb: Path) -> list[str]:
    """List what a package holds, a line of `ls -l` each."""
    return command(["dpkg-deb", "--contents", deb]).splitlines()


def main() -> int:
    """Install and run it on one release."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", choices=OF_ONE_SUITE, default="4.17", help="release to boot")
    parser.add_argument("package", nargs="?", type=Path, help="default: what `make deb` left")
    arguments = parser.parse_args()
    packages = [arguments.package] if arguments.package else [*(TREE / "dist/debian").glob("*.deb")]
    if len(packages) != 1:
        parser.error(f"one package is wanted, here are {len(packages)}: run `make deb`")
    try:
        with tempfile.TemporaryDirectory(prefix="xenaltp2m-deb-") as name:
            work = Path(name)
            require()
            prepare(arguments.xen, work)
            gfn = Image.open(GUEST / "hello.elf").address("counter") >> 12
            puts = [f"{packages[0]}:package.deb", work / "tools", work / "status"]
            puts += [GUEST / "hello.elf", GUEST / "hello.cfg"]
            words: list[str | Path] = [sys.executable, HERE / "run.py", "--xen", arguments.xen]
            words += ["--results", work / "results"]
            for put in puts:
                words += ["--put", str(put)]
            job = JOB.format(gfn=gfn, hits=HITS)
            done = subprocess.run([*words, "--", job], check=False)
            return done.returncode
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return STATUS_OF_LAB


if __name__ == "__main__":
    sys.exit(main())
