# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: parses, calls the public API, prints. Nothing depends on it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import xenaltp2m as xa
from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.symbols import Image, Segment, Symbol
from xenaltp2m.view import Progress

DONE, REFUSED, USAGE, LEFTOVER, INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = """\
exit codes:
  0    done; what was to be undone is undone, after Ctrl-C and SIGTERM, too
  1    refused: by Xen, by the domain's configuration, or there is no such domain or library
  2    wrong arguments, or an image that cannot be used
  3    something could not be undone; the message says what is still in place
  130  interrupted before anything was changed
"""

_LIST_KEYS = """\
--json prints {"xen", "backend", "domains": [...]}, each domain with
  domid, name, uuid, type ("hvm", which PVH counts as, or "pv"), state, memory_kib, vcpus,
  altp2m_mode (null for PV), altp2m_active (null where Xen or the domain has no altp2m)
"""

_PROTECT_KEYS = """\
While it holds, the guest is watched: what it does against the view lifts the protection of that
page, for Xen makes it rwx when no monitor listens (or crashes the domain where one is required).

--json prints one document once the view is in place:
  xen, backend, domid, name, image
  symbols      [{name, address, physical, size, first_gfn, count, matches}]; matches tells whether
               the guest's memory is what the image says (null where the guest may write to it)
  view         {id, label}
  vcpus        {vCPU: number of the view it is in}
  differences  [{first_gfn, count, host_access, access, remapped_to, suppress_ve}]: runs of gfns in
               which the view differs from the host p2m; remapped_to is the first's, or null
"""

_ACCESSES = {
    name: xa.Access[name.upper()]
    for name in ("n", "r", "x", "rw", "rx", "rwx", "rx2rw", "n2rwx", "r_pw")
}
_MOCK_DOMAIN = "guest"
_MOCK_VCPUS = 2
_MIB = 1 << 20
_MOCK_MEMORY = 16 * _MIB
_MOCK_MEMORY_LIMIT = 2048 * _MIB
_SHUTDOWN_CRASH = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; those of the process if None.

    Returns:
        The exit code; ``xenaltp2m --help`` lists them.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.xen is not None and options.connect != "mock":
        parser.error("--xen chooses the mock's release: add --connect mock")
    console = _Console(options.json, options.quiet)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: console.warn(str(message))
            options.command(options, console)
    except xa.XenError as error:
        console.error(error)
        return _exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on; Python's flush at exit must not complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    return DONE


def _exit_code(error: xa.XenError) -> int:
    if isinstance(error, xa.LeftoverError) or getattr(error, "__notes__", None):
        return LEFTOVER
    return USAGE if isinstance(error, xa.SymbolError) else REFUSED


