# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C declarations and their builder; a package for the tests' sake, never installed."""
