"""Batches are a function of seed and step; evaluation scores every token once."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from inrank_megatron.data.batches import EvalWindows, TrainBatches, unigram_perplexity
from inrank_megatron.data.token_file import TokenFile, joined
from inrank_megatron.errors import UserError

MakeFile = Callable[..., TokenFile]


def counting(make_file: MakeFile, tokens: int, *, name: str = "tokens", first: int = 0) -> TokenFile:
    """Tokens first, first + 1, ... in uneven sequences, so that a window shows where it is from."""
    ids = np.arange(first, first + tokens)
    return make_file(*np.split(ids, sorted({min(7, tokens - 1), tokens // 3, tokens // 2})), name=name)


def test_an_epoch_has_every_window_once_and_the_next_another_order(make_file: MakeFile) -> None:
    file = counting(make_file, 10 * 20 + 5)
    batches = TrainBatches([(file, 1.0)], seq_length=10, global_batch_size=4, seed=1)
    assert (batches.samples_per_epoch, batches.steps_per_epoch) == (20, 5)
    epochs = [
        np.concatenate([batches.rows(step, 0, 4) for step in range(e * 5, e * 5 + 5)]) for e in range(3)
    ]
    for epoch in epochs:
        assert epoch.dtype == np.int64
        assert sorted(epoch[:, 0]) == list(range(0, 200, 10))
        assert (epoch == epoch[:, :1] + np.arange(11)).all()
    assert len({tuple(epoch[:, 0]) for epoch in epochs}) == 3


def test_rows_depend_on_seed_and_step_alone(make_file: MakeFile) -> None:
    sources = [
        (counting(make_file, 300, name="a"), 0.7),
        (counting(make_file, 150, name="b", first=1000), 0.3),
    ]

    def fresh(batch: int, seed: int = 5) -> TrainBatches:
        return TrainBatches(sources, seq_length=10, global_batch_size=batch, seed=seed)

    whole = fresh(8)
    expected = np.stack([whole.rows(step, 0, 8) for step in range(40)])
    resumed = fresh(8)
    for step in (39, 3, 17):  # any step first, any rank's share
        for start, stop in ((0, 2), (2, 7), (7, 8), (4, 4)):
            np.testing.assert_array_equal(resumed.rows(step, start, stop), expected[step, start:stop])
    smaller = fresh(4)
    halves = [
        np.concatenate([smaller.rows(2 * step, 0, 4), smaller.rows(2 * step + 1, 0, 4)]) for step in range(40)
    ]
    np.testing.assert_array_equal(np.stack(halves), expected)
    assert (fresh(8, seed=6).rows(0, 0, 8) != expected[0]).any()


def test_epochs_may_meet_inside_a_batch(make_file: MakeFile) -> None:
    file = counting(make_file, 71)
    batches = TrainBatches([(file, 1.0)], seq_length=10, global_batch_size=16, seed=0)
    assert (batches.samples_per_epoch, batches.steps_per_epoch) == (7, 1)
    starts = batches.rows(0, 0, 16)[:, 0]
    assert sorted(starts[:7]) == sorted(starts[7:14]) == list(range(0, 70, 10))


def test_order_of_windows_stays_that_of_earlier_versions(make_file: MakeFile) -> None:
    """A resumed run must find the order that it began with, also after an upgrade of NumPy."""
    batches = TrainBatches([(counting(make_file, 81), 1.0)], seq_length=10, global_batch_size=8, seed=1234)
    assert batches.rows(0, 0, 8)[:, 0].tolist() == [0, 20, 50, 30, 40, 70, 60, 10]


def test_blending_follows_the_weights_from_the_first_samples_on(make_file: MakeFile) -> None:
    weights = [0.5, 0.3, 0.2]
    names = "abc"
    files = [counting(make_file, 200, name=names[i], first=1000 * i) for i in range(3)]
    batches = TrainBatches(
        list(zip(files, weights, strict=True)), seq_length=10, global_batch_size=10, seed=0
    )
    origins = np.concatenate([batches.rows(step, 0, 10)[:, 0] // 1000 for step in range(100)])
    for count in (10, 97, 1000):
        drawn = Counter(origins[:count].tolist())
        for source, weight in enumerate(weights):
            assert abs(drawn[source] - weight * count) <= 1.5


def test_source_shorter_than_a_sequence_is_refused(make_file: MakeFile) -> None:
    file = counting(make_file, 20)
    TrainBatches([(file, 1.0)], seq_length=19, global_batch_size=1, seed=0)
    with pytest.raises(
        UserError, match=r"tokens has 20 tokens to train on; .* 21: give more text or a shorter"
    ):
        TrainBatches([(file, 1.0)], seq_length=20, global_batch_size=1, seed=0)


@pytest.mark.parametrize("tokens", [2, 10, 11, 12, 21, 95])
def test_windows_score_every_token_but_the_first_once(make_file: MakeFile, tokens: int) -> None:
    windows = EvalWindows(counting(make_file, tokens), seq_length=10)
    scored = []
    for index in range(len(windows)):
        window, valid = windows.window(index)
        assert window.shape == (11,)
        assert window.dtype == np.int64
        assert (window[valid + 1 :] == 0).all()
        np.testing.assert_array_equal(window[: valid + 1], window[0] + np.arange(valid + 1))
        scored += window[1 : valid + 1].tolist()
    assert scored == list(range(1, tokens))
    assert windows.num_targets == tokens - 1


def test_evaluation_text_of_one_token_is_refused(make_file: MakeFile) -> None:
    with pytest.raises(UserError, match="has 1 tokens to evaluate on"):
        EvalWindows(make_file([3]), seq_length=10)


def test_tokens_are_read_across_sequences_and_files(make_file: MakeFile) -> None:
    file = joined([counting(make_file, 50, name="a"), counting(make_file, 30, name="b", first=50)])
    rng = np.random.RandomState(0)
    for _ in range(200):
        start = rng.randint(81)
        length = rng.randint(81 - start)
        np.testing.assert_array_equal(file.tokens(start, length), np.arange(start, start + length))
    with pytest.raises(IndexError):
        file.tokens(70, 11)
    assert (file.num_tokens, file.num_words) == (80, None)


def test_unigram_perplexity_is_add_one_over_the_train_counts(make_file: MakeFile) -> None:
    train = [(make_file([0, 0, 1], [1, 2], name="a"), 0.9), (make_file([0], name="b"), 0.1)]
    held_out = make_file([3, 0, 1, 3], name="c")
    # counts 3, 2, 1, 0 and add-one over 4 ids: 4/10, 3/10, 2/10, 1/10; the first token is not scored
    expected = (0.4 * 0.3 * 0.1) ** (-1 / 3)
    assert unigram_perplexity(train, held_out, vocab_size=4) == pytest.approx(expected, rel=1e-12)
