# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put the tree's root on the path: ``cdefs`` is never installed."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
