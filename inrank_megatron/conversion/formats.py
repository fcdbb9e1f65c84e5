"""The formats of a model's weights: a module each, with the functions that :class:`Format` lists.

A new format is one such module and one line here. Modules import what is heavy inside their functions.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol

from inrank_megatron.conversion.gpt import Forward
from inrank_megatron.conversion.options import Options
from inrank_megatron.conversion.weights import Weights
from inrank_megatron.errors import UserError

MODULES = ("run", "peft", "hf_dense", "hf_factorised", "megatron", "deepspeed_folder", "reference")
"""In the order in which a path is held against them."""


class Format(Protocol):
    """A module of this package that reads a format and, if it has ``write``, writes it."""

    NAME: str

    def matches(self, path: Path) -> bool:
        """Whether ``path`` looks like this format; a quick look, nothing is read whole."""

    def open_weights(self, path: Path, options: Options) -> Weights:
        """The weights, each read when it is asked for. Raises UserError for what is no whole model."""

    def forward(self, path: Path, options: Options) -> Forward:
        """Logits by the software that the format is for, where there is one that runs here."""

    def write(self, weights: Weights, folder: Path, options: Options) -> None:
        """Write into the empty ``folder``; memory stays a small multiple of the largest tensor."""


def formats() -> list[Format]:
    return [import_module(f"{__package__}.{name}") for name in MODULES]


def writable() -> dict[str, Format]:
    """The formats that can be written, by name."""
    return {module.NAME: module for module in formats() if hasattr(module, "write")}


def format_of(path: Path) -> Format:
    """The format of what lies at ``path``.

    Raises:
        UserError: nothing is there, or nothing that is known.
    """
    if not path.exists():
        raise UserError(f"{path}: there is nothing; name a run, an exported folder or a checkpoint")
    for module in formats():
        if module.matches(path):
            return module
    names = ", ".join(module.NAME for module in formats())
    raise UserError(f"{path}: is in no format that is known here ({names}); name one that is")
