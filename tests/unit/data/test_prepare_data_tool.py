"""The command that makes token files ahead of training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inrank_megatron.config.schema import DataConfig
from inrank_megatron.errors import UserError
from tests.forked import run_forked
from tests.unit.data.texts import prose
from tools.prepare_data import settings

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "prepare_data.py"


def test_tool_prints_counts_and_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(20000, seed=4))
    flags = ("--data-path", tmp_path / "a.txt", "--vocab-size", 300, "--data-cache-path", tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, TOOL, *map(str, flags)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"token files: {tmp_path / 'cache'}" in done.stdout
    assert "vocabulary: 300 tokens" in done.stdout
    assert [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")] == [
        "train",
        "valid",
        "test",
    ]


def test_a_fault_is_one_line(tmp_path: Path) -> None:
    done = run_forked(TOOL, "--data-path", tmp_path / "missing.txt", "--data-cache-path", tmp_path / "cache")
    assert done.returncode == 1
    assert done.stderr.startswith("error: data path ")
    assert done.stderr.count("\n") == 1


def test_flags_are_those_of_the_data_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings([]) == DataConfig()
    data = settings(["--data-path", "0.3", "a", "0.7", "b", "--split", "1,0,0", "--vocab-size", "500"])
    assert (data.data_path, data.split, data.vocab_size) == (["0.3", "a", "0.7", "b"], "1,0,0", 500)
    with pytest.raises(SystemExit):
        settings(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in DataConfig.model_fields)
    with pytest.raises(UserError, match="vocab_size = 0"):
        settings(["--vocab-size", "0"])
