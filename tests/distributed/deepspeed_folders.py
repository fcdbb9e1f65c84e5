"""Checkpoints that DeepSpeed's own engine writes. Functions that ranks run."""

from torch import Tensor

from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import read_value
from inrank_megatron.lowrank.linalg.factors import gather_matrix
from tests.contract.gathered import full_tensors
from tests.contract.layouts import Layout
from tests.contract.sessions import build


def save(
    rank: int,
    world_size: int,
    name: str,
    layout: Layout,
    settings: dict,
    steps: int,
    folder: str,
    client: dict,
) -> dict[str, dict[str, Tensor]]:
    """Train by a method, save by DeepSpeed: full FP32 master weights (W0: as it is stored) and full working
    copies, without the padding of the vocabulary.
    """
    session = build(name, layout, switch=2, **settings).start().train(steps)
    engine = session.engine
    engine.deepspeed.save_checkpoint(folder, client_state=client)
    master_weights = {key: tensor for key, tensor in full_tensors(engine) if not key.endswith(STATE)}
    return {"masters": master_weights, "copies": {key: _copy(engine, key) for key in master_weights}}


STATE = (".exp_avg", ".exp_avg_sq", ".U0", ".V0")


def _copy(engine: Engine, name: str) -> Tensor:
    parameter = dict(engine.model.named_parameters())[name]
    tensor = read_value(parameter)
    if getattr(parameter, "tensor_model_parallel", False):
        group = engine.parallel.tp_group
        tensor = gather_matrix(tensor, parameter.partition_dim, group, parameter.partition_stride)
    return tensor[: getattr(parameter, "true_rows", tensor.shape[0])].clone()
