"""PEFT: a first-phase or LoRA run's W0 as a Hugging Face model, and its U V as a LoRA adapter on it. Read, an
adapter is merged into its base (``reading.py``).

Letters: O, I features of a Hugging Face module, r rank of its adapter. PEFT adds ``alpha / r * B A x`` with A
[r, I] and B [O, r]; with alpha = r that is U V with A = V and B = U.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from inrank_megatron.config.shapes import is_llama, qkv_layout
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import Forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Shapes, Weights, weight_shapes
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface.files import write_file
from inrank_megatron.interop.huggingface.model import auto_model, forward_of, quiet_transformers
from inrank_megatron.interop.huggingface.names import HFModule, hf_modules, hf_shapes, take
from inrank_megatron.interop.peft.reading import (
    BASE,
    CONFIG,
    PREFIX,
    TENSORS,
    A,
    B,
    base_of,
    merged_weights,
    model_of,
)
from inrank_megatron.pointers import refuse_pointer

__all__ = ["model_of"]  # of the format, from another file
NAME = "peft"
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for its largest LoRA rank; other servers take these too."""


@dataclass(frozen=True)
class Adapter:
    """Of one Hugging Face module: r, O and I, and a function that reads A [r, I] and B [O, r], FP32."""

    rank: int
    out: int
    inp: int
    read: Callable[[], tuple[Tensor, Tensor]]


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder with an adapter."""
    return (path / CONFIG).is_file()


def open_weights(path: Path, options: Options) -> Weights:
    """The dense weights of the adapter's base with the adapter merged into them.

    Raises:
        UserError: it is no plain LoRA on linears, its base cannot be had, or is a model that no run can have.
    """
    return merged_weights(path)


def forward(path: Path, options: Options) -> Forward:
    """Logits of PEFT's ``PeftModel`` on the adapter's base."""
    _require_peft()
    from peft import PeftModel

    if not (path / TENSORS).exists():
        raise UserError(f"{path / TENSORS}: is missing; put it back next to {CONFIG}")
    refuse_pointer(path / TENSORS)
    base = base_of(path)
    with quiet_transformers():
        return forward_of(PeftModel.from_pretrained(auto_model(base), path))


def write(weights: Weights, folder: Path, options: Options) -> None:
    """The adapter in ``folder``, its base in ``folder/base``.

    Raises:
        UserError: there is no W0 to be the base, PEFT is not installed, or no server takes so large a rank.
    """
    if not weights.factors or not all(spec.frozen_base for spec in weights.factors.values()):
        held = "no factors" if not weights.factors else "no W0 (the second phase)"
        raise UserError(
            f"{weights.origin}: an adapter is U V on a frozen W0, and this model has {held}; convert it to "
            "hf-dense or hf-factorised, or name a checkpoint of the first phase or of a LoRA run"
        )
    _require_peft()
    adapters = _adapters(weights)
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    if options.pad_ranks:
        ranks = dict.fromkeys(ranks, _served(max(ranks.values())))
    (folder / BASE).mkdir()
    hf_dense.write(changed(weights, factors={}), folder / BASE, options)
    write_file(folder / TENSORS, *_adapter_tensors(adapters, ranks))
    _write_config(folder, ranks, weights)


def _adapter_tensors(
    adapters: dict[str, Adapter], ranks: dict[str, int]
) -> tuple[Shapes, Callable[[str], Tensor]]:
    """Shapes of A and B, filled up to ``ranks``, by PEFT's names, and the tensor of a name."""
    shapes: Shapes = {}
    for name, adapter in adapters.items():
        shapes[f"{PREFIX}{name}{A}"] = (ranks[name], adapter.inp)
        shapes[f"{PREFIX}{name}{B}"] = (adapter.out, ranks[name])
    factors = lru_cache(maxsize=1)(lambda name: adapters[name].read())

    def read(tensor: str) -> Tensor:
        name = tensor.removeprefix(PREFIX).removesuffix(A).removesuffix(B)
        a, b = factors(name)
        extra = ranks[name] - adapters[name].rank
        return F.pad(a, (0, 0, 0, extra)) if tensor.endswith(A) else F.pad(b, (0, extra))

    return shapes, read


def _write_config(folder: Path, ranks: dict[str, int], weights: Weights) -> None:
    from peft import LoraConfig

    largest = max(ranks.values())
    own = {} if set(ranks.values()) == {largest} else ranks
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE,
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(own),
        alpha_pattern=dict(own),
        target_modules=sorted({_target(name) for name in ranks}),
        fan_in_fan_out=not is_llama(weights.config),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def _target(name: str) -> str:
    """The name by which PEFT and servers find a module: its last part, and the one before where that is used
    twice in a block (``c_proj`` of GPT-2).
    """
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "c_proj" else parts[-1]


def _adapters(weights: Weights) -> dict[str, Adapter]:
    """Of every module that is factorised, by its name in the Hugging Face model."""
    shapes = hf_shapes(weights.config, weight_shapes(weights.config, weights.vocab_size, {}))
    adapters = {}
    for module in hf_modules(weights.config).values():
        if module.pieces[0].source in weights.factors:
            shape = shapes[f"{module.name}.weight"]
            out, inp = shape[::-1] if module.transposed else shape
            rank = sum(weights.factors[piece.source].active_columns for piece in module.pieces)
            adapters[module.name] = Adapter(rank, out, inp, lambda module=module: _factors(module, weights))  # type: ignore[misc]
    return adapters


def _factors(module: HFModule, weights: Weights) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r]. Query, key and value with factors of their own in one module are blocks of B."""
    pairs = list(_pairs(module, weights))
    return torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))


def _pairs(module: HFModule, weights: Weights) -> Iterator[tuple[Tensor, Tensor]]:
    layout = qkv_layout(weights.config)
    for piece in module.pieces:
        u, v = (weights.read(f"{piece.source}.{leaf}").float() for leaf in "UV")
        yield v, take(u, piece.rows, layout=layout)


def _served(rank: int) -> int:
    """The smallest rank that servers take and that holds ``rank``."""
    for served in SERVED_RANKS:
        if served >= rank:
            return served
    raise UserError(
        f"--pad-ranks: the largest rank is {rank}, servers take at most {SERVED_RANKS[-1]}; serve the merged "
        "model (hf-dense)"
    )


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError("format peft needs the package peft; pip install 'inrank-megatron[peft]'") from None
