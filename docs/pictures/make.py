# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the pictures of the docs anew, from real runs: ``make pictures``."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.symbols import Image
from xenaltp2m.viewpicture import svg

HERE = Path(__file__).parent
CHECKER = HERE.parents[1] / "examples" / "guest" / "checker.elf"
HITS = 100


def views() -> str:
    """Hook a simulated guest, let it run, and draw its views while the hooks are there."""
    image, mock = Image.open(CHECKER), MockBackend()
    domid = mock.add_domain("checker", memory_kib=16 << 10)
    mock.boot(domid, CHECKER)
    with (
        xa.connect(mock) as xen,
        xen.domain(domid) as dom,
        dom.altp2m() as altp2m,
        dom.monitor() as monitor,
        xa.Breakpoints(altp2m, monitor) as breakpoints,
    ):
        hits = count(1)

        def note(_: xa.Hit) -> None:
            if next(hits) == HITS:
                monitor.stop()

        for name in ("main", "target", "target2"):
            breakpoints.insert(image.physical(image.symbol(name)), note)
        data = altp2m.create_view(label="read only")
        data.set_access(range(0x103, 0x107), xa.Access.R)
        data.set_access(range(0x400, 0xC00), xa.Access.N2RWX)
        data.set_suppress_ve(range(0x103, 0x105), False)
        data.set_visibility(False)
        mock.domain_unpause(domid)
        monitor.run(breakpoints)
        return svg(altp2m.capture(verify=True))


def main() -> None:
    """Write them all."""
    for name, text in {"views.svg": views()}.items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(HERE / name)


if __name__ == "__main__":
    main()
