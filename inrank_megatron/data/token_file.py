"""Streams of tokens, and how they are written in Megatron's ``.bin``/``.idx`` format."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from inrank_megatron.data.cache import Progress
from inrank_megatron.data.document_ids import encode_pieces
from inrank_megatron.data.pieces import Piece, count_words
from inrank_megatron.data.tokenizer import Tokenizer
from inrank_megatron.errors import UserError

NAMES = 3
PROGRESS_TOKENS = 2**18


class Reader(Protocol):
    """Where the tokens of a range are."""

    def read(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A stream of tokens: ranges ``(reader, start, stop)`` of one or more files, one after the other.

    ``num_words`` counts as WikiText does (words and newlines); None where a file does not know.
    """

    name: str
    segments: tuple[tuple[Reader, int, int], ...]
    num_sequences: int
    num_documents: int
    num_words: int | None

    @property
    def num_tokens(self) -> int:
        return int(self._bounds[-1])

    @cached_property
    def _bounds(self) -> np.ndarray:
        """int64 [segments + 1]: where each begins in the stream, and the end."""
        return np.cumsum([0] + [stop - start for _, start, stop in self.segments], dtype=np.int64)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: the tokens from ``start`` on. Raises IndexError beyond the end."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"{self.name}: tokens {start} to {start + length} of {self.num_tokens}")
        parts = [np.empty(0, dtype=np.int64)]
        index = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while length > 0:
            reader, first, last = self.segments[index]
            begin = first + start - int(self._bounds[index])
            end = min(begin + length, last)
            if begin < end:
                parts.append(reader.read(begin, end))
            start, length, index = start + end - begin, length - (end - begin), index + 1
        return np.concatenate(parts)

    def counts(self) -> dict[str, int | None]:
        """Tokens, sequences, documents and words, for the record of a run."""
        return {
            "tokens": self.num_tokens,
            "sequences": self.num_sequences,
            "documents": self.num_documents,
            "words": self.num_words,
        }


def joined(files: list[TokenFile]) -> TokenFile | None:
    """The files one after the other; None where they hold no token."""
    files = [file for file in files if file.num_tokens]
    if not files:
        return None
    words = [file.num_words for file in files if file.num_words is not None]
    return TokenFile(
        name=several([file.name for file in files]),
        segments=_merged([segment for file in files for segment in file.segments]),
        num_sequences=sum(file.num_sequences for file in files),
        num_documents=sum(file.num_documents for file in files),
        num_words=sum(words) if len(words) == len(files) else None,
    )


def several(names: list[str]) -> str:
    """What to call them together, in a few words."""
    return " + ".join(names if len(names) <= NAMES else [*names[:1], f"{len(names) - 1} more"])


def _merged(segments: list[tuple[Reader, int, int]]) -> tuple[tuple[Reader, int, int], ...]:
    """Stretches that follow each other in one file as one, so that a read across them is one read."""
    merged: list[tuple[Reader, int, int]] = []
    for reader, start, stop in segments:
        if merged and merged[-1][0] is reader and merged[-1][2] == start:
            start = merged.pop()[1]
        merged.append((reader, start, stop))
    return tuple(merged)


def write_tokens(
    prefix: Path, pieces: Iterable[Piece], *, tokenizer: Tokenizer, name: str, progress: Progress
) -> None:
    """Tokenize the pieces into ``prefix`` + ``.bin``, ``.idx`` and ``.words.npy``, a piece a sequence.

    A document begins and ends with what the tokenizer puts there, with the end-of-text token at least; its
    ids are those of its full text. uint16 is used for vocabularies under 65,500, else int32. Raises
    UserError where there is no piece.
    """
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(pair_file(prefix, ".bin")), dtype=dtype)
    words: list[int] = []
    done = shown = 0
    begins = True
    for piece, ids in encode_pieces(pieces, tokenizer):
        ids = tokenizer.before * begins + ids + tokenizer.after * piece.ends
        builder.add_item(torch.tensor(ids, dtype=torch.int32))
        if piece.ends:
            builder.end_document()
        begins = piece.ends
        words.append(count_words(piece.text))
        done += len(ids)
        if done - shown >= PROGRESS_TOKENS:
            progress(f"tokenizing {name}", done)
            shown = done
    progress(f"tokenizing {name}", done)
    builder.finalize(str(pair_file(prefix, ".idx")))
    if not words:
        raise UserError(f"{name} holds no text; a corpus needs some: correct the file or the split")
    np.save(pair_file(prefix, ".words.npy"), np.array(words, dtype=np.int32), allow_pickle=False)


def pair_file(prefix: Path, suffix: str) -> Path:
    """The prefix with a suffix added; one that the prefix already has stays."""
    return prefix.with_name(prefix.name + suffix)
