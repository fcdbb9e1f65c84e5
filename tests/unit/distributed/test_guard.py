"""The guard ends a rank that gives no sign of life, and no other."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

RANK = """
import sys, time
from inrank_megatron.distributed.guarded import Guard
guard = Guard(1.0, "rank 3 on host here")
print(guard._process.pid, flush=True)
while "silent" not in sys.argv:
    guard.beat()
    time.sleep(0.1)
time.sleep(60)
"""


def start(*words: str) -> tuple[subprocess.Popen, psutil.Process]:
    command = [sys.executable, "-c", RANK, *words]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return rank, psutil.Process(int(rank.stdout.readline()))


@pytest.mark.parametrize("stopped", [True, False])
def test_a_rank_that_is_stopped_or_held_up_is_ended(stopped):
    rank, guard = start(*([] if stopped else ["silent"]))
    if stopped:
        rank.send_signal(signal.SIGSTOP)
    stderr = rank.communicate(timeout=30)[1]
    assert rank.returncode == -signal.SIGKILL
    assert stderr.startswith("rank 3 on host here: error: it was stopped, or held up, for 1 s, and is ended")
    assert not psutil.wait_procs([guard], timeout=10)[1]


def test_a_rank_that_lives_is_left_alone_whatever_signal_comes():
    rank, guard = start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        guard.send_signal(number)
    time.sleep(2.0)
    assert rank.poll() is None and guard.is_running()
    rank.kill()
    rank.communicate()
    assert not psutil.wait_procs([guard], timeout=10)[1]


def test_a_job_that_is_suspended_as_a_whole_goes_on():
    """As by Ctrl-Z or by a batch system: what counts is the time in which the guard runs."""
    rank, guard = start()
    for process in (psutil.Process(rank.pid), guard):
        process.suspend()
    time.sleep(3.0)
    for process in (guard, psutil.Process(rank.pid)):
        process.resume()
    time.sleep(1.0)
    assert rank.poll() is None
    rank.kill()
    rank.communicate()
