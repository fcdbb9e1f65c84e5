"""What a user names, a run, an export or a model of the hub, ready to compute with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inrank_megatron.conversion.formats import format_of
from inrank_megatron.conversion.gpt import Forward, gpt_forward
from inrank_megatron.conversion.options import Options
from inrank_megatron.conversion.weights import Weights
from inrank_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB = "hub model"


@dataclass(frozen=True)
class Model:
    """A model that has been found, its weights not yet read.

    Attributes:
        name: as the user gave it. kind: the name of its format. step: that made it; 0 where nobody knows.
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
    pretrained: Callable[[], "PreTrainedModel"]
    notes: tuple[str, ...] = ()


def find_model(name: str, options: Options) -> Model:
    """The model ``name``: a path in a known format, another folder that transformers reads, or a hub name.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists() and _may_be_hub_name(name):
        return _transformers_model(name)
    try:
        module = format_of(path)
    except UserError:
        if (path / "config.json").is_file():
            return _transformers_model(str(path))
        raise
    weights = module.open_weights(path, options)

    def load(device: torch.device) -> Forward:
        # A format's own software is asked on the CPU only; elsewhere the weights are in the run's model.
        return module.forward(path, options) if device.type == "cpu" else gpt_forward(weights, device=device)

    return Model(
        name=name,
        kind=module.NAME,
        step=weights.step,
        vocab_size=weights.vocab_size,
        positions=weights.config.model.max_position_embeddings,
        seq_length=weights.config.model.seq_length,
        tokenizer=None if weights.tokenizer is None else str(weights.tokenizer),
        load=load,
        pretrained=lambda: _in_memory(weights),
        notes=weights.notes,
    )


def _may_be_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and not name.endswith("/")


def _transformers_model(name: str) -> Model:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise UserError(
            f"{name}: its config.json names no max_position_embeddings; name a causal model that has"
        )
    return Model(
        name=name,
        kind=HUB,
        step=0,
        vocab_size=config.vocab_size,
        positions=positions,
        seq_length=positions,
        tokenizer=name,
        load=lambda device: _transformers_forward(_pretrained(name).to(device)),
        pretrained=lambda: _pretrained(name),
    )


def _pretrained(name: str) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None


def _in_memory(weights: Weights) -> "PreTrainedModel":
    from inrank_megatron.conversion.hf_factorised import in_memory

    return in_memory(weights)


def _transformers_forward(model: "PreTrainedModel") -> Forward:
    return lambda tokens: model(tokens, use_cache=False).logits.float()


def _unreadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{name}: no folder here in a known format, and transformers cannot load it ({reason}); name a run, "
        "an exported folder, or a model of the hub that can be reached"
    )
