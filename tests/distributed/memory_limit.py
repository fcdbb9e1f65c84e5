"""The main program, whose last rank may take no more memory from step 4 on.

Launched by test_run_out_of_memory.
"""

import ctypes
import os
import resource
import runpy
from pathlib import Path

import psutil

from inrank_megatron.distributed.platform import prepare_process

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt2.py"
PIECE = 2**16


def plant() -> None:
    from inrank_megatron.training.loop import Trainer

    step = Trainer._step

    def step_without_memory(self):
        if self.progress.step == 3:
            limit = psutil.Process().memory_info().vms + PIECE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            malloc = ctypes.CDLL(None).malloc
            malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
            while malloc(PIECE):  # and what earlier steps have left is taken
                pass
        return step(self)

    Trainer._step = step_without_memory


if __name__ == "__main__":
    prepare_process()
    if os.environ["RANK"] == "1":
        plant()
    runpy.run_path(str(PRETRAIN), run_name="__main__")
