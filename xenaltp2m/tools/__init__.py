# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tools built on handles: breakpoints, traces, symbols, states, migration, rescue, doctor."""
