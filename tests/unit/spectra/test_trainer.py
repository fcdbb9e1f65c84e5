"""The page on spectra: its Python, run as it is written, with the Trainer of transformers."""

import json
import re

import numpy as np
import pytest
import torch

from tests.harness import ROOT

PAGE = (ROOT / "docs" / "guides" / "spectra.md").read_text()
OF_A_LOOP, OF_THE_TRAINER = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def execute(lines: str) -> dict:
    names: dict = {}
    exec(lines, names)
    return names


def test_the_example_of_a_loop_writes_rows_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = execute(OF_A_LOOP)["recorder"].rows
    assert len(OF_A_LOOP.splitlines()) == 15
    assert [json.loads(line) for line in (tmp_path / "spectra.jsonl").open()] == found
    assert [row["step"] for row in found[::2]] == list(range(20, 201, 20))
    assert (tmp_path / "spectra.png").stat().st_size > 10_000


def test_the_example_of_the_trainer_has_its_steps_and_the_spectra_of_its_updates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = execute(OF_THE_TRAINER)
    rows, model = names["spectra"].recorder.rows, names["model"]
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, f"transformer.h.0.mlp.{part}.weight") for step in (2, 4) for part in ("c_fc", "c_proj")
    ]
    torch.manual_seed(0)
    first = type(model)(model.config).get_parameter(rows[-1]["layer"])
    update = (model.get_parameter(rows[-1]["layer"]) - first).detach().double().numpy()
    assert rows[-1]["values"] == pytest.approx(np.linalg.svd(update, compute_uv=False), rel=1e-6, abs=1e-9)
