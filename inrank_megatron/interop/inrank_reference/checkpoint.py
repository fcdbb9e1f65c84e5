"""Lightning checkpoints of the InRank authors' program (jiaweizzhao/InRank): GPT-2 whose MLPs are ``B A``.
Read only.

A [K, I] and B [O, K] are V and U of a run. In the first stage, of K = min(I, O) / 2 modes the first
``current_modes`` and a buffer take part; after the second has begun, exactly the modes that there are.
Attention is that of transformers' GPT-2 with ``scale_attn_by_inverse_layer_idx``: layer i divides its scores
by i + 1, which goes into the queries here.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import Forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights, account
from inrank_megatron.interop.inrank_reference.file import layer_spec, model_config, open_file
from inrank_megatron.lowrank.layers.spec import FactorSpec

NAME = "reference"
DROPPED = (".attn.bias", ".attn.masked_bias", "lm_head.weight", ".current_modes_tensor", ".iter_tensor")
NORMS = {"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"}
FACTORISED = {"mlp.linear_fc1": "mlp.fc1", "mlp.linear_fc2": "mlp.fc2"}


def matches(path: Path) -> bool:
    """Whether ``path`` is a file of Lightning's."""
    return path.is_file() and path.suffix == ".ckpt"


def open_weights(path: Path, options: Options) -> Weights:
    """The model as a run: U and V of the modes that take part, queries scaled by the layer's place.

    Raises:
        UserError: no such checkpoint, one of another model, or one that does not say what takes part.
    """
    tensors, saved = open_file(path, options)
    config, notes = model_config(path, tensors, saved, options)
    heads = config.model.num_attention_heads
    factors = {
        f"decoder.layers.{layer}.{own}": layer_spec(path, tensors, f"h.{layer}.{theirs}", saved, options)
        for layer in range(config.model.num_layers)
        for own, theirs in FACTORISED.items()
    }
    weights = Weights(
        origin=str(path),
        config=config,
        vocab_size=tensors["wte.weight"].shape[0],
        factors=factors,
        read=lambda name: _weight(name, tensors, factors, heads=heads),
        step=saved.get("global_step") or 0,
        notes=notes,
    )
    try:
        there = {name: tuple(weights.read(name).shape) for name in weights.shapes}
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: {error}: not as the authors' GPT-2 has it; name a checkpoint of it"
        ) from None
    account(weights.origin, there=there | _unused(tensors, config.model.num_layers), here=weights.shapes)
    return weights


def forward(path: Path, options: Options) -> Forward:
    """Logits as the authors' modules compute them, from their tensors as they are, in plain torch."""
    tensors, saved = open_file(path, options)
    model = model_config(path, tensors, saved, options)[0].model
    used = {
        f"h.{i}.{name}": layer_spec(path, tensors, f"h.{i}.{name}", saved, options).active_columns
        for i in range(model.num_layers)
        for name in FACTORISED.values()
    }

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], model.norm_epsilon
        )

    def low_rank(x: Tensor, name: str) -> Tensor:
        k = used[name]
        return F.linear(
            F.linear(x, tensors[f"{name}.A"][:k]), tensors[f"{name}.B"][:, :k], tensors[f"{name}.bias"]
        )

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def attention(x: Tensor, layer: int) -> Tensor:
        parts = dense(x, f"h.{layer}.attn.c_attn").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (model.num_attention_heads, -1)).transpose(1, 2) for part in parts)
        scale = 1 / math.sqrt(q.shape[-1]) / (layer + 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return dense(mixed.transpose(1, 2).flatten(2), f"h.{layer}.attn.c_proj")

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        x = tensors["wte.weight"][tokens] + tensors["wpe.weight"][: tokens.shape[1]]
        for i in range(model.num_layers):
            x = x + attention(norm(x, f"h.{i}.ln_1"), i)
            hidden = low_rank(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.fc1")
            hidden = F.gelu(hidden, approximate="tanh" if model.openai_gelu else "none")
            x = x + low_rank(hidden, f"h.{i}.mlp.fc2")
        return norm(x, "ln_f") @ tensors["wte.weight"].t()

    return logits


def _weight(
    name: str, tensors: Mapping[str, Tensor], factors: Mapping[str, FactorSpec], *, heads: int
) -> Tensor:
    """The weight of a run's model."""
    top = {
        "embedding.word_embeddings.weight": "wte.weight",
        "embedding.position_embeddings.weight": "wpe.weight",
        "decoder.final_layernorm.weight": "ln_f.weight",
        "decoder.final_layernorm.bias": "ln_f.bias",
    }
    if name in top:
        return tensors[top[name]]
    module, _, leaf = name.rpartition(".")
    _, _, layer, *rest = module.split(".")
    own = ".".join(rest)
    if own in NORMS:
        return tensors[f"h.{layer}.{NORMS[own]}.{leaf}"]
    if own in FACTORISED:
        there, k = f"h.{layer}.{FACTORISED[own]}", factors[module].active_columns
        if leaf == "bias":
            return tensors[f"{there}.bias"]
        return tensors[f"{there}.B"][:, :k] if leaf == "U" else tensors[f"{there}.A"][:k]
    conv = tensors[f"h.{layer}.attn.{'c_attn' if own.endswith('linear_qkv') else 'c_proj'}.{leaf}"]
    rows = conv.t() if leaf == "weight" else conv  # transformers' Conv1D has inputs as rows
    return _head_by_head(rows, int(layer), heads=heads) if own.endswith("linear_qkv") else rows


def _head_by_head(rows: Tensor, layer: int, *, heads: int) -> Tensor:
    """[q; k; v] in Megatron's order, with the layer's scale of the scores in the queries."""
    parts = rows.unflatten(0, (3, heads, -1)).clone()
    parts[0] /= layer + 1
    return parts.transpose(0, 1).reshape(rows.shape)


def _unused(tensors: Mapping[str, Tensor], layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors that no weight of a run is made of."""
    leaves = {
        *("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
        *(f"attn.{conv}.{leaf}" for conv in ("c_attn", "c_proj") for leaf in ("weight", "bias")),
        *(f"mlp.{linear}.{leaf}" for linear in ("fc1", "fc2") for leaf in ("A", "B", "bias")),
    }
    used = {f"h.{layer}.{leaf}" for layer in range(layers) for leaf in leaves}
    used |= {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    return {n: tuple(t.shape) for n, t in tensors.items() if n not in used and not n.endswith(DROPPED)}
