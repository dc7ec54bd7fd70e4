"""`python -m decoupled.runtime.follow`: a process that rank 0 has started. It does as it is told, and ends with it."""

import faulthandler
import json
import os
import signal
import sys
import warnings

from decoupled.runtime import memory
from decoupled.runtime.launch import FOLLOW
from decoupled.runtime.processes import Processes


def main() -> None:
    """Serve until rank 0 says goodbye or is gone. Ctrl-C is for rank 0, which tells us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"decoupled\.")  # rank 0 says them, too
    faulthandler.register(signal.SIGUSR1)
    memory.settle()
    code = 1
    try:
        runtime = Processes(**json.loads(os.environ[FOLLOW]))
        runtime.serve()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no thread that still waits for anything can keep this process


if __name__ == "__main__":
    main()
