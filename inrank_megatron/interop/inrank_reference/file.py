"""The InRank authors' Lightning checkpoint as a file: its tensors, and what of the model has to be found
next to them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inrank_megatron.config.loading import from_flat, load
from inrank_megatron.config.schema import Config
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.torch_files import StandIn
from inrank_megatron.interop.core.torch_files import load as load_file
from inrank_megatron.lowrank.layers.spec import FactorSpec

HEAD_FEATURES, EPSILON = 64, 1e-5
"""Of every model in the authors' configurations; their program takes them out of what it saves."""
KNOWN = frozenset(
    {
        "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
        "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
        "omegaconf.nodes.AnyNode", "omegaconf.nodes.StringNode",
        "omegaconf.nodes.IntegerNode", "omegaconf.nodes.FloatNode", "omegaconf.nodes.BooleanNode",
        "pytorch_lightning.utilities.parsing.AttributeDict", "collections.defaultdict", "typing.Any",
        "builtins.dict", "builtins.list", "builtins.str", "builtins.int", "builtins.float", "builtins.bool",
        "pathlib.PosixPath",
    }
)  # fmt: skip
"""What Lightning and Hydra's configurations need."""


def open_file(path: Path, options: Options) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, by their names in the model, in FP32; and all that the file holds."""
    saved = load_file(path, options, known=KNOWN)
    state = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: has no state_dict; name a checkpoint of Lightning")
    names = {name.removeprefix("model.").removeprefix("transformer."): name for name in state}
    tensors = {short: state[name] for short, name in names.items() if isinstance(state[name], Tensor)}
    if "h.0.mlp.fc1.A" not in tensors or "wte.weight" not in tensors or "wpe.weight" not in tensors:
        raise UserError(
            f"{path}: has no factors A and B in GPT-2's MLPs; name a checkpoint of the authors' "
            "in_rank_efficient experiments"
        )
    head = tensors.get("lm_head.weight")
    if head is not None and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{path}: its head is not its embedding, as GPT-2's is; name a checkpoint of GPT-2")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, saved


def model_config(
    path: Path, tensors: Mapping[str, Tensor], saved: Mapping[str, Any], options: Options
) -> tuple[Config, tuple[str, ...]]:
    """Sizes from the tensors; of what they do not show, the user's file, the checkpoint, else the authors'
    values.
    """
    width = tensors["wte.weight"].shape[1]
    given = {} if options.model_config is None else load(options.model_config).model.model_dump()
    model = _setting(saved, "model", "config")
    model = model if isinstance(model, dict) else {}
    if model.get("scale_attn_by_inverse_layer_idx") is False:
        raise UserError(
            f"{path}: its attention is not scaled by layer, unlike the authors' GPT-2; it is not read here"
        )
    heads = given.get("num_attention_heads") or model.get("n_head") or max(1, width // HEAD_FEATURES)
    if width % heads:
        raise UserError(f"{path}: {heads} heads do not divide its width {width}; give --model-config FILE")
    config = from_flat(
        {
            "num_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h.")),
            "hidden_size": width,
            "num_attention_heads": heads,
            "ffn_hidden_size": tensors["h.0.mlp.fc1.B"].shape[0],
            "seq_length": tensors["wpe.weight"].shape[0],
            "norm_epsilon": given.get("norm_epsilon") or model.get("layer_norm_epsilon") or EPSILON,
            "openai_gelu": given.get("openai_gelu", False),
            "method": "inrank-efficient",
            "inrank_preset": "released",
            "train_iters": 1,
        }
    )
    return config, (
        f"{path}: taken as in the authors' configurations where the file does not say it: {heads} heads, "
        f"epsilon {config.model.norm_epsilon:g}, exact GELU, attention scores of layer i divided by i + 1",
    )


def layer_spec(
    path: Path, tensors: Mapping[str, Tensor], name: str, saved: Mapping[str, Any], options: Options
) -> FactorSpec:
    """Modes that take part: all of a pruned layer's, else the current ones and the buffer."""
    try:
        rows, rank = tensors[f"{name}.A"].shape[0], int(tensors[f"{name}.current_modes_tensor"].item())
    except (KeyError, RuntimeError):
        raise UserError(
            f"{path}: lacks A or current_modes_tensor of {name}; name a complete checkpoint"
        ) from None
    used = rows
    if rank != rows:
        buffer = _setting(saved, "model", "mlp_cfg", "linear1_cfg", "buffer_modes")
        if not isinstance(buffer, int):
            buffer = None if options.model_config is None else load(options.model_config).inrank.buffer
        if buffer is None:
            raise UserError(
                f"{path}: a first stage, which does not say how many modes its buffer has; give "
                "--model-config FILE with `buffer: N` (the authors' is 100)"
            )
        used = min(rank + buffer, rows)
    if not 1 <= rank <= rows:
        raise UserError(f"{path}: {name} has {rank} modes of {rows}; name a complete checkpoint")
    return FactorSpec(capacity=used, active_columns=used, rank=rank, frozen_base=False, final=rank == rows)


def _setting(saved: Mapping[str, Any], *keys: str) -> Any:
    """A value in Hydra's configuration, which a Lightning checkpoint holds as objects of omegaconf."""
    value = saved.get("hyper_parameters")
    for key in keys:
        value = _plain(value)
        value = value.get(key) if isinstance(value, dict) else None
    return _plain(value)


def _plain(node: Any) -> Any:
    if isinstance(node, StandIn):
        values = vars(node)
        node = values.get("_content", values.get("_val"))
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node
