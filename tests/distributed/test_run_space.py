"""Launches on a disk that is full or read-only: one error on every rank, and nothing is lost."""

import os
import subprocess
from pathlib import Path

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint, published
from inrank_megatron.config.cli import parse
from inrank_megatron.data.tokenizer import train_tokenizer
from inrank_megatron.training.folder_lock import FolderLock
from inrank_megatron.training.run_folder import RunFolder, claim
from tests.distributed.launches import TINY, Launch, data_flags, launch, records

RUN = [*TINY, "--tensor-model-parallel-size", "2", "--switch-iters", "4"]
RUN += ["--save-interval", "2", "--train-iters", "12"]


@pytest.fixture
def disk(tmp_path):
    """A small file system for the checkpoints of a run that has just begun; its records are elsewhere."""
    config, lock = parse(RUN + data_flags(tmp_path / "data"), world_size=2).config, FolderLock()
    claim(RunFolder(tmp_path / "run"), config, lock, train_tokenizer(["a text"], vocab_size=257))
    del lock  # which frees it
    folder = tmp_path / "run" / "checkpoints"
    if os.geteuid() != 0 or mount("-t", "tmpfs", "-o", "size=64k", "none", str(folder)).returncode != 0:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", *options], capture_output=True, check=False)


def size(disk: Path, option: str) -> None:
    assert mount("-o", f"remount,{option}", str(disk)).returncode == 0


def content(disk: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}


def refused(started: Launch, words: str) -> None:
    """Both ranks say the same in one line, and the launch fails."""
    assert all(words in line and "cannot be written" in line for line in errors(started))


def errors(started: Launch) -> list[str]:
    """The one line of each rank, of a launch that has failed."""
    assert started.process.returncode != 0
    lines = sorted(line for line in started.stderr.splitlines() if ": error: " in line)
    assert [line.partition(": ")[0] for line in lines] == ["rank 0", "rank 1"], started.stderr
    assert 'pretrain_gpt2.py", line' not in started.stderr, "a traceback"
    return lines


@pytest.mark.timeout(900)
def test_full_or_read_only_disk_loses_no_checkpoint(disk, tmp_path):
    run = [*RUN, *data_flags(tmp_path / "data"), "--save", str(tmp_path / "run"), "--resume", "auto"]
    size(disk, "size=2300k")
    full = launch(run, num_procs=2)
    refused(full, "No space left on device")
    before = content(disk)
    saved = [path.name for path in published(disk)]
    assert saved and all(Checkpoint(path) for path in published(disk))
    assert not [path for path in disk.iterdir() if path.name.startswith(".")], "the unfinished one is gone"
    assert [record["step"] for record in records(tmp_path / "run", "checkpoint")] == sorted(
        int(name[5:]) for name in saved
    )
    size(disk, "size=64m,ro")
    refused(launch(run, num_procs=2), "Read-only file system")
    assert content(disk) == before
    size(disk, "size=64m,rw")
    finished = launch([*run, "--keep-last", "1"], num_procs=2)
    assert finished.process.returncode == 0, finished.stderr
    assert f"resumed at step {int(saved[0][5:])}" in finished.stdout
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 13))
    assert [path.name for path in published(disk)] == ["step_00000012"]


def test_full_disk_for_metrics_stops_every_rank(tmp_path):
    run = [*RUN, *data_flags(tmp_path / "data"), "--save", str(tmp_path / "run")]
    full = launch(run, num_procs=2, script=Path(__file__).with_name("full_disk.py"))
    first, second = errors(full)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert f"{metrics}: No space left on device; correct that, then continue with --resume auto" in first
    assert (
        "rank 0 on host " in second
        and " has ended (last seen in step " in second
        and "--resume auto" in second
    )
    saved = published(tmp_path / "run" / "checkpoints")
    assert saved and all(Checkpoint(path) for path in saved)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4, 5]
    finished = launch([*run, "--resume", "auto"], num_procs=2)
    assert finished.process.returncode == 0, finished.stderr
    assert f"resumed at step {int(saved[0].name[5:])}" in finished.stdout
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 13))
