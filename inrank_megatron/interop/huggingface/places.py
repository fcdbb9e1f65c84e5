"""Where each tensor of the factorised models of ``modeling_inrank.py`` is in a run's model.

The rows of W0, U and bias are those of the dense format (``names.py``); a V that several modules share is
there once. A factorised linear, and GPT-2's separate query, key and value, are [out, in] also where the dense
model has [in, out].
"""

from collections.abc import Mapping
from dataclasses import dataclass

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import QKV, QKVLayout, linear_shapes
from inrank_megatron.interop.core.weights import Shapes
from inrank_megatron.interop.huggingface.names import HALVES, HFModule, Piece, height, hf_modules
from inrank_megatron.lowrank.layers.spec import FactorSpec

SHARED = {**dict.fromkeys(QKV, "qkv_proj"), **dict.fromkeys(HALVES, "gate_up_proj")}
"""Rows of a linear that is several modules -> the module with their V."""


@dataclass(frozen=True)
class Place:
    """Where a tensor comes from: the run's tensor, its rows (see :class:`Piece`), whether transposed."""

    source: str
    rows: str
    transposed: bool


def places(config: Config, factors: Mapping[str, FactorSpec]) -> dict[str, Place]:
    """Every tensor of the factorised model, by name."""
    found: dict[str, Place] = {}
    for module in hf_modules(config).values():
        for piece in module.pieces:
            name, spec = _name(module, piece), factors.get(piece.source)
            for leaf in module.leaves:
                if leaf != "weight" or spec is None or spec.frozen_base:
                    turned = module.transposed and leaf == "weight" and spec is None and name == module.name
                    found[f"{name}.{leaf}"] = Place(f"{piece.source}.{leaf}", piece.rows, turned)
            if spec is not None:
                found[f"{name}.U"] = Place(f"{piece.source}.U", piece.rows, False)
                found[f"{_owner(name, piece)}.V"] = Place(f"{piece.source}.V", "", False)
    return found


def _name(module: HFModule, piece: Piece) -> str:
    """Separate query, key and value are linears of their own inside one module of the dense model."""
    return module.name if len(module.pieces) == 1 else f"{module.name}.{piece.source.rpartition('.')[2]}"


def _owner(name: str, piece: Piece) -> str:
    """The module with V: the linear itself, or the one next to those that share it."""
    return f"{name.rpartition('.')[0]}.{SHARED[piece.rows]}" if piece.rows in SHARED else name


def factorisable(config: Config) -> dict[str, str]:
    """Name in ``factors`` of every linear that can be factorised -> the run's module."""
    found, known = {}, linear_shapes(config)
    for module in hf_modules(config).values():
        for piece in module.pieces:
            if piece.source in known:
                found[_owner(_name(module, piece), piece).partition(".")[2]] = piece.source
    return found


def placed_shapes(there: Mapping[str, Place], run_shapes: Shapes, *, layout: QKVLayout) -> Shapes:
    """Shape of every tensor of the factorised model, from those of the run's tensors.

    Raises:
        ValueError: a tensor of the run has no place there.
    """
    if homeless := run_shapes.keys() - {place.source for place in there.values()}:
        raise ValueError(f"no place in the factorised model: {sorted(homeless)}")
    shapes = {}
    for name, place in there.items():
        rows, *rest = run_shapes[place.source]
        shape = (height(rows, place.rows, layout=layout), *rest)
        shapes[name] = shape[::-1] if place.transposed else shape
    return shapes
