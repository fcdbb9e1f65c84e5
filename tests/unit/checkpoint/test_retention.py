"""Which checkpoints stay: the last, the best, whatever the run went back behind, and nothing half removed."""

import shutil

import pytest
import torch

from inrank_megatron.checkpoint import retention
from inrank_megatron.checkpoint.folder import (
    Checkpoint,
    Damaged,
    best_complete,
    is_set_aside,
    newest_complete,
    published,
    step_of,
)
from inrank_megatron.checkpoint.retention import go_back, prune, tidy
from inrank_megatron.checkpoint.verify import MANIFEST
from inrank_megatron.checkpoint.writing import CheckpointWriter


def write(root, step, loss=None, tokens=100):
    writer = CheckpointWriter(root, step)
    writer.add("w", torch.full((5,), float(step)))
    return writer.publish({"step": step, "validation_loss": loss, "validation_tokens": tokens})


def steps(root):
    return sorted(map(step_of, published(root)))


def spoil(folder):
    content = bytearray((folder / "tensors_00000.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors_00000.safetensors").write_bytes(bytes(content))


def test_last_and_best_checkpoints_are_kept(tmp_path):
    for step, loss in {2: 4.0, 4: 1.0, 6: 2.0, 8: None, 10: 3.0}.items():
        newest = write(tmp_path, step, loss)
        prune(tmp_path, keep_last=2, verified=set(), newest=newest)
    assert steps(tmp_path) == [4, 8, 10]
    assert not list(tmp_path.glob(".*"))
    assert best_complete(tmp_path)[0].name == "step_00000004"


def test_better_checkpoint_replaces_the_best(tmp_path):
    for step, loss in {2: 4.0, 4: 1.0, 6: 0.5, 8: 2.0}.items():
        prune(tmp_path, keep_last=1, verified=set(), newest=write(tmp_path, step, loss))
    assert steps(tmp_path) == [6, 8]


def test_nothing_is_removed_before_the_new_one_is_complete(tmp_path):
    for step in (2, 4):
        write(tmp_path, step)
    newest = write(tmp_path, 6)
    spoil(newest)
    with pytest.raises(Damaged):
        prune(tmp_path, keep_last=1, verified=set(), newest=newest)
    assert steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("at", ["before the rename", "after the rename", "in the middle"])
def test_kill_during_a_removal_keeps_complete_checkpoints(tmp_path, monkeypatch, at):
    for step in (2, 4):
        write(tmp_path, step)
    remove = shutil.rmtree

    def killed(path, **options):
        if path.exists() and path.name.endswith(retention.REMOVED):
            if at == "in the middle":
                (path / "manifest.json").unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    if at == "before the rename":
        monkeypatch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep_last=1, verified=set(), newest=tmp_path / "step_00000004")
    monkeypatch.undo()
    assert all(Checkpoint(folder) for folder in published(tmp_path))
    tidy(tmp_path)
    assert newest_complete(tmp_path) == (tmp_path / "step_00000004", [])
    assert not list(tmp_path.glob(".*"))


def test_best_of_an_abandoned_course_does_not_count(tmp_path):
    for step, loss in {2: 4.0, 4: 3.0, 6: 0.5, 8: 1.0}.items():
        write(tmp_path, step, loss)
    go_back(tmp_path, 4)
    assert best_complete(tmp_path)[0].name == "step_00000004"
    prune(tmp_path, keep_last=1, verified=set(), newest=write(tmp_path, 5, 3.5))
    assert best_complete(tmp_path)[0].name == "step_00000004"
    assert steps(tmp_path) == [4, 5, 6, 8]


