# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each example runs on the mock and prints what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xenaltp2m.tools.symbols import Image
from xenaltp2m.types import PAGE_SIZE
from xenaltp2m.values.gfns import BATCH

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LONGEST = 60
LONGER = {"trace_calls.py": 100}
"""It makes a table."""

PRINTED = {
    "asyncio_agent.py": "2 events in 0.3 s\nCpuid: 1\nWriteCtrlreg: 1\n",
    "bulk_access.py": "gfns 0x0..0xfefff: rw-\n",
    "list_domains.py": "Xen 4.17\n    1 guest: 1 vCPU(s), altp2m external\n",
    "protect_page.py": """\
gfn 0x101 is rwx in the host p2m
gfn 0x101 is r-x in <View 1 'write-protected' of domain 1>
vCPUs and the views they run in: {0: 1}
still protected
""",
    "shadow_page.py": """\
host p2m: gfn 0x101 has 00 at 0x0
<View 1 'breakpoint' of domain 1>: gfn 0x101 shows gfn 0xff000, which has cc there
access in the view: --x
afterwards: 00, no view, no shadow page
""",
    "trace_cr3.py": """\
vCPU 0: 0x0 -> 0x5000
vCPU 0: 0x5000 -> 0x9000
vCPU 0: 0x9000 -> 0x5000
vCPU 0 went to 0x5000 2 times
vCPU 0 went to 0x9000 1 times
""",
    "trace_function.py": """\
vCPU 0: hit(0x0) called from wrong_after_hit+0x2e
vCPU 0: hit(0x0) = 0x1
vCPU 0: hit(0x1) called from wrong_after_hit+0x2e
vCPU 0: hit(0x1) = 0x4
vCPU 0: hit(0x2) called from wrong_after_hit+0x2e
vCPU 0: hit(0x2) = 0x7
3 calls
""",
    "verify_views.py": """\
asked for r-x: gfns 0xf00..0x10ff
256 are so, 256 are not
not so: from 0x1000 to 0x10ff
""",
    "watch_page.py": """\
rip 0x1000 tried R at 0x101000
rip 0x1004 tried R|W at 0x101000
rip 0x101008 tried X at 0x101008
rip 0x1000 tried R at 0x101000
""",
}


EVERY = [*PRINTED, "trace_calls.py", "count_system_calls.py", "watch_variable.py"]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_example_is_here() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(EVERY)


@pytest.mark.parametrize("name", PRINTED)
def test_example(name: str) -> None:
    done = run(name, "--connect", "mock")
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED[name]


@pytest.mark.parametrize("name", EVERY)
def test_example_is_short_and_tells_what_it_does(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= LONGER.get(name, LONGEST)
    done = run(name, "--help")
    assert done.returncode == 0
    assert "--connect {libxc,mock}" in done.stdout
    assert text.splitlines()[1].strip('"').split(".")[0] in " ".join(done.stdout.split())


def test_count_system_calls_tells_processes_apart() -> None:
    """The user code of paged.c runs in its last address space, and calls once in a pass."""
    done = run("count_system_calls.py", "--connect", "mock")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"page tables at (0x\w+)  (\d+)\n", done.stdout)
    assert found is not None
    roots = Image.open(EXAMPLES / "guest" / "paged.elf")
    symbol = roots.symbol("roots")
    assert int(found[1], 0) - roots.physical(symbol) in range(0, symbol.size, PAGE_SIZE)
    assert int(found[2]) > 1


def test_watch_variable_tells_each_value() -> None:
    """run() of racer.c counts up; the store ends at run+0x4e, as objdump says."""
    done = run("watch_variable.py", "--connect", "mock")
    assert done.returncode == 0, done.stderr
    *told, last = done.stdout.splitlines()
    assert told == [f"vCPU 1 has made it {count}, before run+0x4e" for count in range(1, 5)]
    assert re.fullmatch(r"4 writes, and [1-9]\d* beside it", last)


def test_bulk_access_shows_how_far_it_is() -> None:
    shown = run("bulk_access.py").stderr.split("\n")  # text mode: what was \r
    assert shown[:3] == ["", f"{BATCH} of 1044480 gfns", f"{2 * BATCH} of 1044480 gfns"]
    assert shown[-2:] == ["1044480 of 1044480 gfns", ""]
