# SPDX-License-Identifier: LGPL-2.1-or-later
"""``rescue``: recover a domain whose agent was killed."""

from __future__ import annotations

import argparse
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.arguments import add_domain
from xenaltp2m.cli.console import Console
from xenaltp2m.cli.host import BlockedSignals, connect
from xenaltp2m.tools.rescue import Outcome, diagnose, rescue

SUMMARY = "recover a domain whose agent was killed"

KEYS = """\
vCPUs leave all views, altp2m is switched off, single-steps end, each waiting vCPU gets a response,
the monitor's ring is disabled, added pages are removed, the memory limit is restored, and pauses
end. The sources are Xen and the journal that an agent writes (/run/xenaltp2m); without a journal,
the output lists what could not be determined.

The command may be run again, also if it was killed itself. If nothing is wrong, it does nothing.

--dry-run prints what is wrong and what would be done. --force proceeds even if a process that works
on the domain is running, and if nothing is found to be wrong: a vCPU may still wait for a response
that no process will give.

--json prints one object:
  domain, name
  found      what is wrong, in words
  steps      [{"what": ..., "error": null, or why it failed}]
  unknown    what neither Xen nor a journal reports
  dry_run    whether the steps were only planned
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_domain(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the steps; change nothing")
    parser.add_argument("--force", action="store_true", help="proceed in any case")


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    with BlockedSignals() as signals, connect(options, console) as xen:
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
                f"domain {info.domid} is not fully recovered",
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
    for line in found or ["no agent has left anything"]:
        console.line(f"  {line}")
    if outcome.steps:
        console.line("what would be done:" if options.dry_run else "what was done:")
    for step in outcome.steps:
        console.line(f"  {step.what}" + ("" if step.error is None else f": FAILED, {step.error}"))
    if outcome.unknown:
        console.line("what is unknown:")
    for line in outcome.unknown:
        console.line(f"  {line}")
