"""What rank 0 of two hosts sends per step by the program's own count, as JSON: ``counted.py``"""

import json

import torch

SLOTS, HOSTS, ACCUMULATION, MICRO_BATCH, VOCABULARY = 2, 2, 2, 2, 512
SIZES = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64}


def count() -> dict[str, float]:
    """``between``: bytes in groups with members on both hosts; ``inside``: bytes in all others."""
    # Imported after the patches, as by all programs.
    from inrank_megatron.benchmarks.blocks import DENSE, preset_config, rank_0_of
    from inrank_megatron.benchmarks.collectives import Wire
    from inrank_megatron.benchmarks.step import training_step
    from inrank_megatron.engine.deepspeed_setup import stop_deepspeed

    settings = {"micro_batch_size": MICRO_BATCH, "tensor_model_parallel_size": SLOTS}
    config = preset_config("tiny", **SIZES, **settings)
    with rank_0_of(SLOTS, replicas=HOSTS) as parallel:
        engine, run = training_step(config, DENSE, parallel, VOCABULARY, accumulation=ACCUMULATION)
        run()  # the first step allocates
        with torch.autograd.set_multithreading_enabled(False), Wire() as wire:
            run()
        stop_deepspeed(engine.deepspeed)
    found = {"between": 0.0, "inside": 0.0}
    for entry in wire.collectives:
        hosts = {member // SLOTS for member in entry.members}
        found["between" if len(hosts) > 1 else "inside"] += entry.sent * entry.itemsize
    return found


if __name__ == "__main__":
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process(tensor_model_parallel_size=SLOTS)
    print(json.dumps(count()))
