# SPDX-License-Identifier: LGPL-2.1-or-later
"""How thorough a run is. ``make test THOROUGH=1`` leaves out no release and no repetition."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("XENALTP2M_THOROUGH") == "1"
