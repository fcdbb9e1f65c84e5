"""The main program, in which rank 1 loses one bit of one weight during step 6. Launched by its test."""

import runpy
from pathlib import Path

from inrank_megatron.distributed.platform import prepare_process

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt2.py"
WEIGHT = "decoder.layers.1.pre_mlp_layernorm.bias"


def plant() -> None:
    # Imported here: it imports Megatron-Core and DeepSpeed, for which the process must be prepared.
    from inrank_megatron.engine.engine import Engine

    step_of_engine = Engine.train_step

    def train_step(self, micro_batches, *, step, **options):
        result = step_of_engine(self, micro_batches, step=step, **options)
        if step == 6 and self.parallel.rank == 1:
            self.model.get_parameter(WEIGHT).data.view(-1)[3] += 1e-7
        return result

    Engine.train_step = train_step


if __name__ == "__main__":
    prepare_process()
    plant()
    runpy.run_path(str(PRETRAIN), run_name="__main__")
