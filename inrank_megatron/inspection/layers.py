"""What a checkpoint says of each factorised linear, one layer in memory at a time, on one process.

Letters as elsewhere: O, I features, r rank, b buffer, k = r + b columns in use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from inrank_megatron import costs
from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.locate import CONFIG, locate
from inrank_megatron.config import Config, load
from inrank_megatron.errors import UserError
from inrank_megatron.inspection.untrained import untrained_ranks
from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.linalg.spectra import Product, Update, singular_values
from inrank_megatron.methods.changes import LayerView
from inrank_megatron.methods.growth import GrowthRule
from inrank_megatron.shapes import linear_shapes

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class LayerRow:
    """One factorised linear at the step of a checkpoint.

    Attributes:
        rank, columns: r, and the columns in use (r + b in the first phase, r after the switch).
        untrained_rank: where the criterion of the released code ends on untrained factors of this shape.
        explained_ratio: of ``rank``, by the run's criterion, on the spectrum ``spectrum_of``.
        spectrum_of: ``update``, ``U V - U0 V0``; ``product``, ``U V``.
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
    """A checkpoint's layers, and the whole model's cost against the dense one.

    ``notes``: of newer checkpoints that were passed over because they are damaged.
    """

    folder: Path
    step: int
    method: str
    layers: list[LayerRow]
    parameters: int
    dense_parameters: int
    flops_per_token: int
    dense_flops_per_token: int
    notes: list[str]


def inspect(path: Path) -> Inspection:
    """Read the newest whole checkpoint of the run folder ``path``, or the checkpoint folder ``path`` itself.

    Memory: a small multiple of the largest tensor.

    Raises:
        UserError: there is no such folder, no run or no checkpoint in it, the checkpoint is damaged, or the
            run is dense.
    """
    run, checkpoint, notes = locate(path)
    config = load(run / CONFIG)
    specs = {name: FactorSpec(**spec) for name, spec in checkpoint.state["engine"]["factors"].items()}
    if not specs:
        raise UserError(
            f"{path}: a run of method {config.training.method} has no factorised linears, so no ranks; "
            "name a run of another method"
        )
    untrained, shapes = untrained_ranks(config), linear_shapes(config)
    with _group_of_one() as group:
        rows = [
            _row(name, spec, checkpoint, config, group, shape=shapes[name], untrained=untrained[shapes[name]])
            for name, spec in specs.items()
        ]
    vocabulary = checkpoint.shape(EMBEDDING)[0]
    ranks = {name: spec.active for name, spec in specs.items()}
    base = any(spec.base for spec in specs.values())
    return Inspection(
        folder=checkpoint.folder,
        step=checkpoint.state["step"],
        method=config.training.method,
        layers=rows,
        parameters=costs.parameters(config, vocabulary, ranks=ranks, frozen_base=base).total,
        dense_parameters=costs.parameters(config, vocabulary).total,
        flops_per_token=costs.flops_per_token(config, vocabulary, ranks=ranks, frozen_base=base),
        dense_flops_per_token=costs.flops_per_token(config, vocabulary),
        notes=notes,
    )


@contextmanager
def _group_of_one() -> Iterator[ProcessGroup]:
    """The spectra are those of a run, whose algebra is collective; here the group has one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _row(
    name: str,
    spec: FactorSpec,
    checkpoint: Checkpoint,
    config: Config,
    group: ProcessGroup,
    *,
    shape: tuple[int, int],
    untrained: float,
) -> LayerRow:
    kind, values = _spectrum(name, spec, checkpoint, group)
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
        explained_ratio=GrowthRule.from_config(config).explained_ratio(view, spec.rank),
        spectrum_of=kind,
        singular_values=view.singular_values,
        parameters=spec.active * sum(shape),
        frozen_parameters=shape[0] * shape[1] if spec.base else 0,
        dense_parameters=shape[0] * shape[1],
        flops_per_token=costs.linear_flops_per_token(shape, spec.active, frozen_base=spec.base),
        dense_flops_per_token=costs.linear_flops_per_token(shape, None),
    )


def _spectrum(
    name: str, spec: FactorSpec, checkpoint: Checkpoint, group: ProcessGroup
) -> tuple[str, tuple[float, ...]]:
    """Its kind and the singular values of the columns in use: of the update where initial values are kept."""
    leaves = ("U", "V", "U0", "V0") if spec.tracked else ("U", "V")
    names = {f"{name}.{leaf}": leaf for leaf in leaves}
    tensors = {names[full]: tensor for full, tensor in checkpoint.tensors(names)}
    k = spec.active
    parts = {leaf: t[:, :k] if leaf[0] == "U" else t[:k] for leaf, t in tensors.items()}
    product = Update(name, **parts) if spec.tracked else Product(name, **parts)
    [values] = singular_values([product], group, step=checkpoint.state["step"])
    return "update" if spec.tracked else "product", tuple(values.tolist())
