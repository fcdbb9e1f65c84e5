"""Where a check runs: one process of every host, which exchange what they find before any process group."""

import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inrank_megatron.config.folders import named_folder
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.distributed.rendezvous import Meeting
from inrank_megatron.distributed.roll import several
from inrank_megatron.errors import UserError

PATIENCE_SECONDS = 15.0  # of each exchange: longer than the longest check
POLL_SECONDS = 0.02
_FAILED = "preflight/failed"


@dataclass(frozen=True)
class Place:
    """This process in its job, with the run that is about to start. ``deepspeed_json``: what of the user's is
    passed on to DeepSpeed.
    """

    config: Config
    topology: Topology
    deepspeed_json: dict
    meeting: Meeting

    @cached_property
    def machines(self) -> list[str]:
        """All machines of the job, rank 0's first."""
        return list(dict.fromkeys(arrival.machine for arrival in self.meeting.arrivals))

    @cached_property
    def first_ranks(self) -> list[int]:
        """The first rank of each machine, which gathers its facts."""
        return [self.meeting.ranks_of(machine)[0] for machine in self.machines]

    @cached_property
    def hosts(self) -> list[str]:
        """The names of the machines."""
        return [self.meeting.arrivals[rank].host for rank in self.first_ranks]

    @property
    def number(self) -> int:
        """Of this machine, from 0."""
        return self.machines.index(self.meeting.arrivals[self.meeting.ranks.rank].machine)

    @property
    def gathers(self) -> bool:
        """Whether this process gathers the facts of its machine."""
        return self.meeting.ranks.rank in self.first_ranks

    def exchange(self, what: str, value: Any) -> list[Any]:
        """The values of all machines, in their order. Called once for each ``what`` where facts are gathered.

        Raises:
            UserError: a machine does not answer in time, or has failed.
        """
        self.publish(what, value)
        return self.collect(what, patience=PATIENCE_SECONDS)

    def publish(self, what: str, value: Any) -> None:
        """Tell all processes what this machine has."""
        self.meeting.store.set(_key(what, self.number), json.dumps(value))

    def fail(self, reason: str) -> None:
        """End the waiting of all processes, with this reason."""
        self.meeting.store.set(_FAILED, reason)

    def collect(self, what: str, *, patience: float) -> list[Any]:
        """What all machines have published, in their order. Raises as :meth:`exchange`."""
        store, keys = self.meeting.store, [_key(what, number) for number in range(len(self.machines))]
        deadline = time.monotonic() + patience
        while not store.check(keys):
            if store.check([_FAILED]):
                raise UserError(store.get(_FAILED).decode())
            if time.monotonic() > deadline:
                silent = [host for host, key in zip(self.hosts, keys, strict=True) if not store.check([key])]
                raise UserError(
                    f"{several('host', silent)}: no answer in {patience:g} s ({what}); see whether a process "
                    "hangs there, as on a file system that does not answer"
                )
            time.sleep(POLL_SECONDS)
        return [json.loads(text) for text in store.multi_get(keys)]


def _key(what: str, number: int) -> str:
    return f"preflight/{what}/{number}"


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def run_folder(config: Config) -> Path:
    """Where the run is saved, or without ``save`` the folder of all runs. Raises as ``named_folder``."""
    return named_folder(config.training.save or "runs", flag="--save")


def cache_folder(config: Config) -> Path:
    """Where the token files are. Raises as ``named_folder``."""
    return named_folder(config.data.data_cache_path, flag="--data-cache-path")
