# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's monitor: its ring, subscriptions, event loop, responses and teardown."""

from __future__ import annotations

from xenaltp2m.handles.monitor.answering import Handler
from xenaltp2m.handles.monitor.monitor import Monitor
from xenaltp2m.handles.monitor.subscriptions import subscription

__all__ = ["Handler", "Monitor", "subscription"]
