"""Jobs on the emulated device; top-level functions that ``run_emulated`` calls."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from tests.emulated.device import rank_of
from tests.emulated.rules import Collective, Wait


@dataclass(frozen=True)
class Joined:
    """What a rank has done until it has its groups; ``store_seconds``: how long its store waits for a key."""

    collectives: list[Collective]
    waits: list[Wait]
    store_seconds: float


def joining() -> Joined:
    """As the last of four ranks, which came in the last second of the meeting."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with rank_of(3, 4, 2, store=store) as (_, log):
        collectives, waits = log.collectives.get("start", []), log.waits.get("start", [])
        return Joined(collectives, waits, store.timeout.total_seconds())
