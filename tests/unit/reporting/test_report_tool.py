"""``tools/report.py`` writes only into run folders."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.forked import run_forked

TOOL = Path(__file__).resolve().parents[3] / "tools" / "report.py"


def test_unfinished_run_has_a_report(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(steps=47)
    command = [sys.executable, str(TOOL), str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run_dir / "report.html")
    assert "has not finished" in (run_dir / "report.html").read_text()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("precious")
    done = run_forked(TOOL, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "not a run folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "precious"
