"""`python -m collie_core` is `collie`."""

from __future__ import annotations

import sys

from collie_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
