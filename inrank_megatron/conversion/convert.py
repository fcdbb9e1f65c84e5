"""From one format to another: read, write aside, compute with both, and only then name the result."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from inrank_megatron.conversion.formats import Format, format_of, writable
from inrank_megatron.conversion.options import Options
from inrank_megatron.conversion.verify import Difference, difference, sample_tokens
from inrank_megatron.conversion.weights import Weights
from inrank_megatron.errors import UserError


def convert(
    source: Path, target: Path, format_name: str, options: Options, *, tell: Callable[[str], None]
) -> Difference:
    """Write ``source`` to the new folder ``target``. Nothing is left there if anything fails.

    Raises:
        UserError: a format that cannot be written, a target that exists, a source that cannot be read or
            whose model the format cannot hold, no room, or a result that computes something else.
    """
    formats = writable()
    if format_name not in formats:
        raise UserError(f"--format {format_name}: can be {', '.join(formats)}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already; name a new folder")
    reader, writer = format_of(source), formats[format_name]
    weights = reader.open_weights(source, options)
    for note in weights.notes:
        tell(note)
    tell(f"{weights.origin} ({reader.NAME}, step {weights.step}) -> {target} ({format_name})")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        writer.write(weights, partial, options)
        found = _checked(reader, source, writer, partial, options, weights)
        if target.exists():
            target.rmdir()  # it is empty
        _sync(partial)
        partial.rename(target)
    except OSError as error:
        place = error.filename or partial
        raise UserError(f"{place}: {error.strerror or error}; make room or name another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def check_only(source: Path, target: Path, options: Options) -> Difference:
    """Whether ``target``, written before, still computes what ``source`` does.

    Raises:
        UserError: one of them cannot be read, or they compute something else.
    """
    reader = format_of(source)
    return _checked(reader, source, format_of(target), target, options, reader.open_weights(source, options))


def _checked(
    reader: Format, source: Path, writer: Format, target: Path, options: Options, weights: Weights
) -> Difference:
    tokens = sample_tokens(
        vocab_size=weights.vocab_size, positions=weights.config.model.max_position_embeddings
    )
    found = difference(reader.forward(source, options), writer.forward(target, options), tokens)
    if not found.is_rounding:
        raise UserError(
            f"{target}: does not compute what {source} does ({found}; at most {found.bound:.0e} is "
            "rounding); convert again, and if it stays so report it"
        )
    return found


def _sync(folder: Path) -> None:
    """Every byte is on the disk before the folder gets its name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
