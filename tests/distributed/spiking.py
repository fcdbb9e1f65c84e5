"""The main program on data of which some batches are noise, with a small window of losses.

``NOISE`` holds the indices of those global batches. Launched by test_run_spikes.
"""

import os
import runpy

import numpy as np

from inrank_megatron.distributed.platform import prepare_process
from tests.harness import PRETRAIN

NOISE = "TEST_NOISE"


def plant() -> None:
    # Imported here: it imports Megatron-Core and DeepSpeed, for which the process must be prepared.
    from inrank_megatron.data.batches import TrainBatches
    from inrank_megatron.training import loss_history

    rows, noise = TrainBatches.rows, {int(word) for word in os.environ[NOISE].split()}

    def sometimes_noise(self, step, first, last):
        found = rows(self, step, first, last)
        return np.random.default_rng(step + first).integers(300, 512, found.shape) if step in noise else found

    TrainBatches.rows = sometimes_noise
    loss_history.WINDOW, loss_history.FEWEST, loss_history.FACTOR = 8, 6, 3.0


if __name__ == "__main__":
    prepare_process()
    plant()
    runpy.run_path(str(PRETRAIN), run_name="__main__")
