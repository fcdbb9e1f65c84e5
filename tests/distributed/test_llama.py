"""LLaMA, and query, key and value as three linears: against Hugging Face's models with the same weights."""

import functools
import math

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from inrank_megatron.model.gpt import GPTFactory
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

SEPARATE = {"factorised_linears": "mlp-attention", "qkv_factors": "separate"}
FUSED = {"factorised_linears": "mlp-attention"}
TIED = {"untie_embeddings_and_output_weights": False}
GROUPED = {
    "llama 3": {"num_query_groups": 2, "rotary_base": 4000.0, "rope_scaling_factor": 32.0} | TIED,
    "mistral": {"num_query_groups": 2, "kv_channels": 12, "rotary_base": 300.0, "norm_epsilon": 1e-6},
    "qwen 2": {"num_query_groups": 1, "add_qkv_bias": True, "norm_epsilon": 1e-6} | TIED,
    "qwen 3": {"num_query_groups": 2, "kv_channels": 16, "qk_layernorm": True, "norm_epsilon": 1e-6},
}
"""Settings of the LLaMA family, shrunk; on four ranks all of them have fewer groups than ranks."""
MODELS = {
    "llama": {"model_type": "llama"},
    "llama, QKV fused": {"model_type": "llama", "factorised_linears": "mlp-attention"},
    "llama, QKV separate": {
        "model_type": "llama",
        "factorised_linears": "mlp-attention",
        "qkv_factors": "separate",
    },
    "gpt2": {},
    "gpt2, QKV separate": SEPARATE,
    **{name: {"model_type": "llama"} | settings for name, settings in GROUPED.items()},
    **{f"{name}, QKV fused": {"model_type": "llama"} | s | FUSED for name, s in GROUPED.items()},
    **{f"{name}, QKV separate": {"model_type": "llama"} | s | SEPARATE for name, s in GROUPED.items()},
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
GROUPED_CASES = [
    ("llama 3", "dense"),
    ("mistral, QKV fused", "W0+UV"),
    ("qwen 2, QKV fused", "dense"),
    ("qwen 2, QKV separate", "W0+UV"),
    ("qwen 3, QKV separate", "UV"),
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


def rows(fused: Tensor, part: str, settings) -> Tensor:
    """Of a fused QKV, which has for every group its queries, a key and a value."""
    heads = iter(fused.split(settings.head_size))
    found: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for _ in range(settings.query_groups):
        for _ in range(settings.num_attention_heads // settings.query_groups):
            found["q"].append(next(heads))
        found["k"].append(next(heads))
        found["v"].append(next(heads))
    return torch.cat(found[part])


def projections(weights: dict[str, Tensor], block: str, settings) -> dict[str, Tensor]:
    """Tensors of a block by Hugging Face's names; they may be gradients."""
    attention, fc1 = f"{block}.self_attention", effective(weights, f"{block}.mlp.linear_fc1")
    qkv = f"{attention}.linear_qkv"
    found = {
        "self_attn.o_proj.weight": effective(weights, f"{attention}.linear_proj"),
        "mlp.gate_proj.weight": fc1[:INNER],
        "mlp.up_proj.weight": fc1[INNER:],
        "mlp.down_proj.weight": effective(weights, f"{block}.mlp.linear_fc2"),
        "input_layernorm.weight": weights[f"{block}.input_layernorm.weight"],
        "post_attention_layernorm.weight": weights[f"{block}.pre_mlp_layernorm.weight"],
    }
    for part in "qkv":
        apart = f"{qkv}.{part}.U" in weights or f"{qkv}.{part}.weight" in weights
        whole = effective(weights, f"{qkv}.{part}" if apart else qkv)
        found[f"self_attn.{part}_proj.weight"] = whole if apart else rows(whole, part, settings)
        if settings.add_qkv_bias:
            bias = weights[f"{qkv}.{part}.bias" if apart else f"{qkv}.bias"]
            found[f"self_attn.{part}_proj.bias"] = bias if apart else rows(bias, part, settings)
        if settings.qk_layernorm and part != "v":
            found[f"self_attn.{part}_norm.weight"] = weights[f"{attention}.{part}_layernorm.weight"]
    return found


def hf_config(model: str):
    """The configuration that Hugging Face has for it."""
    settings, name = configuration(1, **MODELS[model]).model, model.partition(",")[0]
    kinds = {"mistral": MistralConfig, "qwen 2": Qwen2Config, "qwen 3": Qwen3Config}
    rope = {"rope_type": "default", "rope_theta": settings.rotary_base}
    if settings.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": settings.rope_scaling_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    own = {} if name == "qwen 2" else {"head_dim": settings.head_size}
    return kinds.get(name, LlamaConfig)(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=settings.query_groups,
        max_position_embeddings=LENGTH,
        rms_norm_eps=settings.norm_epsilon,
        rope_parameters=rope,
        tie_word_embeddings=not settings.has_own_head,
        **own,
        **({"sliding_window": None} if name == "mistral" else {}),
    )


def hf_tensors(weights: dict[str, Tensor], model: str) -> dict[str, Tensor]:
    """Weights or gradients by Hugging Face's names; a tied head is not listed."""
    settings = configuration(1, **MODELS[model]).model
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCABULARY],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    if settings.has_own_head:
        state["lm_head.weight"] = weights["output_layer.weight"][:VOCABULARY]
    for i in range(LAYERS):
        block = projections(weights, f"decoder.layers.{i}", settings)
        state |= {f"model.layers.{i}.{name}": value for name, value in block.items()}
    return state


def hugging_face(weights: dict[str, Tensor], model: str) -> PreTrainedModel:
    theirs = AutoModelForCausalLM.from_config(hf_config(model))
    state = hf_tensors(weights, model)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    tied = [] if "lm_head.weight" in state else ["lm_head.weight"]
    assert (missing, unexpected) == (tied, [])
    return theirs


@pytest.mark.parametrize(
    ("model", "ranks"),
    [("llama", 1), ("llama", 2), ("llama, QKV separate", 1), *((name, 1) for name in GROUPED), ("qwen 3", 4)],
)
def test_dense_llama_matches_hugging_face(model, ranks):
    """Logits, losses and every gradient: RoPE, RMSNorm, SwiGLU's order, heads, groups and biases."""
    ours = result(model, "dense", ranks)
    theirs = hugging_face(ours["weights"], model)
    tokens, labels = sample()
    logits = theirs(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    losses.mean().backward()
    own = ours["logits"].view(*logits.shape[:2], PADDED)[..., :VOCABULARY]
    torch.testing.assert_close(own, logits.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["losses"], losses.detach(), rtol=1e-5, atol=0)
    biased = "linear_qkv.bias" if "qwen 2" in model else ()
    assert not [
        n for n in ours["weights"] if "position" in n or (n.endswith("bias") and not n.endswith(biased))
    ]
    expected = hf_tensors(ours["gradients"], model)
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


@pytest.mark.parametrize(("model", "structure"), [*CASES[1:5], *GROUPED_CASES[1:]])
def test_factorised_llama_matches_its_dense_product(model, structure):
    ours = result(model, structure, 1)
    tokens, labels = sample()
    with torch.no_grad():
        logits = hugging_face(ours["weights"], model)(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(ours["losses"], losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("model", "structure", "ranks", "parallel"),
    [
        *((*case, 2, True) for case in CASES),
        *((*case, 4, True) for case in GROUPED_CASES),
        ("mistral, QKV fused", "W0+UV", 2, True),
        ("qwen 3, QKV separate", "UV", 2, True),
        ("qwen 3, QKV separate", "UV", 4, False),
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
@pytest.mark.parametrize("model", ["llama, QKV separate", "gpt2, QKV separate", "qwen 2, QKV separate"])
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


@pytest.mark.parametrize("model", ["llama, QKV separate", "gpt2, QKV separate", "qwen 3, QKV separate"])
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


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_separate_qkv_starts_as_rows_of_the_fused_weight(architecture):
    """So that the choice does not change the model before its first step."""
    fused, separate = start(architecture), start(f"{architecture}, QKV separate")
    settings = configuration(1, **MODELS[architecture]).model
    for i in range(LAYERS):
        qkv = f"decoder.layers.{i}.self_attention.linear_qkv"
        whole = fused.pop(f"{qkv}.weight")
        for part in "qkv":
            assert torch.equal(separate.pop(f"{qkv}.{part}.weight"), rows(whole, part, settings))
            separate.pop(f"{qkv}.{part}.bias", None)
        fused.pop(f"{qkv}.bias", None)
    assert fused.keys() == separate.keys()
    assert all(torch.equal(separate[name], value) for name, value in fused.items())
