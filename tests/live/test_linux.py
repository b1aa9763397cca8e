# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Debian kernel as a guest: what its processes ask of it, by breakpoints that it cannot see.

Its init has a process copy 50 times 1234 bytes, says "beat" and a number, and sleeps, for ever.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

import xenaltp2m as xa
from xenaltp2m.tools.breakpoints.hooks import Hit
from xenaltp2m.tools.breakpoints.manager import Breakpoints
from xenaltp2m.tools.symbols import Image, Symbols, fingerprint
from xenaltp2m.tools.tracing import Call, Return, Trace

CONSOLE = Path("/var/log/xen/console/guest-linux.log")
OPTIONS = "console=hvc0 nokaslr quiet cryptomgr.notests mitigations=off work"
TABLES = "mcount_loc", "__jump_table", "static_call_sites"
"""Of what the kernel changes in its code."""
NAMES = (
    "_text", "_etext", "ksys_write", "do_sys_openat2", "do_syscall_64", "entry_SYSCALL_64",
    "entry_SYSCALL_compat", "entry_SYSENTER_compat", "linux_banner", "sys_call_table",
    "__x64_sys_read", "__x64_sys_write", "__x64_sys_openat", "__x64_sys_getrandom",
    *(f"__{end}_{name}" for name in TABLES for end in ("start", "stop")),
)  # fmt: skip
"""By the entries KASLR is looked for; by what follows the list is known to be of this kernel."""
WRITE, OPEN, OPENAT = 1, 2, 257
SAID = 4
"""Other writes in a round: what was copied, in words, and the beat."""
COPIES, BYTES, ROUNDS = 50, 1234, 6
PATIENCE = 300
AT_FDCWD = -100 & (1 << 32) - 1
STDOUT, STDERR = 1, 2


@dataclass
class Linux:
    dom: xa.Domain
    symbols: Symbols

    def beats(self) -> int:
        """The latest number on its console."""
        words = CONSOLE.read_text(errors="replace").split()
        return int(words[len(words) - 1 - words[::-1].index("beat") + 1])

    def code(self) -> str:
        """A checksum of the kernel's code, which lies in one piece."""
        space = self.dom.memory.address_space()
        start, end = (self.symbols.address(name) for name in ("_text", "_etext"))
        first, last = (space.translate(at).physical for at in (start, end - 1))
        assert last - first == end - 1 - start
        return hashlib.sha1(
            self.dom.memory.read(first, end - start), usedforsecurity=False
        ).hexdigest()


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linux]:
    """Booted, at work."""
    CONSOLE.unlink(missing_ok=True)
    extra = f'extra="{OPTIONS} symbols={"|".join(NAMES)}"'
    subprocess.run(["xl", "create", "-q", "-e", "/lab/linux/linux.cfg", extra], check=True)
    try:
        end = time.monotonic() + PATIENCE
        while not (CONSOLE.exists() and "beat 2" in CONSOLE.read_text(errors="replace")):
            assert time.monotonic() < end, "it does not boot"
            time.sleep(0.5)
        lines = CONSOLE.read_text(errors="replace").splitlines()
        kernel = [line.strip() for line in lines if line.strip().endswith(NAMES)]
        kallsyms = tmp_path_factory.mktemp("linux") / "kallsyms"
        kallsyms.write_text("".join(f"{line}\n" for line in kernel))
        with xa.connect() as xen, xen.domain("linux") as dom:
            yield Linux(dom, Symbols.open(kallsyms))
    finally:
        subprocess.run(["xl", "destroy", "linux"], check=True)


def test_system_calls_are_counted_one_by_one(linux: Linux) -> None:
    """Each process opens two files and writes 50 times; the shell says which beat it is."""
    code = linux.code()
    calls: list[tuple[str, object]] = []
    returned: list[int] = []
    with Trace(
        linux.dom, "ksys_write", "do_sys_openat2", symbols=linux.symbols, arguments=3, returns=True
    ) as trace:

        def take(seen: Call | Return) -> None:
            if isinstance(seen, Return):
                assert seen.call.name == calls[-1][0]  # one processor, and no call waits
                returned.append(seen.value)
                return
            space = trace.address_space(seen)
            first, pointer, third = seen.arguments
            if seen.name == "do_sys_openat2":
                assert first & (1 << 32) - 1 == AT_FDCWD
                calls.append((seen.name, space.read_string(pointer)))
            elif third == BYTES:
                assert space.read(pointer, BYTES) == bytes(BYTES)  # from /dev/zero
                assert first == STDOUT
                calls.append((seen.name, BYTES))
            elif first == STDOUT:
                calls.append((seen.name, space.read(pointer, third)))
            else:
                assert first == STDERR  # what was copied, in words
            if calls.count(("do_sys_openat2", b"/dev/zero")) == ROUNDS + 1:
                trace.stop()

        trace.run(take, timeout=PATIENCE)
        assert trace.unfinished == trace.dropped == 0
    starts = [at for at, call in enumerate(calls) if call == ("do_sys_openat2", b"/dev/zero")]
    beats = []
    for start, end in pairwise(starts):
        assert calls[start + 1] == ("do_sys_openat2", b"/dev/null")
        assert calls[start + 2 : start + 2 + COPIES] == [("ksys_write", BYTES)] * COPIES
        (name, said), redirected = calls[start + 2 + COPIES : end]
        assert redirected == ("do_sys_openat2", b"/dev/null")
        assert name == "ksys_write"
        assert isinstance(said, bytes)
        beats.append(int(said.removeprefix(b"beat ")))
    assert len(beats) == ROUNDS
    assert beats == list(range(beats[0], beats[0] + ROUNDS))
    assert returned.count(BYTES) >= ROUNDS * COPIES
    is_unharmed(linux, code)


