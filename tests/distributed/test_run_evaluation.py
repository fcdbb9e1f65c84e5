"""Perplexity is the same on any number of ranks, and that of a plain loop over all tokens."""

import math

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint, published
from tests.distributed.evaluation import SEQUENCE, TOKENS, WORDS, results
from tests.distributed.launches import ADAMW, TINY, data_flags, launch, records
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def alone():
    return run_ranks(results, 1, 1)[0]


def test_evaluation_matches_a_plain_loop(alone):
    found, plain = alone
    for evaluation in found[:2]:
        assert evaluation["loss"] == pytest.approx(plain, rel=1e-6)
        assert evaluation["tokens"] == TOKENS - 1
        assert evaluation["word_perplexity"] == pytest.approx(
            math.exp(plain * (TOKENS - 1) / WORDS), rel=1e-5
        )
    for part in found[2:4]:
        assert part["tokens"] == 3 * SEQUENCE and part["word_perplexity"] is None
        assert part["loss"] != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(
    ("world_size", "tp", "zero_stage"), [(2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (2, 1, 3), (4, 2, 3)]
)
def test_evaluation_agrees_on_every_topology(alone, world_size, tp, zero_stage):
    """Windows do not come out even: in the last pass some ranks have none."""
    for found, _ in run_ranks(results, world_size, tp, zero_stage, timeout=120):
        for one, other in zip(alone[0], found, strict=True):
            assert one["tokens"] == other["tokens"]
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_best_checkpoint_of_partial_validation(tmp_path):
    """It is told by what all validations have in common: the last one is over the whole split."""
    args = [*TINY, *ADAMW, "--tensor-model-parallel-size", "1", "--switch-iters", "3", "--train-iters", "10"]
    args += ["--lr", "0.06", "--lr-warmup-iters", "9"]  # too high from the fourth step on
    # No step down the gradient at the start, slow new columns: the second validation is clearly the best.
    args += ["--absorb-columns", "--new-column-moments", "mean", "--factor-lr-multiplier", "4"]
    args += ["--save-interval", "2", "--eval-interval", "2", "--eval-iters", "1", "--keep-last", "1"]
    finished = launch([*args, *data_flags(tmp_path / "data"), "--save", str(tmp_path / "run")])
    assert finished.process.returncode == 0, finished.stderr
    evaluations = [r for r in records(tmp_path / "run", "eval") if r["split"] == "valid"]
    *earlier, last = [(r["part"] or r)["loss"] for r in evaluations]
    assert earlier[1] < min(earlier[0], *earlier[2:], last) - 0.01
    assert last != evaluations[-1]["loss"] and evaluations[-1]["tokens"] > evaluations[0]["tokens"]
    kept = [Checkpoint(path).state for path in published(tmp_path / "run" / "checkpoints")]
    found = [(s["step"], s["validation_loss"], s["validation_tokens"]) for s in kept]
    assert found == [(10, last, 4 * 64), (4, earlier[1], 4 * 64)]
