"""Speed at which transformers' ``generate`` decodes with its KV cache: factorised exports against dense.

Second-phase models, random weights in FP32; every MLP linear has the rank at which its factors have the named
share of its parameters. Prompts of 8 tokens, 64 new ones, greedy. ``limit`` of the speed is the dense speed
over the share of the weights that one step reads; the gap is what else takes time. On a CPU with one thread
seconds are the process's own (CPU time), which other programs on the machine hardly change. The vocabulary
has 50,304 tokens (tiny: 4096), whatever the preset.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from inrank_megatron.benchmarks.blocks import preset_config
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.step import GPT2_VOCABULARY, VOCABULARIES
from inrank_megatron.benchmarks.timing import Times, interleaved
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.distributed.platform import device
from inrank_megatron.interop.core.weights import Weights, weight_shapes
from inrank_megatron.interop.huggingface.factorised import in_memory
from inrank_megatron.lowrank.layers.spec import FactorSpec

SHARES: Mapping[str, float] = {"dense": 1.0, "half the MLP": 0.5, "a third of the MLP": 1 / 3}
"""What is left of the parameters of each MLP linear."""
BATCHES = (1, 8)
PROMPT, NEW = 8, 64
"""Tokens."""


def measure(preset: str, *, repeats: int) -> Iterator[Row]:
    """Rows for every share and batch size; all models are in memory at once, so that they take turns."""
    config, vocabulary = preset_config(preset, bf16=False), VOCABULARIES.get(preset, GPT2_VOCABULARY)
    models = {name: _model(config, vocabulary, share) for name, share in SHARES.items()}
    weights = {name: _read_a_step(model) for name, model in models.items()}
    for batch in BATCHES:
        prompt = torch.randint(vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        runs = {name: partial(generate, model, prompt.to(device())) for name, model in models.items()}
        times = interleaved(runs, repeats=repeats, clock=_clock())
        for name in SHARES:
            yield from _rows(f"{preset}, {name}, batch {batch}", name, weights, times, tokens=batch * NEW)


@torch.inference_mode()
def generate(model, prompt: torch.Tensor) -> torch.Tensor:
    """``prompt`` [B, P] with ``NEW`` further tokens, whatever they are."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        pad_token_id=0,
    )


def _rows(case: str, name: str, weights: Mapping[str, int], times: Times, *, tokens: int) -> Iterator[Row]:
    share, ratio = weights[name] / weights["dense"], times.ratio(name, "dense")
    yield Row(case, "weights read a step", weights[name], None, share)
    speed = tokens / times.median(name)
    yield Row(case, "tokens per second", speed, tokens / (times.median("dense") * share), 1 / ratio)


def _model(config: Config, vocabulary: int, share: float):
    """The model of transformers on this process's device, its MLP dense where ``share`` is 1."""
    factors = {}
    for linear, (out, inp) in linear_shapes(config).items() if share < 1 else ():
        rank = round(share * out * inp / (out + inp))
        factors[linear] = FactorSpec(rank, rank, rank, frozen_base=False, final=True)
    shapes, generator = weight_shapes(config, vocabulary, factors), torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator).mul_(config.model.init_method_std)

    return in_memory(Weights("random weights", config, vocabulary, factors, read)).to(device())


def _read_a_step(model) -> int:
    """Entries of all matrices that multiply an activation: all but embeddings, of which a step reads rows."""
    embedding = model.get_input_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
    tied = model.get_output_embeddings().weight is embedding
    return matrices + (embedding.numel() if tied else 0)


def _clock() -> Callable[[], float]:
    alone = device().type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter
