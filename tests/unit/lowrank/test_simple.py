"""The one-page InRank, and the real method and engine against it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.decisions import decide
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.lowrank import simple
from inrank_megatron.lowrank.layers.factorised import ColumnParallelFactorised, RowParallelFactorised
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.linalg.new_columns import full_columns
from inrank_megatron.lowrank.methods.registry import make_method
from inrank_megatron.model.initialise import named_generator
from tests.groups import join
from tests.harness import run_ranks

WIDTH, BATCH, STEPS, SWITCH = 24, 16, 40, 24
SHAPES = {"fc1": (2 * WIDTH, WIDTH), "fc2": (WIDTH, 2 * WIDTH)}
SETTINGS = {
    "num_layers": 1,
    "hidden_size": WIDTH,
    "ffn_hidden_size": 2 * WIDTH,
    "num_attention_heads": 1,
    "seq_length": 1,
    "micro_batch_size": BATCH,
    "train_iters": STEPS,
    "method": "inrank-efficient",
    "inrank_preset": "paper",
    "rank_check_interval": 4,
    "buffer": 4,
    "max_rank": 16,
    "initial_column_norm": 0.1,
    "lr": 1e-2,
    "weight_decay": 0.01,
    "clip_grad": 0.0,
}


def initial_weight(name: str) -> Tensor:
    return torch.empty(SHAPES[name]).normal_(0.0, 0.2, generator=named_generator(0, name))


def batches() -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a network of the same shape, whose matrices have rank 6."""
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.randn(o, 6, generator=generator) @ torch.randn(6, i, generator=generator) / 6
        for o, i in SHAPES.values()
    )
    inputs = torch.randn(STEPS, BATCH, WIDTH, generator=generator)
    return [(x, gelu(x @ first.T) @ second.T) for x in inputs]


class Simple(nn.Module):
    def __init__(self, specs: Mapping[str, FactorSpec]):
        super().__init__()
        for name, (o, i) in SHAPES.items():
            dense, spec = nn.Linear(i, o, bias=False), specs[name]
            dense.weight.data = initial_weight(name)
            buffer = spec.active_columns - spec.rank
            layer = simple.InRankLinear(dense, rank=spec.rank, buffer=buffer, capacity=spec.capacity)
            self.add_module(name, layer)
        self.scale = nn.Parameter(torch.ones(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x))) * self.scale[:, 0]


class Sharded(nn.Module):
    """The same network of the package's layers, called as the engine calls a language model."""

    def __init__(self, specs: Mapping[str, FactorSpec], parallel: Parallel):
        super().__init__()
        self.embedding = nn.Identity()
        config = SimpleNamespace(sequence_parallel=False, params_dtype=torch.float32)
        for name, kind in (("fc1", ColumnParallelFactorised), ("fc2", RowParallelFactorised)):
            o, i = SHAPES[name]
            layer = kind(i, o, config=config, bias=False, factors=specs[name], tp_group=parallel.tp_group)
            self.add_module(name, layer)
        self.scale = nn.Parameter(torch.ones(WIDTH, 1))

    def forward(self, x: Tensor, positions: Tensor, mask: None, *, labels: Tensor) -> Tensor:
        y = self.fc2(gelu(self.fc1(self.embedding(x)[None])[0]))[0][0]
        return (y * self.scale[:, 0] - labels).square()


@dataclass(frozen=True)
class Factory:
    parallel: Parallel
    linear_shapes = SHAPES

    def build(self, factors: Mapping[str, FactorSpec]) -> nn.Module:
        model = Sharded(factors, self.parallel)
        for name, spec in factors.items():
            if spec.frozen_base:
                model.get_submodule(name).weight.data.copy_(initial_weight(name))
        return model

    def initial_weight(self, name: str) -> Tensor:
        return initial_weight(name)


@dataclass
class Record:
    """Loss and ranks of every step; after each check, and at the end, the matrices ``W0 + U V``."""

    losses: list[float]
    ranks: list[list[int]]
    weights: list[Tensor]

    def add(self, step: int, loss: float, ranks: list[int], layers, base: str) -> None:
        self.losses.append(loss)
        self.ranks.append(ranks)
        if step % 4 == 0:
            for layer in layers:
                w0 = getattr(layer, base)
                self.weights.append((layer.U @ layer.V + (0 if w0 is None else w0)).detach())


