"""A program on a host of its own: ``on_host.py FIRST_PROCESS PROGRAM FLAG...``

The fork that runs it has imported everything already, and enters the host.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

from tests.harness import ROOT

PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    if getattr(libc, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), name)


def enter(first_pid: int) -> None:
    """What this process starts from here on is on the host with that first process."""
    names = [Path(f"/proc/{first_pid}/ns/{name}") for name in ("net", "uts", "pid", "mnt")]
    for file in [name.open() for name in names]:
        call("setns", file.fileno(), 0)
    os.chdir(ROOT)


if __name__ == "__main__":
    first_pid, program, *flags = sys.argv[1:]
    enter(int(first_pid))
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")
