"""Training batches that depend on the seed and the step alone, and windows that score every token once.

Letters: S sequence length, B rows.
"""

import numpy as np
from megatron.core.datasets.helpers_cpp import build_blending_indices

from inrank_megatron.data.token_file import TokenFile
from inrank_megatron.errors import UserError

CHUNK_TOKENS = 2**22


class TrainBatches:
    """The endless sequence of training samples, S + 1 tokens each, cut into global batches.

    A source of n tokens has (n - 1) // S windows; window i is its tokens i S to (i + 1) S, both included, so
    every token but the first is predicted once an epoch (up to S - 1 at the end never). An epoch is a
    permutation of the windows from (seed, source, epoch), and the epochs follow each other without a gap.
    Sources are blended with Megatron's greedy rule: each sample comes from the source that is furthest behind
    its weight. So sample k is the same for any batch size, number of ranks or steps, and step s has the
    samples from s B on.

    Args:
        sources: token files and weights, as in `PreparedData.train`.
        seq_length: S.
        global_batch_size: samples a step.
        seed: 0 to 2^32 - 1.

    Raises UserError for a source shorter than one sample.
    """

    def __init__(
        self, sources: list[tuple[TokenFile, float]], *, seq_length: int, global_batch_size: int, seed: int
    ):
        for file, _ in sources:
            if file.num_tokens < seq_length + 1:
                raise UserError(
                    f"{file.name} has {file.num_tokens} tokens to train on; a sequence needs seq_length + 1 "
                    f"= {seq_length + 1}: give more text or a shorter --seq-length"
                )
        self.seq_length = seq_length
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._files = [file for file, _ in sources]
        self._weights = np.array([weight for _, weight in sources], dtype=np.float64)
        self._windows = [(file.num_tokens - 1) // seq_length for file in self._files]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._blend = self._blended(0)

    @property
    def samples_per_epoch(self) -> int:
        """The windows of all sources together."""
        return sum(self._windows)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until as many samples have been seen as an epoch has, rounded up."""
        return -(-self.samples_per_epoch // self.global_batch_size)

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start, S + 1]: rows ``start`` to ``stop`` of the batch of the step (from 0)."""
        if step < 0 or not 0 <= start <= stop <= self.global_batch_size:
            raise IndexError(
                f"rows {start} to {stop} of step {step} with {self.global_batch_size} rows a step"
            )
        rows = np.empty((stop - start, self.seq_length + 1), dtype=np.int64)
        for row in range(stop - start):
            source, position = self._locate(step * self.global_batch_size + start + row)
            window = self._window(source, position)
            rows[row] = self._files[source].tokens(window * self.seq_length, self.seq_length + 1)
        return rows

    def _locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample and its number among the samples of that source."""
        if len(self._files) == 1:
            return 0, sample
        if sample >= len(self._blend[0]):
            self._blend = self._blended(2 * sample + self.global_batch_size)
        return int(self._blend[0][sample]), int(self._blend[1][sample])

    def _blended(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Greedy and sequential, so that a longer sequence begins with the shorter one."""
        sources, positions = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        build_blending_indices(sources, positions, self._weights, len(self._files), size, False)
        return sources, positions

    def _window(self, source: int, position: int) -> int:
        epoch, place = divmod(position, self._windows[source])
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            # RandomState, because NumPy promises its stream for good: a resumed run must find the same order
            order = np.random.RandomState([self.seed, source, epoch]).permutation(self._windows[source])
            self._orders[source] = known = (epoch, order)
        return int(known[1][place])


class EvalWindows:
    """Windows of S targets that do not overlap and together predict every token but the first, once.

    Raises UserError for fewer than 2 tokens.
    """

    def __init__(self, file: TokenFile, *, seq_length: int):
        if file.num_tokens < 2:
            raise UserError(
                f"{file.name} has {file.num_tokens} tokens to evaluate on; perplexity needs 2: give more text"
            )
        self.file = file
        self.seq_length = seq_length

    @property
    def num_targets(self) -> int:
        """The tokens that all windows predict together."""
        return self.file.num_tokens - 1

    def __len__(self) -> int:
        return -(-self.num_targets // self.seq_length)

    def window(self, index: int) -> tuple[np.ndarray, int]:
        """int64 [S + 1], padded with 0 in the last window, and the number of targets in it (1 to S).

        Inputs are the first S tokens, targets the last S, of which the first ``valid`` count.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_length
        valid = min(self.seq_length, self.num_targets - start)
        tokens = np.zeros(self.seq_length + 1, dtype=np.int64)
        tokens[: valid + 1] = self.file.tokens(start, valid + 1)
        return tokens, valid


def unigram_perplexity(
    train_sources: list[tuple[TokenFile, float]], eval_file: TokenFile, *, vocab_size: int
) -> float:
    """Perplexity of p(t) = (count(t) + 1) / (N + vocab_size) on the tokens that `EvalWindows` scores.

    The counts are those of all N training tokens, whatever the weights.
    """
    seen = sum((_counts(file, 0, vocab_size) for file, _ in train_sources), np.zeros(vocab_size, np.int64))
    log_p = np.log(seen + 1.0) - np.log(seen.sum() + vocab_size)
    targets = _counts(eval_file, 1, vocab_size)
    return float(np.exp(-(targets @ log_p) / targets.sum()))


def _counts(file: TokenFile, start: int, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for begin in range(start, file.num_tokens, CHUNK_TOKENS):
        tokens = file.tokens(begin, min(CHUNK_TOKENS, file.num_tokens - begin))
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts
