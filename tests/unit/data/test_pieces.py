"""Cutting a text must change neither its tokens nor its words."""

import random
from pathlib import Path

import pytest

from inrank_megatron.data.pieces import count_words, cut_blocks, row_pieces
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
def test_blocks_have_the_tokens_of_the_whole(
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


def test_rows_are_documents_and_empty_ones_are_skipped() -> None:
    pieces = list(row_pieces(["first\nrow", "", " \n", "second"]))
    assert [tuple(piece) for piece in pieces] == [("first\nrow", True), ("second", True)]


def test_rows_that_are_lines_make_one_text() -> None:
    pieces = list(row_pieces(["", " = Title = \n", "", " Text . \n"]))
    assert [tuple(piece) for piece in pieces] == [("\n = Title = \n\n Text . \n", True)]
