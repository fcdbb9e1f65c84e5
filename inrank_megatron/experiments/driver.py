"""A training reduced to what decides on ranks: steps of the engine, and a method's checks between them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine import deepspeed_setup
from inrank_megatron.engine.decisions import decide
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.live_model import MicroBatch, ModelFactory
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.criteria.explained_ratio import grow, update_ratio
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import LayerView
from inrank_megatron.lowrank.methods.registry import make_method
from inrank_megatron.training.schedule import learning_rate

Batches = Callable[[int], Iterable[MicroBatch]]
"""The micro-batches of a step (from 0), on the engine's device."""


@dataclass
class Outcome:
    """What a training without a switch leaves.

    ``first``, ``last``: the layers as the first and the last check saw them; ``ranks``: after the last.
    """

    first: list[LayerView] = field(default_factory=list)
    last: list[LayerView] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def train(
    factory: ModelFactory,
    min_dims: Mapping[str, int],
    batches: Batches,
    *,
    config: Config,
    parallel: Parallel,
    prepare: Callable[[Engine], None] = lambda engine: None,
) -> Outcome:
    """Train by the method of ``config``; ``min_dims`` as for ``Method.structure``.

    ``prepare`` is called with the engine before its factors have their first values.

    Raises:
        UserError: the training ends before the first rank check.
    """
    if config.training.train_iters < config.inrank.rank_check_interval:
        raise UserError(
            f"{config.training.train_iters} steps: the first rank check comes after "
            f"{config.inrank.rank_check_interval}; give more --steps"
        )
    method, outcome = make_method(config, switch_step=None), Outcome()
    structure: Mapping[str, FactorSpec] = method.structure(min_dims)
    engine = Engine(factory, structure, config=config, parallel=parallel, device=device(), accumulation=1)
    prepare(engine)
    engine.apply(method.initialisation(), step=0, batches=batches)
    for step in range(1, config.training.train_iters + 1):
        result = engine.train_step(batches(step - 1), step=step, lr=learning_rate(step, config))
        outcome.losses.append(result.loss)
        if decision := decide(engine, method, step=step, batches=batches):
            outcome.last = list(decision.views)
            outcome.first = outcome.first or outcome.last
            engine.apply(decision.changes, step=step, batches=batches)
    outcome.ranks = dict(engine.ranks)
    deepspeed_setup.stop_deepspeed(engine.deepspeed)
    return outcome


def smallest_rank(values: Sequence[float], *, threshold: float, length: int) -> int:
    """The smallest rank from 1 upward that explains enough of a spectrum: a rank that may also fall."""
    return grow(lambda r: update_ratio(values, r, length=length), 1, threshold=threshold, limit=length).rank


def re_estimated(views: Iterable[LayerView], *, threshold: float) -> list[int]:
    """:func:`smallest_rank` of every layer."""
    return [smallest_rank(v.singular_values, threshold=threshold, length=v.min_dim) for v in views]


def chosen(variants: Mapping[str, dict], only: Sequence[str] | None) -> dict[str, dict]:
    """The variants of an experiment that are named; None: all."""
    for name in only or ():
        if name not in variants:
            raise UserError(f"--only {name!r}: there is no such variant; the names are {list(variants)}")
    return {name: variants[name] for name in only or variants}
