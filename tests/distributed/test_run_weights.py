"""Launches that go on from a run folder in which a tool has put weights alone."""

import shutil

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.weights import write_weights
from inrank_megatron.data.tokenizer import train_tokenizer
from inrank_megatron.engine.state import recorded_structure
from tests.distributed.launches import TINY, data_flags, launch, records

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
RUN = [*TINY, "--tensor-model-parallel-size", "1", "--eval-interval", "4", "--eval-iters", "2"]
DENSE = [*RUN[1 : RUN.index("--rank-check-interval")], *RUN[RUN.index("--rank-check-interval") + 2 :]]
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_flags(tmp_path_factory.mktemp("data"))


def converted(run, target):
    """A folder as a tool leaves it: the configuration and the weights, as step 0."""
    target.mkdir()
    shutil.copy(run / "config.yaml", target)
    shutil.copytree(run / "tokenizer", target / "tokenizer")
    checkpoint = Checkpoint(run / "checkpoints" / f"step_{STEPS:08d}")
    write_weights(
        target / "checkpoints",
        step=0,
        factors=recorded_structure(checkpoint.state["engine"]),
        tensors=checkpoint.tensors(n for n in checkpoint.names if not n.endswith(MOMENTS)),
    )
    return target


def test_weights_only_run_takes_another_seed_and_more_steps(data, tmp_path):
    first = [*RUN, *data, "--switch-iters", "4", "--train-iters", str(STEPS), "--save", str(tmp_path / "a")]
    assert launch(first).process.returncode == 0
    left = records(tmp_path / "a", "eval")
    run = converted(tmp_path / "a", tmp_path / "b")
    args = [*RUN, *data, "--switch-iters", "2", "--train-iters", "6", "--save", str(run), "--seed", "7"]
    resumed = launch([*args, "--resume", "auto"], num_procs=2)
    assert resumed.process.returncode == 0, resumed.stderr
    assert (
        "holds weights alone: moments, their step counts and the loss scale start from zero" in resumed.stdout
    )
    assert "resumed at step 0" in resumed.stdout and "seed 1234 -> 7" in resumed.stdout
    steps = records(run, "train")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {record["phase"] for record in steps} == {2}
    fresh = records(tmp_path / "a", "train")[0]["loss"]
    assert steps[0]["loss"] < (fresh + left[-1]["loss"]) / 2, "the weights were not taken up"
    assert {(r["step"], r["event"]) for r in records(run, "ranks")} == {(0, "init")}
    own = Checkpoint(run / "checkpoints" / "step_00000006")
    assert "weights_only" not in own.state or own.state["weights_only"] is False
    assert len(own.state["identity"]["data"]) > 12


def test_weights_keep_their_tokenizer(data, tmp_path):
    first = [*RUN, *data, "--switch-iters", "4", "--train-iters", str(STEPS), "--save", str(tmp_path / "a")]
    assert launch(first).process.returncode == 0
    run = converted(tmp_path / "a", tmp_path / "b")
    train_tokenizer(["words of another text"] * 50, vocab_size=512).save(tmp_path / "other")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    args = [*RUN, *data, "--switch-iters", "4", "--train-iters", "12", "--resume", "auto"]
    for folder in (run, tmp_path / "a"):
        refused = launch([*args, "--save", str(folder), "--tokenizer", str(tmp_path / "other")])
        assert refused.process.returncode == 1
        assert "was trained with another tokenizer" in refused.stderr and refused.stderr.count("\n") == 1
        assert f"give --tokenizer {folder / 'tokenizer'}" in refused.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_dense_weights_resume_and_initialise_other_methods(data, tmp_path):
    first = [*DENSE, *data, "--train-iters", str(STEPS), "--save", str(tmp_path / "a")]
    assert launch(first).process.returncode == 0
    run = converted(tmp_path / "a", tmp_path / "b")
    pretrained = [*RUN, *data, "--train-iters", "4", "--switch-iters", "2", "--save", str(tmp_path / "c")]
    started = launch([*pretrained, "--pretrained-checkpoint", str(run)])
    assert started.process.returncode == 0, started.stderr
    assert "starts from the weights of" in started.stdout
    resumed = launch([*DENSE, *data, "--train-iters", "4", "--save", str(run), "--resume", "auto"])
    assert resumed.process.returncode == 0, resumed.stderr
    losses = [records(folder, "train")[0]["loss"] for folder in (run, tmp_path / "c")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
