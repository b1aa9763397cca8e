# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mock whose calls fail where a test says so."""

from __future__ import annotations

from errno import ESRCH
from typing import TypeAlias

from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.machine import Refused

Plan: TypeAlias = dict[int, int]
"""Which calls fail, counted from 1, and with which errno."""

ANSWERS = {
    ("altp2m_get_mem_access", ESRCH),
    ("altp2m_get_suppress_ve", ESRCH),
    ("altp2m_set_suppress_ve", ESRCH),
}
"""What is no failure: Xen says so that there is no entry, or no RAM to make one of."""


class Failing(MockBackend):
    """A host whose calls fail by plan."""

    plan: Plan = {}  # noqa: RUF012 - replaced, never changed
    made = 0

    def start(self, plan: Plan) -> None:
        """Count calls from here on."""
        self.plan, self.made = plan, 0

    def _inject(self, op: str) -> None:
        super()._inject(op)
        self.made += 1
        errno = self.plan.get(self.made)
        if errno and (op, errno) not in ANSWERS:
            raise Refused(errno)
