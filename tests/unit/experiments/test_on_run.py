"""The paper's figures of ranks and spectra, from a run's own records."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.command import main
from inrank_megatron.reporting.report import write_report


@pytest.mark.parametrize(("name", "plot"), [("figure1", "spectrum"), ("figures5to7", "ranks")])
def test_it_is_the_figure_of_the_report(make_run: Callable[..., Path], tmp_path, capsys, name, plot) -> None:
    run, output = make_run(), tmp_path / "out"
    write_report(run)
    main([name, str(run), "--json", "--output", str(output)])
    assert (output / f"{name}.png").read_bytes() == (run / "plots" / f"{plot}.png").read_bytes()
    rows = json.loads(capsys.readouterr().out)
    assert [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()] == rows
    assert len(rows) == 8 * 5, "8 layers, checks at 10 to 50"
    assert rows[4] == {"step": 50, "block": 0, "linear": "linear_fc1", "rank": 9, "explained_ratio": 0.9}


def test_a_run_without_spectra_is_refused(make_run: Callable[..., Path], tmp_path) -> None:
    with pytest.raises(UserError, match="no rank check with a spectrum"):
        main(["figure1", str(make_run(method="dense")), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
