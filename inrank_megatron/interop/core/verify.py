"""Whether two formats hold the same model: both compute on the same tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inrank_megatron.interop.core.options import TOLERANCE

BATCH, LONGEST = 2, 128


@dataclass(frozen=True)
class Difference:
    """Of two models on the same tokens.

    Args:
        largest: difference of any logit. magnitude: of the largest logit.
        kl: mean Kullback-Leibler divergence of the second's predictions from the first's, nats per token.
        tolerance: what ``largest`` may be.
    """

    largest: float
    kl: float
    magnitude: float = 0.0
    tolerance: float = TOLERANCE

    @property
    def kl_bound(self) -> float:
        """What ``kl`` may be. Logits that differ by at most d move their log-sum-exp by at most d, hence no
        log-probability, and no mean of such differences, by more than 2 d.
        """
        return 2 * self.tolerance

    @property
    def is_rounding(self) -> bool:
        return self.largest <= self.tolerance and self.kl <= self.kl_bound  # false for NaN

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.2e} (at most {self.tolerance:g}), "
            f"KL {self.kl:.2e} nats per token (at most {self.kl_bound:g})"
        )


def sample_tokens(*, vocab_size: int, positions: int) -> torch.Tensor:
    """Ids [2, up to 128] from the whole vocabulary, the first and the last id among them; always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (BATCH, min(positions, LONGEST)), generator=generator)
    tokens[0, 0], tokens[-1, 0] = 0, vocab_size - 1
    return tokens


def difference(first: Tensor, second: Tensor, *, tolerance: float = TOLERANCE) -> Difference:
    """Of both models' logits; vocabularies of another size differ by infinity."""
    one, other = first.double(), second.double()
    if one.shape != other.shape:
        return Difference(float("inf"), float("inf"), tolerance=tolerance)
    log_one, log_other = one.log_softmax(-1), other.log_softmax(-1)
    kl = (log_one.exp() * (log_one - log_other)).sum(-1).mean()
    return Difference((one - other).abs().max().item(), kl.item(), one.abs().max().item(), tolerance)
