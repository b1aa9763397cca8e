# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trace calls of a guest's functions, and their returns."""

from __future__ import annotations

from xenaltp2m.tools.tracing.calls import Call, Return, Seen
from xenaltp2m.tools.tracing.trace import Trace

__all__ = ["Call", "Return", "Seen", "Trace"]
