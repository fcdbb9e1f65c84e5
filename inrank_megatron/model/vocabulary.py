"""Rows of an embedding beyond the tokens of a tokenizer, with which some models are padded."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from inrank_megatron.checkpoint.slices import Box
from inrank_megatron.errors import UserError

OF_THE_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
MOST_SPARE_ROWS = 1024
"""More are another vocabulary; models are padded by up to 905 rows."""


class Shapes(Protocol):
    """What shapes the tensors of a checkpoint have."""

    @property
    def folder(self) -> Path: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


class FullTensors(Shapes, Protocol):
    """Where full tensors are read; see ``checkpoint/folder.py``."""

    @property
    def names(self) -> frozenset[str]: ...

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]: ...

    def read(self, name: str, box: Box) -> Tensor: ...


def spare_rows(source: Shapes, *, vocab_size: int) -> int:
    """The rows of the embedding of ``source`` beyond ``vocab_size`` tokens.

    Raises:
        UserError: it has fewer rows than there are tokens, or too many more for padding.
    """
    rows = source.shape(OF_THE_VOCABULARY[0])[0]
    if rows < vocab_size:
        raise UserError(
            f"{source.folder}: its embedding has {rows} rows, and the tokenizer {vocab_size} tokens; give "
            f"--tokenizer the one that it was trained with, or resize_token_embeddings({vocab_size}) in "
            "transformers and convert that"
        )
    if rows - vocab_size > MOST_SPARE_ROWS:
        raise UserError(
            f"{source.folder}: its embedding has {rows} rows, and the tokenizer only {vocab_size} tokens; up "
            f"to {MOST_SPARE_ROWS} rows more are padding: give --tokenizer the one that it was trained with"
        )
    return rows - vocab_size


class WithoutSpareRows:
    """The tensors of ``source``; those of the vocabulary end with the row ``vocab_size - 1`` where at most
    ``MOST_SPARE_ROWS`` rows follow it.
    """

    def __init__(self, source: FullTensors, *, vocab_size: int):
        self._source, self._vocab_size = source, vocab_size
        self.folder, self.names = source.folder, source.names

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        spare = shape[0] - self._vocab_size if name in OF_THE_VOCABULARY else 0
        return (self._vocab_size, *shape[1:]) if 0 < spare <= MOST_SPARE_ROWS else shape

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._source.tensors(names):
            yield name, tensor[: self.shape(name)[0]] if name in OF_THE_VOCABULARY else tensor

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(name, box)
