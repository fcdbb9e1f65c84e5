"""Sliding windows score every token once, with the context that the stride promises."""

import numpy as np
import pytest

from inrank_megatron.data.batches import EvalWindows
from inrank_megatron.data.token_file import TokenFile
from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.windows import SlidingWindows


class Tokens:
    """The tokens 1, 2, 3, ... in memory."""

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start + 1, stop + 1)


def file_of(tokens: int) -> TokenFile:
    return TokenFile("memory", ((Tokens(), 0, tokens),), num_sequences=1, num_documents=1, num_words=None)


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 11, 16, 17, 31])
@pytest.mark.parametrize("stride", [1, 3, 4, 7, 8])
def test_every_token_but_the_first_is_scored_once(tokens, stride):
    windows = SlidingWindows(file_of(tokens), seq_length=8, stride=stride)
    scored: list[int] = []
    for index in range(len(windows)):
        values, first, last = windows.window(index)
        inputs, targets = values[:-1], values[1:]
        assert np.array_equal(targets[:last], inputs[:last] + 1)
        assert index == 0 or first >= 8 - stride
        scored += list(targets[first:last])
    assert scored == list(range(2, tokens + 1))
    assert windows.num_targets == len(scored)


@pytest.mark.parametrize("tokens", [2, 9, 10, 17, 30])
def test_the_stride_of_a_sequence_gives_the_windows_of_the_training_loop(tokens):
    own = SlidingWindows(file_of(tokens), seq_length=8, stride=8)
    theirs = EvalWindows(file_of(tokens), seq_length=8)
    assert len(own) == len(theirs)
    for index in range(len(own)):
        values, first, last = own.window(index)
        expected, valid = theirs.window(index)
        assert np.array_equal(values, expected) and (first, last) == (0, valid)


@pytest.mark.parametrize(("tokens", "stride", "message"), [
    (9, 9, "stride = 9: must lie between 1 and seq_length 8"),
    (1, 8, "has 1 tokens to evaluate on; perplexity needs 2"),
])  # fmt: skip
def test_bad_stride_is_refused(tokens, stride, message):
    with pytest.raises(UserError, match=message):
        SlidingWindows(file_of(tokens), seq_length=8, stride=stride)
