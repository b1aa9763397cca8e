# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boots Xen in the emulator, runs a job in its dom0, brings the results back.

    run.py --xen 4.17 --wheel dist/x.whl --put tests:tests -- python3 -m pytest -q tests

What is given with --put lies in /job, where the command runs as root; it may leave files in
$RESULTS. Its output is printed, its exit status is this program's.
"""

from __future__ import annotations

import argparse
import configparser
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from boot import Boot, run
from images import RELEASES, Cpio, Images, LabError, cache_dir, images, locked, require, say

STATUS_OF_LAB = 70  # EX_SOFTWARE: the lab failed, not the job


def python_of(root: Path) -> str:
    """Name of the Python of a dom0 root, such as python3.11."""
    return max(path.name for path in (root / "usr/bin").glob("python3.*"))


def install(archive: Cpio, wheel: Path, site: str) -> None:
    """Puts a pure Python wheel where dom0's Python finds it, with its console scripts."""
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if ".data/" in name or name.endswith("/"):
                continue
            archive.parents(f"{site}/{name}")
            archive.add(f"{site}/{name}", stat.S_IFREG | 0o644, content.read(name))
            if name.endswith(".dist-info/entry_points.txt"):
                parser = configparser.ConfigParser()
                parser.read_string(content.read(name).decode())
                scripts = parser["console_scripts"] if "console_scripts" in parser else {}
                for script, target in scripts.items():
                    module, _, call = target.partition(":")
                    text = (
                        f"#!/usr/bin/python3\nimport sys\nfrom {module} import {call}\n"
                        f"sys.exit({call}())\n"
                    )
                    archive.add(f"usr/bin/{script}", stat.S_IFREG | 0o755, text.encode())


def pack(target: Path, built: Images, wheels: Sequence[Path], puts: Sequence[str], job: str) -> None:
    """Writes the ramdisk: dom0's root followed by the job."""
    site = f"usr/local/lib/{python_of(built.root)}/dist-packages"
    shutil.copyfile(built.initrd, target)
    with open(target, "ab") as out:
        archive = Cpio(out)
        for wheel in wheels:
            install(archive, wheel, site)
        for put in puts:
            source, _, name = put.partition(":")
            path = Path(source)
            if not path.exists():
                raise LabError(f"no such file: {source}")
            archive.tree(path, f"job/{name or path.resolve().name}")
        archive.parents("job/job.sh")
        archive.add("job/job.sh", stat.S_IFREG | 0o755, job.encode())
        archive.parents("lab/job.env")
        archive.add(
            "lab/job.env", stat.S_IFREG | 0o644, f"XEN_RELEASE={built.release.xen}\n".encode()
        )
        archive.close()


def main() -> int:
    """Runs a job from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", choices=[*RELEASES], default="4.17", help="release to boot")
    parser.add_argument("--wheel", action="append", type=Path, default=[], help="wheel to install")
    parser.add_argument("--put", action="append", default=[], metavar="SOURCE[:NAME]",
                        help="file or directory to put into /job")  # fmt: skip
    parser.add_argument("--results", type=Path, help="directory for what the job leaves")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of wall time")
    parser.add_argument("--xen-option", action="append", default=[], metavar="OPTION",
                        help="Xen command line: name=value sets, -name drops a default")  # fmt: skip
    parser.add_argument("--dom0-option", action="append", default=[], metavar="OPTION",
                        help="the same for dom0's kernel")  # fmt: skip
    parser.add_argument("--install", action="store_true", help="apt-get install what is missing")
    parser.add_argument("--verbose", action="store_true", help="show the whole serial console")
    parser.add_argument("command", nargs="+", help="what to run in dom0, in /job")
    arguments = parser.parse_args()
    command = arguments.command
    job = command[0] if len(command) == 1 else shlex.join(command)
    results = arguments.results or Path(tempfile.mkdtemp(prefix="xenaltp2m-lab-"))
    try:
        require(arguments.install)
        built = images(arguments.xen)
        return _run(arguments, built, results, job + "\n")
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return STATUS_OF_LAB


def _run(arguments: argparse.Namespace, built: Images, results: Path, job: str) -> int:
    results.mkdir(parents=True, exist_ok=True)
    with (
        locked("emulator", "the emulator"),
        tempfile.TemporaryDirectory(prefix="run-", dir=cache_dir()) as name,
    ):
        work = Path(name)
        started = time.monotonic()
        pack(work / "ramdisk", built, arguments.wheel, arguments.put, job)
        boot = Boot(
            built, work, work / "ramdisk", arguments.xen_option, arguments.dom0_option
        )
        showing = False

        def on_line(text: str) -> bool:
            nonlocal showing
            clock = time.monotonic() - started
            if text.startswith("LAB: "):
                say(f"{clock:6.1f} s  {text[5:]}")
                showing = "job starts" in text
            elif showing or arguments.verbose:
                print(text if not arguments.verbose else f"{clock:6.1f} {text}", flush=True)
            return text.startswith("LAB: results written")

        try:
            run(boot, arguments.timeout, on_line)
        finally:
            for log in ("serial.log", "bochs.log"):
                if (work / log).exists():
                    shutil.copyfile(work / log, results / log)
        with tarfile.open(work / "disk.img", "r:") as archive:
            archive.extractall(results, filter="data")
        say(f"{time.monotonic() - started:6.1f} s  over, results in {results}")
    return int((results / "status").read_text())


if __name__ == "__main__":
    sys.exit(main())
