"""The commands of ``docs/guides/continue_a_model.md`` in order, with a quarter of their steps, offline."""

import json
import re
from pathlib import Path

import pytest

from tests.distributed.test_use_a_model_page import execute
from tests.harness import ROOT

PAGE = (ROOT / "docs" / "guides" / "continue_a_model.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
EVALUATIONS = [line for line in LINES if "tools/evaluate.py" in line]
STEPS = re.compile(r"(--(?:train-iters|switch-iters|relora-interval)) (\d+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the page's commands leave, all but the evaluations."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("docs", "launch", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for line in LINES:
        if line not in EVALUATIONS:
            execute(STEPS.sub(lambda found: f"{found[1]} {int(found[2]) // 4}", line), folder)
    return folder


def test_models_that_were_continued_do_better_on_such_a_text(folder):
    losses = {}
    for line in EVALUATIONS:
        losses[line.split()[2]] = json.loads(execute(f"{line} --json", folder))["loss"]
    assert losses.keys() == {"base", "continued", "small"}
    assert losses["continued"] < losses["base"] - 0.05
    assert losses["small"] < losses["base"] + 0.5


def test_the_exports_are_of_the_sizes_that_the_page_says(folder):
    def parameters(model: str) -> int:
        return (folder / model / "model.safetensors").stat().st_size

    assert parameters("small") < parameters("base") == parameters("continued")
