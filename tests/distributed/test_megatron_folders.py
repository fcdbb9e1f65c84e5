"""Megatron-Core's ``dist_checkpointing`` against the conversion: saved sharded and read whole, and the
reverse.
"""

import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from inrank_megatron.config.loading import to_yaml
from inrank_megatron.errors import UserError
from inrank_megatron.inspection.layers import inspect
from inrank_megatron.interop.core import run
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.restricted_pickle import load_metadata
from inrank_megatron.interop.megatron import checkpoint as megatron
from inrank_megatron.interop.megatron.torch_dist import Storage
from tests.distributed import megatron_folders as ranks
from tests.distributed.gpt_parity import VOCABULARY, configuration
from tests.harness import run_ranks

LLAMA = {"model_type": "llama"}
GROUPED = LLAMA | {"num_query_groups": 2, "kv_channels": 12, "qk_layernorm": True}
GROUPED |= {"rope_scaling_factor": 32.0, "untie_embeddings_and_output_weights": False}
ATTENTION = {"factorised_linears": "mlp-attention"}
SEPARATE = {**ATTENTION, "qkv_factors": "separate"}
EACH_LAYER = {"non_homogeneous_layers": True}
APART = {"singleton_local_shards": True, "non_homogeneous_layers": True}


def described(tmp_path: Path, changes: dict) -> Options:
    """What a user says of a folder that does not describe its model."""
    file = tmp_path / "model.yaml"
    file.write_text(to_yaml(configuration(1, **changes)))
    return Options(model_config=file, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    ("changes", "frozen_base", "layout"),
    [
        ({}, None, None),
        (LLAMA, None, None),
        (LLAMA, None, APART),
        ({}, True, EACH_LAYER),
        ({**LLAMA, **ATTENTION}, True, None),
        ({**LLAMA, **SEPARATE}, False, EACH_LAYER),
        (SEPARATE, True, EACH_LAYER),
    ],
    ids=[
        "gpt2",
        "llama",
        "llama-apart",
        "gpt2-p1",
        "llama-p1-stacked",
        "llama-p2-separate",
        "gpt2-p1-separate",
    ],
)
def test_checkpoint_saved_at_tp2_is_read_exactly(tmp_path, changes, frozen_base, layout):
    folder = tmp_path / "saved"
    saved = run_ranks(ranks.save, 4, 2, changes, frozen_base, layout, str(folder))[0]
    options = described(tmp_path, changes)
    weights = megatron.open_weights(folder, options)
    assert weights.shapes.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(weights.read(name), tensor), name
    found = inspect(folder, options)
    assert found.format == "megatron"
    matrix = "weight" if frozen_base is None else "U"
    for row in found.layers:
        assert row.columns == min(saved[f"{row.layer}.{matrix}"].shape)


def test_logits_match_those_of_megatrons_loader(tmp_path):
    """Stacked layers and padded rows, as a training of tensor-parallel size 2 left them, and the arguments
    that Megatron-LM stores with them; what the model is, they say.
    """
    folder = tmp_path / "saved"
    run_ranks(ranks.save, 2, 2, GROUPED, None, None, str(folder))
    model = configuration(1, **GROUPED).model
    arguments = Namespace(
        **{name: getattr(model, name) for name in ("num_layers", "hidden_size", "num_attention_heads")},
        **{name: getattr(model, name) for name in ("ffn_hidden_size", "seq_length", "norm_epsilon")},
        max_position_embeddings=model.max_position_embeddings, normalization="RMSNorm", swiglu=True,
        position_embedding_type="rope", add_bias_linear=False, untie_embeddings_and_output_weights=False,
        rotary_base=10000, vocab_size=VOCABULARY, params_dtype=torch.float32, save=Path("somewhere"),
        group_query_attention=True, num_query_groups=2, kv_channels=12, qk_layernorm=True,
        use_rope_scaling=True, rope_scaling_factor=32.0,
    )  # fmt: skip
    torch.save({"iteration": 5, "args": arguments}, folder / "common.pt")
    options = Options()
    read = megatron.open_weights(folder, options).config.model
    assert {name: getattr(read, name) for name in GROUPED} == GROUPED
    [loaded] = run_ranks(ranks.loaded_logits, 1, str(folder), options)
    [own] = run_ranks(_own_logits, 1, str(folder), options)
    assert torch.equal(loaded, own)


def _own_logits(rank, world_size, folder, options):
    weights = megatron.open_weights(Path(folder), options)
    return ranks.gpt_forward(weights)(ranks.sample()[0])


@pytest.mark.parametrize(
    ("changes", "frozen_base"),
    [({}, None), (LLAMA, None), ({}, True), ({**LLAMA, **SEPARATE}, True), ({**LLAMA, **ATTENTION}, False)],
    ids=["gpt2", "llama", "gpt2-p1", "llama-p1-separate", "llama-p2"],
)
def test_written_checkpoint_loads_at_tp2_and_tp4(tmp_path, changes, frozen_base):
    """By Megatron-Core, into a model whose vocabulary is padded, at sizes 2 and 4; and back, to the bit."""
    weights = ranks.drawn(configuration(1, **changes), frozen_base)
    folder = tmp_path / "written"
    folder.mkdir()
    megatron.write(weights, folder, Options())
    [expected] = run_ranks(ranks.logits, 1, changes, frozen_base)
    for size in (2, 4):
        for found in run_ranks(ranks.load, size, size, changes, frozen_base, str(folder / "iter_0000012")):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    (again := tmp_path / "again").mkdir()
    run.write(megatron.open_weights(folder, Options()), again, Options())
    read = run.open_weights(again, Options())
    assert read.shapes == weights.shapes
    assert all(torch.equal(read.read(name), weights.read(name)) for name in weights.shapes)


def test_a_filtered_save_keeps_every_tensor_parallel_shard(tmp_path):
    """A program saved adapters alone by filtering the sharded state of a tensor-parallel model. Shards of one
    tensor looked like copies of each other to the writer, so one rank's part was kept; the other ranks later
    loaded whatever their memory held, and nothing complained (NVIDIA-NeMo/Megatron-Bridge#2240).

    Our layers describe U and V so that a filtered save is whole, and a folder with a part missing is refused
    before anything is read from it.
    """
    changes = {**LLAMA, **ATTENTION}
    folder = tmp_path / "saved"
    saved = run_ranks(ranks.save, 4, 2, changes, True, EACH_LAYER, str(folder), True)[0]
    storage = Storage(folder, Options())
    factors = {name: tensor for name, tensor in saved.items() if name.endswith((".U", ".V"))}
    assert storage.shapes.keys() == factors.keys()
    assert all(torch.equal(storage.read(name), tensor) for name, tensor in factors.items())

    metadata = load_metadata(folder / ".metadata", allow_pickle=False)
    lost = "decoder.layers.1.mlp.linear_fc2.V"
    del metadata.state_dict_metadata[lost].chunks[1:]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"1 parts of {lost} \[9, 128\] are not the full tensor"):
        Storage(folder, Options())
