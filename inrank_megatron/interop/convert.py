"""From one format to another: read, write aside, compute with both, and only then name the result."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from inrank_megatron.checkpoint.disk import sync
from inrank_megatron.checkpoint.locate import CONFIG
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.verify import Difference, difference, sample_tokens
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.formats import Format, forward_of, read_weights, writable


def convert(
    source: Path, target: Path, format_name: str, options: Options, *, notify: Callable[[str], None]
) -> Difference:
    """Write ``source`` to the new folder ``target``. Nothing is left there if anything fails.

    Raises:
        UserError: a format that cannot be written, a target that exists, a source that cannot be read or
            whose model the format cannot hold, a full disk, or a result that computes something else.
    """
    formats = writable()
    if format_name not in formats:
        raise UserError(f"--format {format_name}: can be {', '.join(formats)}")
    source, target = Path(os.path.abspath(source)), Path(os.path.abspath(target))
    _check_target(target)
    (reader, weights), writer = read_weights(source, options), formats[format_name]
    for note in weights.notes:
        notify(note)
    step = f", step {weights.step}" if weights.step else ""  # 0: not known
    notify(f"{weights.origin} ({reader.NAME}{step}) -> {target} ({format_name})")
    with _aside(target) as partial:
        writer.write(weights, partial, options)
        return _checked(reader, source, writer, partial, options, weights, name=target)


def check_only(source: Path, target: Path, options: Options) -> Difference:
    """Whether ``target``, written before, still computes what ``source`` does.

    Raises:
        UserError: one of them cannot be read, or they compute something else.
    """
    reader, weights = read_weights(source, options)
    writer, written = read_weights(target, options)
    if written.vocab_size != weights.vocab_size:
        raise UserError(
            f"{target}: knows {written.vocab_size} tokens, and {source} {weights.vocab_size}; name two "
            "folders of one model"
        )
    return _checked(reader, source, writer, target, options, weights, name=target)


def _check_target(target: Path) -> None:
    """All that can be known before anything is read."""
    try:
        if target.is_symlink():
            raise UserError(f"{target}: is a link; name the folder that it leads to, or a new one")
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target}: exists already; name a new folder")
    except OSError as error:
        raise UserError(f"{target}: cannot be a folder ({error.strerror}); name another one") from None
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{target}: cannot be a folder, {above} is a file; name another one")
    if target.parent.name == "checkpoints" and (target.parent.parent / CONFIG).is_file():
        raise UserError(f"{target}: would look like a checkpoint of that run; name a folder elsewhere")


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A folder of this process next to ``target``, which gets its name at the end; gone if anything fails."""
    for left in target.parent.glob(f".{target.name}.*.partial"):
        owner = left.name.split(".")[-2]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):  # killed in the middle
            shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        partial.rename(target)  # which fails if another process has filled it in the meantime
        sync(target.parent)
    except OSError as error:
        place = target if error.filename in (None, str(partial)) else error.filename
        raise UserError(
            f"{place}: {error.strerror or error}; nothing was written there: fix that or name another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked(
    reader: Format,
    source: Path,
    writer: Format,
    folder: Path,
    options: Options,
    weights: Weights,
    *,
    name: Path,
) -> Difference:
    tokens = sample_tokens(
        vocab_size=weights.vocab_size, positions=weights.config.model.max_position_embeddings
    )
    first = forward_of(reader, source, options, weights)(tokens)
    if not first.isfinite().all():
        raise UserError(f"{source}: its predictions are not numbers (NaN or infinity); name another model")
    second = forward_of(writer, folder, options)(tokens)
    found = difference(first, second, tolerance=options.tolerance)
    if not found.is_rounding:
        raise UserError(
            f"{name}: does not compute the same as {source} ({found}; largest logit "
            f"{found.magnitude:.3g}); convert again, and report it if it fails again; if the logits are so "
            "large that this is rounding, give a larger --tolerance"
        )
    return found


def _sync(folder: Path) -> None:
    """Every byte is on the disk before the folder gets its name."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
