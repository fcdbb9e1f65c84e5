"""A run that is killed at any moment of a save, of growth or of the switch goes on as if nothing had been.

The test below visits the moments once. ``tests/random_kills.sh`` visits a hundred or more of them, and kills
at any time of a session as well, with one process, tensor parallelism and ZeRO 3 in turn, in an hour or so:

    bash tests/random_kills.sh [KILLS] [SEED]
"""

import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint, newest_complete, published, step_of
from tests.distributed.launches import ADAMW, TINY, Launch, course, data_flags, last_step, launch
from tests.distributed.pausing import PAUSE, PHASE_FILE

SCRIPT = Path(__file__).with_name("pausing.py")
RUN = [*TINY, *ADAMW, "--hidden-dropout", "0.1", "--switch-iters", "24"]
RUN += ["--train-iters", "90", "--save-interval", "2", "--eval-interval", "3", "--eval-iters", "1"]
RUN += ["--keep-last", "3"]
ENDS = 90
EARLY = {"growth": 20, "the switch": 24}  # and the last step before which it still comes
PAUSE_SECONDS = 2.0
ANY_TIME = "any time"


class Kind(NamedTuple):
    name: str
    launcher: str
    num_procs: int
    flags: tuple[str, ...]


ALONE = Kind("one process", "python", 1, ("--tensor-model-parallel-size", "1"))
KINDS = [
    ALONE,
    Kind("ZeRO 3", "torchrun", 2, ("--tensor-model-parallel-size", "1", "--zero-stage", "3")),
    Kind("TP 2", "torchrun", 2, ("--tensor-model-parallel-size", "2")),
]


class Moment(NamedTuple):
    """A phase, the how-manieth in a session it is, the signal, and whether the run first goes back.

    ``within``: seconds from the phase on in which the signal comes; at `ANY_TIME` from the first step on.
    """

    phase: str
    time: int = 1
    signal: int = signal.SIGKILL
    goes_back: bool = False
    within: float = 0.1 * PAUSE_SECONDS


# The growth after step 20 and the switch after 24 come in this order with nothing between them: training goes
# on while a checkpoint is written, so that other moments let an unknown number of steps pass. What replaces a
# step needs a run that went back. After a stop in an evaluation the next session first saves that step again.
MOMENTS = [
    Moment("the copy"),
    Moment("inside a tensor file"),
    Moment("the state", 2),
    Moment("the manifest", 2),
    Moment("a removal", 3),
    Moment("an evaluation", 2, signal.SIGTERM),
    Moment("published, not on record"),
    Moment("growth", 5),
    Moment("the switch"),
    Moment("between the renames", 1, goes_back=True),
    Moment("the manifest", 2, signal.SIGTERM),
    Moment("the flush", 3),
    Moment("a step", 5, signal.SIGTERM),
]
KILLED = {m.phase: m for m in MOMENTS if m.signal == signal.SIGKILL}
KILLED |= {phase: Moment(phase) for phase in ("the tensors", "the index")}


def go_on(run: Sequence[str], folder: Path, *, moment: Moment | None = None, **ranks) -> Launch:
    """Resume the run and, some time into the phase of ``moment``, send its processes the signal."""
    phase_file = folder.with_suffix(".phase")
    phase_file.unlink(missing_ok=True)
    expected = expected_start(folder)
    resume = "auto"
    if moment and moment.goes_back:
        expected = resume = str(step_of(published(folder / "checkpoints")[1]))
    env = {PHASE_FILE: str(phase_file)}
    if moment:
        env[PAUSE] = (
            "a step/1/0" if moment.phase == ANY_TIME else f"{moment.phase}/{moment.time}/{PAUSE_SECONDS}"
        )
    args = [*run, "--save", str(folder), "--resume", resume]
    with Launch(args, **ranks, script=SCRIPT, env=env) as started:
        if moment:
            started.until(phase_file.exists, f"{moment}")
            time.sleep(random.uniform(0, moment.within))
            for process in started.processes():
                process.send_signal(moment.signal)
        started.wait()
    shown = re.search(r"resumed at step (\d+)", started.stdout)
    assert (shown and shown.group(1)) == expected, f"{moment}: {started.stdout}{started.stderr}"
    assert "Traceback" not in started.stderr, started.stderr
    return started


