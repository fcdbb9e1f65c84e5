"""Checkpoints that hold weights and no optimizer state: what a conversion makes, and training can start from."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from inrank_megatron.checkpoint.folder import CheckpointWriter
from inrank_megatron.layers.spec import FactorSpec


def write_weights(
    root: Path, *, step: int, factors: Mapping[str, FactorSpec], tensors: Iterable[tuple[str, Tensor]]
) -> Path:
    """Publish a checkpoint of whole named tensors below ``root``; U and V have exactly ``columns`` columns.

    Raises:
        UserError: it cannot be written.
    """
    writer = CheckpointWriter(root, step)
    for name, tensor in tensors:
        writer.add(name, tensor)
    engine = {
        "factors": {name: asdict(spec) for name, spec in factors.items()},
        "optimizer_steps": {},
        "loss_scaling": None,
    }
    return writer.publish(
        {"step": step, "seconds": 0.0, "identity": {}, "engine": engine, "weights_only": True}
    )
