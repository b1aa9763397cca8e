# SPDX-License-Identifier: LGPL-2.1-or-later
"""``state``: look at a saved state of views, compare two, make its views in a domain."""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.console import Console, Table
from xenaltp2m.cli.host import Signals, connect, is_altp2m_active
from xenaltp2m.cli.pages import counted, seconds
from xenaltp2m.viewstate import MAX_FILE, State, ViewState, diff, obstacles, restore

SUMMARY = "look at a saved state of views, compare two, make its views in a domain"

KEYS = """\
A state is what an agent's views have that the host p2m has not; an agent writes it with
altp2m.capture(contents=True).to_bytes().

  show FILE             its views, and what is in them
  diff FILE FILE        what is different; the exit code is 1 if something is
  restore FILE DOMAIN   makes its views in a domain, and keeps them until --hold is over, Ctrl-C or
                        SIGTERM; --dry-run tells what is in the way, and changes nothing. Nobody
                        answers what the guest does against them: Xen then lifts it, page by page

--json prints one object:
  show      {"views": [{"label", "default", "visible", "access": {access: gfns}, "suppress_ve",
            "remaps"}], "pages": number, "vcpus": [view or null], "origin"}
  diff      {"differences": [in words]}
  restore   {"obstacles": [in words], "views": [numbers]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.set_defaults(usage_error=parser.error)
    parser.add_argument("action", choices=("show", "diff", "restore"), help="what to do")
    parser.add_argument("file", metavar="FILE", help="a saved state")
    parser.add_argument(
        "other", metavar="FILE|DOMAIN", nargs="?", help="the other state, or the domain"
    )
    parser.add_argument("--dry-run", action="store_true", help="restore: tell what is in the way")
    parser.add_argument(
        "--hold", type=seconds, metavar="SECONDS", help="restore: end after so long"
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    if (options.other is None) is not (options.action == "show"):
        wanted = {"show": "one file", "diff": "two files", "restore": "a file and a domain"}
        options.usage_error(f"{options.action} takes {wanted[options.action]}")
    state = _read(options.file)
    if options.action == "show":
        _show(state, options.file, console)
    elif options.action == "diff":
        _diff(state, _read(options.other), console)
    else:
        _restore(state, options, console)


def _read(name: str) -> State:
    try:
        with Path(name).open("rb") as stream:
            return State.from_bytes(stream.read(MAX_FILE + 1))
    except xa.StateError as error:
        raise xa.StateError(f"{name}: {error.message}") from error
    except OSError as error:
        raise xa.StateError(f"{name}: {error.strerror}", errno=error.errno) from error


def _show(state: State, name: str, console: Console) -> None:
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
            ", ".join(str(vcpu) for vcpu, where in enumerate(state.vcpus) if where == number),
        )
        for number, view in enumerate(state.views)
    ]
    origin = ", ".join(f"{key} {value}" for key, value in sorted(state.origin.items()) if value)
    title = (
        f"{name}: {counted(len(state.views), 'view')}, {counted(len(state.pages), 'added page')}"
    )
    head = ("view", "label", "default", "gfns with access of their own", "remaps", "vCPUs")
    console.result(document, Table(head, rows, title=f"{title} ({origin})" if origin else title))


def _counts(view: ViewState) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, count, access in view.access:
        found[str(access)] = found.get(str(access), 0) + count
    return found


def _view(view: ViewState) -> dict[str, Any]:
    return {
        "label": view.label,
        "default": str(view.default_access),
        "visible": view.visible,
        "access": _counts(view),
        "suppress_ve": sum(count for _, count, _ in view.suppress_ve),
        "remaps": len(view.remaps),
    }


def _diff(before: State, after: State, console: Console) -> None:
    found = diff(before, after)
    console.result(
        {"differences": found},
        Table(("different",), [(line,) for line in found]) if found else Table(("the same",), []),
    )
    if found:
        raise SystemExit(1)


def _restore(state: State, options: argparse.Namespace, console: Console) -> None:
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        xen = stack.enter_context(connect(options, console))
        domain = stack.enter_context(xen.domain(options.other))
        was_active = is_altp2m_active(domain, console)
        signals.hold_back()
        altp2m = stack.enter_context(domain.altp2m())
        problems = obstacles(altp2m, state)
        if options.dry_run or problems:
            rows = [(line,) for line in problems]
            head = "in the way" if problems else "nothing is in the way"
            console.result({"obstacles": problems, "views": []}, Table((head,), rows))
        if problems and not options.dry_run:
            raise xa.UnsupportedError("the state cannot be restored there", domid=domain.domid)
        if options.dry_run:
            return
        views = restore(altp2m, state, progress=console.progress("restoring"))
        made = [(str(view.id), view.label or "") for view in views]
        numbers = [int(view.id) for view in views]
        console.result({"obstacles": [], "views": numbers}, Table(("view", "label"), made))
        until = "Ctrl-C" if options.hold is None else f"{options.hold:g} s are over, or Ctrl-C"
        console.note(f"Restored; kept until {until}.")
        rest = math.inf if options.hold is None else options.hold
        while rest > 0 and not signals.arrived(min(rest, 1.0)):
            rest -= 1.0
    console.note("Undone: views destroyed" + ("." if was_active else ", altp2m off."))
