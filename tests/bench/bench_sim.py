# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fast the simulator runs a guest, against Unicorn alone running the same machine code.

The guest (``loop.S``) makes passes of 10 000 instructions: arithmetic, memory, calls. Unicorn
alone runs it in two ways: by its own MMU, and told the rights of pages as the simulator tells it,
which lets it write faster, for it then need not look for code in every page that is written to.
Figures of one run compare with each other; those of different runs, or machines, do not.

    python tests/bench/bench_sim.py [--json] [--rounds N] [--passes N] [--events N]
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ratios import Ratio, shortest, timed

unicorn: Any = importlib.import_module("unicorn")  # which has no types

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import xenaltp2m as xa  # noqa: E402 - found by the line above
from xenaltp2m.backend.mock import MockBackend  # noqa: E402
from xenaltp2m.tools.symbols import Image  # noqa: E402

GUESTS = ROOT / "examples" / "guest"
IN_A_PASS = 10_000
MEMORY = 16 << 20
HLT = b"\xf4"
TARGET = 0.9
"""Of the speed of Unicorn by its own MMU: what a guest without a hook should reach."""

OWN_MMU, TOLD = "Unicorn by its own MMU", "Unicorn told the rights"
UNHOOKED, COUNTING, HOOKED = "simulator", "simulator, counting", "simulator, a hit each 10 000"
EACH = "simulator, a hit each instruction, fast"


def build(directory: Path) -> Path | None:
    """Assemble the guest; None where there is no gcc that knows -m32."""
    if shutil.which("gcc") is None:
        return None
    image = directory / "loop.elf"
    flags = "-m32 -march=i686 -nostdlib -static -no-pie -Wl,--nmagic -Wl,--build-id=none"
    sources = [Path(__file__).parent / "loop.S", GUESTS / "start.S"]
    command: list[str | Path] = [
        "gcc",
        *flags.split(),
        f"-Wl,-T,{GUESTS / 'flat.ld'}",
        f"-I{GUESTS}",
        *sources,
    ]
    done = subprocess.run([*command, "-o", image], check=False, capture_output=True)
    return image if done.returncode == 0 else None


def bare(image: Image, passes: int, *, told_rights: bool) -> float:
    """Seconds that Unicorn alone takes."""
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    uc.mem_map(0, MEMORY)
    for segment in image.segments:
        uc.mem_write(segment.address, segment.data)
    uc.mem_write(image.address("passes"), passes.to_bytes(4, "little"))
    if told_rights:
        code = {gfn for name in ("_start", "hooked") for gfn in image.gfns(name)}

        def fill(_uc: Any, address: int, _access: int, entry: Any, _data: Any) -> bool:
            entry.paddr = address // xa.PAGE_SIZE * xa.PAGE_SIZE
            entry.perms = unicorn.unicorn_const.UC_PROT_READ
            executed = address // xa.PAGE_SIZE in code
            entry.perms |= (
                unicorn.unicorn_const.UC_PROT_EXEC
                if executed
                else unicorn.unicorn_const.UC_PROT_WRITE
            )
            return True

        uc.ctl_set_tlb_mode(unicorn.unicorn_const.UC_TLB_VIRTUAL)
        uc.hook_add(unicorn.unicorn_const.UC_HOOK_TLB_FILL, fill)
    start = image.address("_start")
    end = start + image.segment(image.symbol("_start")).data.index(HLT)
    spent = timed(lambda: uc.emu_start(start, end))
    assert not any(uc.mem_read(image.address("passes"), 4))
    return spent