def test_resume_from_an_older_step_sets_later_ones_aside(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step, loss=float(step))
    go_back(tmp_path, 4)
    assert steps(tmp_path) == [2, 4, 6, 8]
    assert newest_complete(tmp_path)[0].name == "step_00000004"
    newest = write(tmp_path, 7)
    prune(tmp_path, keep_last=2, verified=set(), newest=newest)
    # 6 has been passed, 8 has not; 2 is the best.
    assert steps(tmp_path) == [2, 4, 7, 8] and is_set_aside(tmp_path / "step_00000008")
    assert newest_complete(tmp_path)[0] == newest
    write(tmp_path, 8)
    assert newest_complete(tmp_path)[0].name == "step_00000008"


def test_checkpoint_set_aside_can_be_resumed(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    go_back(tmp_path, 2)
    go_back(tmp_path, 6)
    assert newest_complete(tmp_path)[0].name == "step_00000006"
    assert is_set_aside(tmp_path / "step_00000004")


def test_best_complete_checkpoint(tmp_path):
    assert best_complete(tmp_path) == (None, [])
    for step in (2, 4):
        write(tmp_path, step)
    assert best_complete(tmp_path)[0].name == "step_00000004", "the newest if no loss is on record"
    for step, loss in {6: 2.0, 8: 2.0, 10: 9.0}.items():
        write(tmp_path, step, loss)
    assert best_complete(tmp_path)[0].name == "step_00000008", "the newer of equals"
    spoil(tmp_path / "step_00000008")
    assert best_complete(tmp_path)[0].name == "step_00000006"
    for step in (6, 10, 4):
        spoil(tmp_path / f"step_{step:08d}")
    found, faults = best_complete(tmp_path)
    assert found.name == "step_00000002"
    passed_over = [step for step in (4, 6, 8, 10) if any(f"step_{step:08d}" in fault for fault in faults)]
    assert passed_over == [4, 6, 8, 10] and len(faults) == 4


def test_damaged_checkpoint_does_not_count(tmp_path):
    """Of the last or of the best; one that may be complete but cannot be read stays next to those that do."""
    for step, loss in {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 5.0, 12: 6.0}.items():
        newest = write(tmp_path, step, loss)
    for step in (4, 10):
        spoil(tmp_path / f"step_{step:08d}")
    manifest = tmp_path / "step_00000008" / MANIFEST
    of_another_version = manifest.read_text().replace('"format_version": 2', '"format_version": 1')
    manifest.write_text(of_another_version)
    prune(tmp_path, keep_last=2, verified=set(), newest=newest)
    assert steps(tmp_path) == [6, 8, 10, 12]


def test_verified_checkpoint_is_not_read_again(tmp_path, monkeypatch):
    read = []

    def checkpoint(folder, **options):
        read.append(step_of(folder))
        return Checkpoint(folder, **options)

    monkeypatch.setattr(retention, "Checkpoint", checkpoint)
    verified = {write(tmp_path, 2, 1.0)}
    for step in (4, 6, 8):
        prune(tmp_path, keep_last=2, verified=verified, newest=write(tmp_path, step, 2.0))
    assert read == [8, 6], "nothing before there is something to remove"
    prune(tmp_path, keep_last=2, verified=verified, newest=write(tmp_path, 10, 2.0))
    assert read == [8, 6, 10]


def test_links_are_not_followed(tmp_path):
    """A folder that lies elsewhere is read like any other and never removed."""
    root = tmp_path / "checkpoints"
    elsewhere = write(tmp_path / "elsewhere", 2)
    newest = write(root, 4)
    (root / elsewhere.name).symlink_to(elsewhere)
    prune(root, keep_last=1, verified=set(), newest=newest)
    assert elsewhere.is_dir() and Checkpoint(root / elsewhere.name)


def test_losses_over_other_tokens_do_not_compare(tmp_path):
    """As of before --eval-iters was changed."""
    for step, loss in ((2, 5.3), (4, 5.1), (6, 5.2)):
        write(tmp_path, step, loss=loss)
    assert best_complete(tmp_path)[0].name == "step_00000004"
    write(tmp_path, 8, loss=5.25, tokens=1000)
    assert best_complete(tmp_path)[0].name == "step_00000008"
