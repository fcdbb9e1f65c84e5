"""Text to token ids: GPT-2's byte-level BPE, any fast tokenizer of transformers, or one trained on a text."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Encoding, decoders, models, pre_tokenizers, trainers

from inrank_megatron.config.folders import named_path
from inrank_megatron.data.tokenizer_errors import library_errors, muted
from inrank_megatron.data.tokenizer_folder import (
    END_OF_TEXT,
    FILES,
    FOREIGN,
    FURTHER,
    MODEL,
    SAMPLE,
    byte_level,
    read_folder,
    save_settings,
)
from inrank_megatron.errors import UserError

SMALLEST_VOCABULARY = len(pre_tokenizers.ByteLevel.alphabet()) + 1
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LONGEST_TOKEN = 128  # bytes, as GPT-2's
_LONG_RUN = re.compile(r"\S{1024}|\s{1024}")
_SAMPLES = ("a", "0", ".")


class Tokenizer:
    """A ``tokenizers.Tokenizer``, and what it puts around a document.

    Args:
        bare: it puts nothing but the end there, and a text is encoded block by block, as older runs did.
        parse_special_tokens: a special token that is written out in a text is that token; else it is text
            like any other.
        name: for messages.

    Attributes:
        vocab_size: the largest token id plus 1, without padding.
        eod: the id that ends a document.
        before, after: the ids that a document begins and ends with; the last is ``eod``.
        in_blocks: blocks that are cut before white space which follows something else are encoded one by
            one; with GPT-2's pre-tokenization they have the ids of the full text.
        identity: SHA-256 (hex) of everything that decides the ids.
        notes: one line each on what a user may not expect.

    Raises:
        UserError: it changes more of a text than its two ends.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str,
        bare: bool = False,
        parse_special_tokens: bool = False,
        name: str = "tokenizer",
        notes: Iterable[str] = (),
    ):
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([end_of_text])
        backend.encode_special_tokens = not parse_special_tokens
        parts = json.loads(backend.to_str())
        self._backend, self._end_of_text, self._name = backend, end_of_text, name
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.eod = backend.token_to_id(end_of_text)
        self.before, closing = ([], []) if bare else _added(backend, name)
        self.after = closing if closing[-1:] == [self.eod] else [*closing, self.eod]
        self.in_blocks = bare or _ignores_cuts(parts, parse_special_tokens)
        # What adds nothing and has been encoded right at all times keeps the identity that it had.
        usual = bare or (_ignores_cuts(parts, False) and not self.before + closing)
        self._adds = None if usual else (bool(self.before), bool(closing))
        described = [parts, self.eod] if usual else [parts, self.eod, self.before, self.after]
        described += ["parse_special_tokens"] if parse_special_tokens else []
        self.identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self.notes = (*notes, *self._around(closing))
        self._counts_bytes = '"add_prefix_space": true' not in json.dumps(parts["pre_tokenizer"])
        # The one of a byte-level tokenizer would take white space out of the places of tokens.
        self._post_processor, backend.post_processor = backend.post_processor, None

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without those around a document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, encoded on all cores."""
        with library_errors(self._name, "fails on a text"):
            return [entry.ids for entry in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def places(self, texts: list[str]) -> list[Encoding]:
        """The ids of each text with their places (``offsets``) in it, which cost some time."""
        with library_errors(self._name, "fails on a text"):
            return self._backend.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray | None:
        """int64 [vocab_size]: UTF-8 bytes of (normalised) text that each id stands for, 0 for special tokens;
        None where ids do not stand for bytes of it, as in a tokenizer that is not byte-level or adds spaces.
        """
        if not (isinstance(self._backend.decoder, decoders.ByteLevel) and self._counts_bytes):
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # a character of the byte alphabet for each byte
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def save(self, folder: Path | str) -> None:
        """Write what `load_tokenizer`, `tokenizers` and `transformers` read; the folder is made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.post_processor = self._post_processor
        self._backend.save(str(folder / "tokenizer.json"))
        self._backend.post_processor = None
        parses = not self._backend.encode_special_tokens
        save_settings(folder, end_of_text=self._end_of_text, added=self._adds, parses=parses)
        if isinstance(self._backend.model, models.BPE):
            self._backend.model.save(str(folder))

    def _around(self, closing: list[int]) -> Iterator[str]:
        if self.before or closing:
            first, last = (" ".join(map(self._backend.id_to_token, ids)) for ids in (self.before, self.after))
            begin = f"begins with {first} and " if first else ""
            yield f"tokenizer {self._name}: each document {begin}ends with {last}, as the tokenizer adds them"


