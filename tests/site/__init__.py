# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation, built as a site."""
