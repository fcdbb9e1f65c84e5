"""A jump of the loss in a run: said, its update left out, or rolled back; a resumed run repeats every bit."""

from pathlib import Path

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint
from tests.distributed.launches import TINY, course, data_flags, launch, records
from tests.distributed.spiking import NOISE
from tests.distributed.test_run_resume import copied

STEPS, SPIKE = 24, 19
SPIKING = Path(__file__).with_name("spiking.py")
FLAGS = [
    *(*TINY, "--switch-iters", "8", "--save-interval", "4", "--eval-interval", "12", "--lr", "2e-3"),
    *("--train-iters", str(STEPS), "--tensor-model-parallel-size", "2", "--zero-stage", "1"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_flags(tmp_path_factory.mktemp("data"))


def train(args, *, noise=f"{SPIKE - 1}"):
    """A run on two ranks, tensor-parallel, whose batch of index ``SPIKE`` - 1 is noise."""
    ended = launch([*FLAGS, *args], num_procs=2, script=SPIKING, env={NOISE: noise})
    return ended.process.returncode, ended.stdout, ended.stderr


def finished(args, **options):
    status, output, error = train(args, **options)
    assert status == 0, error
    return output


def resumed(run, data, tmp_path, action, *, step):
    """What a run that was killed after ``step`` comes to in the end."""
    copy = copied(run, tmp_path / f"from {step}", step=step)
    finished([*data, "--on-loss-spike", action, "--save", str(copy), "--resume", "auto"])
    return course(copy)


def state(run):
    return Checkpoint(run / "checkpoints" / f"step_{STEPS:08d}").state["loss_history"]


def test_the_update_is_left_out_and_a_resumed_run_repeats_it(data, tmp_path):
    run = tmp_path / "run"
    output = finished([*data, "--on-loss-spike", "skip", "--save", str(run)])
    [spike] = records(run, "loss_spike")
    assert (spike["step"], spike["skipped"]) == (SPIKE, True) and spike["loss"] > spike["limit"]
    assert f"step {SPIKE}: the loss jumps to" in output and "the update is left out" in output
    assert state(run)["skipped_steps"] == [SPIKE]
    assert resumed(run, data, tmp_path, "skip", step=16) == course(run)
    assert "the loss jumps to" in (run / "report.html").read_text()


def test_a_rollback_passes_over_the_batches_and_a_resumed_run_repeats_it(data, tmp_path):
    run = tmp_path / "run"
    output = finished([*data, "--on-loss-spike", "rollback", "--save", str(run)])
    assert f"rolled back from the loss spike of step {SPIKE} to step_00000016" in output
    assert state(run)["skipped_batches"] == SPIKE - 16
    assert [r["step"] for r in records(run, "train")] == list(range(1, STEPS + 1))
    assert not records(run, "loss_spike"), "the run has come past it"
    for step in (16, 20):  # it repeats the rollback; it comes after it
        assert resumed(run, data, tmp_path, "rollback", step=step) == course(run)
    everywhere = " ".join(map(str, range(SPIKE - 1, SPIKE + 99)))
    again = copied(run, tmp_path / "again", step=16)
    args = [*data, "--on-loss-spike", "rollback", "--save", str(again), "--resume", "auto"]
    status, _, error = train(args, noise=everywhere)
    assert status == 1 and "the loss has jumped after step_00000016 4 times" in error


def test_left_alone_it_is_only_said(data, tmp_path):
    output = finished([*data, "--save", str(tmp_path / "run")])
    assert [r["step"] for r in records(tmp_path / "run", "loss_spike")] == [SPIKE]
    assert "rolled back" not in output and state(tmp_path / "run")["skipped_steps"] == []
