# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pyproject.toml has no key for."""

from setuptools import setup

setup(cffi_modules=["cdefs/build.py:ffibuilder"])
