"""Plan a run before it is paid for: which topology, how much memory, how long, at what cost. Trains nothing.

    python tools/plan.py --config configs/gpt2_medium_inrank.yaml --cluster 8xA100-80GB
    python tools/plan.py --config configs/gpt2_medium_inrank.yaml --cluster my_cluster.yaml --final-rank 286
    --json

Every legal topology is ranked by the predicted time of a step. Flags of the run are allowed; one that the
plan would choose, such as --zero-stage, keeps its value. The first topology that fits is shown in detail,
with the command that launches it. Nothing is measured: docs/guides/plan_a_run.md says what is assumed.
"""

import argparse
import sys

from inrank_megatron.errors import UserError
from inrank_megatron.planning import command


def options(argv: list[str]) -> argparse.Namespace:
    """The options of this tool, and as ``flags`` those of the run."""
    return command.options(argv, description=__doc__)


def main(argv: list[str]) -> int:
    """Print the plan; the exit status is 1 after a mistake of the user."""
    try:
        print(command.run(options(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
