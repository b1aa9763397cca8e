# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boots Xen in the emulator, runs a job in its dom0, brings the results back.

    run.py --xen 4.17 --wheel dist/x.whl --put tests:tests -- python3 -m pytest -q tests

What is given with --put lies in /job, where the command runs as root; it may leave files in
$RESULTS. Its output is printed, its exit status is this program's.
"""

from __future__ import annotations

import argparse
import configparser
import io
import os
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from boot import BLOCK, DISK_BYTES, PAYLOAD_AT, STATUS_OF_LAB, Boot, Machine, snapshot
from images import RELEASES, Images, LabError, cache_dir, images, linux_guest, locked, require, say


def python_of(root: Path) -> str:
    """Name of the Python of a dom0 root, such as python3.11."""
    return max(path.name for path in (root / "usr/bin").glob("python3.*"))


def install(archive: tarfile.TarFile, wheel: Path, python: str) -> None:
    """Puts a pure Python wheel where dom0's Python finds it, with its console scripts.

    A directory is taken as a package, for which `python3 -m` becomes a command of its name.
    """
    site = f"usr/local/lib/{python}/dist-packages"
    if wheel.is_dir():
        archive.add(wheel, f"{site}/{wheel.name}", filter=as_root)
        text = f'#!/bin/sh\nexec python3 -m {wheel.name} "$@"\n'
        add(archive, f"usr/bin/{wheel.name}", text.encode(), 0o755)
        return
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if ".data/" in name or name.endswith("/"):
                continue
            add(archive, f"{site}/{name}", content.read(name))
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
                    add(archive, f"usr/bin/{script}", text.encode(), 0o755)


def pack(
    disk: Path,
    built: Images,
    wheels: Sequence[Path],
    puts: Sequence[str],
    job: str,
    linux: Path | None = None,
) -> None:
    """Writes the disk that carries the job into dom0, unpacked there over the root."""
    with open(disk, "wb") as out:
        os.truncate(disk, DISK_BYTES)
        out.seek(PAYLOAD_AT + BLOCK)
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as archive:
            for wheel in wheels:
                install(archive, wheel, python_of(built.root))
            for put in puts:
                source, _, name = put.partition(":")
                path = Path(source)
                if not path.exists():
                    raise LabError(f"no such file: {source}")
                archive.add(path, f"job/{name or path.resolve().name}", filter=as_root)
            for path in sorted(linux.iterdir()) if linux is not None else []:
                archive.add(path.resolve(), f"lab/linux/{path.name}", filter=as_root)
            add(archive, "job/job.sh", job.encode(), 0o755)
            environment = {
                "XEN_RELEASE": built.release.xen,
                "NOW": str(int(time.time())),
                "SEED": os.urandom(16).hex(),
            }
            lines = "".join(f"{name}={value}\n" for name, value in environment.items())
            add(archive, "lab/job.env", lines.encode())
        end = out.tell()
        out.seek(PAYLOAD_AT)
        out.write(b"%d\n" % -(-(end - PAYLOAD_AT - BLOCK) // BLOCK))
        if end > DISK_BYTES:
            raise LabError(f"the job is larger than the disk ({DISK_BYTES >> 20} MB)")


def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Gives what goes into dom0 to root, and leaves out what Python cached here."""
    if member.name.endswith("/__pycache__"):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    """Adds a file made here."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), mode, int(time.time())
    archive.addfile(member, io.BytesIO(data))


def unpack(archive: tarfile.TarFile, target: Path) -> None:
    """Takes the files out of an archive that a job has written, and nothing else."""
    for member in archive:
        path = target / member.name
        content = archive.extractfile(member) if member.isfile() else None
        if content is None or not path.resolve().is_relative_to(target.resolve()):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as out:
            shutil.copyfileobj(content, out)


def main() -> int:
    """Runs a job from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", choices=[*RELEASES], default="4.17", help="release to boot")
    parser.add_argument("--wheel", action="append", type=Path, default=[], help="wheel to install")
    parser.add_argument("--put", action="append", default=[], metavar="SOURCE[:NAME]",
                        help="file or directory to put into /job")  # fmt: skip
    parser.add_argument("--linux", action="store_true",
                        help="put a Linux guest into /lab/linux (linux.cfg)")  # fmt: skip
    parser.add_argument("--results", type=Path, help="directory for what the job leaves")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of wall time")
    parser.add_argument("--xen-option", action="append", default=[], metavar="OPTION",
                        help="of Xen's: name=value sets, -name drops a default")  # fmt: skip
    parser.add_argument("--dom0-option", action="append", default=[], metavar="OPTION",
                        help="the same for dom0's kernel")  # fmt: skip
    parser.add_argument("--install", action="store_true", help="apt-get install what is missing")
    parser.add_argument("--cold", action="store_true", help="boot, do not use a saved state")
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
    boot = Boot.of(built, arguments.xen_option, arguments.dom0_option)
    state = None if arguments.cold else snapshot(boot)
    with (
        locked("machine", "the emulator"),
        tempfile.TemporaryDirectory(prefix="run-", dir=cache_dir()) as name,
    ):
        work = Path(name)
        started = time.monotonic()
        disk = work / "job.img"
        linux = linux_guest() if arguments.linux else None
        pack(disk, built, arguments.wheel, arguments.put, job, linux)
        machine = Machine(boot, work)
        showing = False

        def on_line(text: str) -> bool:
            nonlocal showing
            clock = time.monotonic() - started
            if text.startswith("LAB: "):
                say(f"{clock:6.2f} s  {text[5:]}")
                showing = "job starts" in text
            elif arguments.verbose:
                print(f"{clock:6.2f} {text}", flush=True)
            elif showing and not text.startswith("(XEN) "):
                print(text, flush=True)
            if text.startswith("LAB: results do not fit"):
                raise LabError(f"the results are larger than the disk ({DISK_BYTES >> 20} MB)")
            return text.startswith("LAB: results written")

        try:
            if state is None:
                machine.boot_from_nothing(disk)
            else:
                machine.resume(state, disk)
            if not machine.watch(arguments.timeout, on_line):
                raise machine.failure("the emulator ended before the job did")
        finally:
            machine.stop()
            for log in ("serial.log", "bochs.log"):
                if (work / log).exists():
                    shutil.copyfile(work / log, results / log)
        with open(work / "disk.img", "rb") as out:
            out.seek(PAYLOAD_AT + BLOCK)
            with tarfile.open(fileobj=out, mode="r|") as archive:
                unpack(archive, results)
        say(f"{time.monotonic() - started:6.2f} s  over, results in {results}")
    status = (results / "status").read_text()
    if not status:
        raise LabError("dom0 had no room for the results")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
