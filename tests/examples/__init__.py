# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples do what they say."""
