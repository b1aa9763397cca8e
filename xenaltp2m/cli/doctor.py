# SPDX-License-Identifier: LGPL-2.1-or-later
"""``doctor``: find what keeps altp2m from working."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial

import xenaltp2m as xa
from xenaltp2m.cli.arguments import add_domain
from xenaltp2m.cli.console import Console, printable
from xenaltp2m.cli.host import connect
from xenaltp2m.handles.hazards import Severity
from xenaltp2m.tools.doctor import Finding, Machine, examine, examine_xen, healthy

SUMMARY = "find what keeps altp2m from working, on this machine and in a domain"

KEYS = """\
Each line is a finding: ok; note, worth knowing; warning, something may not work or not hold;
problem, altp2m does not work until it is fixed. Every finding other than ok has a cause and a cure.
The exit code is 1 if there is a problem.

Without DOMAIN, the machine and its Xen are checked. --connect mock checks the mock and its domain,
--connect replay:FILE what Xen answered in the recording. --quiet omits what is ok.

--json prints {"healthy": true or false, "findings": [...]}, each finding with
  check, severity ("ok", "note", "warning", "problem"), evidence, cause, cure, link
"""

_WIDTH = max(map(len, Severity))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_domain(parser, optional=True)


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    if options.connect == "libxc":
        machine = Machine(connect=partial(xa.connect, record=options.record))
        found = examine(options.domain, machine)
    else:
        with connect(options, console) as xen:
            found = examine_xen(xen, options.domain)
    if console.as_json:
        findings = [asdict(finding) for finding in found]
        console.result({"healthy": healthy(found), "findings": findings})
    else:
        for finding in found:
            if not (options.quiet and finding.severity is Severity.OK):
                _tell(finding, console)
    if not healthy(found):
        raise SystemExit(1)


def _tell(finding: Finding, console: Console) -> None:
    first, *rest = finding.evidence.splitlines()
    console.line(f"{finding.severity:<{_WIDTH}}  {finding.check}: {printable(first)}")
    indent = " " * (_WIDTH + 2)
    for line in rest:
        console.line(f"{indent}{printable(line)}")
    for name in ("cause", "cure"):
        if text := getattr(finding, name):
            console.line(f"{indent}{name}: {printable(text)}")
    if finding.severity in (Severity.WARNING, Severity.PROBLEM):
        console.line(f"{indent}see: {finding.link}")
