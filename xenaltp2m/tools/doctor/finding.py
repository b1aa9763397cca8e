# SPDX-License-Identifier: LGPL-2.1-or-later
"""The result of one of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass

from xenaltp2m.errors import (
    XenError,
)
from xenaltp2m.handles.hazards import Severity

PAGE = "docs/doctor.md"
"""The page with a section for each check, under its name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: The check's name, a section of ``docs/doctor.md``.
        severity: How severe it is.
        evidence: What was found.
        cause: The likely cause; empty if all is well.
        cure: What to do, as a command or as a line to add.
        link: The page that explains it.
    """

    check: str
    severity: Severity
    evidence: str
    cause: str = ""
    cure: str = ""
    link: str = ""

    def __post_init__(self) -> None:
        if not self.link:
            object.__setattr__(self, "link", f"{PAGE}#{self.check}")


def healthy(findings: list[Finding]) -> bool:
    """Return whether altp2m can be used: no finding is a problem."""
    return not any(finding.severity is Severity.PROBLEM for finding in findings)


def of_error(check: str, error: XenError, severity: Severity = Severity.PROBLEM) -> Finding:
    """Turn an error into a finding: its first hint contains cause and cure."""
    cause, _, cure = (error.hint[0] if error.hint else "").partition(": ")
    cures = [text for text in (cure, *error.hint[1:]) if text]
    return Finding(check, severity, error.message, cause, "; or ".join(cures))
