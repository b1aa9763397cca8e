# SPDX-License-Identifier: LGPL-2.1-or-later
"""Throws mutated images, prototypes, lists of symbols, page tables, journals, saved states and
recorded sessions at what reads them.

    guests.py [--count 700000] [--seed 1]

Each input must lead to a result or to the one error that is meant for it, within a second and with
no more memory than a small multiple of its size; and what a result says of itself must hold.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import cast
from uuid import UUID

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.recorded.sessions import calls
from tests.unit.test_prototypes import SOURCE, compiled
from xenaltp2m.abi.x86 import (
    CR0_PE,
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    Fault,
    Paging,
)
from xenaltp2m.backend import Backend
from xenaltp2m.backend.session.format import Reader
from xenaltp2m.backend.session.replay import ReplayBackend
from xenaltp2m.errors import RecordingError, ReplayError, StateError, SymbolError, XenError
from xenaltp2m.handles import journal
from xenaltp2m.tools import symbols
from xenaltp2m.tools.symbols import fingerprint, kallsyms
from xenaltp2m.tools.symbols.prototypes import Prototypes
from xenaltp2m.types import Access
from xenaltp2m.values.intervals import Intervals
from xenaltp2m.values.state import PageState, State, ViewState

RECORDINGS = Path(__file__).resolve().parents[1] / "recorded" / "xen-4.17"
GUESTS = Path(__file__).resolve().parents[2] / "examples" / "guest"
MADE = Path(__file__).resolve().parents[1] / "unit" / "elf"
"""What other tools have made."""
IMAGES = [
    path.read_bytes()
    for directory in (GUESTS, MADE)
    for path in sorted(directory.iterdir())
    if path.suffix in (".elf", ".debug", ".dwo", ".sup")
]
KERNEL = b"".join(
    b"%016x %c function_%d%s\n" % (0xFFFFFFFF81000000 + 64 * n, b"tTdDbBrRaAuU"[n % 12], n, module)
    for n, module in enumerate([b"", b"\t[ext4]"] * 100)
)
LONG = EFER_LME | EFER_LMA | EFER_NXE
PAGINGS = [
    Paging(CR0_PE | CR0_PG, 0x1000, CR4_PSE, 0, user=False, physical_bits=52),
    Paging(CR0_PE | CR0_PG, 0x1000, CR4_PAE, EFER_NXE, user=False, physical_bits=52),
    Paging(CR0_PE | CR0_PG, 0x1000, CR4_PAE, LONG, user=False, physical_bits=52),
    Paging(CR0_PE | CR0_PG, 0x1000, CR4_PAE | CR4_LA57, LONG, user=False, physical_bits=52),
]
INTERESTING = [0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63]
SECONDS = 1.0
MEBIBYTES = 256
"""More than anything here may take, the interpreter included."""


def mutated(chance: random.Random, content: bytes) -> bytes:
    """Change numbers and bytes, cut and repeat."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(0x200)
        at = min(at, len(data) - 8)
        kind = chance.random()
        if kind < 0.5:
            size = chance.choice("BHIQ")
            value = chance.choice([*INTERESTING, chance.getrandbits(64), len(data)])
            width = struct.calcsize(size)
            struct.pack_into(f"<{size}", data, at, value & ((1 << 8 * width) - 1))
        elif kind < 0.8:
            data[at] ^= 1 << chance.randrange(8)
        elif kind < 0.9:
            del data[at : at + chance.randrange(64)]
        else:
            data[at:at] = data[: chance.randrange(256)]
        if len(data) < 16:
            break
    return bytes(data)


def an_image(chance: random.Random) -> None:
    """An ELF file."""
    content = mutated(chance, chance.choice(IMAGES))
    try:
        image = symbols.Image(content, "fuzzed")
    except SymbolError:
        return
    assert sum(len(segment.data) for segment in image.segments) <= len(content)
    for symbol in chance.sample(image.symbols, min(3, len(image.symbols))):
        image.locate(symbol.address)
        start, size = image.extent(symbol.address, 16, 4096)
        assert size <= 4096
        with contextlib.suppress(SymbolError):
            fingerprint.compare(image, lambda _, length: chance.randbytes(length), [symbol.name])
        code = image.content(start, size)
        assert code is None or len(code) == size
        try:
            pages = image.gfns(symbol.name)
        except SymbolError:
            continue
        assert 0 <= pages.start < pages.stop <= 1 << 36


