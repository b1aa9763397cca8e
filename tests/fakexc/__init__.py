# SPDX-License-Identifier: LGPL-2.1-or-later
"""The libxc backend over a stand-in for Xen's libraries: marshalling, errno, lifetimes."""
