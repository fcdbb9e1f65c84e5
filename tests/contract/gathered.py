"""A training's state as full tensors, gathered over all ranks: what slices must make up."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.checkpoint.slices import Slice, fill
from inrank_megatron.checkpoint.writing import PartWriter
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import read_value
from inrank_megatron.engine.held import held_slices
from inrank_megatron.engine.state import engine_record
from inrank_megatron.engine.zero_state import read_master_weight
from inrank_megatron.lowrank.linalg.factors import gather_matrix


def full_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state, whole. Collective: every rank goes through all of them in the same order."""
    master_weights = engine.master_weights
    for name, parameter in engine.parameters():
        yield name, _full(read_master_weight(parameter), parameter, engine)
        for key in master_weights.moments(parameter):
            yield f"{name}.{key}", _full(master_weights.read(parameter, key), parameter, engine)
    for name, layer in engine.layers.items():
        if layer.weight is not None:
            yield f"{name}.weight", _full(read_value(layer.weight), layer.weight, engine)
    for name, pair in engine.initial.items():
        for leaf, initial in zip(("U0", "V0"), pair, strict=True):
            yield f"{name}.{leaf}", _full(initial, getattr(engine.layers[name], leaf[0]), engine)


def _full(tensor: Tensor, like: Tensor, engine: Engine) -> Tensor:
    if getattr(like, "tensor_model_parallel", False):
        group = engine.parallel.tp_group
        tensor = gather_matrix(tensor, like.partition_dim, group, like.partition_stride)
    return tensor[: getattr(like, "true_rows", tensor.shape[0])]


def copied_slices(engine: Engine) -> list[Slice]:
    """What this rank would write of a checkpoint."""
    return [Slice(s.name, s.values.cpu().clone(), s.offset, s.full_shape) for s in held_slices(engine)]


def assembled(slices: Iterable[Slice]) -> dict[str, Tensor]:
    """Full tensors of the slices of all ranks, of which each entry is in one."""
    by_name: dict[str, list[Slice]] = {}
    for piece in slices:
        by_name.setdefault(piece.name, []).append(piece)
    return {name: _assembled(pieces) for name, pieces in by_name.items()}


def _assembled(pieces: list[Slice]) -> Tensor:
    shape = pieces[0].full_shape
    assert {piece.full_shape for piece in pieces} == {shape}
    assert fill(shape, [piece.box for piece in pieces]), f"{pieces[0].name}: {[p.box for p in pieces]}"
    full = torch.empty(shape, dtype=pieces[0].values.dtype)
    for piece in pieces:
        offset, size = piece.box
        full[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))] = piece.values
    return full


def write_checkpoint(engine: Engine, root: Path, step: int) -> None:
    """Save as a run saves, without its threads."""
    parallel = engine.parallel
    writer = PartWriter(root, step, part=parallel.rank, deferred=True)
    if parallel.rank == 0:
        writer.begin()
    parallel.barrier()
    for piece in held_slices(engine):
        writer.add(piece)
    parts = parallel.gather_from_all_ranks(writer.close())
    if parallel.rank == 0:
        writer.publish(parts, {"step": step, "engine": engine_record(engine)})
    parallel.barrier()
