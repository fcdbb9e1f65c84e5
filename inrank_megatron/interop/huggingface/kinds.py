"""The models of Hugging Face that a run's model can be, by the ``model_type`` of their ``config.json``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import is_llama
from inrank_megatron.data.cache import read_json

CONFIG = "config.json"
CLASSES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
"""Configuration and model of each type that can be read."""
FACTORISED = {f"inrank_{kind}": kind for kind in ("gpt2", "llama", "qwen2", "qwen3")}
"""Types of this project's own models, and what each is derived from."""
# What changes the function and has one value that a run's model can have.
NO_WINDOW = {"use_sliding_window": False}
REQUIRED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "mistral": {"hidden_act": "silu", "sliding_window": None},
    "qwen2": {"hidden_act": "silu"} | NO_WINDOW,
    "qwen3": {"hidden_act": "silu", "attention_bias": False} | NO_WINDOW,
}
# Settings by which a model shows what it is, whatever its type is called.
MARKS = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "multi-latent attention": ("kv_lora_rank", "q_lora_rank"),
    "quantised weights": ("quantization_config",),
    "a sliding window": ("sliding_window",),
}


def kind_of(config: Config) -> str:
    """The type that is written for a run's model; Mistral's, without its window, is LLaMA's."""
    if not is_llama(config):
        return "gpt2"
    return "qwen3" if config.model.qk_layernorm else "qwen2" if config.model.add_qkv_bias else "llama"


def model_type(folder: Path) -> str | None:
    """What ``config.json`` in ``folder`` says, if there is one; ``folder`` may be a file."""
    kind = _values(folder).get("model_type")
    return kind if isinstance(kind, str) else None


def not_taken(folder: Path) -> str:
    """What a model of a type that is not read is, for an error; empty if ``folder`` holds no model."""
    values = _values(folder)
    if (kind := model_type(folder)) is None:
        return ""
    marks = ", ".join(what for what, names in MARKS.items() if any(values.get(name) for name in names))
    return (
        f": {CONFIG} says model_type = {kind!r}{f' ({marks})' if marks else ''}, and of Hugging Face's "
        f"models {', '.join(CLASSES)} are taken"
    )


def complaints(hf, kind: str) -> Iterator[str]:
    """What the configuration ``hf`` of transformers asks for and a run's model does not have."""
    for name, wanted in REQUIRED[kind].items():
        if (value := getattr(hf, name)) != wanted:
            yield f"{name} = {value!r}: must be {wanted!r}"
    windows = [layer for layer in getattr(hf, "layer_types", None) or () if layer != "full_attention"]
    if windows:
        yield f"layer_types = {windows[0]!r}, ...: must be 'full_attention' in every layer"
    if kind == "gpt2":
        return
    rope = hf.rope_parameters
    if not isinstance(base := rope.get("rope_theta"), int | float):
        yield f"rope_theta = {base!r}: must be a number"
    if rope_scaling(rope) is Ellipsis:
        yield (
            f"rope_parameters (rope_scaling) = {rope}: must be plain RoPE, rope_theta alone, or Llama 3's "
            f"scaling, {LLAMA3}"
        )


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants of Llama 3's scaling, as all of its models have them and Megatron has them built in."""


def rope_scaling(rope: Mapping[str, Any]) -> Any:
    """The factor of Llama 3's scaling, None for plain RoPE, ``...`` for any other scaling."""
    rest = {name: rope[name] for name in rope if name not in ("rope_type", "rope_theta")}
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        factor = rest.pop("factor", None)
        return float(factor) if factor and rest == LLAMA3 else ...
    return ... if rest or kind != "default" else None


def rope_parameters(config: Config) -> dict[str, Any]:
    """The inverse, with the base."""
    model, factor = config.model, config.model.rope_scaling_factor
    if factor is None:
        return {"rope_type": "default", "rope_theta": model.rotary_base}
    return {"rope_type": "llama3", "rope_theta": model.rotary_base, "factor": factor, **LLAMA3}


def _values(folder: Path) -> dict[str, Any]:
    return (read_json(folder / CONFIG) or {}) if folder.is_dir() else {}
