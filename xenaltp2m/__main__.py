# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m xenaltp2m``: the command line."""

import sys

from xenaltp2m.cli import main

if __name__ == "__main__":
    sys.exit(main())
