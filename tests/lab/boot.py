# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs Xen and its dom0 inside the emulator.

Booting takes the emulator ten seconds or more, so it happens once per set of command lines: the
state of the machine, with dom0 up, is saved, and each run continues from there. A disk carries
the job in and its results out.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from images import (
    RELEASES,
    Images,
    LabError,
    built,
    cache_dir,
    images,
    locked,
    require,
    say,
)

STATUS_OF_LAB = 70  # EX_SOFTWARE: the lab failed, not what ran in it

MEGABYTE = 1 << 20
MEMORY_MB = 1536
INFO_AT = MEGABYTE
MODULES_AT = 64 * MEGABYTE
DISK_CYLINDERS = 260
DISK_BYTES = DISK_CYLINDERS * 16 * 63 * 512
PAYLOAD_AT = MEGABYTE
BLOCK = 1 << 16
BOOT_SECONDS = 180.0

# apicv=0: Bochs does not record the vector of a virtually delivered interrupt, so an EPT violation
# during its delivery makes Xen inject a stale one and the guest dies.
XEN_OPTIONS = (
    "console=com1 com1=115200,8n1 guest_loglvl=all loglvl=warning altp2m=1 apicv=0 "
    "dom0_mem=768M,max:768M noreboot=1 bootscrub=0 spec-ctrl=no xpti=no"
).split()
DOM0_OPTIONS = (
    "console=hvc0 panic=1 quiet mitigations=off no_timer_check tsc=reliable cryptomgr.notests "
    "i8042.noaux i8042.nokbd i8042.nopnp usbcore.nousb"
).split()

DEATHS = (
    re.compile(r"\(XEN\) Panic on CPU \d+:"),
    re.compile(r"\[ *\d+\.\d+\] Kernel panic - not syncing"),
    re.compile(r"\(XEN\) Hardware Dom0 "),
)

# Relative paths: the saved state holds them, and each run has its own directory.
CONFIGURATION = f"""\
display_library: nogui
plugin_ctrl: unmapped=1
romimage: file=bios
vgaromimage: file=vgabios
memory: guest={MEMORY_MB}, host={MEMORY_MB}, block_size=8192
cpu: model=broadwell_ult, count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=disk.img, mode=flat, cylinders={DISK_CYLINDERS}, heads=16, spt=63
boot: disk
com1: enabled=1, mode=file, dev=serial.log
pci: enabled=1, chipset=i440fx
log: bochs.log
error: action=ignore
panic: action=fatal
"""


def options(defaults: Sequence[str], changes: Sequence[str]) -> str:
    """Command line options with some changed.

    Args:
        defaults: Options as `name` or `name=value`.
        changes: The same, each replacing the default of its name, or `-name` to leave one out.
    """
    result = list(defaults)
    for change in changes:
        name = change.lstrip("-").split("=")[0]
        result = [option for option in result if option.split("=")[0] != name]
        if not change.startswith("-"):
            result.append(change)
    return " ".join(result)


def flat(elf: bytes) -> tuple[int, int, bytes]:
    """The address, entry and memory content of a 32-bit ELF with one segment."""
    entry, table = struct.unpack_from("<II", elf, 24)
    count = struct.unpack_from("<H", elf, 44)[0]
    for index in range(count):
        kind, offset, _, address, size = struct.unpack_from("<5I", elf, table + 32 * index)
        if kind == 1:
            return address, entry, elf[offset : offset + size]
    raise LabError("the hypervisor image has nothing to load")


def multiboot(entry: int, xen_line: str, modules: Sequence[tuple[int, int, str]]) -> bytes:
    """What the boot sector and Xen read: entry, Multiboot information, command lines."""
    head = INFO_AT + 16
    listing = head + 64
    text_at = listing + 16 * len(modules)
    text = b""

    def string(value: str) -> int:
        nonlocal text
        at = text_at + len(text)
        text += value.encode() + b"\0"
        return at

    # Xen skips the first word of each line: the name a boot loader would put there.
    line = string(f"xen {xen_line}")
    rows = b"".join(
        struct.pack("<4I", start, start + size, string(words), 0) for start, size, words in modules
    )
    # Flags: memory sizes, command line, modules. Xen asks the BIOS for the memory map itself.
    info = struct.pack("<7I", 0b1101, 640, (MEMORY_MB - 1) * 1024, 0, line, len(modules), listing)
    page = struct.pack("<I12x", entry) + info.ljust(64, b"\0") + rows + text
    if len(page) > MEGABYTE:
        raise LabError("command lines too long")
    return page


