"""Folders of safetensors as Hugging Face has them: read name by name, written tensor by tensor."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inrank_megatron.data.cache import read_json
from inrank_megatron.errors import UserError

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9
"""A model that is larger is cut into files of at most this size, or of one tensor."""
ELEMENT = 4  # bytes of FP32
READABLE = ("F32", "F16", "BF16")


class FolderTensors(Protocol):
    """The tensors of a folder by name, as they are stored or changed."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...


class SafetensorsFolder:
    """The tensors of a folder, of one file or of those that its index names.

    Attributes:
        shapes: of every tensor, by name.

    Raises:
        UserError: there is no such file, one is missing or damaged, or a tensor is of another type than FP32,
            FP16 or BF16.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._find():
            self._list(file)
        index = read_json(folder / INDEX)
        if index is not None and index.get("weight_map") != self._files:
            raise UserError(f"{folder / INDEX}: does not list the files next to it; name a complete folder")

    def read(self, name: str) -> Tensor:
        """The full tensor, on the CPU, in the precision in which it is stored."""
        with safe_open(self.folder / self._files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def _find(self) -> list[str]:
        index = read_json(self.folder / INDEX)
        if index is not None and isinstance(index.get("weight_map"), dict):
            return sorted({Path(str(file)).name for file in index["weight_map"].values()})
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if found:
            return [SINGLE_FILE] if SINGLE_FILE in found else found
        if pickles := sorted(path.name for path in self.folder.glob("*.bin")):
            raise UserError(
                f"{self.folder / pickles[0]}: a pickle, which can run any code when it is opened; if you "
                "trust it, load it with transformers, save_pretrained() it as safetensors and name that "
                "folder"
            )
        raise UserError(f"{self.folder}: holds no *.safetensors; name a folder with the model's weights")

    def _list(self, file: str) -> None:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118, the handle is not a mapping
                    tensor = handle.get_slice(name)
                    if tensor.get_dtype() not in READABLE:
                        raise UserError(
                            f"{path}: {name} is of type {tensor.get_dtype()}, weights must be of "
                            f"{', '.join(READABLE)}; name the model in floating point"
                        )
                    if name in self._files:
                        raise UserError(
                            f"{path}: {name} is in {self._files[name]} too; name a complete folder"
                        )
                    self._files[name], self.shapes[name] = file, tuple(tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); name a complete folder") from None


def write_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
    """Write the tensors of these names and shapes, in FP32, which ``read`` gives one at a time.

    Memory: one tensor beyond what ``read`` needs. One file up to ``SHARD_BYTES``, else several and an index.
    """
    shards = _shards(shapes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else several
        write_file(folder / file, {name: shapes[name] for name in names}, read)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = ELEMENT * sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += ELEMENT * math.prod(shape)
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = ELEMENT * math.prod(shape)
        shards[-1].append(name)
    return shards


def write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
    """As :func:`write_tensors`, one file; the library's own writer would need all of its tensors at once."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + ELEMENT * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name).to(torch.float32).contiguous()
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, {list(shape)} expected")
            file.write(tensor.numpy().data)
