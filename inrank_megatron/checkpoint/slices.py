"""Slices of full tensors, as the ranks of a job hold them: boxes of entries, wherever they lie."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""Where it begins on each axis of the full tensor, and its shape."""


@dataclass(frozen=True)
class Slice:
    """``values`` are the entries of the full tensor ``name``, of shape ``full_shape``, from ``offset`` on."""

    name: str
    values: Tensor
    offset: Shape
    full_shape: Shape

    @property
    def box(self) -> Box:
        return self.offset, tuple(self.values.shape)


def full_slice(name: str, tensor: Tensor) -> Slice:
    """The tensor in one piece."""
    return Slice(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def key(name: str, box: Box, full_shape: Shape) -> str:
    """The name of a slice in its file: the tensor's own where it is in one piece, else with the box, as in
    ``weight[0:2,4:8]``.
    """
    offset, shape = box
    if shape == full_shape:
        return name
    return f"{name}[{','.join(f'{at}:{at + size}' for at, size in zip(offset, shape, strict=True))}]"


def boxes(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The boxes that hold the entries ``start`` to ``stop`` of a flattened tensor of ``shape``, in their
    order: full rows in one, and before and after them what there is of another row.
    """
    if start == stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows from first to last are full
    if first > last:
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, row - (first * row - start), row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, stop):
        yield (index, *offset), (1, *size)


def common_box(one: Box, other: Box) -> Box | None:
    """The entries that two boxes of a tensor have in common; None if there are none."""
    first = tuple(map(max, one[0], other[0]))
    ends = [[at + size for at, size in zip(*box, strict=True)] for box in (one, other)]
    shape = tuple(min(both) - at for at, *both in zip(first, *ends, strict=True))
    return (first, shape) if all(size > 0 for size in shape) else None


def within(box: Box, origin: Shape) -> tuple[slice, ...]:
    """The index of a box in a tensor whose first entry is at ``origin``."""
    return tuple(slice(at - o, at - o + size) for at, size, o in zip(*box, origin, strict=True))


def runs(shape: Shape, box: Box) -> Iterator[tuple[int, int]]:
    """First entry and length of the runs that make up a box of a flattened tensor of ``shape``, in order."""
    if not shape:
        yield 0, 1
        return
    row, (first, *offset), (rows, *size) = math.prod(shape[1:]), *box
    if tuple(size) == shape[1:]:
        yield first * row, rows * row
        return
    for index in range(first, first + rows):
        for start, count in runs(shape[1:], (tuple(offset), tuple(size))):
            yield index * row + start, count


def fill(full_shape: Shape, placed: Sequence[Box]) -> bool:
    """Whether the boxes hold every entry of a tensor of ``full_shape`` once."""
    for offset, shape in placed:
        if len(offset) != len(full_shape) or len(shape) != len(full_shape):
            return False
        if any(at + size > most for at, size, most in zip(offset, shape, full_shape, strict=True)):
            return False
    if sum(math.prod(shape) for _, shape in placed) != math.prod(full_shape):
        return False
    return len(placed) < 2 or not _overlap(full_shape, placed)


def _overlap(full_shape: Shape, placed: Sequence[Box]) -> bool:
    """Whether two boxes share an entry, on the grid of their edges, which is no larger than the tensor."""
    edges = []
    for axis in range(len(full_shape)):
        ends = {end for at, size in placed for end in (at[axis], at[axis] + size[axis])}
        edges.append({end: index for index, end in enumerate(sorted(ends))})
    met = np.zeros([len(axis) for axis in edges], bool)
    for offset, shape in placed:
        region = tuple(
            slice(axis[at], axis[at + size]) for axis, at, size in zip(edges, offset, shape, strict=True)
        )
        if met[region].any():
            return True
        met[region] = True
    return False
