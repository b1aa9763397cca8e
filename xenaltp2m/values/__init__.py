# SPDX-License-Identifier: LGPL-2.1-or-later
"""Value types of the handles: events, responses, states of views, intervals."""
