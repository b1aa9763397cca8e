# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proofs that what we declare is what Xen has."""
