"""A model of another program as the start of a new run: its settings, and its weights tensor by tensor."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from inrank_megatron.checkpoint.slices import Box, within
from inrank_megatron.config.folders import named_path
from inrank_megatron.config.loading import flatten, sections
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core import run as run_format
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.formats import format_of, formats, read_weights
from inrank_megatron.interop.hub import is_on_hub, located, readable
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface.kinds import CONFIG
from inrank_megatron.interop.huggingface.snapshot import revision_of
from inrank_megatron.interop.peft import adapters as peft

TAKEN = (hf_dense.NAME, peft.NAME)
ENDS = 2**20
"""Bytes at both ends of a file that are compared between ranks."""


def is_other_program(name: str) -> bool:
    """Whether ``name`` is that of a model of another program, here or on the hub, and not of a run."""
    path = named_path(name)
    if is_on_hub(name) or run_format.matches(path):
        return is_on_hub(name)
    return (path / CONFIG).is_file() or any(module.matches(path) for module in formats())


def start_settings(name: str, revision: str | None) -> dict[str, Any]:
    """The settings that a new run takes from the model ``name``, a folder or a model of the hub, of which no
    weights are read or downloaded yet: those of its architecture, ``tokenizer``, the folder with its
    tokenizer, and ``pretrained_revision``, the hub's commit. Empty for a run folder, and for a path where
    nothing is.

    Raises:
        UserError: it cannot be had, or is of a kind from which no run starts.
    """
    if not is_other_program(name):
        return {}
    folder = located(name, revision=revision, with_weights=False)
    module: Any = _taken(folder)
    config, tokenizer = module.model_of(folder)
    settings = {key: value for key, value in flatten(config).items() if key in _model_settings()}
    settings["pretrained_revision"] = revision_of(folder)
    return settings | ({} if tokenizer is None else {"tokenizer": str(tokenizer)})


def start_weights(name: str, revision: str | None) -> Weights:
    """The dense weights of the model ``name``, each read when it is asked for. Those of the hub are
    downloaded the first time. UserError as above.
    """
    folder = readable(name, revision=revision)
    _taken(folder)
    return read_weights(folder, Options())[1]


class StartTensors:
    """Weights by the interface of a checkpoint, in FP32."""

    def __init__(self, weights: Weights):
        self.folder = Path(weights.origin)
        self._weights, self._shapes = weights, weights.shapes

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._weights.read(name).float()

    def read(self, name: str, box: Box) -> Tensor:
        """The entries in ``box``."""
        return self._weights.read(name).float()[within(box, (0,) * len(self._shapes[name]))]


def fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of the names, sizes and both ends of the files with weights in ``folder``, and in the
    base of an adapter: it tells models apart in no time.
    """
    digest = hashlib.sha256()
    folders = [folder, peft.base_of(folder)] if peft.matches(folder) else [folder]
    for path in [path for each in folders for path in sorted(each.glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def _taken(folder: Path):
    """The format of ``folder``, from which a run starts."""
    module = format_of(folder)
    if module.NAME not in TAKEN:
        raise UserError(
            f"{folder}: is in the format {module.NAME}, and a run starts from a dense run, "
            f"{' or '.join(TAKEN)}; make a run of it with tools/convert_checkpoint.py {folder} TO --format "
            "run and name TO"
        )
    return module


def _model_settings() -> Iterable[str]:
    return sections()["model"].model_fields
