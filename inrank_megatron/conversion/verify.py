"""Whether two formats hold the same model: both compute on the same tokens."""

from dataclasses import dataclass

import torch

from inrank_megatron.conversion.gpt import Forward

BATCH, LONGEST = 2, 128
BOUND, RELATIVE = 1e-4, 2e-6
"""Differences of a logit in FP32 that rounding explains: 1e-4, or some 30 units in the last place of the
largest logit where that is more (from 50 on; those of the public GPT-2 exceed 100).
"""


@dataclass(frozen=True)
class Difference:
    """Of two models on the same tokens.

    Args:
        largest: difference of any logit. magnitude: of the largest logit.
        kl: mean Kullback-Leibler divergence of the second's predictions from the first's, nats a token.
    """

    largest: float
    kl: float
    magnitude: float = 0.0

    @property
    def bound(self) -> float:
        """What ``largest`` may be."""
        return max(BOUND, RELATIVE * self.magnitude)

    @property
    def is_rounding(self) -> bool:
        return self.largest <= self.bound  # false for NaN

    def __str__(self) -> str:
        return f"largest logit difference {self.largest:.2e}, KL {self.kl:.2e} nats a token"


def sample_tokens(*, vocab_size: int, positions: int) -> torch.Tensor:
    """Ids [2, up to 128] from the whole vocabulary, the first and the last id among them; always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (BATCH, min(positions, LONGEST)), generator=generator)
    tokens[0, 0], tokens[-1, 0] = 0, vocab_size - 1
    return tokens


def difference(first: Forward, second: Forward, tokens: torch.Tensor) -> Difference:
    """Both on ``tokens``; vocabularies of another size differ by infinity."""
    one, other = first(tokens).double(), second(tokens).double()
    if one.shape != other.shape:
        return Difference(float("inf"), float("inf"))
    log_one, log_other = one.log_softmax(-1), other.log_softmax(-1)
    kl = (log_one.exp() * (log_one - log_other)).sum(-1).mean()
    return Difference((one - other).abs().max().item(), kl.item(), one.abs().max().item())
