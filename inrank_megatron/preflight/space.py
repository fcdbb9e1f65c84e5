"""Room for a checkpoint where the run is saved, and what is free for token files."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from inrank_megatron.config import costs
from inrank_megatron.config.sizes import shown_size
from inrank_megatron.preflight.findings import ERROR, WARNING, Finding, HostFacts
from inrank_megatron.preflight.place import Place, cache_folder, nearest_folder, run_folder

SAVE, CACHE = "free for checkpoints", "free for token files"
WEIGHT_BYTES = 4
STATE_BYTES = 8  # Adam's two moments


class Space:
    """Free bytes against those of the dense model's checkpoint, which no smaller method exceeds by much."""

    on_one_host = True

    def gather(self, place: Place) -> dict[str, Any]:
        parameters = costs.parameters(place.config, place.topology.vocab_size).total
        return {
            SAVE: _room(run_folder(place.config)) | {"parameters": parameters},
            CACHE: _room(cache_folder(place.config)),
        }

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        for host in hosts:
            free, parameters = host.facts[SAVE]["free"], host.facts[SAVE]["parameters"]
            weights, whole = WEIGHT_BYTES * parameters, (WEIGHT_BYTES + STATE_BYTES) * parameters
            if free >= whole:
                continue
            rule = (
                f"not even the weights fit ({shown_size(weights)})"
                if free < weights
                else f"a checkpoint takes about {shown_size(whole)}"
            )
            remedy = "make room there, or choose another --save"
            level = ERROR if free < weights else WARNING
            yield Finding(level, SAVE, host.host, host.texts[SAVE], rule, remedy)

    def shown(self, row: str, value: Any) -> str:
        return f"{shown_size(value['free'])} in {value['path']}"


def _room(path: Path) -> dict[str, Any]:
    return {"path": str(path), "free": shutil.disk_usage(nearest_folder(path)).free}
