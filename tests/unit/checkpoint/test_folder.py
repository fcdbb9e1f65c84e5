"""Checkpoints are whole or refused: what is damaged is never loaded and never loses what is whole."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from inrank_megatron.checkpoint import writing
from inrank_megatron.checkpoint.folder import (
    Checkpoint,
    Damaged,
    newest_complete,
    published,
)
from inrank_megatron.checkpoint.retention import tidy
from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.errors import UserError

TENSORS = {
    "w": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(2.5),
}


def write(root, step, **state):
    writer = CheckpointWriter(root, step)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    return writer.publish({"step": step, **state})


def assert_complete(path, **state):
    checkpoint = Checkpoint(path)
    read = dict(checkpoint.tensors(checkpoint.names))
    assert read.keys() == TENSORS.keys()
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )
    assert checkpoint.state.items() >= state.items()


@pytest.mark.parametrize("file_bytes", [1, 50, 2**30])
def test_round_trip_is_exact(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(writing, "FILE_BYTES", file_bytes)
    path = write(tmp_path, 7, note="x")
    assert path == tmp_path / "step_00000007"
    assert_complete(path, step=7, note="x")
    assert len(list(path.glob("*.safetensors"))) == {1: 3, 50: 2}.get(file_bytes, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_rewriting_a_step_replaces_it(tmp_path):
    write(tmp_path, 7, note="old")
    assert_complete(write(tmp_path, 7, note="new"), note="new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000007"]


def test_tensor_view_is_saved_as_its_own_values(tmp_path):
    writer = CheckpointWriter(tmp_path, 1)
    writer.add("t", TENSORS["w"].t())
    writer.add("same", TENSORS["w"])
    read = dict(Checkpoint(writer.publish({})).tensors(["t", "same"]))
    assert torch.equal(read["t"], TENSORS["w"].t()) and torch.equal(read["same"], TENSORS["w"])


def test_duplicate_name_is_refused(tmp_path):
    writer = CheckpointWriter(tmp_path, 2)
    writer.add("t", TENSORS["w"])
    with pytest.raises(ValueError, match="twice"):
        writer.add("t", TENSORS["w"])


def truncate(path):
    tensors = next(path.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])


def flip_a_bit(path):
    tensors = next(path.glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-3] ^= 4
    tensors.write_bytes(bytes(content))


def empty_the_state(path):
    (path / "state.json").write_bytes(b"")


def rename_a_tensor(path):
    (path / "index.json").write_text((path / "index.json").read_text().replace('"w"', '"v"'))


def edit_manifest(change):
    def edit(path):
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return edit


DAMAGE = {
    "truncated": truncate,
    "bit flipped": flip_a_bit,
    "empty": empty_the_state,
    "index altered": rename_a_tensor,
    "missing": lambda path: (path / "index.json").unlink(),
    "folder instead of a file": lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest is not JSON": lambda path: (path / "manifest.json").write_bytes(b"\x00\xff{"),
    "manifest is a list": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest without files": edit_manifest(lambda manifest: manifest.update(files={})),
    "manifest with a list of files": edit_manifest(lambda manifest: manifest.update(files=["state.json"])),
    "manifest without hashes": edit_manifest(lambda manifest: manifest["files"].update({"state.json": {}})),
    "manifest that leads out": edit_manifest(
        lambda manifest: manifest["files"].update({"../x": manifest["files"]["state.json"]})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_skipped_with_a_message(tmp_path, damage):
    older, newer = write(tmp_path, 3), write(tmp_path, 12)
    (tmp_path / "x").write_bytes((newer / "state.json").read_bytes())
    DAMAGE[damage](newer)
    with pytest.raises(UserError, match="step_00000012"):
        Checkpoint(newer)
    found, faults = newest_complete(tmp_path)
    assert found == older
    assert len(faults) == 1 and "step_00000012" in faults[0] and "\n" not in faults[0]
    assert_complete(older, step=3)


@pytest.mark.parametrize("reason", ["another version", "not readable"])
def test_unreadable_checkpoint_is_refused_and_kept(tmp_path, reason, monkeypatch):
    """Going on from the older one would in time replace the newer."""
    write(tmp_path, 3)
    newer = write(tmp_path, 12)
    if reason == "another version":
        edit_manifest(lambda manifest: manifest.update(format_version=99))(newer)
        words = "checkpoint format 99"
    else:
        refused, opened = newer / "state.json", Path.open

        def open_or_refuse(path, *args, **kwargs):
            if path == refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", open_or_refuse)
        words = "state.json: cannot be read (Permission denied)"
    with pytest.raises(UserError, match=re.escape(words)) as refusal:
        newest_complete(tmp_path)
    assert not isinstance(refusal.value, Damaged)


def test_no_complete_checkpoint_gives_none(tmp_path):
    for step in (1, 2):
        truncate(write(tmp_path, step))
    found, faults = newest_complete(tmp_path)
    assert found is None and len(faults) == 2


def test_only_published_checkpoints_count(tmp_path):
    for name in ("step_x", ".step_00000009.partial", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000005").write_text("a file")
    write(tmp_path, 9), write(tmp_path, 100_000_000)
    assert [path.name for path in published(tmp_path)] == ["step_100000000", "step_00000009"]
    assert published(tmp_path / "absent") == []


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    killed = CheckpointWriter(tmp_path, 4)
    killed.add("w", TENSORS["w"])
    complete, replaced = write(tmp_path, 6), write(tmp_path, 8, note="older")
    replaced.rename(tmp_path / ".step_00000008.replaced")
    shutil.copytree(complete, tmp_path / ".step_00000006.replaced")
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000006", "step_00000008"]
    assert_complete(replaced, note="older")


def test_failed_write_is_reported_and_keeps_older_checkpoints(tmp_path, monkeypatch):
    older = write(tmp_path, 3)
    monkeypatch.setattr(writing, "FILE_BYTES", 1)
    writer = CheckpointWriter(tmp_path, 4)
    shutil.rmtree(writer._writer.partial)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    with pytest.raises(UserError, match=r"step_00000004: the checkpoint cannot be written .*No such file"):
        writer.publish({})
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    assert_complete(older)


def test_unwritable_root_is_reported_at_publish(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints", 4)
    writer.add("w", TENSORS["w"])
    with pytest.raises(UserError, match="cannot be written"):
        writer.publish({})
