"""Values in a DeepSpeed JSON, by keys like ``optimizer.params.lr``."""

from collections.abc import Mapping
from typing import Any


def lookup(given: Any, key: str) -> Any:
    """The value at ``key``; None where there is none."""
    for part in key.split("."):
        given = given.get(part) if isinstance(given, Mapping) else None
    return given


def shown(value: Any) -> str:
    """A value for a message, which stays one line of some length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
