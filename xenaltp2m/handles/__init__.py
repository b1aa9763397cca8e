# SPDX-License-Identifier: LGPL-2.1-or-later
"""Xen, domains, and what belongs to a domain: views, memory, vCPUs, the monitor."""
