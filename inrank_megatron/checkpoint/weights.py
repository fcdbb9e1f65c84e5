"""Checkpoints of weights alone, as conversion tools write them: a run goes on with a fresh optimizer."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.lowrank.layers.spec import FactorSpec


def write_weights(
    root: Path,
    *,
    step: int,
    factors: Mapping[str, FactorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    file_bytes: int | None = None,
) -> Path:
    """Publish a checkpoint without optimizer state under ``root`` (a run's ``checkpoints``); its folder.

    Args:
        step: optimizer steps that the weights have seen; a run that resumes counts on from there.
        factors: how each factorised linear is factorised; empty for a dense model.
        tensors: full tensors by the names of ``engine/state.py``: every trained parameter (FP32), with
            ``<layer>.U`` [O, K] and ``<layer>.V`` [K, I] of exactly ``columns`` K, ``<layer>.weight`` where
            W0 is kept next to them, ``<layer>.U0`` and ``<layer>.V0`` where initial values are ``tracked``.
        file_bytes: see :class:`CheckpointWriter`.

    Raises:
        ValueError: the tensors of a factorised linear are not those that its spec calls for.
        UserError: something could not be written.
    """
    writer, shapes = CheckpointWriter(root, step, file_bytes=file_bytes), {}
    for name, tensor in tensors:
        writer.add(name, tensor)
        shapes[name] = tuple(tensor.shape)
    for name, spec in factors.items():
        _check(name, spec, shapes)
    return writer.publish(
        {
            "step": step,
            "seconds": 0.0,
            "identity": {},
            "weights_only": True,
            "validation_loss": None,
            "engine": {
                "factors": {name: spec.to_record() for name, spec in factors.items()},
                "optimizer_steps": {},
                "loss_scaling": {},
            },
        }
    )


def is_weights_only(state: Mapping) -> bool:
    """Whether a checkpoint's ``state`` is that of weights alone."""
    return state.get("weights_only") is True


def _check(name: str, spec: FactorSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    leaves = (
        {"U", "V"} | ({"weight"} if spec.frozen_base else set()) | ({"U0", "V0"} if spec.tracked else set())
    )
    given = {leaf for leaf in ("U", "V", "weight", "U0", "V0") if f"{name}.{leaf}" in shapes}
    if leaves != given:
        raise ValueError(f"{name}: tensors {sorted(given)} are given, its spec calls for {sorted(leaves)}")
    for leaf in leaves - {"weight"}:
        columns = shapes[f"{name}.{leaf}"][1 if leaf[0] == "U" else 0]
        if columns != spec.capacity:
            raise ValueError(f"{name}.{leaf}: {columns} columns are given, its spec has {spec.capacity}")
