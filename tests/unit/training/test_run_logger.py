"""The run logger writes on one rank alone, goes on where a run was left, and outlives its reader."""

import json
import subprocess
import sys

import pytest

from inrank_megatron.training.evaluate import Evaluation
from inrank_megatron.training.run_folder import RunFolder
from inrank_megatron.training.run_logger import RunLogger

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
    assert steps(tmp_path) == [4]


def test_perplexity_of_an_absurd_loss():
    assert Evaluation(loss=1e4, tokens=1, word_perplexity=None).perplexity == float("inf")
    assert RESULT.perplexity == pytest.approx(7.389, rel=1e-3)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_run_logger import run_logger
with run_logger(Path(sys.argv[1]), is_new=True) as written:
    for step in range(2000):
        written.event("checkpoint", step, "a line that nobody reads " * 10)
"""


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(__file__.rpartition("/")[0])]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout.readline()
    writer.stdout.close()
    assert writer.wait(timeout=120) == 0, writer.stderr.read()
    assert steps(tmp_path) == list(range(2000))
