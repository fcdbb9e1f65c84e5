"""A short training of a tiny GPT by one method on one layout of ranks; functions that ranks run."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.distributed.platform import device
from inrank_megatron.engine.decisions import decide
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine, StepResult
from inrank_megatron.engine.state import recorded_structure
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.registry import METHODS, make_method
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.training.pretrained import read_pretrained
from inrank_megatron.training.schedule import learning_rate
from tests.contract.cases import ACCUMULATION, CASES, GLOBAL_BATCH, SIZES, SWITCH
from tests.contract.layouts import Layout
from tests.groups import join
from tests.harness import at_end

VOCABULARY, PADDED = 500, 512
STAND_INS = Path(__file__).resolve().parent.parent / "stand_ins"
"""Holds an `apex` that keeps its state as NVIDIA's does."""


def counting_rows(seed: int, size: int = GLOBAL_BATCH) -> Tensor:
    """A global batch [size, 33] of sequences that count in threes, so that there is something to learn."""
    first = torch.randint(0, VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(seed))
    return (first + 3 * torch.arange(33)) % VOCABULARY


@dataclass
class Session:
    """A training in progress on this rank."""

    engine: Engine
    method: Method
    step: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    ranks: list[dict[str, int]] = field(default_factory=list)

    def batch(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of a step (from 0)."""
        training, parallel = self.engine.config.training, self.engine.parallel
        rows = counting_rows(step, training.global_batch_size).to(self.engine.device)
        for index in range(self.engine.accumulation):
            size = training.micro_batch_size
            first = (index * parallel.dp_size + parallel.dp_rank) * size
            own = rows[first : first + size]
            yield own[:, :-1], own[:, 1:]

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """Loss on a batch that no step trains on, the same on every rank."""
        rows = counting_rows(999).to(self.engine.device)
        return Engine.loss(self.engine.model, (rows[:, :-1], rows[:, 1:])).item()

    @property
    def is_final(self) -> bool:
        """Whether every factorisable linear has the rank that it will keep."""
        return all(view.final for view in self.engine.views())

    def start(self) -> "Session":
        self.engine.apply(self.method.initialisation(), step=0, batches=self.batch)
        return self

    def train(self, steps: int) -> "Session":
        for _ in range(steps):
            self.train_step()
            self.apply(self.decide())
        return self

    def train_step(self, **options) -> StepResult:
        """A step without the method's changes."""
        self.step += 1
        config, lr = self.engine.config, self.engine.config.optimizer.lr
        # ReLoRA's schedule is part of the method; others stay at the peak.
        if config.training.method == "relora":
            lr = learning_rate(self.step, config)
        result = self.engine.train_step(self.batch(self.step - 1), step=self.step, lr=lr, **options)
        self.losses.append(result.loss)
        self.grad_norms.append(result.grad_norm)
        return result

    def decide(self) -> list:
        """The method's changes after the present step."""
        decision = decide(self.engine, self.method, step=self.step, batches=self.batch)
        return [] if decision is None else list(decision.changes)

    def spectra(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Singular values by kind and layer."""
        views = {kind: self.engine.views(spectrum=kind, step=self.step) for kind in ("update", "product")}
        return {kind: {view.name: view.singular_values for view in views[kind]} for kind in views}

    def apply(self, changes: list) -> None:
        self.engine.apply(changes, step=self.step, batches=self.batch)
        self.ranks.append(dict(self.engine.ranks))


def configuration(name: str, layout: Layout, **changes) -> Config:
    return from_flat(
        {
            **SIZES,
            **CASES[name].settings,
            "tensor_model_parallel_size": layout.tensor_parallel,
            "sequence_parallel": layout.sequence_parallel,
            "micro_batch_size": GLOBAL_BATCH // (ACCUMULATION * layout.data_parallel),
            **changes,
        }
    )


def build(
    name: str,
    layout: Layout,
    *,
    switch: int = SWITCH,
    record: dict | None = None,
    pretrained: Path | None = None,
    deepspeed_json: dict | None = None,
    **changes,
) -> Session:
    """A session whose factors are still empty; with ``record`` one of the recorded structure, with
    ``pretrained`` one that starts from the weights of that checkpoint.
    """
    stop()
    if pretrained:
        changes["pretrained_checkpoint"] = str(pretrained)
    config = configuration(name, layout, **changes)
    if config.optimizer.optimizer == "apex-fused-adam" and str(STAND_INS) not in sys.path:
        sys.path.insert(0, str(STAND_INS))
    parallel = join(layout.tensor_parallel)
    by_step = METHODS[config.training.method].switches and config.inrank.switch_patience is None
    method = make_method(config, switch_step=switch if by_step else None)
    if record is None:
        structure = method.structure({key: min(shape) for key, shape in linear_shapes(config).items()})
    else:
        structure = recorded_structure(record)
    factory = GPTFactory(
        config,
        parallel,
        vocab_size=VOCABULARY,
        padded_vocab_size=PADDED,
        pretrained=read_pretrained(pretrained, config) if pretrained else None,
    )
    engine = Engine(
        factory,
        structure,
        config=config,
        parallel=parallel,
        device=device(),
        accumulation=ACCUMULATION,
        deepspeed_json=deepspeed_json,
    )
    for layer in engine.layers.values():
        layer.fused_collectives = layer.fused_collectives and not layout.separate_collectives
    _open.append(engine)
    at_end.append(stop)
    return Session(engine, method)


def stop() -> None:
    """End this rank's session, if there is one."""
    while _open:
        stop_deepspeed(_open.pop().deepspeed)


_open: list[Engine] = []
"""The engine of this rank's session before: its hooks outlive it unless it is stopped."""


def run(
    rank: int,
    world_size: int,
    name: str,
    layout: Layout,
    settings: dict,
    steps: int,
    given: list[list] | None = None,
) -> dict:
    """A whole training: loss, gradient norm, ranks and the method's changes of every step; with ``given``
    these changes are carried out instead.
    """
    session, changes = build(name, layout, **settings).start(), []
    for index in range(steps):
        session.train_step()
        changes.append(session.decide())
        session.apply(given[index] if given else changes[-1])
    return {
        "losses": session.losses,
        "grad_norms": session.grad_norms,
        "ranks": session.ranks,
        "changes": changes,
    }
