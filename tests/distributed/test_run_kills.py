"""A run that is killed at any moment of a save, of growth or of the switch goes on as if nothing had been.

The test below visits every moment once. ``tests/kills.sh`` visits a hundred or more of them at random, on two
ranks as well, in an hour or so:

    bash tests/kills.sh [KILLS] [SEED]
"""

import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint, newest_complete, published, step_of
from tests.distributed.dwelling import DWELL, PHASE_FILE, SECONDS
from tests.distributed.launches import TINY, Launch, course, data_flags, last_step, launch

SCRIPT = Path(__file__).with_name("dwelling.py")
RUN = [*TINY, "--tensor-model-parallel-size", "1", "--hidden-dropout", "0.1", "--switch-iters", "24"]
RUN += ["--train-iters", "90", "--save-interval", "2", "--eval-interval", "3", "--eval-iters", "1"]
RUN += ["--keep-last", "3"]
ENDS = 90


class Moment(NamedTuple):
    """A phase, the how-manieth in a session it is, the signal, and whether the run first goes back."""

    phase: str
    time: int = 1
    signal: int = signal.SIGKILL
    goes_back: bool = False


# The growth after step 20 and the switch after 24 come in this order with nothing between them: training goes
# on while a checkpoint is written, so that other moments let an unknown number of steps pass. What replaces a
# step needs a run that went back.
MOMENTS = [
    Moment("the copy"),
    Moment("the tensors"),
    Moment("the state", 2),
    Moment("the index", 2),
    Moment("a removal", 3),
    Moment("an evaluation", 2, signal.SIGTERM),
    Moment("growth", 5),
    Moment("the switch"),
    Moment("between the renames", 1, goes_back=True),
    Moment("the manifest", 2, signal.SIGTERM),
    Moment("the flush", 3),
    Moment("published, not on record", 4),
    Moment("a step", 5, signal.SIGTERM),
]
LAUNCHERS = {"python": 1, "torchrun": 2}
KILLED = [moment for moment in MOMENTS if moment.signal == signal.SIGKILL]


def go_on(run: Sequence[str], folder: Path, *, moment: Moment | None = None, **ranks) -> Launch:
    """Resume the run and, at ``moment``, send its processes the signal; some time into the phase."""
    phase_file = folder.with_suffix(".phase")
    phase_file.unlink(missing_ok=True)
    expected = expected_start(folder)
    resume = "auto"
    if moment and moment.goes_back:
        expected = resume = str(step_of(published(folder / "checkpoints")[1]))
    env = {DWELL: f"{moment.phase}/{moment.time}" if moment else "", PHASE_FILE: str(phase_file)}
    args = [*run, "--save", str(folder), "--resume", resume]
    with Launch(args, **ranks, script=SCRIPT, env=env) as started:
        if moment:
            started.until(phase_file.exists, f"{moment}")
            time.sleep(random.uniform(0, 0.5 * SECONDS))
            for process in started.processes():
                process.send_signal(moment.signal)
        started.wait()
    shown = re.search(r"resumed at step (\d+)", started.stdout)
    assert (shown and shown.group(1)) == expected, f"{moment}: {started.stdout}{started.stderr}"
    assert "Traceback" not in started.stderr, started.stderr
    return started


def expected_start(folder: Path) -> str | None:
    """The step of the newest whole checkpoint; None if none has been published."""
    root = folder / "checkpoints"
    replaced = {path.name[1:].partition(".")[0] for path in root.glob(".*.replaced")}
    whole = [path for path in published(root) if Checkpoint(path)]
    assert whole or not (root.is_dir() and replaced), "a whole checkpoint is only there under a hidden name"
    newest, faults = newest_complete(root)
    assert not faults, "a kill has left a damaged checkpoint under a final name"
    return str(step_of(newest)) if newest else None


def after_a_stop(folder: Path, started: Launch) -> None:
    """The last step has been saved and published, and the launch has succeeded."""
    step = last_step(folder)
    assert f"stopping after step {step}: SIGTERM" in started.stdout
    assert started.process.returncode == 0, started.stderr
    assert Checkpoint(folder / "checkpoints" / f"step_{step:08d}").state["step"] == step


@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_at_every_moment(tmp_path):
    run = [*RUN, *data_flags(tmp_path / "data")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch([*run, "--save", str(whole)]).process.returncode == 0
    for moment in MOMENTS:
        started = go_on(run, killed, moment=moment)
        if moment.signal == signal.SIGTERM:
            after_a_stop(killed, started)
    assert go_on(run, killed).process.returncode == 0
    assert course(killed) == course(whole)
    left = [step_of(path) for path in published(killed / "checkpoints")]
    assert left[:3] == [90, 88, 86] and len(left) in (3, 4), "the last three and the best"
    assert not list((killed / "checkpoints").glob(".*"))


def main(kills: int = 100, seed: int = 0) -> None:
    """Random moments, in one run after another, each compared with the undisturbed one."""
    random.seed(seed)
    done = 0
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        run = [*RUN, *data_flags(base / "data")]
        wholes = {}
        while done < kills:
            launcher = random.choice(list(LAUNCHERS))
            ranks = {"launcher": launcher, "num_procs": LAUNCHERS[launcher]}
            if launcher not in wholes:
                wholes[launcher] = base / f"whole-{launcher}"
                assert launch([*run, "--save", str(wholes[launcher])], **ranks).process.returncode == 0
            folder = base / f"killed-{done}"
            while reaches(folder, Moment("a step")) and done < kills:
                moment = random.choice(KILLED)._replace(time=random.randint(1, 3))
                if moment.goes_back and len(published(folder / "checkpoints")) < 2:
                    continue
                if moment.goes_back or moment.phase == "the switch":
                    moment = moment._replace(time=1)
                if not reaches(folder, moment):
                    continue
                go_on(run, folder, moment=moment, **ranks)
                done += 1
                print(
                    f"{done}: {launcher}, {moment.phase} {moment.time}, step {last_step(folder)}", flush=True
                )
            assert go_on(run, folder, **ranks).process.returncode == 0
            assert course(folder) == course(wholes[launcher])
            print(f"the run killed {done} times in all so far is the undisturbed one", flush=True)


def reaches(folder: Path, moment: Moment) -> bool:
    """Whether a session from the newest checkpoint meets the moment before its end."""
    start = int(expected_start(folder) or 0)
    if moment.phase == "the switch":
        return start < 24
    if moment.phase == "growth":
        return start < 20
    return start < ENDS - 16


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
