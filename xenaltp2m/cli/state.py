# SPDX-License-Identifier: LGPL-2.1-or-later
"""``state``: show, compare, save and verify views as files, and create them in a domain."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli import picture
from xenaltp2m.cli.arguments import FileError, add_accept, add_duration, number_among
from xenaltp2m.cli.console import Console, Table
from xenaltp2m.cli.host import BlockedSignals, connect, is_altp2m_active, note_undone
from xenaltp2m.cli.pages import counted
from xenaltp2m.handles.hazards import refuse
from xenaltp2m.handles.signals import guard
from xenaltp2m.tools.migration import import_views, imported_views, take_out_views
from xenaltp2m.tools.state.capture import (
    LOOKED_AT,
    capture,
    compare,
    differences,
    obstacles,
    restore,
    scan,
)
from xenaltp2m.tools.state.layout import totals, vcpus_in
from xenaltp2m.values.state import MAX_FILE, Difference, State, ViewState, diff

SUMMARY = "show, compare, save and verify views as files, and create them in a domain"

KEYS = """\
A state contains the differences between an agent's views and the host p2m; an agent writes it with
xa.capture(altp2m, contents=True).to_bytes().

  show FILE             prints its views and their contents; --html or --svg draws them into a file
  diff FILE FILE        prints the differences; the exit code is 1 if there are any
  verify FILE DOMAIN    compares a state captured from that domain with Xen's; the exit code is 1 if
                        there are differences. --sample compares some gfns of each view only
  save FILE DOMAIN      writes what Xen reports of views of other owners: access, not remaps
  restore FILE DOMAIN   creates its views in a domain, and keeps them until --duration is over,
                        Ctrl-C or SIGTERM; --dry-run prints the obstacles (exit code 1), and what
                        would have another effect in this domain, and changes nothing. No process
                        answers violations of the views: Xen then lifts them, page by page
  import FILE DOMAIN    the same, but the views stay when this ends: for the hooks of a toolstack
  export FILE DOMAIN    writes imported views to a file and removes them, as before a migration

A FILE that is written, or imported, may be -: standard output or input.

--json prints one object:
  show      {"views": [{"label", "default", "visible", "access": {access: gfns}, "suppress_ve",
            "remaps"}], "pages": number, "vcpus": [view or null], "origin"}
  diff, verify  {"differences": [{"words", "what", "before", "after", and the place: "view",
            "gfn", "count", "page", "vcpu"}]}. A gfn below 0 is an added page. "what" is altp2m,
            view, label, default_access, visible, access, suppress_ve, remap, pages, content, vcpu,
            vcpus, notify, monitor or beyond
            notify, monitor or beyond
  save, export, import  {"file", "views", "pages"}
  restore   {"obstacles": [in words], "differences": [in words], "views": [numbers]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.set_defaults(usage_error=parser.error)
    parser.add_argument("action", choices=tuple(_ACTIONS), help="what to do")
    parser.add_argument("file", metavar="FILE", help="a saved state")
    parser.add_argument(
        "other", metavar="FILE|DOMAIN", nargs="?", help="the other state, or the domain"
    )
    parser.add_argument(
        "--sample", type=_sample, metavar="GFNS", help="verify: so many of each view, at random"
    )
    picture.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="restore: print the obstacles")
    add_duration(parser, "restore: end")
    add_accept(parser)


def _sample(text: str) -> int:
    return number_among(text, range(1, 1 << 36), "a number of gfns")


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    if (options.other is None) is not (options.action == "show"):
        wanted = {"show": "one file", "diff": "two files"}.get(
            options.action, "a file and a domain"
        )
        options.usage_error(f"{options.action} takes {wanted}")
    if picture.wanted(options) and options.action != "show":
        options.usage_error("--html and --svg are for show")
    _ACTIONS[options.action](options, console)


def _read(name: str) -> State:
    try:
        if name == "-":
            return State.from_bytes(sys.stdin.buffer.read(MAX_FILE + 1))
        with Path(name).open("rb") as stream:
            return State.from_bytes(stream.read(MAX_FILE + 1))
    except xa.StateError as error:
        raise FileError(f"{name}: {error.message}") from error
    except OSError as error:
        raise FileError(f"{name}: {error.strerror}", errno=error.errno) from error


