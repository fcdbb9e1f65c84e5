"""Carries out the changes that methods ask for on parameters, FP32 master weights and optimizer moments.

There is one function for each change in ``lowrank/methods/changes.py``. The records there define what happens
to values and moments.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.distributed.platform import release_memory
from inrank_megatron.engine import factor_updates, truncation, zero_state
from inrank_megatron.engine.factor_init import drawn_columns, norm_like
from inrank_megatron.engine.fragments import finish_writes
from inrank_megatron.engine.gradients import at_a_loss_scale
from inrank_megatron.engine.linears import FactorisedLayer
from inrank_megatron.engine.live_model import Batches, LiveModel
from inrank_megatron.engine.moments import fill_second_moment, kept_entries
from inrank_megatron.engine.truncation import Shards
from inrank_megatron.engine.weighing import weighing
from inrank_megatron.engine.zero_state import ParameterState
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import (
    Change,
    InitialiseFactors,
    LostCheck,
    MergeAndReinitialise,
    Refactor,
    SetRank,
)
from inrank_megatron.model.initialise import named_generator


def carry_out(live: LiveModel, changes: Iterable[Change], *, step: int, batches: Batches) -> None:
    """Carry out ``changes`` in order, after ``step`` completed steps. Collective."""
    changes = list(changes)
    writes = any(_writes(live, change) for change in changes)
    for change in changes:
        match change:
            case InitialiseFactors():
                initialise_factors(live, change, batches)
            case SetRank():
                set_rank(live, change, step)
            case LostCheck():
                lose_check(live, change, step)
            case MergeAndReinitialise():
                merge_and_reinitialise(live, change, step)
            case Refactor():
                refactor(live, change, step, batches)
            case _:
                raise TypeError(f"unknown change {change!r}")
        live.last_weighing = None  # it was of the weights before
    if writes:
        finish_writes()


def _writes(live: LiveModel, change: Change) -> bool:
    """Whether weights or moments change. A rank check that brings no new columns into use changes neither."""
    if isinstance(change, SetRank):
        return change.active_columns > _factorised(live, change.layer).module.active_columns
    return not isinstance(change, LostCheck)


def initialise_factors(live: LiveModel, change: InitialiseFactors, batches: Batches) -> None:
    """Fill every layer's active columns, before the first step."""
    for name, (left, right) in _first_columns(live, change, batches).items():
        _place(live.factorised[name], left, right, start=0, absorb=change.absorb)


def _first_columns(live: LiveModel, change: InitialiseFactors, batches: Batches) -> Shards:
    seed, initial_weight = live.config.training.seed, live.factory.initial_weight
    if change.source == "gradient":
        if change.column_norm is None:
            raise ValueError("columns from gradients need a column_norm")
        gradients = at_a_loss_scale(
            partial(_first_gradients, live, batches),
            scale=live.loss_scaling.scale,
            parallel=live.parallel,
            device=live.device,
        )
        return factor_updates.gradient_start(
            live.layers, gradients, live.parallel, column_norm=change.column_norm, seed=seed
        )
    if change.source == "spectral":
        return factor_updates.spectral_start(live.layers, initial_weight, live.parallel)
    shards = {}
    for name, layer in live.layers.items():
        source, norm = str(change.source), change.column_norm
        if source == "random-like-weight":
            source, norm = "random", norm_like(initial_weight(name), layer.active_columns)
        generator = named_generator(seed, f"{name}/first columns")
        shards[name] = drawn_columns(layer, layer.active_columns, source, norm=norm, generator=generator)
    return shards


def _first_gradients(live: LiveModel, batches: Batches, scale: float) -> dict[str, Tensor]:
    """The gradient of the loss of global batch 0 with respect to every W0."""
    live.parallel.seed_random(seed=live.config.training.seed, step=0)
    losses = (live.loss(live.model, batch) for batch in batches(0))
    return factor_updates.weight_gradients(live.model, live.layers, losses, live.parallel, scale=scale)


def set_rank(live: LiveModel, change: SetRank, step: int) -> None:
    """Set a layer's decided rank, and fill the columns that this brings into use."""
    layer = _factorised(live, change.layer)
    module = layer.module
    start, grown = module.active_columns, change.rank > layer.spec.rank
    if (change.rank, change.active_columns) == (layer.spec.rank, start):
        return  # the usual outcome of a check
    layer.spec = replace(
        layer.spec,
        rank=change.rank,
        active_columns=change.active_columns,
        grown_at=step if grown else layer.spec.grown_at,
    )
    if change.active_columns == start:
        return
    left, right = drawn_columns(
        module,
        change.active_columns - start,
        change.source,
        norm=change.column_norm,
        generator=named_generator(live.config.training.seed, f"{change.layer}/columns from {start}"),
    )
    if change.moments == "mean":
        for parameter, dim in ((module.U, 1), (module.V, 0)):
            fill_second_moment(parameter, dim, start, change.active_columns)
    module.activate(change.active_columns)
    _place(layer, left, right, start=start, absorb=change.absorb)


