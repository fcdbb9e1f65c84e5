"""Compressed files: which compression the content has, and the content as a stream."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import zstandard

from inrank_megatron.errors import UserError

SUFFIXES = {
    **{".gz": "gzip", ".gzip": "gzip"},
    **{".zst": "zstd", ".zstd": "zstd"},
    **{".bz2": "bzip2", ".xz": "xz", ".lzma": "lzma"},
}
UNREAD_SUFFIXES = {
    **{".lz4": "LZ4", ".br": "Brotli", ".z": "compress (.Z)", ".lz": "lzip"},
    **{".snappy": "Snappy", ".sz": "Snappy", ".lzo": "LZO", ".zz": "zlib"},
}
MAGIC = {
    **{b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"},
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    **{b"BZh%d\x17rE8P\x90" % level: "bzip2" for level in range(1, 10)},  # of nothing
    **{b"\xfd7zXZ\x00": "xz", b"\x5d\x00\x00": "lzma"},
    # A frame that a zstd reader skips; parallel compressors begin with one.
    **{bytes([0x50 + low]) + b"\x2a\x4d\x18": "zstd" for low in range(16)},
}
UNREAD_MAGIC = {
    **{b"\x04\x22\x4d\x18": "LZ4", b"\xff\x06\x00\x00sNaPpY": "Snappy", b"\x1f\x9d": "compress (.Z)"},
    **{b"\x89LZO\x00\r\n\x1a\n": "LZO", b"LZIP\x01": "lzip"},
}
# What `zstd --long=31` needs; some public corpora are packed so.
ZSTD_WINDOW = 2**31
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)


@contextmanager
def opened(path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    """The content of the file as a stream, unpacked. Raises UserError where it turns out to be damaged."""
    openers: dict[str | None, Any] = {
        "gzip": gzip.open,
        "zstd": _open_zstd,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "lzma": lzma.open,
    }
    try:
        with openers.get(compression, open)(path, "rb") as stream:
            yield stream
    except (*DAMAGED, OSError) as error:
        # bz2 raises an OSError without a number; one with a number is the file system's.
        if compression is None or getattr(error, "errno", None) is not None:
            raise
        raise UserError(
            f"{path}: cannot be decompressed ({error}); give a complete {compression} file"
        ) from error


@contextmanager
def opened_for_seeking(path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    """As `opened`; what is compressed is unpacked into a file without a name in the folder for those."""
    with opened(path, compression) as stream:
        if compression is None:
            yield stream
            return
        with _unpacked(path, stream) as unpacked:
            yield unpacked


def _unpacked(path: Path, stream: IO[bytes]) -> IO[bytes]:
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        shutil.copyfileobj(stream, unpacked, 2**20)
        unpacked.seek(0)
    except BaseException as error:
        with suppress(OSError):  # what could not be written cannot be at the close either
            unpacked.close()
        if not isinstance(error, OSError) or error.errno is None:
            raise
        raise UserError(
            f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a "
            "folder with more room, or unpack the file"
        ) from error
    return unpacked


def compression_of(path: Path, head: bytes) -> str | None:
    """The compression that the first bytes show. Raises UserError for one that is not read."""
    for magic, name in UNREAD_MAGIC.items():
        if head.startswith(magic):
            raise unread(path, name)
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def unread(path: Path, compression: str) -> UserError:
    """The error for a compression that is known and not read."""
    return UserError(
        f"{path}: is compressed with {compression}, which is not read; unpack it, or pack it with gzip, "
        "zstd, bzip2 or xz"
    )


class _Zstd(io.RawIOBase):
    """Frames one after the other. zstandard's own reader takes a file that was cut short for a complete
    one.
    """

    PART = 2**10  # bytes read at once: a frame of equal bytes unpacks to 32,768 times its size

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115 - closed with this stream
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._more():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _more(self) -> bool:
        self._packed = self._packed or self._file.read(self.PART)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("it ends inside a frame")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        self._ready, self._packed = memoryview(self._frame.decompress(self._packed)), b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True


def _open_zstd(path: Path, _mode: str) -> IO[bytes]:
    return io.BufferedReader(_Zstd(path), buffer_size=2**17)
