"""Presets and published models agree: what is read from a model's ``config.json`` is what its preset says."""

import json
from pathlib import Path

import pytest

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import qkv_layout
from inrank_megatron.interop.huggingface import dense as hf_dense

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
NAMES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
PUBLISHED = {
    "smollm2-135m": (30, 576, 9, 3, 1536, 49_152, 8192, 100_000, 1e-5, True),
    "smollm2-360m": (32, 960, 15, 5, 2560, 49_152, 8192, 100_000, 1e-5, True),
    "tinyllama-1.1b": (22, 2048, 32, 4, 5632, 32_000, 2048, 10_000.0, 1e-5, False),
    "llama-3.2-1b": (16, 2048, 32, 8, 8192, 128_256, 131_072, 500_000.0, 1e-5, True),
    "qwen2.5-0.5b": (24, 896, 14, 2, 4864, 151_936, 32_768, 1_000_000.0, 1e-6, True),
    "mistral-7b": (32, 4096, 32, 8, 14_336, 32_768, 32_768, 1_000_000.0, 1e-5, False),
}
MORE = {
    "llama-3.2-1b": {"head_dim": 64, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LLAMA3}},
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 32_768,
        "max_window_layers": 24,
    },
    "mistral-7b": {"model_type": "mistral", "sliding_window": None},
}
"""The rest of their ``config.json``, as the hub has it, that bears on the function."""


def function_of(config: Config) -> dict[str, object]:
    """Settings by which two models of the same weights are the same function."""
    model = config.model
    same = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "query_groups",
        "head_size",
    )
    same += ("max_position_embeddings", "rotary_base", "rope_scaling_factor", "norm_epsilon", "has_own_head")
    same += ("add_qkv_bias", "qk_layernorm", "model_type")
    return {name: getattr(model, name) for name in same} | {"qkv": qkv_layout(config)}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_the_model_as_its_config_json_says(preset: str, tmp_path: Path) -> None:
    values = dict(zip(NAMES, PUBLISHED[preset], strict=True)) | {"model_type": "llama", "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(values | MORE.get(preset, {})))
    read, tokenizer = hf_dense.model_of(tmp_path)
    assert tokenizer is None and read.model.seq_length <= 4096
    assert function_of(read) == function_of(from_flat({"model_preset": preset, "train_iters": 1}))
