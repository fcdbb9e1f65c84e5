"""The total loss against a loop that scores token after token, on one rank and on several."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from inrank_megatron.data.token_file import TokenFile
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.perplexity import Score, total_loss
from inrank_megatron.evaluation.windows import SlidingWindows
from tests.harness import run_ranks

SEQUENCE, TOKENS, VOCABULARY = 16, 150, 31


class Tokens:
    def __init__(self):
        self.values = np.random.default_rng(5).integers(0, VOCABULARY, TOKENS)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


def forward(tokens: torch.Tensor) -> torch.Tensor:
    """Predictions that depend on the whole context: a running sum picks the favourite."""
    mean = tokens.double().cumsum(-1) / torch.arange(1, tokens.shape[1] + 1)
    places = torch.arange(VOCABULARY)
    return (-0.02 * (mean[..., None] - places).abs() * (1 + tokens[..., None] % 3)).float()


def windows(stride: int) -> SlidingWindows:
    file = TokenFile("memory", ((Tokens(), 0, TOKENS),), num_sequences=1, num_documents=1, num_words=None)
    return SlidingWindows(file, seq_length=SEQUENCE, stride=stride)


def everyone() -> Parallel:
    return Parallel(tp_group=None, dp_group=dist.group.WORLD)


def totals(rank: int, world_size: int) -> list[float]:
    device = torch.device("cpu")
    return [
        total_loss(forward, windows(stride), rows=rows, parallel=everyone(), device=device)
        for stride in (16, 5)
        for rows in (1, 4)
    ]


def token_by_token(stride: int) -> float:
    """Each target with all of its window before it: the whole text at first, later from the stride on."""
    values, total = torch.from_numpy(Tokens().values), 0.0
    for target in range(1, TOKENS):
        start = max(0, math.ceil((target - SEQUENCE) / stride)) * stride
        logits = forward(values[None, start:target])[0, -1].double()
        total -= logits.log_softmax(-1)[values[target]].item()
    return total


@pytest.fixture(scope="module")
def alone() -> list[float]:
    return run_ranks(totals, 1)[0]


def test_the_sum_is_that_of_single_tokens(alone):
    for total, stride in zip(alone, (16, 16, 5, 5), strict=True):
        assert total == pytest.approx(token_by_token(stride), rel=1e-6)
    assert alone[0] != pytest.approx(alone[2], rel=1e-4), "context must matter"


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_gives_the_same_bits(alone, world_size):
    assert run_ranks(totals, world_size) == [alone] * world_size


def nothing(rank: int, world_size: int) -> str:
    def broken(tokens: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens.shape, VOCABULARY), math.nan)

    with pytest.raises(UserError) as raised:
        total_loss(broken, windows(16), rows=4, parallel=everyone(), device=torch.device("cpu"))
    return str(raised.value)


def test_predictions_that_are_no_numbers_are_refused():
    assert "the loss on memory is nan" in run_ranks(nothing, 1)[0]


def test_derived_numbers():
    score = Score(nats=math.log(2) * 60, tokens=20, words=10, bytes=40)
    assert score.perplexity == pytest.approx(8) and score.word_perplexity == pytest.approx(64)
    assert score.bits_per_byte == pytest.approx(1.5)
    unknown = Score(nats=1e6, tokens=1, words=None, bytes=None)
    assert (unknown.perplexity, unknown.word_perplexity, unknown.bits_per_byte) == (math.inf, None, None)


def too_much(rank: int, world_size: int) -> str:
    """On the last rank alone."""

    def large(tokens: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**50) if rank == world_size - 1 else forward(tokens)

    with pytest.raises(UserError) as raised:
        total_loss(large, windows(16), rows=4, parallel=everyone(), device=torch.device("cpu"))
    return str(raised.value)


def test_memory_that_runs_out_on_one_rank_ends_all():
    first, last = run_ranks(too_much, 2)
    assert first == last
    assert "out of memory: 4,194,304.00 GiB more was asked for, " in first
    assert first.endswith(
        "; give --micro-batch-size 2 (half of what a pass takes), --seq-length 8 (half, with less context)"
    )
