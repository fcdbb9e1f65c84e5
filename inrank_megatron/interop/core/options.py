"""What a user may allow or ask for in a conversion."""

import argparse
from dataclasses import dataclass
from pathlib import Path

TOLERANCE = 1e-4
"""Difference of a logit in FP32 that rounding explains."""


@dataclass(frozen=True)
class Options:
    """What a conversion may do, and what it cannot find out itself.

    Args:
        allow_pickle: read files that could run code when they are opened.
        model_config: a configuration, as for the launcher, of a checkpoint that does not describe its model.
        vocab_size: the vocabulary, without padding, of a checkpoint that does not say it.
        pad_ranks: give all adapters of a PEFT folder one rank that servers take.
        tolerance: largest difference of a logit that passes for rounding.
    """

    allow_pickle: bool = False
    model_config: Path | None = None
    vocab_size: int | None = None
    pad_ranks: bool = False
    tolerance: float = TOLERANCE


def options_of(arguments: argparse.Namespace) -> Options:
    """What ``add_allow_pickle`` and ``add_model_description`` have put on a tool's command line."""
    return Options(
        allow_pickle=arguments.allow_pickle,
        model_config=arguments.model_config,
        vocab_size=arguments.vocab_size,
    )
