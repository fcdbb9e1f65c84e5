"""Text files."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.compression import opened
from inrank_megatron.data.documents import document_pieces, watched
from inrank_megatron.data.kinds import zero_byte
from inrank_megatron.data.pieces import Piece
from inrank_megatron.data.rows import separated
from inrank_megatron.errors import UserError

CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file: one document, or those between the separators, cut into blocks."""

    path: Path
    compression: str | None = None
    separator: str | None = None
    notes: list[str] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self, hashes: FileHashes) -> str:
        packed = self.compression is not None
        return f"text {packed} {hashes.sha256(self.path)}{separated(self.separator)}"

    def pieces(self) -> Iterator[Piece]:
        pieces = document_pieces(decoded(self.path, self.compression), self.separator)
        return watched(pieces, self.name, self.separator, self.notes)


def decoded(path: Path, compression: str | None) -> Iterator[str]:
    """The text of the file in chunks of about 1 MiB, without a byte order mark.

    Raises UserError, with the place in the (unpacked) content, for what is not UTF-8 and for a zero byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with opened(path, compression) as stream:
        while data := stream.read(CHUNK_BYTES):
            if b"\0" in data:
                raise zero_byte(path, offset + data.index(0))
            try:
                yield decoder.decode(data)
            except UnicodeDecodeError as error:
                at = offset - (len(error.object) - len(data)) + error.start
                raise not_utf8(path, f"byte {at}") from error
            offset += len(data)
    try:
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_utf8(path, "its last byte") from error


def not_utf8(path: Path, where: str) -> UserError:
    """The error for bytes that are no UTF-8."""
    return UserError(
        f"{path}: not UTF-8 at {where}; text must be UTF-8: convert it, e.g. with iconv -t UTF-8"
    )
