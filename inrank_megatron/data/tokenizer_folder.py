"""What transformers makes of a tokenizer's folder, as a ``tokenizers.Tokenizer``, or why it is refused."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
TOKENIZER_FILE, SETTINGS, VOCABULARY, MERGES = FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
)  # fmt: skip
FURTHER = ("special_tokens_map.json", "added_tokens.json")
MODEL = "config.json"
"""Says which of transformers' classes reads the tokenizer, where its own settings do not."""
FOREIGN = ("tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model", "*.tiktoken", "vocab.txt")
"""Vocabularies of other libraries, which transformers can convert."""
GENERIC = "PreTrainedTokenizerFast"
BYTE_LEVEL_OPTIONS = ("add_prefix_space", "trim_offsets", "use_regex")
ADDS, SPLITS = ("add_bos_token", "add_eos_token"), "split_special_tokens"
LARGEST_FILE = 2**28  # bytes; the largest vocabularies in use take 40 MB
LARGEST_VOCABULARY = 2**24
SAMPLE = "Größe  日本 🙂, don't 1234!\n\n\tend \n"


class Reading(NamedTuple):
    """What a folder holds.

    ``bare``: a run wrote it that put nothing around a document but its end and encoded its blocks one by one,
    whatever the tokenizer would do. ``parses``: a run wrote it that read special tokens out of its text.
    """

    backend: tokenizers.Tokenizer
    end_of_text: str
    bare: bool
    parses: bool


def read_folder(folder: Path, name: str) -> Reading:
    """The tokenizer in ``folder``, which messages call ``name``. Imports transformers only where its rules
    decide: a ``tokenizer.json`` alone, a plain ``vocab.json`` with ``merges.txt`` and what `save_settings`
    wrote are read without it.

    Raises:
        UserError: there is none, or it has no end-of-text token.
        BaseException: what the libraries raise for damaged files; see `tokenizer_errors.library_errors`.
    """
    for file in (*FILES, *FURTHER, MODEL):
        _check_file(folder / file, name)
    there = {file for file in (*FILES, *FURTHER, MODEL) if (folder / file).is_file()}
    _check_there(folder, there, name)
    settings = _object(folder / SETTINGS, name) if SETTINGS in there else {}
    saved = _is_saved(folder, settings)
    backend, declared = _plain(folder, there, name), settings.get("eos_token")
    if not saved and there - {TOKENIZER_FILE} and there - {VOCABULARY, MERGES}:
        theirs, declared = _by_transformers(folder, settings, name)
        if not _same(backend, theirs, declared):  # else tokens that were made before keep their identity
            backend = theirs
    vocabulary = backend.get_vocab(with_added_tokens=True)
    _check(backend, vocabulary, name)
    return Reading(
        backend,
        _end_of_text(declared, vocabulary, name),
        bare=saved and not settings.keys() & ADDS,
        parses=saved and SPLITS in settings,
    )


def save_settings(folder: Path, *, end_of_text: str, added: tuple[bool, bool] | None, parses: bool) -> None:
    """Write the ``tokenizer_config.json`` of a tokenizer whose ``tokenizer.json`` lies in ``folder``.

    Args:
        added: whether it adds ids at the beginning and the end of a text; None: see `Reading.bare`.
    """
    settings: dict[str, Any] = {"tokenizer_class": GENERIC, "eos_token": end_of_text}
    settings |= {} if added is None else dict(zip(ADDS, added, strict=True))
    settings |= {SPLITS: False} if parses else {}
    (folder / SETTINGS).write_text(_rendered(settings), encoding="utf-8")


def byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """GPT-2's way from text to the symbols of a byte-level BPE, and back."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _rendered(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2) + "\n"


def _is_saved(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the settings are, to the letter, what `save_settings` writes; no other program's are."""
    further = [name for name in (*ADDS, SPLITS) if name in settings]
    known = list(settings) == ["tokenizer_class", "eos_token", *further]
    known = known and settings["tokenizer_class"] == GENERIC and settings.get(SPLITS) in (None, False)
    return known and (folder / SETTINGS).read_text(encoding="utf-8") == _rendered(settings)


def _check_file(path: Path, name: str) -> None:
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"tokenizer {name}: {path.name} is not a file; give a folder with complete files")
    refuse_pointer(path)
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(
            f"tokenizer {name}: {path.name} has {path.stat().st_size:,} bytes, no tokenizer has more than "
            f"{LARGEST_FILE:,}; give that of a model"
        )


def _check_there(folder: Path, there: set[str], name: str) -> None:
    if TOKENIZER_FILE in there or {VOCABULARY, MERGES} <= there:
        return
    if other := sorted(path.name for pattern in FOREIGN for path in folder.glob(pattern)):
        raise UserError(
            f"tokenizer {name} holds {other[0]} and no tokenizer.json, which is read here; write one with "
            f"transformers (pip install sentencepiece tiktoken protobuf): AutoTokenizer.from_pretrained("
            f"{str(folder)!r}).save_pretrained('converted'), then give --tokenizer converted"
        )
    raise UserError(
        f"tokenizer {name} has neither tokenizer.json nor vocab.json + merges.txt; name a folder or hub "
        "repository that has"
    )