def expected_start(folder: Path) -> str | None:
    """The step of the newest complete checkpoint; None if none has been published."""
    root = folder / "checkpoints"
    replaced = {path.name[1:].partition(".")[0] for path in root.glob(".*.replaced")}
    complete = [path for path in published(root) if Checkpoint(path)]
    assert complete or not (root.is_dir() and replaced), (
        "a complete checkpoint is only there under a hidden name"
    )
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
def test_run_killed_at_every_moment_matches_the_undisturbed_run(tmp_path):
    run = [*RUN, *ALONE.flags, *data_flags(tmp_path / "data")]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert launch([*run, "--save", str(undisturbed)]).process.returncode == 0
    without_loss = None
    for moment in MOMENTS:
        started = go_on(run, killed, moment=moment)
        if without_loss:
            assert Checkpoint(without_loss).state["validation_loss"] is not None
            without_loss = None
        if moment.signal == signal.SIGTERM:
            after_a_stop(killed, started)
        if moment.phase == "an evaluation":
            without_loss = published(killed / "checkpoints")[0]
            assert Checkpoint(without_loss).state["validation_loss"] is None
    assert go_on(run, killed).process.returncode == 0
    assert course(killed) == course(undisturbed)
    left = [step_of(path) for path in published(killed / "checkpoints")]
    assert left[:3] == [90, 88, 86] and len(left) in (3, 4), "the last three and the best"
    assert not list((killed / "checkpoints").glob(".*"))


def main(kills: int = 100, seed: int = 0) -> None:
    """Random moments, in one run after another, each compared with the undisturbed one."""
    random.seed(seed)
    counts = Counter(dict.fromkeys([ANY_TIME, *KILLED], 0))
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        data = data_flags(base / "data")
        undisturbed = {}
        for kind in cycle(random.sample(KINDS, len(KINDS))):
            run, ranks = [*RUN, *kind.flags, *data], {"launcher": kind.launcher, "num_procs": kind.num_procs}
            if kind not in undisturbed:
                undisturbed[kind] = base / f"undisturbed-{len(undisturbed)}"
                assert launch([*run, "--save", str(undisturbed[kind])], **ranks).process.returncode == 0
            seconds = json.loads((undisturbed[kind] / "summary.json").read_text())["train_seconds"]
            folder = base / f"killed-{counts.total()}"
            for_this_run = min(-(-kills // len(KINDS)), kills - counts.total())
            while for_this_run and (moment := draw(folder, counts, seconds / for_this_run)):
                ended = go_on(run, folder, moment=moment, **ranks).process.returncode
                if ended == 0:  # before its time had come
                    break
                counts[moment.phase] += 1
                for_this_run -= 1
                what = f"{moment.phase} {moment.time}"
                print(f"{counts.total()}: {kind.name}, {what}, step {last_step(folder)}", flush=True)
            assert go_on(run, folder, **ranks).process.returncode == 0
            assert course(folder) == course(undisturbed[kind])
            print(f"the run killed {counts.total()} times in all so far is the undisturbed one", flush=True)
            if counts.total() >= kills:
                break
    for phase, count in counts.most_common():
        print(f"{count:4} {phase}")


def draw(folder: Path, counts: Counter, seconds: float) -> Moment | None:
    """The next moment: any time for a third of the kills, else a phase that has come least; None at the end.

    Args:
        seconds: of the whole run, undisturbed, for each of its kills that are still to come.
    """
    left = 1 - int(expected_start(folder) or 0) / ENDS
    if counts[ANY_TIME] < counts.total() / 3 and reaches(folder, Moment(ANY_TIME)):
        return Moment(ANY_TIME, within=left * seconds)
    # Of phases that have come as often the early ones first: later on the run does not meet them any more.
    for phase in sorted(KILLED, key=lambda p: (counts[p], EARLY.get(p, ENDS), random.random())):
        goes_back = KILLED[phase].goes_back
        once = goes_back or phase == "the switch"
        moment = Moment(phase, 1 if once else random.randint(1, 3), goes_back=goes_back)
        if goes_back and len(published(folder / "checkpoints")) < 2:
            continue
        if reaches(folder, moment):
            return moment
    return None


def reaches(folder: Path, moment: Moment) -> bool:
    """Whether a session from the newest checkpoint meets the moment before its end."""
    start = int(expected_start(folder) or 0)
    return start < EARLY.get(moment.phase, ENDS - 16)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
