"""A program on a host of its own, with faults: ``preflight_on_host.py FIRST_PROCESS FAULTS PROGRAM FLAG...``

``FAULTS`` is JSON: ``clock``, seconds by which the host's clock is ahead; ``packages``, a folder of packages
that come before the installed ones.
"""

import json
import os
import runpy
import signal
import sys
import time
from types import SimpleNamespace

from inrank_megatron.preflight import connections, folders
from tests.cluster.on_host import PR_SET_PDEATHSIG, call, enter

if __name__ == "__main__":
    first_pid, faults, program, *flags = sys.argv[1:]
    enter(int(first_pid))
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    planted = json.loads(faults)
    if ahead := planted.get("clock"):  # the system has one clock for all namespaces
        connections.time = SimpleNamespace(time=lambda: time.time() + ahead)
    folders.PATIENCE_SECONDS = 1.0  # the hosts are one machine
    sys.path[:0] = filter(None, [planted.get("packages")])
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")