class Simulated:
    """The guest in the simulator, paused before its first instruction."""

    def __init__(self, path: Path, image: Image, passes: int) -> None:
        self.mock = MockBackend()
        self.mock.steps_at_once = None
        domid = self.mock.add_domain("loop", memory_kib=MEMORY // 1024)
        self.mock.boot(domid, path)
        self.stack = ExitStack()
        self.xen = self.stack.enter_context(xa.connect(self.mock))
        self.domain = self.stack.enter_context(self.xen.domain(domid))
        self.domid, self.image = domid, image
        self._passes = image.address("passes")
        self.domain.memory.write(self._passes, passes.to_bytes(4, "little"))

    def go(self) -> None:
        """Run until it halts, or waits for an agent."""
        self.mock.domain_unpause(self.domid)

    def ended(self) -> bool:
        """Whether it has made all passes."""
        return not any(self.domain.memory.read(self._passes, 4))


def unhooked(path: Path, image: Image, passes: int, *, counted: bool) -> float:
    """Seconds that the simulator takes where nobody listens."""
    guest = Simulated(path, image, passes)
    if counted:
        guest.mock.steps_at_once = passes * IN_A_PASS
    with guest.stack:
        spent = timed(guest.go)
        assert guest.ended()
    return spent


def hooked(path: Path, image: Image, passes: int) -> float:
    """Seconds where an agent hears of one instruction in each pass."""
    guest = Simulated(path, image, passes)
    hits = 0
    with guest.stack, guest.domain.altp2m() as altp2m, guest.domain.monitor(xa.MemAccess) as heard:
        view = altp2m.create_view()
        view.set_access(image.gfns("hooked"), xa.Access.RW)
        altp2m.switch_to_view(view)
        step = xa.Response.fast_singlestep(through=0, back_to=view)

        def handler(event: xa.Event) -> xa.Response:
            nonlocal hits
            hits += 1
            if hits == passes:
                heard.stop()
            return step

        def run() -> None:
            guest.go()
            heard.run(handler)

        spent = timed(run)
    assert hits == passes
    return spent


def stepped(path: Path, image: Image, events: int, *, fast: bool) -> float:
    """Seconds for so many events of a guest that trips on every instruction."""
    guest = Simulated(path, image, events)
    left = events
    with (
        guest.stack,
        guest.domain.altp2m() as altp2m,
        guest.domain.monitor(xa.MemAccess, xa.Singlestep) as monitor,
    ):
        view = altp2m.create_view()
        view.set_access({*image.gfns("_start"), *image.gfns("hooked")}, xa.Access.RW)
        altp2m.switch_to_view(view)
        step, back = xa.Response.singlestep(view=0), xa.Response.resume(view=view)
        if fast:
            step = xa.Response.fast_singlestep(through=0, back_to=view)

        def handler(event: xa.Event) -> xa.Response:
            nonlocal left
            left -= 1
            if not left:
                monitor.stop()
            return step if isinstance(event, xa.MemAccess) else back

        def run() -> None:
            guest.go()
            monitor.run(handler)

        spent = timed(run)
        guest.mock.steps_at_once = 0
    assert not left
    return spent


def measure(path: Path, rounds: int, passes: int, events: int) -> dict[str, Any]:
    """All figures; of each the best round, the least disturbed."""
    image = Image.open(path)
    few = max(passes // 10, 1)
    running = shortest(
        {
            OWN_MMU: partial(bare, image, passes, told_rights=False),
            TOLD: partial(bare, image, passes, told_rights=True),
            UNHOOKED: partial(unhooked, path, image, passes, counted=False),
            COUNTING: partial(unhooked, path, image, few, counted=True),
            HOOKED: partial(hooked, path, image, few),
        },
        rounds,
    )
    for name in (COUNTING, HOOKED):
        running[name] *= passes / few
    stepping = shortest(
        {
            name: partial(stepped, path, image, events, fast=fast)
            for name, fast in (("toggle", False), ("fast", True))
        },
        rounds,
    )
    return {
        "python": sys.version.split()[0],
        "unicorn": unicorn.__version__,
        "running": {
            name: {
                "instructions_per_second": passes * IN_A_PASS / spent,
                "of_own_mmu": running[OWN_MMU] / spent,
                "of_told_rights": running[TOLD] / spent,
            }
            for name, spent in running.items()
        },
        "events_per_second": {name: events / spent for name, spent in stepping.items()},
    }


def ratios(figures: Any) -> list[Ratio]:
    """What the figures come to."""
    rates = figures["events_per_second"]
    running = figures["running"]
    return [
        *(
            Ratio(name, peer, running[name][key])
            for peer, key in ((OWN_MMU, "of_own_mmu"), (TOLD, "of_told_rights"))
            for name in (UNHOOKED, COUNTING, HOOKED)
        ),
        *(
            Ratio(EACH, peer, rates["fast"] / running[peer]["instructions_per_second"])
            for peer in (OWN_MMU, TOLD)
        ),
        # An instruction takes two events there, and one here.
        Ratio(EACH, "toggle", 2 * rates["fast"] / rates["toggle"]),
    ]


def report(figures: Any) -> str:
    """Put the figures in words."""
    lines = ["                               million instructions a second   of own MMU   of told"]
    for name, row in figures["running"].items():
        speed = row["instructions_per_second"] / 1e6
        lines.append(
            f"  {name:30} {speed:27.1f} {row['of_own_mmu']:12.2f} {row['of_told_rights']:9.2f}"
        )
    lines.append(f"  without a hook the aim is {TARGET} of its own MMU")
    lines.append("a guest that trips on every instruction")
    for name, rate in figures["events_per_second"].items():
        lines.append(f"  {name:30} {rate:10.0f} events a second")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; exit 1 if a guest without a hook is too slow."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs to choose from")
    parser.add_argument("--passes", type=int, default=5000, metavar="N", help="of the guest")
    parser.add_argument("--events", type=int, default=5000, metavar="N", help="single steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = build(Path(directory))
        if path is None:
            print("bench: no gcc that knows -m32 to build the guest with", file=sys.stderr)
            return 0
        figures = measure(path, options.rounds, options.passes, options.events)
    figures["ratios"] = [ratio._asdict() for ratio in ratios(figures)]
    print(json.dumps(figures, indent=2) if options.json else report(figures))
    return int(figures["running"][UNHOOKED]["of_own_mmu"] < TARGET)


if __name__ == "__main__":
    sys.exit(main())