@dataclasses.dataclass(frozen=True)
class Boot:
    """What is booted: images and command lines."""

    images: Images
    xen_line: str
    dom0_line: str

    @classmethod
    def of(cls, images: Images, xen: Sequence[str] = (), dom0: Sequence[str] = ()) -> Boot:
        """A boot with the lab's command lines, changed as `options` says."""
        return cls(images, options(XEN_OPTIONS, xen), options(DOM0_OPTIONS, dom0))


class Machine:
    """One run of the emulator in a directory of its own."""

    def __init__(self, boot: Boot, work: Path) -> None:
        self.boot = boot
        self.work = work
        self.serial = work / "serial.log"
        self._process: subprocess.Popen[bytes] | None = None
        (work / "bios").symlink_to(boot.images.emulator / "BIOS-bochs-latest")
        (work / "vgabios").symlink_to(boot.images.emulator / "vgabios.bin")
        self.serial.write_bytes(b"")

    def boot_from_nothing(self, disk: Path | None, save_to: Path | None = None) -> None:
        """Starts the emulator with the hypervisor, kernel and ramdisk in memory.

        Args:
            disk: Carries the job; None for an empty one.
            save_to: Where the state is saved, as soon as dom0 is up; the emulator then ends.
        """
        images, work = self.boot.images, self.work
        address, entry, content = flat(images.xen.read_bytes())
        (work / "xen.bin").write_bytes(content)
        kernel_size = images.vmlinux.stat().st_size
        ramdisk_at = -(-(MODULES_AT + kernel_size) // MEGABYTE) * MEGABYTE
        modules = (
            (MODULES_AT, kernel_size, f"linux {self.boot.dom0_line}"),
            (ramdisk_at, images.initrd.stat().st_size, "ramdisk"),
        )
        (work / "info.bin").write_bytes(multiboot(entry, self.boot.xen_line, modules))
        target = work / "disk.img"
        if disk is None:
            target.write_bytes(b"")
            os.truncate(target, DISK_BYTES)
        else:
            disk.rename(target)
        with open(target, "r+b") as sectors:
            sectors.write(images.loader.read_bytes())
        ram = (
            (work / "info.bin", INFO_AT),
            (work / "xen.bin", address),
            (images.vmlinux, MODULES_AT),
            (images.initrd, ramdisk_at),
        )
        lines = [
            f"optramimage{number}: file={path}, address={at:#x}\n"
            for number, (path, at) in enumerate(ram, 1)
        ]
        (work / "bochsrc").write_text(CONFIGURATION + "".join(lines))
        self._start(["-f", "bochsrc"], save_to)

    def resume(self, snapshot: Path, disk: Path, console: str | None = None) -> None:
        """Starts the emulator where `snapshot` was taken, with another disk.

        Args:
            snapshot: The saved state.
            disk: Carries the job.
            console: A terminal for the serial port. Time then passes no faster than outside, so
                that waiting for a key costs no processor time.
        """
        state = self.work / "state"
        state.mkdir()
        for part in snapshot.iterdir():
            if part.name == "disk":
                continue
            (state / part.name).symlink_to(part)
        if console is not None:
            text = (snapshot / "config").read_text()
            text = re.sub(
                r"^com1: .*", f"com1: enabled=1, mode=term, dev={console}", text, flags=re.MULTILINE
            )
            text = text.replace("clock: sync=none", "clock: sync=slowdown")
            (state / "config").unlink()
            (state / "config").write_text(text)
        # Bochs opens a disk, then replaces it by the copy in the state's directory.
        disk.rename(state / (snapshot / "disk").read_text())
        (self.work / "disk.img").write_bytes(bytes(512))
        os.truncate(self.work / "disk.img", DISK_BYTES)
        self._start(["-r", "state"], None)

    def _start(self, arguments: list[str], save_to: Path | None) -> None:
        environment = {
            name: value for name, value in os.environ.items() if name != "BOCHS_SNAPSHOT"
        }
        if save_to is not None:
            environment["BOCHS_SNAPSHOT"] = str(save_to)
        with open(self.work / "emulator.out", "wb") as out:
            self._process = subprocess.Popen(
                [self.boot.images.emulator / "bochs", "-q", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                env=environment,
                preexec_fn=_die_with_parent,
            )

    def running(self) -> bool:
        """Whether the emulator has not ended."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ends the emulator."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def watch(self, timeout: float, on_line: Callable[[str], bool]) -> bool:
        """Reads the serial console until a line says it is over or the emulator ends.

        Args:
            timeout: Seconds of wall time after which the run has failed.
            on_line: Called with each line; True ends the watch.

        Returns:
            Whether a line ended the watch.

        Raises:
            LabError: Xen or dom0 died, or time ran out; with the console's tail.
        """
        assert self._process is not None
        deadline = time.monotonic() + timeout
        pending = b""
        dying = ""
        with open(self.serial, "rb") as console:
            while True:
                alive = self._process.poll() is None
                fresh = console.read()
                if not fresh:
                    if dying and (not alive or time.monotonic() > deadline):
                        raise self.failure(dying)
                    if not alive:
                        return False
                    if time.monotonic() > deadline:
                        raise self.failure(f"no end after {timeout:.0f} s")
                    time.sleep(0.01)
                    continue
                *lines, pending = (pending + fresh).split(b"\n")
                for raw in lines:
                    text = raw.decode(errors="replace").rstrip("\r")
                    if on_line(text):
                        return True
                    if not dying and any(death.search(text) for death in DEATHS):
                        dying = text.strip()
                        # A moment for the rest of the message.
                        deadline = min(deadline, time.monotonic() + 2)

    def failure(self, reason: str) -> LabError:
        """An error with the ends of the serial console and of the emulator's log."""
        tail = self.serial.read_text(errors="replace").splitlines()[-40:]
        panics: list[str] = []
        for name in ("bochs.log", "emulator.out"):
            path = self.work / name
            if path.exists():
                text = path.read_text(errors="replace").splitlines()
                panics += [line for line in text if ">>PANIC<<" in line][-5:]
        return LabError("\n".join([reason, "--- end of the serial console:", *tail, *panics]))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def snapshot(boot: Boot) -> Path:
    """Returns the cached state of a machine whose dom0 is up, booting it if there is none."""

    def make(work: Path) -> None:
        with (
            locked("machine", "the emulator"),
            tempfile.TemporaryDirectory(prefix="boot-", dir=cache_dir()) as name,
        ):
            machine = Machine(boot, Path(name))
            machine.boot_from_nothing(None, save_to=work)
            try:
                machine.watch(BOOT_SECONDS, lambda text: False)
            finally:
                machine.stop()
            log = (Path(name) / "bochs.log").read_text(errors="replace")
            if "state saved" not in log:
                raise machine.failure("dom0 did not come up")
        finish(work)

    images = boot.images
    inputs = [
        [str(path) for path in (images.emulator, images.loader, images.xen, images.vmlinux)],
        str(images.initrd), boot.xen_line, boot.dom0_line, CONFIGURATION,
    ]  # fmt: skip
    return built(f"snapshot-{images.release.xen}", inputs, make, finish, multiboot, keep=3)


def finish(state: Path) -> None:
    """Makes a saved state fit for use with any disk, and small."""
    (disk,) = state.glob("*.image")
    disk.unlink()
    (state / "disk").write_text(disk.name)
    config = state / "config"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("optramimage")))
    memory = state / "memory.ram"
    sparse = state / "memory.sparse"
    with open(memory, "rb") as source, open(sparse, "wb") as target:
        while chunk := source.read(1 << 16):
            if chunk.count(0) == len(chunk):
                target.seek(len(chunk), os.SEEK_CUR)
            else:
                target.write(chunk)
        target.truncate(memory.stat().st_size)
    sparse.replace(memory)


def main() -> int:
    """Builds all that the lab needs, from the command line."""
    parser = argparse.ArgumentParser(
        description="Build the lab's images and boot each release once."
    )
    parser.add_argument("--xen", action="append", choices=[*RELEASES], help="only this release")
    parser.add_argument("--install", action="store_true", help="apt-get install what is missing")
    arguments = parser.parse_args()
    try:
        require(arguments.install)
        for version in arguments.xen or RELEASES:
            snapshot(Boot.of(images(version)))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return STATUS_OF_LAB
    say(f"ready, in {cache_dir()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
