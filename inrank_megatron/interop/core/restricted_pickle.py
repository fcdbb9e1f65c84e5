"""The pickle in which torch's distributed checkpoints list their tensors, read with an allow-list.

The format has no other index, and Megatron-Core opens it with Python's pickle, which calls whatever the file
names. So it is read here first: a file that passes names nothing but the records below.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.torch_files import StandIn, check_plain

DCP = "torch.distributed.checkpoint"
RECORDS = {
    f"{DCP}.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    f"{DCP}.filesystem": ("_StorageInfo",),
    f"{DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}  # fmt: skip


class RestrictedUnpickler(pickle.Unpickler):
    """Builds the records of :data:`RECORDS`, element types and plain containers, and refuses the rest.

    Args:
        allow_pickle: a stand-in takes the place of what would be refused.
    """

    def __init__(self, file: Any, *, allow_pickle: bool):
        super().__init__(file)
        self._allow_pickle = allow_pickle

    def find_class(self, module: str, name: str) -> Any:
        """The class, or a UserError that names it."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        if self._allow_pickle:
            return StandIn
        raise UserError(
            f"names {module}.{name}, which no list of tensors needs; name another checkpoint, or give "
            "--allow-pickle if you trust its writer: Megatron-Core's loader then runs what it names"
        )


def load_metadata(path: Path, *, allow_pickle: bool) -> Any:
    """The ``Metadata`` record in the file ``path``.

    Raises:
        UserError: no such file, a link, no such record, or one that names something else.
    """
    check_plain(path)
    try:
        data = path.read_bytes()
        _check_sizes(data)
        metadata = RestrictedUnpickler(io.BytesIO(data), allow_pickle=allow_pickle).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: is damaged ({type(error).__name__}); name a complete checkpoint") from None
    if type(metadata) is not Metadata or not isinstance(metadata.state_dict_metadata, dict):
        raise UserError(f"{path}: is not a list of a checkpoint's tensors; name a complete checkpoint")
    return metadata


def _check_sizes(data: bytes) -> None:
    """Raise ValueError where a few bytes would make Python's unpickler take gigabytes."""
    for opcode, argument, _ in pickletools.genops(data):  # which refuses lengths beyond the end
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= len(data):
            raise ValueError(f"entry {argument} of a memo")
