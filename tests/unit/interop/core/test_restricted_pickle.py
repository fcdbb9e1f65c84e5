"""Files of other programs are pickles: none of them runs anything, and what is not data is refused."""

import collections
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from inrank_megatron.config.loading import from_flat
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.restricted_pickle import load_metadata
from inrank_megatron.interop.core.torch_files import StandIn, load
from inrank_megatron.interop.core.weights import Weights, weight_shapes
from inrank_megatron.interop.deepspeed import folder as deepspeed_folder
from inrank_megatron.interop.formats import format_of
from inrank_megatron.interop.inrank_reference import checkpoint as reference
from inrank_megatron.interop.megatron import checkpoint as megatron
from inrank_megatron.interop.megatron.torch_dist import Storage, write_storage

ALLOWED = Options(allow_pickle=True)


class Trap:
    """Unpickled as usual, it makes a folder."""

    def __init__(self, place: Path, call=os.mkdir):
        self.place, self.call = place, call

    def __reduce__(self):
        return self.call, (str(self.place),)


class Innocent:
    """Data in a class that nobody here knows."""

    def __init__(self):
        self.value = 3


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small model in Megatron-Core's format."""
    config = from_flat(
        {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 4, "train_iters": 1}
    )
    shapes = weight_shapes(config, 10, {})
    weights = Weights("made", config, 10, {}, lambda name: torch.full(shapes[name], 2.0), step=3)
    (made := tmp_path / "made").mkdir()
    megatron.write(weights, made, Options())
    return made


