"""A run that is stopped and killed in every way goes on as if nothing had happened."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed.launches import TINY, Launch, course, data_flags, last_step, launch

EACH = 6  # steps until the next stop
RUN = [*TINY, "--tensor-model-parallel-size", "2", "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
RUN += ["--switch-iters", "28", "--eval-interval", "8", "--eval-iters", "2"]
RUN += ["--train-iters", "60", "--save-interval", "4"]
SECONDS_TO_STOP = 25


def kill_everything(started: Launch) -> None:
    for process in started.processes():
        process.kill()


class Stop(NamedTuple):
    """A launcher, what is done to it, and whether the ranks can still save their last step."""

    launcher: str
    what: str
    act: Callable[[Launch], None]
    saves: bool


STOPS = [
    Stop("forked", "kill -9 of everything", kill_everything, False),
    # Which sends SIGINT and SIGTERM on to DeepSpeed's launcher, and that SIGTERM to the ranks.
    Stop("deepspeed", "SIGTERM to the deepspeed command", lambda s: s.process.terminate(), True),
    Stop("deepspeed", "SIGTERM to DeepSpeed's launcher", lambda s: s.ranks()[0].parent().terminate(), True),
    Stop("torchrun", "SIGTERM to torchrun", lambda s: s.process.terminate(), True),
    Stop("torchrun", "kill -9 of one rank", lambda s: s.ranks()[1].kill(), False),
    Stop("forked", "SIGUSR1 to one rank", lambda s: s.ranks()[1].send_signal(signal.SIGUSR1), True),
    Stop("deepspeed", "Ctrl-C", lambda s: os.killpg(s.process.pid, signal.SIGINT), True),
    Stop("deepspeed", "kill -9 of DeepSpeed's launcher", lambda s: s.ranks()[0].parent().kill(), True),
    Stop("forked", "kill -9 of everything, after the switch", kill_everything, False),
]


def stop(run: list[str], folder: Path, how: Stop, *, at: int) -> Launch:
    """Go on with the run, stop it after step ``at`` and check that it ends as it should."""
    with Launch(
        [*run, "--save", str(folder), "--resume", "auto"], launcher=how.launcher, num_procs=2
    ) as started:
        started.until(lambda: last_step(folder) >= at, f"step {at}")
        how.act(started)
        began = time.monotonic()
        started.wait()
        seconds = time.monotonic() - began
    assert seconds < SECONDS_TO_STOP
    step = last_step(folder)
    if how.saves:
        assert (folder / "checkpoints" / f"step_{step:08d}").is_dir()
        assert f"stopping after step {step}: " in started.stdout
        assert "rank 0: error" not in started.stderr and "rank 1: error" not in started.stderr
    return started


@pytest.mark.timeout(1200)
def test_run_stopped_in_every_way_matches_the_undisturbed_run(tmp_path):
    run = [*RUN, *data_flags(tmp_path / "data")]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert launch([*run, "--save", str(undisturbed)], num_procs=2).process.returncode == 0
    for number, how in enumerate(STOPS, start=1):
        started = stop(run, stopped, how, at=EACH * number)
        if how.what == "SIGUSR1 to one rank":
            assert started.process.returncode == 0
        if how.what == "kill -9 of one rank":
            assert started.process.returncode != 0
            assert re.search(r"rank 0: error: rank 1 on host \S+ has ended \(last seen in ", started.stderr)
            assert "Traceback" not in started.stderr.split("rank 0: error")[0]
    finished = launch([*run, "--save", str(stopped), "--resume", "auto"], num_procs=2)
    assert finished.process.returncode == 0, finished.stderr
    assert course(stopped) == course(undisturbed)
