"""``python -m embedserve``: the same as the ``embedserve`` command."""

import sys

from embedserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
