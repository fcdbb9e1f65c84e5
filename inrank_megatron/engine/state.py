"""An engine's state as full named tensors, of which each rank writes slices (``held.py``), and a JSON record;
and back, at any tensor- and data-parallel size and ZeRO stage.

Tensor names: the parameter's own for its FP32 master, with ``.exp_avg`` and ``.exp_avg_sq`` for Adam's
moments; ``<layer>.weight`` for a frozen W0 in its own dtype; ``<layer>.U0`` and ``<layer>.V0`` for initial
factor values.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from inrank_megatron.checkpoint.accounting import differences
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine import zero_state
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import finish_writes, write_value
from inrank_megatron.engine.zero_state import ParameterState
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.model.initialise import full_shape, shard
from inrank_megatron.model.vocabulary import FullTensors


def engine_record(engine: Engine) -> dict:
    """What :func:`load_engine` needs next to the tensors: structure, ranks, step counts, the loss scale."""
    return {
        "factors": {name: spec.to_record() for name, spec in engine.factor_specs().items()},
        "optimizer_steps": engine.master_weights.steps(),
        "loss_scaling": engine.loss_scaling.record(),
    }


def recorded_structure(record: Mapping) -> dict[str, FactorSpec]:
    """The structure to build the engine with that :func:`load_engine` fills."""
    return {name: FactorSpec.from_record(spec) for name, spec in record["factors"].items()}


@torch.no_grad()
def load_engine(engine: Engine, record: Mapping, source: FullTensors, *, weights_only: bool = False) -> None:
    """Fill an engine that was built with the recorded structure.

    Args:
        source: full tensors, exactly those that the engine has.
        weights_only: there are no moments in ``source`` and no counts in ``record``: the optimizer and the
            loss scale stay as they begin. Factors whose initial values ``source`` lacks begin here.

    Raises:
        UserError: before anything is filled; it names the tensors that are absent or of another shape.
    """
    parameters, frozen, initial = dict(engine.parameters()), _frozen_weights(engine), _initial_values(engine)
    moments = () if weights_only else engine.master_weights.kind.moments
    optional = initial.keys() if weights_only else set()
    _account(stored_shapes(engine, moments), source, optional=optional)
    for name, parameter in parameters.items():
        names = [f"{name}{suffix}" for suffix in _suffixes(moments)]
        shards = {key: _shard(tensor, parameter, engine) for key, tensor in source.tensors(names)}
        if weights_only:
            zero_state.write_master_weight(parameter, shards[name])
        else:
            state = ParameterState(shards[name], {key: shards[f"{name}.{key}"] for key in moments})
            zero_state.write_state(parameter, state)
    for name, tensor in source.tensors(list(frozen)):
        write_value(frozen[name], _shard(tensor, frozen[name], engine))
    stored = {name: name if name in source.names else name.removesuffix("0") for name in initial}
    for name, (target, factor) in initial.items():
        [(_, tensor)] = source.tensors([stored[name]])
        target.copy_(_shard(tensor, factor, engine))
    finish_writes()
    if not weights_only:
        engine.master_weights.set_steps(record["optimizer_steps"])
        engine.loss_scaling.load(record["loss_scaling"])


def stored_shapes(engine: Engine, moments: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shape of every full tensor of the state by name, with these moments of each parameter."""
    suffixes, frozen, initial = _suffixes(moments), _frozen_weights(engine), _initial_values(engine)
    like = {f"{name}{suffix}": x for suffix in suffixes for name, x in engine.parameters()} | frozen
    like |= {name: factor for name, (_, factor) in initial.items()}
    return {name: stored_shape(x, engine.parallel) for name, x in like.items()}


def _suffixes(moments: Iterable[str]) -> tuple[str, ...]:
    return ("", *(f".{key}" for key in moments))


def _frozen_weights(engine: Engine) -> dict[str, Tensor]:
    return {f"{name}.weight": x.weight for name, x in engine.layers.items() if x.weight is not None}


def _initial_values(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensor name -> initial value of a factor, and the factor, which is sharded as it is."""
    return {
        f"{name}.{leaf}": (value, getattr(engine.layers[name], leaf[0]))
        for name, pair in engine.initial.items()
        for leaf, value in zip(("U0", "V0"), pair, strict=True)
    }


def _account(
    expected: Mapping[str, tuple[int, ...]], source: FullTensors, *, optional: Collection[str]
) -> None:
    """Every tensor of ``source`` has its place in the engine, and it lacks none but ``optional`` ones."""
    there = {name: source.shape(name) for name in source.names}
    wanted = {name: shape for name, shape in expected.items() if name in there or name not in optional}
    if differing := differences(there, wanted):
        raise UserError(
            f"{source.folder}: tensors that differ from those of this run's model and optimizer: "
            f"{differing}; resume with the configuration that wrote it"
        )


def stored_shape(like: Tensor, parallel: Parallel) -> tuple[int, ...]:
    """Shape of the full tensor that a checkpoint has for ``like``, without rows that pad a vocabulary."""
    rows, *others = full_shape(like, parallel)
    return (getattr(like, "true_rows", rows), *others)


def _shard(tensor: Tensor, like: Tensor, engine: Engine) -> Tensor:
    padding = full_shape(like, engine.parallel)[0] - tensor.shape[0]
    if padding:
        tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
    return shard(tensor, like, engine.parallel).to(like.device)
