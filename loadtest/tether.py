"""A process that ends when the one that started it does, however that ends: by Ctrl-C, an error or SIGKILL.

Decides how: the kernel kills it (prctl(2), PR_SET_PDEATHSIG). A few lines of Python ask for that and then become the
command, with the same process id: code between fork and exec (``preexec_fn``) is not safe beside other threads. Must
never know what is run, and imports nothing of ours.

The kernel watches the *thread* that started the process: start what shall stay from a thread that stays.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["tethered"]

PR_SET_PDEATHSIG = 1
HERE = os.path.abspath(__file__)  # noqa: PTH100 - pathlib would double what the start of each process costs


def tethered(command: Sequence[str]) -> tuple[str, ...]:
    """``command`` as it must be started so that it ends with this process."""
    return (sys.executable, "-I", "-S", HERE, str(os.getpid()), *command)


def main() -> None:
    """Bind this process to its parent, then become the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was gone before the kernel was told
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main()
