"""``docs/guides/add_a_method.md`` done as it says, in a copy of the package with nothing else touched."""

import re
import shutil
from pathlib import Path

import pytest

from tests.distributed.launches import TINY, Launch, data_flags, launch, records
from tests.harness import ROOT

PAGE = ROOT / "docs" / "guides" / "add_a_method.md"
PROGRAM = Path(__file__).with_name("copied_program.py")
METHOD = ["--method", "halving", "--rank", "8", "--halving-interval", "2"]
RUN = [*TINY[1 : TINY.index("--rank-check-interval")], *METHOD, "--train-iters", "6"]


def patched(text: str, change: str) -> str:
    """``text`` with each added line of ``change`` after the context line above it."""
    lines, at = text.splitlines(), 0
    for line in change.splitlines():
        if line.startswith("+"):
            at += 1
            lines.insert(at, line[1:])
        else:
            at = lines.index(line[1:], at)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package and its main program with the page's blocks where their titles say."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("inrank_megatron", "launch", "configs", "patches"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r'^```(\w+) title="(\S+)"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for language, title, block in blocks:
        path = folder / title
        path.write_text(block if language == "python" else patched(path.read_text(), block))
    assert {language for language, _, _ in blocks} == {"python", "diff"}
    return folder


def run(copy: Path, *args: str, num_procs: int = 1) -> Launch:
    return launch([str(copy), *args], script=PROGRAM, num_procs=num_procs)


def test_the_page_is_short():
    assert len(PAGE.read_text().splitlines()) < 60


def test_its_flag_is_in_the_help_and_its_phases_in_the_plan(copy):
    assert "--halving-interval N" in run(copy, "--help").stdout
    plan = run(copy, *RUN, "--dry-run")
    assert re.search(r"U V, first +32 .*\n *U V, last +8 ", plan.stdout), plan.stdout + plan.stderr


def test_other_methods_refuse_its_flag(copy):
    refused = run(copy, *RUN, "--method", "lora")
    assert "--halving-interval 2: has no effect with method lora; give --method halving" in refused.stderr


def test_it_trains_and_goes_on_under_tensor_parallelism(copy, tmp_path):
    folder = tmp_path / "run"
    flags = [*RUN, *data_flags(tmp_path / "data"), "--save", str(folder), "--save-interval", "3"]
    alone = run(copy, *flags, "--tensor-model-parallel-size", "1")
    first = records(folder, "train")
    assert [record["mean_rank"] for record in first] == [32, 32, 16, 16, 8, 8], alone.stdout + alone.stderr
    assert "step 4: U V becomes U* V*, mean rank 8.0: " in alone.stdout
    both = run(copy, *flags, "--tensor-model-parallel-size", "2", "--resume", "3", num_procs=2)
    again = records(folder, "train")
    assert [record["mean_rank"] for record in again] == [32, 32, 16, 16, 8, 8], both.stdout + both.stderr
    losses = [[record["loss"] for record in found[3:]] for found in (first, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
