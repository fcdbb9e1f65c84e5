"""The files and folders that settings and options name."""

import os
from pathlib import Path

from inrank_megatron.errors import UserError


def named_path(name: str) -> Path:
    """With the home of ``~`` in its place. ``~name`` of nobody stays as it is, as in a shell."""
    return Path(os.path.expanduser(name))


def named_folder(name: str, *, flag: str) -> Path:
    """The folder that is to be at ``name``, there or not.

    Raises:
        UserError: no folder can have this name.
    """
    try:
        path = Path(name).expanduser()  # raises for ~name of nobody
        path.resolve().exists()  # raises for a link to itself, and for a name that is too long
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(f"{name[:200]}: cannot be a folder ({reason}); choose another {flag}") from None
    return path
