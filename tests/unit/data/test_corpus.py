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
import pyarrow.compute as compute
import pyarrow.parquet
import pytest

from inrank_megatron.data import embedded
from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.corpus import open_source
from inrank_megatron.errors import UserError

DOCUMENTS = ["First document.\nTwo lines.", "Zweites Dokument: Größe, 日本 🙂", "third"]


def write_jsonl(path: Path, rows: list[object], opener: Callable = open) -> Path:
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def write_table(path: Path, table: pyarrow.Table) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)


def read(path: Path, column: str = "text") -> list[str]:
    return [piece.text for piece in open_source(str(path), text_column=column).pieces()]


def fault(path: Path | str, column: str = "text") -> str:
    with pytest.raises(UserError) as raised:
        list(open_source(str(path), text_column=column).pieces())
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_plain_and_compressed_text_files_are_read_exactly(tmp_path: Path) -> None:
    text = "Größe 日本\r\n and more\n" * 40000  # more than one chunk, with characters across its border
    for name, opener in {"a.txt": open, "b.gz": gzip.open, "c.tokens.xz": lzma.open}.items():
        with opener(tmp_path / name, "wb") as stream:
            stream.write(text.encode())
        assert "".join(read(tmp_path / name)) == text
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read(tmp_path / "bom.txt") == ["abc"]


def test_json_and_parquet_rows_are_read(tmp_path: Path) -> None:
    rows = [{"body": text, "id": number} for number, text in enumerate(DOCUMENTS)]
    assert read(write_jsonl(tmp_path / "a.jsonl", [*rows, {"body": None}]), "body") == DOCUMENTS
    assert read(write_jsonl(tmp_path / "a.json.gz", rows, gzip.open), "body") == DOCUMENTS
    table = write_parquet(tmp_path / "a.parquet", {"id": [0, 1, 2, 3], "body": [*DOCUMENTS, None]})
    assert read(table, "body") == DOCUMENTS


def test_faulty_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "does not exist" in fault(tmp_path / "missing.txt")
    assert "is empty" in fault(tmp_path / "empty.txt")
    assert "--dataset" in fault(tmp_path)
    (tmp_path / "half.bin").touch()
    assert "half.bin; a pair needs both" in fault(tmp_path / "half")


def test_faulty_text_is_refused_with_its_place(tmp_path: Path) -> None:
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
def test_faulty_json_lines_are_refused(tmp_path: Path, line: bytes, expected: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert expected in fault(tmp_path / "a.jsonl")


def test_faulty_parquet_is_refused(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "a.parquet", {"body": DOCUMENTS, "count": [1, 2, 3]})
    assert "no column 'text' among ['body', 'count']" in fault(table)
    assert "row 1: 'count' is a int" in fault(table, "count")
    (tmp_path / "b.parquet").write_bytes(b"no parquet file")
    assert "not readable as parquet" in fault(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_every_type_of_text_column_is_read(tmp_path: Path, form: str, kind: pyarrow.DataType) -> None:
    """Text stored as binary was once answered with the advice to name another column."""
    table = pyarrow.table({"text": pyarrow.array([*DOCUMENTS, None]).cast(kind)})
    write_table(path := tmp_path / f"a.{form}", table)
    source = open_source(str(path), text_column="text")
    assert [piece.text for piece in source.pieces()] == DOCUMENTS
    assert len(source.notes) == ("binary" in str(kind))


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()], ids=str)
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_strings_that_are_not_utf8_are_named_by_row(
    tmp_path: Path, form: str, kind: pyarrow.DataType
) -> None:
    """Arrow and parquet take any bytes for a string; to read them once gave a traceback."""
    column = pyarrow.array([b"fine"] * 1500 + [b"caf\xe9 is good"] * 2)
    if kind != pyarrow.binary():
        column = compute.cast(column, options=compute.CastOptions(target_type=kind, allow_invalid_utf8=True))
    write_table(path := tmp_path / f"a.{form}", pyarrow.table({"text": column}))
    assert f"a.{form}, row 1501: 'text' is not UTF-8 at its byte 3;" in fault(path)


def test_columns_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    column = pyarrow.array([{"a": ["x"]}])
    write_table(
        path := tmp_path / "a.parquet", pyarrow.table({"text": column, "list": pyarrow.array([["x"]])})
    )
    assert "row 1: 'text' is a dict, not a string, the column's type struct<a: list<" in fault(path)
    assert "row 1: 'list' is a list, not a string, the column's type list<" in fault(path, "list")
    assert "a field inside a column is not read" in fault(path, "text.a")
    twice = pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"])
    write_table(path := tmp_path / "b.arrow", twice)
    assert "has 2 columns 'text'" in fault(path)


def test_damaged_tables_are_refused_in_one_line(tmp_path: Path) -> None:
    """Arrow reports a damaged page by an OSError, which is not one of the file system."""
    table = pyarrow.table({"text": [text * 50 for text in DOCUMENTS] * 200})
    for name in ("a.parquet", "a.arrow"):
        write_table(path := tmp_path / name, table)
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:100] + os.urandom(400) + whole[500:]):
            path.write_bytes(content)
            try:
                assert len(read(path)) <= 600
            except UserError as error:
                assert "\n" not in str(error)


def test_files_that_were_always_read_keep_their_fingerprints(tmp_path: Path) -> None:
    """Token files of earlier versions are found under these."""
    rows = [{"text": text} for text in DOCUMENTS]
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text"))
    write_jsonl(tmp_path / "c.jsonl", rows)
    write_jsonl(tmp_path / "d.json.gz", rows, gzip.open)
    write_parquet(tmp_path / "e.parquet", {"text": ["", " = Title = \n", "", " Text . \n"]})
    hashes = FileHashes(tmp_path / "hashes")
    for name, described in {
        "a.txt": "text False",
        "b.txt.gz": "text True",
        "c.jsonl": "jsonl False text",
        "d.json.gz": "jsonl True text",
        "e.parquet": "parquet text",
    }.items():
        source = open_source(str(tmp_path / name), text_column="text")
        assert source.fingerprint(hashes) == f"{described} {hashes.sha256(tmp_path / name)}"
        divided = open_source(str(tmp_path / name), text_column="text", document_separator="##")
        assert divided.fingerprint(hashes) == f"{source.fingerprint(hashes)} separator '##'"


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


def test_embedded_corpus_without_python_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    embedded._source_files.cache_clear()
    try:
        with pytest.raises(UserError, match="no Python sources"):
            embedded._source_files()
    finally:
        embedded._source_files.cache_clear()
