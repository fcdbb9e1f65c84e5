"""The main program on a host of its own: ``on_host.py NETWORK_NAMESPACE HOST_NAME FLAG...``

Like a container it has its own network, name and processes. A host is lost after six seconds.
"""

import ctypes
import os
import runpy
import signal
import socket
import sys

from inrank_megatron.distributed import hosts
from tests.harness import PRETRAIN

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x4000000, 0x20000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    if getattr(libc, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), name)


def enter(network: str, host: str) -> None:
    """What this process starts from here on is on that host."""
    with open(f"/run/netns/{network}") as file:
        call("setns", file.fileno(), CLONE_NEWNET)
    call("unshare", CLONE_NEWUTS | CLONE_NEWNS | CLONE_NEWPID)
    socket.sethostname(host)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)


if __name__ == "__main__":
    network, host, *flags = sys.argv[1:]
    enter(network, host)
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    call("mount", b"proc", b"/proc", b"proc", 0, None)
    hosts.SILENCE_SECONDS = 6
    sys.argv = [str(PRETRAIN), *flags]
    runpy.run_path(str(PRETRAIN), run_name="__main__")
