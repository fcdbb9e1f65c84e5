"""What a run or an export says of each factorised linear, one layer in memory at a time, on one process.

Letters as elsewhere: O, I features, r rank, b buffer, k = r + b columns in use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from inrank_megatron import costs
from inrank_megatron.conversion.formats import read_weights
from inrank_megatron.conversion.options import Options
from inrank_megatron.conversion.weights import Weights
from inrank_megatron.errors import UserError
from inrank_megatron.inspection.untrained import untrained_ranks
from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.linalg.spectra import Product, Update, singular_values
from inrank_megatron.methods.changes import LayerView
from inrank_megatron.methods.growth import GrowthRule
from inrank_megatron.shapes import linear_shapes


@dataclass(frozen=True)
class LayerRow:
    """One factorised linear at the step of a checkpoint.

    Attributes:
        rank, columns: r, and the columns in use (r + b in the first phase, r after the switch).
        untrained_rank: where the criterion of the released code ends on untrained factors of this shape.
        explained_ratio: of ``rank``, by the inspection's criterion, on the spectrum ``spectrum_of``.
        spectrum_of: ``update``, ``U V - U0 V0``, where the first values are kept; else ``product``, ``U V``.
        singular_values: all of them up to ``min(O, I)``, descending.
        parameters: of the factors; with W0 also ``frozen_parameters``. A dense linear has
            ``dense_parameters``.
        flops_per_token: forward and backward, as in ``costs.linear_flops_per_token``.
    """

    layer: str
    rank: int
    columns: int
    untrained_rank: float
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
        folder: a checkpoint, or an export. format: that it is in.
        method: of the run; for an export the name of its format.
        criterion: by which ratios are taken; ``own_settings``: the run's own, with its buffer and threshold,
            else the defaults.
        notes: what a user should be told, as of newer checkpoints that are damaged.
    """

    folder: Path
    format: str
    step: int
    method: str
    criterion: str
    own_settings: bool
    layers: list[LayerRow]
    parameters: int
    dense_parameters: int
    flops_per_token: int
    dense_flops_per_token: int
    notes: list[str]


def inspect(path: Path, options: Options) -> Inspection:
    """Read a run (its newest checkpoint), one checkpoint, or an export with factors in any known format.

    Memory: a small multiple of the largest tensor.

    Raises:
        UserError: nothing that can be read is there, or its linears are dense.
    """
    module, weights = read_weights(path, replace(options, newest=True))
    is_run = module.NAME == "run"
    config, specs = weights.config, weights.factors
    method = config.training.method if is_run else module.NAME
    if not specs:
        raise _no_ranks(
            path, f"a run of method {method}" if is_run else f"this {method} model", is_run=is_run
        )
    untrained, shapes = untrained_ranks(config), linear_shapes(config)
    with _group_of_one() as group:
        rows = [
            _row(name, spec, weights, group, shape=shapes[name], untrained=untrained[shapes[name]])
            for name, spec in specs.items()
        ]
    ranks = {name: spec.active for name, spec in specs.items()}
    base, vocabulary = any(spec.base for spec in specs.values()), weights.vocab_size
    return Inspection(
        folder=Path(weights.origin),
        format=module.NAME,
        step=weights.step,
        method=method,
        criterion=config.inrank.rank_criterion,
        own_settings=is_run,
        layers=rows,
        parameters=costs.parameters(config, vocabulary, ranks=ranks, frozen_base=base).total,
        dense_parameters=costs.parameters(config, vocabulary).total,
        flops_per_token=costs.flops_per_token(config, vocabulary, ranks=ranks, frozen_base=base),
        dense_flops_per_token=costs.flops_per_token(config, vocabulary),
        notes=list(weights.notes),
    )


def _no_ranks(path: Path, what: str, *, is_run: bool) -> UserError:
    remedy = "name a run of another method" if is_run else "name the run that it was made from"
    return UserError(f"{path}: {what} has no factorised linears, so no ranks; {remedy}")


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


def _row(
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
        active=spec.active,
        capacity=spec.columns,
        max_rank=min(shape) if spec.base else spec.active,
        singular_values=values[: min(shape)],
    )
    return LayerRow(
        layer=name,
        rank=spec.rank,
        columns=spec.active,
        untrained_rank=untrained,
        explained_ratio=GrowthRule.from_config(weights.config).explained_ratio(view, spec.rank),
        spectrum_of=kind,
        singular_values=view.singular_values,
        parameters=spec.active * sum(shape),
        frozen_parameters=shape[0] * shape[1] if spec.base else 0,
        dense_parameters=shape[0] * shape[1],
        flops_per_token=costs.linear_flops_per_token(shape, spec.active, frozen_base=spec.base),
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
