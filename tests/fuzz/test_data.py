"""Texts of every format, token files and tokenizers."""

import gzip
import itertools
import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.cache import quiet
from inrank_megatron.data.pieces import Piece
from inrank_megatron.data.prepare import prepare
from inrank_megatron.data.token_file import write_tokens
from inrank_megatron.data.token_store import TokenStore
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer
from inrank_megatron.errors import UserError
from tests.fuzz.bounds import outcome
from tests.fuzz.mutate import DEEPER, JSON, damages
from tests.fuzz.readers import Reader, attack, intact
from tests.unit.interop.models import make_tokenizer

ROWS = [f"Row {n}: the quick brown fox jumps over the lazy dog. Ümläute {n * n}." for n in range(40)]
BOMB = 2**28
"""Bytes of nothing that a kilobyte of a compressed file stands for."""


def tokenizer(root: Path) -> Path:
    make_tokenizer().save(root / "tokenizer")
    return root / "tokenizer"


def texts(name: str, content: bytes):
    """What writes a file of texts, with a tokenizer next to it so that none is trained."""

    def make(root: Path) -> Path:
        (root / "texts").mkdir()
        (root / "texts" / name).write_bytes(content)
        return root / "texts"

    return make


def table(root: Path) -> Path:
    (root / "texts").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), root / "texts" / "rows.parquet")
    return root / "texts"


_NUMBER = itertools.count()


def read_texts(path: Path) -> Any:
    """The tokens of the files are in the vocabulary, and their decoded text is there."""
    [file] = sorted(p for p in path.iterdir() if not p.name.startswith("stray"))[:1] or [path / "none"]
    cache = path.parent / f"cache-{next(_NUMBER)}"
    folder = _tokenizer_folder(path)
    data = DataConfig(data_path=[str(file)], tokenizer=str(folder), data_cache_path=str(cache))
    prepared = prepare(data)
    for source, _ in prepared.train:
        tokens = source.tokens(0, source.num_tokens)
        assert tokens.min() >= 0 and tokens.max() < prepared.tokenizer.vocab_size
    return prepared


def _tokenizer_folder(path: Path) -> Path:
    """One for all inputs of a test, next to them."""
    root = next(parent for parent in path.parents if re.match("(test_|fuzz-)", parent.name))
    if not (folder := root / "tokenizer-of-all").exists():
        make_tokenizer().save(folder)
    return folder


def tokens(root: Path) -> Path:
    (root / "tokens").mkdir()
    pieces = [Piece(row, index % 2 == 1) for index, row in enumerate(ROWS)]
    write_tokens(root / "tokens" / "x", pieces, tokenizer=make_tokenizer(), name="x", progress=quiet)
    return root / "tokens"


def read_tokens(path: Path) -> TokenStore:
    """Every sequence is there, and every count can be made."""
    store = TokenStore(path / "x", name="x")
    store.largest_id()
    file = store.sequences(0, store.num_sequences)
    assert len(file.tokens(0, file.num_tokens)) == file.num_tokens
    half = store.sequences(0, store.num_sequences // 2).counts()
    assert all(value is None or value >= 0 for value in [*half.values(), *file.counts().values()])
    if file.num_words is not None:
        assert np.load(path / "x.words.npy").shape == (store.num_sequences,)
    return store


def numbers(path: Path, change: tuple[int, int]) -> None:
    """Set one number in the header, lengths, pointers or documents of an index, or in a table of NumPy."""
    where, value = change
    if path.suffix == ".idx":
        data = bytearray(path.read_bytes())
        fields = [(9, 8), (17, 1), (18, 8), (26, 8), *((at, 4) for at in range(34, len(data) - 8, 4))]
        at, width = fields[where % len(fields)]
        data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        path.write_bytes(data)
    elif path.suffix == ".npy":
        words = (
            np.zeros(0),
            np.zeros(3),
            np.array(7),
            np.zeros((99, 99)),
            np.full(40, -5),
            np.full(40, np.nan),
        )
        np.save(path, words[value % len(words)])


def read_tokenizer(path: Path) -> Tokenizer:
    """It turns text into ids of its vocabulary."""
    loaded = load_tokenizer(str(path))
    ids = loaded.encode("The quick brown fox, naïve 🦊.\n" * 3)
    assert all(0 <= index < loaded.vocab_size for index in [*ids, loaded.eod])
    loaded.decode(ids)
    loaded.byte_lengths()
    return loaded


PROSE = "\n".join(ROWS).encode()
LINES = b"\n".join(json.dumps({"text": row}).encode() for row in ROWS) + b"\n"
ARRAY = json.dumps([{"text": row} for row in ROWS]).encode()

DEEPER["numbers"] = numbers
HUGE = (0, 1, 2, 255, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 10**18)
NUMBERS = ("numbers", st.tuples(st.integers(0, 999), st.sampled_from(HUGE)))
READERS = (
    Reader("prose", texts("a.txt", PROSE), read_texts, damages(), 15),
    Reader("packed prose", texts("a.txt.gz", gzip.compress(PROSE, mtime=0)), read_texts, damages(), 15),
    Reader("JSON lines", texts("a.jsonl", LINES), read_texts, damages(JSON), 24),
    Reader("packed JSON lines", texts("a.jsonl.xz", lzma.compress(LINES)), read_texts, damages(), 15),
    Reader("JSON array", texts("a.json", ARRAY), read_texts, damages(JSON), 24),
    Reader("parquet", table, read_texts, damages(), 36),
    Reader("token files", tokens, read_tokens, damages(NUMBERS, NUMBERS), 72),
    Reader("tokenizer", tokenizer, read_tokenizer, damages(JSON, JSON), 48),
)


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_damaged_data_are_read_or_refused(reader, tmp_path):
    tally = attack(reader, intact(reader, tmp_path / "made"), tmp_path / "scratch", examples=reader.examples)
    assert tally.refused


def test_a_packed_line_without_end_is_not_held(tmp_path):
    """A megabyte that unpacks to one line of 256 MiB, which was held twice."""
    (folder := tmp_path / "texts").mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(bytes(BOMB), 1))
    assert isinstance(outcome(lambda: read_texts(folder)), UserError)
