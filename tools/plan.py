"""Predict what a run takes: the best topology, memory, time, energy and price. Trains nothing, needs no GPU.

    python tools/plan.py --config configs/gpt2_medium_inrank.yaml --cluster 8xA100-80GB
    python tools/plan.py --config configs/gpt2_medium_inrank.yaml --cluster my_cluster.yaml --final-rank 286

Every legal topology is ranked by the predicted time of a step. The first is shown in detail, with the command
that launches it. All flags of the run are allowed. The plan chooses tensor and sequence parallelism, ZeRO
stage, offload, micro-batch and recomputation; one that a flag gives keeps its value. Only --measure
measures anything: docs/guides/plan_a_run.md says what is assumed otherwise.
"""

import argparse
import signal
import sys
from collections.abc import Mapping
from typing import Any

from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError
from inrank_megatron.planning import command


def options(argv: list[str]) -> argparse.Namespace:
    """The options of this tool, and as ``flags`` those of the run."""
    return command.options(argv, description=__doc__)


def _start_settings(name: str, revision: str | None) -> Mapping[str, Any]:
    # Imported here: few runs start from a model of transformers, and plans need no torch.
    from inrank_megatron.interop.start import start_settings

    return start_settings(name, revision)


def _measure(config: Config, cluster: Cluster) -> Mapping[str, float]:
    # Imported here: only --measure needs torch, which takes seconds. Megatron-Core must come after the call.
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    from inrank_megatron.benchmarks.rates import rates_for

    return rates_for(config, cluster)


def run(given: argparse.Namespace) -> str:
    """The page, or JSON, for what `options` read."""
    return command.run(given, _measure, other_starts=_start_settings)


def main(argv: list[str]) -> int:
    """Print the plan; the exit status is 1 after a mistake of the user."""
    complete()
    try:
        refuse_ranks("plan.py")
        print(run(options(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main(sys.argv[1:]))
