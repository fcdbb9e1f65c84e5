"""A loss that two threads of a process find is said once, and ends the process."""

import subprocess
import sys

import pytest

LOSES = """
import os, sys, time
from inrank_megatron.distributed.watchdog import JobWatchdog

watchdog = JobWatchdog(rank=0)
watchdog.hand_over()
watchdog.on_failure = lambda message: time.sleep(1.5)
watchdog._grace, watchdog._speaks_at_once, watchdog._lost = 0.3, sys.argv[1] == "at once", "it is lost"
time.sleep(float(sys.argv[2]))
lost = watchdog.explain(patience=1.0)
print(f"rank 0: error: {lost}", file=sys.stderr, flush=True)
os._exit(2)
"""


@pytest.mark.parametrize(
    ("watch", "seconds", "status"),
    [("in the end", 0.0, 2), ("in the end", 1.4, 1), ("at once", 0.0, 2), ("at once", 0.8, 1)],
    ids=["the main thread first", "the watch first", "the main thread at once", "the watch at once"],
)
def test_a_loss_is_said_by_one_thread(watch, seconds, status):
    """The watch looks every half a second; its last word to others takes a while."""
    done = subprocess.run(
        [sys.executable, "-c", LOSES, watch, str(seconds)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (status, "rank 0: error: it is lost\n")
