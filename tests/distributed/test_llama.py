"""LLaMA, and query, key and value as three linears: against Hugging Face's models with the same weights."""

import functools
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.model.separate_qkv import rows_of
from tests.distributed.gpt_parity import (
    HEADS,
    LAYERS,
    LENGTH,
    PADDED,
    VOCABULARY,
    WIDTH,
    configuration,
    disturb,
    drawn_again,
    factor_specs,
    forward_and_backward,
    initial_weights,
    sample,
)
from tests.groups import join
from tests.harness import run_ranks

MODELS = {
    "llama": {"model_type": "llama"},
    "llama, QKV fused": {"model_type": "llama", "factorised_linears": "mlp-attention"},
    "llama, QKV separate": {
        "model_type": "llama",
        "factorised_linears": "mlp-attention",
        "qkv_factors": "separate",
    },
    "gpt2": {},
    "gpt2, QKV separate": {"factorised_linears": "mlp-attention", "qkv_factors": "separate"},
}
STRUCTURES = {"dense": None, "W0+UV": True, "UV": False}
CASES = [
    ("llama", "dense"),
    ("llama, QKV fused", "W0+UV"),
    ("llama, QKV separate", "dense"),
    ("llama, QKV separate", "W0+UV"),
    ("llama, QKV separate", "UV"),
    ("gpt2, QKV separate", "W0+UV"),
]
INNER = 128
"""Of the MLP at this width: 8/3 x 32, up to a multiple of 64."""


@functools.cache
def result(model: str, structure: str, ranks: int, sequence_parallel: bool = True) -> dict:
    arguments = (STRUCTURES[structure], sequence_parallel, PADDED, MODELS[model])
    return run_ranks(forward_and_backward, ranks, *arguments)[0]


@functools.cache
def start(model: str, structure: str = "dense", ranks: int = 1) -> dict[str, Tensor]:
    return run_ranks(initial_weights, ranks, STRUCTURES[structure], PADDED, MODELS[model])[0]


def effective(weights: dict[str, Tensor], name: str) -> Tensor:
    """``W``, ``W0 + U V`` or ``U V``."""
    weight = weights.get(f"{name}.weight", 0)
    return weight + weights[f"{name}.U"] @ weights[f"{name}.V"] if f"{name}.U" in weights else weight


def projections(weights: dict[str, Tensor], block: str) -> dict[str, Tensor]:
    """The seven matrices of a block by Hugging Face's names."""
    qkv, fc1 = f"{block}.self_attention.linear_qkv", effective(weights, f"{block}.mlp.linear_fc1")
    return {
        **{
            f"self_attn.{part}_proj": effective(weights, f"{qkv}.{part}")
            if f"{qkv}.{part}.U" in weights or f"{qkv}.{part}.weight" in weights
            else rows_of(effective(weights, qkv), part, heads=HEADS)
            for part in "qkv"
        },
        "self_attn.o_proj": effective(weights, f"{block}.self_attention.linear_proj"),
        "mlp.gate_proj": fc1[:INNER],
        "mlp.up_proj": fc1[INNER:],
        "mlp.down_proj": effective(weights, f"{block}.mlp.linear_fc2"),
    }


def hugging_face(weights: dict[str, Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCABULARY],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"][:VOCABULARY],
    }
    for i in range(LAYERS):
        here, there = f"decoder.layers.{i}", f"model.layers.{i}"
        state[f"{there}.input_layernorm.weight"] = weights[f"{here}.input_layernorm.weight"]
        state[f"{there}.post_attention_layernorm.weight"] = weights[f"{here}.pre_mlp_layernorm.weight"]
        state |= {f"{there}.{name}.weight": value for name, value in projections(weights, here).items()}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize(("model", "ranks"), [("llama", 1), ("llama", 2), ("llama, QKV separate", 1)])
