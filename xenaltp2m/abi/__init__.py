# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the C side looks like: the generated FFI module, layouts, and what each release has."""
