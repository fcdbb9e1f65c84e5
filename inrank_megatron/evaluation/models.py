"""What a user names, a run, an export or a model of the hub, ready to compute with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inrank_megatron.errors import Unsupported, UserError
from inrank_megatron.interop import formats
from inrank_megatron.interop.core.gpt import Forward, gpt_forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.tokenizer_files import has_tokenizer
from inrank_megatron.interop.formats import read_weights, reading
from inrank_megatron.interop.hub import local_notes, located
from inrank_megatron.interop.huggingface.config import CONFIG
from inrank_megatron.interop.huggingface.factorised import in_memory
from inrank_megatron.interop.huggingface.files import SafetensorsFolder
from inrank_megatron.interop.huggingface.model import auto_model, forward_of

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Model:
    """A model that has been found, its weights not yet read.

    Attributes:
        name: as the user gave it. kind: the name of its format. step: that made it; 0 if not known.
        positions: the longest sequence it can see. seq_length: the one that it was trained with.
        tokenizer: folder or hub name, if there is one.
        load: computes logits on a device; ids and logits lie there.
        pretrained: the same model of transformers, FP32, on the CPU.
    """

    name: str
    kind: str
    step: int
    vocab_size: int
    positions: int
    seq_length: int
    tokenizer: str | None
    load: Callable[[torch.device], Forward]
    pretrained: Callable[[], Any]
    notes: tuple[str, ...] = ()


def find_model(name: str, options: Options) -> Model:
    """The model ``name``: a path in a known format, another folder that transformers reads, or a hub name.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = located(name)
    try:
        module, weights = read_weights(path, options)
    except Unsupported:
        if (path / CONFIG).is_file():
            return _transformers_model(name, path)
        raise

    def load(device: torch.device) -> Forward:
        # A format's own software is asked on the CPU only; elsewhere the weights are in the run's model.
        if device.type == "cpu":
            return formats.forward_of(module, path, options, weights)
        return gpt_forward(weights, device=device)

    return Model(
        name=name,
        kind=module.NAME,
        step=weights.step,
        vocab_size=weights.vocab_size,
        positions=weights.config.model.max_position_embeddings,
        seq_length=weights.config.model.seq_length,
        tokenizer=None if weights.tokenizer is None else str(weights.tokenizer),
        load=load,
        pretrained=lambda: in_memory(weights),
        notes=(*local_notes(name), *weights.notes),
    )


def _transformers_model(name: str, path: Path) -> Model:
    """A causal model of transformers that no run can have."""
    from transformers import AutoConfig

    SafetensorsFolder(path)  # refuses pickles, and an index that leads elsewhere
    with reading(path, TRANSFORMERS):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise UserError(
            f"{name}: its {CONFIG} has no max_position_embeddings; name a causal model that has one"
        )
    return Model(
        name=name,
        kind=TRANSFORMERS,
        step=0,
        vocab_size=config.vocab_size,
        positions=positions,
        seq_length=positions,
        tokenizer=str(path) if has_tokenizer(path) else None,
        load=lambda device: forward_of(_loaded(path).to(device)),
        pretrained=lambda: _loaded(path),
        notes=local_notes(name),
    )


def _loaded(path: Path) -> Any:
    with reading(path, TRANSFORMERS):
        return auto_model(path)
