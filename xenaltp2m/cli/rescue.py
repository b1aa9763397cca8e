# SPDX-License-Identifier: LGPL-2.1-or-later
"""``rescue``: bring a domain back whose agent was killed."""

from __future__ import annotations

import argparse
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.arguments import add_domain
from xenaltp2m.cli.console import Console
from xenaltp2m.cli.host import Signals, connect
from xenaltp2m.rescue import Outcome, diagnose, rescue

SUMMARY = "bring a domain back whose agent was killed"

KEYS = """\
vCPUs leave all views, altp2m goes off, single steps end, who waits for an answer gets one, the
monitor's ring goes, pages that were added are taken back, the limit of memory is what it was, and
pauses end. What there is to do is told by Xen and by the journal that an agent writes
(/run/xenaltp2m); without one, what could not be known is said.

It may be run again, also where it was killed itself. With nothing to do it does nothing.

--dry-run tells what is wrong and what would be done. --force goes on where a process that works on
the domain runs, and where nothing is found to be wrong, for a vCPU may wait for an answer that
nobody will give.

--json prints one object:
  domain, name
  found      what is wrong, in words
  steps      [{"what": ..., "error": null, or why it could not be done}]
  unknown    what neither Xen nor a journal tells
  dry_run    whether the steps were only told
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_domain(parser)
    parser.add_argument("--dry-run", action="store_true", help="tell, and change nothing")
    parser.add_argument("--force", action="store_true", help="go on in any case")


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    with Signals() as signals, connect(options, console) as xen:
        signals.hold_back()
        outcome = rescue(xen, options.domain, dry_run=options.dry_run, force=options.force)
        info = outcome.before.domain
        name = xen.backend.domid_to_name(int(info.domid))
        if console.as_json:
            console.result(_document(options, outcome, name))
        else:
            _tell(options, console, outcome, name)
        if outcome.failed:
            raise xa.LeftoverError(
                f"domain {info.domid} is not as it was",
                left=[step.what for step in outcome.failed],
                hint=[str(step.error) for step in outcome.failed],
            )
        if options.dry_run:
            return
        after = diagnose(xen, info.domid)
        if not after.healthy:
            raise xa.LeftoverError(
                f"something is still wrong with domain {info.domid}", left=after.lines()
            )


def _document(options: argparse.Namespace, outcome: Outcome, name: str | None) -> dict[str, Any]:
    return {
        "domain": int(outcome.before.domain.domid),
        "name": name,
        "found": outcome.before.lines(),
        "steps": [
            {"what": step.what, "error": None if step.error is None else str(step.error)}
            for step in outcome.steps
        ],
        "unknown": list(outcome.unknown),
        "dry_run": options.dry_run,
    }


def _tell(
    options: argparse.Namespace, console: Console, outcome: Outcome, name: str | None
) -> None:
    found = outcome.before.lines()
    console.line(f"domain {outcome.before.domain.domid} ({name}):")
    for line in found or ["nothing is left of any agent"]:
        console.line(f"  {line}")
    if outcome.steps:
        console.line("what would be done:" if options.dry_run else "what was done:")
    for step in outcome.steps:
        console.line(f"  {step.what}" + ("" if step.error is None else f": FAILED, {step.error}"))
    if outcome.unknown:
        console.line("what cannot be known:")
    for line in outcome.unknown:
        console.line(f"  {line}")
