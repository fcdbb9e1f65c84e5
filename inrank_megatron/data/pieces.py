"""Documents as a stream of pieces that, tokenized one by one, give the tokens of the full documents.

GPT-2 splits text with ``'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+``
before it applies BPE. No alternative goes on from a character that is not white space to one that is, so
there is always a boundary between the two; what is left of it ends in non-space, so no look-ahead there
can see the cut; what is right of it is matched from the boundary on, without looking back. A text cut
before white space that follows non-space therefore has exactly the tokens of the uncut text, and its
words are the words of its blocks.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

BLOCK_CHARACTERS = 16 * 1024
LONGEST_PIECE = 2**20

# Python's \S excludes everything that any regex engine takes for white space, and more.
_BEFORE_LINE_END = re.compile(r"(?<=\S)(?=[ \t\r]*\n)")
_BEFORE_SPACE = re.compile(r"(?<=\S)(?=[ \t\r\n])")


class Piece(NamedTuple):
    """A part of one document; ``ends`` says that the document ends with it."""

    text: str
    ends: bool


def cut_blocks(
    chunks: Iterable[str], *, size: int = BLOCK_CHARACTERS, limit: int = LONGEST_PIECE
) -> Iterator[Piece]:
    """Cut one document, given in chunks of any size, into pieces of ``size`` to ``2 * size`` characters.

    A cut is made at the end of a line where there is one, else at any white space. Only a run of more than
    ``limit`` (at least ``2 * size``) characters without white space is cut inside, which may change tokens.
    The cuts do not depend on the sizes of the chunks. A document without text has no pieces.
    """
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk, 0
        while (cut := _next_cut(text, start, size=size, limit=limit)) is not None:
            yield Piece(text[start:cut], False)
            start = cut
    if start < len(text):
        yield Piece(text[start:], True)


def _next_cut(text: str, start: int, *, size: int, limit: int) -> int | None:
    if len(text) - start < 2 * size:
        return None
    for pattern, stop in ((_BEFORE_LINE_END, start + 2 * size), (_BEFORE_SPACE, start + limit)):
        found = pattern.search(text, start + size, stop)
        if found:
            return found.start()
    return start + limit if len(text) - start > limit else None


def count_words(text: str) -> int:
    """Words as WikiText counts them: separated by white space, and each newline is one more."""
    return len(text.split()) + text.count("\n")
