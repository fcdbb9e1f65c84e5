"""Storage of torch's distributed checkpoints, as Megatron-Core's ``torch_dist`` backend lays it out: chunks
of tensors in ``*.distcp`` files, listed in ``.metadata``.

Chunks are read one by one, by what the list says of them. torch's own loader leaves what no chunk covers as
it was in memory, so here the chunks of every tensor must be all of it.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.restricted_pickle import load_metadata
from inrank_megatron.interop.core.torch_files import check_plain, check_tensors, check_zip

LIST, DATA = ".metadata", "__0_0.distcp"


class Storage:
    """The tensors of a folder, by key.

    Raises:
        UserError: the list is missing or no list, a chunk lies outside the folder, or some of a tensor is
        missing.
    """

    def __init__(self, folder: Path, options: Options):
        self.folder = folder
        metadata = load_metadata(folder / LIST, allow_pickle=options.allow_pickle)
        self._places = metadata.storage_data or {}
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        for name in {str(place.relative_path) for place in self._places.values()}:
            if Path(name).name != name:
                raise UserError(
                    f"{folder / LIST}: {name} lies outside the folder; name a complete checkpoint"
                )
            check_plain(folder / name)
        for key, entry in self._tensors.items():
            self._check_complete(key, entry)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every tensor; other objects are not listed."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def read(self, key: str, *, layer: int | None = None) -> Tensor:
        """A full tensor as it is stored, or its entry ``layer`` on the first axis, without that axis."""
        entry = self._tensors[key]
        first = 0 if layer is None else layer
        rows = entry.size[0] if layer is None and len(entry.size) else 1
        full = torch.empty((rows, *entry.size[1:]) if len(entry.size) else (), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            if not len(entry.size):
                full.copy_(self._chunk(key, chunk))
                continue
            begin = max(chunk.offsets[0], first)
            end = min(chunk.offsets[0] + chunk.sizes[0], first + rows)
            if begin < end:
                rest = [slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
                part = self._chunk(key, chunk)[begin - chunk.offsets[0] : end - chunk.offsets[0]]
                full[(slice(begin - first, end - first), *rest)] = part
        return full if layer is None else full[0]

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                data = io.BytesIO(file.read(min(place.length, path.stat().st_size)))
            check_zip(data)
            data.seek(0)
            tensor = torch.load(data, map_location="cpu", weights_only=True)
            check_tensors(tensor, file_bytes=len(data.getbuffer()))
        except Exception as error:  # a damaged pickle can fail in any way
            raise UserError(
                f"{path}: {key} cannot be read ({type(error).__name__}); name a complete one"
            ) from None
        if not isinstance(tensor, Tensor) or tensor.shape != torch.Size(chunk.sizes):
            raise UserError(f"{path}: {key} is not as {LIST} lists it; name a complete checkpoint")
        return tensor

    def _check_complete(self, key: str, entry: TensorStorageMetadata) -> None:
        chunks = entry.chunks
        inside = all(
            len(c.offsets) == len(c.sizes) == len(entry.size)
            and all(o >= 0 and o + n <= s for o, n, s in zip(c.offsets, c.sizes, entry.size, strict=True))
            for c in chunks
        )
        listed = all(MetadataIndex(key, c.offsets) in self._places for c in chunks)
        covered = sum(math.prod(c.sizes) for c in chunks) == math.prod(entry.size)
        if not (inside and listed and covered and not _overlapping(chunks)):
            raise UserError(
                f"{self.folder}: {len(chunks)} parts of {key} {list(entry.size)} are not the full tensor, as "
                "if one rank had saved for all; save again from every tensor-parallel rank"
            )


def _overlapping(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether two chunks have an element in common."""
    chunks = [chunk for chunk in chunks if len(chunk.sizes) and math.prod(chunk.sizes)]
    if not chunks:
        return False
    # In the order of the axis that is cut most, each needs to be compared with a few that follow.
    axis = max(range(len(chunks[0].sizes)), key=lambda axis: len({chunk.offsets[axis] for chunk in chunks}))
    chunks.sort(key=lambda chunk: chunk.offsets[axis])
    for index, one in enumerate(chunks):
        end = one.offsets[axis] + one.sizes[axis]
        for other in islice(chunks, index + 1, None):
            if other.offsets[axis] >= end:
                break
            if _overlap(one, other):
                return True
    return False


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    axes = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in axes)


def write_storage(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], *, empty: list[str]
) -> None:
    """Write full tensors, one in memory at a time, in one process without a process group.

    Args:
        read: the tensor of each key in ``shapes``; called twice, as its element type goes into the plan.
        empty: keys of objects that hold None, one each.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
        torch.distributed.checkpoint.save(
            {}, storage_writer=_Writer(folder), planner=_Planner(shapes, read, empty), no_dist=True
        )


class _Writer(FileSystemWriter):
    """One file, written item by item: torch's own writer holds all tensors until the file's end."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with (Path(self.path) / DATA).open("wb") as file:
            for item in plan.items:
                data, begin = planner.resolve_data(item), file.tell()
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    torch.save(data, file)
                length = file.tell() - begin
                place = _StorageInfo(relative_path=DATA, offset=begin, length=length)
                results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def storage_meta(self) -> StorageMeta:
        """No path of the machine."""
        return StorageMeta()


class _Planner(DefaultSavePlanner):
    """A plan whose tensors are read when their turn to be written comes."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], empty: list[str]
    ):
        super().__init__(flatten_state_dict=False)
        self._shapes, self._read, self._empty = shapes, read, empty

    def create_local_plan(self) -> SavePlan:
        tensors = [self._tensor(key, torch.Size(shape)) for key, shape in self._shapes.items()]
        size = BytesIOWriteData(nbytes=len(_none().getbuffer()))
        objects = [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO, bytes_io_data=size)
            for key in self._empty
        ]
        self.plan = SavePlan(items=tensors + objects)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return _none()
        return self._read(write_item.index.fqn).contiguous()

    def _tensor(self, key: str, shape: torch.Size) -> WriteItem:
        origin = torch.Size([0] * len(shape))
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=origin, sizes=shape),
            properties=TensorProperties(dtype=self._read(key).dtype),
            size=shape,
        )
        return WriteItem(index=MetadataIndex(key, origin), type=WriteItemType.SHARD, tensor_data=data)


def _none() -> io.BytesIO:
    data = io.BytesIO()
    torch.save([None], data)
    return data
