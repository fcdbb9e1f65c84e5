"""Do learned ranks come from the data? A small GPT against controls that have none, and in other settings.

``noise``: every gradient, the first batch's that factors start from too, is replaced by noise of the same
norm, entry by entry where it is not zero, so that columns out of use stay so. ``shuffled``: the tokens of
each global batch change places, so that only their frequencies are left to learn. The other variants change
one setting of the method each.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.config.topology import pad_vocabulary
from inrank_megatron.data.batches import TrainBatches
from inrank_megatron.data.prepare import PreparedData, prepare
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.engine import Engine
from inrank_megatron.experiments.driver import Batches, Outcome, chosen, re_estimated, train
from inrank_megatron.lowrank.methods.inrank import InRank
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.reporting.run import depth
from inrank_megatron.reporting.untrained import untrained_ranks

SETTINGS = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 64,
    "micro_batch_size": 16,
    "vocab_size": 1024,
    "init_method_std": 0.05,
    "lr": 2e-3,
    "lr_warmup_iters": 20,
    "method": InRank.name,
}
STEPS = 200
VARIANTS: dict[str, dict] = {
    "defaults": {},
    "noise for gradients": {"control": "noise"},
    "shuffled tokens": {"control": "shuffled"},
    "alpha 0.8": {"threshold": 0.8},
    "alpha 0.95": {"threshold": 0.95},
    "buffer 8": {"buffer": 8},
    "buffer 34": {"buffer": 34},
    "check interval 10": {"rank_check_interval": 10},
    "check interval 100": {"rank_check_interval": 100},
    "column norm 0.25": {"initial_column_norm": 0.25},
    "column norm 1": {"initial_column_norm": 1.0},
}


def learn(config: Config, parallel: Parallel, data: PreparedData, *, control: str | None) -> Outcome:
    """Train a small GPT on ``data``, with a control if one is named."""
    min_dims = {name: min(shape) for name, shape in linear_shapes(config).items()}
    return train(
        factory_of(config, parallel, data),
        min_dims,
        batches_of(config, data, shuffled=control == "shuffled"),
        config=config,
        parallel=parallel,
        prepare=noisy_gradients if control == "noise" else lambda engine: None,
    )


def factory_of(config: Config, parallel: Parallel, data: PreparedData) -> GPTFactory:
    """Of models for the vocabulary of ``data``, with drawn weights."""
    size = data.tokenizer.vocab_size
    padded = pad_vocabulary(size, multiple=config.model.make_vocab_size_divisible_by)
    return GPTFactory(config, parallel, vocab_size=size, padded_vocab_size=padded)


def batches_of(config: Config, data: PreparedData, *, shuffled: bool) -> Batches:
    """The training batches of a run; ``shuffled``: the tokens of each change places."""
    size, seed = config.training.micro_batch_size, config.training.seed
    stream = TrainBatches(data.train, seq_length=config.model.seq_length, global_batch_size=size, seed=seed)

    def batches(step: int) -> list[tuple[Tensor, Tensor]]:
        rows = torch.from_numpy(stream.rows(step, 0, size))
        if shuffled:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            rows = rows.flatten()[torch.randperm(rows.numel(), generator=generator)].view_as(rows)
        rows = rows.to(device())
        return [(rows[:, :-1], rows[:, 1:])]

    return batches


def noisy_gradients(engine: Engine) -> None:
    """From now on every gradient is noise of its norm: trained parameters', and those of W0 that factors may
    start from.
    """
    generator = torch.Generator(engine.device).manual_seed(engine.config.training.seed)

    def noise(gradient: Tensor) -> Tensor:
        drawn = torch.randn(gradient.shape, generator=generator, device=gradient.device)
        drawn *= gradient != 0
        return (drawn * (gradient.norm() / drawn.norm().clamp(min=1e-30))).to(gradient.dtype)

    for _, parameter in engine.parameters():
        parameter.register_hook(noise)
    for layer in engine.layers.values():
        if layer.weight is not None:
            layer.weight.requires_grad_(True)  # a frozen tensor takes no hook, but keeps one
            layer.weight.register_hook(noise)
            layer.weight.requires_grad_(False)


def measure(
    parallel: Parallel,
    seeds: Sequence[int],
    *,
    only: Sequence[str] | None,
    steps: int | None,
    multiplier: float,
    notify: Callable[[str], None],
) -> list[dict]:
    """A row for each variant.

    Ranks are means over the layers; lists have one entry a seed, ``by_block`` one a block. ``first_check``,
    ``refound``: the criterion's ranks of the spectra at the first and the last check if ranks could fall.
    Movements are against the first row.
    """
    base = SETTINGS | {"train_iters": steps or STEPS, "factor_lr_multiplier": multiplier}
    variants = chosen(VARIANTS, only)
    data = prepare(from_flat(base).data)
    rows: list[dict] = []
    for name, settings in variants.items():
        changes = {key: value for key, value in settings.items() if key != "control"}
        configs = [from_flat(base | changes | {"seed": seed}) for seed in seeds]
        found = [learn(c, parallel, data, control=settings.get("control")) for c in configs]
        rows.append({"variant": name} | _summary(found, configs[0], first=rows[0] if rows else None))
        notify(f"{name}: mean rank {rows[-1]['rank']}")
    return rows


def _by_block(found: list[Outcome]) -> list[float]:
    """The mean rank of each block, over its linears and the seeds."""
    ranks: dict[int, list[int]] = {}
    for one in found:
        for layer, rank in one.ranks.items():
            ranks.setdefault(depth(layer), []).append(rank)
    return [fmean(ranks[block]) for block in sorted(ranks)]


def _summary(found: list[Outcome], config: Config, *, first: dict | None) -> dict:
    threshold = config.inrank.threshold
    ranks = [fmean(one.ranks.values()) for one in found]
    again = [fmean(re_estimated(one.last, threshold=threshold)) for one in found]
    return {
        "untrained": fmean(untrained_ranks(config).values()),
        "first_check": [fmean(re_estimated(one.first, threshold=threshold)) for one in found],
        "rank": ranks,
        "by_block": [round(rank, 1) for rank in _by_block(found)],
        "moved_percent": 100 * (fmean(ranks) / fmean(first["rank"]) - 1) if first else 0.0,
        "refound": again,
        "refound_moved_percent": 100 * (fmean(again) / fmean(first["refound"]) - 1) if first else 0.0,
        "loss": [fmean(one.losses[-20:]) for one in found],
    }
