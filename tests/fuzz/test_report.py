"""Run folders as the report reads them."""

from pathlib import Path

import pytest

from inrank_megatron.reporting.report import write_report
from inrank_megatron.reporting.run import read_run
from inrank_megatron.reporting.several import write_comparison
from inrank_megatron.training.closing import last_lines
from tests.fuzz.mutate import JSON, YAML, damages
from tests.fuzz.readers import Reader, attack, intact
from tests.unit.conftest import write_run


def folder(root: Path) -> Path:
    return write_run(root / "run", steps=120)


def read_records(path: Path) -> str:
    """Whatever is asked of the records can be answered, and the last lines be printed."""
    run = read_run(path)
    assert run.last_step >= 0
    run.ranks_by_layer()
    run.last_evaluation("valid")
    return last_lines(path)


def read_report(path: Path) -> Path:
    """The page is there."""
    page = write_report(path)
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return page


def read_several(path: Path) -> Path:
    """The page of a damaged run next to an intact one is there."""
    if not (whole := path.parent / "whole").exists():
        write_run(whole, steps=20, method="dense")
    page = write_comparison([path, whole], path.parent / "comparison.html")
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return page


READERS = (
    Reader("records", folder, read_records, damages(JSON, YAML), 60),
    Reader("report", folder, read_report, damages(JSON, JSON, YAML), 3),
    Reader("several", folder, read_several, damages(JSON, JSON, YAML), 3),
)


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_damaged_run_folders_are_reported_or_refused(reader, tmp_path):
    attack(reader, intact(reader, tmp_path / "made"), tmp_path / "scratch", examples=reader.examples)
