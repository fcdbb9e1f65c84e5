"""Token files of others: damage is found before anything is read on its word, and few stay open."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inrank_megatron.data.token_store import INDEX_HEADER, INDEX_MAGIC, OPEN_FILES, TokenStore
from inrank_megatron.errors import UserError
from tests.unit.data.texts import write_pair

LENGTHS, POINTERS, DOCUMENTS = [3, 1, 2], [0, 6, 8], [0, 2, 3]


def write_index(
    prefix: Path,
    *,
    lengths: list[int] = LENGTHS,
    pointers: list[int] = POINTERS,
    documents: list[int] = DOCUMENTS,
    code: int = 8,
    counts: tuple[int, int] | None = None,
) -> None:
    """An index over six tokens of two bytes in two documents."""
    count = counts or (len(lengths), len(documents))
    content = INDEX_HEADER.pack(INDEX_MAGIC, 1, code, *count)
    content += np.array(lengths, "<i4").tobytes()
    content += np.array(pointers, "<i8").tobytes() + np.array(documents, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    Path(f"{prefix}.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())


def test_tokens_round_trip(tmp_path: Path) -> None:
    write_index(tmp_path / "p")
    file = TokenStore(tmp_path / "p", name="p").sequences(0, 3)
    assert file.tokens(0, 6).tolist() == list(range(6))
    assert (file.num_documents, file.num_words) == (2, None)


INDEX_DAMAGE: dict[str, tuple[dict, str]] = {
    "sequences by the quintillion": ({"counts": (10**18, 3)}, "does not have the size"),
    "documents by the quintillion": ({"counts": (3, 10**18)}, "does not have the size"),
    "a count that wraps around": ({"counts": (2**64 - 1, 3)}, "does not have the size"),
    "negative length": (
        {"lengths": [7, -3, 2], "pointers": [0, 14, 8]},
        "its sequences do not follow each other",
    ),
    "overlap": ({"pointers": [0, 0, 8]}, "its sequences do not follow each other"),
    "documents out of order": ({"documents": [0, 4, 2, 3]}, "its documents are not ranges"),
    "documents beyond the end": ({"documents": [0, 2, 10**15]}, "its documents are not ranges"),
    "documents before the start": ({"documents": [-1, 2, 3]}, "its documents are not ranges"),
    "documents short of the end": ({"documents": [0, 2]}, "its documents are not ranges"),
    "wider tokens": ({"code": 4, "pointers": [0, 12, 16]}, "does not hold the 6 tokens"),
    "unknown type": ({"code": 77}, "data type 77"),
    "fewer tokens": (
        {"lengths": [3, 1], "pointers": [0, 6], "documents": [0, 2]},
        "does not hold the 4 tokens",
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    values, message = INDEX_DAMAGE[damage]
    write_index(tmp_path / "p", **values)
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "p", name="p")


WORDS_DAMAGE: dict[str, Callable[[Path], object]] = {
    "too short": lambda path: np.save(path, np.array([1, 2], dtype=np.int32)),
    "too long": lambda path: np.save(path, np.arange(4)),
    "two dimensions": lambda path: np.save(path, np.ones((3, 1), dtype=np.int32)),
    "floats": lambda path: np.save(path, np.ones(3)),
    "objects": lambda path: np.save(path, np.array([1, 2, {}], dtype=object), allow_pickle=True),
    "negative": lambda path: np.save(path, np.array([1, -1, 1])),
    "empty file": lambda path: path.touch(),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "an archive of arrays": lambda path: np.savez(path.open("wb"), np.ones(3)),
    "a header that promises too much": lambda path: path.write_bytes(
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000000,), }".ljust(117)
        + b"\n"
    ),
    "half a header": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', ("),
}


@pytest.mark.parametrize("damage", WORDS_DAMAGE)
def test_word_counts_that_fit_no_sequence_are_refused(tmp_path: Path, damage: str) -> None:
    write_index(tmp_path / "p")
    WORDS_DAMAGE[damage](tmp_path / "p.words.npy")
    with pytest.raises(UserError, match=r"p\.words\.npy does not hold the words of its 3 sequences; put"):
        TokenStore(tmp_path / "p", name="p")


def test_file_that_shrinks_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    """A memory map ended the process with SIGBUS."""
    write_index(tmp_path / "p")
    file = TokenStore(tmp_path / "p", name="p").sequences(0, 3)
    os.truncate(tmp_path / "p.bin", 5)
    assert file.tokens(0, 2).tolist() == [0, 1]
    with pytest.raises(UserError, match="has become shorter"):
        file.tokens(0, 6)


def test_many_files_share_a_few_descriptors(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = []
    for number in range(3 * OPEN_FILES):
        write_pair(tmp_path / f"p{number}", [number] * 5)
        files.append(TokenStore(tmp_path / f"p{number}", name="p").sequences(0, 1))
    for _ in range(2):
        for number, file in enumerate(files):
            assert file.tokens(1, 3).tolist() == [number] * 3
        assert len(os.listdir("/proc/self/fd")) <= before + OPEN_FILES
    # another file in the same place is another file
    last = len(files) - 1
    for number in (0, last):
        write_pair(tmp_path / "new", [7] * 5)
        os.replace(tmp_path / "new.bin", tmp_path / f"p{number}.bin")
        fresh = TokenStore(tmp_path / f"p{number}", name="p").sequences(0, 1)
        assert fresh.tokens(0, 5).tolist() == [7] * 5
    assert files[last].tokens(0, 5).tolist() == [last] * 5  # still open
    with pytest.raises(UserError, match="is another file than the one that was checked"):
        files[0].tokens(0, 5)
