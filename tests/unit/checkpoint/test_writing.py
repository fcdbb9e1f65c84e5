"""Checkpoints of several parts, and those of the version before: one reader, and the same refusals."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from inrank_megatron.checkpoint.folder import Checkpoint, newest_complete
from inrank_megatron.checkpoint.slices import Slice, boxes, full_slice, within
from inrank_megatron.checkpoint.verify import Damaged, sha256
from inrank_megatron.checkpoint.writing import PartWriter
from inrank_megatron.errors import UserError

PARTS = 3
TENSORS = {
    "w": torch.arange(35, dtype=torch.float32).view(5, 7),
    "half": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "b": torch.arange(9.0),
    "scalar": torch.tensor(2.5),
}


def slices(part, value=0.0):
    """Runs of every tensor, as ZeRO cuts them; ``half`` in columns, as tensor parallelism does."""
    for name, tensor in TENSORS.items():
        tensor = tensor + value
        if name == "half":
            yield Slice(name, tensor[:, 2 * part : 2 * part + 2], (0, 2 * part), (4, 6))
            continue
        if tensor.dim() == 0:
            yield from [full_slice(name, tensor)] * (part == 1)
            continue
        start, stop = tensor.numel() * part // PARTS, tensor.numel() * (part + 1) // PARTS
        for offset, shape in boxes(tuple(tensor.shape), start, stop):
            begin = sum(at * step for at, step in zip(offset, tensor.stride(), strict=True))
            values = tensor.flatten()[begin : begin + torch.Size(shape).numel()].view(shape)
            yield Slice(name, values, offset, tuple(tensor.shape))


def write(root, step, *, value=0.0, file_bytes=None, parts=range(PARTS)):
    writers = [PartWriter(root, step, part=p, deferred=True, file_bytes=file_bytes) for p in range(PARTS)]
    for part, writer in enumerate(writers):
        for piece in slices(part, value):
            writer.add(piece)
    writers[0].begin()
    closed = [writer.close() for writer in writers]
    return writers[0].publish([closed[part] for part in parts], {"step": step})


def write_version_2(folder, tensors, state):
    """As the version before wrote it, by one rank that had gathered full tensors."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "tensors_00000.safetensors")
    (folder / "index.json").write_text(json.dumps(dict.fromkeys(tensors, "tensors_00000.safetensors")))
    (folder / "state.json").write_text(json.dumps(state))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"format_version": 2, "files": files}))
    return folder


@pytest.mark.parametrize("kind", ["parts", "parts of many files", "version 2"])
def test_full_tensors_are_read(tmp_path, kind):
    if kind == "version 2":
        folder = write_version_2(tmp_path / "step_00000004", TENSORS, {"step": 4})
    else:
        folder = write(tmp_path, 4, file_bytes=1 if kind == "parts of many files" else None)
    checkpoint = Checkpoint(folder)
    read = dict(checkpoint.tensors(checkpoint.names))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        assert checkpoint.shape(name) == tuple(tensor.shape)


