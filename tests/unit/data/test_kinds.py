"""A file is what its name says in every usual spelling, packed or not, and what its content bears out."""

import bz2
import gzip
import json
import lzma
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from inrank_megatron.data import compression, json_files
from inrank_megatron.data.corpus import Source, open_source
from inrank_megatron.errors import UserError

ROWS = ["First document.\nTwo lines.", "Größe, 日本 🙂", "third"]
PROSE = b"The river runs past the old mill.\nIt turns north again.\n"
LINES = b"".join(json.dumps({"text": text, "id": 1}).encode() + b"\n" for text in ROWS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"


def parquet() -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ROWS}), out := BytesIO())
    return out.getvalue()


def arrow(writer: Callable) -> bytes:
    table = pyarrow.table({"id": [1, 2, 3], "text": ROWS})
    with writer(out := BytesIO(), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return out.getvalue()


def feather() -> bytes:
    pyarrow.feather.write_feather(pyarrow.table({"text": ROWS}), out := BytesIO(), compression="lz4")
    return out.getvalue()


def zstd_frames(data: bytes) -> bytes:
    """Two frames, with one between them that readers skip."""
    half = len(data) // 2
    skipped = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"
    return zstandard.compress(data[:half]) + skipped + zstandard.compress(data[half:])


CONTENTS = {
    "text": PROSE,
    "JSON lines": LINES,
    "a JSON array": json.dumps([{"text": text} for text in ROWS], indent=1).encode(),
    "JSON objects": "\n".join(json.dumps({"text": text}, indent=2) for text in ROWS).encode(),
    "parquet": parquet(),
    "Arrow file": arrow(pyarrow.ipc.new_file),
    "Arrow stream": arrow(pyarrow.ipc.new_stream),
    "Feather": feather(),
}
SPELLINGS = {
    "text": [
        "a.txt",
        "A.TXT",
        "a.text",
        "a.md",
        "wiki.valid.tokens",
        "a.raw",
        "README",
        "a.py",
        "part.00012",
    ],
    "JSON lines": ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.jl", "a.json", "part-00000"],
    "a JSON array": ["a.json", "A.Json", "blob"],
    "JSON objects": ["a.json", "blob"],
    "parquet": ["a.parquet", "a.PARQUET", "a.pq", "a.parq", "blob"],
    "Arrow file": ["a.arrow", "a.ipc", "a.Feather", "blob"],
    "Arrow stream": ["a.arrow", "blob"],
    "Feather": ["a.feather"],
}
PACKERS = {
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstd_frames,
    ".bz2": lambda data: bz2.compress(data[:40]) + bz2.compress(data[40:]),
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
}


def opened(path: Path, content: bytes) -> Source:
    path.write_bytes(content)
    return open_source(str(path), text_column="text")


def texts(source: Source) -> list[str]:
    return [piece.text for piece in source.pieces()]


def fault(path: Path, content: bytes) -> str:
    with pytest.raises(UserError) as raised:
        texts(opened(path, content))
    message = str(raised.value)
    assert "\n" not in message
    assert path.name in message
    return message


def expected(kind: str) -> list[str]:
    return [PROSE.decode()] if kind == "text" else ROWS


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SPELLINGS for name in SPELLINGS[kind]])
def test_every_spelling_of_a_format_is_read(tmp_path: Path, kind: str, name: str) -> None:
    source = opened(tmp_path / name, CONTENTS[kind])
    assert texts(source) == expected(kind)
    assert source.notes == []


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_format_is_read_under_every_compression(tmp_path: Path, kind: str, suffix: str) -> None:
    packed = PACKERS[suffix](CONTENTS[kind])
    source = opened(tmp_path / (SPELLINGS[kind][0] + suffix), packed)
    assert texts(source) == expected(kind)
    assert source.notes == []
    unnamed = opened(tmp_path / SPELLINGS[kind][0], packed)
    assert texts(unnamed) == expected(kind)
    assert "whatever its name says" in unnamed.notes[0]


def test_packed_files_with_unusual_beginnings_are_read(tmp_path: Path) -> None:
    settings = [{"id": lzma.FILTER_LZMA1, "lc": 4, "lp": 0, "pb": 2}]
    packed = lzma.compress(PROSE, format=lzma.FORMAT_ALONE, filters=settings)
    assert texts(opened(tmp_path / "a.txt.lzma", packed)) == [PROSE.decode()]
    assert "is empty" in fault(tmp_path / "a.txt.bz2", bz2.compress(b""))


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_that_was_cut_short_is_damaged(tmp_path: Path, suffix: str) -> None:
    """zstandard's own reader takes the part that is there for all."""
    packed = PACKERS[suffix](np.random.RandomState(0).bytes(3000).hex().encode())
    assert "cannot be decompressed" in fault(tmp_path / f"a.txt{suffix}", packed[:-40])


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression.tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b"))  # noqa: SIM115
    message = fault(tmp_path / "a.parquet.gz", gzip.compress(CONTENTS["parquet"]))
    assert "No space left on device" in message
    assert "TMPDIR" in message


