"""Runs on ranks for test_evaluate: the product's evaluation next to a plain loop over the same tokens."""

import dataclasses
import math

import numpy as np
import torch

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.topology import topology_of
from inrank_megatron.data.batches import EvalWindows
from inrank_megatron.data.token_file import TokenFile
from inrank_megatron.distributed.process_groups import initialise
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.training.evaluate import evaluate
from tests.harness import at_end

SEQUENCE, TOKENS, WORDS, VOCABULARY = 16, 150, 40, 257


class Tokens:
    """150 tokens in memory, where a run has a token file."""

    def __init__(self):
        self.values = np.random.default_rng(5).integers(0, VOCABULARY, TOKENS)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


def windows() -> EvalWindows:
    """Ten windows, of which the last has 5 targets of 16."""
    file = TokenFile("memory", ((Tokens(), 0, TOKENS),), num_sequences=1, num_documents=1, num_words=WORDS)
    return EvalWindows(file, seq_length=SEQUENCE)


def results(rank: int, world_size: int, tp: int, zero_stage: int = 1) -> tuple[list[dict], float | None]:
    """Evaluations of 10 and of 3 windows, by 1 and by 4 rows; on one rank also the plain loop's loss."""
    engine = _engine(world_size, tp, zero_stage)
    found = [evaluate(engine, windows(), rows=rows, limit=limit) for limit in (10, 3) for rows in (1, 4)]
    found += [evaluate(engine, windows(), rows=1, limit=4)]
    full = evaluate(engine, windows(), rows=1, limit=10, part=4)
    assert full.part == found[-1] and dataclasses.replace(full, part=None) == found[0]
    stopped = evaluate(engine, windows(), rows=1, limit=10, stop=lambda: True)
    assert stopped is None and engine.model.training
    return [dataclasses.asdict(result) for result in found], _plain_loss(engine) if world_size == 1 else None


def _engine(world_size: int, tp: int, zero_stage: int) -> Engine:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": SEQUENCE}
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 4}
    config = from_flat(
        {**sizes, **batch, "tensor_model_parallel_size": tp, "init_method_std": 0.2, "zero_stage": zero_stage}
    )
    parallel = initialise(backend="gloo", tensor_model_parallel_size=tp)
    topology = topology_of(config, world_size=world_size, vocab_size=VOCABULARY)
    factory = GPTFactory(
        config, parallel, vocab_size=VOCABULARY, padded_vocab_size=topology.padded_vocab_size
    )
    parallel.seed_random(seed=0, step=0)
    engine = Engine(
        factory,
        {},
        config=config,
        parallel=parallel,
        device=torch.device("cpu"),
        accumulation=topology.accumulation_steps,
        # Under ZeRO 3 each forward pass gathers even parameters as small as these.
        deepspeed_json={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )
    at_end.append(lambda: stop_deepspeed(engine.deepspeed))
    return engine


@torch.no_grad()
def _plain_loss(engine: Engine) -> float:
    tokens = torch.from_numpy(Tokens().values)
    total = 0.0
    for start in range(0, TOKENS - 1, SEQUENCE):
        part = tokens[start : start + SEQUENCE + 1][None]
        total += engine.token_losses(engine.model, (part[:, :-1], part[:, 1:])).double().sum().item()
    assert math.isfinite(total)
    return total / (TOKENS - 1)
