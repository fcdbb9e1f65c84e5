"""What the patches were checked with, and the one way in which they replace a symbol."""

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from types import ModuleType

from inrank_megatron.errors import UserError

TESTED_VERSIONS = {
    "torch": ("2.11", "2.12", "2.13"),
    "megatron-core": ("0.16",),
    "deepspeed": ("0.19",),
}

_logger = logging.getLogger("inrank_megatron")


def require_symbol(module: ModuleType, name: str, *, package: str) -> Callable:
    """``module.name``, after a look at the version of the ``package`` that it comes from.

    Raises:
        UserError: the symbol does not exist, so this release of the package cannot be patched.
    """
    warn_if_untested(package)
    symbol = getattr(module, name, None)
    if symbol is None:
        raise UserError(
            f"{package} {importlib.metadata.version(package)} has no {module.__name__}.{name}, which a run "
            f"without CUDA must replace; install {package} {' or '.join(TESTED_VERSIONS[package])}"
        )
    return symbol


@functools.cache
def warn_if_untested(package: str) -> None:
    """Log one warning line if the installed ``package`` is not of a major.minor version in the table."""
    version = importlib.metadata.version(package)
    if ".".join(version.split(".")[:2]) not in TESTED_VERSIONS[package]:
        _logger.warning(
            "%s %s is untested with the patches for runs without CUDA; they were checked with %s",
            package,
            version,
            ", ".join(TESTED_VERSIONS[package]),
        )