def _object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"tokenizer {name}: {path.name} holds no JSON object; give complete files")
    return value


def _plain(folder: Path, there: set[str], name: str) -> tokenizers.Tokenizer | None:
    """The files alone, without the settings next to them."""
    if TOKENIZER_FILE in there:
        return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    backend = byte_level(models.BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES)))
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - backend.get_vocab().keys()
    if missing:
        raise UserError(
            f"tokenizer {name}: vocab.json lacks {len(missing)} of the 256 byte symbols, whose text would "
            "vanish; give a byte-level BPE (as GPT-2's) or a tokenizer.json"
        )
    return backend


def _by_transformers(
    folder: Path, settings: dict[str, Any], name: str
) -> tuple[tokenizers.Tokenizer, str | None]:
    """The backend that transformers would use, and its end-of-text token."""
    import transformers
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of its remarks none is about what is used here
    try:
        theirs = _loaded(folder, settings, transformers)
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(theirs, transformers.PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer {name} is a {type(theirs).__name__}, which transformers implements only in Python; "
            "give one with a tokenizer.json"
        )
    backend = theirs.backend_tokenizer
    if theirs(SAMPLE)["input_ids"] != backend.encode(SAMPLE).ids:
        raise UserError(
            f"tokenizer {name}: transformers' {type(theirs).__name__} changes the result of its "
            "tokenizer.json; give one whose tokenizer.json is used unchanged"
        )
    return backend, theirs.eos_token


def _loaded(folder: Path, settings: dict[str, Any], transformers: Any) -> Any:
    # Written by hand a token may be an object without its type, which transformers does not take.
    options: dict[str, Any] = {
        key: tokenizers.AddedToken(value["content"], special=True)
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, dict) and "__type" not in value
    }
    options |= {"local_files_only": True}
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        if (folder / TOKENIZER_FILE).is_file():
            raise
        if named := settings.get("tokenizer_class"):
            raise UserError(
                f"tokenizer {folder}: transformers cannot make a {named} of its files; give one with a "
                "tokenizer.json"
            ) from error
        # A vocabulary with merges and no word about its class is as GPT-2's, the first of its kind.
        return transformers.GPT2Tokenizer.from_pretrained(folder, **options)


def _same(plain: tokenizers.Tokenizer, theirs: tokenizers.Tokenizer, end_of_text: Any) -> bool:
    """Whether both give the same ids and text, whatever their descriptions say beyond that."""
    if isinstance(end_of_text, str):
        plain.add_special_tokens([end_of_text])  # as `Tokenizer` does
    return _essence(plain) == _essence(theirs)


def _essence(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    parts = json.loads(backend.to_str())
    parts["model"] = {key: value for key, value in parts["model"].items() if value not in (None, "", False)}
    if "unk_token" not in parts["model"]:
        parts["model"].pop("fuse_unk", None)
    if not backend.num_special_tokens_to_add(is_pair=False):
        parts["post_processor"] = None
    for part, needless in (("pre_tokenizer", ("trim_offsets",)), ("decoder", BYTE_LEVEL_OPTIONS)):
        if (parts[part] or {}).get("type") == "ByteLevel":
            parts[part] = {key: value for key, value in parts[part].items() if key not in needless}
    if parts["normalizer"] is None:
        for token in parts["added_tokens"]:
            del token["normalized"]
    return {key: value for key, value in parts.items() if key not in ("version", "padding", "truncation")}


def _check(backend: tokenizers.Tokenizer, vocabulary: dict[str, int], name: str) -> None:
    largest = max(vocabulary.values(), default=None)
    if largest is None or largest >= LARGEST_VOCABULARY:
        raise UserError(
            f"tokenizer {name}: its largest id is {largest}; it must be from 0 to "
            f"{LARGEST_VOCABULARY - 1}: give a complete tokenizer"
        )
    if dropout := getattr(backend.model, "dropout", None):
        raise UserError(
            f"tokenizer {name}: dropout {dropout} makes tokens random, but a corpus is tokenized once; "
            'set "dropout": null in its tokenizer.json'
        )


def _end_of_text(declared: Any, vocabulary: dict[str, int], name: str) -> str:
    if isinstance(declared, dict):
        declared = declared.get("content")
    for token in (declared, *END_NAMES):
        if isinstance(token, str) and token in vocabulary:
            return token
    raise UserError(
        f"tokenizer {name} has no end-of-text token (one of {', '.join(END_NAMES)}, or eos_token in "
        "tokenizer_config.json); documents end with it: add it to the vocabulary"
    )
