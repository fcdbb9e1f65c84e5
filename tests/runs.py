"""Run folders with random weights, written without training."""

from collections.abc import Mapping
from dataclasses import replace as changed
from pathlib import Path

import torch

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.run import write
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.lowrank.layers.spec import FactorSpec

SIZES = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 32, "train_iters": 1}


def random_weights(
    *,
    vocab_size: int,
    tokenizer: Path | None,
    ranks: int | None,
    frozen_base: bool = True,
    settings: Mapping[str, object] | None = None,
) -> Weights:
    """A model whose predictions differ clearly from token to token.

    Args:
        ranks: columns of every factorised linear; None: dense.
        frozen_base: a frozen W0 is kept next to the factors.
        settings: of the run, flat, next to ``SIZES`` or in their place.
    """
    config = from_flat(SIZES | dict(settings or {}))
    spec = (
        FactorSpec(capacity=ranks, active_columns=ranks, rank=ranks, frozen_base=frozen_base)
        if ranks
        else None
    )
    factors = {name: spec for name in linear_shapes(config)} if spec else {}
    weights = Weights(
        origin="random", config=config, vocab_size=vocab_size, factors=factors, read=None, tokenizer=tokenizer
    )
    return changed(weights, read=lambda name: _drawn(name, weights.shapes[name]))


def _drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    values = torch.randn(shape, generator=generator)
    return 1 + 0.1 * values if "norm.weight" in name else 0.3 * values if len(shape) > 1 else 0.1 * values


def write_run(folder: Path, weights: Weights) -> Path:
    """The run folder of ``weights``."""
    folder.mkdir(parents=True)
    write(weights, folder, Options())
    return folder
