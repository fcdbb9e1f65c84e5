"""Small models with random weights in every structure that a run can have."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.data.tokenizer import Tokenizer, train_tokenizer
from inrank_megatron.interop.core import run as run_format
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights, weight_shapes
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.megatron import checkpoint as megatron
from inrank_megatron.interop.peft import adapters as peft
from inrank_megatron.lowrank.layers.spec import FactorSpec

OPTIONS = Options()
VOCABULARY = 301
"""A multiple of nothing: the embedding that a run trains is padded."""
SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 88,
    "seq_length": 24,
    "train_iters": 1,
}
TIED = {"untie_embeddings_and_output_weights": False}
STRUCTURES = {
    "dense": ({}, None),
    "first phase": ({}, True),
    "second phase": ({}, False),
    "first phase, QKV fused": ({"factorised_linears": "mlp-attention"}, True),
    "second phase, QKV fused": ({"factorised_linears": "mlp-attention"}, False),
    "first phase, QKV separate": ({"factorised_linears": "mlp-attention", "qkv_factors": "separate"}, True),
    "second phase, QKV separate": ({"factorised_linears": "mlp-attention", "qkv_factors": "separate"}, False),
    "dense, QKV separate": ({"factorised_linears": "mlp-attention", "qkv_factors": "separate"}, None),
}
"""Settings, and whether a frozen W0 is kept next to the factors; None: no factors."""
MODELS: dict[str, dict] = {
    "gpt2": {"model_type": "gpt2"},
    "llama": {"model_type": "llama"},
    "llama 3": {"num_query_groups": 2, "rotary_base": 4000.0, "rope_scaling_factor": 32.0} | TIED,
    "mistral": {"num_query_groups": 2, "kv_channels": 12},
    "qwen2": {"num_query_groups": 1, "add_qkv_bias": True} | TIED,
    "qwen3": {"num_query_groups": 2, "kv_channels": 10, "qk_layernorm": True},
}
"""Settings of the models that are converted, shrunk."""
GROUPED = tuple(MODELS)[2:]
GROUPED_CASES = [
    *((family, "dense") for family in GROUPED),
    ("llama 3", "first phase, QKV separate"),
    ("mistral", "second phase, QKV fused"),
    ("qwen2", "first phase, QKV fused"),
    ("qwen2", "second phase, QKV separate"),
    ("qwen3", "first phase, QKV fused"),
    ("qwen3", "second phase, QKV separate"),
]
CASES = [(family, structure) for family in ("gpt2", "llama") for structure in STRUCTURES]
FACTORISED = [case for case in CASES if "phase" in case[1]]


def make_tokenizer() -> Tokenizer:
    """A BPE of ``VOCABULARY`` tokens."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    return train_tokenizer([text], vocab_size=VOCABULARY)


def make_weights(family: str, structure: str, *, tokenizer: Path | None = None, **settings) -> Weights:
    """Random weights; every factorised linear has a rank of its own, next to W0 a buffer of 1."""
    changes, frozen_base = STRUCTURES[structure]
    config = from_flat(SIZES | changes | {"model_type": "llama"} | MODELS[family] | settings)
    factors = {}
    if frozen_base is not None:
        for number, name in enumerate(linear_shapes(config)):
            columns = 3 + number % 4
            factors[name] = FactorSpec(
                columns, columns, columns - frozen_base, frozen_base=frozen_base, final=not frozen_base
            )
    tensors = {
        name: random_tensor(name, shape) for name, shape in weight_shapes(config, VOCABULARY, factors).items()
    }
    return Weights(
        "random weights", config, VOCABULARY, factors, tensors.__getitem__, step=7, tokenizer=tokenizer
    )


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Always the same for a name: entries of a size that lets every tensor matter, norms near 1."""
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise


def write_run(weights: Weights, folder: Path) -> Path:
    """A run folder with these weights."""
    folder.mkdir(parents=True)
    run_format.write(weights, folder, OPTIONS)
    return folder


def write_models(root: Path) -> Path:
    """One model in its first phase as a run and in three formats, a folder each."""
    weights = make_weights("gpt2", "first phase")
    write_run(weights, root / "run")
    for module in (hf_dense, peft, megatron):
        (root / module.NAME).mkdir()
        module.write(weights, root / module.NAME, OPTIONS)
    return root


def assert_same(first: Weights, second: Weights) -> None:
    """The same tensors to the bit."""
    assert first.shapes == second.shapes
    for name in first.shapes:
        assert torch.equal(first.read(name).float(), second.read(name).float()), name


NO_NETWORK = "http://127.0.0.1:1"
"""Where no hub answers."""


def cached_model(cache: Path, family: str, tokenizer: Path, *, name: str, revision: str) -> Path:
    """A dense model in the hub's local cache, as a download leaves it; the newest call is ``main``."""
    root = cache / "hub" / f"models--{name.replace('/', '--')}"
    folder = root / "snapshots" / revision
    folder.mkdir(parents=True)
    hf_dense.write(make_weights(family, "dense", tokenizer=tokenizer), folder, OPTIONS)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    return folder