def test_what_no_other_format_can_be_is_read_as_that(tmp_path: Path) -> None:
    for kind in ("parquet", "Arrow file", "Arrow stream"):
        for name in ("a.txt", "a.jsonl", "a.json"):
            source = opened(tmp_path / name, CONTENTS[kind])
            assert texts(source) == ROWS
            assert "whatever its name says" in source.notes[0]
    source = opened(tmp_path / "a.jsonl.gz", zstandard.compress(LINES))
    assert (texts(source), len(source.notes)) == (ROWS, 1)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("a.txt", "JSON lines", ("text", "JSON lines", "name it .jsonl")),
        ("a.md", "a JSON array", ("text", "a JSON array", "name it .json ")),
        ("a.txt", "JSON objects", ("text", "JSON objects", "name it .json ")),
        ("a.jsonl", "text", ("JSON lines", "text", "name it .txt")),
        ("a.ndjson", "a JSON array", ("JSON lines", "a JSON array", "name it .json ")),
        ("a.json", "text", ("JSON", "text", "name it .txt")),
        ("a.parquet", "text", ("not readable as parquet", "text", "name it .txt")),
        ("a.PQ", "JSON lines", ("not readable as parquet", "JSON lines")),
        ("a.arrow", "text", ("not readable as Arrow", "text")),
    ],
)
def test_a_name_that_the_content_contradicts_is_refused(
    tmp_path: Path, name: str, kind: str, words: tuple[str, ...]
) -> None:
    """A file of JSON lines named .ndjson was once read as prose, braces and all."""
    message = fault(tmp_path / name, CONTENTS[kind])
    assert all(word in message for word in words)
    assert fault(tmp_path / f"{name}.gz", gzip.compress(CONTENTS[kind]))


def archive(kind: str) -> bytes:
    out = BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as stream:
            stream.writestr("a.txt", PROSE)
    else:
        with tarfile.open(fileobj=out, mode="w") as stream:
            stream.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


