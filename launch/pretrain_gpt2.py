"""Pre-train GPT-2, dense or with incremental low-rank learning.

    deepspeed launch/pretrain_gpt2.py --inrank
    torchrun --nproc-per-node 2 launch/pretrain_gpt2.py --inrank

Without other arguments it runs ``configs/quickstart.yaml``; ``--help`` lists everything.
"""

import sys

from inrank_megatron.checks import check
from inrank_megatron.cli import parse
from inrank_megatron.errors import UserError
from inrank_megatron.launcher import launcher_ranks


def main() -> int:
    rank, world_size = launcher_ranks()
    try:
        launch = parse(sys.argv[1:], world_size=world_size)
        check(launch.config, world_size=world_size)
        # Imported after the arguments were checked: Megatron-Core and DeepSpeed take seconds.
        from inrank_megatron.platform import prepare_process

        prepare_process()
        from inrank_megatron.training.run import run

        run(launch)
    except UserError as error:
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
