"""The formats of a model's weights: a module each, with the functions that :class:`Format` lists.

A new format is one such module and one line here. Modules import what is heavy inside their functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

from inrank_megatron.errors import Unsupported, UserError
from inrank_megatron.interop.core.gpt import Forward, gpt_forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.huggingface.kinds import not_taken
from inrank_megatron.pointers import refuse_pointer

MODULES = (
    "core.run",
    "peft.adapters",
    "huggingface.dense",
    "huggingface.factorised",
    "megatron.checkpoint",
    "deepspeed.folder",
    "inrank_reference.checkpoint",
)
"""In the order in which a path is held against them."""


class Format(Protocol):
    """A module of this package that reads a format. ``forward`` and ``write`` are there or not; ``model_of``,
    which reads the settings alone, is there for what the hub has.
    """

    NAME: str

    def matches(self, path: Path) -> bool:
        """Whether ``path`` looks like this format; a quick look that reads no file in full."""

    def open_weights(self, path: Path, options: Options) -> Weights:
        """The weights, each read when it is asked for. Raises UserError if the model is not complete."""

    def forward(self, path: Path, options: Options) -> Forward:
        """Logits by the software that the format is for, where that is other than this project's model."""

    def write(self, weights: Weights, folder: Path, options: Options) -> None:
        """Write into the empty ``folder``; memory stays a small multiple of the largest tensor."""


def formats() -> list[Format]:
    return [import_module(f"{__package__}.{name}") for name in MODULES]


def writable() -> dict[str, Format]:
    """The formats that can be written, by name."""
    return {module.NAME: module for module in formats() if hasattr(module, "write")}


def format_of(path: Path) -> Format:
    """The format of the model at ``path``.

    Raises:
        UserError: nothing is there, a pointer lies in the place of a file, or (``Unsupported``) it is nothing
            that is known.
    """
    with reading(path, "any format"):
        if not path.exists():
            raise UserError(f"{path}: does not exist; name a run, an exported folder or a checkpoint")
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            refuse_pointer(file)
            if file.exists() and not (file.is_file() or file.is_dir()):  # its reader might wait for ever
                raise UserError(f"{file}: is a pipe or device, and a model is in files; name another")
        for module in formats():
            if module.matches(path):
                return module
    names = ", ".join(module.NAME for module in formats())
    raise Unsupported(
        f"{path}: is in none of the formats that can be read ({names}){not_taken(path)}; name one that is"
    )


def read_weights(path: Path, options: Options) -> tuple[Format, Weights]:
    """The format of the model at ``path``, and its weights. Raises UserError for whatever is wrong there,
    also later, when a tensor is read.
    """
    module = format_of(path)
    with reading(path, module.NAME):
        weights = module.open_weights(path, options)

    def read(name: str) -> Tensor:
        with reading(path, module.NAME):
            return weights.read(name).detach()  # DeepSpeed pickles parameters

    return module, replace(weights, read=read)


def forward_of(module: Format, path: Path, options: Options, weights: Weights | None = None) -> Forward:
    """Logits by ``module.forward`` or, where there is none, by this project's model on the ``weights`` of
    ``path``, which are opened if they are not given. Raises UserError for whatever is wrong at ``path``.
    """
    if not hasattr(module, "forward"):
        return gpt_forward(read_weights(path, options)[1] if weights is None else weights)
    with reading(path, module.NAME):
        logits = module.forward(path, options)

    def forward(tokens: Tensor) -> Tensor:
        with reading(path, module.NAME):  # some settings are looked at only now
            return logits(tokens)

    return forward


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """What files make a reader of theirs raise becomes one line: files of other programs can be wrong in more
    ways than a reader can list, and libraries open some of them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read as {kind} ({type(error).__name__}: {reason}); its files are damaged or "
            "those of another program: name a complete model"
        ) from error
