"""Launches on a run folder whose newest checkpoint is damaged: the older serves, and it is written anew."""

import shutil
from pathlib import Path

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint
from tests.distributed.launches import TINY, course, data_flags, launch
from tests.unit.checkpoint.test_verify import HARM

OLDER, NEWEST = "step_00000004", "step_00000008"
RUN = [*TINY, "--tensor-model-parallel-size", "1", "--switch-iters", "6"]
RUN += ["--save-interval", "4", "--train-iters", "10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_flags(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = launch([*RUN, *data, "--save", str(folder)])
    assert finished.process.returncode == 0, finished.stderr
    return folder


def harm(name: str, file: str):
    return lambda root: HARM[name](root / NEWEST / file)


def unpublish(root: Path) -> None:
    """As a kill just before the rename leaves it."""
    (root / NEWEST).rename(root / f".{NEWEST}.partial")


def leave_a_partial(root: Path) -> None:
    """As a kill leaves it in a save of a step that is written again."""
    partial = shutil.copytree(root / NEWEST, root / f".{NEWEST}.partial")
    HARM["cut short"](partial / "tensors_00000.safetensors")


def point_elsewhere(root: Path) -> None:
    (root / "latest").write_bytes(b"\x00step_00000099")
    (root / "latest_checkpointed_iteration.txt").write_text(OLDER)


# What happens to the checkpoints, the one that the run goes on from, and whether it speaks of damage.
CASES = {
    **{f"tensors {name}": (harm(name, "tensors_00000.safetensors"), OLDER, True) for name in HARM},
    "manifest of garbage": (
        lambda root: (root / NEWEST / "manifest.json").write_bytes(b"\x00\xff{"),
        OLDER,
        True,
    ),
    "not published": (unpublish, OLDER, False),
    "a partial one next to it": (leave_a_partial, NEWEST, False),
    "pointers of other programs": (point_elsewhere, NEWEST, False),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_takes_the_newest_complete_checkpoint(undisturbed, data, tmp_path, case):
    damage, start, is_told = CASES[case]
    run = shutil.copytree(undisturbed, tmp_path / "run")
    root = run / "checkpoints"
    shutil.rmtree(root / "step_00000010")
    older = content(root / OLDER)
    damage(root)
    resumed = launch([*RUN, *data, "--save", str(run), "--resume", "auto"])
    assert resumed.process.returncode == 0 and resumed.stderr == "", resumed.stderr
    assert f"resumed at step {int(start[-8:])}" in resumed.stdout
    said = [line for line in resumed.stdout.splitlines() if "skipped a broken checkpoint" in line]
    assert [NEWEST in line for line in said] == [True] * is_told
    assert course(run) == course(undisturbed)
    assert content(root / OLDER) == older and Checkpoint(root / NEWEST)
    assert not list(root.glob(".*"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
