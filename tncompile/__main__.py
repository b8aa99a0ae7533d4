"""``python -m tncompile``."""

import sys

from tncompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