# Arguments.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xenaltp2m",
        description="Alternate views of a guest's physical memory (Xen altp2m).",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {xa.__version__}")
    _add_common(parser)
    parser.set_defaults(connect="libxc", xen=None, json=False, quiet=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(added)
        added.set_defaults(command=run)
        return added

    command("list", _list, "list the domains and their altp2m", _LIST_KEYS)
    protect = command(
        "protect",
        _protect,
        "protect the pages of a symbol in a view, run the guest in it, then undo everything",
        _PROTECT_KEYS,
    )
    protect.add_argument("domain", metavar="DOMAIN", help="a domid, a name or a uuid")
    protect.add_argument(
        "--image", required=True, metavar="ELF", help="the guest's image, for its symbols"
    )
    protect.add_argument(
        "--symbol",
        required=True,
        action="append",
        dest="symbols",
        metavar="NAME",
        help="what to protect, all pages of it; may be given again",
    )
    protect.add_argument(
        "--access",
        type=_access,
        default=xa.Access.RX,
        metavar="ACCESS",
        help=f"what the guest may do there: {', '.join(_ACCESSES)} (default: rx)",
    )
    protect.add_argument(
        "--shadow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the view show a copy of each page (default: --shadow)",
    )
    protect.add_argument(
        "--hold",
        type=_seconds,
        metavar="SECONDS",
        help="how long to hold it (default: until Ctrl-C)",
    )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add what may stand before the command as well as after it."""
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--connect",
        choices=("libxc", "mock"),
        default=absent,
        help=f"the Xen this runs on (default), or a mock of it with one domain, {_MOCK_DOMAIN!r}",
    )
    parser.add_argument(
        "--xen",
        type=_release,
        default=absent,
        metavar="RELEASE",
        help="the mock's release, 4.14 to 4.22 (default: 4.17)",
    )
    parser.add_argument(
        "--json", action="store_true", default=absent, help="print one JSON document"
    )
    parser.add_argument(
        "--quiet", action="store_true", default=absent, help="no progress and no remarks on stderr"
    )


def _release(text: str) -> tuple[int, int]:
    for version in SUPPORTED:
        if text == f"{version[0]}.{version[1]}":
            return version
    raise argparse.ArgumentTypeError(f"{text!r} is not one of 4.14 to 4.22")


def _access(text: str) -> xa.Access:
    try:
        return _ACCESSES[text]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_ACCESSES)}") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


# Commands.


def _list(options: argparse.Namespace, console: _Console) -> None:
    with _connect(options, console) as xen:
        domains = []
        for info in xen.domains():
            with contextlib.suppress(xa.DomainNotFoundError), xen.domain(info.domid) as domain:
                domains.append(_facts(domain, info))
        console.result(
            {"xen": str(xen.release), "backend": xen.backend.name, "domains": domains},
            _Table(
                ("id", "name", "type", "state", "memory", "vCPUs", "altp2m", "active"),
                [
                    (
                        str(facts["domid"]),
                        facts["name"] or "",
                        facts["type"],
                        facts["state"],
                        f"{facts['memory_kib'] * 1024 // _MIB} MiB",
                        str(facts["vcpus"]),
                        facts["altp2m_mode"] or "",
                        {True: "yes", False: "no", None: ""}[facts["altp2m_active"]],
                    )
                    for facts in domains
                ],
            ),
        )


def _facts(domain: xa.Domain, info: xa.DomainInfo) -> dict[str, Any]:
    mode = active = None
    if info.hvm:
        with contextlib.suppress(xa.UnsupportedError, xa.InvalidArgumentError):
            mode = domain.altp2m_mode.name.lower()
        with contextlib.suppress(xa.UnsupportedError, xa.InvalidArgumentError):
            active = domain.altp2m_active
    return {
        "domid": info.domid,
        "name": domain.name,
        "uuid": str(info.uuid),
        "type": "hvm" if info.hvm else "pv",
        "state": _state(info),
        "memory_kib": info.pages * xa.PAGE_SIZE // 1024,
        "vcpus": info.vcpus,
        "altp2m_mode": mode,
        "altp2m_active": active,
    }


def _state(info: xa.DomainInfo) -> str:
    if info.dying:
        return "dying"
    if info.shutdown:
        return "crashed" if info.shutdown_reason == _SHUTDOWN_CRASH else "shut down"
    return "paused" if info.paused else "running"


def _protect(options: argparse.Namespace, console: _Console) -> None:
    image = Image.open(options.image)
    symbols = [image.symbol(name) for name in dict.fromkeys(options.symbols)]
    gfns = {gfn for symbol in symbols for gfn in image.gfns(symbol.name)}
    with ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        xen = stack.enter_context(_connect(options, console, image))
        domain = stack.enter_context(xen.domain(options.domain))
        matches = {symbol.name: _matches(domain, image, symbol) for symbol in symbols}
        for name, same in matches.items():
            if same is False:
                console.warn(f"the memory of {name} in the guest is not what {image.name} has")
        signals.hold_back()
        protection = stack.enter_context(
            _Protection(domain, sorted(gfns), options.access, options.shadow, console)
        )
        view = protection.view
        console.result(
            _document(xen, domain, image, matches, protection),
            _Table(
                ("gfns", "pages", "host", "view", "shows", "symbols"),
                [_row(domain, image, symbols, difference) for difference in view.differences()],
                title=f"View {view.id} of domain {domain.domid} ({domain.name}) on Xen "
                f"{xen.release} ({xen.backend.name}): what differs from the host p2m",
            ),
        )
        if options.hold != 0:
            until = "Ctrl-C" if options.hold is None else f"{options.hold:g} s, or Ctrl-C"
            console.note(f"The guest runs in view {view.id}. Holding until {until}.")
        rest = math.inf if options.hold is None else options.hold
        while rest > 0 and not signals.arrived(min(rest, 1.0)):
            rest -= 1.0
            protection.watch()
        protection.watch()
    console.note(f"Undone: {protection.summary()}.")


def _matches(domain: xa.Domain, image: Image, symbol: Symbol) -> bool | None:
    """Whether the guest's memory holds what the image says, where the guest keeps its hands off."""
    segment = image.segment(symbol)
    if segment.writable:
        return None
    return domain.memory.read(image.physical(symbol), symbol.size) == _content(segment, symbol)


def _content(segment: Segment, symbol: Symbol) -> bytes:
    start = symbol.address - segment.virtual
    return segment.data[start : start + symbol.size].ljust(symbol.size, b"\0")


class _Protection:
    """Pages protected in a view that every vCPU runs in, for as long as it is entered."""

    def __init__(
        self,
        domain: xa.Domain,
        gfns: Sequence[int],
        access: xa.Access,
        shadow: bool,
        console: _Console,
    ) -> None:
        self._domain = domain
        self._gfns = gfns
        self._access = access
        self._shadow = shadow
        self._console = console
        self._copies: dict[int, tuple[int, bytes]] = {}
        self._lifted: set[int] = set()
        self._was_active = domain.altp2m_active
        self._stack = ExitStack()
        self.altp2m: xa.Altp2m
        self.view: xa.View

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.altp2m = stack.enter_context(self._domain.altp2m())
            self.view = self.altp2m.create_view(label="protect")
            with self._domain.paused():
                stack.push(self._undo)
                if self._shadow:
                    self._replace()
                else:
                    self.view.set_access(self._gfns, self._access)
                self.altp2m.switch_to_view(self.view)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _replace(self) -> None:
        progress = self._console.progress("copying pages")
        copies = self._domain.add_pages(len(self._gfns))
        for done, (gfn, copy) in enumerate(zip(self._gfns, copies, strict=True), 1):
            content = self._domain.memory.read_page(gfn)
            self._domain.memory.write_page(copy, content)
            self._copies[gfn] = copy, content
            self.view.remap(gfn, copy, access=self._access)
            progress(done, len(self._gfns))

    def _undo(self, *_: object) -> None:
        """Leave the view, and carry over what the guest wrote to copies, before it runs on."""
        with self._domain.paused():
            self.altp2m.close()
            for gfn, (copy, before) in self._copies.items():
                now = self._domain.memory.read_page(copy)
                if now != before:
                    self._domain.memory.write_page(gfn, now)
                    self._console.note(f"What the guest wrote to the copy of {gfn:#x} is kept.")

    def watch(self) -> None:
        """Tell of pages that are no longer protected, once each."""
        for mismatch in self.view.verify():
            if mismatch.gfn in self._lifted:
                continue
            self._lifted.add(mismatch.gfn)
            if mismatch.found is None:
                why = "Xen has reset the view, for the host p2m changed"
            else:
                why = f"now {mismatch.found}: the guest did what the view forbids"
            self._console.warn(f"gfn {mismatch.gfn:#x} is no longer {mismatch.expected}: {why}")

    def summary(self) -> str:
        """Say what was undone."""
        done = ["vCPUs moved back", f"view {self.view.id} destroyed"]
        if self._copies:
            done.append(f"{_count(len(self._copies), 'page')} taken back")
        if not self._was_active:
            done.append("altp2m off")
        return ", ".join(done)


def _document(
    xen: xa.Xen,
    domain: xa.Domain,
    image: Image,
    matches: dict[str, bool | None],
    protection: _Protection,
) -> dict[str, Any]:
    view = protection.view
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
        "vcpus": {str(vcpu): number for vcpu, number in protection.altp2m.vcpu_views().items()},
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
        shows = f"a copy, at {_gfns(run.remapped_to, run.count)}"
    return (
        _gfns(run.first, run.count),
        str(run.count),
        _name(domain.host_access(run.first)) or "",
        _name(run.access) or "",
        shows,
        ", ".join(inside),
    )


def _gfns(first: int, count: int) -> str:
    return f"{first:#x}" if count == 1 else f"{first:#x}..{first + count - 1:#x}"


def _name(access: xa.Access | None) -> str | None:
    return None if access is None else str(access)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# The host.


@contextlib.contextmanager
def _connect(
    options: argparse.Namespace, console: _Console, image: Image | None = None
) -> Iterator[xa.Xen]:
    """Open what ``--connect`` names; on the mock, with a guest that the image is loaded into."""
    if options.connect == "libxc":
        with xa.connect("libxc") as xen:
            yield xen
        return
    from xenaltp2m.backend import mock

    end = max((part.address + part.size for part in image.segments), default=0) if image else 0
    memory = max(_MOCK_MEMORY, -(-end // _MIB) * _MIB)
    if image is not None and memory > _MOCK_MEMORY_LIMIT:
        raise xa.SymbolError(
            f"{image.name} is loaded at up to {end:#x}: the mock's guest has at most "
            f"{_MOCK_MEMORY_LIMIT // _MIB} MiB"
        )
    backend = mock.MockBackend(options.xen or (4, 17))
    domid = backend.add_domain(_MOCK_DOMAIN, vcpus=_MOCK_VCPUS, memory_kib=memory // 1024)
    with xa.connect(backend) as xen:
        if image is not None:
            with xen.domain(domid) as domain:
                _load(domain, image, console.progress("loading the image"))
        backend.domain_unpause(domid)
        yield xen


def _load(domain: xa.Domain, image: Image, progress: Progress) -> None:
    total, done = sum(len(part.data) for part in image.segments), 0
    for part in image.segments:
        for at in range(0, len(part.data), _MIB):
            piece = part.data[at : at + _MIB]
            domain.memory.write(part.address + at, piece)
            done += len(piece)
            progress(done, total)


class _Signals:
    """Keeps Ctrl-C, SIGTERM and SIGHUP waiting, so that nothing is left half done or half undone.

    Nothing is held back before :meth:`hold_back`; those that came meanwhile end with the context.
    """

    _ALL = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    def __init__(self) -> None:
        self._before: set[int | signal.Signals] | None = None

    def __enter__(self) -> Self:
        return self

    def hold_back(self) -> None:
        """Keep them waiting from now on."""
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._ALL)

    def arrived(self, seconds: float) -> bool:
        """Wait for one to come, so long at most."""
        return signal.sigtimedwait(self._ALL, seconds) is not None

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            while self.arrived(0):
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


# Output.


class _Table:
    """Rows of text under a head; numbers stand to the right."""

    def __init__(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
    ) -> None:
        self.head = head
        self.rows = [[_printable(cell) for cell in row] for row in rows]
        self.title = None if title is None else _printable(title)
        self.to_right = [
            bool(self.rows) and all(row[column].isdecimal() for row in self.rows)
            for column in range(len(head))
        ]

    def plain(self) -> str:
        """Return it aligned with spaces."""
        lines = [list(self.head), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, self.to_right, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", *texts] if self.title else texts)


class _Console:
    """Where results and remarks go."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._json = as_json
        self._quiet = quiet

    def result(self, document: dict[str, Any], table: _Table) -> None:
        """Print the result, as JSON or as a table."""
        if self._json:
            print(json.dumps(document, indent=2))
        elif not (sys.stdout.isatty() and _print_rich(table)):
            print(table.plain())
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Remark on the course of things."""
        if not self._quiet:
            print(_printable(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Tell of something the user should know."""
        print(f"xenaltp2m: warning: {_printable(text)}", file=sys.stderr, flush=True)

    def error(self, error: xa.XenError) -> None:
        """Print an error in one line, and what may help below it."""
        headline = error.message.partition("\n")[0].removesuffix("; tried:")
        lines = [f"xenaltp2m: error: {_printable(headline)}"]
        hints = list(error.hint)
        if isinstance(error, xa.LibraryError):
            hints = [hint.replace('connect("mock")', "--connect mock") for hint in hints]
        lines += [f"  hint: {_printable(hint)}" for hint in hints]
        left = error.left if isinstance(error, xa.LeftoverError) else ()
        lines += [f"  still in place: {_printable(thing)}" for thing in left]
        for note in getattr(error, "__notes__", ()):
            lines += [f"  {_printable(line.strip())}" for line in note.splitlines()]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def progress(self, what: str) -> Progress:
        """Return what shows how far something is, in place, where somebody watches."""
        if self._quiet or not sys.stderr.isatty():
            return lambda done, total: None
        shown = -1

        def show(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // total
            if percent != shown:
                shown = percent
                end = "\r\033[K" if done == total else ""
                print(f"\r{what} {percent:3} %{end}", end="", file=sys.stderr, flush=True)

        return show


def _print_rich(table: _Table) -> bool:
    """Print a table with rich; False where it is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    shown = Table(
        box=box.SIMPLE_HEAD, title=table.title and Text(table.title), title_justify="left"
    )
    for name, right in zip(table.head, table.to_right, strict=True):
        shown.add_column(name, justify="right" if right else "left")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    Console().print(shown)
    return True


def _printable(text: str) -> str:
    """Show control characters instead of obeying them: names come from images and guests."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