def is_unharmed(linux: Linux, code: str) -> None:
    """All of it as it was, and it goes on."""
    assert linux.code() == code
    assert not linux.dom.altp2m_active
    beat, end = linux.beats(), time.monotonic() + PATIENCE
    while linux.beats() < beat + 3:
        assert time.monotonic() < end, "it has stopped"
        time.sleep(0.5)


def test_system_calls_of_each_process(linux: Linux) -> None:
    """examples/count_system_calls.py: of the copying processes, 50 writes each, and the rest."""
    command = [sys.executable, "examples/count_system_calls.py", "--connect", "libxc"]
    command += ["--domain", "linux", "--symbols", linux.symbols.name]
    command += ["--entry", "do_syscall_64", "--number", "1", "--seconds", "8"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    counts: dict[str, dict[int, int]] = {}
    for cr3, number, hits in re.findall(r"at (0x\w+)  call (\d+)  (\d+)\n", run.stdout):
        counts.setdefault(cr3, {})[int(number)] = int(hits)
    assert len(counts) >= 2
    writes = sum(of.get(WRITE, 0) for of in counts.values())
    opens = sum(of.get(OPENAT, 0) + of.get(OPEN, 0) for of in counts.values())
    rounds = opens // 3  # /dev/null, too, to redirect what is said
    assert rounds >= 2
    assert COPIES * (rounds - 1) <= writes <= (COPIES + SAID) * (rounds + 1)


def test_it_is_saved_and_restored(linux: Linux, tmp_path: Path) -> None:
    """Breakpoints, a view with a remap to an added page, and a watch are there again, and live."""
    dom, code, image = linux.dom, linux.code(), tmp_path / "saved"
    space = dom.memory.address_space()
    write, start = (
        space.translate(linux.symbols.address(name)).physical for name in ("ksys_write", "_text")
    )
    counts: list[int] = []
    with (
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        Breakpoints(altp2m, monitor) as breakpoints,
    ):

        def count(hit: Hit) -> None:
            counts[-1] += hit.registers.rdx == BYTES
            if counts[-1] >= ROUNDS * COPIES:
                monitor.stop()

        def copied() -> None:
            counts.append(0)
            monitor.run(breakpoints, timeout=PATIENCE)
            assert counts[-1] >= ROUNDS * COPIES

        hook = breakpoints.insert(write, count)
        watch = breakpoints.watch(start, 4096, reads=True)
        view = altp2m.create_view(label="own")
        [shadow] = dom.add_pages(1)
        dom.memory.write_page(shadow, b"shadow" * 682 + b"page")
        view.remap(start >> 12, shadow, access=xa.Access.X)
        view.set_access(range(0x800, 0x900), xa.Access.RX)
        copied()
        domid, hits, beat = dom.domid, hook.hits, linux.beats()
        with xa.Migration(dom, seconds=PATIENCE) as carried:
            subprocess.run(["xl", "save", "linux", str(image)], check=True)
            CONSOLE.write_text("beat 0\n")
            subprocess.run(["xl", "restore", "-p", str(image)], check=True)
        image.unlink()
        assert dom.domid != domid
        assert altp2m.verify() == []
        assert view.remaps == {start >> 12: carried.gfns[shadow]}
        assert dom.memory.read_page(carried.gfns[shadow]) == b"shadow" * 682 + b"page"
        assert carried.state is not None
        assert xa.capture(altp2m, contents=True).views[0] == carried.state.views[0]
        assert set(altp2m.vcpu_views().values()) == {breakpoints.hooks.id}
        dom._backend.domain_unpause(int(dom.domid))  # which xl had paused
        copied()
        assert hook.hits > hits
        assert breakpoints.verify() == []
        assert watch.inserted
        is_unharmed_meanwhile = linux.code()
    assert is_unharmed_meanwhile == code
    assert linux.beats() > beat
    is_unharmed(linux, code)


def test_fault_05_symbols_of_another_kernel_are_refused(linux: Linux, tmp_path: Path) -> None:
    """Before anything is changed: of one with 64 more bytes in the middle, and others."""
    dom, code = linux.dom, linux.code()
    registers = dom.registers()
    assert linux.symbols.in_guest(registers).slide == 0  # nokaslr
    text = Path(linux.symbols.name).read_text()
    middle = linux.symbols.address("ksys_write")

    def changed(change: Callable[[str, int], int | None]) -> Symbols:
        lines = (line.split(maxsplit=2) for line in text.splitlines())
        found = [(change(name, int(at, 16)), kind, name) for at, kind, name in lines]
        path = tmp_path / "kallsyms"
        path.write_text("".join(f"{at:x} {kind} {name}\n" for at, kind, name in found if at))
        return Symbols.open(path)

    longer = changed(lambda _, at: at + 64 if middle < at < linux.symbols.address("_etext") else at)
    with pytest.raises(xa.SymbolError, match="in sys_call_table is not at"):
        xa.Trace(dom, "ksys_write", symbols=longer)
    elsewhere = changed(lambda name, at: at + 4096 if name == "linux_banner" else at)
    with pytest.raises(xa.SymbolError, match="linux_banner is not at"):
        xa.Trace(dom, "ksys_write", symbols=elsewhere)
    with pytest.raises(xa.SymbolError, match="is not at"):
        xa.Trace(dom, "ksys_write", symbols=linux.symbols.slid(2 << 20))
    few = changed(lambda name, at: at if name in ("ksys_write", "entry_SYSCALL_64") else None)
    with pytest.raises(xa.SymbolError, match="cannot check that"):
        xa.Trace(dom, "ksys_write", symbols=few)
    entry = changed(lambda name, at: at + 16 if name == "entry_SYSCALL_64" else at)
    with pytest.raises(xa.SymbolError, match="does not match the running kernel"):
        entry.in_guest(registers)
    assert not dom.altp2m_active
    assert linux.code() == code
    xa.Trace(dom, "ksys_write", symbols=few, trust=True).close()
    is_unharmed(linux, code)


REGION = 64 << 10


def test_fault_05_a_kernel_s_own_image_fits(linux: Linux) -> None:
    """But for what it changes as it boots: alternatives, ftrace, static keys, locks, returns."""
    image = Image.open("/lab/linux/vmlinux")  # stripped; the list has the symbols
    found = [(one.address, 3, one) for one in linux.symbols.symbols]
    Symbols.__init__(image, found, image.name)
    start = image.address("_text") + (1 << 20)  # not the head, nor Xen's hypercall page
    read = linux.dom.memory.address_space().read
    sites = fingerprint.Sites(image)
    differing = 0
    for at in range(start, start + (8 << 20), 2 << 20):
        code, there = image.content(at, REGION), read(at, REGION)
        assert code is not None
        differing += sum(a != b for a, b in zip(code, there, strict=True))
        difference = fingerprint.difference(sites, at, code, there)
        assert difference is None, (
            f"{at + difference:#x}: {code[difference:][:8].hex()} {there[difference:][:8].hex()}"
        )
    assert differing > 1000
    fingerprint.compare(image, read, ["ksys_write", "do_sys_openat2"])
    with pytest.raises(xa.SymbolError, match="does not match the guest: at ksys_write"):
        fingerprint.compare(image.slid(64), read, ["ksys_write"])


def test_the_command_line(linux: Linux) -> None:
    code = linux.code()
    command = ["xenaltp2m", "trace", "linux", "--symbols", linux.symbols.name, "--json"]
    command += ["do_sys_openat2:d,s", "ksys_write:u,s,u", "--returns", "--count", "120"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    *told, summary = map(json.loads, run.stdout.splitlines())
    calls = [one for one in told if one["event"] == "call"]
    assert len(calls) == 120
    writes = [one["arguments"] for one in calls if one["function"] == "ksys_write"]
    opens = [one["arguments"] for one in calls if one["function"] == "do_sys_openat2"]
    assert {one["1"] for one in opens} == {"/dev/null", "/dev/zero"}
    assert {one["0"] for one in writes} <= {STDOUT, STDERR}
    assert sum(one["2"] == BYTES for one in writes) >= COPIES
    assert any(one["1"].startswith("beat ") for one in writes)
    returned = [one["value"] for one in told if one["event"] == "return"]
    assert returned.count(BYTES) >= COPIES
    assert summary["summary"]["unfinished"] == 0
    is_unharmed(linux, code)
