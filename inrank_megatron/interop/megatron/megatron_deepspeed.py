"""Megatron-DeepSpeed's model, whose modules have the names that Megatron-LM's had before Megatron-Core.

What they hold is laid out as in Megatron-Core since version 2 of its checkpoints: of each head the rows of
query, key and value after each other; of SwiGLU's two matrices the gate first.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from inrank_megatron.errors import UserError

PREFIX = "language_model."
_LAYER = re.compile(r"(?:encoder|transformer)\.layers\.(\d+)\.(.+)\.(weight|bias)")
_MODULES = {
    "input_layernorm": "input_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_FIRST_VERSION = 2
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}


def present_name(name: str) -> str:
    """The name in a ``GPTModel`` of Megatron-Core; one that is none of Megatron-DeepSpeed's stays."""
    if not name.startswith(PREFIX):
        return name
    rest = name.removeprefix(PREFIX)
    if match := _LAYER.fullmatch(rest):
        layer, module, leaf = match.groups()
        return f"decoder.layers.{layer}.{_MODULES.get(module, module)}.{leaf}"
    return re.sub(r"^(?:encoder|transformer)\.final_layernorm", "decoder.final_layernorm", rest)


def flat(module: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors by their full names; Megatron-DeepSpeed puts those of a part into a dictionary of their own."""
    for name, value in module.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")


def check_version(origin: object, state: Mapping[str, Any]) -> None:
    """UserError for a checkpoint whose rows of query, key and value lie in an older order."""
    version = state.get("checkpoint_version", 0)
    if version < _FIRST_VERSION:
        raise UserError(
            f"{origin}: checkpoint_version = {version}: must be at least {_FIRST_VERSION}, before which rows "
            "of query, key and value lay in another order; load and save it with Megatron-DeepSpeed"
        )


def present_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-DeepSpeed's arguments as Megatron-LM calls them now."""
    result = dict(arguments)
    norm = result.get("normalization")
    result["normalization"] = _NORMS.get(norm, norm)
    if "position_embedding_type" not in result and "add_position_embedding" in result:
        if result.get("use_rotary_position_embeddings"):
            result["position_embedding_type"] = "rope"
        elif result["add_position_embedding"]:
            result["position_embedding_type"] = "learned_absolute"
    for now, before in {"norm_epsilon": "layernorm_epsilon", "rotary_base": "rope_theta"}.items():
        if now not in result and before in result:
            result[now] = result[before]
    return result
