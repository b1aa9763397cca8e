# SPDX-License-Identifier: LGPL-2.1-or-later
"""Record a session with Xen, and replay it."""
