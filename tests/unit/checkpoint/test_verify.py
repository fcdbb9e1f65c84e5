"""What a checkpoint folder may hold instead of a checkpoint: one message, nothing absurd allocated."""

import json
import os
import shutil
import tracemalloc

import pytest
import torch

from inrank_megatron.checkpoint import verify
from inrank_megatron.checkpoint.folder import Checkpoint, Damaged, newest_complete
from inrank_megatron.checkpoint.verify import sha256
from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.errors import UserError

FACTOR = {"columns": 3, "active": 3, "rank": 2, "base": False, "tracked": False, "final": True, "grown_at": 0}
STATE = {
    "seconds": 1.5,
    "identity": {"data": "0" * 16, "switch_step": None},
    "weights_only": False,
    "validation_loss": 2.0,
    "engine": {"factors": {"a": FACTOR}, "optimizer_steps": {"factors": 3}, "loss_scaling": {}},
}
TENSORS = {"w": torch.ones(40), "a.U": torch.ones(8, 3), "a.V": torch.ones(3, 5)}
FILE = "tensors_00000.safetensors"


def write(root, step):
    writer = CheckpointWriter(root, step)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    return writer.publish({"step": step, **STATE})


def reseal(folder):
    """Make the manifest agree with the files, as whoever forges a checkpoint would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        path = folder / name
        if path.is_file():
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit(file, change):
    def edited(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
        if file != "manifest.json":
            reseal(folder)

    return edited


def replace(file, content):
    def replaced(folder):
        (folder / file).write_bytes(content)
        reseal(folder)

    return replaced


def header(change):
    """A tensor file whose header has been changed and whose data have not."""

    def changed(folder):
        content = (folder / FILE).read_bytes()
        length = int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8 : 8 + length])
        change(tensors)
        text = json.dumps(tensors).encode()
        replace(FILE, len(text).to_bytes(8, "little") + text + content[8 + length :])(folder)

    return changed


def rename_in_manifest(new):
    return edit("manifest.json", lambda m: m["files"].update({new: m["files"].pop(FILE)}))


def link(file):
    def linked(folder):
        outside = folder.parent / "outside"
        shutil.move(folder / file, outside)
        (folder / file).symlink_to(outside)

    return linked


def set_state(**values):
    return edit("state.json", lambda state: state.update(values))


def set_factor(**values):
    return edit("state.json", lambda state: state["engine"]["factors"]["a"].update(values))


DEEP = b"[" * 100_000
DAMAGE = {
    "a name that leads up": rename_in_manifest(".."),
    "a name with a folder": rename_in_manifest("x/y"),
    "an absolute name": rename_in_manifest("/etc/passwd"),
    "a name with a zero": rename_in_manifest("tensors\0"),
    "a name of another kind": rename_in_manifest("model.pkl"),
    "a size that is not a number": edit("manifest.json", lambda m: m["files"][FILE].update(bytes="9")),
    "a hash that is none": edit("manifest.json", lambda m: m["files"][FILE].update(sha256="x")),
    "a version that is none": edit("manifest.json", lambda m: m.update(format_version=[])),
    "a deep manifest": lambda folder: (folder / "manifest.json").write_bytes(DEEP),
    **{f"{file} is a link": link(file) for file in ("manifest.json", "index.json", "state.json", FILE)},
    "a pipe": lambda folder: ((folder / "state.json").unlink(), os.mkfifo(folder / "state.json")),
    "a header longer than the file": replace(FILE, (2**62).to_bytes(8, "little") + b"{}"),
    "a file shorter than a length": replace(FILE, b"abc"),
    "an empty file": replace(FILE, b""),
    "a header that is not JSON": replace(FILE, (4).to_bytes(8, "little") + b"\xff\xfe{}"),
    "a deep header": replace(FILE, len(DEEP).to_bytes(8, "little") + DEEP),
    "a header that is a list": replace(FILE, (2).to_bytes(8, "little") + b"[]"),
    "offsets beyond the file": header(lambda t: t["w"].update(data_offsets=[0, 2**50], shape=[2**48])),
    "offsets that go back": header(lambda t: t["w"].update(data_offsets=[160, 0])),
    "an absurd shape": header(lambda t: t["w"].update(shape=[2**60])),
    "a shape that is not a list": header(lambda t: t["w"].update(shape="40")),
    "an unknown type": header(lambda t: t["w"].update(dtype="F999")),
    "a tensor without a type": header(lambda t: t["w"].pop("dtype")),
    "a tensor beyond the index": edit("index.json", lambda index: index.pop("w")),
    "a tensor that its file lacks": edit("index.json", lambda index: index.update(other=FILE)),
    "a file beyond the manifest": edit(
        "index.json", lambda index: index.update(w="tensors_00009.safetensors")
    ),
    "the state as a file of tensors": edit("index.json", lambda index: index.update(w="state.json")),
    "an index that is a list": replace("index.json", b"[]"),
    "an index of numbers": edit("index.json", lambda index: index.update(w=3)),
    "a state that is a list": replace("state.json", b"[]"),
    "a state that is not JSON": replace("state.json", b"\x00"),
    "a state of another step": set_state(step=7),
    "a step that is none": set_state(step="12"),
    "a negative step": set_state(step=-1),
    "seconds that are none": set_state(seconds=None),
    "an identity that is none": set_state(identity=[]),
    "data that are none": set_state(identity={"data": 3}),
    "a loss that is none": set_state(validation_loss="low"),
    "no engine": set_state(engine=3),
    "factors that are none": set_state(engine={"factors": []}),
    "steps that are none": set_state(engine={"optimizer_steps": {"factors": "many"}}),
    "absurd columns": set_factor(columns=10**12, active=10**12),
    "columns in use beyond those there": set_factor(active=4),
    "a rank beyond the columns": set_factor(rank=4),
    "a rank that is none": set_factor(rank=True),
    "a word of another version": set_factor(other=1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_inconsistent_metadata_is_damage(tmp_path, damage):
    older, newer = write(tmp_path, 3), write(tmp_path, 12)
    DAMAGE[damage](newer)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged) as refusal:
            Checkpoint(newer)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    message = str(refusal.value)
    assert "step_00000012" in message and "\n" not in message and len(message) < 700
    assert newest_complete(tmp_path)[0] == older


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


HARM = {
    "cut short": cut_short,
    "bit flipped": flip_a_bit,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("file", ["manifest.json", "index.json", "state.json", FILE])
def test_damage_to_every_file_is_found(tmp_path, file, harm):
    older, newer = write(tmp_path, 3), write(tmp_path, 12)
    HARM[harm](newer / file)
    found, faults = newest_complete(tmp_path)
    assert found == older and len(faults) == 1 and "step_00000012" in faults[0] and "\n" not in faults[0]
    HARM[harm](older / file)
    assert newest_complete(tmp_path)[0] is None


def test_unchanged_checkpoint_is_complete(tmp_path):
    """Else every one of the above could pass for another reason; resealed it still is."""
    folder = write(tmp_path, 12)
    reseal(folder)
    checkpoint = Checkpoint(folder)
    assert checkpoint.state == {"step": 12, **STATE}
    assert {name: checkpoint.shape(name) for name in TENSORS} == {
        n: tuple(t.shape) for n, t in TENSORS.items()
    }


def test_oversized_json_is_not_read(tmp_path, monkeypatch):
    folder = write(tmp_path, 12)
    monkeypatch.setattr(verify, "JSON_BYTES", 4096)
    with (folder / "state.json").open("ab") as file:
        file.truncate(2**40)  # a hole, which takes no room
    with pytest.raises(Damaged, match="missing, truncated or altered"):
        Checkpoint(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"]["bytes"] = 2**40
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="more than such a file ever has"):
        Checkpoint(folder, verify=False)


@pytest.mark.parametrize("name", ["latest", "latest_checkpointed_iteration.txt"])
def test_pointers_of_other_programs_are_ignored(tmp_path, name):
    folder = write(tmp_path, 12)
    for content in (b"\x00garbage", b"99", b"step_00000099", b""):
        (tmp_path / name).write_bytes(content)
        assert newest_complete(tmp_path) == (folder, [])


def test_newer_version_is_not_reported_as_damage(tmp_path):
    folder = write(tmp_path, 12)
    edit("manifest.json", lambda manifest: manifest.update(format_version=4))(folder)
    with pytest.raises(UserError, match="checkpoint format 4, this one reads 2 and 3") as refusal:
        Checkpoint(folder)
    assert not isinstance(refusal.value, Damaged)
