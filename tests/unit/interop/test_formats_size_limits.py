"""A few bytes that would be gigabytes: refused before they are taken; and pointers in place of files."""

import struct
import zipfile
from itertools import pairwise

import pytest
import torch

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.verify import Damaged
from inrank_megatron.config.loading import load
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.restricted_pickle import load_metadata
from inrank_megatron.interop.core.torch_files import load as load_file
from inrank_megatron.interop.formats import format_of, forward_of, read_weights
from inrank_megatron.interop.megatron import checkpoint as megatron
from inrank_megatron.interop.megatron import torch_dist
from inrank_megatron.interop.peft import adapters as peft
from tests.fuzz.bounds import outcome
from tests.unit.interop.models import OPTIONS, make_weights, write_models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def repacked(path, member: str, content: bytes | None, kind: int = zipfile.ZIP_STORED) -> None:
    """The zip with another content of one member, or packed as ``kind`` says."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, content if content is not None and name.endswith(member) else data)


def strides_of_zero(path):
    """Four bytes that are ten terabytes as soon as somebody copies the tensor."""
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, path)


def array_of_a_length(path):
    """torch's loader of plain weights makes the array of two gigabytes that this names."""
    torch.save({}, path)
    repacked(path, "data.pkl", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")


def tensor_of_a_length(path):
    torch.save({}, path)
    repacked(path, "data.pkl", b"\x80\x02ctorch\nTensor\nJ\0\0\0\x08\x85R.")


def packed_zeros(path):
    torch.save({"x": torch.zeros(2**20)}, path)
    repacked(path, "", None, zipfile.ZIP_DEFLATED)


BOMBS = (strides_of_zero, array_of_a_length, tensor_of_a_length, packed_zeros)


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_torch_file_claiming_more_than_its_size_is_refused(tmp_path, bomb):
    bomb(tmp_path / "file.pt")
    found = outcome(lambda: load_file(tmp_path / "file.pt", Options(allow_pickle=True)))
    assert isinstance(found, UserError) and "cannot be opened as a file of torch.save" in str(found)


@pytest.mark.parametrize("stream", [
    b"\x80\x04Nr" + struct.pack("<I", 2**31) + b".",  # a memo of so many entries: 32 gigabytes
    b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.",
])  # fmt: skip
def test_metadata_claiming_more_than_its_size_is_refused(tmp_path, stream):
    (tmp_path / ".metadata").write_bytes(stream)
    found = outcome(lambda: load_metadata(tmp_path / ".metadata", allow_pickle=True))
    assert isinstance(found, UserError) and "is damaged (ValueError)" in str(found)


def test_metadata_of_many_chunks_is_checked_in_linear_time(tmp_path):
    """Every two of the parts of a tensor were compared: 20,000 parts took minutes."""
    size, parts = 4, 20_000
    chunks = [
        torch_dist.ChunkStorageMetadata(torch.Size([i, 0]), torch.Size([1, size])) for i in range(parts)
    ]
    assert outcome(lambda: torch_dist._overlapping(chunks)) is False
    assert torch_dist._overlapping([*chunks, chunks[77]])


def test_a_pointer_s_text_in_a_message_is_one_line(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    megatron.write(make_weights("gpt2", "dense"), made, OPTIONS)
    (made / megatron.LATEST).write_text("a\nb\n")
    with pytest.raises(UserError) as caught:
        read_weights(made, OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = write_models(tmp_path_factory.mktemp("models"))
    (root / "deepspeed").mkdir()
    torch.save({"module": {"x": torch.ones(2)}}, root / "deepspeed" / "mp_rank_00_model_states.pt")
    return root


STEP = "checkpoints/step_00000007"
POINTERS = [
    "run/config.yaml", f"run/{STEP}/manifest.json", f"run/{STEP}/index.json", f"run/{STEP}/state.json",
    f"run/{STEP}/tensors_00000.safetensors", "megatron/inrank_megatron.json",
    "megatron/latest_checkpointed_iteration.txt", "megatron/iter_0000007/metadata.json",
    "megatron/iter_0000007/common.pt", "megatron/iter_0000007/.metadata",
    "megatron/iter_0000007/__0_0.distcp", "deepspeed/mp_rank_00_model_states.pt",
    "peft/adapter_config.json", "peft/adapter_model.safetensors", "peft/base/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", POINTERS)
def test_a_pointer_in_place_of_weights_is_named(models, file):
    """A clone without its large files: each of them is a text of three lines."""
    path, folder = models / file, models / file.split("/")[0]
    content = path.read_bytes()
    path.write_text(POINTER)
    try:
        with pytest.raises(UserError, match=rf"{path.name}: is a Git LFS pointer.*git lfs pull"):
            module = format_of(folder)
            if module is peft:
                forward_of(module, folder, OPTIONS)
            read_weights(folder, OPTIONS)
    finally:
        path.write_bytes(content)


def test_a_pointer_in_place_of_a_checkpoint_is_no_damage(models):
    """Going on from an older checkpoint would in time replace one that one command brings back."""
    path = models / "run" / STEP / "tensors_00000.safetensors"
    content = path.read_bytes()
    path.write_text(POINTER)
    with pytest.raises(UserError) as caught:
        Checkpoint(path.parent)
    path.write_bytes(content)
    assert not isinstance(caught.value, Damaged)


NESTED = [f"{name}: &{name} [{', '.join(9 * ['*' + before])}]" for before, name in pairwise("abcdefghi")]
YAMLS = {
    "billions": "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *NESTED, "data_path: *i"]),
    "digits": "num_layers: 0x" + "f" * 20_000 + "\n",
    "tag": 'num_layers: !!int ""\n',
    "truth": "bf16: !!bool maybe\n",
    "names": "".join(f"name{n}: 1\n" for n in range(20_000)),
    "layers": "model_preset: tiny\nnum_layers: 100000000\ntrain_iters: 1\n",
    "zeros": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", YAMLS)
def test_hostile_configurations_are_one_line_in_time(tmp_path, kind):
    path = tmp_path / "run.yaml"
    if YAMLS[kind] is None:
        path.symlink_to("/dev/zero")
    else:
        path.write_text(YAMLS[kind])
    found = outcome(lambda: load(path))
    assert isinstance(found, UserError) and len(str(found)) < 2000
