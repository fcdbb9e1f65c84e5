"""The map between a run's tensors and Hugging Face's, without files."""

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.shapes import qkv_layout
from inrank_megatron.interop.core.weights import weight_shapes
from inrank_megatron.interop.huggingface.dense import dense_config, dense_tensors
from inrank_megatron.interop.huggingface.names import feeders, hf_modules, hf_shapes, put, run_tensor, take
from inrank_megatron.model.separate_qkv import rows_of
from tests.unit.interop.models import CASES, SIZES, VOCABULARY, make_weights

LAYOUT = qkv_layout(from_flat(SIZES))
FUSED = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(("family", "structure"), CASES)
def test_names_and_shapes_are_those_of_transformers(family, structure):
    weights = make_weights(family, structure)
    model = (LlamaForCausalLM if family == "llama" else GPT2LMHeadModel)(dense_config(weights))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if family == "gpt2":
        del expected["lm_head.weight"]  # the embedding
    shapes, tensor = dense_tensors(weights)
    assert shapes == expected
    assert {name: tuple(tensor(name).shape) for name in shapes} == expected


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_there_and_back_gives_the_same_bits(family):
    weights = make_weights(family, "dense")
    _, tensor = dense_tensors(weights)
    fed_by = feeders(hf_modules(weights.config))
    for name, shape in weights.shapes.items():
        back = run_tensor(name, shape, tensor, fed_by=fed_by, layout=LAYOUT)
        assert torch.equal(back, weights.read(name)), name


def test_rows_of_a_fused_matrix_go_from_heads_to_parts():
    fused = make_weights("gpt2", "dense").read(FUSED)
    parts = [rows_of(fused, part, layout=LAYOUT) for part in "qkv"]
    assert torch.equal(take(fused, "qkv", layout=LAYOUT), torch.cat(parts))
    for part, rows in zip("qkv", parts, strict=True):
        assert torch.equal(take(fused, part, layout=LAYOUT), rows)
    assert not torch.equal(take(fused, "qkv", layout=LAYOUT), fused)
    fc1 = torch.arange(6.0)
    assert take(fc1, "gate", layout=LAYOUT).tolist() == [0, 1, 2]
    assert take(fc1, "up", layout=LAYOUT).tolist() == [3, 4, 5]


def test_rows_of_u_are_those_of_the_matrix():
    u, v = torch.randn(96, 5), torch.randn(5, 32)
    for rows in ("", "qkv", "q", "k", "v", "gate", "up"):
        torch.testing.assert_close(take(u, rows, layout=LAYOUT) @ v, take(u @ v, rows, layout=LAYOUT))
    back = torch.zeros(96, 5)
    for part in "qkv":
        put(back, part, take(u, part, layout=LAYOUT), layout=LAYOUT)
    assert torch.equal(back, u)


def test_a_tensor_without_a_place_is_an_error():
    weights = make_weights("gpt2", "dense")
    shapes = weight_shapes(weights.config, VOCABULARY, {}) | {"decoder.layers.0.extra.weight": (3, 3)}
    with pytest.raises(ValueError, match=r"no place .*decoder.layers.0.extra.weight"):
        hf_shapes(weights.config, shapes)
