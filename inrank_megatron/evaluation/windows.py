"""Windows that overlap, so that every scored token has context; and every token is scored once.

Letters: S sequence length, D stride.
"""

import numpy as np

from inrank_megatron.data.token_file import TokenFile
from inrank_megatron.errors import UserError


class SlidingWindows:
    """Windows of S targets that begin every D tokens; each scores the targets that none before it has seen.

    The first window scores all of its targets, every later one its last D, each with S - D tokens of context
    at least. D = S gives the windows of the training loop's evaluation, which do not overlap.

    Raises UserError for a stride outside 1 to S and for fewer than 2 tokens.
    """

    def __init__(self, file: TokenFile, *, seq_length: int, stride: int):
        if not 1 <= stride <= seq_length:
            raise UserError(
                f"stride = {stride}: must lie between 1 and seq_length {seq_length}, or tokens would go "
                "unscored; lower --stride"
            )
        if file.num_tokens < 2:
            raise UserError(
                f"{file.name} has {file.num_tokens} tokens to evaluate on; perplexity needs 2: give more text"
            )
        self.file, self.seq_length, self.stride = file, seq_length, stride

    @property
    def num_targets(self) -> int:
        """The tokens that all windows score together: every token but the first."""
        return self.file.num_tokens - 1

    def __len__(self) -> int:
        return 1 + max(0, -(-(self.num_targets - self.seq_length) // self.stride))

    def window(self, index: int) -> tuple[np.ndarray, int, int]:
        """int64 [S + 1], padded with 0 in the last window, and which of its S targets are scored: from, to.

        Inputs are the first S tokens, targets the last S.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        valid = min(self.seq_length, self.num_targets - start)
        tokens = np.zeros(self.seq_length + 1, dtype=np.int64)
        tokens[: valid + 1] = self.file.tokens(start, valid + 1)
        return tokens, 0 if index == 0 else self.seq_length - self.stride, valid