def bytes_read():
    """By this process, from files of any kind."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_of_a_box_only_its_own_bytes_are_read(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, 4))
    before = bytes_read()
    nothing = bytes_read() - before  # the file that says so has been read, too
    for name, box in (("w", ((1, 3), (3, 2))), ("half", ((1, 1), (2, 4))), ("b", ((2,), (6,)))):
        before = bytes_read()
        read = checkpoint.read(name, box)
        assert abs(bytes_read() - before - nothing - read.nbytes) < 8, name  # its numbers have some digits
        assert torch.equal(read, TENSORS[name][within(box, (0,) * len(box[0]))])


def test_every_byte_is_written_once_and_files_say_what_they_hold(tmp_path):
    files = sorted(write(tmp_path, 4).glob("*.safetensors"))
    assert [path.name for path in files] == [f"tensors_{part:05d}.safetensors" for part in range(PARTS)]
    held = [load_file(path) for path in files]
    assert sum(t.nbytes for part in held for t in part.values()) == sum(t.nbytes for t in TENSORS.values())
    assert set(held[1]) == {"w[1:2,4:7]", "w[2:3,0:7]", "w[3:4,0:2]", "half[0:4,2:4]", "b[3:6]", "scalar"}


FILE = "tensors_00001.safetensors"


def from_another_save(folder):
    """A part of the same step, written another time."""
    other = write(folder.parent / "other", int(folder.name[5:]), value=1.0)
    shutil.copy(other / FILE, folder / FILE)
    shutil.rmtree(other.parent)


def cut(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def flip(folder):
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 4
    (folder / FILE).write_bytes(bytes(content))


DAMAGE = {"missing": lambda folder: (folder / FILE).unlink(), "cut": cut, "flipped": flip}
DAMAGE["of another save"] = from_another_save


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_part_that_is_not_the_one_written_is_named(tmp_path, damage):
    older, newer = write(tmp_path, 3), write(tmp_path, 12)
    DAMAGE[damage](newer)
    found, [fault] = newest_complete(tmp_path)
    assert found == older
    assert f"step_00000012/{FILE}" in fault and fault.endswith("; resume from another checkpoint")
    assert "\n" not in fault


def edited(folder, change):
    """The index altered, and the manifest made to agree with it."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "index.json"
    manifest["files"]["index.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


FORGED = {
    "a slice elsewhere": lambda index: index["b"]["slices"][0].update(offset=[1]),
    "a slice fewer": lambda index: index["b"]["slices"].pop(),
    "a slice twice": lambda index: index["b"]["slices"].append(index["b"]["slices"][0]),
    "a longer tensor": lambda index: index["b"].update(shape=[10]),
    "a tensor without end": lambda index: index["b"].update(shape=[2**60]),
    "other axes": lambda index: index["b"]["slices"][0].update(offset=[0, 0]),
    "an offset that is none": lambda index: index["b"]["slices"][0].update(offset="0"),
    "a file that is none": lambda index: index["b"]["slices"][0].update(file=["x"]),
    "slices that are none": lambda index: index["b"].update(slices=3),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_an_index_that_makes_no_sense_is_damaged(tmp_path, forgery):
    folder = write(tmp_path, 12)
    edited(folder, FORGED[forgery])
    with pytest.raises(Damaged, match="step_00000012") as refusal:
        Checkpoint(folder)
    assert "\n" not in str(refusal.value)


def test_parts_that_leave_something_out_are_not_published(tmp_path):
    """As by a rank that takes another for the holder; the older checkpoint of the step stays."""
    older = write(tmp_path, 4)
    content = {path: path.read_bytes() for path in older.iterdir()}
    with pytest.raises(ValueError, match="do not make up"):
        write(tmp_path, 4, parts=[0, 1])
    assert {path: path.read_bytes() for path in older.iterdir()} == content


def test_a_part_that_cannot_be_written_is_told_at_its_end(tmp_path):
    writer = PartWriter(tmp_path, 4, part=1)
    for piece in slices(1):
        writer.add(piece)
    with pytest.raises(UserError, match=r"step_00000004: the checkpoint cannot be written .*No such file"):
        writer.close()


def test_a_checkpoint_comes_back_from_an_object_store(tmp_path):
    """Copied there and back by fsspec, as the guide says: only the published folder, and it verifies."""
    folder = write(tmp_path / "run", 4)
    shutil.copytree(folder, folder.with_name(".step_00000008.partial"))
    store = fsspec.filesystem("memory")
    names = [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")]
    for name in names:
        store.put(f"{folder.parent / name}/", f"/bucket/{name}/", recursive=True)
    store.get("/bucket/", f"{tmp_path / 'back'}/", recursive=True)
    found, faults = newest_complete(tmp_path / "back")
    assert (found, faults) == (tmp_path / "back" / folder.name, [])
    assert not list((tmp_path / "back").glob(".*"))
