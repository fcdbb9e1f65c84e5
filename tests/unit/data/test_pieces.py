"""Cutting a text must change neither its tokens nor its words."""

import random
from pathlib import Path

import pytest

from inrank_megatron.data.documents import document_pieces, watched
from inrank_megatron.data.pieces import Piece, count_words, cut_blocks
from inrank_megatron.data.rows import reading, row_pieces
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer

ALPHABET = [
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        " \n",
        "\r\n",
        "\t",
        " \t \n",
        "\n ",
        "\v",
        "\f",
        "\x1c",
        "\x85",
        "\u00a0",
    ),
    *(
        "\u2003",
        "\u2028",
        "\u200b",
        "\u180e",
        "\u3000",
        "\ufeff",
        "a",
        "é",
        "e\u0301",
        "word",
        "中文",
        "7",
        "42",
        "²",
    ),
    *("'s", "'", "don't", "'ll", ".", "...", "<|endoftext|>", "_", "@-@", "🙂", "\u0301", "-"),
]


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(str(shared_data / "gpt2-bpe"))


def tokens(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [token for ids in tokenizer.encode_batch(texts) for token in ids]


def odd_text(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices(ALPHABET, k=rng.randint(1, 120)))


@pytest.mark.parametrize("source", ["gpt2", "trained"])
def test_blocks_have_the_tokens_of_the_full_text(
    source: str, request: pytest.FixtureRequest, tokenizer_folder: Path
) -> None:
    tokenizer = request.getfixturevalue("gpt2") if source == "gpt2" else load_tokenizer(str(tokenizer_folder))
    cuts = 0
    for seed in range(1500):
        text = odd_text(seed)
        blocks = [piece.text for piece in cut_blocks([text], size=1 + seed % 7, limit=10**6)]
        assert "".join(blocks) == text
        assert tokens(tokenizer, blocks) == tokens(tokenizer, [text]), repr(text)
        cuts += len(blocks) - 1
    assert cuts > 5000


def test_words_of_blocks_add_up() -> None:
    for seed in range(500):
        text = odd_text(seed)
        blocks = cut_blocks([text], size=3, limit=10**6)
        assert sum(count_words(piece.text) for piece in blocks) == count_words(text)


def test_cuts_do_not_depend_on_the_chunks() -> None:
    text = "".join(odd_text(seed) for seed in range(200))
    whole = list(cut_blocks([text], size=100, limit=1000))
    rng = random.Random(0)
    for _ in range(5):
        marks = sorted(rng.sample(range(len(text)), 60))
        chunks = [text[a:b] for a, b in zip([0, *marks], [*marks, len(text)], strict=True)]
        assert list(cut_blocks(chunks, size=100, limit=1000)) == whole


def test_only_the_last_piece_ends_the_document() -> None:
    pieces = list(cut_blocks(["one two three\n" * 100], size=50))
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(50 <= len(piece.text) <= 100 for piece in pieces[:-1])
    assert all(piece.text.startswith("\n") for piece in pieces[1:])


def test_text_without_white_space_is_cut_at_the_limit() -> None:
    pieces = list(cut_blocks(["x" * 250], size=10, limit=100))
    assert [len(piece.text) for piece in pieces] == [100, 100, 50]
    assert list(cut_blocks([])) == list(cut_blocks([""])) == []


def rows_of(rows: list[str], separator: str | None = None) -> tuple[list[tuple[str, bool]], list[str]]:
    notes: list[str] = []
    pieces = row_pieces(rows, name="rows", separator=separator, notes=notes)
    return [tuple(piece) for piece in pieces], notes


def test_rows_are_documents_and_empty_ones_are_skipped() -> None:
    assert rows_of(["first\nrow", "", " \n", "second"]) == ([("first\nrow", True), ("second", True)], [])


def test_rows_that_are_lines_make_one_text() -> None:
    pieces, notes = rows_of(["", " = Title = \n", "", " Text . \n"])
    assert pieces == [("\n = Title = \n\n Text . \n", True)]
    assert "joined as one text" in notes[0]
    assert rows_of(["a\n", "\n", "b\n"])[0] == [("a\n\nb\n", True)]
    # A row that Python's text mode gave without its end, as the last one of a file.
    assert rows_of(["a\n", "", *["b\n"] * 300, "c"])[0] == [("a\n\n" + "b\n" * 300 + "c\n", True)]


def test_rows_that_kept_their_line_ends_are_documents() -> None:
    """256 single lines with their line ends once made 258 rows one document."""
    rows = [f"Short note {number}.\n" for number in range(256)] + ["A longer one.\nWith lines.\n"] * 2
    pieces, notes = rows_of(rows)
    assert pieces == [(row, True) for row in rows]
    assert len(notes) == 1
    assert "each row is a document" in notes[0]
    assert rows_of(["One.\n"]) == ([("One.\n", True)], [])


def test_a_row_that_contradicts_the_guess_is_named() -> None:
    pieces, notes = rows_of(["a\n", "", *["b\n"] * 300, "c\nd\n", "e\nf\n"])
    assert len(pieces) == 1
    assert [note.split(", ")[0] for note in notes[1:]] == ["rows: row 303 has several lines"]


@pytest.mark.parametrize(
    ("rows", "mark"),
    [
        (["a", "b\n"], ""),
        (["a\n", "b\n"], " rows"),
        (["a\n", "", "b\n"], ""),
        (["a\n"], ""),
        ([], ""),
    ],
)
def test_a_fingerprint_changes_with_what_the_rows_mean(rows: list[str], mark: str) -> None:
    """Rows that are read as they always were keep their token files; the others get new ones."""
    assert reading(rows, None) == mark
    assert reading(rows, "\n") == mark + " separator '\\n'"


SEPARATED = [
    ("one\n<|endoftext|>\ntwo<|endoftext|>three", ["one\n", "two", "three"]),
    ("<|endoftext|>\r\n\r\none<|endoftext|>", ["\r\none"]),
    ("<|endoftext|><|endoftext|>\n \n<|endoftext|>\n", []),
    ("one<|endoftext|", ["one<|endoftext|"]),
    ("<|<|endoftext|>\n\n|>", ["<|", "\n|>"]),
]


@pytest.mark.parametrize(("text", "documents"), SEPARATED)
def test_a_separator_ends_documents_wherever_the_text_is_cut(text: str, documents: list[str]) -> None:
    for size in range(1, len(text) + 1):
        chunks = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(document_pieces(chunks, "<|endoftext|>")) == [(document, True) for document in documents]


def test_documents_between_separators_are_cut_into_blocks() -> None:
    text = "one two three\n" * 100
    pieces = list(document_pieces([text + "##" + text], "##", size=50))
    assert [piece.text for piece in pieces if piece.ends] == [pieces[-1].text] * 2
    assert "".join(piece.text for piece in pieces) == text * 2


def test_a_separator_splits_rows_too() -> None:
    assert rows_of(["a##b", "c"], "##")[0] == [("a", True), ("b", True), ("c", True)]
    assert rows_of(["a\n", "", "##\n", "b\n"], "##")[0] == [("a\n\n", True), ("b\n", True)]


@pytest.mark.parametrize("marker", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<s>"])
def test_a_marker_that_splits_nothing_is_said_once(marker: str) -> None:
    notes: list[str] = []
    for _ in range(2):
        pieces = [Piece("text", True), Piece(f"more {marker} text", True), Piece(marker, True)]
        assert list(watched(pieces, "a.txt", None, notes)) == pieces
    assert len(notes) == 1
    assert f"--document-separator '{marker}'" in notes[0]
    list(watched(pieces, "a.txt", "##", unsaid := []))
    assert unsaid == []


def test_a_separator_that_splits_nothing_is_said() -> None:
    list(watched([Piece("text", False), Piece(" more", True)], "a.txt", "\\n", notes := []))
    assert notes == ["a.txt: is one document, as the separator '\\\\n' divides it nowhere"]
