"""Initial weights that depend on the seed and a parameter's name alone.

Every rank draws the full matrix from a generator seeded by (seed, name) and takes its shard, so the start
does not depend on the tensor-parallel size, on the padding of the vocabulary, or on which linears are
factorised.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from inrank_megatron.config.shapes import QKVLayout
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.lowrank.linalg.factors import shard_matrix
from inrank_megatron.model.separate_qkv import rows_of
from inrank_megatron.model.vocabulary import OF_THE_VOCABULARY

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
QKV_LINEAR = "self_attention.linear_qkv"
FACTORS = (".U", ".V")


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shard(full: Tensor, parameter: Tensor, parallel: Parallel) -> Tensor:
    """This rank's part of the full tensor ``full``, sharded as ``parameter`` is; all of it if it is
    replicated.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    return shard_matrix(full, parameter.partition_dim, parallel.tp_group, parameter.partition_stride)


def full_shape(parameter: Tensor, parallel: Parallel) -> tuple[int, ...]:
    """Shape of the full tensor of which ``parameter`` is a shard."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 empties the parameter itself
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parallel.tp_size
    return tuple(shape)


def draw_weight(
    name: str, shape: tuple[int, ...], *, seed: int, std: float, num_layers: int, layout: QKVLayout
) -> Tensor:
    """The full initial matrix of the parameter ``name``, FP32: N(0, std), or N(0, std / sqrt(2 layers))
    where the linear writes to the residual stream. Separate linears of query, key and value have the rows
    that the fused one would have.
    """
    linear, _, part = name.removesuffix(".weight").rpartition(".")
    if linear.endswith(QKV_LINEAR):
        fused = _normal(f"{linear}.weight", (layout.total, *shape[1:]), seed=seed, std=std)
        return rows_of(fused, part, layout=layout)
    scale = std / (2 * num_layers) ** 0.5 if name.endswith(RESIDUAL_OUTPUTS) else std
    return _normal(name, shape, seed=seed, std=scale)


def _normal(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=named_generator(seed, name))


def draw_tensor(name: str, shape: tuple[int, ...], **distribution) -> Tensor:
    """The full initial tensor of the parameter ``name``, FP32: GPT-2's start, for both architectures, with
    matrices from :func:`draw_weight`, biases 0, norms 1.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.ones(shape) if len(shape) == 1 else draw_weight(name, shape, **distribution)


def initial_shapes(model: nn.Module, parallel: Parallel, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter but factors, by name; without the rows that pad a vocabulary."""
    shapes = {
        name: full_shape(parameter, parallel)
        for name, parameter in model.named_parameters()
        if not name.endswith(FACTORS)
    }
    return shapes | {name: (vocab_size, *shapes[name][1:]) for name in OF_THE_VOCABULARY if name in shapes}


@torch.no_grad()
def initialise_parameters(
    model: nn.Module, parallel: Parallel, *, vocab_size: int, draw: Callable[[str, tuple[int, ...]], Tensor]
) -> None:
    """Fill every parameter with its part of ``draw(name, shape)``, as :func:`draw_tensor` gives it.

    Rows of the word embedding, and of a head of its own, from ``vocab_size`` on are padding: zero, and not
    asked for; the parameter's ``true_rows`` says how many are real. Factors stay zero: the method fills them.
    """
    shapes = initial_shapes(model, parallel, vocab_size=vocab_size)
    for name, parameter in model.named_parameters():
        if name.endswith(FACTORS):
            parameter.zero_()
            continue
        full = draw(name, shapes[name])
        if name in OF_THE_VOCABULARY:
            parameter.true_rows = vocab_size
            padding = full_shape(parameter, parallel)[0] - vocab_size
            full = torch.cat([full, full.new_zeros(padding, *full.shape[1:])])
        parameter.copy_(shard(full, parameter, parallel))
