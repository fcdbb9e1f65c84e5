"""Which texts a run trains, validates and tests on, from the settings of its data section."""

import math
from dataclasses import dataclass
from pathlib import Path

from inrank_megatron.checks import check_sources
from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.corpus import Source, open_source
from inrank_megatron.data.embedded import EmbeddedText
from inrank_megatron.data.hub import load_splits
from inrank_megatron.data.token_file import beside
from inrank_megatron.errors import UserError
from inrank_megatron.schema import DataConfig

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class TokenPrefix:
    """An existing ``.bin``/``.idx`` pair, used as it is."""

    prefix: Path

    @property
    def name(self) -> str:
        return str(self.prefix)

    def fingerprint(self, hashes: FileHashes) -> str:
        contents = [hashes.sha256(beside(self.prefix, suffix)) for suffix in (".bin", ".idx")]
        return f"tokens {' '.join(contents)}"


@dataclass(frozen=True)
class Part:
    """A source, the split it is given for, and its weight in the blend (None: by its tokens)."""

    split: str
    source: Source | TokenPrefix
    weight: float | None


@dataclass(frozen=True)
class Selection:
    """The parts in the order given, and the shares (train, valid, test) that the train parts are cut into."""

    parts: tuple[Part, ...]
    shares: tuple[float, float, float]


def select(data: DataConfig) -> Selection:
    """Open the sources that the settings name.

    - ``data_path`` or ``train_data_path``: each source is cut by ``split``, in the order of its sequences. A
      split that has its own path (``valid_data_path``, ``test_data_path``, allowed beside
      ``train_data_path``) uses that text whole, and its share of the training text stays training text.
    - ``dataset``: its own splits; one that it lacks is cut from "train" in the same way.
    - neither: the embedded corpus, whose documents have a split of their own.

    Raises UserError for a contradiction, a path or dataset that is not there, a faulty weight or ``split``.
    """
    check_sources(data)
    shares = parse_split(data.split)
    if data.dataset is not None:
        splits = load_splits(
            data.dataset, text_column=data.text_column, document_separator=data.document_separator
        )
        parts = [Part(split, splits[split], None) for split in SPLITS if split in splits]
    elif data.data_path is None and data.train_data_path is None:
        parts = [Part(split, EmbeddedText(split), None) for split in SPLITS]
    else:
        paths = {"train": data.data_path or data.train_data_path}
        paths |= {"valid": data.valid_data_path, "test": data.test_data_path}
        parts = [part for split in SPLITS if paths[split] for part in _parts(split, paths[split], data)]
    return Selection(tuple(parts), _remaining(shares, {part.split for part in parts}))


def parse_split(split: str) -> tuple[float, float, float]:
    """Megatron's "969,30,1": shares of train, valid and test (missing ones are 0), scaled to a sum of 1."""
    try:
        numbers = [float(number) for number in split.split(",")]
    except ValueError:
        numbers = []
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    if (
        len(numbers) != 3
        or not math.isfinite(total)
        or min(numbers) < 0
        or numbers[0] == 0
        or split.strip() == ""
    ):
        raise UserError(
            f"split = {split!r}: must be up to three shares (train, valid, test), none negative, train "
            "above 0; write e.g. 969,30,1"
        )
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def split_bounds(count: int, shares: tuple[float, float, float]) -> list[int]:
    """Where ``count`` sequences are cut: train is [b0, b1), valid [b1, b2), test [b2, b3).

    The bounds are rounded, and then moved so that each share above 0 has at least one sequence; where there
    are fewer sequences than such shares, train comes first, then valid.
    """
    wanted = [share > 0 for share in shares]
    bounds = [0, round(count * shares[0]), round(count * (shares[0] + shares[1])), count]
    least = [sum(wanted[:index]) for index in range(4)]
    for index in (2, 1):
        bounds[index] = min(bounds[index], bounds[index + 1] - wanted[index])
    for index in (1, 2):
        bounds[index] = min(max(bounds[index], least[index]), count)
    return bounds


def _remaining(shares: tuple[float, float, float], given: set[str]) -> tuple[float, float, float]:
    valid = 0.0 if "valid" in given else shares[1]
    test = 0.0 if "test" in given else shares[2]
    return 1.0 - valid - test, valid, test


def _parts(split: str, words: list[str], data: DataConfig) -> list[Part]:
    return [Part(split, _open(path, data), weight) for path, weight in parse_blend(words)]


def parse_blend(words: list[str]) -> list[tuple[str, float | None]]:
    """Megatron's ``path ...`` or ``weight path weight path ...`` as (path, weight or None)."""
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or None in weights:
        if len(words) > 1 and len(words) % 2 == 0 and any(weight is not None for weight in weights):
            raise UserError(
                f"data path {' '.join(words)}: weights for some paths only; write WEIGHT PATH for each"
            )
        return [(path, None) for path in words]
    for weight in weights:
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"data path {' '.join(words)}: weight {weight} is not above 0; correct or leave out the path"
            )
    return list(zip(words[1::2], weights, strict=True))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _open(path: str, data: DataConfig) -> Source | TokenPrefix:
    prefix = Path(path).expanduser()
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    if beside(prefix, ".bin").is_file() and beside(prefix, ".idx").is_file():
        return TokenPrefix(prefix)
    return open_source(path, text_column=data.text_column, document_separator=data.document_separator)
