"""``tools/evaluate.py`` on a run that was really trained: its own numbers, on one process and on several.

Under torchrun: `test_use_a_model_page.py`.
"""

from pathlib import Path

import pytest

from tests.distributed.evaluate_runs import evaluations
from tests.distributed.launches import TINY, data_flags, launch, records
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """InRank-Efficient past its switch."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, *data_flags(folder), "--save", str(folder / "run")]
    ended = launch([*flags, "--train-iters", "12", "--switch-iters", "8"])
    assert ended.process.returncode == 0, ended.stderr
    return folder / "run"


def calls(run: Path) -> list[list[str]]:
    overlapping = ["--stride", "40", "--micro-batch-size", "8"]
    return [[str(run)], [str(run), "--split", "test"], [str(run), *overlapping]]


@pytest.fixture(scope="module")
def alone(trained) -> list[dict]:
    return run_ranks(evaluations, 1, calls(trained))[0]


def test_evaluation_reproduces_the_recorded_losses(trained, alone):
    for found, split in zip(alone, ("valid", "test"), strict=False):
        recorded = [record for record in records(trained, "eval") if record["split"] == split][-1]
        assert (found["step"], found["tokens"]) == (recorded["step"], recorded["tokens"])
        for name in ("loss", "perplexity", "word_perplexity"):
            assert found[name] == pytest.approx(recorded[name], rel=1e-5)


def test_evaluation_is_bitwise_equal_on_any_number_of_ranks(trained, alone):
    assert run_ranks(evaluations, 2, calls(trained)) == [alone, alone]
    assert alone[2]["loss"] != alone[0]["loss"] and alone[2]["tokens"] == alone[0]["tokens"]
