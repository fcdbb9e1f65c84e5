"""The run's own Megatron-Core model on one process, filled with converted weights."""

from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inrank_megatron.config.loading import replace
from inrank_megatron.interop.core.weights import Weights

Forward = Callable[[Tensor], Tensor]
"""Token ids [B, S] to FP32 logits [B, S, vocab_size]; without gradients, on the CPU unless asked
otherwise.
"""


def gpt_forward(weights: Weights, *, device: torch.device | str = "cpu") -> Forward:
    """Logits of the Megatron-Core model with these weights, in FP32; ids come and logits go on ``device``.

    Joins a process group of this process alone where there is none yet.
    """
    return gpt_logits(load_gpt(weights).to(device), vocab_size=weights.vocab_size)


def gpt_logits(model, *, vocab_size: int) -> Forward:
    """Logits of a model from :func:`load_gpt`, on the device of the tokens, which is the model's."""

    @torch.no_grad()
    def forward(tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, None)[..., :vocab_size].float()

    return forward


def load_gpt(weights: Weights):
    """The bare Megatron-Core model with these weights, FP32, in evaluation mode, on the CPU."""
    # Imported here: Megatron-Core and DeepSpeed take seconds, and most of a conversion needs neither.
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    from inrank_megatron.distributed.process_groups import without_tensor_parallelism
    from inrank_megatron.model.gpt import GPTFactory

    parallel = without_tensor_parallelism(backend="gloo")
    config = replace(
        weights.config, bf16=False, fp16=False, hidden_dropout=0.0, attention_dropout=0.0,
        sequence_parallel=False, tensor_model_parallel_size=1, recompute_granularity=None,
    )  # fmt: skip
    filling: Any = _Filling(weights)  # has of `PretrainedWeights` what a factory asks for
    factory = GPTFactory(
        config,
        parallel,
        vocab_size=weights.vocab_size,
        padded_vocab_size=weights.vocab_size,
        pretrained=filling,
    )
    specs = {
        name: changed(spec, capacity=spec.active_columns, tracked=False)
        for name, spec in weights.factors.items()
    }
    model = factory.build(specs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".U", ".V")):
                parameter.copy_(weights.read(name))
    parallel.seed_random(seed=0, step=0)  # Megatron's modules ask for a random state even without dropout
    return model.eval()


class _Filling:
    """Converted weights as the model's initial ones."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self.folder = Path(weights.origin)

    def account(self, expected: dict) -> None:
        """Readers have compared names and shapes."""

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._weights.read(name).float()
