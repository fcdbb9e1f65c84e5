"""What a user may allow or ask for in a conversion."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """``allow_pickle``: read files that could run code when they are opened. ``pad_ranks``: give all adapters
    of a PEFT folder one rank that servers take. ``newest``: of a run folder the newest checkpoint
    instead of the best.
    """

    allow_pickle: bool = False
    pad_ranks: bool = False
    newest: bool = False
