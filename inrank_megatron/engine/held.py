"""What each rank holds of an engine's state: the slices that it writes, and those that it reads again.

Nothing is gathered to write: of every entry one rank writes what it holds already. Which rank holds what:

- tensor parallelism: its shard of a parameter that is sharded; all of any other (norms, position
  embeddings, ...);
- ZeRO 1 to 3: of every master and moment a run of entries of the flattened tensor-parallel part, which no
  other replica holds; in stage 3 of W0 too;
- else, as in stage 0, all of it, as every replica does.

What several ranks hold is divided between them: large runs evenly, small ones in turns. To resume, each rank
reads all that it holds.
"""

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inrank_megatron.checkpoint.slices import Box, Slice, boxes
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import held_value, local_shape
from inrank_megatron.model.initialise import full_shape

EVEN_BYTES = 2**16  # a smaller run, divided over many ranks, would be more names than values


@dataclass(frozen=True)
class _Held:
    """``run``: entries of this rank's flattened tensor-parallel part of ``name`` from ``start`` on.

    ``like``: the parameter that is sharded as it is. ``shared``: whether every replica holds the same.
    ``write``: sets the run.
    """

    name: str
    run: Tensor
    start: int
    like: Tensor
    shared: bool
    write: Callable[[Tensor], object]


def held_slices(engine: Engine) -> Iterator[Slice]:
    """The slices that this rank writes, as they lie on its device; no copies. Those of all ranks make up each
    tensor of the state, by the names of ``state.py``.
    """
    for turn, held in enumerate(_held(engine)):
        yield from _slices(held, held.run, *_to_write(held, turn, engine.parallel), engine.parallel)


def held_boxes(engine: Engine) -> Iterator[tuple[str, Box]]:
    """Name and place of all that this rank holds, in full tensors."""
    for held in _held(engine):
        for piece in _slices(held, held.run, 0, held.run.numel(), engine.parallel):
            yield held.name, piece.box


def fill_held(engine: Engine, read: Callable[[str, Box], Tensor], *, names: Container[str]) -> None:
    """Set all that this rank holds of the tensors ``names``. Not collective: a working copy that is more than
    what this rank holds of the master stays as it is.

    Args:
        read: the entries of a full tensor in a box, on the CPU.
    """
    for held in _held(engine):
        if held.name in names:
            values = torch.zeros(held.run.shape, dtype=held.run.dtype)  # rows that pad a vocabulary stay zero
            for piece in _slices(held, values, 0, held.run.numel(), engine.parallel):
                piece.values.copy_(read(held.name, piece.box))
            held.write(values)


def held_bytes(engine: Engine) -> int:
    """Bytes of all that :func:`held_slices` gives."""
    return sum(piece.values.numel() * piece.values.element_size() for piece in held_slices(engine))


def _held(engine: Engine) -> Iterator[_Held]:
    """In the same order on all ranks."""
    master_weights = engine.master_weights
    shared = not master_weights.shard_map.partitioned
    for name, parameter in engine.parameters():
        for key in (None, *master_weights.moments(parameter)):
            run, start = master_weights.held(parameter, key)
            write = partial(master_weights.write_held, parameter, key=key)
            yield _Held(name if key is None else f"{name}.{key}", run, start, parameter, shared, write)
    for name, layer in engine.layers.items():
        if (weight := layer.weight) is not None:
            run, start = held_value(weight)
            yield _Held(f"{name}.weight", run, start, weight, not hasattr(weight, "ds_tensor"), run.copy_)
    for name, pair in engine.initial.items():
        for leaf, initial in zip(("U0", "V0"), pair, strict=True):
            like, run = getattr(engine.layers[name], leaf[0]), initial.view(-1)
            yield _Held(f"{name}.{leaf}", run, 0, like, shared=True, write=run.copy_)


def _to_write(held: _Held, turn: int, parallel: Parallel) -> tuple[int, int]:
    """First and last entry of the run that this rank writes, of the ranks that hold the same."""
    index, holders = (0, 1) if _is_sharded(held.like) else (parallel.tp_rank, parallel.tp_size)
    if held.shared:
        index, holders = index * parallel.dp_size + parallel.dp_rank, holders * parallel.dp_size
    count = held.run.numel()
    if count * held.run.element_size() < EVEN_BYTES:
        return (0, count) if turn % holders == index else (0, 0)
    return count * index // holders, count * (index + 1) // holders


def _is_sharded(like: Tensor) -> bool:
    return bool(getattr(like, "tensor_model_parallel", False))


def _slices(held: _Held, run: Tensor, first: int, last: int, parallel: Parallel) -> Iterator[Slice]:
    """The entries ``first`` to ``last`` of ``run``, which has the place of ``held.run``, as slices."""
    begin = first
    for box in boxes(local_shape(held.like), held.start + first, held.start + last):
        count = math.prod(box[1])
        yield from _placed(held, run[begin : begin + count].view(box[1]), box, parallel)
        begin += count


def stored_shape(like: Tensor, parallel: Parallel) -> tuple[int, ...]:
    """Shape of the full tensor that a checkpoint has for ``like``, without rows that pad a vocabulary."""
    rows, *others = full_shape(like, parallel)
    return (getattr(like, "true_rows", rows), *others)


def _placed(held: _Held, values: Tensor, box: Box, parallel: Parallel) -> Iterator[Slice]:
    """``values`` as slices of the full tensor, from their ``box`` in this rank's part of it; without the rows
    that pad a vocabulary.
    """
    full_shape = stored_shape(held.like, parallel)
    offset = list(box[0])
    dim, stride, ranks, rank = 0, 1, 1, 0
    if _is_sharded(held.like):
        like: Any = held.like  # with Megatron's attributes
        dim, stride = like.partition_dim, like.partition_stride
        ranks, rank = parallel.tp_size, parallel.tp_rank
    size = local_shape(held.like)[dim] // stride
    for part in range(stride):  # one after the other here, with those of the other ranks between them there
        first = max(offset[dim], part * size)
        last = min(offset[dim] + box[1][dim], (part + 1) * size)
        there = [*offset]
        there[dim] = (part * ranks + rank) * size + first - part * size
        rows = min(full_shape[0] - there[0], last - first if dim == 0 else box[1][0])
        if first < last and rows > 0:
            piece = values.narrow(dim, first - offset[dim], last - first)[:rows]
            yield Slice(held.name, piece, tuple(there), full_shape)
