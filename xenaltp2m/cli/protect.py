# SPDX-License-Identifier: LGPL-2.1-or-later
"""``protect``: run a guest in a view that protects the pages of a symbol."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.arguments import (
    add_accept,
    add_access,
    add_domain,
    add_duration,
    add_image,
    add_repeated,
    until,
)
from xenaltp2m.cli.console import Console, Table
from xenaltp2m.cli.host import BlockedSignals, begin, connect, is_altp2m_active, note_undone
from xenaltp2m.cli.pages import (
    check_loaded,
    counted,
    pages,
    run_of_gfns,
)
from xenaltp2m.tools.symbols import Image, Symbol

SUMMARY = "protect the pages of a symbol in a view, run the guest in it, then undo everything"

KEYS = """\
While the view is in place, it is checked each second. If the guest violates it, that page loses
its protection: without a monitor Xen makes it rwx (or crashes the domain, if the domain requires
a monitor).

--json prints one document once the view is in place:
  xen, backend, domid, name, image
  symbols      [{name, address, physical, size, first_gfn, count, matches}]; matches: whether the
               guest's memory equals the image (null if the guest may write to it)
  view         {id, label}
  vcpus        {vCPU: number of the view it is in}
  differences  [{first_gfn, count, host_access, access, remapped_to, suppress_ve}]: runs of gfns in
               which the view differs from the host p2m; remapped_to is the first's, or null
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_domain(parser)
    add_image(parser, required=True)
    what = "a symbol whose pages to protect"
    add_repeated(parser, "--symbol", "symbols", "NAME", what, required=True)
    add_access(parser, "rx", "what the guest may do with the pages")
    parser.add_argument(
        "--shadow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="map a copy of each page in the view (default: --shadow)",
    )
    add_duration(parser)
    add_accept(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    image = Image.open(options.image)
    symbols = [image.symbol(name) for name in dict.fromkeys(options.symbols)]
    gfns = pages(image, symbols)
    with ExitStack() as stack:
        signals = stack.enter_context(BlockedSignals())
        xen = stack.enter_context(connect(options, console, image, start=False))
        domain = stack.enter_context(xen.domain(options.domain))
        was_active = is_altp2m_active(domain, console)
        matches = {symbol.name: check_loaded(domain, image, symbol, console) for symbol in symbols}
        signals.hold_back()
        altp2m, view = stack.enter_context(_protected(domain, gfns, options, console))
        console.result(
            _document(xen, domain, image, matches, altp2m, view),
            Table(
                ("gfns", "pages", "host", "view", "shows", "symbols"),
                [_row(domain, image, symbols, difference) for difference in view.differences()],
                title=f"View {view.id} of domain {domain.domid} ({domain.name}) on Xen "
                f"{xen.release} ({xen.backend.name}): what differs from the host p2m",
            ),
        )
        if options.duration != 0:
            console.note(f"The guest runs in view {view.id} {until(options)}.")
        begin(options)
        told: set[int] = set()
        for _ in signals.awaited(options.duration):
            _watch(view, told, console)
        _watch(view, told, console)
    undone = ["vCPUs moved back", f"view {view.id} destroyed"]
    if options.shadow:
        undone.append(f"{counted(len(gfns), 'page')} removed")
    note_undone(console, *undone, was_active=was_active)


@contextlib.contextmanager
def _protected(
    domain: xa.Domain, gfns: Sequence[int], options: argparse.Namespace, console: Console
) -> Iterator[tuple[xa.Altp2m, xa.View]]:
    """Run the guest in a view that protects the pages; its writes to copies are kept."""
    copies: list[tuple[int, int, bytes]] = []
    with domain.altp2m(accept=options.accept) as altp2m:
        view = altp2m.create_view(label="protect")
        try:
            with domain.paused():
                if options.shadow:
                    progress = console.progress("copying pages")
                    for gfn, copy in zip(gfns, domain.add_pages(len(gfns)), strict=True):
                        content = domain.memory.read_page(gfn)
                        domain.memory.write_page(copy, content)
                        copies.append((gfn, copy, content))
                        view.remap(gfn, copy, access=options.access)
                        progress(len(copies), len(gfns))
                else:
                    view.set_access(gfns, options.access)
                altp2m.switch_to_view(view)
            yield altp2m, view
        finally:
            with domain.paused():
                altp2m.close()
                for gfn, copy, before in copies:
                    if _carry_over(domain.memory, gfn, copy, before):
                        console.note(f"The guest's writes to the copy of gfn {gfn:#x} are kept.")


def _carry_over(memory: xa.Memory, gfn: int, copy: int, before: bytes) -> bool:
    """Merge the changes of a copy into its page; return whether there were any."""
    now = memory.read_page(copy)
    if now == before:
        return False
    # Byte by byte, to keep what DMA or emulation has written to the page itself meanwhile.
    page = memory.read_page(gfn)
    merged = (new if new != old else kept for new, old, kept in zip(now, before, page, strict=True))
    memory.write_page(gfn, bytes(merged))
    return True


def _watch(view: xa.View, told: set[int], console: Console) -> None:
    """Warn about pages that are no longer protected, once each."""
    for mismatch in view.verify():
        if mismatch.gfn in told:
            continue
        told.add(mismatch.gfn)
        if mismatch.found is None:
            why = "Xen has reset the view, because the host p2m changed"
        else:
            why = f"now {mismatch.found}: the guest has violated the view"
        console.warn(f"gfn {mismatch.gfn:#x} is no longer {mismatch.expected}: {why}")


def _document(
    xen: xa.Xen,
    domain: xa.Domain,
    image: Image,
    matches: dict[str, bool | None],
    altp2m: xa.Altp2m,
    view: xa.View,
) -> dict[str, Any]:
    return {
        "xen": str(xen.release),
        "backend": xen.backend.name,
        "domid": domain.domid,
        "name": domain.name,
        "image": image.name,
        "symbols": [
            {
                "name": name,
                "address": image.address(name),
                "physical": image.physical(image.symbol(name)),
                "size": image.symbol(name).size,
                "first_gfn": image.gfns(name).start,
                "count": len(image.gfns(name)),
                "matches": same,
            }
            for name, same in matches.items()
        ],
        "view": {"id": view.id, "label": view.label},
        "vcpus": {str(vcpu): number for vcpu, number in altp2m.vcpu_views().items()},
        "differences": [
            {
                "first_gfn": run.first,
                "count": run.count,
                "host_access": _name(domain.host_access(run.first)),
                "access": _name(run.access),
                "remapped_to": run.remapped_to,
                "suppress_ve": run.suppress_ve,
            }
            for run in view.differences()
        ],
    }


def _row(
    domain: xa.Domain, image: Image, symbols: Sequence[Symbol], run: xa.Difference
) -> tuple[str, ...]:
    inside = [
        symbol.name
        for symbol in symbols
        if image.gfns(symbol.name).start <= run.last and run.first < image.gfns(symbol.name).stop
    ]
    shows = "its own pages" if run.count > 1 else "its own page"
    if run.remapped_to is not None:
        shows = f"copy at {run_of_gfns(run.remapped_to, run.count)}"
    return (
        run_of_gfns(run.first, run.count),
        str(run.count),
        _name(domain.host_access(run.first)) or "",
        _name(run.access) or "",
        shows,
        ", ".join(inside),
    )


def _name(access: xa.Access | None) -> str | None:
    return None if access is None else str(access)
