"""Token files in Megatron's ``.bin``/``.idx`` format: written as a stream, read from a memory map."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from inrank_megatron.data.cache import Progress
from inrank_megatron.data.pieces import Piece, count_words
from inrank_megatron.data.tokenizer import Tokenizer
from inrank_megatron.errors import UserError

BATCH_CHARACTERS = 2**20
SCAN_TOKENS = 2**22
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")


class TokenStore:
    """One ``.bin``/``.idx`` pair, with the words of each sequence where ``.words.npy`` lies beside it.

    Raises UserError for a pair whose header, sizes or pointers do not fit together.
    """

    def __init__(self, prefix: Path, *, name: str):
        self.name = name
        _check_pair(prefix, name)
        self._index = IndexedDataset(str(prefix))
        self._item_size = np.dtype(self._index.index.dtype).itemsize
        lengths = self._index.sequence_lengths
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if not np.array_equal(self._index.index.sequence_pointers, self.starts[:-1] * self._item_size):
            raise _damaged(name, "its sequences do not follow each other")
        if beside(prefix, ".bin").stat().st_size != self.starts[-1] * self._item_size:
            raise _damaged(name, f"the .bin file does not hold the {self.starts[-1]} tokens of the index")
        words = beside(prefix, ".words.npy")
        self._words = np.load(words, mmap_mode="r", allow_pickle=False) if words.is_file() else None
        self.num_sequences = len(lengths)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` as int64, copied from the memory map."""
        reader, dtype = self._index.bin_reader, self._index.index.dtype
        return reader.read(dtype=dtype, count=stop - start, offset=start * self._item_size).astype(np.int64)

    def sequences(self, first: int, last: int) -> "TokenFile":
        """The tokens of the sequences ``first`` to ``last`` (excluded)."""
        start, stop = int(self.starts[first]), int(self.starts[last])
        boundaries = np.asarray(self._index.document_indices)
        documents = 0
        if last > first:
            # a document counts where any of its sequences lies, so a text cut in three counts in each part
            before, after = np.searchsorted(boundaries, [first, last - 1], side="right")
            documents = int(after - before) + 1
        words = None if self._words is None else int(self._words[first:last].sum(dtype=np.int64))
        return TokenFile(
            name=self.name,
            segments=((self, start, stop),),
            num_sequences=last - first,
            num_documents=documents,
            num_words=words,
        )

    def largest_id(self) -> int:
        """The largest token id; raises UserError where one is negative. Reads the whole file."""
        largest = -1
        for start in range(0, int(self.starts[-1]), SCAN_TOKENS):
            tokens = self.read(start, min(start + SCAN_TOKENS, int(self.starts[-1])))
            if tokens.min() < 0:
                raise _damaged(self.name, f"it holds the token id {tokens.min()}")
            largest = max(largest, int(tokens.max()))
        return largest


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A stream of tokens: stretches of one or more stores, one after the other.

    ``num_words`` counts as WikiText does (words and newlines); None where a store does not know.
    """

    name: str
    segments: tuple[tuple[TokenStore, int, int], ...]
    num_sequences: int
    num_documents: int
    num_words: int | None

    @property
    def num_tokens(self) -> int:
        return sum(stop - start for _, start, stop in self.segments)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: the tokens from ``start`` on. Raises IndexError beyond the end."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"{self.name}: tokens {start} to {start + length} of {self.num_tokens}")
        parts = [np.empty(0, dtype=np.int64)]
        for store, first, last in self.segments:
            begin, end = max(start, 0), min(start + length, last - first)
            if begin < end:
                parts.append(store.read(first + begin, first + end))
            start -= last - first
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
    words = [file.num_words for file in files]
    return TokenFile(
        name=" + ".join(file.name for file in files),
        segments=tuple(segment for file in files for segment in file.segments),
        num_sequences=sum(file.num_sequences for file in files),
        num_documents=sum(file.num_documents for file in files),
        num_words=None if None in words else sum(words),
    )


def write_tokens(
    prefix: Path, pieces: Iterable[Piece], *, tokenizer: Tokenizer, name: str, progress: Progress
) -> None:
    """Tokenize the pieces into ``prefix`` + ``.bin``, ``.idx`` and ``.words.npy``, a piece a sequence.

    A document ends with the end-of-text token; uint16 is used for vocabularies under 65,500, else int32.
    Raises UserError where there is no piece.
    """
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(beside(prefix, ".bin")), dtype=dtype)
    words: list[int] = []
    done = 0
    for batch in _batches(pieces):
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            builder.add_item(torch.tensor(ids + [tokenizer.eod] * piece.ends, dtype=torch.int32))
            if piece.ends:
                builder.end_document()
            words.append(count_words(piece.text))
            done += len(ids) + piece.ends
        progress(f"tokenizing {name}", done)
    builder.finalize(str(beside(prefix, ".idx")))
    if not words:
        raise UserError(f"{name} holds no text; a corpus needs some: correct the file or the split")
    np.save(beside(prefix, ".words.npy"), np.array(words, dtype=np.int32), allow_pickle=False)


def beside(prefix: Path, suffix: str) -> Path:
    """The prefix with a suffix added; one that the prefix already has stays."""
    return prefix.with_name(prefix.name + suffix)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_pair(prefix: Path, name: str) -> None:
    """Check the header and the sizes before the files are mapped, with messages where Megatron asserts."""
    index, data = beside(prefix, ".idx"), beside(prefix, ".bin")
    for path in (index, data):
        if not path.is_file() or path.stat().st_size == 0:
            raise _damaged(name, f"{path} is missing or empty")
    with open(index, "rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise _damaged(name, f"{index} is no Megatron index")
    _, version, code, sequences, documents = INDEX_HEADER.unpack(header)
    kinds = {kind.value for kind in DType if not kind.name.startswith("float")}
    if version != 1 or code not in kinds:
        raise _damaged(
            name, f"{index} has version {version} and data type {code}, not version 1 and integers"
        )
    if index.stat().st_size != INDEX_HEADER.size + 12 * sequences + 8 * documents or documents == 0:
        raise _damaged(
            name, f"{index} does not have the size of {sequences} sequences in {documents} documents"
        )


def _damaged(name: str, what: str) -> UserError:
    return UserError(
        f"token file {name}: {what}; a .bin/.idx pair must be whole: make it again from its text"
    )