def array() -> bytes:
    np.save(out := BytesIO(), np.arange(100, dtype=np.uint16))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive("zip"), "a ZIP archive"),
        (archive("tar"), "an archive"),
        (gzip.compress(archive("tar")), "an archive"),
        (gzip.compress(gzip.compress(PROSE)), "gzip inside gzip"),
        (b"SQLite format 3\0" + bytes(84), "an SQLite database"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
        (b"  <!DOCTYPE html>\n<html><body>text</body></html>", "HTML"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><doc>text</doc>", "XML"),
        (Path(sys.executable).resolve().read_bytes()[:200], "a program"),
        (struct.pack("<Q", 70) + b'{"w":{"dtype":"F32"}}', "a safetensors file"),
        (pickle.dumps({"a": 1}), "a Python pickle"),
        (array(), "a NumPy array"),
        (np.arange(2000, dtype=np.uint16).tobytes(), "byte 0 is zero"),
        (PROSE + b"\0" + PROSE, f"byte {len(PROSE)} is zero"),
        (PROSE.decode().encode("utf-16"), "iconv -f UTF-16LE -t UTF-8"),
        (PROSE.decode().encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        (PROSE.decode().encode("utf-32"), "iconv -f UTF-32LE -t UTF-8"),
        (b"\x04\x22\x4d\x18" + bytes(20), "compressed with LZ4"),
        (b"\x1f\x9d\x90" + bytes(20), "compressed with compress (.Z)"),
        (POINTER, "Git LFS pointer"),
        (b"/annex/objects/SHA256E-s12--0a1b.txt\n", "git-annex pointer"),
        (gzip.compress(b""), "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # gzip's has the time in it
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "blob"])
def test_content_that_is_not_text_is_refused_by_its_name(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    assert words in fault(tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.bin", ".bin/.idx pair"),
        ("train.idx", ".bin/.idx pair"),
        ("train.NPY", ".bin/.idx pair"),
        ("train.pt", ".bin/.idx pair"),
        ("a.zip", "unpack it"),
        ("a.tar.gz", "unpack it"),
        ("a.tgz", "unpack it"),
        ("a.csv", "parquet or JSON lines"),
        ("a.tsv.gz", "parquet or JSON lines"),
        ("a.pdf", "extract its text"),
        ("a.html", "extract its text"),
        ("model.safetensors", "a binary file"),
        ("a.txt.dvc", "dvc pull"),
        ("a.txt.lz4", "LZ4"),
        ("a.jsonl.br", "Brotli"),
        ("a.txt.Z", "compress"),
        ("a.txt.snappy", "Snappy"),
        ("a.txt.lzo", "LZO"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    assert words in fault(tmp_path / name, PROSE)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "a.bin", "a.txt.gz"])
def test_a_pointer_of_any_format_is_named_as_one(tmp_path: Path, name: str) -> None:
    assert "Git LFS pointer" in fault(tmp_path / name, POINTER)


def test_a_zero_or_a_bad_byte_far_inside_is_found(tmp_path: Path) -> None:
    long = PROSE * (2**21 // len(PROSE))
    assert f"byte {len(long)} is zero" in fault(tmp_path / "a.txt", long + b"\0")
    assert f"not UTF-8 at byte {len(long)}" in fault(tmp_path / "a.txt", long + b"\xe9t\xe9")


def test_text_that_only_looks_like_another_format_is_text(tmp_path: Path) -> None:
    for start in (
        "PAR1 is a magic number.",
        "[1] a footnote",
        "[ ] a task",
        "{curly} braces",
        '{"a": 1}\nprose',
    ):
        assert texts(opened(tmp_path / "a.txt", f"{start}\nMore text.\n".encode())) == [
            f"{start}\nMore text.\n"
        ]


def test_link_whose_file_was_not_fetched_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(".git/annex/objects/x/a.txt")
    with pytest.raises(UserError, match="git annex get"):
        open_source(str(tmp_path / "a.txt"), text_column="text")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"\n\n \n"])
def test_json_lines_take_any_line_end_and_mark(tmp_path: Path, end: bytes, mark: bytes) -> None:
    assert texts(opened(tmp_path / "a.jsonl", mark + LINES.replace(b"\n", end))) == ROWS
    assert texts(opened(tmp_path / "b.jsonl", mark + LINES.replace(b"\n", end).rstrip())) == ROWS
    array = json.dumps([{"text": text} for text in ROWS], indent=1).encode()
    assert texts(opened(tmp_path / "a.json", mark + array.replace(b"\n", end))) == ROWS


DEEP = b"[" * 100_000 + b"]" * 100_000
ODD_ROWS = [
    (b'{"text": "a", "id": 1' + b"0" * 5000 + b"}", "a"),
    (b'{"text": "a", "id": NaN}', "a"),
    (b'{"text": "b", "text": "a"}', "a"),
    (b'{"text": "a\\u0000b"}', "a\0b"),
    (b'{"text": "\\ud83d\\ude42"}', "🙂"),
    (b'{"text": "a", "id": ' + DEEP + b"}", "nested too deeply"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b'{"text": NaN}', "is a float"),
    (b'{"text": ["a"]}', "is a list"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "half a surrogate pair"),
    (b'{"text": "a', "malformed JSON"),
    (b'{"text": "a"} x', "malformed JSON"),
    (b'"text"', "a str, not an object"),
    (b"12", "a int, not an object"),
    (b'{"body": "a"}', "no column 'text' among ['body']"),
    (b"{'text': 'a'}", "malformed JSON"),
    (b'{"text": "a\tb\x01"}', "malformed JSON"),
]


@pytest.mark.parametrize(("row", "outcome"), ODD_ROWS, ids=range(len(ODD_ROWS)))
@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_odd_rows_of_json_are_read_right_or_refused_with_their_place(
    tmp_path: Path, row: bytes, outcome: str, array: bool
) -> None:
    """The right text, or one line with the place. An array gives what lines give."""
    first = b'{"text": "first"}'
    content = b"[" + first + b",\n" + row + b"]" if array else first + b"\n" + row + b"\n"
    source = opened(tmp_path / ("a.json" if array else "a.jsonl"), content)
    try:
        assert texts(source) == ["first", outcome]
    except UserError as error:
        assert "\n" not in str(error)
        if array and b"\xed" in row:  # whose text is decoded before it is read as JSON
            outcome = "not UTF-8"
        assert re.search(r"object 2: |at character \d\d |at byte \d\d;" if array else "line 2", str(error))
        assert outcome in str(error)


@pytest.mark.parametrize(
    "content",
    [b"[", b'[{"text": "a"}', b'[{"text": "a"},]', b'[{"text": "a"}] x', b'[{"text": "a"} {"text": "b"}]'],
)
def test_incomplete_json_arrays_are_refused(tmp_path: Path, content: bytes) -> None:
    assert "malformed JSON at character" in fault(tmp_path / "a.json", content)


def test_an_array_is_read_in_parts_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects, escapes and white space lie across the borders of what is read at once."""
    content = json.dumps([{"text": text, "more": [1.5, {"a": None}]} for text in ROWS], indent=20)

    def chunks(size: int) -> Callable:
        return lambda *_: (content[start : start + size] for start in range(0, len(content), size))

    for size in (1, 2, 7, 50, 1000):
        monkeypatch.setattr(json_files, "decoded", chunks(size))
        assert texts(opened(tmp_path / "a.json", b"[{}]")) == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"text": "%s"}\n'), ("a.json", b'[{"text": "%s"}]'), ("a.json", b'{\n"text": "%s"}')],
)
def test_row_larger_than_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setattr(json_files, "LONGEST_ROW", 2**20)
    assert texts(opened(tmp_path / name, content % (b"a" * 2**19)))
    assert "a row must fit in memory" in fault(tmp_path / name, content % (b"a" * 2**23))


def test_an_array_takes_the_memory_of_a_row(tmp_path: Path) -> None:
    import tracemalloc

    row = json.dumps({"text": "x" * 10_000}).encode()
    source = opened(tmp_path / "a.json.gz", gzip.compress(b"[" + b",".join([row] * 2000) + b"]"))
    tracemalloc.start()
    assert sum(1 for _ in source.pieces()) == 2000
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20  # of 20 MB
    tracemalloc.stop()
