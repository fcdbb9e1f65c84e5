"""``config.json`` of Hugging Face's models from a run's settings, and back, as far as they agree."""

from pathlib import Path
from typing import Any

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import is_llama
from inrank_megatron.data.cache import read_json
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.errors import Unsupported, UserError
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.huggingface.kinds import (
    CLASSES,
    CONFIG,
    complaints,
    rope_parameters,
    rope_scaling,
)

APPROXIMATED = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
"""Activation of GPT-2 -> ``openai_gelu``."""
LONGEST_SEQUENCE = 4096
"""Of a run with a model that has more positions, unless the user asks for more."""


def hf_settings(weights: Weights) -> dict[str, Any]:
    """Arguments of the configuration of its kind; a text starts with what its tokenizer puts there, or
    with the token that ends it.
    """
    model = weights.config.model
    begin = end = None
    if weights.tokenizer is not None:
        tokenizer = load_tokenizer(str(weights.tokenizer))
        begin, end = [*tokenizer.before, tokenizer.eod][0], tokenizer.eod
    common = {
        "vocab_size": weights.vocab_size,
        "initializer_range": model.init_method_std,
        "bos_token_id": begin,
        "eos_token_id": end,
        "dtype": "float32",
    }
    if is_llama(weights.config):
        return common | {
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.query_groups,
            "head_dim": model.head_size,
            "max_position_embeddings": model.max_position_embeddings,
            "rms_norm_eps": model.norm_epsilon,
            "rope_parameters": rope_parameters(weights.config),
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": not model.has_own_head,
        }
    return common | {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "n_ctx": model.max_position_embeddings,  # its older name, which llama.cpp reads
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new" if model.openai_gelu else "gelu",
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


def run_config(folder: Path, kind: str, **settings: Any) -> tuple[Config, int, tuple[str, ...]]:
    """The settings of a dense run with the model in ``folder``, its vocabulary, and messages for the user.

    Args:
        kind: its type, a key of ``CLASSES``. settings: further ones of the run.

    Raises:
        UserError: the model is one that a run cannot have.
    """
    hf, gpt2 = _read(folder, kind), kind == "gpt2"
    for complaint in complaints(hf, kind):
        raise Unsupported(f"{folder / CONFIG}: {complaint}; choose a model that is built in this way")
    if gpt2 and hf.activation_function not in APPROXIMATED:
        raise Unsupported(
            f"{folder / CONFIG}: activation_function = {hf.activation_function!r}: must be "
            f"{' or '.join(APPROXIMATED)}; choose a model that is built in this way"
        )
    found = _gpt2(hf) if gpt2 else _llama(hf, kind)
    common = {
        "model_type": "gpt2" if gpt2 else "llama",
        "init_method_std": hf.initializer_range,
        "attention_dropout": hf.attn_pdrop if gpt2 else float(hf.attention_dropout),
        "vocab_size": hf.vocab_size,
        "train_iters": 1,
    }
    try:
        config = from_flat(found | common | settings)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    notes: tuple[str, ...] = ()
    if gpt2 and hf.embd_pdrop != hf.resid_pdrop:
        notes = (f"embd_pdrop {hf.embd_pdrop}: a run has one rate, that of resid_pdrop, {hf.resid_pdrop}",)
    return config, hf.vocab_size, notes


def _read(folder: Path, kind: str):
    import transformers

    values = read_json(folder / CONFIG)
    if values is None:
        raise UserError(f"{folder / CONFIG}: is missing or not a JSON object; name a complete folder")
    if (method := values.get("quantization_config")) is not None:
        raise UserError(
            f"{folder / CONFIG}: quantization_config {method}: quantised weights cannot be read; name the "
            "model in floating point"
        )
    own = ("model_type", "factors", "separate_qkv", "auto_map")
    try:
        return getattr(transformers, CLASSES[kind][0]).from_dict(
            {name: value for name, value in values.items() if name not in own}
        )
    except Exception as error:  # validation raises many types, with the settings' names in them
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / CONFIG}: {reason}; correct that or name another model") from None


def _gpt2(hf) -> dict[str, Any]:
    return {
        "num_layers": hf.n_layer,
        "hidden_size": hf.n_embd,
        "ffn_hidden_size": hf.n_inner or 4 * hf.n_embd,
        "num_attention_heads": hf.n_head,
        "seq_length": hf.n_positions,
        "norm_epsilon": hf.layer_norm_epsilon,
        "openai_gelu": APPROXIMATED[hf.activation_function],
        "hidden_dropout": float(hf.resid_pdrop),
    }


def _llama(hf, kind: str) -> dict[str, Any]:
    size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    grouped, apart = hf.num_key_value_heads != hf.num_attention_heads, size * hf.num_attention_heads
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads if grouped else None,
        "kv_channels": size if apart != hf.hidden_size else None,
        "seq_length": min(hf.max_position_embeddings, LONGEST_SEQUENCE),
        "max_position_embeddings": hf.max_position_embeddings,
        "norm_epsilon": hf.rms_norm_eps,
        "rotary_base": float(hf.rope_parameters["rope_theta"]),
        "rope_scaling_factor": rope_scaling(hf.rope_parameters),
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "untie_embeddings_and_output_weights": False if hf.tie_word_embeddings else None,
    }
