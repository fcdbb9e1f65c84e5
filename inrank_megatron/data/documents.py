"""Where documents end inside a text: at a separator that the user names."""

import re
from collections.abc import Iterable, Iterator

from inrank_megatron.data.pieces import BLOCK_CHARACTERS, Piece, cut_blocks

# Ends and starts of documents as other programs write them into their texts.
MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|im_end|>", "</s>", "<s>", "<eos>")


def document_pieces(
    chunks: Iterable[str], separator: str | None, *, size: int = BLOCK_CHARACTERS
) -> Iterator[Piece]:
    """The pieces of a text given in chunks of any size: of one document, or of those between separators.

    The separator, and the line end right after it, belong to no document. Text between two separators
    that holds nothing but white space is none.
    """
    if separator is None:
        yield from cut_blocks(chunks, size=size)
        return
    parts = _parts(chunks, separator)
    for first in parts:
        pieces = cut_blocks(_to_the_end(first, parts), size=size)
        for piece in pieces:
            if not piece.ends or piece.text.strip():
                yield piece
            yield from pieces


def _to_the_end(part: tuple[str, bool], parts: Iterator[tuple[str, bool]]) -> Iterator[str]:
    text, ends = part
    yield text
    while not ends:
        text, ends = next(parts)
        yield text


def _parts(chunks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Stretches of text without the separators, and whether a document ends with each."""
    pattern = re.compile(re.escape(separator) + r"(?:\r?\n)?")
    rest = ""
    for chunk in chunks:
        rest += chunk
        # What follows may belong to a separator, or be the line end after it, that the next chunk completes.
        certain, start = len(rest) - len(separator) - 1, 0
        while (found := pattern.search(rest, start)) and found.start() < certain:
            yield rest[start : found.start()], True
            start = found.end()
        if start < certain:
            yield rest[start:certain], False
            start = certain
        rest = rest[start:]
    start = 0
    for found in pattern.finditer(rest):
        yield rest[start : found.start()], True
        start = found.end()
    yield rest[start:], True


def watched(pieces: Iterable[Piece], name: str, separator: str | None, notes: list[str]) -> Iterator[Piece]:
    """The pieces; ``notes`` gets a remark if a marker of documents occurs in them that splits nothing.

    So it does if the separator that was given splits nothing.
    """
    looking, documents = separator is None, 0
    for piece in pieces:
        documents += piece.ends
        if looking and (marker := _marker(piece.text)):
            looking = False
            note(
                notes,
                f"{name}: holds {marker}, which ends no document here, and is ordinary text unless special "
                f"tokens are parsed; to split there give --document-separator '{marker}'",
            )
        yield piece
    if separator is not None and documents == 1:
        note(notes, f"{name}: is one document, as the separator {separator!r} divides it nowhere")


def note(notes: list[str], remark: str) -> None:
    """Adds the remark unless an earlier reading has left it."""
    if remark not in notes:
        notes.append(remark)


def _marker(text: str) -> str | None:
    return next((marker for marker in MARKERS if marker in text), None) if "<" in text else None
