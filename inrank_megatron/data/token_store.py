"""Megatron's ``.bin``/``.idx`` pairs: checked in full when they are opened, then read with few handles."""

import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from inrank_megatron.data.token_file import TokenFile, pair_file
from inrank_megatron.errors import UserError

SCAN_TOKENS = 2**22
OPEN_FILES = 32
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")


class TokenStore:
    """One ``.bin``/``.idx`` pair, with the words of each sequence where ``.words.npy`` lies next to it.

    It holds the full index; the token files that it gives hold only a reader of the ``.bin``.

    Raises UserError for a pair whose header, sizes or pointers do not fit together, before it reads more
    than there is.
    """

    def __init__(self, prefix: Path, *, name: str):
        self.name = name
        dtype, lengths, pointers, self._boundaries = _read_index(prefix, name)
        self.num_sequences = len(lengths)
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if (lengths < 0).any() or not np.array_equal(pointers, self.starts[:-1] * dtype.itemsize):
            raise damaged(name, "its sequences do not follow each other")
        first, last = self._boundaries[[0, -1]]
        if first < 0 or last != self.num_sequences or (np.diff(self._boundaries) < 0).any():
            raise damaged(name, f"its documents are not ranges of its {self.num_sequences} sequences")
        data = pair_file(prefix, ".bin")
        status = data.stat()
        if status.st_size != self.starts[-1] * dtype.itemsize:
            raise damaged(name, f"the .bin file does not hold the {self.starts[-1]} tokens of the index")
        self._words = _read_words(pair_file(prefix, ".words.npy"), self.num_sequences, name)
        self._reader = TokenReader(name, str(data), status.st_ino, dtype)

    def sequences(self, first: int, last: int) -> TokenFile:
        """The tokens of the sequences ``first`` to ``last`` (excluded)."""
        documents = 0
        if last > first:
            # a document counts where any of its sequences lies, so a text cut in three counts in each part
            before, after = np.searchsorted(self._boundaries, [first, last - 1], side="right")
            documents = int(after - before) + 1
        words = None if self._words is None else int(self._words[first:last].sum(dtype=np.int64))
        return TokenFile(
            name=self.name,
            segments=((self._reader, int(self.starts[first]), int(self.starts[last])),),
            num_sequences=last - first,
            num_documents=documents,
            num_words=words,
        )

    def largest_id(self) -> int:
        """The largest token id; raises UserError where one is negative. Reads the complete file."""
        largest, end = -1, int(self.starts[-1])
        for start in range(0, end, SCAN_TOKENS):
            tokens = self._reader.read(start, min(start + SCAN_TOKENS, end))
            if tokens.min() < 0:
                raise damaged(self.name, f"it holds the token id {tokens.min()}")
            largest = max(largest, int(tokens.max()))
        return largest


@dataclass(frozen=True)
class TokenReader:
    """Reads ranges of a ``.bin`` file.

    A run may have more files than a process may keep open, so the file is opened when it is read, and stays
    open while it is among the last ``OPEN_FILES``: on a network file system every opening costs a round trip.
    """

    name: str
    path: str
    inode: int
    dtype: np.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` as int64."""
        tokens = np.empty(stop - start, dtype=self.dtype)
        space, offset = tokens.data.cast("B"), start * self.dtype.itemsize
        file = _opened(self.path, self.inode, self.name)
        while space:
            count = os.preadv(file.descriptor, [space], offset)
            if count == 0:
                raise damaged(self.name, f"{self.path} has become shorter since it was opened")
            space, offset = space[count:], offset + count
        return tokens.astype(np.int64)


class _Descriptor:
    """Closes with its last user, so that no reader loses it to another."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self, close=os.close):
        close(self.descriptor)


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: str, inode: int, name: str) -> _Descriptor:
    file = _Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    if os.fstat(file.descriptor).st_ino != inode:
        raise damaged(name, f"{path} is another file than the one that was checked")
    return file


def damaged(name: str, what: str) -> UserError:
    return UserError(
        f"token file {name}: {what}; a .bin/.idx pair must be complete: make it again from its text"
    )


def _read_index(prefix: Path, name: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Type of the tokens; lengths (int32) and byte offsets (int64) of the sequences; where documents begin
    and end (int64, in sequences). Nothing is read before its size is known to be there.
    """
    index, data = pair_file(prefix, ".idx"), pair_file(prefix, ".bin")
    for path in (index, data):
        if not path.is_file() or path.stat().st_size == 0:
            raise damaged(name, f"{path} is missing or empty")
    with open(index, "rb") as stream:
        header = stream.read(INDEX_HEADER.size)
        if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
            raise damaged(name, f"{index} is not a Megatron index")
        _, version, code, sequences, documents = INDEX_HEADER.unpack(header)
        kinds = {kind.value for kind in DType if not kind.name.startswith("float")}
        if version != 1 or code not in kinds:
            raise damaged(
                name, f"{index} has version {version} and data type {code}, not version 1 and integers"
            )
        size = os.fstat(stream.fileno()).st_size
        if size != INDEX_HEADER.size + 12 * sequences + 8 * documents or documents == 0:
            raise damaged(
                name, f"{index} does not have the size of {sequences} sequences in {documents} documents"
            )
        return (
            np.dtype(DType.dtype_from_code(code)),
            np.fromfile(stream, dtype="<i4", count=sequences),
            np.fromfile(stream, dtype="<i8", count=sequences),
            np.fromfile(stream, dtype="<i8", count=documents),
        )


def _read_words(path: Path, sequences: int, name: str) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        # mapped first: the header may promise more than there is
        words = np.array(np.lib.format.open_memmap(path, mode="r"))
    except OSError:
        raise
    except Exception:  # what NumPy raises for a damaged header has no narrower type
        words = None
    if words is None or words.dtype.kind not in "iu" or words.shape != (sequences,) or (words < 0).any():
        raise UserError(
            f"token file {name}: {path} does not hold the words of its {sequences} sequences; put the right "
            "one there, or remove it: words are then not counted"
        )
    return words
