"""What a data file is: by its name in every usual spelling and case, checked against its content.

Both must agree. Content that no other format can have (parquet, Arrow, a compression) wins over the name, and
that is said; all else that the name does not promise is refused with both names and the remedy.
"""

import codecs
import json
import re
from dataclasses import dataclass
from pathlib import Path

from inrank_megatron.data.compression import SUFFIXES, UNREAD_SUFFIXES, compression_of, opened, unread
from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

TEXT, LINES, ARRAY, VALUES = "text", "JSON lines", "a JSON array", "JSON objects over several lines"
PARQUET, ARROW_FILE, ARROW_STREAM = "parquet", "an Arrow file", "an Arrow stream"
JSON_FORMATS = (LINES, ARRAY, VALUES)
TEXT_FORMATS = (TEXT, *JSON_FORMATS)
ARROW_FORMATS = (ARROW_STREAM, ARROW_FILE)
HEAD_BYTES = 2**16

# What the suffix promises, a compression's suffix taken off. Other suffixes promise nothing.
FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tokens", ".raw"), (TEXT,)),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), (LINES,)),
    **dict.fromkeys((".json",), JSON_FORMATS),
    **dict.fromkeys((".parquet", ".pq", ".parq"), (PARQUET,)),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), ARROW_FORMATS),
}
_TOKENS = (
    "a bare token file or an array",
    "give the text itself, or both files of a .bin/.idx pair (tools/prepare_data.py makes one of a text)",
)
_ARCHIVE = ("an archive", "unpack it and name the files or their folder")
_TABLE = ("a table in another form than parquet or Arrow", "save it as parquet or JSON lines")
_DOCUMENT = ("a formatted document", "extract its text")
_BINARY = ("a binary file", "give text, JSON lines, JSON, parquet or Arrow")
REFUSED = {
    **dict.fromkeys((".bin", ".idx", ".npy", ".npz", ".pt", ".pth"), _TOKENS),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".csv", ".tsv", ".psv", ".xls", ".xlsx", ".ods", ".orc", ".avro"), _TABLE),
    **dict.fromkeys((".sqlite", ".sqlite3", ".db", ".tfrecord", ".mds", ".msgpack"), _TABLE),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub"), _DOCUMENT),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml"), _DOCUMENT),
    **dict.fromkeys((".safetensors", ".gguf", ".onnx", ".h5", ".hdf5", ".pkl", ".pickle", ".ckpt"), _BINARY),
    ".dvc": ("a DVC pointer", "fetch the file itself with `dvc pull` and name that"),
}
MAGIC = {
    **dict.fromkeys((b"PK\x03\x04", b"PK\x05\x06"), ("a ZIP archive", "unpack it, or extract its text")),
    **dict.fromkeys((b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"), _ARCHIVE),
    b"SQLite format 3\x00": ("an SQLite database", _TABLE[1]),
    b"%PDF-": ("a PDF document", _DOCUMENT[1]),
    b"{\\rtf": ("an RTF document", _DOCUMENT[1]),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office document", _DOCUMENT[1]),
    b"\x93NUMPY": ("a NumPy array", _TOKENS[1]),
    b"\x7fELF": ("a program", _BINARY[1]),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", _BINARY[1]),
    b"GGUF\x03\x00": ("a GGUF model", _BINARY[1]),
    b"FEA1\x00": ("a Feather file of version 1", "save it again as version 2"),
    b"Obj\x01": ("an Avro table", _TABLE[1]),
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), ("a Python pickle", _BINARY[1])),
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff"), ("an image", _BINARY[1])),
}
BYTE_ORDER_MARK = codecs.BOM_UTF8
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",  # begins with the mark of UTF-16LE
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}
_MARKUP = re.compile(rb"\s*<(!doctype html|html|\?xml)[\s>]", re.IGNORECASE)
_ARRAY_START = re.compile(rb'\s*\[\s*\{\s*"')
_OBJECT_START = re.compile(rb'\s*\{\s*("(?:[^"\\]|\\.)*"\s*:|\})')


@dataclass(frozen=True)
class Kind:
    """What a file holds: one of the formats above, its compression if any, and remarks for the user."""

    format: str
    compression: str | None
    notes: tuple[str, ...]


def identify(path: Path) -> Kind:
    """What the file is, from its name and its first 64 KiB.

    Raises UserError for a pointer in place of the file, for what is not read (by name or content), for an
    empty file, and where the content is not what the name promises.
    """
    refuse_pointer(path)
    plain, packed_by_name = _without_compression(path)
    if plain.suffix in REFUSED:
        what, remedy = REFUSED[plain.suffix]
        raise UserError(f"{path}: its name says {what}, which cannot be read; {remedy}")
    compression, head, tail = _ends(path, packed_by_name)
    promised = FORMATS.get(plain.suffix)
    found = _format(path, head, tail, promised)
    notes = []
    if compression != packed_by_name:
        notes.append(f"{path}: unpacked as {compression}, which its content is, whatever its name says")
    if promised is not None and found not in promised:
        if found in TEXT_FORMATS:
            raise _contradiction(path, promised, found)
        notes.append(f"{path}: read as {found}, which its content is, whatever its name says")
    return Kind(found, compression, tuple(notes))