def load_tokenizer(name: str, *, parse_special_tokens: bool = False) -> Tokenizer:
    """The tokenizer of a folder or hub repository, with the ids that transformers gives; see `Tokenizer`.

    Raises UserError for a folder without one, an unreadable file, a repository that cannot be reached, and a
    tokenizer without an end-of-text token.
    """
    folder = _located(name)
    hides = folder.is_dir() and HUB_NAME.fullmatch(name)
    folder = folder if folder.is_dir() else _downloaded(name)
    note = f"{name} is the local folder {folder.absolute()}, not the hub's repository of that name"
    try:
        with library_errors(name, "is unreadable"), muted():
            read = read_folder(folder, name)
            tokenizer = Tokenizer(
                read.backend,
                end_of_text=read.end_of_text,
                bare=read.bare,
                parse_special_tokens=parse_special_tokens or read.parses,
                name=name,
                notes=[f"tokenizer {note}"] if hides else [],
            )
            tokenizer.decode(tokenizer.encode(SAMPLE))
    except UserError as error:
        raise UserError(f"{error} ({note})" if hides else str(error)) from error
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, parse_special_tokens: bool = False
) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting, trained on the texts; the same texts give the same tokenizer.

    No token has more than 128 bytes, and what runs on for 1,024 characters is cut, so that text without
    spaces takes no longer than other text. Raises UserError for fewer than 257 tokens, which 256 bytes and
    the end of text need. A short text may give fewer than ``vocab_size``.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size = {vocab_size}: a byte-level BPE needs 256 bytes and {END_OF_TEXT}; set at least "
            f"{SMALLEST_VOCABULARY}"
        )
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in _without_long_runs(text)), trainer)
    return Tokenizer(backend, end_of_text=END_OF_TEXT, parse_special_tokens=parse_special_tokens)


def _without_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _added(backend: tokenizers.Tokenizer, name: str) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after those of a text."""
    if not backend.num_special_tokens_to_add(is_pair=False):
        return [], []
    for sample in _SAMPLES:
        bare = backend.encode(sample, add_special_tokens=False).ids
        encoded = backend.encode(sample)
        inner = [index for index, sequence in enumerate(encoded.sequence_ids) if sequence is not None]
        if bare and inner and encoded.ids[inner[0] : inner[-1] + 1] == bare:
            return encoded.ids[: inner[0]], encoded.ids[inner[-1] + 1 :]
    raise UserError(
        f"tokenizer {name}: its post-processor adds ids elsewhere than before and after a text; give one "
        "that does not"
    )


def _ignores_cuts(parts: dict[str, Any], parse_special_tokens: bool) -> bool:
    """Whether blocks as `pieces.cut_blocks` makes them have the ids of the full text; see there.

    Args:
        parts: of a ``tokenizer.json``.
    """
    splits = parts["pre_tokenizer"] or {}
    as_gpt2 = parts["normalizer"] is None and parts["model"].get("type") == "BPE"
    as_gpt2 = as_gpt2 and splits.get("type") == "ByteLevel" and splits["use_regex"]
    return bool(as_gpt2 and not splits["add_prefix_space"]) and not any(
        token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"])
        for token in parts["added_tokens"]
        if parse_special_tokens or not token["special"]
    )


def _located(name: str) -> Path:
    """The path that the name is, whether there is a folder or not."""
    path = named_path(name)
    try:
        if path.is_file():
            raise UserError(f"tokenizer {name} is a file; name the folder that it lies in: {path.parent}")
    except OSError as error:
        raise UserError(f"tokenizer {name[:80]}: not a path ({error.strerror}); name a folder") from None
    return path


def _downloaded(name: str) -> Path:
    if name.startswith((".", "/", "~")):
        raise UserError(
            f"tokenizer folder {name} does not exist; give a folder that does or a hub repository"
        )
    # Imported here: it takes a second, and most tokenizers lie in folders.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, *FURTHER, MODEL, *FOREIGN]))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"tokenizer {name} is not a folder here and cannot be loaded from the hub "
            f"({_one_line(error)}); give a folder with vocab.json + merges.txt, or a repository that can "
            "be reached"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
