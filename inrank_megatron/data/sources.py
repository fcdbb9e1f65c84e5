"""Which texts a run trains, validates and tests on, from the settings of its data section."""

import errno
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from inrank_megatron.config.checks import check_sources
from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.cache import FileHashes
from inrank_megatron.data.corpus import Source, open_source
from inrank_megatron.data.embedded import EmbeddedText
from inrank_megatron.data.hub import load_splits
from inrank_megatron.data.paths import PAIR, Prefix, find
from inrank_megatron.data.token_file import pair_file
from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

SPLITS = ("train", "valid", "test")
MOST_WEIGHTS = 2**15 - 1  # Megatron's blending counts its sources in int16


@dataclass(frozen=True)
class TokenPrefix:
    """An existing ``.bin``/``.idx`` pair, used as it is."""

    prefix: Path

    @property
    def name(self) -> str:
        return str(self.prefix)

    def fingerprint(self, hashes: FileHashes) -> str:
        contents = [hashes.sha256(pair_file(self.prefix, suffix)) for suffix in (".bin", ".idx")]
        return f"tokens {' '.join(contents)}"


@dataclass(frozen=True)
class Part:
    """A source, the split it is given for, and the component of the blend that it belongs to.

    The parts of one component follow each other as one text. ``weight``: of the component (None: by its
    tokens). ``remarks``: the source's when it was opened, which are about its name and place, where those
    that it makes while it is read are about its content.
    """

    split: str
    source: Source | TokenPrefix
    weight: float | None
    component: int = 0
    remarks: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "remarks", tuple(getattr(self.source, "notes", ())))


@dataclass(frozen=True)
class Selection:
    """The parts in the order given, the shares (train, valid, test) that the train parts are cut into, and
    messages for the user about how they were found.
    """

    parts: tuple[Part, ...]
    shares: tuple[float, float, float]
    notes: tuple[str, ...] = ()

    def components(self) -> list[list[int]]:
        """The numbers of the train parts, component by component."""
        numbers: dict[int, list[int]] = {}
        for number, part in enumerate(self.parts):
            if part.split == "train":
                numbers.setdefault(part.component, []).append(number)
        return list(numbers.values())

    def blended(self) -> "Selection":
        """Each part without a weight as its own component: what such parts were before they were joined."""
        parts = (
            replace(part, component=number) if part.weight is None else part
            for number, part in enumerate(self.parts)
        )
        note = "files without weights are blended by their tokens, as when this run began; new runs join them"
        return replace(self, parts=tuple(parts), notes=(*self.notes, note))


def select(data: DataConfig) -> Selection:
    """Open the sources that the settings name.

    - ``data_path`` or ``train_data_path``: files, folders and patterns (see `find`). Without weights all of
      them are one component, else there is one for each weight. Each is cut by ``split``, see `cut`. A split
      that has its own path (``valid_data_path``, ``test_data_path``, allowed together with
      ``train_data_path``) uses all of that text, and its share of the training text stays training text.
    - ``dataset``: its own splits; one that it lacks is cut from "train" in the same way.
    - neither: the embedded corpus, whose documents have a split of their own.

    Raises UserError for a contradiction, a path or dataset that is not there, a faulty weight or ``split``.
    """
    check_sources(data)
    shares = parse_split(data.split)
    notes: list[str] = []
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
        parts = [
            part for split in SPLITS if (words := paths[split]) for part in _parts(split, words, data, notes)
        ]
    return Selection(tuple(parts), _remaining(shares, {part.split for part in parts}), tuple(notes))


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
            f"split = {split!r}: must be up to three parts (train, valid, test), none negative, train "
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


def cut(counts: list[int], shares: tuple[float, float, float]) -> list[list[int]]:
    """Where the sequences of the files of one component are cut, as `split_bounds` for each file.

    Together they are cut as one file of all their sequences would be, but each gives its own share. What
    rounding leaves of a file counts for the next ones, so of files that are too short to be cut some go to
    validation or test whole, evenly spread.
    """
    total = sum(counts)
    bounds = split_bounds(total, shares)
    held_out, test = total - bounds[1], total - bounds[2]
    cuts, seen, held, tested = [], 0, 0, 0
    for count in counts:
        seen += count
        before = held, tested
        held = _share(seen, held_out, total)
        tested = _share(held, test, held_out)
        cuts.append([0, count - (held - before[0]), count - (tested - before[1]), count])
    return cuts


def _share(number: int, part: int, whole: int) -> int:
    """number x part / whole, rounded."""
    return (2 * number * part + whole) // (2 * whole) if whole else 0


def _remaining(shares: tuple[float, float, float], given: set[str]) -> tuple[float, float, float]:
    valid = 0.0 if "valid" in given else shares[1]
    test = 0.0 if "test" in given else shares[2]
    return 1.0 - valid - test, valid, test


def _parts(split: str, words: list[str], data: DataConfig, notes: list[str]) -> list[Part]:
    parts = []
    for number, (word, weight) in enumerate(parse_blend(words)):
        if weight is None and word.endswith(".idx") and f"{word.removesuffix('.idx')}.bin" in words:
            continue  # both files of a pair, as a shell's pattern names them
        component = 0 if weight is None else number
        try:
            found = find(word)
            parts += [Part(split, _opened(entry, data), weight, component) for entry in found.entries]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the path
                raise
            raise UserError(
                f"data path {word}: {error.strerror} ({error.filename}); its files must be readable: change "
                "that or leave it out"
            ) from error
        notes += found.notes
    return parts


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
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"data path {' '.join(words)}: weight {weight} is not above 0; correct or leave out the path"
            )
    for word in words[::2]:
        if os.path.exists(word):
            raise UserError(
                f"data path {word}: is a number and also a path that exists; write ./{word} if the path is "
                f"meant, +{word} if it is the weight of {words[words.index(word) + 1]}"
            )
    if len(weights) > MOST_WEIGHTS:
        raise UserError(
            f"data path: {len(weights)} weights; a blend has at most {MOST_WEIGHTS}: give files of one "
            "weight as a folder or a pattern, WEIGHT FOLDER"
        )
    return list(zip(words[1::2], weights, strict=True))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _opened(entry: Path | Prefix, data: DataConfig) -> Source | TokenPrefix:
    if isinstance(entry, Prefix):
        for suffix in PAIR:
            refuse_pointer(pair_file(entry.path, suffix))
        return TokenPrefix(entry.path)
    return open_source(str(entry), text_column=data.text_column, document_separator=data.document_separator)