def _without_compression(path: Path) -> tuple[Path, str | None]:
    """The name in lower case without a compression's suffix, and that compression."""
    name = Path(path.name.lower())
    if name.suffix in UNREAD_SUFFIXES:
        raise unread(path, UNREAD_SUFFIXES[name.suffix])
    return (name.with_suffix(""), SUFFIXES[name.suffix]) if name.suffix in SUFFIXES else (name, None)


def _ends(path: Path, packed_by_name: str | None) -> tuple[str | None, bytes, bytes | None]:
    """The compression by content, the first 64 KiB unpacked, and the last 4 bytes (None if compressed)."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
        stream.seek(-min(4, len(head)), 2)
        tail = stream.read()
    compression = compression_of(path, head)
    if packed_by_name == "lzma" and not _is_text(head):
        compression = "lzma"  # begins with its settings
    if packed_by_name and head and compression is None:
        raise UserError(
            f"{path}: cannot be decompressed: its name says {packed_by_name}, its content is not compressed; "
            "give a complete file, or take the suffix off its name"
        )
    if compression:
        with opened(path, compression) as stream:
            head, tail = stream.read(HEAD_BYTES), None
        if inner := compression_of(path, head):
            raise UserError(f"{path}: is {inner} inside {compression}; unpack it once")
    if not head:
        raise UserError(f"data path {path} is empty; a corpus needs text: give a file that has some")
    return compression, head, tail


def _format(path: Path, head: bytes, tail: bytes | None, promised: tuple[str, ...] | None) -> str:
    """The format of the content. Raises UserError for content that is known and not read."""
    # Text may begin with these four letters; a complete parquet file ends with them, and has zeros inside.
    if head.startswith(b"PAR1") and (tail == b"PAR1" or (tail is None and b"\0" in head)):
        return PARQUET
    if head.startswith(b"ARROW1\0\0"):
        return ARROW_FILE
    if head.startswith(b"\xff\xff\xff\xff") and len(head) > 8:
        return ARROW_STREAM
    if refused := _refused_content(head):
        what, remedy = refused
        raise UserError(f"{path}: its content is {what}, which cannot be read; {remedy}")
    if promised and promised[0] not in TEXT_FORMATS and not _is_text(head):
        return promised[0]  # damaged, as its reader says, or a stream of the first versions of Arrow
    if encoding := _other_encoding(head):
        raise UserError(
            f"{path}: is {encoding}; text must be UTF-8: convert it with iconv -f {encoding} -t UTF-8"
        )
    if b"\0" in head:
        raise zero_byte(path, head.index(0))
    return _text_format(head.removeprefix(BYTE_ORDER_MARK), promised or ())


def _refused_content(head: bytes) -> tuple[str, str] | None:
    if _MARKUP.match(head.removeprefix(BYTE_ORDER_MARK)):
        return "HTML or XML", _DOCUMENT[1]
    if head[257:262] == b"ustar":
        return _ARCHIVE
    if head[8:10] == b'{"' and b"\0" in head[:8]:
        return "a safetensors file", _BINARY[1]
    return next((refused for magic, refused in MAGIC.items() if head.startswith(magic)), None)


def _other_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark, or UTF-16 by the zero in nearly every second byte of Latin text."""
    for mark, encoding in OTHER_MARKS.items():
        if head.startswith(mark):
            return encoding
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > 0.4 * len(head) and min(even, odd) < 0.05 * len(head):
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return None


def _text_format(head: bytes, promised: tuple[str, ...]) -> str:
    """Text or a kind of JSON. Where the name promises JSON, its reader says what is wrong with it."""
    if _ARRAY_START.match(head) or (ARRAY in promised and head.lstrip().startswith(b"[")):
        return ARRAY
    if not _OBJECT_START.match(head):
        return TEXT
    if promised == (LINES,):
        return LINES
    complete = -1 if len(head) >= HEAD_BYTES - len(BYTE_ORDER_MARK) else None
    lines = [line for line in head.splitlines()[:complete] if line.strip()]
    if all(map(_is_object, lines)) or (LINES in promised and _is_object(lines[0])):
        return LINES
    return TEXT if _is_object(lines[0]) else VALUES


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _contradiction(path: Path, promised: tuple[str, ...], found: str) -> UserError:
    names = {JSON_FORMATS: "JSON", ARROW_FORMATS: "Arrow"}
    suffix = {LINES: ".jsonl", ARRAY: ".json", VALUES: ".json", TEXT: ".txt"}[found]
    return UserError(
        f"{path}: not readable as {names.get(promised, promised[0])}, which its name says: its content is "
        f"{found}; give the right file, or name it {suffix} to have it read as that"
    )


def zero_byte(path: Path, at: int) -> UserError:
    """The error for a zero byte, which no text has."""
    return UserError(
        f"{path}: is not text, byte {at} is zero; give text, JSON lines, JSON, parquet or Arrow, or if it is "
        "text, take the zeros out with tr -d '\\000'"
    )
