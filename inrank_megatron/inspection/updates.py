"""What lies between two models: per linear the singular values of ``D = W_B - W_A``, one linear in memory at
a time. With W_A from before training D is the cumulative update (InRank, definition 1).

W is what the linear computes with: the dense weight, ``U V``, or ``W0 + U V``. Letters: O, I features, n =
min(O, I), s the singular values of D.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import is_llama, qkv_layout
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.formats import read_weights
from inrank_megatron.lowrank.criteria.explained_ratio import grow, update_ratio
from inrank_megatron.lowrank.linalg.factors import check_finite
from inrank_megatron.spectra.values import exact_values, leading_values

LEADING, EXACT_UP_TO = 256, 1024
"""As in ``SpectrumRecorder``: of a larger n only the leading values are computed, by a randomised method."""


@dataclass(frozen=True)
class Side:
    """One of the two models: the checkpoint that was read, its format and its step, 0 if not known."""

    folder: Path
    format: str
    step: int


@dataclass(frozen=True)
class UpdateRow:
    """One linear.

    Attributes:
        rank: the smallest whose explained ratio (criterion ``update``) reaches the threshold; 0 where D is
            zero; None where the leading values do not show for certain that one of them does.
        norm: Frobenius norm of D. relative_norm: over that of W_A; None where that is zero.
        exact: whether ``singular_values``, descending, are all of them; else the leading ones, randomised.
    """

    layer: str
    shape: tuple[int, int]
    rank: int | None
    norm: float
    relative_norm: float | None
    exact: bool
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """``threshold``: of the explained ratio, B's. ``relative_norm``: of all linears together, as one vector;
    None where W_A is zero. ``notes``: messages for the user.
    """

    a: Side
    b: Side
    threshold: float
    relative_norm: float | None
    layers: list[UpdateRow]
    notes: list[str]


def compare(a: Path, b: Path, options: Options) -> Comparison:
    """Compare all linears of all blocks of two models, each in any known format. Of a run its best checkpoint
    is read.

    Raises:
        UserError: one of them cannot be read or has weights that are not finite, both are one checkpoint, or
            they have different architectures.
    """
    (format_a, first), (format_b, second) = (read_weights(path, options) for path in (a, b))
    _check_comparable(first, second)
    threshold = second.config.inrank.threshold
    rows, squares = [], np.zeros(2)
    for name in _linears(first, second):
        old, new = (_weight(weights, name) for weights in (first, second))
        rows.append(_row(name, old, new, threshold=threshold))
        squares += rows[-1].norm ** 2, old.square().sum().item()
    return Comparison(
        a=Side(Path(first.origin), format_a.NAME, first.step),
        b=Side(Path(second.origin), format_b.NAME, second.step),
        threshold=threshold,
        relative_norm=math.sqrt(squares[0] / squares[1]) if squares[1] else None,
        layers=rows,
        notes=list(dict.fromkeys((*first.notes, *second.notes))),
    )


def _check_comparable(a: Weights, b: Weights) -> None:
    if Path(a.origin).resolve() == Path(b.origin).resolve():
        raise UserError(
            f"{b.origin}: is compared with itself; name two checkpoints, as RUN/checkpoints/step_00000100"
        )
    own, other = _architecture(a.config), _architecture(b.config)
    differing = [f"{name} {own[name]} and {other[name]}" for name in own if own[name] != other[name]]
    if differing:
        raise UserError(
            f"{a.origin} and {b.origin}: have different architectures ({', '.join(differing)}); name two "
            "models of one architecture"
        )


def _architecture(config: Config) -> dict[str, object]:
    """What shapes and rows of the linears follow from; vocabulary and positions have no part in it."""
    model = config.model
    return {
        "model_type": "llama" if is_llama(config) else "gpt2",
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_size,
    }


def _linears(a: Weights, b: Weights) -> list[str]:
    """The linears of all blocks; query, key and value one by one if either model has them so."""
    mine, theirs = (_modules(weights) for weights in (a, b))
    return mine if any(name.endswith("linear_qkv.q") for name in mine) else theirs


def _modules(weights: Weights) -> list[str]:
    matrices = (name for name, shape in weights.shapes.items() if len(shape) == 2)
    return list(dict.fromkeys(n.rpartition(".")[0] for n in matrices if n.startswith("decoder.layers.")))


def _weight(weights: Weights, name: str) -> Tensor:
    """W [O, I] in FP64, on the CPU."""
    if name not in _modules(weights):  # this model has query, key and value in one
        fused, _, part = name.rpartition(".")
        return qkv_layout(weights.config).view(_weight(weights, fused), part).flatten(0, 2)
    spec, what = weights.factors.get(name), f"{name} of {weights.origin}"
    leaves = ("weight",) if spec is None else ("U", "V", "weight") if spec.frozen_base else ("U", "V")
    read = {leaf: weights.read(f"{name}.{leaf}").double() for leaf in leaves}
    for tensor in read.values():
        check_finite(tensor, what=what)
    if spec is None:
        return read["weight"]
    product = read["U"] @ read["V"]
    return product.add_(read["weight"]) if spec.frozen_base else product


def _row(name: str, old: Tensor, new: Tensor, *, threshold: float) -> UpdateRow:
    update = new - old
    norm, before, n = update.norm().item(), old.norm().item(), min(update.shape)
    exact = n <= EXACT_UP_TO
    tall = update if update.shape[0] >= update.shape[1] else update.t()
    values = (exact_values(tall) if exact else leading_values(tall, LEADING)).tolist()
    return UpdateRow(
        layer=name,
        shape=(update.shape[0], update.shape[1]),
        rank=rank_at(values, threshold, length=n, square_sum=norm**2),
        norm=norm,
        relative_norm=norm / before if before else None,
        exact=exact,
        singular_values=tuple(values),
    )


def rank_at(values: Sequence[float], threshold: float, *, length: int, square_sum: float) -> int | None:
    """The smallest rank whose ratio by :func:`update_ratio` reaches ``threshold``; 0 of a zero matrix.

    ``values``: all ``length`` = n singular values, or the leading ones next to the ``square_sum`` of all.
    Then the others are not known, and a rank counts if they cannot keep it below: with q of them unseen, the
    sum of which is between 0 and ``sqrt(q (square_sum - sum s^2))``, var(tail) is at its largest for 0 and
    var(all) at its smallest for the other end.
    """
    s = np.array(values)
    if not s.size or s[0] == 0:
        return 0
    if s.size == length:
        ratio = partial(update_ratio, values, length=length)
        return grow(ratio, 1, threshold=threshold, limit=length).rank
    unseen = math.sqrt((length - s.size) * max(0.0, square_sum - float(s @ s)))
    whole = square_sum / length - ((s.sum() + unseen) / length) ** 2
    tails = (square_sum - np.cumsum(s**2)) / length - ((s.sum() - np.cumsum(s)) / length) ** 2
    [reached] = np.nonzero(tails <= (1 - threshold) * whole)
    return int(reached[0]) + 1 if reached.size else None
