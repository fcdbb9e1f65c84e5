"""The ids of documents, computed piece by piece in bounded memory.

A tokenizer may put a space before its text, look ahead, merge across white space or count from the beginning
of a run. So each piece is encoded with some of the text before and after it, and the ids of two neighbours
are joined at a place near their border around which both have the same ids. What is left of it the first has
seen with all that decides it, and what is right of it the second:

- BPE: ids are those of a text if each two that follow each other are those of their own text, and the
  neighbours show that of all pairs, the one across the joint included.
- A pre-tokenizer goes from left to right, so after a common boundary it goes on in the same way. What it may
  look at far ahead is white space (as in ``\\s*[\\r\\n]+``), so some other character has to follow.
- Unigram: the best path through a common boundary is made of the best paths on either side.

Where there is no such place, as in a symbol or run longer than what the neighbours share, the two pieces are
encoded as one, and so on up to ``LIMIT`` characters; beyond, ids at the border may be others.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from inrank_megatron.data.pieces import Piece
from inrank_megatron.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**20
CONTEXT = 1024
"""Characters of its neighbours that a piece is encoded with, on either side."""
AGREEMENT = 4
"""Ids that two neighbours have in common on either side of a joint."""
LIMIT = 2**18

Encoded = tuple[Piece, list[int]]


@dataclass(frozen=True)
class _Window:
    """Pieces that are encoded as one, between the text of their document that is left and right of them.

    ``places``: where each id begins and ends in ``text``; empty for a window that nothing is joined to.
    """

    pieces: tuple[Piece, ...]
    left: str
    right: str
    ids: Sequence[int] = ()
    places: Sequence[tuple[int, int]] = ()

    @property
    def text(self) -> str:
        return "".join([self.left, *(piece.text for piece in self.pieces), self.right])

    def index(self, place: int) -> int:
        """The first id that begins at this place of the text or later."""
        return bisect_left(self.places, place, key=itemgetter(0))

    def cut(self, first: int, last: int | None = None) -> Iterator[Encoded]:
        """The pieces with the ids ``first`` to ``last`` (excluded; None: all), shared out by their places."""
        last, end = len(self.ids) if last is None else last, len(self.left)
        for piece in self.pieces[:-1]:
            end += len(piece.text)
            stop = max(first, min(last, self.index(end)))
            yield piece, list(self.ids[first:stop])
            first = stop
        yield self.pieces[-1], list(self.ids[first:last])


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: Tokenizer, *, context: int = CONTEXT, limit: int = LIMIT
) -> Iterator[Encoded]:
    """Each piece with its ids; together they are the ids of each full document.

    Memory: that of 2^20 characters or of the longest piece. Raises UserError for a text that the tokenizer
    cannot encode.
    """
    windows = _windows(pieces, 0 if tokenizer.in_blocks else context)
    encoded = (window for batch in _batches(windows) for window in _encode(batch, tokenizer))
    return _joined(encoded, tokenizer, limit=limit)


def _windows(pieces: Iterable[Piece], context: int) -> Iterator[_Window]:
    pieces = iter(pieces)
    piece, left = next(pieces, None), ""
    while piece is not None:
        following = next(pieces, None)
        right = "" if piece.ends or following is None else following.text[:context]
        yield _Window((piece,), left, right)
        left = "" if piece.ends or not context else (left + piece.text)[-context:]
        piece = following


def _batches(windows: Iterable[_Window]) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    size = 0
    for window in windows:
        batch.append(window)
        size += len(window.pieces[0].text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(windows: list[_Window], tokenizer: Tokenizer) -> Iterator[_Window]:
    """The windows with their ids, in their order."""
    alone = [window for window in windows if not (window.left or window.right)]
    shared = [window for window in windows if window.left or window.right]
    ids = iter(tokenizer.encode_batch([window.text for window in alone]))
    entries = iter(tokenizer.places([window.text for window in shared]))
    for window in windows:
        if window.left or window.right:
            entry = next(entries)
            yield replace(window, ids=entry.ids, places=entry.offsets)
        else:
            yield replace(window, ids=next(ids))


def _joined(windows: Iterator[_Window], tokenizer: Tokenizer, *, limit: int) -> Iterator[Encoded]:
    held, start = None, 0  # a window, and its first id that has not been given away
    for window in windows:
        if held is not None and not (window.left or held.right):
            yield from held.cut(start)
            held = None
        if held is None:
            held, start = window, 0
            continue
        joint = _joint(held, window, start)
        if joint is None and len(held.text) + len(window.text) <= limit:
            place = held.places[start][0] if start else 0
            both = _Window(held.pieces + window.pieces, held.left, window.right)
            [held] = _encode([both], tokenizer)
            start = held.index(place) if start else 0
            continue
        if joint is None:
            border = len(held.text) - len(held.right)
            joint = max(start, held.index(border)), window.index(len(window.left))
        yield from held.cut(start, joint[0])
        held, start = window, joint[1]
    if held is not None:
        yield from held.cut(start)


def _joint(first: _Window, second: _Window, start: int) -> tuple[int, int] | None:
    """The first id after the joint nearest to the border, in both; in the first not before ``start``."""
    border = len(first.text) - len(first.right)
    shift, end = border - len(second.left), len(first.text.rstrip())
    known = {}
    for index, (token, place) in enumerate(zip(second.ids, second.places, strict=True)):
        if place[0] + shift > len(first.text):
            break
        known[token, place[0] + shift, place[1] + shift] = index
    best, twin, run = None, -1, 0
    for index in range(max(start, first.index(shift)), len(first.ids)):
        begins, ends = first.places[index]
        found = known.get((first.ids[index], begins, ends), -1)
        run = run + 1 if found == twin + 1 > 0 else int(found >= 0)
        twin = found
        if run < 2 * AGREEMENT or ends >= end:
            continue
        joint = index + 1 - AGREEMENT
        before, after = first.places[joint - 1], first.places[joint]
        # Ids of one symbol, and those that stand for no symbol, have the same place and stay together.
        if before[0] < after[0] >= before[1]:
            distance = abs(after[0] - border)
            best = (
                min(best, (distance, joint, found + 1 - AGREEMENT))
                if best
                else (distance, joint, found + 1 - AGREEMENT)
            )
    return best and best[1:]
