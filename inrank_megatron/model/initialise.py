"""Initial weights that depend on the seed and a parameter's name alone.

Every rank draws the whole matrix from a generator seeded by (seed, name) and takes its shard, so the start
does not depend on the tensor-parallel size, on the padding of the vocabulary, or on which linears are
factorised.
"""

import hashlib

import torch
from torch import Tensor, nn

from inrank_megatron.parallel import Parallel

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shard(full: Tensor, parameter: Tensor, parallel: Parallel) -> Tensor:
    """This rank's part of the whole tensor ``full``, cut as ``parameter`` is; all of it if it is
    replicated.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    return full.chunk(parallel.tp_size, dim=parameter.partition_dim)[parallel.tp_rank]


def whole_shape(parameter: Tensor, parallel: Parallel) -> tuple[int, ...]:
    """Shape of the whole tensor of which ``parameter`` is a shard."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parallel.tp_size
    return tuple(shape)


def draw_weight(name: str, shape: tuple[int, ...], *, seed: int, std: float, num_layers: int) -> Tensor:
    """The whole initial matrix of the parameter ``name``, FP32: N(0, std), or N(0, std / sqrt(2 layers))
    where the linear writes to the residual stream."""
    scale = std / (2 * num_layers) ** 0.5 if name.endswith(RESIDUAL_OUTPUTS) else std
    return torch.empty(shape).normal_(0.0, scale, generator=named_generator(seed, name))


@torch.no_grad()
def initialise_parameters(
    model: nn.Module, parallel: Parallel, *, seed: int, std: float, num_layers: int, vocab_size: int
) -> None:
    """GPT-2's start: matrices from :func:`draw_weight`, biases 0, norms 1.

    Rows of the word embedding from ``vocab_size`` on are padding: zero, and not drawn; the parameter's
    ``true_rows`` says how many are real. Factors stay zero: the
    method fills them.
    """
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("U", "V", "bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            shape = whole_shape(parameter, parallel)
            rows = shape[0]
            if name == WORD_EMBEDDINGS:
                rows = parameter.true_rows = vocab_size
            full = draw_weight(name, (rows, *shape[1:]), seed=seed, std=std, num_layers=num_layers)
            full = torch.cat([full, full.new_zeros(shape[0] - rows, *shape[1:])])
            parameter.copy_(shard(full, parameter, parallel))