def test_a_file_of_torch_save_runs_nothing(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "file.pt"
    torch.save({"tensor": torch.ones(2), "rest": Trap(trap, print)}, path)
    with pytest.raises(UserError, match=r"names builtins\.print.*--allow-pickle"):
        load(path, Options())
    content = load(path, ALLOWED)
    assert torch.equal(content["tensor"], torch.ones(2)) and content["rest"].args == (str(trap),)
    torch.save({"rest": Trap(trap)}, path)
    for options in (Options(), ALLOWED):  # torch itself opens nothing of the operating system's
        with pytest.raises(UserError):
            load(path, options)
    assert not trap.exists()


def test_objects_of_known_classes_are_data(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(
        {"x": Innocent(), "counts": collections.defaultdict(int, {"a": 1}), "args": Namespace(n=4)}, path
    )
    mine = f"{__name__}.Innocent"
    with pytest.raises(UserError, match="Innocent"):
        load(path, Options(), known={"argparse.Namespace", "collections.defaultdict", "builtins.int"})
    content = load(
        path, Options(), known={mine, "argparse.Namespace", "collections.defaultdict", "builtins.int"}
    )
    assert isinstance(content["x"], StandIn) and vars(content["x"])["value"] == 3
    assert content["counts"] == {"a": 1} and vars(content["args"])["n"] == 4


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00."])
def test_what_is_no_file_of_torch_save(tmp_path, content):
    (path := tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(UserError, match="cannot be opened"):
        load(path, Options())


def test_the_list_of_a_megatron_folder_runs_nothing(tmp_path, folder):
    trap, path = tmp_path / "trap", folder / "iter_0000003" / ".metadata"
    metadata = load_metadata(path, allow_pickle=False)
    metadata.planner_data = Trap(trap)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata: names posix\.mkdir.*--allow-pickle"):
        megatron.open_weights(folder, Options())
    megatron.open_weights(folder, ALLOWED)  # only Megatron-Core's own loader would run it
    assert not trap.exists()
    path.write_bytes(pickle.dumps(metadata)[:-20])
    with pytest.raises(UserError, match="damaged"):
        megatron.open_weights(folder, ALLOWED)


def test_no_file_outside_a_megatron_folder_is_read(tmp_path, folder):
    iteration = folder / "iter_0000003"
    original = (iteration / ".metadata").read_bytes()
    metadata = load_metadata(iteration / ".metadata", allow_pickle=False)
    for index, place in list(metadata.storage_data.items()):
        metadata.storage_data[index] = type(place)("../secret.distcp", place.offset, place.length)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"secret\.distcp lies outside the folder"):
        Storage(iteration, Options())
    (iteration / ".metadata").write_bytes(original)
    (data := iteration / "__0_0.distcp").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="there is no such file"):
        Storage(iteration, Options())
    data.symlink_to(folder / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        Storage(iteration, Options())
    data.unlink()
    data.write_bytes((folder / "elsewhere").read_bytes()[:4000])
    with pytest.raises(UserError, match="cannot be read"):
        weights = megatron.open_weights(folder, Options())
        [weights.read(name) for name in weights.shapes]


def test_a_megatron_folder_without_our_record(folder):
    """The model is what Megatron's arguments say, else what the user says; padding must be known."""
    (folder / "inrank_megatron.json").unlink()
    with pytest.raises(UserError, match="does not say what its model is; give --model-config"):
        megatron.open_weights(folder, Options())
    sizes = {
        "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 4, "ffn_hidden_size": 32,
        "max_position_embeddings": 4, "norm_epsilon": 1e-5, "normalization": "LayerNorm", "swiglu": False,
        "position_embedding_type": "learned_absolute", "add_bias_linear": True, "bias_gelu_fusion": True,
        "untie_embeddings_and_output_weights": False, "padded_vocab_size": 10, "init_method_std": 0.02,
    }  # fmt: skip
    common = folder / "iter_0000003" / "common.pt"
    torch.save({"iteration": 3, "args": Namespace(**sizes)}, common)
    with pytest.raises(UserError, match="10 rows, and how many of them are padding it does not say"):
        megatron.open_weights(folder, Options())
    weights = megatron.open_weights(folder, Options(vocab_size=7))
    assert weights.read("embedding.word_embeddings.weight").shape == (7, 8)
    assert weights.config.model.openai_gelu  # as Megatron's fused kernel, its default, computes
    torch.save({"args": Namespace(**sizes, num_experts=8)}, common)
    with pytest.raises(UserError, match="num_experts=8: neither GPT-2 nor LLaMA"):
        megatron.open_weights(folder, Options(vocab_size=7))
    torch.save({"args": Namespace(**{**sizes, "hidden_size": 12})}, common)
    with pytest.raises(UserError, match="tensors that differ"):
        megatron.open_weights(folder, Options(vocab_size=7))


def test_other_folders_are_told_apart(tmp_path, folder):
    assert format_of(folder) is megatron and format_of(folder / "iter_0000003") is megatron
    (folder / "latest_checkpointed_iteration.txt").write_text("99")
    with pytest.raises(UserError, match=r"says 99, and iter_0000099 has no metadata\.json"):
        megatron.open_weights(folder, Options())
    (tmp_path / "x.ckpt").write_bytes(b"")
    assert format_of(tmp_path / "x.ckpt") is reference
    (tag := tmp_path / "saved" / "global_step4").mkdir(parents=True)
    (tag / "mp_rank_01_model_states.pt").write_bytes(b"")
    assert format_of(tag) is deepspeed_folder
    (tag.parent / "latest").write_text("../made")
    with pytest.raises(UserError, match="not a folder next to it"):
        deepspeed_folder.open_weights(tag.parent, Options())


def test_tensors_of_any_rank_and_type_survive(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5), "vector": torch.arange(5), "half": torch.ones(2, 3).bfloat16(),
        "empty": torch.empty(0, 4),
    }  # fmt: skip
    write_storage(
        tmp_path,
        {k: tuple(t.shape) for k, t in tensors.items()},
        tensors.__getitem__,
        empty=["none/shard_0_1"],
    )
    storage = Storage(tmp_path, Options())
    for name, tensor in tensors.items():
        found = storage.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert str(tmp_path).encode() not in (tmp_path / ".metadata").read_bytes()
