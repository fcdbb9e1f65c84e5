"""An engine's state as whole named tensors and a JSON record, and back, at any tensor- and data-parallel
size and ZeRO stage.

Tensor names: the parameter's own for its FP32 master, with ``.exp_avg`` and ``.exp_avg_sq`` for Adam's
moments; ``<layer>.weight`` for a frozen W0 in its own dtype; ``<layer>.U0`` and ``<layer>.V0`` for initial
factor values.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from inrank_megatron.checkpoint.accounting import differences
from inrank_megatron.engine import zero_state
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import finish_writes, read_value, write_value
from inrank_megatron.engine.zero_state import ParameterState
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.linalg.factors import gather_matrix
from inrank_megatron.model.initialise import shard, whole_shape
from inrank_megatron.model.vocabulary import WholeTensors


def engine_record(engine: Engine) -> dict:
    """What :func:`load_engine` needs beside the tensors: structure, ranks, step counts, the loss scale."""
    return {
        "factors": {name: asdict(spec) for name, spec in engine.factor_specs().items()},
        "optimizer_steps": engine.masters.steps(),
        "loss_scaling": engine.loss_scaling.record(),
    }


def recorded_structure(record: Mapping) -> dict[str, FactorSpec]:
    """The structure to build the engine with that :func:`load_engine` fills."""
    return {name: FactorSpec(**spec) for name, spec in record["factors"].items()}


def whole_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state, whole. Collective: every rank goes through all of them in the same order.

    One at a time: let go of it before asking for the next, and copy what is to stay, as it is the training's
    own where that has it whole.
    """
    masters = engine.masters
    for name, parameter in engine.parameters():
        yield name, _whole(zero_state.read_master(parameter), parameter, engine)
        for key in masters.kind.moments:
            yield f"{name}.{key}", _whole(masters.read(parameter, key), parameter, engine)
    for name, layer in engine.layers.items():
        if layer.weight is not None:
            yield f"{name}.weight", _whole(read_value(layer.weight), layer.weight, engine)
    for name, pair in engine.initial.items():
        for leaf, initial in zip(("U0", "V0"), pair, strict=True):
            yield f"{name}.{leaf}", _whole(initial, getattr(engine.layers[name], leaf[0]), engine)


def state_bytes(engine: Engine) -> int:
    """Bytes of all that :func:`whole_tensors` gives."""
    per_entry = 4 * (1 + len(engine.masters.kind.moments))
    layers = engine.layers.values()
    frozen = [(x.weight, x.weight.element_size()) for x in layers if x.weight is not None]
    initial = [(factor, 4) for _, factor in _initial_values(engine).values()]
    sizes = [*((p, per_entry) for _, p in engine.parameters()), *frozen, *initial]
    return sum(math.prod(_stored_shape(like, engine)) * size for like, size in sizes)


@torch.no_grad()
def load_engine(engine: Engine, record: Mapping, source: WholeTensors, *, weights_only: bool = False) -> None:
    """Fill an engine that was built with the recorded structure.

    Args:
        source: whole tensors, exactly those that the engine has.
        weights_only: there are no moments in ``source`` and no counts in ``record``: the optimizer and the
            loss scale stay as they begin. Factors whose initial values ``source`` lacks begin here.

    Raises:
        UserError: before anything is filled; it names the tensors that are absent or of another shape.
    """
    parameters = dict(engine.parameters())
    frozen = {f"{name}.weight": x.weight for name, x in engine.layers.items() if x.weight is not None}
    initial = _initial_values(engine)
    moments = () if weights_only else engine.masters.kind.moments
    like = {f"{name}{suffix}": p for suffix in _suffixes(moments) for name, p in parameters.items()} | frozen
    like |= {name: factor for name, (_, factor) in initial.items()}
    optional = initial.keys() if weights_only else set()
    _account({name: _stored_shape(x, engine) for name, x in like.items()}, source, optional=optional)
    for name, parameter in parameters.items():
        names = [f"{name}{suffix}" for suffix in _suffixes(moments)]
        shards = {key: _shard(tensor, parameter, engine) for key, tensor in source.tensors(names)}
        if weights_only:
            zero_state.write_master(parameter, shards[name])
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
        engine.masters.set_steps(record["optimizer_steps"])
        engine.loss_scaling.load(record["loss_scaling"])


def _suffixes(moments: Iterable[str]) -> tuple[str, ...]:
    return ("", *(f".{key}" for key in moments))


def _initial_values(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensor name -> initial value of a factor, and the factor, which is cut as it is."""
    return {
        f"{name}.{leaf}": (value, getattr(engine.layers[name], leaf[0]))
        for name, pair in engine.initial.items()
        for leaf, value in zip(("U0", "V0"), pair, strict=True)
    }


def _account(
    expected: Mapping[str, tuple[int, ...]], source: WholeTensors, *, optional: Collection[str]
) -> None:
    """Every tensor of ``source`` has its place in the engine, and it lacks none but ``optional`` ones."""
    there = {name: source.shape(name) for name in source.names}
    wanted = {name: shape for name, shape in expected.items() if name in there or name not in optional}
    if differing := differences(there, wanted):
        raise UserError(
            f"{source.folder}: tensors that differ from those of this run's model and optimizer: "
            f"{differing}; resume with the configuration that wrote it"
        )


def _whole(tensor: Tensor, like: Tensor, engine: Engine) -> Tensor:
    """``tensor``, cut as ``like`` is, from all tensor-parallel ranks; without the rows that pad a
    vocabulary.
    """
    if getattr(like, "tensor_model_parallel", False):
        group = engine.parallel.tp_group
        tensor = gather_matrix(tensor, like.partition_dim, group, like.partition_stride)
    return tensor[: getattr(like, "true_rows", tensor.shape[0])]


def _stored_shape(like: Tensor, engine: Engine) -> tuple[int, ...]:
    """Shape of the whole tensor that a checkpoint has for ``like``, without rows that pad a vocabulary."""
    rows, *others = whole_shape(like, engine.parallel)
    return (getattr(like, "true_rows", rows), *others)


def _shard(tensor: Tensor, like: Tensor, engine: Engine) -> Tensor:
    padding = whole_shape(like, engine.parallel)[0] - tensor.shape[0]
    if padding:
        tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
    return shard(tensor, like, engine.parallel).to(like.device)
