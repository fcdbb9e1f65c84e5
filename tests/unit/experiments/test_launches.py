"""Runs as processes of their own: a GPU for each, and one folder for runs of the same settings alone."""

import json

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.launches import claim, gpu_of


@pytest.mark.parametrize(
    ("visible", "count", "gpus"),
    [
        (None, 0, [None, None, None]),
        ("", 0, [None, None, None]),
        (None, 2, ["0", "1", "0"]),
        ("GPU-a, GPU-b", 2, ["GPU-a", "GPU-b", "GPU-a"]),
        ("5", 1, ["5", "5", "5"]),
    ],
)
def test_runs_at_a_time_have_a_gpu_each(visible, count, gpus):
    found = [gpu_of(worker, visible=visible, count=count) for worker in range(3)]
    assert found == [{} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]


def test_a_folder_is_for_runs_of_the_same_settings_and_the_error_names_those_that_differ(tmp_path):
    path = tmp_path / "new" / "study.json"
    claim(path, {"flags": ("--lr", "1"), "width": 64})
    claim(path, {"flags": ("--lr", "1"), "width": 64})
    with pytest.raises(
        UserError, match=r"new holds runs of {'width': 64}, not of {'width': 32}: give another --output"
    ):
        claim(path, {"flags": ("--lr", "1"), "width": 32})
    assert json.loads(path.read_text())["width"] == 64
    for damaged in ("no JSON", "[]", "7"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is no JSON object"):
            claim(path, {})
        assert path.read_text() == damaged
    with pytest.raises(UserError, match=r"--output .*study.json: .*; give another folder"):
        claim(path / "study.json", {})
