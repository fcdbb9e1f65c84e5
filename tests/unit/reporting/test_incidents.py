"""What the report finds of a switch and of faults, in records that have them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from inrank_megatron.reporting.incidents import incidents, switch_losses
from inrank_megatron.reporting.run import Run, read_run


def run_of(losses: list[float | None], *, switch: int | None, folder: Path) -> Run:
    train = [{"step": step, "loss": loss, "phase": 1} for step, loss in enumerate(losses, start=1)]
    return replace(
        read_run(folder), train=train, switches=[{"step": switch}] if switch else [], ranks=[], notices=[]
    )


def noisy(level: float, count: int) -> list[float]:
    return [level + 0.01 * math.sin(7.1 * step) for step in range(count)]


def test_a_clean_switch(tmp_path):
    found = switch_losses(run_of(noisy(3.0, 20) + noisy(3.0, 20), switch=20, folder=tmp_path))
    assert found.is_clean and found.before == pytest.approx(3.0, abs=0.01)


def test_a_jump_and_its_end(tmp_path):
    losses = noisy(3.0, 20) + noisy(3.5, 15) + noisy(2.9, 15)
    found = switch_losses(run_of(losses, switch=20, folder=tmp_path))
    assert not found.is_clean
    assert (found.before, found.after) == pytest.approx((3.0, 3.5), abs=0.01)
    assert found.spread == pytest.approx(0.007, abs=0.003)
    assert found.back == 44, "8 of the last 10 records are at 2.9 or, up to step 35, at 3.5"


def test_a_jump_that_stays(tmp_path):
    found = switch_losses(run_of(noisy(3.0, 20) + noisy(3.5, 30), switch=20, folder=tmp_path))
    assert not found.is_clean and found.back is None


@pytest.mark.parametrize(("before", "after"), [(1, 20), (20, 1), (20, 0)])
def test_too_few_losses_say_nothing(tmp_path, before, after):
    run = run_of(noisy(3.0, before) + noisy(3.0, after), switch=before, folder=tmp_path)
    assert switch_losses(run) is None


def test_a_run_without_faults(make_run: Callable[..., Path]) -> None:
    assert incidents(read_run(make_run())) == ([], [])


def test_faults_are_counted(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    train = [record | {"skipped_steps": 5 if record["step"] > 110 else 3} for record in run.train]
    notices = [
        {"kind": "straggler", "step": 16, "text": "rank 1 is slow", "rank": 1, "factor": 2.0},
        {
            "kind": "straggler",
            "step": 32,
            "text": "rank 1 keeps up with the others again",
            "rank": 1,
            "factor": 1.0,
        },
        {"kind": "straggler", "step": 48, "text": "rank 1 is slow", "rank": 1, "factor": 3.0},
        {"kind": "loss_spike", "step": 70, "text": "the loss jumps"},
        {"kind": "note", "step": 50, "text": "rolled back from the loss spike of step 70 to step_00000050"},
        {"kind": "note", "step": 0, "text": "something else"},
    ]
    resumes = [{"kind": "resume", "step": 50}, {"kind": "resume", "step": 80}]
    wrong, known = incidents(replace(run, train=train, notices=notices, resumes=resumes))
    assert wrong == [
        "steps that overflowed after the first 100: 2",
        "spikes of the loss: 1",
        "slow ranks: 1",
        "rollbacks: 1",
    ]
    assert known == [
        "steps that overflowed while FP16 found its loss scale: 3",
        "starts from a checkpoint: 2",
    ]


def test_losses_that_are_not_finite(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    train = [record | {"loss": None if record["step"] == 7 else 2.0} for record in run.train]
    assert incidents(replace(run, train=train))[0] == ["records without a finite loss: 1"]
