"""Text to token ids: GPT-2's byte-level BPE, any saved fast tokenizer, or a BPE trained on the corpus."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from huggingface_hub import snapshot_download
from tokenizers import decoders, models, pre_tokenizers, trainers

from inrank_megatron.data.cache import read_json
from inrank_megatron.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
SMALLEST_VOCABULARY = len(pre_tokenizers.ByteLevel.alphabet()) + 1


class Tokenizer:
    """A ``tokenizers.Tokenizer`` that adds nothing to a text and reads no special token out of one.

    Attributes:
        vocab_size: the largest token id plus 1, without padding.
        eod: the id that ends a document.
        identity: SHA-256 (hex) of everything that decides the ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, end_of_text: str):
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([end_of_text])
        backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self._backend = backend
        self._end_of_text = end_of_text
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.eod = backend.token_to_id(end_of_text)
        described = json.dumps([json.loads(backend.to_str()), self.eod], sort_keys=True)
        self.identity = hashlib.sha256(described.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without an end-of-text token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, encoded on all cores."""
        return [entry.ids for entry in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray | None:
        """int64 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special tokens; None where
        ids do not stand for bytes, as in a tokenizer that is not byte-level.
        """
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # a character of the byte alphabet for each byte
        for index, token in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if token.special else len(token.content.encode())
        return lengths

    def save(self, folder: Path | str) -> None:
        """Write what `load_tokenizer`, `tokenizers` and `transformers` read; the folder is made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end_of_text}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if isinstance(self._backend.model, models.BPE):
            self._backend.model.save(str(folder))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder or hub repository: ``tokenizer.json``, else ``vocab.json`` + ``merges.txt``.

    Raises UserError for a folder without one, an unreadable file, a repository that cannot be reached, and a
    tokenizer without an end-of-text token.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _downloaded(name)
    backend = _read(folder, name)
    return Tokenizer(backend, end_of_text=_end_of_text(folder, name, backend.get_vocab()))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting, trained on the texts; the same texts give the same tokenizer.

    Raises UserError for fewer than 257 tokens, which 256 bytes and the end of text need. A short text may
    give fewer than ``vocab_size``.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size = {vocab_size}: a byte-level BPE needs 256 bytes and {END_OF_TEXT}; set at least "
            f"{SMALLEST_VOCABULARY}"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, end_of_text=END_OF_TEXT)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read(folder: Path, name: str) -> tokenizers.Tokenizer:
    whole, vocabulary, merges = (folder / file for file in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        model = (
            models.BPE.from_file(str(vocabulary), str(merges))
            if vocabulary.is_file() and merges.is_file()
            else None
        )
    except Exception as error:  # what the Rust library raises has no narrower type
        raise UserError(f"tokenizer {name} is unreadable ({_one_line(error)}); give whole files") from error
    if model is None:
        raise UserError(
            f"tokenizer {name} has neither tokenizer.json nor vocab.json + merges.txt; name a folder or hub "
            "repository that has"
        )
    backend = _byte_level(model)
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - backend.get_vocab().keys()
    if missing:
        raise UserError(
            f"tokenizer {name}: vocab.json lacks {len(missing)} of the 256 byte symbols, whose text would "
            "vanish; give a byte-level BPE (as GPT-2's) or a tokenizer.json"
        )
    return backend


def _downloaded(name: str) -> Path:
    if name.startswith((".", "/", "~")):
        raise UserError(
            f"tokenizer folder {name} does not exist; give a folder that does or a hub repository"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"tokenizer {name} is no folder here and cannot be had from the hub ({_one_line(error)}); give "
            "a folder with vocab.json + merges.txt, or a repository that can be reached"
        ) from error


def _end_of_text(folder: Path, name: str, vocabulary: dict[str, int]) -> str:
    declared = (read_json(folder / "tokenizer_config.json") or {}).get("eos_token")
    if isinstance(declared, dict):
        declared = declared.get("content")
    for token in (declared, *END_NAMES):
        if token in vocabulary:
            return token
    raise UserError(
        f"tokenizer {name} has no end-of-text token (one of {', '.join(END_NAMES)}, or eos_token in "
        "tokenizer_config.json); documents end with it: add it to the vocabulary"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