def a_list(chance: random.Random) -> None:
    """System.map."""
    stream = io.BytesIO(mutated(chance, KERNEL))
    try:
        kernel = symbols.Symbols(*kallsyms.map_symbols(stream, "fuzzed"))
    except SymbolError:
        return
    for symbol in kernel.symbols[:3]:
        assert 0 <= symbol.address < 1 << 64
        assert kernel.locate(symbol.address) is not None


def page_tables(chance: random.Random) -> None:
    """Tables that lead anywhere, also to themselves."""
    paging = chance.choice(PAGINGS)
    loads = 0

    def load(address: int, size: int) -> int:
        nonlocal loads
        loads += 1
        assert 0 <= address < 1 << 53
        assert address % size == 0
        if chance.random() < 0.3:
            return chance.getrandbits(8 * size)
        flags = chance.choice([0x63, 0xE3, 0x67, 0xE7, 0x01, chance.getrandbits(12)])
        return chance.getrandbits(20) << 12 & (1 << 8 * size) - 1 | flags

    bits = 64 if paging.efer & EFER_LMA else 32
    address = chance.getrandbits(bits)
    if chance.random() < 0.7:
        address &= (1 << 46) - 1
    try:
        found = paging.walk(address, load)
    except Fault:
        found = None
    assert loads <= len(paging.levels)
    if found is not None:
        assert found.physical % found.page_size == address % found.page_size
        assert found.physical < 1 << 52
        assert len(found.entries) == loads


def described() -> list[bytes]:
    """Images with debugging information of both kinds, packed and not."""
    with tempfile.TemporaryDirectory(prefix="xenaltp2m-fuzz-") as directory:
        return [
            compiled(
                Path(directory), SOURCE, *options.split(), "-nostdlib", "-static", "-Wl,-e,none"
            ).read_bytes()
            for options in ("-gdwarf-4 -O0", "-gdwarf-5 -O2", "-gdwarf-5 -O2 -gz")
        ] + [(MADE / f"{name}.elf").read_bytes() for name in ("zdebug", "zstd", "types-5")]


DESCRIBED = described()
FUNCTIONS = [[one.address for one in symbols.Image(image).symbols] for image in DESCRIBED]


def prototypes(chance: random.Random) -> None:
    """Debugging information: mostly what lies behind the code."""
    which = chance.randrange(len(DESCRIBED))
    data = bytearray(mutated(chance, DESCRIBED[which]))
    for _ in range(chance.choice([0, 1, 2, 8])):
        at = chance.randrange(min(0x1000, len(data) - 1), len(data))
        data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.getrandbits(8)])
    try:
        found = Prototypes(io.BytesIO(data), "fuzzed")
        for address in chance.sample(FUNCTIONS[which], 3):
            found.at(address)
        list(found.functions())
    except SymbolError:
        return


def records(name: str) -> list[bytes]:
    """Lines of a journal."""
    with tempfile.TemporaryDirectory(prefix="xenaltp2m-fuzz-") as directory:
        made = journal.Journal(Path(directory) / name, 1, UUID(int=1))
        made.write(pauses=1)
        made.write(monitor=True, altp2m=True)
        made.write(pages=(journal.Pages(0x100, 16, 16, 5000),), prior_views=(0, 3))
        content = (Path(directory) / name / made.name).read_bytes()
        made.forget()
        made.close()
    return content.splitlines()


LINES = records("journal")
RECORDS = [journal._parse(line) for line in LINES]


def a_journal(chance: random.Random) -> None:
    """A line of one: what is believed is what was written."""
    which = chance.randrange(len(LINES))
    line = mutated(chance, LINES[which])
    assert journal._parse(line) in (None, *RECORDS) or line in LINES


