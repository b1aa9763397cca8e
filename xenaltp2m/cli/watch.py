# SPDX-License-Identifier: LGPL-2.1-or-later
"""``watch``: print a line for each access to pages or registers of a guest."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import xenaltp2m as xa
from xenaltp2m.cli.arguments import (
    add_accept,
    add_access,
    add_count,
    add_domain,
    add_duration,
    add_image,
    add_repeated,
    number_among,
    until,
)
from xenaltp2m.cli.console import Console, Table, printable
from xenaltp2m.cli.host import StopRequest, begin, connect, is_altp2m_active, note_undone
from xenaltp2m.cli.pages import (
    address_hint,
    check_gfns,
    check_loaded,
    counted,
    pages,
    runs_of_gfns,
)
from xenaltp2m.cli.run_limits import RunLimits
from xenaltp2m.tools.symbols import Image
from xenaltp2m.types import GFN_LIMIT, PAGE_SHIFT

SUMMARY = "watch pages and registers of a guest: a line for each hit, then undo everything"

KEYS = """\
Pages are watched in a view of their own, which all vCPUs are moved to: each access that the view
does not allow stops its vCPU, is reported, and is then executed by a single-step in view 0. The
host p2m is not changed, so other views and the guest's devices notice nothing.

ACCESS is the access to the pages that is allowed, and therefore not reported. By default that is
reading (r), which changes nothing and is the most frequent: writes and fetches are reported. Use n
to report reads, too. For bytes, with --bytes or --exact, fetches are never reported, and ACCESS is
r or n. rx reports writes only, x reads and writes, rw fetches. With n2rwx, a page's first access of
any kind is reported, and nothing after it. r_pw is r, but lets the CPU's own page walk set accessed
and dirty bits (Xen 4.20 and later).

A gfn above the domain's highest is an error, and so is watching only gfns without ordinary memory;
a warning lists single pages that cannot be watched.

A line has: seconds since the start, vCPU, its view, the event, the place, the access tried (rwx; a
write counts as a read, too), the instruction (rip), the address it used (gla); with --image the
symbols these lie in.

It ends after --duration or --count, with the domain, on Ctrl-C or SIGTERM, and when its output is
closed; all of these undo everything.

--json prints one object in a line for each hit:
  time         Unix time
  event        MemAccess, WriteCtrlreg, MovToMsr, Cpuid, SoftwareBreakpoint; last DomainEnded
               if the domain has ended, with its shutdown_reason
  vcpu, view   numbers
  gfn, offset, gla, access_flags    of a MemAccess; the fields of other events by Xen's names
  tried        "r--", "rw-", "--x": of a MemAccess
  rip          the instruction
  symbol       the symbol that rip lies in, and
  target       the symbol that gla lies in: with --image, or null
  registers    {name: value}, with --registers
and a last line {"summary": {...}}:
  hits, seconds, rate    in all
  by_event, by_vcpu      {name or number: hits}
  by_gfn                 {gfn: {tried: hits}}
  passed                 with --bytes or --exact: the number of other accesses to the same pages
