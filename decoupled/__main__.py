"""`python -m decoupled` is the `decoupled` command."""

import sys

from decoupled.cli import main

if __name__ == "__main__":
    sys.exit(main())
