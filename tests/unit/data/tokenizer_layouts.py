"""Folders with tokenizers of every layout that models come with, small, trained on the text of the tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.unit.data.texts import prose

SPECIAL = ["<s>", "</s>", "<unk>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = prose(2000, seed=0) + "Die Größe!\n\n\n  don't  1234567 ...\n\n" * 20


def layouts() -> dict[str, Callable[[Path], None]]:
    """What writes the files of each layout into an empty folder, by name."""
    return {
        "vocab and merges": _vocab,
        "vocab, merges, added tokens": _vocab_and_added,
        "vocab, merges, added_tokens_decoder": _vocab_and_settings,
        "tokenizer.json": lambda folder: _save(folder, byte_level(_gpt2())),
        "tokenizer.json of GPT-2's class": _gpt2_class,
        "prefix space": lambda folder: _save(
            folder, byte_level(_gpt2(add_prefix_space=True)), eos_token="</s>"
        ),
        "Llama 3": _llama_3,
        "Qwen 2": _qwen_2,
        "o200k": lambda folder: _save(folder, byte_level(_split(O200K)), eos_token="</s>"),
        "single digits": _digits,
        "added tokens": _added,
        "begins and ends": _begins_and_ends,
        "Llama 2": _llama_2,
        "Llama 2 by its normalizer": _llama_2_normalizer,
        "T5": _t5,
        "ALBERT": _albert,
        "BERT": _bert,
    }


def byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def put_around(backend: tokenizers.Tokenizer, template: str) -> tokenizers.Tokenizer:
    """The tokenizer with a post-processor of the template, such as ``<s> $A </s>``."""
    tokens = [(word, backend.token_to_id(word)) for word in template.split() if word != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return backend


def _gpt2(*, add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _save(folder: Path, backend: tokenizers.Tokenizer, **settings: Any) -> None:
    backend.save(str(folder / "tokenizer.json"))
    if settings:
        _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))


def _vocab(folder: Path) -> None:
    backend = byte_level(_gpt2())
    parts = json.loads(backend.to_str())["model"]
    vocabulary = parts["vocab"] | {"<|endoftext|>": len(parts["vocab"])}
    _write(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in parts["merges"]))


def _vocab_and_added(folder: Path) -> None:
    _vocab(folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    _write(folder / "added_tokens.json", {"<x>": size, "<|end|>": size + 3})
    _write(folder / "special_tokens_map.json", {"eos_token": "<|end|>"})


def _vocab_and_settings(folder: Path) -> None:
    _vocab(folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = {
        str(size): {"content": "<x>", "special": False} | flags,
        str(size + 1): {"content": "<|end|>", "special": True} | flags,
    }
    end = {"content": "<|end|>", "__type": "AddedToken"} | flags
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": end, "added_tokens_decoder": added}
    _write(folder / "tokenizer_config.json", settings)


def _gpt2_class(folder: Path) -> None:
    """The files of the hub's GPT-2: its class makes the tokenizer anew from the vocabulary."""
    _vocab(folder)
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    backend.pre_tokenizer, backend.decoder = _gpt2(), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
    _save(folder, backend, tokenizer_class="GPT2Tokenizer", model_max_length=1024)
    _write(folder / "config.json", {"model_type": "gpt2"})


def _llama_3(folder: Path) -> None:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    bos = {"__type": "AddedToken", "content": "<s>", **flags}
    backend = put_around(byte_level(_split(LLAMA_3)), "<s> $A")
    _save(folder, backend, bos_token=bos, eos_token="</s>", add_bos_token=True)


def _qwen_2(folder: Path) -> None:
    backend = byte_level(_split(QWEN_2), normalizers.NFC())
    backend.add_special_tokens(["<|endoftext|>"])
    _save(folder, backend, tokenizer_class="Qwen2Tokenizer", eos_token="</s>", bos_token=None)


def _digits(folder: Path) -> None:
    splits = [pre_tokenizers.Digits(individual_digits=True), _gpt2()]
    _save(folder, byte_level(pre_tokenizers.Sequence(splits)), eos_token="</s>")


def _added(folder: Path) -> None:
    """Tokens that reach over line ends, take white space from their sides, or stand in the text."""
    backend = byte_level(_gpt2())
    backend.add_tokens(
        [AddedToken("\n\n\n"), AddedToken("fox\njumps"), AddedToken("<x>", lstrip=True, rstrip=True)]
    )
    _save(folder, backend, eos_token="</s>")


def _begins_and_ends(folder: Path) -> None:
    backend = put_around(byte_level(_gpt2()), "<s> $A </s>")
    _save(folder, backend, bos_token="<s>", eos_token="</s>", add_bos_token=False, add_eos_token=False)


def _byte_fallback() -> dict[str, Any]:
    """The parts of a BPE on characters that writes bytes for those it does not know."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    symbols = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *symbols], show_progress=False
    )
    backend.train_from_iterator([prose(2000, seed=0)], trainer)
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in symbols]
    for length in (2, 4, 8):
        parts["model"]["vocab"]["▁" * length] = len(parts["model"]["vocab"])
        parts["model"]["merges"].append(["▁" * (length // 2)] * 2)
    parts["decoder"] = json.loads(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ).__getstate__()
    )
    return parts


def _llama_2(folder: Path) -> None:
    parts = _byte_fallback()
    parts["pre_tokenizer"] |= {"prepend_scheme": "first", "split": False}
    backend = put_around(tokenizers.Tokenizer.from_str(json.dumps(parts)), "<s> $A")
    _save(
        folder,
        backend,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    _write(folder / "config.json", {"model_type": "llama"})


def _llama_2_normalizer(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(_byte_fallback() | {"pre_tokenizer": None}))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    _save(folder, put_around(backend, "<s> $A"), bos_token="<s>", eos_token="</s>")


def _unigram(normalizer: normalizers.Normalizer, specials: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    return backend


def _t5(folder: Path) -> None:
    spaces = normalizers.Replace(Regex(" {2,}"), "▁")
    backend = _unigram(normalizers.Sequence([normalizers.NFKC(), spaces]), ["<pad>", "</s>", "<unk>"])
    _save(folder, put_around(backend, "$A </s>"), eos_token="</s>", unk_token="<unk>")


def _albert(folder: Path) -> None:
    parts = [
        normalizers.Replace("``", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
    ]
    backend = _unigram(normalizers.Sequence(parts), ["<pad>", "<unk>", "[CLS]", "[SEP]"])
    _save(folder, put_around(backend, "[CLS] $A [SEP]"), eos_token="[SEP]", unk_token="<unk>")


def _bert(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    backend.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    _save(folder, put_around(backend, "[CLS] $A [SEP]"), eos_token="[SEP]")
