"""Tokenizers: known ids, training that repeats itself, and faults that would lose text."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from inrank_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from inrank_megatron.errors import UserError
from tests.unit.data.texts import prose

ODD = "Größe 日本 🙂 \x00 <|endoftext|> don't\r\n\n  end "


def test_gpt2(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "gpt2-bpe"))
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
    ids = tokenizer.encode(ODD)
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == ODD


def test_training_repeats_itself_and_survives_saving(tmp_path: Path) -> None:
    first, second = (train_tokenizer([prose(3000, seed=1)], vocab_size=320) for _ in range(2))
    assert first.identity == second.identity
    assert first.vocab_size == 320
    assert first.decode(first.encode(ODD)) == ODD
    assert first.eod not in first.encode(ODD)
    first.save(tmp_path / "whole")
    whole = load_tokenizer(str(tmp_path / "whole"))
    assert (whole.identity, whole.eod, whole.vocab_size) == (first.identity, first.eod, first.vocab_size)
    assert whole.encode_batch([ODD, "fox"]) == [first.encode(ODD), first.encode("fox")]


def test_other_text_or_size_is_another_identity() -> None:
    texts = [prose(3000, seed=1)]
    assert train_tokenizer(texts, vocab_size=320).identity != train_tokenizer(texts, vocab_size=310).identity


def test_short_text_gives_its_true_size() -> None:
    assert train_tokenizer(["ab ab"], vocab_size=5000).vocab_size < 300


def test_padding_and_truncation_of_a_saved_tokenizer_are_off(tokenizer_folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    long, short = tokenizer.encode_batch([prose(100, seed=3), "a"])
    assert len(long) > 100
    assert len(short) == 1


def test_transformers_reads_what_is_saved(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    ours = load_tokenizer(str(tokenizer_folder))
    assert theirs("the quick fox")["input_ids"] == ours.encode("the quick fox")
    assert theirs.eos_token_id == ours.eod


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "neither tokenizer.json nor"),
        ({"tokenizer.json": "{"}, "unreadable"),
        ({"vocab.json": "{}", "merges.txt": "a b\n"}, "unreadable"),
        ({"vocab.json": json.dumps({"a": 0, "<|endoftext|>": 1}), "merges.txt": ""}, "lacks 255 of the 256"),
    ],
)
def test_faulty_folders(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected) as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_faulty_names_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="cannot be had from the hub"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(UserError, match=r"vocab_size = 256: .* at least 257"):
        train_tokenizer(["text"], vocab_size=256)


def test_no_end_of_text(tmp_path: Path) -> None:
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