def test_dense_llama_matches_hugging_face(model, ranks):
    """Logits, losses and every gradient: RoPE, RMSNorm, SwiGLU's order, the head of its own, no bias."""
    ours = result(model, "dense", ranks)
    theirs = hugging_face(ours["weights"])
    tokens, labels = sample()
    logits = theirs(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    losses.mean().backward()
    own = ours["logits"].view(*logits.shape[:2], PADDED)[..., :VOCABULARY]
    torch.testing.assert_close(own, logits.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["losses"], losses.detach(), rtol=1e-5, atol=0)
    assert not [name for name in ours["weights"] if name.endswith("bias") or "position" in name]
    expected = hugging_face(ours["gradients"]).state_dict()  # ours by their names
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            expected[name],
            gradient,
            rtol=1e-4,
            atol=1e-7,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize(("model", "structure"), CASES[1:5])
def test_factorised_llama_matches_its_dense_product(model, structure):
    ours = result(model, structure, 1)
    tokens, labels = sample()
    with torch.no_grad():
        logits = hugging_face(ours["weights"])(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(ours["losses"], losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("model", "structure", "ranks", "parallel"),
    [
        *((*case, 2, True) for case in CASES),
        ("llama, QKV separate", "W0+UV", 2, False),
        ("llama, QKV separate", "W0+UV", 4, True),
        ("llama", "dense", 4, True),
    ],
)
def test_sharded_llama_matches_serial(model, structure, ranks, parallel):
    """Losses, logits and every gradient of one rank, from two and four."""
    one, many = result(model, structure, 1), result(model, structure, ranks, parallel)
    torch.testing.assert_close(many["losses"], one["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(many["logits"], one["logits"], rtol=1e-4, atol=1e-5)
    assert many["gradients"].keys() == one["gradients"].keys()
    for name, expected in one["gradients"].items():
        # A bias of the keys shifts all scores of a query alike: its gradient is rounding, the query's is not.
        scale = one["gradients"][name.replace("linear_qkv.k.bias", "linear_qkv.q.bias")].norm()
        assert (many["gradients"][name] - expected).norm() <= 1e-5 * scale + 1e-9, name


@pytest.mark.parametrize("ranks", [1, 4])
def test_head_padding_is_never_predicted(ranks):
    """Never a probability, never a gradient; on four ranks three shards are nothing but padding."""
    seen = result("llama", "dense", ranks)
    assert (seen["logits"][..., VOCABULARY:] == -math.inf).all()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert not seen["weights"][name][VOCABULARY:].any()
        assert not seen["gradients"][name][VOCABULARY:].any()
        assert torch.isfinite(seen["gradients"][name]).all()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", ["llama, QKV separate", "gpt2, QKV separate"])
def test_initial_weights_do_not_depend_on_ranks_or_factorisation(model, ranks):
    one, many = start(model), start(model, "W0+UV", ranks)
    assert one.keys() <= many.keys()
    for name, value in one.items():
        assert torch.equal(many[name], value), name
    again = run_ranks(drawn_again, 1, MODELS[model])[0]
    assert all(torch.equal(one[name], value) for name, value in again.items())


def sharded_state(rank: int, world_size: int, model: str) -> list[tuple]:
    """Name, full shape, offset and values of every piece of the first layer's linears on this rank."""
    parallel = join(world_size)
    config = configuration(world_size, **MODELS[model])
    factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=PADDED)
    built = factory.build(factor_specs(config, frozen_base=True))
    disturb(built, parallel)
    layer, found = built.decoder.layers[0], []
    for entry in layer.sharded_state_dict("", (), {"dp_cp_group": parallel.dp_group}).values():
        pieces = entry.build() if hasattr(entry, "build") else [entry]
        linear = ".linear_" in entry.key and ".layer_norm_" not in entry.key and entry.data is not None
        found += [(p.key, p.global_shape, p.global_offset, p.data.detach().clone()) for p in pieces if linear]
    return found


@pytest.mark.parametrize("model", ["llama, QKV separate", "gpt2, QKV separate"])
def test_sharded_state_matches_full_tensors(model):
    """What Megatron's distributed checkpoints store of a layer does not depend on the ranks either."""
    gathered = {}
    for pieces in run_ranks(sharded_state, 2, model):
        for key, shape, offset, values in pieces:
            place = tuple(slice(o, o + size) for o, size in zip(offset, values.shape, strict=True))
            gathered.setdefault(key, torch.full(shape, torch.nan))[place] = values
    layer, weights = "decoder.layers.0.", result(model, "W0+UV", 1)["weights"]
    expected = {name.removeprefix(layer): w for name, w in weights.items() if name.startswith(layer)}
    assert gathered.keys() == {name for name in expected if "linear" in name}
    assert all(torch.equal(value, expected[name]) for name, value in gathered.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_separate_qkv_starts_as_rows_of_the_fused_weight(architecture):
    """So that the choice does not change the model before its first step."""
    fused, separate = start(architecture), start(f"{architecture}, QKV separate")
    for i in range(LAYERS):
        qkv = f"decoder.layers.{i}.self_attention.linear_qkv"
        rows = fused.pop(f"{qkv}.weight").view(HEADS, 3, WIDTH // HEADS, WIDTH)
        for index, part in enumerate("qkv"):
            assert torch.equal(separate.pop(f"{qkv}.{part}.weight"), rows[:, index].reshape(WIDTH, WIDTH))
            separate.pop(f"{qkv}.{part}.bias", None)
        fused.pop(f"{qkv}.bias", None)
    assert fused.keys() == separate.keys()
    assert all(torch.equal(separate[name], value) for name, value in fused.items())
