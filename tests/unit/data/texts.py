"""Small texts and token files with known content."""

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "12"),
    *("small", "birds", "watch", "it", "from", "their", "tall", "old", "tree"),
]


def prose(words: int, *, seed: int) -> str:
    """Lines of ten random words."""
    drawn = np.random.RandomState(seed).choice(WORDS, size=words)
    return "".join(" ".join(drawn[start : start + 10]) + ".\n" for start in range(0, words, 10))


def write_pair(prefix: Path, *sequences: list[int] | np.ndarray, dtype: type = np.uint16) -> None:
    """A ``.bin``/``.idx`` pair with one document a sequence."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_item(torch.tensor(np.asarray(sequence), dtype=torch.int32))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
