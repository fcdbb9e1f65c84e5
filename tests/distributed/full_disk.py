"""The main program, whose disk has no room for records from step 6 on. Launched by test_run_space."""

import os
import runpy
from pathlib import Path

from inrank_megatron.distributed.platform import prepare_process

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt2.py"


def plant() -> None:
    from inrank_megatron.reporting.metrics import MetricsWriter

    train = MetricsWriter.train

    def train_on_a_full_disk(self, step, **values):
        if step == 6:
            os.dup2(os.open("/dev/full", os.O_WRONLY), self._metrics.fileno())
        train(self, step, **values)

    MetricsWriter.train = train_on_a_full_disk


if __name__ == "__main__":
    prepare_process()
    plant()
    runpy.run_path(str(PRETRAIN), run_name="__main__")
