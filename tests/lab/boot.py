# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs Xen and its dom0 inside the emulator and watches the serial console."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from images import Images, LabError

MEGABYTE = 1 << 20
MEMORY_MB = 1536
DISK_CYLINDERS = 700
CYLINDER_BYTES = 16 * 63 * 512
INFO_AT = MEGABYTE
MODULES_AT = 64 * MEGABYTE

# apicv=0: Bochs does not record the vector of a virtually delivered interrupt, so an EPT violation
# during its delivery makes Xen inject a stale one and the guest dies.
XEN_OPTIONS = (
    "console=com1 com1=115200,8n1 guest_loglvl=all loglvl=warning altp2m=1 apicv=0 dom0_mem=512M "
    "noreboot=1 bootscrub=0 spec-ctrl=no xpti=no"
).split()
DOM0_OPTIONS = (
    "console=hvc0 panic=1 quiet mitigations=off no_timer_check tsc=reliable cryptomgr.notests "
    "i8042.noaux i8042.nokbd i8042.nopnp usbcore.nousb"
).split()

DEATHS = (
    re.compile(r"Panic on CPU \d+:"),
    re.compile(r"Kernel panic - not syncing"),
    re.compile(r"Domain 0 (crashed|shutdown)"),
    re.compile(r"\(XEN\) Reboot disabled on cmdline"),
)


@dataclasses.dataclass
class Boot:
    """What is booted, and how."""

    images: Images
    work: Path
    ramdisk: Path
    xen_options: Sequence[str] = ()
    dom0_options: Sequence[str] = ()


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
    """The page the boot sector and Xen read: entry, Multiboot information, command lines."""
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
    info = struct.pack(
        "<7I", 0b1101, 640, (MEMORY_MB - 1) * 1024, 0, line, len(modules), listing
    )
    page = struct.pack("<I12x", entry) + info.ljust(64, b"\0") + rows + text
    if len(page) > MEGABYTE:
        raise LabError("command lines too long")
    return page


def prepare(boot: Boot) -> Path:
    """Writes memory images, disk and configuration of a boot into its work directory.

    Returns:
        The emulator's configuration.
    """
    work = boot.work
    address, entry, content = flat(boot.images.xen.read_bytes())
    (work / "xen.bin").write_bytes(content)
    vmlinux_size = boot.images.vmlinux.stat().st_size
    ramdisk_at = -(-(MODULES_AT + vmlinux_size) // MEGABYTE) * MEGABYTE
    modules = (
        (MODULES_AT, vmlinux_size, f"linux {options(DOM0_OPTIONS, boot.dom0_options)}"),
        (ramdisk_at, boot.ramdisk.stat().st_size, "ramdisk"),
    )
    line = options(XEN_OPTIONS, boot.xen_options)
    (work / "info.bin").write_bytes(multiboot(entry, line, modules))
    disk = work / "disk.img"
    shutil.copyfile(boot.images.loader, disk)
    os.truncate(disk, DISK_CYLINDERS * CYLINDER_BYTES)
    home = boot.images.emulator
    ram = (
        (work / "info.bin", INFO_AT),
        (work / "xen.bin", address),
        (boot.images.vmlinux, MODULES_AT),
        (boot.ramdisk, ramdisk_at),
    )
    lines = [
        "display_library: nogui",
        f"romimage: file={home / 'BIOS-bochs-latest'}",
        f"vgaromimage: file={home / 'vgabios.bin'}",
        f"memory: guest={MEMORY_MB}, host={MEMORY_MB}",
        "cpu: model=broadwell_ult, count=1, ips=100000000, reset_on_triple_fault=0",
        "clock: sync=none",
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
        f"ata0-master: type=disk, path={disk}, mode=flat, cylinders={DISK_CYLINDERS}, "
        "heads=16, spt=63",
        "boot: disk",
        f"com1: enabled=1, mode=file, dev={work / 'serial.log'}",
        "pci: enabled=1, chipset=i440fx",
        f"log: {work / 'bochs.log'}",
        "panic: action=fatal",
    ]
    lines += [
        f"optramimage{number}: file={path}, address={at:#x}"
        for number, (path, at) in enumerate(ram, 1)
    ]
    config = work / "bochsrc"
    config.write_text("\n".join(lines) + "\n")
    return config


def run(boot: Boot, timeout: float, on_line: Callable[[str], bool]) -> None:
    """Boots and watches until a line says it is over.

    Args:
        boot: What to boot.
        timeout: Seconds of wall time after which the run has failed.
        on_line: Called with each line of the serial console; True ends the run.

    Raises:
        LabError: The emulator, Xen or dom0 died, or time ran out; with the console's tail.
    """
    config = prepare(boot)
    serial = boot.work / "serial.log"
    serial.write_bytes(b"")
    with open(boot.work / "emulator.out", "wb") as out:
        process = subprocess.Popen(
            [boot.images.emulator / "bochs", "-q", "-f", config],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=boot.work,
        )
    deadline = time.monotonic() + timeout
    pending = b""
    dying = ""
    try:
        with open(serial, "rb") as console:
            while True:
                alive = process.poll() is None
                fresh = console.read()
                if not fresh:
                    if not alive:
                        raise _failure(boot, dying or "the emulator ended before the run was over")
                    if dying:
                        raise _failure(boot, dying)
                    if time.monotonic() > deadline:
                        raise _failure(boot, f"no end after {timeout:.0f} s")
                    time.sleep(0.02)
                    continue
                *lines, pending = (pending + fresh).split(b"\n")
                for raw in lines:
                    text = raw.decode(errors="replace").rstrip("\r")
                    if on_line(text):
                        return
                    if not dying and any(death.search(text) for death in DEATHS):
                        dying = text.strip()
                        deadline = min(deadline, time.monotonic() + 3)
                if dying:
                    time.sleep(0.5)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(boot: Boot, reason: str) -> LabError:
    tail = (boot.work / "serial.log").read_text(errors="replace").splitlines()[-40:]
    log = (boot.work / "bochs.log").read_text(errors="replace").splitlines()
    panics = [line for line in log if "PANIC" in line][-5:]
    return LabError("\n".join([reason, "--- end of the serial console:", *tail, *panics]))
