"""A rank that is stopped or hangs ends the job in time, and is named; long pauses at first times do not."""

import re
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.hanging import HANG, HANG_RANK, STEP
from tests.distributed.launches import TINY, Launch, data_flags, last_step

SCRIPT = Path(__file__).with_name("hanging.py")
SECONDS = 6
RUN = [
    *TINY,
    *("--tensor-model-parallel-size", "1", "--train-iters", "20", "--eval-interval", "20"),
    *("--switch-iters", "10"),  # away from the hang: the first steps of a phase have more time
]
SPARE = 2.0  # for processes to be scheduled and reaped, on a core that they have for themselves


def start(
    folder: Path, hang: str, *flags: str, rank: int = 0, seconds: int = SECONDS, num_procs: int = 2
) -> Launch:
    run = [*RUN, "--hang-timeout-seconds", str(seconds), *data_flags(folder / "data"), *flags]
    env = {HANG: hang, HANG_RANK: str(rank)}
    return Launch([*run, "--save", str(folder / "run")], num_procs=num_procs, script=SCRIPT, env=env)


def share() -> float:
    """How many times as long work takes as on a core that does no other."""
    began, work = time.monotonic(), time.process_time()
    while time.process_time() < work + 0.2:
        pass
    return (time.monotonic() - began) / 0.2


def lines_of(rank: int, started: Launch) -> list[str]:
    return [line for line in started.stderr.splitlines() if line.startswith(f"rank {rank}: error: ")]


HOST = socket.gethostname()
PLACE = rf"on host {HOST} \(in step {STEP}, {{}} \(\w+\.py:\d+\)\)"
SLEEPS, SPINS = (
    f"rank 1 {PLACE.format('sleep')} makes no progress:",
    f"rank 0 {PLACE.format('spin')} makes no progress:",
)
ALONE = f"rank 0 {PLACE.format('.+')}, rank 1 {PLACE.format('all_reduce')} wait for each other:"


@pytest.mark.parametrize(
    ("hang", "rank", "told"),
    [("asleep", 1, SLEEPS), ("spinning", 0, SPINS), ("in a collective", 1, ALONE)],
    ids=["asleep", "spinning", "in a collective"],
)
def test_a_rank_that_hangs_is_named_by_all(tmp_path, hang, rank, told):
    with start(tmp_path, hang, rank=rank) as started:
        started.until(lambda: last_step(tmp_path / "run") >= STEP - 1, "the steps before")
        began = time.monotonic()
        assert started.wait() == 1
        seconds = time.monotonic() - began
    print(f"{hang}: {seconds:.1f} s\n{started.stderr}")
    assert seconds < SECONDS + SPARE * share()
    assert "Traceback" not in started.stderr
    for number in (0, 1):
        [line] = lines_of(number, started)
        assert re.search(rf"{told} no rank has made progress for \d+ s", line), line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_ended_and_named(tmp_path, rank):
    with start(tmp_path, "asleep", "--train-iters", "5000", rank=9) as started:
        started.until(lambda: last_step(tmp_path / "run") >= STEP, "a step")
        stopped = started.ranks()[rank]
        stopped.suspend()
        began = time.monotonic()
        assert started.wait() != 0
        seconds = time.monotonic() - began
    print(f"stopped: {seconds:.1f} s\n{started.stderr}")
    assert seconds < SECONDS + SPARE * share()
    assert not psutil.pid_exists(stopped.pid) or stopped.status() == psutil.STATUS_ZOMBIE
    assert f"rank {rank} on host {HOST}: error: it was stopped, or held up, for 3 s" in started.stderr
    [line] = lines_of(1 - rank, started)
    told = (
        rf"rank {rank} on host {HOST} was stopped, or held up, for [23] s and has ended \(last seen in step"
    )
    assert re.search(told, line), line


def test_what_takes_long_for_the_first_time_is_no_hang(tmp_path):
    flags = ["--train-iters", "12", "--switch-iters", "8", "--eval-interval", "4", "--save-interval", "5"]
    with start(tmp_path, "slow", *flags, seconds=5) as started:
        assert started.wait() == 0, started.stderr
    assert "error" not in started.stderr
    slow = {line for line in started.stdout.splitlines() if line.startswith("slow: ")}
    kinds = {
        "step, first phase True",
        "step, first phase False",
        "rank check",
        "switch",
        "evaluation",
        "save",
    }
    assert slow == {f"slow: {kind}" for kind in kinds}


def test_a_run_that_fails_alike_three_times_is_not_started_again(tmp_path):
    def again(*flags: str) -> Launch:
        more = ["--resume", "auto", "--save-interval", "50", *flags]
        with start(tmp_path, "raises", *more, num_procs=1) as started:
            assert started.wait() == 1
        return started

    for _ in range(3):
        assert "ValueError: planted" in again().stderr
    refused = again().stderr
    assert refused.startswith(
        f"rank 0: error: {tmp_path / 'run'}: has failed 3 times in the same way after the "
    )
    assert "checkpoint of step 0 (ValueError: planted); correct that, then remove" in refused
    assert "ValueError: planted" in again("--log-interval", "2").stderr, "another setting is another try"
