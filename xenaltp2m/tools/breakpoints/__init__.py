# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stealth breakpoints, watchpoints and patches."""