"""

_Kind: TypeAlias = xa.Subscription | type[xa.Event]
_OF_BYTES = (xa.Access.R, xa.Access.N)
_MOST_PAGES = 1 << 20
_MOST_BYTES = 1 << 20
_MOST_VERIFIED = 1 << 12
_MOST_ROWS = 20
_TICK_SECONDS = 0.25
_VERIFY_SECONDS = 5.0
_REGISTERS_IN_A_ROW = 6
_MSR_LIMIT = 1 << 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.set_defaults(usage_error=parser.error)
    add_domain(parser)
    what = "watch a page, or the pages from A to B; 0x for hexadecimal"
    add_repeated(parser, "--gfn", "gfns", "N|A-B", what, type=_gfns)
    what = "watch all pages of a symbol of the image"
    add_repeated(parser, "--symbol", "symbols", "NAME", what)
    parser.add_argument(
        "--exact",
        action="store_true",
        help="of a symbol, only its own bytes; other accesses to its pages are counted",
    )
    what = "watch bytes by their guest-physical address"
    add_repeated(parser, "--bytes", "bytes", "ADDRESS:LENGTH", what, type=_bytes)
    add_image(parser)
    add_access(parser, "r", "the access that is not reported", without=("rwx", "rx2rw"))
    parser.add_argument("--cr3", action="store_true", help="report new values of CR3")
    what = "report new values of a model-specific register"
    add_repeated(parser, "--msr", "msrs", "N", what, type=_msr)
    parser.add_argument("--cpuid", action="store_true", help="report CPUID")
    parser.add_argument(
        "--breakpoints",
        action="store_true",
        help="report int3, which the guest's own handler then gets",
    )
    parser.add_argument(
        "--registers", action="store_true", help="print the vCPU's registers at each hit"
    )
    add_duration(parser)
    add_count(parser, "hits")
    add_accept(parser)


def _gfns(text: str) -> range:
    first, dash, last = text.partition("-")
    try:
        found = range(int(first, 0), int(last if dash else first, 0) + 1)
    except ValueError:
        found = range(0)
    if not found or found.start < 0 or found.stop > GFN_LIMIT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a gfn nor a range A-B of them, below {GFN_LIMIT:#x}"
        )
    if len(found) > _MOST_PAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MOST_PAGES} pages")
    return found


def _bytes(text: str) -> tuple[int, int]:
    address, _, length = text.partition(":")
    with contextlib.suppress(ValueError):
        found = int(address, 0), int(length, 0)
        if 0 <= found[0] < GFN_LIMIT << PAGE_SHIFT and 0 < found[1] <= _MOST_BYTES:
            return found
    raise argparse.ArgumentTypeError(
        f"{text!r} is not ADDRESS:LENGTH, with 1 to {_MOST_BYTES} bytes"
    )


def _msr(text: str) -> int:
    return number_among(text, range(_MSR_LIMIT), "the number of an MSR")


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    kinds, image, ranges, gfns = _wanted(options)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        xen = stack.enter_context(
            connect(
                options, console, image, partial(_script, gfns, options.msrs, image), start=False
            )
        )
        domain = stack.enter_context(xen.domain(options.domain))
        check_gfns(domain, gfns)
        was_active = is_altp2m_active(domain, console) if gfns or ranges else True
        for name in dict.fromkeys(options.symbols):
            assert image is not None
            check_loaded(domain, image, image.symbol(name), console)
        stop.hold_back()
        altp2m = None
        if gfns or ranges:
            altp2m = stack.enter_context(domain.altp2m(accept=options.accept))
        view = breakpoints = None
        with domain.paused():  # so that nothing happens before all is watched
            monitor = stack.enter_context(domain.monitor(*kinds))
            stop.wake = monitor.stop
            if altp2m is not None and ranges:
                breakpoints = stack.enter_context(xa.Breakpoints(altp2m, monitor))
            elif altp2m is not None:
                view = altp2m.create_view(label="watch")
                view.set_access(gfns, options.access, progress=console.progress("protecting"))
                if len(kinds) == 1:
                    _check_watched(domain, view, gfns, options.access)
                altp2m.switch_to_view(view)
            course = RunLimits(options, xen.backend.clock, "hit")
            watch = _Watch(options, console, course, image, view, breakpoints)
            watch.watch_bytes(ranges)
        _tell_start(domain, gfns, ranges, options, console, view)
        watch.check_view()
        begin(options)
        watch.listen(monitor, stop)
    undone = ["monitor closed"]
    if view is not None:
        undone += ["vCPUs moved back", f"view {view.id} destroyed"]
    if breakpoints is not None:
        undone += ["vCPUs moved back", "views destroyed"]
    note_undone(console, *undone, was_active=was_active)
    watch.sum_up()


def _check_watched(
    domain: xa.Domain, view: xa.View, gfns: Sequence[int], access: xa.Access
) -> None:
    """Refuse to watch only gfns that Xen skips, because they are not ordinary memory."""
    if not any(view.effective_access(gfn) == access for gfn in gfns):
        shown = ", ".join(runs_of_gfns(gfns)[:4])
        raise xa.NotMappedError(
            f"there is nothing to watch: gfn {shown} is not ordinary memory",
            domid=domain.domid,
            gfn=xa.Gfn(gfns[0]),
            hint=address_hint(gfns[0]),
        )


class _Wanted(NamedTuple):
    """The parsed arguments: what to watch."""

    kinds: list[_Kind]
    image: Image | None
    ranges: list[tuple[int, int]]
    """Ranges of bytes: address, length."""
    gfns: list[int]


def _wanted(options: argparse.Namespace) -> _Wanted:
    if options.symbols and options.image is None:
        options.usage_error("--symbol needs --image")
    kinds = _kinds(options)
    if not (options.gfns or options.symbols or options.bytes or len(kinds) > 1):
        options.usage_error(
            "nothing to watch: give --gfn, --symbol, --bytes, --cr3, --msr, --cpuid, --breakpoints"
        )
    image = None if options.image is None else Image.open(options.image)
    ranges = _ranges(options, image)
    gfns = _pages(options, image)
    if ranges and gfns:
        options.usage_error("watch either bytes or whole pages")
    if ranges and options.access not in _OF_BYTES:
        options.usage_error("for bytes, use --access r to report writes, --access n for reads, too")
    return _Wanted(kinds, image, ranges, gfns)


def _kinds(options: argparse.Namespace) -> list[_Kind]:
    kinds: list[_Kind] = [xa.MemAccess]
    if options.cr3:
        kinds.append(xa.WriteCtrlreg.on(xa.ControlRegister.CR3))
    kinds += [xa.MovToMsr.on(msr) for msr in dict.fromkeys(options.msrs)]
    if options.cpuid:
        kinds.append(xa.Cpuid)
    if options.breakpoints:
        kinds.append(xa.SoftwareBreakpoint)
    return kinds


def _ranges(options: argparse.Namespace, image: Image | None) -> list[tuple[int, int]]:
    found = list(options.bytes)
    if image is not None and options.exact:
        symbols = [image.symbol(name) for name in dict.fromkeys(options.symbols)]
        found += [(image.physical(symbol), max(symbol.size, 1)) for symbol in symbols]
    return found


def _pages(options: argparse.Namespace, image: Image | None) -> list[int]:
    wanted = set().union(*options.gfns)
    if image is not None and not options.exact:
        symbols = [image.symbol(name) for name in dict.fromkeys(options.symbols)]
        wanted.update(pages(image, symbols))
    if len(wanted) > _MOST_PAGES:
        options.usage_error(f"{len(wanted)} pages: at most {_MOST_PAGES} can be watched")
    return sorted(wanted)


def _script(gfns: Sequence[int], msrs: Sequence[int], image: Image | None, pages: int) -> Any:
    from xenaltp2m.cli import script

    return script.program(pages, gfns, msrs, image)


def _tell_start(
    domain: xa.Domain,
    gfns: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    options: argparse.Namespace,
    console: Console,
    view: xa.View | None,
) -> None:
    end = until(options, "hit")
    if view is None:
        parts = [f"{counted(length, 'byte')} at {address:#x}" for address, length in ranges[:4]]
        parts += ["..."] if len(ranges) > 4 else []
        what = f"{', '.join(parts)} of " if parts else ""
        console.note(f"Watching {what}domain {domain.domid} ({domain.name}) {end}.")
        return
    runs = runs_of_gfns(gfns)
    shown = ", ".join(runs[:4])
    if len(runs) > 4:
        shown += ", ..."
    console.note(
        f"Watching gfn {shown} of domain {domain.domid} ({domain.name}) in view {view.id}, "
        f"with access {options.access}, {end}."
    )


class _Watch:
    """Answers, prints and counts hits."""

    def __init__(
        self,
        options: argparse.Namespace,
        console: Console,
        course: RunLimits,
        image: Image | None,
        view: xa.View | None,
        breakpoints: xa.Breakpoints | None,
    ) -> None:
        self._breakpoints = breakpoints
        self._watches: list[xa.Watchpoint] = []
        self._touched = False
        self._tells_int3 = options.breakpoints
        self._console = console
        self._image = image
        self._view = view
        self._access = options.access
        self._registers = options.registers
        self._once_in_view_0 = None
        if view is not None:
            self._once_in_view_0 = xa.Response.fast_singlestep(through=0, back_to=view)
        self._course = course
        self._counted: Counter[tuple[str, int | None, str, int]] = Counter()
        """Hits by event, gfn, access tried, and vCPU."""
        self._told: set[int] = set()
        self._next_tick = self._next_check = 0.0

    def watch_bytes(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Insert watchpoints for ranges of bytes."""
        if self._breakpoints is None:
            return
        reads = xa.Access.R not in self._access
        for address, length in ranges:
            made = self._breakpoints.watch(address, length, self._note_touch, reads=reads)
            self._watches.append(made)

    def _note_touch(self, _touch: xa.WatchpointHit) -> None:
        self._touched = True

    # Events.

    def listen(self, monitor: xa.Monitor, stop: StopRequest) -> None:
        """Answer events until a limit is reached."""
        view_id = -1 if self._view is None else self._view.id
        going_on = True
        while going_on and not stop.came and (left := self._course.left) > 0:
            # Closed explicitly: the garbage collector would drop an exception raised on closing.
            with contextlib.closing(monitor.events(min(left, _TICK_SECONDS))) as events:
                for event in events:
                    if type(event) is xa.MemAccess and event.paused and event.view == view_id:
                        assert self._once_in_view_0 is not None
                        event.reply(self._once_in_view_0)
                    if self._is_told(event):
                        stop.printing(partial(self._take, event))
                    going_on = not isinstance(event, xa.DomainEnded)
                    if stop.came or not going_on or self._course.left <= 0:
                        break
                    if self._course.passed >= self._next_tick:
                        self._tick(stop)
            if going_on:
                self._tick(stop)
        self._course.end()
        self._console.status("")

    def _is_told(self, event: xa.Event) -> bool:
        """Answer an event of watched bytes; return whether an event is to be printed."""
        if self._breakpoints is None:
            return True
        self._touched = False
        response = self._breakpoints(event)
        if response is None:
            return True
        event.reply(response)
        return self._touched or (self._tells_int3 and isinstance(event, xa.SoftwareBreakpoint))

    def _take(self, event: xa.Event) -> None:
        if not isinstance(event, xa.DomainEnded):
            self._course.told += 1
            what: tuple[str, int | None, str] = (type(event).__name__, None, "")
            if isinstance(event, xa.MemAccess):
                what = (what[0], event.gfn, _tried(event))
            self._counted[*what, event.vcpu] += 1
        if self._console.as_json:
            self._console.line(json.dumps(self._document(event)))
        else:
            self._console.line(self._text(event, self._course.passed))

    def _tick(self, stop: StopRequest) -> None:
        now = self._course.passed
        self._next_tick = now + _TICK_SECONDS
        status = self._course.status(self._course.told)
        stop.printing(partial(self._console.status, status))
        if now >= self._next_check:
            self.check_view()

    def check_view(self) -> None:
        """Restore what Xen has reset, and warn, once for each page.

        With many pages this would take too long; they are not checked.
        """
        self._next_check = self._course.passed + _VERIFY_SECONDS
        if self._breakpoints is not None:
            self._warn_of(sorted(self._breakpoints.verify()))
        view = self._view
        if view is None or self._access is xa.Access.N2RWX:
            return
        if sum(run.count for run in view.differences()) > _MOST_VERIFIED:
            return
        lost = [mismatch.gfn for mismatch in view.verify()]
        if not lost:
            return
        view.set_access(lost, self._access)
        still = {mismatch.gfn for mismatch in view.verify()}
        new = sorted(set(lost) - self._told)
        self._told.update(new)
        for shown in runs_of_gfns(gfn for gfn in new if gfn in still):
            self._console.warn(f"gfn {shown} is not watched: it is not ordinary memory")
        self._warn_of(gfn for gfn in new if gfn not in still)

    def _warn_of(self, gfns: Iterable[int]) -> None:
        for shown in runs_of_gfns(gfns):
            self._console.warn(
                f"gfn {shown} was not watched for a while: Xen has reset it, because the host "
                "p2m changed; it is watched again"
            )

    # Output.

    def _document(self, event: xa.Event) -> dict[str, Any]:
        told = {"time": round(time.time(), 6), **event.as_dict()}
        if isinstance(event, xa.DomainEnded):
            del told["vcpu"], told["view"]
            return told
        if isinstance(event, xa.MemAccess):
            told["tried"] = _tried(event)
        told["rip"] = event.registers.rip
        if self._image is not None:
            told["symbol"] = self._symbol(event.registers.rip_va)
            if isinstance(event, xa.MemAccess):
                told["target"] = self._symbol(_va_space(event))
        if self._registers:
            told["registers"] = event.registers.as_dict()
        return told

    def _text(self, event: xa.Event, passed: float) -> str:
        if isinstance(event, xa.DomainEnded):
            return f"{passed:11.6f}  {event}"
        view = "-" if event.view is None else event.view
        parts = [f"{passed:11.6f}", f"vCPU {event.vcpu}", f"view {view}", type(event).__name__]
        if isinstance(event, xa.MemAccess):
            parts += [f"gfn {event.gfn:#x}", f"offset {event.offset:#05x}", _tried(event)]
        else:
            told = event.as_dict()
            parts += [f"{name} {_word(told[name])}" for name in event.fields]
        parts.append(self._place("rip", event.registers.rip_va))
        if isinstance(event, xa.MemAccess) and (va := _va_space(event)) is not None:
            parts.append(self._place("gla", va))
        return "\n".join(["  ".join(parts), *(self._register_rows(event))])

    def _register_rows(self, event: xa.Event) -> Iterator[str]:
        if not self._registers:
            return
        shown = [f"{name}={value:#x}" for name, value in event.registers.as_dict().items()]
        for at in range(0, len(shown), _REGISTERS_IN_A_ROW):
            yield " " * 13 + " ".join(shown[at : at + _REGISTERS_IN_A_ROW])

    def _place(self, what: str, address: int) -> str:
        symbol = self._symbol(address)
        return f"{what} {address:#x}" + (f" ({symbol})" if symbol else "")

    def _symbol(self, address: int | None) -> str | None:
        if self._image is None or address is None:
            return None
        found = self._image.locate(address)
        return None if found is None else printable(str(found))

    def sum_up(self) -> None:
        """Print the summary: the number of hits, by kind."""
        course = self._course
        if self._console.as_json:
            document = {
                "hits": course.told,
                "seconds": round(course.passed, 6),
                "rate": round(course.rate(course.told), 3),
                "by_event": self._by(0),
                "by_vcpu": self._by(3),
                "by_gfn": self._by_gfn(),
            }
            if self._watches:
                document["passed"] = sum(watch.passed for watch in self._watches)
            self._console.line(json.dumps({"summary": document}))
            return
        title = course.title(course.told)
        if course.told:
            self._console.line("")
            self._console.table(
                Table(("what", "hits", "tried", "vCPUs"), self._rows(), title=title)
            )
        else:
            self._console.line(title)
        if self._watches:
            passed_by = sum(watch.passed for watch in self._watches)
            self._console.line(f"{passed_by} other accesses to the same pages")

    def _by(self, part: int) -> dict[str, int]:
        found: Counter[Any] = Counter()
        for key, hits in self._counted.items():
            found[key[part]] += hits
        return {str(name): found[name] for name in sorted(found)}

    def _by_gfn(self) -> dict[str, dict[str, int]]:
        found: dict[int, Counter[str]] = {}
        for (_, gfn, tried, _), hits in self._counted.items():
            if gfn is not None:
                found.setdefault(gfn, Counter())[tried] += hits
        return {str(gfn): dict(sorted(found[gfn].items())) for gfn in sorted(found)}

    def _rows(self) -> list[tuple[str, ...]]:
        rows: dict[str, tuple[Counter[str], Counter[int]]] = {}
        for (event, gfn, tried, vcpu), hits in self._counted.items():
            name = event if gfn is None else f"gfn {gfn:#x}"
            by_tried, by_vcpu = rows.setdefault(name, (Counter(), Counter()))
            by_tried[tried] += hits
            by_vcpu[vcpu] += hits
        ordered = sorted(rows.items(), key=lambda row: -row[1][1].total())
        shown: list[tuple[str, ...]] = [
            (
                name,
                str(by_vcpu.total()),
                ", ".join(f"{tried} {hits}" for tried, hits in sorted(by_tried.items()) if tried),
                ", ".join(f"{vcpu}: {hits}" for vcpu, hits in sorted(by_vcpu.items())),
            )
            for name, (by_tried, by_vcpu) in ordered[:_MOST_ROWS]
        ]
        if more := ordered[_MOST_ROWS:]:
            hits = sum(by_vcpu.total() for _, (_, by_vcpu) in more)
            shown.append((f"{len(more)} more", str(hits), "", ""))
        return shown


def _tried(event: xa.MemAccess) -> str:
    return str(xa.Access(event.access_flags & xa.Access.RWX.value))  # the bits are the same


def _va_space(event: xa.MemAccess) -> int | None:
    return event.gla if event.access_flags & xa.AccessFlag.GLA_VALID else None


def _word(value: object) -> str:
    return f"{value:#x}" if type(value) is int else str(value)
