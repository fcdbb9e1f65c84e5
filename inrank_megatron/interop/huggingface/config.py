"""``config.json`` of Hugging Face's GPT-2 and LLaMA from a run's settings, and back, as far as they agree."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import is_llama
from inrank_megatron.data.cache import read_json
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.errors import Unsupported, UserError
from inrank_megatron.interop.core.weights import Weights

CONFIG = "config.json"
APPROXIMATED = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
"""Activation of GPT-2 -> ``openai_gelu``."""
# What changes the function and has one value that a run's model can have.
REQUIRED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
}


def model_type(folder: Path) -> str | None:
    """What ``config.json`` in ``folder`` says, if there is one; ``folder`` may be a file."""
    values = (read_json(folder / CONFIG) or {}) if folder.is_dir() else {}
    kind = values.get("model_type")
    return kind if isinstance(kind, str) else None


def hf_settings(weights: Weights) -> dict[str, Any]:
    """Arguments of ``GPT2Config`` or ``LlamaConfig``; a text starts with what its tokenizer puts there, or
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
            "max_position_embeddings": model.max_position_embeddings,
            "rms_norm_eps": model.norm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": False,
        }
    return common | {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new" if model.openai_gelu else "gelu",
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


def run_config(folder: Path, family: str, **settings: Any) -> tuple[Config, int, tuple[str, ...]]:
    """The settings of a dense run with the model in ``folder``, its vocabulary, and messages for the user.

    Args:
        family: ``gpt2`` or ``llama``. settings: further ones of the run.

    Raises:
        UserError: the model is one that a run cannot have.
    """
    hf = _read(folder, family)
    for complaint in _complaints(hf, family):
        raise Unsupported(f"{folder / CONFIG}: {complaint}; choose a model that is built in this way")
    found = _llama(hf) if family == "llama" else _gpt2(hf)
    common = {
        "model_type": family,
        "init_method_std": hf.initializer_range,
        "attention_dropout": hf.attention_dropout if family == "llama" else hf.attn_pdrop,
        "vocab_size": hf.vocab_size,
        "train_iters": 1,
    }
    try:
        config = from_flat(found | common | settings)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    notes: tuple[str, ...] = ()
    if family == "gpt2" and hf.embd_pdrop != hf.resid_pdrop:
        notes = (f"embd_pdrop {hf.embd_pdrop}: a run has one rate, that of resid_pdrop, {hf.resid_pdrop}",)
    return config, hf.vocab_size, notes


def _read(folder: Path, family: str):
    from transformers import GPT2Config, LlamaConfig

    values = read_json(folder / CONFIG)
    if values is None:
        raise UserError(f"{folder / CONFIG}: is missing or not a JSON object; name a complete folder")
    if (method := values.get("quantization_config")) is not None:
        raise UserError(
            f"{folder / CONFIG}: quantization_config {method}: quantised weights cannot be read; name the "
            "model in floating point"
        )
    own = ("model_type", "factors", "separate_qkv", "auto_map")
    kind = LlamaConfig if family == "llama" else GPT2Config
    try:
        return kind.from_dict({name: value for name, value in values.items() if name not in own})
    except Exception as error:  # validation raises many types, with the settings' names in them
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / CONFIG}: {reason}; correct that or name another model") from None


def _complaints(hf, family: str) -> Iterator[str]:
    for name, wanted in REQUIRED[family].items():
        if (value := getattr(hf, name)) != wanted:
            yield f"{name} = {value!r}: must be {wanted!r}"
    if family == "gpt2":
        if hf.activation_function not in APPROXIMATED:
            yield f"activation_function = {hf.activation_function!r}: must be {' or '.join(APPROXIMATED)}"
        return
    if hf.num_key_value_heads != hf.num_attention_heads:
        yield (
            f"num_key_value_heads = {hf.num_key_value_heads}: must equal num_attention_heads = "
            f"{hf.num_attention_heads}, grouped-query attention is not supported"
        )
    if hf.head_dim * hf.num_attention_heads != hf.hidden_size:
        yield f"head_dim = {hf.head_dim}: must be hidden_size / num_attention_heads"
    rope = hf.rope_parameters
    scaling = {name: rope[name] for name in rope if name not in ("rope_type", "rope_theta")}
    if rope.get("rope_type", "default") != "default" or scaling:
        yield f"rope_parameters (rope_scaling) = {rope}: must be plain RoPE, rope_theta alone"


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


def _llama(hf) -> dict[str, Any]:
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "seq_length": hf.max_position_embeddings,
        "norm_epsilon": hf.rms_norm_eps,
        "rotary_base": float(hf.rope_parameters["rope_theta"]),
    }
