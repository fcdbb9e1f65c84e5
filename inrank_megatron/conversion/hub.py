"""Models by their name on the Hugging Face hub."""

import os
import re
from pathlib import Path

from inrank_megatron.conversion.tokenizer_files import NAMES
from inrank_megatron.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
WANTED = ["*.safetensors", "*.json", *NAMES]


def located(name: str) -> Path:
    """The folder or file ``name`` or, where there is none, a local copy of the hub's model of that name: its
    safetensors, settings and tokenizer. ``HF_HUB_OFFLINE=1`` takes what has been downloaded before.

    Raises:
        UserError: it is neither here nor can it be had.
    """
    path = Path(name).expanduser()
    try:
        if path.exists():
            # Whole, so that a checkpoint named from within its folder is known by those above it.
            return Path(os.path.abspath(path))
        if not HUB_NAME.fullmatch(name):
            return path
    except OSError as error:
        raise UserError(f"{name[:80]}: no path ({error.strerror}); name a folder that is there") from None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=["*/*"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: is no folder here and cannot be had from the hub ({reason}); name a run, an exported "
            "folder, or a model that can be reached"
        ) from None
