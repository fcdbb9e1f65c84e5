"""What a checkpoint says of each factorised linear, or of each linear if all are dense; one layer in memory
at a time, on one process.

Letters as elsewhere: O, I features, r rank, b buffer, k = r + b columns in use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.config import costs
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.formats import read_weights
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.linalg.factors import check_finite
from inrank_megatron.lowrank.linalg.spectra import Product, Update, singular_values
from inrank_megatron.lowrank.methods.changes import LayerView
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.reporting.untrained import untrained_ranks


@dataclass(frozen=True)
class LayerRow:
    """One linear at the step of a checkpoint.

    Attributes:
        rank, columns: r, and the columns in use (r + b in the first phase, r after the switch). Of a dense
            linear the smallest rank whose explained ratio reaches the inspection's threshold, and min(O, I).
        untrained_rank: where the criterion of the released code ends on untrained factors of this shape; None
            for a dense linear.
        explained_ratio: of ``rank``, by the inspection's criterion, on the spectrum ``spectrum_of``.
        spectrum_of: ``update``, ``U V - U0 V0``, where the first values are kept; else ``product``, ``U V``;
            ``weight`` of a dense linear.
        singular_values: all of them up to ``min(O, I)``, descending.
        parameters: of the factors; with W0 also ``frozen_parameters``. A dense linear has
            ``dense_parameters``.
        flops_per_token: forward and backward, as in ``costs.linear_flops_per_token``.
    """

    layer: str
    rank: int
    columns: int
    untrained_rank: float | None
    explained_ratio: float
    spectrum_of: str
    singular_values: tuple[float, ...]
    parameters: int
    frozen_parameters: int
    dense_parameters: int
    flops_per_token: int
    dense_flops_per_token: int


@dataclass(frozen=True)
class Inspection:
    """A model's layers, and the whole model's cost against the dense one.

    Attributes:
        folder: the checkpoint that was read, or an export. format: that it is in.
        method: of the run; for an export the name of its format.
        criterion: by which ratios are taken, ``threshold``: what they shall reach; ``own_settings``: the
            run's own, with its buffer, else the defaults or those that were given.
        notes: messages for the user, as of better checkpoints that are damaged.
    """

    folder: Path
    format: str
    step: int
    method: str
    criterion: str
    threshold: float
    own_settings: bool
    layers: list[LayerRow]
    parameters: int
    dense_parameters: int
    flops_per_token: int
    dense_flops_per_token: int
    notes: list[str]


def inspect(path: Path, options: Options) -> Inspection:
    """Read a run (its best checkpoint), one checkpoint, or a model in any other known format.

    Memory: a small multiple of the largest tensor, where the format is read tensor by tensor.

    Raises:
        UserError: nothing that can be read is there, or its weights are not finite.
    """
    module, weights = read_weights(path, options)
    is_run = module.NAME == "run"
    config, specs = weights.config, weights.factors
    ranks = {name: spec.active_columns for name, spec in specs.items()} or None
    base, vocabulary = any(spec.frozen_base for spec in specs.values()), weights.vocab_size
    return Inspection(
        folder=Path(weights.origin),
        format=module.NAME,
        step=weights.step,
        method=config.training.method if is_run else module.NAME,
        criterion=config.inrank.rank_criterion,
        threshold=config.inrank.threshold,
        own_settings=is_run,
        layers=_factorised_rows(weights) if specs else _dense_rows(weights),
        parameters=costs.parameters(config, vocabulary, ranks=ranks, frozen_base=base).total,
        dense_parameters=costs.parameters(config, vocabulary).total,
        flops_per_token=costs.flops_per_token(config, vocabulary, ranks=ranks, frozen_base=base),
        dense_flops_per_token=costs.flops_per_token(config, vocabulary),
        notes=list(weights.notes),
    )


def _factorised_rows(weights: Weights) -> list[LayerRow]:
    untrained, shapes = untrained_ranks(weights.config), linear_shapes(weights.config)
    with _group_of_one() as group:
        return [
            _factorised_row(name, spec, weights, group, shape=shapes[name], untrained=untrained[shapes[name]])
            for name, spec in weights.factors.items()
        ]


def _dense_rows(weights: Weights) -> list[LayerRow]:
    """Of every linear of every block, also where no method would factorise it."""
    rule = GrowthRule.from_config(weights.config)
    return [
        _dense_row(name.removesuffix(".weight"), weights.read(name), rule, step=weights.step)
        for name, shape in weights.shapes.items()
        if name.startswith("decoder.layers.") and len(shape) == 2
    ]


def _dense_row(name: str, weight: Tensor, rule: GrowthRule, *, step: int) -> LayerRow:
    check_finite(weight, what=f"{name} at step {step}")
    (out, inp), least = weight.shape, min(weight.shape)
    view = LayerView(
        name=name,
        output_size=out,
        input_size=inp,
        rank=least,
        active_columns=least,
        capacity=least,
        attainable_rank=least,
        singular_values=tuple(torch.linalg.svdvals(weight.double()).tolist()),
    )
    rank, flops = rule.re_estimated_rank(view), costs.linear_flops_per_token((out, inp), None)
    return LayerRow(
        layer=name,
        rank=rank,
        columns=least,
        untrained_rank=None,
        explained_ratio=rule.explained_ratio(view, rank),
        spectrum_of="weight",
        singular_values=view.singular_values,
        parameters=out * inp,
        frozen_parameters=0,
        dense_parameters=out * inp,
        flops_per_token=flops,
        dense_flops_per_token=flops,
    )


@contextmanager
def _group_of_one() -> Iterator[ProcessGroup]:
    """The spectra are those of a run, whose algebra is collective; here the group has one process."""
    if dist.is_initialized():  # where a model has been computed with before
        yield dist.group.WORLD
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _factorised_row(
    name: str,
    spec: FactorSpec,
    weights: Weights,
    group: ProcessGroup,
    *,
    shape: tuple[int, int],
    untrained: float,
) -> LayerRow:
    kind, values = _spectrum(name, spec, weights, group)
    view = LayerView(
        name=name,
        output_size=shape[0],
        input_size=shape[1],
        rank=spec.rank,
        active_columns=spec.active_columns,
        capacity=spec.capacity,
        attainable_rank=min(shape) if spec.frozen_base else spec.active_columns,
        singular_values=values[: min(shape)],
    )
    return LayerRow(
        layer=name,
        rank=spec.rank,
        columns=spec.active_columns,
        untrained_rank=untrained,
        explained_ratio=GrowthRule.from_config(weights.config).explained_ratio(view, spec.rank),
        spectrum_of=kind,
        singular_values=view.singular_values,
        parameters=spec.active_columns * sum(shape),
        frozen_parameters=shape[0] * shape[1] if spec.frozen_base else 0,
        dense_parameters=shape[0] * shape[1],
        flops_per_token=costs.linear_flops_per_token(
            shape, spec.active_columns, frozen_base=spec.frozen_base
        ),
        dense_flops_per_token=costs.linear_flops_per_token(shape, None),
    )


def _spectrum(
    name: str, spec: FactorSpec, weights: Weights, group: ProcessGroup
) -> tuple[str, tuple[float, ...]]:
    """Its kind and the singular values of the columns in use: of the update where initial values are kept."""
    leaves = ("U", "V", "U0", "V0") if spec.tracked else ("U", "V")
    parts = {leaf: weights.read(f"{name}.{leaf}") for leaf in leaves}
    product = Update(name, **parts) if spec.tracked else Product(name, **parts)
    [values] = singular_values([product], group, step=weights.step)
    return "update" if spec.tracked else "product", tuple(values.tolist())
