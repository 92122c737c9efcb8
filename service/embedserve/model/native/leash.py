"""A command that ends with this process, however this process ends, and all that the command has started with it.

Decides how. A compiler is several processes (the driver, the compiler proper, the linker), and SIGKILL gives nobody a
chance to tidy up. So the command runs in a process group of its own, under a shell that has the one end of a pipe; the
other end is ours, and the kernel closes it with us. The shell then kills its group. ``PR_SET_PDEATHSIG`` would reach
the driver only, and takes code between fork and exec, which is not safe beside other threads. Must never know what the
command does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

__all__ = ["run_on_leash"]

SHELL = "/bin/sh"
SCRIPT = """
exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
watch=$!
exec 3<&-
"$@"
code=$?
kill "$watch"
wait "$watch" 2>/dev/null
exit "$code"
"""
"""Nothing is ever written to the pipe: ``read`` returns when its other end is closed."""


def run_on_leash(command: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """Run ``command`` to its end with nothing on its standard input, and keep what it prints.

    It has a session of its own: Ctrl-C in our terminal does not end it half-way. The exit code is as a shell has it:
    128 and the number of a signal, 126 or 127 where the command cannot be run.

    Raises:
        subprocess.TimeoutExpired: it had not ended after ``timeout_s`` seconds; it has now.
        OSError: there is no shell, or no process can be started.
    """
    whole = [SHELL, "-c", SCRIPT, "sh", *command]
    heard, held = os.pipe()
    try:
        try:
            process = subprocess.Popen(  # noqa: S603 - what a caller of ours names
                whole, stdin=heard, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        finally:
            os.close(heard)
        with process:
            try:
                out, told = process.communicate(timeout=timeout_s)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    finally:
        os.close(held)
    return subprocess.CompletedProcess(command, process.returncode, out, told)
