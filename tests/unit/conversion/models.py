"""Small models with random weights, of every structure that a run can have."""

import torch

from inrank_megatron.config import from_flat
from inrank_megatron.conversion.weights import Weights, weight_shapes
from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.shapes import linear_shapes

VOCABULARY = 301
SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "train_iters": 1,
}


def random_weights(*, factors: str | None = None, seed: int = 0, **settings) -> Weights:
    """A GPT-2 (or, by ``settings``, LLaMA) whose factorised linears have ranks 3, 4, 5, ...

    Args:
        factors: None: dense; ``"base"``: W0 beside them (first phase); ``"alone"``: none (second).
    """
    config = from_flat(SIZES | settings)
    names = linear_shapes(config) if factors else ()
    specs = {
        name: FactorSpec(
            columns=rank, active=rank, rank=rank, base=factors == "base", final=factors != "base"
        )
        for rank, name in enumerate(names, start=3)
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 1)
        for name, shape in weight_shapes(config, VOCABULARY, specs).items()
    }
    return Weights("a model of a test", config, VOCABULARY, specs, tensors.__getitem__)
