"""Check the hosts of a cluster before a run, started exactly as the run is, with the same flags.

    deepspeed --hostfile launch/cluster/hostfile tools/preflight.py --config configs/gpt2_medium_inrank.yaml
    srun python tools/preflight.py --config configs/gpt2_medium_inrank.yaml --save /shared/runs/medium
    torchrun --nproc-per-node 2 tools/preflight.py --inrank

It compares software, clocks, settings, data and folders of all hosts, looks at free space and at the health
of GPUs, connects every host with every other, and measures how fast they communicate. A table shows what was
found; then a line for each fault names the host and the remedy. The exit status is 1 if a fault would stop
the run. Every run makes the quick ones of these checks when it starts, unless --no-preflight is given.
"""

import argparse
import json
import sys
import time

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.config.tool_options import positive, tool_parser
from inrank_megatron.distributed.environment import complete
from inrank_megatron.errors import UserError

WAIT_SECONDS = 20.0


def main(argv: list[str]) -> int:
    """Check; the exit status is 0, or 1 after a finding that would stop a run, or a mistake of the user."""
    complete()
    arguments = options(argv)
    # Imported here: torch takes seconds, --help should not.
    from inrank_megatron.distributed.launcher import adopt_ranks

    ranks = None
    try:
        ranks = adopt_ranks()
        from inrank_megatron.interop.start import start_settings

        launch = parse(arguments.flags, world_size=ranks.world_size, other_starts=start_settings)
        with launch.naming_origins():
            check(launch.config, world_size=launch.world_size)
        from inrank_megatron.distributed.platform import prepare_process

        prepare_process(tensor_model_parallel_size=int(launch.config.parallel.tensor_model_parallel_size))
        from inrank_megatron.training.preflight import check_hosts

        return 0 if check_hosts(launch, wait_seconds=arguments.wait, as_json=arguments.json) else 1
    except UserError as error:
        if arguments.json and (ranks is None or ranks.rank == 0):
            print(json.dumps({"passed": False, "error": str(error)}), flush=True)
        print(f"{f'rank {ranks.rank}: ' if ranks else ''}error: {error}", file=sys.stderr, flush=True)
    if ranks and ranks.world_size > 1:
        time.sleep(2.0)  # the others say the same, and a launcher ends them as soon as one has gone
    return 1


def options(argv: list[str]) -> argparse.Namespace:
    """The options of this tool, and as ``flags`` those of the run."""
    parser = tool_parser("preflight.py", __doc__)
    parser.usage = "LAUNCHER tools/preflight.py [--json] [--wait SECONDS] [flags of launch/pretrain_gpt2.py]"
    parser.add_argument("--json", action="store_true", help="print JSON, in one line, and nothing else")
    parser.add_argument(
        "--wait",
        type=positive,
        default=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait for processes that are not there [{WAIT_SECONDS:g}]",
    )
    arguments, flags = parser.parse_known_args(argv)
    arguments.flags = flags
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
