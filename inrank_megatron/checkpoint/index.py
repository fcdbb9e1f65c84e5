"""Where the tensors of a checkpoint lie: its index, held against the headers of the files that it names."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from inrank_megatron.checkpoint.slices import Box, Shape, common_box, fill, key, runs, within
from inrank_megatron.checkpoint.verify import (
    INDEX,
    TENSORS,
    compare,
    damaged,
    is_count,
    read_bytes,
    read_json,
    size_of,
    unreadable,
)

HEADER_BYTES = 10**8  # the limit of the safetensors library itself
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
}


class Stored(NamedTuple):
    """What a file has under a name; its data begin at the byte ``at``."""

    shape: Shape
    dtype: str
    at: int


Header = dict[str, Stored]
"""What a tensor file has, by name."""


class Piece(NamedTuple):
    """A slice of a tensor: its file, the byte in it, and where the slice lies in the full tensor."""

    file: str
    at: int
    box: Box


class Portion(NamedTuple):
    """Entries of the full tensor in ``box``, all of which are in ``piece``."""

    piece: Piece
    box: Box


class Entry(NamedTuple):
    """A full tensor."""

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def examine(folder: Path, files: Mapping[str, dict], *, verify: bool = True) -> dict[str, Header]:
    """What the tensor files among ``files`` have, by file.

    Args:
        files: of the manifest. verify: first compare every byte of them with it.
    """
    if verify:
        compare(folder, files)
    return {file: _header(folder / file) for file in sorted(files) if TENSORS.fullmatch(file)}


class Examine(Protocol):
    """:func:`examine`, or what does its work on several ranks."""

    def __call__(
        self, folder: Path, files: Mapping[str, dict], *, verify: bool = True
    ) -> dict[str, Header]: ...


def read_index(folder: Path, inside: Mapping[str, Header]) -> dict[str, Entry]:
    """The tensors of a checkpoint, by name. ``inside``: what its tensor files have.

    Raises:
        Damaged: index and headers do not agree, or slices do not make up a tensor.
    """
    path = folder / INDEX
    try:
        listed = {name: _listed(name, entry, inside) for name, entry in read_json(path).items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        damaged(path, "names other files than the manifest, or makes no sense")
    expected: dict[str, set[str]] = {file: set() for file in inside}
    for name, (shape, slices) in listed.items():
        for file, box in slices:
            expected[file].add(key(name, box, shape))
    for file, stored in inside.items():
        if stored.keys() != expected[file]:
            extra, missing = sorted(stored.keys() - expected[file]), sorted(expected[file] - stored.keys())
            damaged(folder / file, f"lacks {missing[:4]} of the index and has {extra[:4]} beyond it")
    return {name: _entry(path, name, shape, slices, inside) for name, (shape, slices) in listed.items()}


def read_box(folder: Path, entry: Entry, box: Box, received: Mapping[Portion, Tensor]) -> Tensor:
    """The entries of a full tensor in ``box``, on the CPU; of the files only their bytes are read.

    Args:
        received: portions that are not in the folder.
    """
    values = torch.empty(box[1], dtype=entry.dtype)
    for portion in portions_of(entry, box):
        target = values[within(portion.box, box[0])]
        if portion in received:
            target.copy_(received[portion])
        elif target.is_contiguous():
            _read_into(folder, portion, target)
        else:
            target.copy_(read_portion(folder, portion, entry.dtype))
    return values


def portions_of(entry: Entry, box: Box) -> Iterator[Portion]:
    """What of a tensor's pieces makes up ``box``."""
    for piece in entry.pieces:
        if (common := common_box(box, piece.box)) is not None:
            yield Portion(piece, common)


def read_portion(folder: Path, portion: Portion, dtype: torch.dtype) -> Tensor:
    """The entries of a portion, on the CPU."""
    values = torch.empty(portion.box[1], dtype=dtype)
    _read_into(folder, portion, values)
    return values


def _read_into(folder: Path, portion: Portion, target: Tensor) -> None:
    piece, box = portion
    path, data = folder / piece.file, target.view(-1).view(torch.uint8).numpy().data
    inside, done = tuple(at - o for at, o in zip(box[0], piece.box[0], strict=True)), 0
    try:
        with path.open("rb", buffering=0) as file:  # a buffer would read more than is asked for
            for start, count in runs(piece.box[1], (inside, box[1])):
                file.seek(piece.at + start * target.itemsize)
                end = done + count * target.itemsize
                while done < end and (read := file.readinto(data[done:end])):
                    done += read
                if done < end:
                    damaged(path, "shorter than its header says")
    except OSError as error:
        unreadable(path, error)


Slices = list[tuple[str, Box]]
"""File and box of each."""


def _listed(name: str, entry: Any, inside: Mapping[str, Header]) -> tuple[Shape, Slices]:
    """What an index says of a tensor. Version 2 names its one file, whose header alone has the shape."""
    if isinstance(entry, str):
        shape = inside[entry][name].shape if name in inside[entry] else ()
        return shape, [(entry, ((0,) * len(shape), shape))]
    shape, slices = _counts(entry["shape"]), []
    for piece in entry["slices"]:
        box = _counts(piece["offset"], axes=len(shape)), _counts(piece["shape"], axes=len(shape))
        slices.append((piece["file"], box))
    if not {file for file, _ in slices} <= inside.keys():
        raise ValueError(slices)
    return shape, slices


def _counts(value: Any, *, axes: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(map(is_count, value)) or axes not in (None, len(value)):
        raise ValueError(value)
    return tuple(value)


def _entry(path: Path, name: str, shape: Shape, slices: Slices, inside: Mapping[str, Header]) -> Entry:
    stored = [inside[file][key(name, box, shape)] for file, box in slices]
    alike = len({data.dtype for data in stored}) == 1
    if not alike or any(data.shape != box[1] for data, (_, box) in zip(stored, slices, strict=True)):
        damaged(path, f"the slices of {name} are of other types or shapes than their files have")
    if not fill(shape, [box for _, box in slices]):
        damaged(path, f"the slices of {name} do not make up a tensor of {list(shape)}")
    pieces = (Piece(file, data.at, box) for data, (file, box) in zip(stored, slices, strict=True))
    return Entry(shape, DTYPES[stored[0].dtype], tuple(pieces))


def _header(path: Path) -> Header:
    """What a safetensors file has, by name; the data have been found to be all there."""
    total = size_of(path) or 0
    length = int.from_bytes(read_bytes(path, 8), "little") if total >= 8 else total
    if length > min(HEADER_BYTES, total - 8):
        damaged(path, "no tensor file, its header is longer than itself")
    begin = 8 + length
    try:
        header = json.loads(read_bytes(path, begin)[8:])
        tensors = {name: x for name, x in header.items() if name != "__metadata__"}
        if all(_is_placed(x, total - begin) for x in tensors.values()):
            return {
                name: Stored(tuple(x["shape"]), x["dtype"], begin + x["data_offsets"][0])
                for name, x in tensors.items()
            }
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        damaged(path, f"no tensor file, its header makes no sense ({type(error).__name__})")
    damaged(path, "no tensor file, its header lists data that it does not have")


def _is_placed(tensor: dict, data_bytes: int) -> bool:
    shape, (start, stop) = tensor["shape"], tensor["data_offsets"]
    counts = isinstance(shape, list) and all(map(is_count, [*shape, start, stop]))
    if not counts or not start <= stop <= data_bytes:
        return False
    return math.prod(shape) * DTYPES[tensor["dtype"]].itemsize == stop - start
