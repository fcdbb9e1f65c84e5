"""Models by their name on the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any

from inrank_megatron.config.folders import named_path
from inrank_megatron.data.tokenizer import HUB_NAME
from inrank_megatron.errors import Unsupported, UserError
from inrank_megatron.interop.formats import format_of, reading
from inrank_megatron.interop.huggingface.kinds import CONFIG
from inrank_megatron.interop.huggingface.snapshot import revision_of, snapshot


def located(name: str, *, revision: str | None = None, with_weights: bool = True) -> Path:
    """The folder or file ``name`` or, where there is none, a local copy of the hub's model of that name
    (:func:`snapshot` has the arguments).

    Raises:
        UserError: it is neither here nor can it be had, or a folder without a model has the hub's name.
    """
    if not name:
        raise UserError("an empty path; name a run, an exported folder or a checkpoint")
    path = named_path(name)
    try:
        if path.exists():
            # Whole, so that a checkpoint named from within its folder is known by those above it.
            path = Path(os.path.abspath(path))
            if HUB_NAME.fullmatch(name) and not (path / CONFIG).is_file():
                _check_model(name, path)
            return path
        if not HUB_NAME.fullmatch(name):
            return path
    except OSError as error:
        raise UserError(f"{name[:80]}: not a path ({error.strerror}); name a folder that exists") from None
    return snapshot(name, revision=revision, with_weights=with_weights)


def is_on_hub(name: str) -> bool:
    """Whether ``name`` is that of a model on the hub: it has the form of one, and is no path here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def readable(name: str, *, revision: str | None = None) -> Path:
    """As :func:`located`, for what reads only the formats of this project: a model of the hub that none of
    them can hold is refused by its settings, before its weights are downloaded.
    """
    folder = located(name, revision=revision, with_weights=False)
    if not is_on_hub(name):
        return folder
    module: Any = format_of(folder)
    with reading(folder, module.NAME):
        module.model_of(folder)
    return snapshot(name, revision=revision_of(folder))  # of the same commit, whatever the hub has by now


def local_notes(name: str) -> tuple[str, ...]:
    """Messages for the user about a folder here whose name may be meant as that of a model on the hub."""
    path = named_path(name)
    return (_hides(name, path),) if HUB_NAME.fullmatch(name) and (path / CONFIG).is_file() else ()


def _check_model(name: str, path: Path) -> None:
    try:
        format_of(path)
    except Unsupported as error:
        raise Unsupported(f"{error} ({_hides(name, path)})") from None


def _hides(name: str, path: Path) -> str:
    return f"{name} is the local folder {path.absolute()}, not the hub's model of that name"
