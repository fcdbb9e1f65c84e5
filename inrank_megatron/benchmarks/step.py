"""Time of a full training step (forward, backward, AdamW under DeepSpeed) against dense in the same rounds.

``limit`` of a time is the dense time times the ratio of operations (matrix products of the step). The time
over a plain PyTorch loop is that of dense steps in FP32 on 4096 tokens, the median over pairs; on a CPU it is
the process's own (CPU time, of its code and of the system for it).
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inrank_megatron.benchmarks.blocks import DENSE, Variant, fill_factors, preset_config, single_process
from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.benchmarks.layer import layer_variants
from inrank_megatron.benchmarks.plain_loop import plain_step
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.timing import Times, interleaved
from inrank_megatron.config.costs import flops_per_token
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.model.gpt import GPTFactory

VOCABULARIES = {"tiny": 4096}
GPT2_VOCABULARY = 50304
"""GPT-2's 50,257 tokens, padded to a multiple of 128."""
PLAIN_TOKENS = 4096
"""Of a batch, as the quickstart has them: with few, copies around the optimizer weigh more than in a run."""
LR = 1e-6


class _RandomFactors(GPTFactory):
    """Models whose factors are not zero when DeepSpeed copies them into its masters."""

    def build(self, factors):
        model = super().build(factors)
        fill_factors(model)
        return model


def measure(preset: str, rank: int, *, repeats: int) -> Iterator[Row]:
    """Rows for every variant; all their engines are in memory at once, so that they take turns."""
    vocabulary = VOCABULARIES.get(preset, GPT2_VOCABULARY)
    config = preset_config(preset)
    variants = layer_variants(preset, rank)
    tokens = config.model.seq_length * config.training.micro_batch_size
    with single_process() as parallel:
        over_plain = _over_plain_loop(preset, parallel, vocabulary, repeats=repeats)
        runs = {v.name: training_step(config, v, parallel, vocabulary)[1] for v in variants}
        flops = {name: count_flops(run) for name, run in runs.items()}
        times = interleaved(runs, repeats=repeats)
    for variant in variants:
        name, case = variant.name, f"step {preset} {variant.name}"
        share = flops[name] / flops[DENSE.name]
        formula = flops_per_token(config, vocabulary, ranks=variant.columns, frozen_base=variant.frozen_base)
        yield Row(case, "FLOP per step", flops[name], formula * tokens, share)
        limit = times.median(DENSE.name) * share
        ratio = times.ratio(name, DENSE.name)
        yield Row(case, "seconds a step", times.median(name), limit, ratio)
        yield Row(case, "tokens per second", tokens / times.median(name), tokens / limit, 1 / ratio)
        if variant is DENSE:
            median, (low, high) = over_plain.ratio("engine", "plain"), over_plain.interval("engine", "plain")
            yield Row(case, "time over a plain PyTorch loop", median, 1.0)
            yield Row(case, "the same, 95 % interval from", low)
            yield Row(case, "the same, 95 % interval to", high)


def training_step(
    config: Config, variant: Variant, parallel: Parallel, vocabulary: int, *, accumulation: int = 1
) -> tuple[Engine, Callable[[], object]]:
    """An engine, and a function that trains it one step on random tokens."""
    factory = _RandomFactors(config, parallel, vocab_size=vocabulary, padded_vocab_size=vocabulary)
    engine = Engine(
        factory,
        variant.factors(config),
        config=config,
        parallel=parallel,
        device=device(),
        accumulation=accumulation,
    )
    batch = _batch(config, vocabulary)
    return engine, lambda: engine.train_step([batch] * accumulation, step=1, lr=LR)


def _over_plain_loop(preset: str, parallel: Parallel, vocabulary: int, *, repeats: int) -> Times:
    """Of a dense step of the engine and of the plain loop by turns, in FP32, on the same batch."""
    rows = PLAIN_TOKENS // preset_config(preset).model.seq_length
    config = preset_config(preset, bf16=False, micro_batch_size=rows, global_batch_size=rows)
    engine, step = training_step(config, DENSE, parallel, vocabulary)
    plain = plain_step(config, vocabulary, _batch(config, vocabulary), lr=LR)
    clock = time.process_time if device().type == "cpu" else time.perf_counter
    times = interleaved({"engine": step, "plain": plain}, repeats=repeats, clock=clock)
    stop_deepspeed(engine.deepspeed)
    return times


def _batch(config: Config, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, S] on this process's device, the same in each call."""
    shape = (config.training.micro_batch_size, config.model.seq_length + 1)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device())
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
