"""A run starts from the weights of a dense one, and needs that no more once it has begun."""

import shutil

import pytest

from inrank_megatron.config.loading import load
from tests.distributed.launches import TINY, Launch, data_flags, last_step, launch, records

DENSE = [*TINY[1 : TINY.index("--rank-check-interval")], "--lr-warmup-iters", "2"]
RELORA = ["--method", "relora", "--rank", "8", "--relora-interval", "4", "--relora-warmup-iters", "2"]


def test_relora_and_inrank_start_from_a_dense_run(tmp_path):
    data, dense = data_flags(tmp_path / "data"), tmp_path / "dense"
    common = [*DENSE, *data, "--eval-iters", "2", "--lr", "3e-3"]
    launch([*common, "--train-iters", "30", "--save", str(dense)])
    dense_losses = [record["loss"] for record in records(dense, "train")]
    start = ["--pretrained-checkpoint", str(dense)]

    relora = tmp_path / "relora"
    flags = [*common, *RELORA, *start, "--train-iters", "6", "--save", str(relora)]
    done = launch([*flags, "--tensor-model-parallel-size", "2"], num_procs=2)
    assert done.process.returncode == 0, done.stderr
    assert f"starts from the weights of {dense}" in done.stdout
    assert load(relora / "config.yaml").training.pretrained_checkpoint == str(dense)
    losses = [record["loss"] for record in records(relora, "train")]
    # The data start from zero, so its first batch is the dense run's first, which lowered its loss since.
    assert losses[0] < 0.9 * dense_losses[0]
    assert len(losses) == 6

    refused = launch([*common, *RELORA, "--pretrained-checkpoint", str(relora), "--train-iters", "6"])
    assert refused.process.returncode != 0
    assert "holds factors U, V" in refused.stderr and refused.stderr.count("\n") == 1

    inrank = tmp_path / "inrank"
    flags = ["--inrank", "--rank-check-interval", "4", "--switch-iters", "60", "--train-iters", "64"]
    with Launch([*common, *flags, *start, "--save", str(inrank)]) as started:
        started.until(lambda: last_step(inrank) >= 1, "the first step")
        assert last_step(inrank) < 60
        shutil.rmtree(dense)
        assert started.wait() == 0, started.stderr
    train = records(inrank, "train")
    assert train[0]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert train[-1]["step"] == 64 and train[-1]["phase"] != train[0]["phase"]
