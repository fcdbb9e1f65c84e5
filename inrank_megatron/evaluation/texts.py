"""The text that a model is evaluated on: a run's own held-out split, files, or a dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inrank_megatron.checkpoint.locate import CONFIG, TOKENIZER, locate
from inrank_megatron.checkpoint.weights import is_weights_only
from inrank_megatron.config.loading import load
from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.batches import CHUNK_TOKENS
from inrank_megatron.data.contents import too_few
from inrank_megatron.data.hub import load_splits
from inrank_megatron.data.prepare import PreparedData, prepare
from inrank_megatron.data.sources import SPLITS, Part, Selection, parse_split
from inrank_megatron.data.token_file import TokenFile, joined
from inrank_megatron.data.tokenizer import Tokenizer
from inrank_megatron.errors import UserError

NAMES = 6


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens, and the tokenizer that made them. ``name``: what to call it. ``largest_id``: of any token.
    ``notes``: what the user may want to know of them.
    """

    name: str
    file: TokenFile
    tokenizer: Tokenizer
    largest_id: int
    notes: tuple[str, ...] = ()

    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text, ends of documents left out; None where the tokenizer does not say."""
        lengths = self.tokenizer.byte_lengths()
        if lengths is None:
            return None
        starts = range(0, self.file.num_tokens, CHUNK_TOKENS)
        chunks = (
            self.file.tokens(start, min(CHUNK_TOKENS, self.file.num_tokens - start)) for start in starts
        )
        return sum(int(lengths[tokens].sum()) for tokens in chunks)


def run_split(path: Path, split: str) -> Text:
    """The split "valid" or "test" of the run at ``path``, from its own settings, made again if need be.

    Raises:
        UserError: the run's text or tokenizer is missing or has changed, or it has no such split.
    """
    run, checkpoint, _ = locate(path)
    data = load(run / CONFIG).data
    if data.tokenizer and (run / TOKENIZER).is_dir():
        # The one that it was trained with: what lies elsewhere may have changed, or be read otherwise today.
        data = data.model_copy(update={"tokenizer": str(run / TOKENIZER)})
    if is_weights_only(checkpoint.state) and not (data.data_path or data.train_data_path or data.dataset):
        raise UserError(f"{path}: was converted and names no text of its own; give --data or --dataset")
    recorded = (checkpoint.state.get("identity") or {}).get("data")
    prepared = prepare(data, recorded=recorded)
    if recorded not in (None, prepared.folder.name):
        raise UserError(
            f"{path}: was trained on data {recorded}, its settings now give {prepared.folder.name}; restore "
            "the text and tokenizer, or name a text with --data"
        )
    name, file = f"{split} split of {run}", {"valid": prepared.valid, "test": prepared.test}[split]
    if file is None and parse_split(data.split)[SPLITS.index(split)] > 0:
        raise UserError(
            f"{name}: holds no text ({too_few(prepared.meta)}); name another split or a text with --data"
        )
    return _text(name, file, prepared)


def files(paths: list[str], **settings: Any) -> Text:
    """Whole files, one after the other; ``settings`` of `DataConfig` say how they are read.

    Raises UserError as the data layer does.
    """
    data = DataConfig(train_data_path=paths, split="1", **settings)
    prepared = prepare(data)
    name = " ".join(paths) if len(paths) <= NAMES else f"{paths[0]} ... {paths[-1]} ({len(paths)} words)"
    return _text(name, joined([file for file, _ in prepared.train]), prepared)


def dataset_split(dataset: str, split: str, **settings: Any) -> Text:
    """One split of ``OWNER/NAME[:CONFIG]``; of a dataset with one split only, that one. As `files`.

    Raises:
        UserError: as the data layer does, or there is no such split.
    """
    data = DataConfig(dataset=dataset, **settings)

    def choose(data: DataConfig) -> Selection:
        splits = load_splits(
            dataset,
            text_column=data.text_column,
            needed=split,
            document_separator=data.document_separator,
        )
        return Selection((Part("train", splits[split], None),), (1.0, 0.0, 0.0))

    prepared = prepare(data, choose=choose)
    [(file, _)] = prepared.train
    return _text(file.name, joined([file]), prepared)


def _text(name: str, file: TokenFile | None, prepared: PreparedData) -> Text:
    if file is None:
        raise UserError(f"{name}: holds no text; name another split or a text with --data")
    largest = max(record["largest_id"] for record in prepared.meta["files"])
    return Text(name, file, prepared.tokenizer, largest, prepared.notes)


def check_tokens(text: Text, *, vocab_size: int, tokenizer: Tokenizer | None, model: str) -> None:
    """The tokens of ``text`` mean to the model what they meant when they were made.

    Args:
        tokenizer: the model's own, if it has one.

    Raises:
        UserError: another tokenizer made them, or ids lie beyond the model's vocabulary.
    """
    if tokenizer is not None and tokenizer.identity != text.tokenizer.identity:
        raise UserError(
            f"{text.name}: its tokenizer is not that of {model}, so its ids mean other words to the model; "
            "leave out --tokenizer to use the model's own"
        )
    if text.largest_id >= vocab_size:
        raise UserError(
            f"{text.name}: holds the token id {text.largest_id}, {model} has a vocabulary of {vocab_size}; "
            "give the --tokenizer that the model was trained with"
        )