def train_simple(config: Config, specs: Mapping[str, FactorSpec]) -> Record:
    """By the page, with the columns that the engine draws."""
    model, record = Simple(specs), Record([], [], [])
    names = {model.fc1: "fc1", model.fc2: "fc2"}

    def draw(layer: simple.InRankLinear, start: int, stop: int) -> tuple[Tensor, Tensor]:
        name = names[layer]
        generator = named_generator(config.training.seed, f"{name}/columns from {start}")
        norm, capacity = config.inrank.new_column_norm, layer.U.shape[1]
        return full_columns(
            SHAPES[name], stop - start, "random", capacity=capacity, norm=norm, generator=generator
        )

    def adam(parameters):
        o = config.optimizer
        betas = o.adam_beta1, o.adam_beta2
        return torch.optim.AdamW(parameters, o.lr, betas=betas, eps=o.adam_eps, weight_decay=o.weight_decay)

    for step, loss, layers in simple.train(
        model,
        batches(),
        simple.squared_error,
        adam,
        epsilon=config.inrank.initial_column_norm,
        alpha=config.inrank.threshold,
        interval=config.inrank.rank_check_interval,
        switch_step=SWITCH,
        draw=draw,
    ):
        record.add(step, loss, [layer.rank for layer in layers], layers, "W0")
    return record


def train_both(rank: int, world_size: int, settings: dict) -> tuple[Record, Record]:
    config, parallel = from_flat(SETTINGS | settings), join(1)
    method = make_method(config, switch_step=SWITCH)
    specs = method.structure({name: min(shape) for name, shape in SHAPES.items()})
    engine = Engine(
        Factory(parallel), specs, config=config, parallel=parallel, device=torch.device("cpu"), accumulation=1
    )
    data, record = batches(), Record([], [], [])

    def batch(index: int) -> list[tuple[Tensor, Tensor]]:
        return [data[index]]

    engine.apply(method.initialisation(), step=0, batches=batch)
    for step in range(1, STEPS + 1):
        loss = engine.train_step(batch(step - 1), step=step, lr=config.optimizer.lr).loss
        if decision := decide(engine, method, step=step, batches=batch):
            engine.apply(decision.changes, step=step, batches=batch)
        record.add(step, loss, list(engine.ranks.values()), engine.layers.values(), "weight")
    stop_deepspeed(engine.deepspeed)
    return record, train_simple(config, specs)


@pytest.mark.parametrize("settings", [{}, {"rank_check_interval": 5, "threshold": 0.95}], ids=str)
def test_engine_trains_as_the_page_does(settings):
    """The same ranks at every check, and losses and matrices alike, through growth and the switch."""
    [(real, page)] = run_ranks(train_both, 1, settings)
    assert real.ranks == page.ranks
    assert real.ranks[0] != real.ranks[SWITCH - 1], "no rank grew"
    torch.testing.assert_close(torch.tensor(real.losses), torch.tensor(page.losses), rtol=1e-5, atol=1e-6)
    for here, there in zip(real.weights, page.weights, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def test_explained_ratio_is_equation_7():
    """By hand: the variance of 3, 1 is 1, that of 9, 7, 3, 1 is 10; of 1, 0 it is 1 / 4."""
    s = torch.tensor([9.0, 7.0, 3.0, 1.0])
    assert simple.explained_ratio(s, 2, 2) == pytest.approx(1 - 1 / 10)
    assert simple.explained_ratio(s, 3, 2) == pytest.approx(1 - 0.25 / 12)
    assert simple.explained_ratio(torch.zeros(4), 2, 2) == 1.0


def test_toy_problem_finds_the_rank_and_a_loss_like_that_of_dense(capsys):
    simple.main()
    *checks, last = capsys.readouterr().out.splitlines()
    at_the_switch = next(line for line in checks if line.startswith("step 300"))
    assert at_the_switch.endswith("ranks [4, 4]")
    low_rank, dense = (float(value) for value in re.findall(r"(?:loss|dense:) ([\d.]+)", last))
    assert low_rank < 2 * dense