def _write(state: State, name: str) -> None:
    """Write a whole file or none; never replace one."""
    data = state.to_bytes()
    try:
        if name == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(file, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except BrokenPipeError:
        raise  # the output was closed
    except OSError as error:
        raise FileError(f"{name}: {error.strerror}", errno=error.errno) from error


def _tell_of(state: State, name: str, what: str, console: Console) -> None:
    document = {"file": name, "views": len(state.views), "pages": len(state.pages)}
    console.result(document, Table((f"{what}: {_size(state)}",), []))


def _size(state: State) -> str:
    return f"{counted(len(state.views), 'view')}, {counted(len(state.pages), 'added page')}"


def _show(options: argparse.Namespace, console: Console) -> None:
    name, state = options.file, _read(options.file)
    document = {
        "views": [_view(view) for view in state.views],
        "pages": len(state.pages),
        "vcpus": list(state.vcpus),
        "origin": dict(state.origin),
    }
    rows = [
        (
            str(number),
            view.label,
            str(view.default_access) + ("" if view.visible else ", hidden"),
            ", ".join(f"{gfns} {access}" for access, gfns in _counts(view).items()),
            str(len(view.remaps)),
            ", ".join(map(str, vcpus_in(state, number))),
        )
        for number, view in enumerate(state.views)
    ]
    told = {key: state.origin.get(key) for key in ("domain", "name", "xen")}
    origin = ", ".join(f"{key} {value}" for key, value in told.items() if value)
    title = f"{name}: {_size(state)}"
    head = ("view", "label", "default", "gfns with access of their own", "remaps", "vCPUs")
    console.result(document, Table(head, rows, title=f"{title} ({origin})" if origin else title))
    picture.show(state, options, console)


def _counts(view: ViewState) -> dict[str, int]:
    return {str(access): count for access, count in totals(view.access).items()}


def _view(view: ViewState) -> dict[str, Any]:
    return {
        "label": view.label,
        "default": str(view.default_access),
        "visible": view.visible,
        "access": _counts(view),
        "suppress_ve": sum(count for _, count, _ in view.suppress_ve),
        "remaps": len(view.remaps),
    }


def _diff(options: argparse.Namespace, console: Console) -> None:
    _tell(diff(_read(options.file), _read(options.other)), console)


def _verify(options: argparse.Namespace, console: Console) -> None:
    state = _read(options.file)
    with connect(options, console) as xen, xen.domain(options.other) as domain:
        progress = console.progress("verifying")
        found = compare(domain, state, sample=options.sample, progress=progress)
    _tell(found, console)


def _save(options: argparse.Namespace, console: Console) -> None:
    with connect(options, console) as xen, xen.domain(options.other) as domain:
        guard.enter()  # a process that SIGTERM kills meanwhile would leave the domain paused
        try:
            state = scan(domain, progress=console.progress("asking Xen"))
        finally:
            guard.leave()
        _write(state, options.file)
    if options.file != "-":
        _tell_of(state, options.file, options.file, console)
    console.note("Xen does not report remaps: only an agent's own capture has them.")


def _import(options: argparse.Namespace, console: Console) -> None:
    state = _read(options.file)
    with BlockedSignals() as signals, connect(options, console) as xen:
        signals.hold_back()
        made = import_views(xen, options.other, state, accept=options.accept)
        try:
            with xen.domain(options.other) as domain:
                _warn_of_what_is_missing(domain, made, console)
        except xa.XenError as failure:  # the views are imported all the same
            console.warn(f"cannot check whether Xen has skipped some of it: {failure}")
    _tell_of(made, options.file, "imported", console)


def _export(options: argparse.Namespace, console: Console) -> None:
    with BlockedSignals() as signals, connect(options, console) as xen:
        signals.hold_back()
        state = imported_views(xen, options.other)
        _write(state, options.file)
        take_out_views(xen, options.other)
    if options.file != "-":
        _tell_of(state, options.file, options.file, console)


def _warn_of_what_is_missing(domain: xa.Domain, made: State, console: Console) -> None:
    """Check whether Xen has skipped some of the state, which it does not report."""
    found = compare(domain, made, sample=LOOKED_AT)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        console.warn(f"Xen has skipped some of it: {found[0]}{more}")


def _tell(found: list[Difference], console: Console) -> None:
    console.result(
        {"differences": [{"words": one, **one.facts} for one in found]},
        Table(("different",), [(line,) for line in found]) if found else Table(("the same",), []),
    )
    if found:
        raise SystemExit(1)


def _restore(options: argparse.Namespace, console: Console) -> None:
    state = _read(options.file)
    with ExitStack() as stack:
        signals = stack.enter_context(BlockedSignals())
        xen = stack.enter_context(connect(options, console))
        domain = stack.enter_context(xen.domain(options.other))
        was_active = is_altp2m_active(domain, console)
        if options.dry_run:
            refuse(domain.context, options.accept)  # as opening altp2m does
        problems, others = obstacles(domain, state), differences(domain, state)
        document = {"obstacles": problems, "differences": others, "views": []}
        if options.dry_run or problems:
            rows = [(line,) for line in problems]
            head = "obstacles" if problems else "no obstacles"
            console.result(document, Table((head,), rows))
        if options.dry_run and others and not console.as_json:
            console.table(Table(("different effect in this domain",), [(line,) for line in others]))
        if problems:
            raise xa.UnsupportedError("the state cannot be restored here", domid=domain.domid)
        if options.dry_run:
            return
        signals.hold_back()
        altp2m = stack.enter_context(domain.altp2m(accept=options.accept))
        views = restore(altp2m, state, progress=console.progress("restoring"))
        made = [(str(view.id), view.label or "") for view in views]
        numbers = [int(view.id) for view in views]
        console.result({**document, "views": numbers}, Table(("view", "label"), made))
        _warn_of_what_is_missing(domain, capture(altp2m), console)
        until = (
            "Ctrl-C" if options.duration is None else f"{options.duration:g} s are over, or Ctrl-C"
        )
        console.note(f"Restored; kept until {until}.")
        for _ in signals.awaited(options.duration):
            pass
    note_undone(console, "views destroyed", was_active=was_active)


_ACTIONS: dict[str, Callable[[argparse.Namespace, Console], None]] = {
    "show": _show,
    "diff": _diff,
    "verify": _verify,
    "save": _save,
    "restore": _restore,
    "import": _import,
    "export": _export,
}
