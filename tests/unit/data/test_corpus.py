"""Every format gives the same text; every fault gives one line with the place and the remedy."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from inrank_megatron.data import embedded
from inrank_megatron.data.corpus import open_source
from inrank_megatron.data.hub import load_splits
from inrank_megatron.errors import UserError

DOCUMENTS = ["First document.\nTwo lines.", "Zweites Dokument: Größe, 日本 🙂", "third"]


def write_jsonl(path: Path, rows: list[object], opener: Callable = open) -> Path:
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def read(path: Path, column: str = "text") -> list[str]:
    return [piece.text for piece in open_source(str(path), text_column=column).pieces()]


def fault(path: Path | str, column: str = "text") -> str:
    with pytest.raises(UserError) as raised:
        list(open_source(str(path), text_column=column).pieces())
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_text_files_plain_and_compressed(tmp_path: Path) -> None:
    text = "Größe 日本\r\n and more\n" * 40000  # more than one chunk, with characters across its border
    for name, opener in {"a.txt": open, "b.gz": gzip.open, "c.tokens.xz": lzma.open}.items():
        with opener(tmp_path / name, "wb") as stream:
            stream.write(text.encode())
        assert "".join(read(tmp_path / name)) == text
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read(tmp_path / "bom.txt") == ["abc"]


def test_tables(tmp_path: Path) -> None:
    rows = [{"body": text, "id": number} for number, text in enumerate(DOCUMENTS)]
    assert read(write_jsonl(tmp_path / "a.jsonl", [*rows, {"body": None}]), "body") == DOCUMENTS
    assert read(write_jsonl(tmp_path / "a.json.gz", rows, gzip.open), "body") == DOCUMENTS
    table = write_parquet(tmp_path / "a.parquet", {"id": [0, 1, 2, 3], "body": [*DOCUMENTS, None]})
    assert read(table, "body") == DOCUMENTS


def test_faulty_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "does not exist" in fault(tmp_path / "missing.txt")
    assert "is empty" in fault(tmp_path / "empty.txt")
    assert "--dataset" in fault(tmp_path)


def test_faulty_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"a" * 2**20 + b"caf\xe9 au lait")
    assert f"not UTF-8 at byte {2**20 + 3};" in fault(tmp_path / "latin.txt")
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    assert "not UTF-8" in fault(tmp_path / "cut.txt")
    (tmp_path / "half.xz").write_bytes(lzma.compress(os.urandom(10000))[:5000])
    assert "cannot be decompressed" in fault(tmp_path / "half.xz")
    (tmp_path / "fake.gz").write_bytes(b"no gzip file")
    assert "cannot be decompressed" in fault(tmp_path / "fake.gz")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "cut', "line 2: malformed JSON"),
        (b'["a", "b"]', "line 2: a list, not an object"),
        (b'{"title": "a"}', "line 2: no column 'text' among ['title']"),
        (b'{"text": 3}', "line 2: 'text' is a int"),
        (b'{"text": "caf\xe9"}', "not UTF-8 at line 2"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_faulty_json_lines(tmp_path: Path, line: bytes, expected: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert expected in fault(tmp_path / "a.jsonl")


def test_faulty_parquet(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "a.parquet", {"body": DOCUMENTS, "count": [1, 2, 3]})
    assert "no column 'text' among ['body', 'count']" in fault(table)
    assert "row 1: 'count' is a int" in fault(table, "count")
    (tmp_path / "b.parquet").write_bytes(b"no parquet file")
    assert "not readable as parquet" in fault(tmp_path / "b.parquet")


def test_embedded_corpus_is_large_split_and_without_repetition() -> None:
    documents = embedded.embedded_documents()
    sizes = dict.fromkeys(("train", "valid", "test"), 0)
    for document in documents:
        sizes[embedded.split_of(document)] += len(document)
    total = sum(sizes.values())
    assert total > 1_500_000
    assert 0.8 < sizes["train"] / total < 0.97
    assert min(sizes["valid"], sizes["test"]) > 0.01 * total
    assert len(set(documents)) == len(documents)
    assert any(document.startswith("json\n\nJSON (JavaScript Object Notation)") for document in documents)


def test_embedded_corpus_does_not_depend_on_the_process() -> None:
    program = (
        "import hashlib; from inrank_megatron.data.embedded import embedded_documents, "
        "_sources_digest;print(hashlib.sha256('\\0'.join(embedded_documents()).encode()).hexdigest(), "
        "_sources_digest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_embedded_corpus_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    embedded._source_files.cache_clear()
    try:
        with pytest.raises(UserError, match="no Python sources"):
            embedded._source_files()
    finally:
        embedded._source_files.cache_clear()


def test_dataset_from_folders(tmp_path: Path) -> None:
    import datasets

    for split, texts in {"train": DOCUMENTS, "validation": ["held out"]}.items():
        write_parquet(tmp_path / f"{split}.parquet", {"text": texts})
    saved = tmp_path / "saved"
    splits = load_splits(str(tmp_path), text_column="text")
    datasets.DatasetDict({name: split.rows for name, split in splits.items()}).save_to_disk(saved)
    for folder in (tmp_path, saved):
        splits = load_splits(str(folder), text_column="text")
        assert set(splits) == {"train", "valid"}
        assert [piece.text for piece in splits["train"].pieces()] == DOCUMENTS
        assert [piece.text for piece in splits["valid"].pieces()] == ["held out"]
    with pytest.raises(UserError, match="no column 'body' among"):
        load_splits(str(tmp_path), text_column="body")


def test_dataset_that_cannot_be_had_offline() -> None:
    with pytest.raises(UserError, match=r"dataset nobody/nothing:x cannot be loaded .*local cache") as raised:
        load_splits("nobody/nothing:x", text_column="text")
    assert "\n" not in str(raised.value)
