"""A rank notices signals, time limits, lost launchers and lost ranks."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch.distributed as dist

from inrank_megatron.distributed import watchdog
from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.rendezvous import Meeting
from inrank_megatron.distributed.roll import Arrival
from inrank_megatron.distributed.watchdog import JobWatchdog
from inrank_megatron.training.stopping import SIGNALS, WARNINGS, StopRequest, interrupt_by_warnings


@pytest.fixture
def alone():
    watch = JobWatchdog(rank=0)
    yield watch
    watch._left.set()


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop(alone, number):
    stop = StopRequest(alone)
    stop.listen()
    assert stop.reason() is None and not stop.is_urgent
    os.kill(os.getpid(), number)
    assert stop.reason() == number.name and stop.is_urgent


def test_a_second_interrupt_ends_the_process_at_once(alone):
    StopRequest(alone).listen()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_ignores_stays_ignored(alone):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(alone)
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reason() is None


def test_time_limit_asks_for_a_stop(alone):
    stop = StopRequest(alone, limit_minutes=0.1 / 60)
    assert stop.reason() is None
    time.sleep(0.15)
    assert "exit_duration_in_mins" in stop.reason() and not stop.is_urgent


CHILD = """
    import sys, time
    from inrank_megatron.distributed.watchdog import JobWatchdog
    watch = JobWatchdog(rank=3)
    print(len(watch._launchers), flush=True)
    if "saves" in sys.argv:
        watch.hand_over()
        while not watch.launcher_is_gone:
            time.sleep(0.05)
        print("saved", flush=True)
        watch._left.set()
    else:
        time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"


def start(tmp_path, launcher_name, *words):
    """A process that watches, under a parent with the command line of a launcher."""
    launcher, child = tmp_path / launcher_name, tmp_path / "child.py"
    launcher.write_text(PARENT)
    child.write_text(textwrap.dedent(CHILD))
    command = [sys.executable, str(launcher), str(child), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_a_lost_launcher_ends_the_process_before_training(tmp_path):
    parent = start(tmp_path, "torchrun")
    assert parent.stdout.readline() == "1\n"
    parent.kill()
    assert "rank 3: error: the launcher has ended" in parent.communicate(timeout=60)[1]


def test_a_lost_launcher_lets_the_training_save(tmp_path):
    parent = start(tmp_path, "torchrun", "saves")
    assert parent.stdout.readline() == "1\n"
    parent.kill()
    assert parent.communicate(timeout=60)[0] == "saved\n"


def test_a_shell_that_ends_is_no_lost_launcher(tmp_path):
    parent = start(tmp_path, "job_with_torchrun_in_its_name.py")
    assert parent.stdout.readline() == "0\n"
    child = psutil.Process(parent.pid).children()[0]
    parent.kill()
    time.sleep(3 * watchdog.POLL_SECONDS)
    assert child.is_running()
    child.kill()
    parent.communicate()


def meeting_of(processes):
    """A job of this process, rank 0, and others on the same machine."""
    arrivals = [
        Arrival("here", "here", process.pid, psutil.Process(process.pid).create_time(), 2, "", None, "")
        for process in (psutil.Process(), *processes)
    ]
    return Meeting(Ranks(0, len(arrivals)), dist.HashStore(), arrivals)


def test_a_lost_rank_ends_this_one_with_its_name_though_the_disk_hangs(alone, monkeypatch, capsys):
    ended, noted, disk = threading.Event(), [], threading.Event()

    def end(status):
        ended.set()
        threading.Event().wait()  # for ever: the thread that watches has nothing more to do

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    alone.on_failure = lambda message: (noted.append(message), disk.wait())
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    alone.join(meeting_of([other]))
    assert alone.lost() is None
    other.kill()
    assert ended.wait(30)
    assert "rank 1 on host here has ended" in noted[0]
    assert f"rank 0: error: {noted[0]}" in capsys.readouterr().err
    alone._guard.leave()  # which the watch does no more: the guard would end this process in time
    disk.set()
    other.wait()


@pytest.mark.parametrize("gpu", ["GPU-a", None])
def test_on_gpus_of_several_hosts_a_lost_rank_is_named_at_once(alone, monkeypatch, capsys, gpu):
    """NCCL ends the process about a second after it has lost a connection."""
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 60.0)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = meeting_of([other])
    arrivals = [replace(arrival, gpu=gpu) for arrival in (*here.arrivals, here.arrivals[0])]
    arrivals[2] = replace(arrivals[2], host="there", machine="there")
    alone.join(replace(here, arrivals=arrivals))
    other.kill()
    time.sleep(3 * watchdog.POLL_SECONDS)
    assert capsys.readouterr().err.count("rank 0: error: rank 1 on host here has ended") == (gpu is not None)
    other.wait()


def test_a_failure_is_explained_by_the_rank_that_was_lost(alone):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    meeting = meeting_of([other])
    alone.join(meeting)
    assert alone.explain(patience=0) is None and not alone._left.is_set()
    other.kill()
    assert "rank 1 on host here has ended" in alone.explain(patience=10)
    assert alone._left.is_set(), "one message is enough"
    other.wait()


def test_rank_that_ended_early_is_reported(alone):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    meeting = meeting_of([other])
    other.kill()
    other.wait()
    alone.join(meeting)
    assert "rank 1 on host here has ended" in alone.explain(patience=10)


@pytest.mark.parametrize("number", WARNINGS)
def test_a_warning_before_training_interrupts(number):
    interrupt_by_warnings()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
