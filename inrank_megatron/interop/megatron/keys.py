"""Names of a run's weights and the keys under which Megatron-Core's ``dist_checkpointing`` keeps them.

Keys are those of a Transformer-Engine model, also where the model is another: norms belong to the linear
after them. A program may have stacked all layers into one tensor, which Megatron-Core does by default, and
may have split SwiGLU's gate and up.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
GATE_OR_UP = re.compile(r"(.*mlp\.linear_fc1\.(?:weight|bias|U))_([wv])")
OF_NO_MODEL = ("optimizer.", "chained_", "param_groups", "rng_state", "rerun_state_machine_state")


@dataclass(frozen=True)
class Place:
    """``keys``: their tensors one after the other; ``layer``: the entry that is meant where layers are
    stacked.
    """

    keys: tuple[str, ...]
    layer: int | None


def key_of(name: str) -> str:
    """The key of a run's weight ``name``, each layer by itself."""
    if (match := LAYER.fullmatch(name)) is None:
        return name
    return f"decoder.layers.{match[1]}.{_inner(match[2])}"


def extra_states(shapes: Mapping[str, tuple[int, ...]], factors: Iterable[str]) -> list[str]:
    """Keys of the objects, without content, that Megatron's own linears ask for."""
    ours = set(factors)
    linears = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if LAYER.fullmatch(name) and name.endswith(".weight") and len(shape) == 2
    ]
    return [f"{linear}._extra_state/shard_0_1" for linear in linears if linear not in ours]


def is_stacked(keys: Iterable[str]) -> bool:
    """Whether all layers of one kind are one tensor."""
    layers = [key for key in keys if key.startswith("decoder.layers.")]
    return not any(LAYER.fullmatch(key) for key in layers)


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where each of a run's weights is among the tensors (key to shape) of a folder."""
    found: dict[str, Place] = {}
    keys: tuple[str, ...]
    for key, shape in shapes.items():
        if key.startswith(OF_NO_MODEL):
            continue
        name, keys = key, (key,)
        if match := GATE_OR_UP.fullmatch(key):
            if match[2] == "v":
                continue
            name, keys = match[1], (key, f"{match[1]}_v")
        name = _outer(name)
        if name.startswith("decoder.layers.") and not LAYER.fullmatch(name):
            inner = name.removeprefix("decoder.layers.")
            for layer in range(shape[0]):
                found[f"decoder.layers.{layer}.{inner}"] = Place(keys, layer)
        else:
            found[name] = Place(keys, None)
    return found


def full_shape(place: Place, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the weight at ``place``."""
    parts = [shapes.get(key, (0,)) for key in place.keys]
    parts = parts if place.layer is None else [part[1:] for part in parts]
    return (sum(part[0] for part in parts), *parts[0][1:]) if parts[0] else ()


def _inner(name: str) -> str:
    for ours, key in NORMS.items():
        if name.startswith(ours):
            return key + name.removeprefix(ours)
    return name


def _outer(key: str) -> str:
    for ours, fused in NORMS.items():
        key = key.replace(f".{fused}", f".{ours}")
    return key