ACCESS = Intervals.of((16 * n, n % 15 + 1, Access.RX) for n in range(40))
STATE = State(
    (
        ViewState(
            "hooks",
            Access.RWX,
            True,
            Intervals.of([(-1, 1, Access.R), *ACCESS]),
            Intervals(),
            ((3, -1), (5, 9)),
        ),
        ViewState("", Access.R, False, ACCESS[:3], Intervals.of([(7, 2, True)]), ()),
    ),
    (PageState("0" * 64),),
    (0, None),
    ((0, 77),),
)
STATES = [STATE.to_bytes(), gzip.compress(STATE.to_bytes(), mtime=0)]


def a_state(chance: random.Random) -> None:
    """Views in a file: refused, or what was written; with its checksum set right, what is read."""
    try:
        found = State.from_bytes(mutated(chance, chance.choice(STATES)))
    except StateError:
        pass
    else:
        assert found == STATE
    text = mutated(chance, b"{" + STATES[0][79:-1])
    checksum = hashlib.sha256(b"{" + text[1:]).hexdigest().encode()
    try:
        found = State.from_bytes(b'{"checksum":"%s",%s\n' % (checksum, text[1:]))
    except StateError:
        return
    assert State.from_bytes(found.to_bytes()) == found


RECORDED = [path.read_bytes() for path in sorted(RECORDINGS.glob("*.session"))]


def a_recording(chance: random.Random) -> None:
    """A session: refused, or replayed until it is asked for something else."""
    which = chance.randrange(len(RECORDED))
    lines = RECORDED[which].splitlines(keepends=True)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(lines))
        kind = chance.random()
        if kind < 0.6:
            lines[at] = mutated(chance, lines[at].ljust(16)).replace(b"\n", b"") + b"\n"
        elif kind < 0.8:
            with contextlib.suppress(ValueError):
                lines[at] = other_value(chance, lines[at])
        else:
            lines.insert(chance.randrange(len(lines)), lines[at])
    try:
        backend = ReplayBackend(Reader(io.BytesIO(b"".join(lines)), "fuzzed"))
    except RecordingError:
        return
    told, sys.unraisablehook = sys.unraisablehook, lambda _: None  # generators that are left
    try:
        calls(cast("Backend", backend))
    except (XenError, ReplayError, AssertionError, ValueError, LookupError):  # of calls(), too
        with contextlib.suppress(ReplayError):
            backend.close()
    finally:
        sys.unraisablehook = told


def other_value(chance: random.Random, line: bytes) -> bytes:
    """A line that is JSON, with another value in it."""
    document = json.loads(line)
    key = chance.choice(list(document))
    others: list[object] = [
        None,
        True,
        -1,
        0,
        1 << 64,
        0.5,
        "",
        "xx",
        [],
        {},
        [[0, 0, []]],
        [{"raw": "00"}],
    ]
    document[key] = chance.choice([*others, document.get("arguments"), document.get("result")])
    return json.dumps(document).encode() + b"\n"


KINDS: list[Callable[[random.Random], None]] = [
    an_image, a_list, page_tables, prototypes, a_journal, a_state, a_recording
]  # fmt: skip


def too_long(number: int, frame: FrameType | None) -> None:
    """End an input that takes more than it may."""
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    """Fuzz from the command line."""
    parser = argparse.ArgumentParser(description="Fuzz what comes from files and guests.")
    parser.add_argument("--count", type=int, default=700_000, help="inputs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, too_long)
    began = time.monotonic()
    for number in range(options.count):
        seed = options.seed + number
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            KINDS[seed % len(KINDS)](random.Random(seed))
        except BaseException:
            print(f"seed {seed} fails", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if sys.stderr.isatty() and not number % 1000:
            print(f"\r{number:9} inputs", end="", file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    assert peak < MEBIBYTES, f"{peak} MiB"
    seconds = time.monotonic() - began
    print(f"{options.count} inputs, {seconds:.0f} s, {peak} MiB at most: each read or refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
