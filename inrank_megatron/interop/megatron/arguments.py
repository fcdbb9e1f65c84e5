"""Models of checkpoints that other programs wrote: their sizes, from Megatron-LM's arguments or a file that
the user names, and their factors, from the tensors.
"""

from collections.abc import Mapping
from typing import Any

from inrank_megatron.config.loading import from_flat, load, replace
from inrank_megatron.config.schema import Config
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.megatron.megatron_deepspeed import present_arguments
from inrank_megatron.lowrank.layers.spec import FactorSpec

EMBEDDING = "embedding.word_embeddings.weight"
REMEDY = "give --model-config FILE with its model settings, as for the launcher"
SAME = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length")
FAMILIES = {
    "gpt2": {
        "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False,
        "add_bias_linear": True, "untie_embeddings_and_output_weights": False,
    },
    "llama": {
        "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True,
        "add_bias_linear": False,
    },
}  # fmt: skip
"""Megatron-LM's arguments that make each architecture."""
UNKNOWN_HERE = (
    "num_experts", "apply_layernorm_1p", "apply_residual_connection_post_layernorm",
    "rotary_seq_len_interpolation_factor", "rotary_interleaved", "squared_relu", "multi_latent_attention",
)  # fmt: skip
"""Arguments that, if set, make a model which cannot be built here."""
OF_LLAMA = ("group_query_attention", "qk_layernorm", "add_qkv_bias", "use_rope_scaling")
"""Those that only a LLaMA can have here."""
TOGETHER = ("add_qkv_bias", "qk_layernorm")
"""Those of which a model has one (``config/checks.py``)."""
ROPE_SCALING = 8.0
"""Megatron-LM's default."""


def model_of(
    origin: str, arguments: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], options: Options
) -> tuple[Config, int, dict[str, FactorSpec]]:
    """Configuration, vocabulary without padding, and factors of a checkpoint.

    Args:
        arguments: those of Megatron-LM, if the checkpoint holds them.
        shapes: full shape of each of its tensors, by the names of a run's model.

    Raises:
        UserError: neither it nor the options say what the model is, or it is none that is known here.
    """
    if EMBEDDING not in shapes:
        raise UserError(f"{origin}: has no {EMBEDDING}; name the checkpoint of a complete GPT model")
    if options.model_config is not None:
        config = load(options.model_config)
    elif arguments:
        config = _from_arguments(origin, arguments)
    else:
        raise UserError(f"{origin}: does not say what its model is; {REMEDY}")
    factors = {
        name.removesuffix(".U"): FactorSpec(
            capacity=shape[1],
            active_columns=shape[1],
            rank=shape[1],
            frozen_base=f"{name.removesuffix('.U')}.weight" in shapes,
            final=f"{name.removesuffix('.U')}.weight" not in shapes,
        )
        for name, shape in shapes.items()
        if name.endswith(".U")
    }
    attention = any(".self_attention." in name for name in factors)
    separate = any(".linear_qkv.q." in name for name in shapes)
    config = replace(
        config,
        factorised_linears="mlp-attention" if attention or separate else "mlp",
        qkv_factors="separate" if separate else "fused",
    )
    return config, _vocabulary(origin, arguments or {}, shapes[EMBEDDING][0], options), factors


def arguments_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Megatron-LM's arguments, by their present names, among what a checkpoint holds, if it holds them."""
    arguments = state.get("args")
    return present_arguments(vars(arguments)) if hasattr(arguments, "__dict__") else None


def _from_arguments(origin: str, arguments: Mapping[str, Any]) -> Config:
    matching = [
        family
        for family, settings in FAMILIES.items()
        if all(arguments.get(name) == value for name, value in settings.items())
    ]
    unknown = UNKNOWN_HERE if matching == ["llama"] else (*UNKNOWN_HERE, *OF_LLAMA)
    odd = [name for name in unknown if arguments.get(name)]
    if all(arguments.get(name) for name in TOGETHER):
        odd += TOGETHER
    if arguments.get("rotary_percent", 1.0) != 1.0:
        odd.append("rotary_percent")
    if not matching or odd:
        names = [*odd, *({} if matching else FAMILIES["gpt2"])]
        shown = ", ".join(f"{name}={arguments.get(name)}" for name in names)
        raise UserError(
            f"{origin}: {shown}: neither GPT-2 nor LLaMA as they are known here; {REMEDY} if it is one"
        )
    flat = {name: arguments[name] for name in SAME if name in arguments}
    # Megatron-LM's fused bias and GELU, its default, computes the tanh approximation.
    approximate = bool(arguments.get("openai_gelu") or arguments.get("bias_gelu_fusion"))
    return from_flat(
        flat
        | {
            "model_type": matching[0],
            "max_position_embeddings": arguments.get("max_position_embeddings"),
            "norm_epsilon": arguments.get("norm_epsilon"),
            "openai_gelu": approximate and matching[0] == "gpt2",
            "rotary_base": float(arguments.get("rotary_base") or 10000.0),
            "init_method_std": arguments.get("init_method_std"),
            "train_iters": 1,
        }
        | (_llama(arguments) if matching == ["llama"] else {})
    )


def _llama(arguments: Mapping[str, Any]) -> dict[str, Any]:
    grouped, scaled = arguments.get("group_query_attention"), arguments.get("use_rope_scaling")
    untied = arguments.get("untie_embeddings_and_output_weights")
    return {
        "num_query_groups": arguments.get("num_query_groups") if grouped else None,
        "kv_channels": arguments.get("kv_channels"),
        "rope_scaling_factor": float(arguments.get("rope_scaling_factor") or ROPE_SCALING)
        if scaled
        else None,
        "add_qkv_bias": bool(arguments.get("add_qkv_bias")),
        "qk_layernorm": bool(arguments.get("qk_layernorm")),
        "untie_embeddings_and_output_weights": None if untied else False,
    }


def _vocabulary(origin: str, arguments: Mapping[str, Any], rows: int, options: Options) -> int:
    size = options.vocab_size or arguments.get("vocab_size")
    if size is None:
        raise UserError(
            f"{origin}: its embedding has {rows} rows, and how many of them are padding it does not say; "
            f"give --vocab-size N, at most {rows}"
        )
    if not 1 <= size <= rows:
        raise UserError(
            f"{origin}: vocabulary of {size}: must lie between 1 and its {rows} rows; give --vocab-size"
        )
    return size
