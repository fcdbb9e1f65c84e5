"""What this machine attains: figures of a cluster that a plan otherwise assumes, in the units of its file.

The rate of matrix products is that of a dense transformer layer of the preset, forward and backward, with all
its other work; on a CPU without the host's time for launching operators, which a very small layer gives. On a
CPU all times are the process's own (CPU time), so that other programs on the machine hardly change them.
"""

import math
import statistics
from collections.abc import Callable, Iterator

import torch

from inrank_megatron.benchmarks.blocks import DENSE, VOCABULARY, build_layer, preset_config, single_process
from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.benchmarks.layer import forward_backward, layer_output
from inrank_megatron.benchmarks.links import links, timed
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.step import training_step
from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.costs import precision
from inrank_megatron.config.loading import replace
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.platform import device, device_name
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.errors import UserError
from inrank_megatron.planning.seconds import LAUNCHES

COPIED = 64 * 2**20
"""Bytes of a copy that measures the memory: more than caches hold."""
LAUNCHING = {"hidden_size": 64, "num_attention_heads": 2, "seq_length": 16}
"""A layer of the preset tiny so small that launching its operators takes its time."""
MICRO_BATCHES = 8
"""Of a step that measures ZeRO 3: what it does once a step hardly counts."""
ROUND = 0.1
"""Seconds that a round takes at least."""


def measure(preset: str, *, repeats: int) -> Iterator[Row]:
    """Rows of the preset."""
    for name, value in rates(preset_config(preset), repeats=repeats).items():
        yield Row(preset, name, value)


def rates_for(config: Config, cluster: Cluster) -> dict[str, float]:
    """`rates` for a run on a cluster of machines like this one; on CPUs, of one core.

    Raises:
        UserError: the cluster has GPUs and this machine has none, or the other way round.
    """
    here = "cpu" if device().type == "cpu" else device_name()
    if (cluster.device == "cpu") != (here == "cpu"):
        raise UserError(
            f"--measure: --cluster has {cluster.device}, and this machine {here}; measure on a machine of "
            "that kind, or leave --measure out"
        )
    torch.set_num_threads(1)
    return rates(config)


def rates(config: Config, *, repeats: int = 5) -> dict[str, float]:
    """Entries of a cluster file for this machine, ``attained_tflops`` in the run's precision."""
    on_cpu = device().type == "cpu"
    with single_process() as parallel:
        small, _ = _layer(preset_config("tiny", **LAUNCHING), parallel, repeats=repeats)
        gathering = _gathering(parallel, repeats=repeats)
        # Shards are assumed to attain the rate of a whole layer.
        whole = replace(config, tensor_model_parallel_size=1, sequence_parallel=False)
        seconds, flops = _layer(whole, parallel, repeats=repeats)
    # Of a layer as small as the first the difference is noise, or negative.
    products = max(seconds - small * on_cpu, seconds / 2)
    source = torch.ones(COPIED // 4, device=device())
    target = torch.empty_like(source)
    copied = _median(lambda: target.copy_(source), repeats)
    return {
        f"attained_tflops.{precision(config)}": flops / products / 1e12,
        "memory_gb_s": 2 * COPIED / copied / 1e9,
        "operator_us": small / LAUNCHES * 1e6,
        "zero3_layer_us": gathering * 1e6,
    } | links(_activations(config), repeats=repeats)


def _layer(config: Config, parallel: Parallel, *, repeats: int) -> tuple[float, int]:
    """Seconds and operations of a dense layer, forward and backward."""
    layer = build_layer(config, DENSE, parallel)
    run = forward_backward(layer_output, layer, config)
    return _median(run, repeats), count_flops(run)


def _gathering(parallel: Parallel, *, repeats: int) -> float:
    """Seconds that ZeRO 3 adds to a layer and micro-batch where there is nobody to gather from: a step of the
    small layers with it, less one without ZeRO.
    """
    seconds = []
    for stage in (0, 3):
        config = preset_config("tiny", **LAUNCHING, zero_stage=stage, bf16=False)
        engine, run = training_step(config, DENSE, parallel, VOCABULARY, accumulation=MICRO_BATCHES)
        timed(run, 2)  # ZeRO 3 learns the order of the layers
        seconds.append(statistics.median(timed(run, 1) for _ in range(repeats)))
        stop_deepspeed(engine.deepspeed)
    without, with_zero_3 = seconds
    return max(with_zero_3 - without, 0.0) / (MICRO_BATCHES * config.model.num_layers)


def _activations(config: Config) -> int:
    """Numbers in those of a micro-batch between two layers; even."""
    model = config.model
    return config.training.micro_batch_size * model.seq_length * model.hidden_size // 2 * 2


def _median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one call over rounds of at least `ROUND`."""
    calls = math.ceil(ROUND / max(min(timed(run, 1), timed(run, 1)), 1e-5))
    return statistics.median(timed(run, calls) for _ in range(repeats))
