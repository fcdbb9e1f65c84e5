"""An engine's state as whole named tensors and a JSON record, and back, at any tensor- and data-parallel
size and ZeRO stage.

Tensor names: the parameter's own for its FP32 master, with ``.exp_avg`` and ``.exp_avg_sq`` for Adam's
moments; ``<layer>.weight`` for a frozen W0 in its own dtype; ``<layer>.U0`` and ``<layer>.V0`` for initial
factor values.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from inrank_megatron.engine import zero_state
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import read_value, write_value
from inrank_megatron.engine.zero_state import ParameterState
from inrank_megatron.errors import UserError
from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.linalg.factors import gather_matrix
from inrank_megatron.model.initialise import shard, whole_shape


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
    """Every tensor of the state, whole. Collective: every rank goes through all of them in the same order."""
    for name, parameter in engine.parameters():
        state = zero_state.read_state(parameter)
        yield name, _whole(state.master, parameter, engine)
        for key, moment in state.moments.items():
            yield f"{name}.{key}", _whole(moment, parameter, engine)
    for name, layer in engine.layers.items():
        if layer.weight is not None:
            yield f"{name}.weight", _whole(read_value(layer.weight), layer.weight, engine)
    for name, pair in engine.initial.items():
        for leaf, initial in zip(("U0", "V0"), pair, strict=True):
            yield f"{name}.{leaf}", _whole(initial, getattr(engine.layers[name], leaf[0]), engine)


@torch.no_grad()
def load_engine(
    engine: Engine,
    record: Mapping,
    names: frozenset[str],
    read: Callable[[list[str]], Iterator[tuple[str, Tensor]]],
) -> None:
    """Fill an engine that was built with the recorded structure.

    Args:
        names: the tensors that there are; they must be exactly those that the engine has.
        read: whole tensors by name, in any order.
    """
    parameters = dict(engine.parameters())
    frozen = {f"{name}.weight": x.weight for name, x in engine.layers.items() if x.weight is not None}
    initial = {
        f"{name}.{leaf}": (pair[i], getattr(engine.layers[name], leaf[0]))
        for name, pair in engine.initial.items()
        for i, leaf in enumerate(("U0", "V0"))
    }
    moments = engine.masters.kind.moments
    expected = {f"{name}{suffix}" for name in parameters for suffix in ("", *(f".{key}" for key in moments))}
    expected |= frozen.keys() | initial.keys()
    if expected != names:
        raise UserError(
            f"the checkpoint lacks {sorted(expected - names)[:4]} and has {sorted(names - expected)[:4]} "
            "beyond the model; another model or optimizer wrote it: resume with that configuration"
        )
    for name, parameter in parameters.items():
        group = dict(read([name, *(f"{name}.{key}" for key in moments)]))
        shards = {key: _shard(tensor, parameter, engine, name=key) for key, tensor in group.items()}
        zero_state.write_state(
            parameter, ParameterState(shards[name], {key: shards[f"{name}.{key}"] for key in moments})
        )
    for name, tensor in read(list(frozen)):
        write_value(frozen[name], _shard(tensor, frozen[name], engine, name=name))
    for name, tensor in read(list(initial)):
        target, like = initial[name]
        target.copy_(_shard(tensor, like, engine, name=name))
    engine.masters.set_steps(record["optimizer_steps"])
    engine.loss_scaling.load(record["loss_scaling"])


def _whole(tensor: Tensor, like: Tensor, engine: Engine) -> Tensor:
    """``tensor``, cut as ``like`` is, from all tensor-parallel ranks; without the rows that pad a
    vocabulary.
    """
    if getattr(like, "tensor_model_parallel", False):
        group = engine.parallel.tp_group
        tensor = gather_matrix(tensor, like.partition_dim, group, like.partition_stride)
    return tensor[: getattr(like, "true_rows", tensor.shape[0])]


def _shard(tensor: Tensor, like: Tensor, engine: Engine, *, name: str) -> Tensor:
    shape = list(whole_shape(like, engine.parallel))
    padding = shape[0] - getattr(like, "true_rows", shape[0])
    expected = [shape[0] - padding, *shape[1:]]
    if list(tensor.shape) != expected:
        raise UserError(
            f"{name}: shape {list(tensor.shape)} in the checkpoint, {expected} in the model; "
            "resume with the configuration that wrote it"
        )
    if padding:
        tensor = torch.cat([tensor, tensor.new_zeros(padding, *shape[1:])])
    return shard(tensor, like, engine.parallel).to(like.device)
