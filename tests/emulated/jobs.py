"""Jobs on the emulated device; top-level functions that ``run_emulated`` calls."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from inrank_megatron.data.batches import EvalWindows
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.evaluation.perplexity import total_loss
from inrank_megatron.evaluation.windows import SlidingWindows
from inrank_megatron.interop.core.gpt import gpt_logits
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.training.evaluate import evaluate
from tests.contract.cases import ACCUMULATION
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import PADDED, VOCABULARY, configuration
from tests.emulated.device import device, rank_of
from tests.emulated.rules import Collective, Wait
from tests.emulated.trainings import Tokens


@dataclass(frozen=True)
class Joined:
    """What a rank has done until it has its groups; ``store_seconds``: how long its store waits for a key."""

    collectives: list[Collective]
    waits: list[Wait]
    store_seconds: float


def joining() -> Joined:
    """As the last of four ranks, which came in the last second of the meeting."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with rank_of(3, 4, 2, store=store) as (_, log):
        collectives, waits = log.collectives.get("start", []), log.waits.get("start", [])
        return Joined(collectives, waits, store.timeout.total_seconds())


@dataclass(frozen=True)
class Stepped:
    """``waits``: by phase, ``step`` or ``evaluation`` or ``perplexity``. ``questions``: whether to stop."""

    waits: dict[str, list[Wait]]
    passes: int
    questions: int


class Text(Tokens):
    """17 windows of 32 targets, and a part of one."""

    num_tokens, num_words = 17 * 32 + 5, None


def stepping() -> Stepped:
    """A step of ZeRO 3 that keeps no parameter whole, then evaluations, as rank 1 of two replicas."""
    layout = LAYOUTS["DP2"]
    with rank_of(1, layout.world_size, layout.tensor_parallel) as (parallel, log):
        config = configuration("inrank", layout, num_layers=1, zero_stage=3, bf16=True)
        factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=PADDED)
        engine = Engine(
            factory,
            dict.fromkeys(factory.linear_shapes, FactorSpec(capacity=32, active_columns=10, rank=2)),
            config=config,
            parallel=parallel,
            device=device(),
            accumulation=ACCUMULATION,
            deepspeed_json={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        )
        tokens = torch.zeros(2, 32, dtype=torch.int64, device=device())
        log.phase, questions = "step", []
        engine.train_step([(tokens, tokens)] * ACCUMULATION, step=1, lr=1e-3)
        log.phase, windows = "evaluation", EvalWindows(Text(), seq_length=32)
        evaluate(engine, windows, rows=1, limit=len(windows), stop=lambda: bool(questions.append(None)))
        log.phase = "perplexity"
        forward = gpt_logits(engine.model, vocab_size=VOCABULARY)
        sliding = SlidingWindows(Text(), seq_length=32, stride=32)
        total_loss(forward, sliding, rows=5, parallel=parallel, device=device())
        stop_deepspeed(engine.deepspeed)
        return Stepped(log.waits, len(windows) // layout.world_size, len(questions))