def lose_check(live: LiveModel, change: LostCheck, step: int) -> None:
    """Count a layer as one that may have grown at ``step``."""
    layer = _factorised(live, change.layer)
    layer.spec = replace(layer.spec, grown_at=step)


def _factorised(live: LiveModel, name: str) -> FactorisedLayer:
    """The same as ``live.factorised[name]``, which loops over all layers at each call."""
    layer = live.linears[name]
    assert isinstance(layer, FactorisedLayer), f"{name} is not factorised"
    return layer


def _place(layer: FactorisedLayer, left: Tensor, right: Tensor, *, start: int, absorb: bool) -> None:
    """Write columns from ``start`` on, and record them as initial values if the layer tracks these."""
    left, right = factor_updates.place_columns(layer.module, left, right, start=start, absorb=absorb)
    if layer.initial is not None:
        columns = slice(start, start + left.shape[1])
        u0, v0 = layer.initial
        u0[:, columns], v0[columns] = left, right


def merge_and_reinitialise(live: LiveModel, change: MergeAndReinitialise, step: int) -> None:
    """Merge every layer's factors into W0 and initialise them again."""
    seed = live.config.training.seed
    for name, layer in live.layers.items():
        factor_updates.merge(layer)
        generator = named_generator(seed, f"{name}/restart at {step}")
        u, v = drawn_columns(layer, layer.active_columns, "zero-product", generator=generator)
        for leaf, value in (("U", u), ("V", v)):
            parameter = getattr(layer, leaf)
            generator = named_generator(seed, f"{name}.{leaf}/moments at {step}")
            moments = _moments_after(change, parameter, layer.tp_group, generator)
            zero_state.write_state(parameter, ParameterState(value, moments))


def _moments_after(
    change: MergeAndReinitialise, parameter: Any, group: ProcessGroup, generator: torch.Generator
) -> dict[str, Tensor]:
    """The moments of a factor after the merge has reset some entries to zero."""
    moments = zero_state.read_state(parameter).moments
    if not moments:  # the optimizer keeps none
        return {}
    kept = kept_entries(
        list(moments.values())[-1].abs(),
        parameter.partition_dim,
        group,
        stride=parameter.partition_stride,
        reset=change.reset,
        share=change.share,
        generator=generator,
    )
    return {key: moment * kept for key, moment in moments.items()}


def refactor(live: LiveModel, change: Refactor, step: int, batches: Batches) -> None:
    """Build the second-phase model, and move all parameters that it keeps over, moments included."""
    truncated = truncation.truncated_weights(
        {name: live.linears[name] for name in change.target_columns},
        change.target_columns,
        weighing(live, change.metric, step=step, batches=batches),
        live.parallel,
        step=step,
    )
    live.last_weighing = None  # before two models lie on the device
    kept, steps = _states_that_stay(live, change), live.master_weights.steps()
    live.build(
        {
            name: FactorSpec(
                capacity=k, active_columns=k, rank=change.ranks[name], frozen_base=False, final=True
            )
            for name, k in change.target_columns.items()
        }
    )
    for name, (left, right) in truncated.items():
        zero_state.write_master_weight(live.layers[name].U, left)
        zero_state.write_master_weight(live.layers[name].V, right)
    for name, parameter in live.parameters():
        if name in kept:
            state = kept[name].map(lambda tensor: tensor.to(live.device))
            zero_state.write_state(parameter, state)
    live.master_weights.set_steps(steps | {"factors": 0})
    release_memory()  # most of what the first phase held is free by now


def _states_that_stay(live: LiveModel, change: Refactor) -> dict[str, ParameterState]:
    """Master weights and moments of all parameters except those that the switch replaces.

    On the CPU, so that the device does not hold them beside the states of the new model.
    """
    replaced = {f"{name}.{leaf}" for name in change.target_columns for leaf in live.linears[name].replaced}
    return {
        name: zero_state.read_state(parameter).map(Tensor.cpu)
        for name, parameter in live.parameters()
        if name not in replaced
    }
