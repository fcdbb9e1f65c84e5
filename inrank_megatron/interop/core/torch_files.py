"""Files of ``torch.save``. They are pickles, which can name any function to be called: nothing that they name
is ever called here.
"""

import pickletools
import zipfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.pointers import refuse_pointer

DICTIONARIES = ("collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict")


class StandIn:
    """Takes the place of an object whose class is not harmless data: it holds what the object was made of."""

    def __init__(self, *args: Any, **values: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = (state,)


def load(path: Path, options: Options, *, known: Collection[str] = ()) -> Any:
    """What ``torch.save`` put into ``path``, tensors mapped from the disk, objects as :class:`StandIn`.

    Args:
        known: full names of the classes, beyond tensors and plain containers, that such a file has for good
            reason. Others are refused, unless the options allow them: a stand-in runs nothing of theirs
            either.

    Raises:
        UserError: no such file, a link, another kind of file, or one that names something unknown.
    """
    check_plain(path)
    try:
        check_zip(path)
        with as_data(path, options, known=known):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        check_tensors(content, file_bytes=path.stat().st_size)
        return content
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: cannot be opened as a file of torch.save ({reason}); name a complete one"
        ) from None


def as_data(path: Path, options: Options, *, known: Collection[str] = ()) -> AbstractContextManager:
    """A context in which torch's loader of plain weights opens ``path``, with stand-ins for what is not data.

    Raises:
        UserError: the file names something that is not ``known``, and the options do not allow it.
    """
    unsafe_globals = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if (unknown := sorted(set(unsafe_globals) - set(known))) and not options.allow_pickle:
        raise UserError(
            f"{path}: names {', '.join(unknown)}, which is not data; if the file is as its writer left it, "
            "give --allow-pickle (such objects are left out, and nothing of theirs runs)"
        )
    return torch.serialization.safe_globals([(_stand_in(name), name) for name in unsafe_globals])


class _PlainDict:
    """Makes a dictionary in the place of a class that is a dictionary with something more."""

    def __new__(cls, *arguments: Any) -> Any:
        return {}


def _stand_in(name: str) -> type:
    return type("StandIn", (_PlainDict if name in DICTIONARIES else StandIn,), {})


def check_plain(path: Path) -> None:
    """Raise unless ``path`` is a file and no link: a link could lead out of the folder that was named."""
    if path.is_symlink():
        raise UserError(f"{path}: is a symbolic link; put the file itself there")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name a complete checkpoint")
    refuse_pointer(path)


def check_zip(file: Path | IO[bytes]) -> None:
    """Raise ValueError where a few bytes would become gigabytes: for packed members, of which torch.save
    makes none, and for arrays of zeros that have a length alone, which torch's loader allows.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed, which torch.save never does")
            if member.filename.endswith("data.pkl"):
                named = {argument for _, argument, _ in pickletools.genops(archive.read(member))}
                if named & {"builtins bytearray", "__builtin__ bytearray"}:
                    raise ValueError(f"{member.filename} names bytearray, which no weights need")


def check_tensors(content: Any, *, file_bytes: int) -> None:
    """Raise ValueError for a tensor that is not a plain one, or for more elements than the file can hold:
    strides of zero make terabytes of four bytes.
    """
    storages: dict[int, int] = {}
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device}")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes() or sum(storages.values()) > file_bytes:
            raise ValueError(f"a tensor {list(tensor.shape)} of more elements than the file holds")


def _tensors(content: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                todo += [*value, *value.values()]
            elif isinstance(value, list | tuple | set | frozenset):
                todo += value
            elif isinstance(value, StandIn):
                todo += vars(value).values()
