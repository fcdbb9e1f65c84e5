"""Every layout of a tokenizer gives what transformers gives for a whole text, in blocks too."""

import random
from itertools import chain
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from inrank_megatron.data.document_ids import encode_pieces
from inrank_megatron.data.pieces import cut_blocks
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer
from inrank_megatron.errors import UserError
from tests.unit.data.texts import WORDS, prose
from tests.unit.data.tokenizer_layouts import layouts

LAYOUTS = layouts()
ODD = (
    "The quick  brown\nfox\njumps, don't! 1234567?\n\n\n  e\u0301 Größe ﬁ 中文 🙂 <x> </s>\r\n<s> [SEP]"
    "<|end|> <|endoftext|>\n \t\n" + prose(40, seed=1)
)
PARTS = [
    *(
        " ",
        "   ",
        " " * 60,
        "\n",
        "\n\n\n",
        "\n" * 40,
        "\r\n",
        "\t",
        "\u00a0",
        "\u2028",
        "\u3000",
        "fox\njumps",
    ),
    *(
        "é",
        "e\u0301",
        "\u0301" * 5,
        "中文",
        "日本語",
        "7",
        "123456789" * 4,
        "don't",
        "'LL",
        ".",
        "!?\n",
        "." * 30,
    ),
    *("</s>", "<x>", " <x> ", "🙂", "👩‍👩‍👧", "-" * 40, "ABC", "XyZ", "/\n", "a" * 60, "ﬁ", "Ω", "_"),
    *(prose(12, seed=2), *(f" {word}" for word in WORDS), *WORDS),
]


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layout")
    LAYOUTS[request.param](path)
    return path


def of_transformers(folder: Path):
    """What a user of transformers loads there; a bare vocabulary with merges has to be called GPT-2's."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    named = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    return (AutoTokenizer if named else GPT2Tokenizer).from_pretrained(folder)


@pytest.mark.parametrize("parse", [False, True])
def test_a_document_is_what_transformers_makes_of_it(folder: Path, tmp_path: Path, parse: bool) -> None:
    theirs, ours = of_transformers(folder), load_tokenizer(str(folder), parse_special_tokens=parse)
    expected = theirs(ODD, split_special_tokens=not parse)["input_ids"]
    assert theirs.eos_token_id in (None, ours.eod)
    if expected[-1] != ours.eod:
        expected.append(ours.eod)
    assert [*ours.before, *ours.encode(ODD), *ours.after] == expected
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
    ours.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert (again.identity, again.before, again.after) == (ours.identity, ours.before, ours.after)
    assert again.encode(ODD) == ours.encode(ODD)
    assert ours.identity != load_tokenizer(str(folder), parse_special_tokens=not parse).identity


def test_blocks_have_the_ids_of_the_full_text(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    blocks = 0

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(seed=st.integers(0, 2**32), size=st.sampled_from([60, 120]))
    def check(seed: int, size: int) -> None:
        nonlocal blocks
        text = "".join(random.Random(seed).choices(PARTS, k=80))
        pieces = list(cut_blocks([text], size=size, limit=10**6))
        encoded = list(encode_pieces(pieces, tokenizer, context=60))
        assert [piece for piece, _ in encoded] == pieces
        assert list(chain(*(ids for _, ids in encoded))) == tokenizer.encode(text), repr(text)
        blocks += len(pieces)

    check()
    assert blocks > 100


@pytest.mark.parametrize("name", ["tokenizer.json of GPT-2's class", "vocab and merges"])
def test_settings_that_change_nothing_keep_the_identity(tmp_path: Path, name: str) -> None:
    """Token files that were made before the settings were read stay valid."""
    LAYOUTS[name](tmp_path)
    if (tmp_path / "tokenizer.json").is_file():
        plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        expected = Tokenizer(plain, end_of_text="<|endoftext|>").identity
    else:
        expected = load_tokenizer(str(tmp_path)).identity
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert load_tokenizer(str(tmp_path)).identity == expected


def test_a_class_that_is_not_known_is_not_taken_for_gpt2s(tmp_path: Path) -> None:
    LAYOUTS["vocab and merges"](tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "OurTokenizer"}')
    with pytest.raises(UserError, match=r"cannot make a OurTokenizer of its files; give .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))
