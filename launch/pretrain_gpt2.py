"""Pre-train GPT-2 or LLaMA, dense or with incremental low-rank learning.

    deepspeed launch/pretrain_gpt2.py --inrank
    torchrun --nproc-per-node 2 launch/pretrain_gpt2.py --inrank

Without other arguments it runs ``configs/quickstart.yaml``; ``--help`` lists everything.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import adopt_ranks, unused_tasks
from inrank_megatron.distributed.watchdog import JobWatchdog
from inrank_megatron.errors import UserError
from inrank_megatron.training.stopping import interrupt_by_warnings


def main() -> None:
    complete()
    interrupt_by_warnings()
    try:
        ranks = adopt_ranks()
    except UserError as error:
        _end(f"error: {error}\n")
    rank, world_size = ranks.rank, ranks.world_size
    watchdog = JobWatchdog(rank=rank)
    try:
        if note := unused_tasks():
            print(note, file=sys.stderr)
        launch = parse(sys.argv[1:], world_size=world_size, other_starts=_start_settings)
        with launch.naming_origins():
            check(launch.config, world_size=launch.world_size)
        # Imported after the arguments were checked: Megatron-Core and DeepSpeed take seconds.
        from inrank_megatron.distributed.platform import prepare_process

        prepare_process(
            tensor_model_parallel_size=int(launch.config.parallel.tensor_model_parallel_size),
            deterministic=launch.config.training.deterministic_mode,
        )
        from inrank_megatron.training.run import run

        run(launch, watchdog)
    except UserError as error:
        # The other ranks are about to say the same, and torchrun ends them as soon as one has ended.
        _end(f"rank {rank}: error: {error}\n", patience=2.0 if world_size > 1 else 0.0)
    except KeyboardInterrupt:
        _end(f"rank {rank}: interrupted before training began (nothing was written), or twice\n")
    except Exception:
        _end(traceback.format_exc())


def _start_settings(name: str, revision: str | None) -> Mapping[str, Any]:
    # Imported here: few runs start from a model of transformers, which takes seconds.
    from inrank_megatron.interop.start import start_settings

    return start_settings(name, revision)


def _end(message: str, *, patience: float = 0.0) -> None:
    """Fail, ``patience`` seconds after the message: process groups that have lost a rank may never close."""
    with contextlib.suppress(OSError):  # its reader may have ended; the message must still appear
        sys.stdout.flush()
    sys.stderr.write(message)
    sys.stderr.flush()
    time.sleep(patience)
    os._exit(1)


if __name__ == "__main__":
    main()
