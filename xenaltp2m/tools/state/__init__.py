# SPDX-License-Identifier: LGPL-2.1-or-later
"""Capture, restore, compare and draw views."""
