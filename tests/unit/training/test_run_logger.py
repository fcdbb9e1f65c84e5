"""The run logger writes on one rank alone, goes on where a run was left, and outlives its reader."""

import json
import os

import pytest

from inrank_megatron.training.evaluate import Evaluation
from inrank_megatron.training.run_folder import RunFolder
from inrank_megatron.training.run_logger import RunLogger
from tests.forked import server

PART = Evaluation(loss=2.5, tokens=50, word_perplexity=None)
RESULT = Evaluation(loss=2.0, tokens=100, word_perplexity=None, part=PART)


def run_logger(path, *, active=True, start_step=0, is_new=False):
    return RunLogger(
        RunFolder(path, is_new=is_new), active=active, total_steps=8, start_step=start_step, vocab_size=9
    )


def steps(path):
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_other_ranks_write_nothing(tmp_path):
    with run_logger(tmp_path, active=False) as other:
        other.evaluation(4, "valid", RESULT, elapsed_seconds=1.0)
        other.event("checkpoint", 4, "saved")
        assert other.recorded_evaluation(4, "valid", tokens=100) is None
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_session_evaluated(tmp_path):
    with run_logger(tmp_path, is_new=True) as first:
        for step in (4, 8):
            first.evaluation(step, "valid", RESULT, elapsed_seconds=1.0)
    with run_logger(tmp_path, start_step=4) as resumed:
        assert resumed.recorded_evaluation(4, "valid", tokens=100) == RESULT
        assert resumed.recorded_evaluation(4, "test", tokens=100) is None
        assert resumed.recorded_evaluation(4, "valid", tokens=50) is None, "of fewer windows"
        assert resumed.recorded_evaluation(8, "valid", tokens=100) is None, "of a step that is repeated"
    assert steps(tmp_path) == [4, 4], "the second: that it went on from there"


def test_perplexity_of_an_absurd_loss():
    assert Evaluation(loss=1e4, tokens=1, word_perplexity=None).perplexity == float("inf")
    assert RESULT.perplexity == pytest.approx(7.389, rel=1e-3)


def write(folder, stdout):
    """In a process whose standard output is that named pipe."""
    os.dup2(os.open(stdout, os.O_WRONLY), 1)
    with run_logger(folder, is_new=True) as written:
        for step in range(2000):
            written.event("checkpoint", step, "a line that nobody reads " * 10)


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    stdout, folder = tmp_path / "stdout", tmp_path / "run"
    os.mkfifo(stdout)
    folder.mkdir()
    writer = server().Process(target=write, args=(folder, stdout), daemon=True)
    writer.start()
    with stdout.open() as reader:
        assert reader.readline()
    writer.join(timeout=120)
    assert writer.exitcode == 0
    assert steps(folder) == list(range(2000))
