"""Tokenizers: known ids, training that repeats itself, and faults that would lose text."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from inrank_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from inrank_megatron.errors import UserError
from tests.unit.data.texts import prose
from tests.unit.data.tokenizer_layouts import layouts

ODD = "Größe 日本 🙂 \x00 <|endoftext|> don't\r\n\n  end "


def test_gpt2_ids_are_the_published_ones(shared_data: Path) -> None:
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
def test_faulty_tokenizer_folders_are_refused_in_one_line(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected) as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_missing_tokenizers_and_too_small_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="cannot be loaded from the hub"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(UserError, match=r"vocab_size = 256: .* at least 257"):
        train_tokenizer(["text"], vocab_size=256)


def test_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_unbroken_text_is_trained_on_in_bounds() -> None:
    """Merges of 400,000 equal letters took over a minute and gave a token of 100,000 characters."""
    text = "a" * 400_000
    tokenizer = train_tokenizer([text, prose(100, seed=1)], vocab_size=400)
    lengths = tokenizer.byte_lengths()
    assert 32 < lengths.max() <= 128
    assert tokenizer.decode(tokenizer.encode(text)) == text


def with_bos(folder: Path) -> Path:
    """A tokenizer of which older runs left out what it adds, in the files that they wrote."""
    layouts()["Llama 3"](folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def test_a_run_that_was_trained_without_bos_goes_on_without(tmp_path: Path) -> None:
    stored = load_tokenizer(str(with_bos(tmp_path)))
    assert (stored.before, stored.after, stored.in_blocks) == ([], [stored.eod], True)
    assert stored.notes == ()
    stored.save(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).identity == stored.identity
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    from_elsewhere = load_tokenizer(str(tmp_path))
    assert from_elsewhere.decode(from_elsewhere.before) == "<s>" and not from_elsewhere.in_blocks
    assert from_elsewhere.identity != stored.identity
    assert from_elsewhere.notes == (
        f"tokenizer {tmp_path}: each document begins with <s> and ends with </s>, as the tokenizer adds them",
    )


def test_special_tokens_in_a_text_are_text_unless_parsed(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = "one <|endoftext|> two"
    plain, parsing = (load_tokenizer(str(tokenizer_folder), parse_special_tokens=on) for on in (False, True))
    assert plain.eod not in plain.encode(text)
    assert parsing.encode(text).count(parsing.eod) == 1
    parsing.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode(text) == parsing.encode(text)


def test_a_local_folder_with_a_hub_s_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(UserError, match=r"neither .* local folder .*, not the hub's repository"):
        load_tokenizer("gpt2")
    layouts()["vocab and merges"](tmp_path / "gpt2")
    assert f"the local folder {tmp_path / 'gpt2'}, not the hub's" in load_tokenizer("gpt2").notes[0]
    assert load_tokenizer("./gpt2").notes == ()


def fifo(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def changed(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """What changes the parts in a ``tokenizer.json``."""

    def apply(folder: Path) -> None:
        parts = json.loads((folder / "tokenizer.json").read_text())
        change(parts)
        (folder / "tokenizer.json").write_text(json.dumps(parts))

    return apply


def empty_pattern(folder: Path) -> None:
    """Replaces the empty text, for which the Rust library reads beyond the end."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.Replace("", "x")
    backend.save(str(folder / "tokenizer.json"))


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            written("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "git lfs pull",
        ),
        (written("tokenizer_config.json", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (written("tokenizer.json", "[" * 100_000), "unreadable"),
        (written("tokenizer_config.json", "[]"), "tokenizer_config.json holds no JSON object"),
        (written("tokenizer_config.json", "[" * 100_000), "tokenizer_config.json holds no JSON object"),
        (written("tokenizer_config.json", '{"eos_token": 5}'), "unreadable"),
        (written("added_tokens.json", "7"), "unreadable"),
        (fifo, "is not a file"),
        (empty_pattern, "PanicException"),
        (changed(lambda parts: parts["model"].update(dropout=0.5)), "dropout 0.5"),
        (changed(lambda parts: parts["model"]["vocab"].update(a=10**18)), "unreadable"),
        (changed(lambda parts: parts["model"]["vocab"].update(a=2**31)), "largest id is 2147483648"),
        (changed(lambda parts: parts["model"]["merges"].append(["no", "where"])), "unreadable"),
        (changed(lambda parts: parts.update(added_tokens=[{"id": -1}])), "unreadable"),
    ],
)
def test_hostile_tokenizer_files_are_refused_in_one_line(
    tmp_path: Path, damage: Callable, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    layouts()["tokenizer.json"](tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=expected) as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "qwen.tiktoken"])
def test_vocabularies_of_other_libraries_are_to_be_converted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x0a\x0e")
    with pytest.raises(UserError, match=rf"holds {name} .* AutoTokenizer.*save_pretrained\('converted'\)"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="is a file; name the folder"):
        load_tokenizer(str(tmp_path / name))


def test_text_that_cannot_be_encoded_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match="fails on a text"):
        load_tokenizer(str(tokenizer_folder)).encode("\ud800")


def test_bytes_are_counted_where_ids_stand_for_them(tmp_path: Path) -> None:
    for name in ("Qwen 2", "prefix space", "Llama 2"):
        (tmp_path / name).mkdir()
        layouts()[name](tmp_path / name)
    qwen = load_tokenizer(str(tmp_path / "Qwen 2"))
    assert qwen.byte_lengths()[qwen.encode(ODD)].sum() == len(ODD.encode())
    assert load_tokenizer(str(tmp_path / "prefix space")).byte_lengths() is None
    assert load_tokenizer(str(tmp_path / "Llama 2")).byte_lengths() is None
