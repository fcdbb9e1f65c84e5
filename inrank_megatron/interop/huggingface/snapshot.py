"""Local copies of models of the Hugging Face hub: from its cache where they are there, else downloaded."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.tokenizer_files import NAMES, has_tokenizer
from inrank_megatron.interop.huggingface.files import SafetensorsFolder
from inrank_megatron.interop.huggingface.kinds import CONFIG

ADAPTER = "adapter_config.json"
SETTINGS = ("*.json", *NAMES)
WEIGHTS = ("*.safetensors",)


def snapshot(name: str, *, revision: str | None = None, with_weights: bool = True) -> Path:
    """A folder with the settings, tokenizer and weights of the hub's model ``name``. What has been downloaded
    before is taken without a call of the network, whatever the hub has now.

    Args:
        revision: a commit, branch or tag; ``main`` if None.
        with_weights: False: settings and tokenizer will do.

    Raises:
        UserError: it is not in the cache and cannot be downloaded.
    """
    # Imported here: it takes a second, and most models lie in folders.
    from huggingface_hub import snapshot_download

    patterns = [*SETTINGS, *WEIGHTS] if with_weights else [*SETTINGS]
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": patterns,
        "ignore_patterns": ["*/*"],
    }
    with suppress(OSError, ValueError):  # it is not in the cache
        here = Path(snapshot_download(name, local_files_only=True, **options))
        if _is_complete(here, with_weights) and (has_tokenizer(here) or (here / ADAPTER).is_file()):
            return here
    try:
        folder = Path(snapshot_download(name, **options))  # of the cache where nobody answers
        reason = f"no {CONFIG} and *.safetensors came to {folder}"
    except (OSError, ValueError, RuntimeError) as error:
        folder, reason = None, " ".join(str(error).split())
    if folder is not None and _is_complete(folder, with_weights):
        return folder
    at = "" if revision is None else f" at revision {revision}"
    raise UserError(
        f"{name}: is not a folder here and cannot be loaded from the hub{at} ({reason}); name a run, an "
        "exported folder, or a model that can be reached"
    )


def revision_of(folder: Path) -> str | None:
    """The commit of which ``folder`` is the snapshot; None for another folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _is_complete(folder: Path, with_weights: bool) -> bool:
    """Whether a copy has all files, but for a tokenizer, which a model may not have: another program may have
    asked for fewer, or been interrupted.
    """
    if not any((folder / file).is_file() for file in (CONFIG, ADAPTER)):
        return False
    try:
        return not with_weights or bool(SafetensorsFolder(folder).shapes)
    except UserError:
        return False
