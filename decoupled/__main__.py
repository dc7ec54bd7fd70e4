"""`python -m decoupled` is the `decoupled` command."""

import sys

from decoupled.cli import main
from decoupled.runtime import memory


def command() -> int:
    """Run the command line in a process of its own."""
    memory.settle()
    return main()


if __name__ == "__main__":
    sys.exit(command())
