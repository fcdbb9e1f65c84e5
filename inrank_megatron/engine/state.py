"""An engine's state as full named tensors, of which each rank writes slices (``held.py``), and a JSON record;
and back, at any tensor- and data-parallel size and ZeRO stage.

Tensor names: the parameter's own for its FP32 master, with ``.exp_avg`` and ``.exp_avg_sq`` for Adam's
moments, ``.momentum_buffer`` for Muon's and SGD's; ``<layer>.weight`` for a frozen W0 in its own dtype;
``<layer>.U0`` and ``<layer>.V0`` for initial factor values.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from inrank_megatron.checkpoint.accounting import differences
from inrank_megatron.checkpoint.slices import Box
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import finish_writes, read_value, write_value
from inrank_megatron.engine.held import fill_held, stored_shape
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.spec import FactorSpec
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
    """Fill an engine that was built with the recorded structure. Each rank reads what it holds (``held.py``);
    working copies of master weights that ZeRO divides are put together over the replicas. Collective.

    Args:
        source: full tensors, exactly those that the engine has.
        weights_only: there are no moments in ``source`` and no counts in ``record``: the optimizer and the
            loss scale stay as they begin. Factors whose initial values ``source`` lacks begin here.

    Raises:
        UserError: on all ranks; before anything is filled it names the tensors that are absent or of another
            shape.
    """
    initial = _initial_values(engine)
    optional = initial.keys() if weights_only else set()
    expected = stored_shapes(engine, weights_only=weights_only)
    _account(expected, source, optional=optional)
    factors = {name: name.removesuffix("0") for name in optional if name not in source.names}

    def read(name: str, box: Box) -> Tensor:
        return source.read(factors.get(name, name), box)

    engine.parallel.call_or_raise_on_all_ranks(lambda: fill_held(engine, read, names=expected))
    for _, parameter in engine.parameters():
        write_value(parameter, engine.master_weights.read(parameter))
    for frozen in _frozen_weights(engine).values():
        if hasattr(frozen, "ds_tensor"):  # ZeRO 3 may have it gathered
            write_value(frozen, read_value(frozen))
    finish_writes()
    if not weights_only:
        engine.master_weights.set_steps(record["optimizer_steps"])
        engine.loss_scaling.load(record["loss_scaling"])


def stored_shapes(engine: Engine, *, weights_only: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every full tensor of the state by name, with the moments of each parameter unless asked for
    weights alone.
    """
    frozen, initial = _frozen_weights(engine), _initial_values(engine)
    like: dict[str, Tensor] = {}
    for name, parameter in engine.parameters():
        moments = () if weights_only else engine.master_weights.moments(parameter)
        like |= {name: parameter} | {f"{name}.{key}": parameter for key in moments}
    return {name: stored_shape(x, engine.parallel) for name, x in (like | frozen | initial).items()}


def _frozen_weights(engine: Engine) -> dict[str, Tensor]:
    return {f"{name}.weight": x.weight for name, x in engine.layers.items() if x.weight is not None}


def _initial_values(engine: Engine) -> dict[str, Tensor]:
    """Name of a factor's initial value -> the factor, which is sharded as that is."""
    return {
        f"{name}.{leaf}": getattr(engine.layers[name], leaf[0])
        for name in engine.initial
        for leaf in ("U0", "V0")
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
