"""Trains a factorised linear, whole or in shards, and records everything that the shards must reproduce.

Top-level functions that ranks run; the comparison is in ``test_layers.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from inrank_megatron.distributed.platform import device
from inrank_megatron.lowrank.layers import factorised
from inrank_megatron.lowrank.layers.factorised import ColumnParallelFactorised, RowParallelFactorised
from inrank_megatron.lowrank.layers.oracle import SerialFactorised
from inrank_megatron.lowrank.layers.spec import FactorSpec
from tests.groups import join

SEQUENCE, BATCH, INPUTS, OUTPUTS = 8, 2, 12, 20
CAPACITY, ACTIVE, GROWN = 9, 3, 7
"""Columns: odd numbers, so that no number of ranks divides them."""
STEPS, GROWTH_STEP = 20, 10


@dataclass(frozen=True)
class Case:
    """One variant of the layer. ``separate_collectives``: factors next to W0 stay in rank space."""

    row: bool
    frozen_base: bool
    bias: bool
    sequence_parallel: bool
    dtype: torch.dtype = torch.float64
    separate_collectives: bool = False

    def axis(self, name: str) -> int | None:
        """The axis on which the ranks share a tensor; None: every rank has all of it."""
        tokens = 0 if self.sequence_parallel else None
        axes = {
            "U": 0,
            "V": 1,
            "weight": 1 if self.row else 0,
            "bias": None if self.row else 0,
            "x": 2 if self.row else tokens,
            "y": tokens if self.row else 2,
        }
        return axes[name]


def full_tensors(case: Case) -> dict[str, Tensor | None]:
    """W0, U, V and bias; the columns of the factors from ``ACTIVE`` on are zero."""
    numbers = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=numbers, dtype=torch.float64)

    weight, left, right, bias = (
        normal(OUTPUTS, INPUTS),
        normal(OUTPUTS, CAPACITY),
        normal(CAPACITY, INPUTS),
        normal(OUTPUTS),
    )
    left[:, ACTIVE:], right[ACTIVE:] = 0, 0
    tensors = {
        "weight": weight if case.frozen_base else None,
        "U": left,
        "V": right,
        "bias": bias if case.bias else None,
    }
    return {name: None if t is None else t.to(case.dtype) for name, t in tensors.items()}


def sample(step: int, features: int, case: Case) -> Tensor:
    """Input or target of a step, [S, B, features]."""
    numbers = torch.Generator().manual_seed(1000 * features + step)
    return torch.randn(SEQUENCE, BATCH, features, generator=numbers, dtype=torch.float64).to(case.dtype)


def build_layer(case: Case, *, tp_group: dist.ProcessGroup, output_size: int = OUTPUTS) -> nn.Module:
    """The product's layer with zero parameters."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        num_attention_heads=4,
        params_dtype=case.dtype,
        tensor_model_parallel_size=tp_group.size(),
        use_cpu_initialization=True,
        sequence_parallel=case.sequence_parallel,
    )
    kind = RowParallelFactorised if case.row else ColumnParallelFactorised
    layer = kind(
        INPUTS,
        output_size,
        config=config,
        bias=case.bias,
        tp_group=tp_group,
        factors=FactorSpec(capacity=CAPACITY, active_columns=ACTIVE, rank=2, frozen_base=case.frozen_base),
    )
    if case.separate_collectives:
        layer.fused_collectives = False
    return layer.to(device())


def sharder(case: Case, group: dist.ProcessGroup) -> Callable[[str, Tensor], Tensor]:
    """``shard(name, full)``: this rank's part, on its device."""

    def shard(name: str, full: Tensor) -> Tensor:
        axis = case.axis(name)
        return (full if axis is None else full.chunk(group.size(), axis)[group.rank()]).to(device())

    return shard


def filled_layer(case: Case, group: dist.ProcessGroup) -> nn.Module:
    layer, shard = build_layer(case, tp_group=group), sharder(case, group)
    with torch.no_grad():
        for name, full in full_tensors(case).items():
            if full is not None:
                getattr(layer, name).copy_(shard(name, full))
    return layer


def train(
    module: nn.Module, case: Case, optimizer: str, shard: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """20 steps on a squared error, with new columns after 10. Returns outputs, gradients, final values."""
    torch_optimizer = {
        "SGD": lambda p: torch.optim.SGD(p, lr=2e-3),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    }
    optimizer = torch_optimizer[optimizer]([p for p in module.parameters() if p.requires_grad])
    seen = {}
    for step in range(STEPS):
        if step == GROWTH_STEP:
            grow(module, case, shard)
        x = shard("x", sample(step, INPUTS, case)).clone().requires_grad_()
        result = module(x)
        y = result[0] if isinstance(result, tuple) else result
        optimizer.zero_grad()
        (0.5 * (y - shard("y", sample(step, OUTPUTS, case))).square().sum()).backward()
        seen[f"{step} y"], seen[f"{step} dx"] = y.detach(), x.grad
        for name, parameter in module.named_parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad)
            if parameter.requires_grad:
                seen[f"{step} d{name}"] = parameter.grad.clone()
        optimizer.step()
    return seen | {f"final {name}": p.detach() for name, p in module.named_parameters()}


@torch.no_grad()
def grow(module: nn.Module, case: Case, shard: Callable[[str, Tensor], Tensor]) -> None:
    numbers = torch.Generator().manual_seed(9)
    new = slice(ACTIVE, GROWN)
    module.U[:, new] = shard("U", torch.randn(OUTPUTS, CAPACITY, generator=numbers).to(case.dtype))[:, new]
    module.V[new] = shard("V", torch.randn(CAPACITY, INPUTS, generator=numbers).to(case.dtype))[new]
    if not isinstance(module, SerialFactorised):
        module.activate(GROWN)


def train_shards(rank: int, world_size: int, case: Case, optimizer: str) -> dict[str, Tensor]:
    group = join(world_size).tp_group
    layer = filled_layer(case, group)
    return train(layer, case, optimizer, sharder(case, group))


def train_oracle(case: Case, optimizer: str) -> dict[str, Tensor]:
    return train(SerialFactorised(**full_tensors(case)), case, optimizer, lambda name, full: full)


def merge(shards: list[dict[str, Tensor]], case: Case) -> dict[str, Tensor]:
    """Full tensors from those of all ranks; replicated ones must agree to the bit."""
    merged = {}
    for key, first in shards[0].items():
        axis = case.axis(key.split()[1].removeprefix("d"))
        if axis is None:
            assert all(torch.equal(shard[key], first) for shard in shards), key
        merged[key] = first if axis is None else torch.cat([shard[key] for shard in shards], axis)
    return merged


def exact_products(rank: int, world_size: int, case: Case) -> tuple[list[int], list[list[Tensor]]]:
    """Width of the products in half precision and with a tile of one column, and each time the output and
    all gradients, of small whole numbers, which no sum rounds.
    """
    group = join(world_size).tp_group
    shard, found, widths = sharder(case, group), [], []
    for tile_bytes in (factorised.TILE_BYTES, case.dtype.itemsize):
        layer = build_layer(case, tp_group=group)
        numbers = torch.Generator().manual_seed(3)

        def full(*shape: int, numbers=numbers) -> Tensor:
            return torch.randint(-1, 2, shape, generator=numbers).to(case.dtype)

        with torch.no_grad():
            for name, tensor in full_tensors(case).items():
                if tensor is not None:
                    getattr(layer, name).copy_(shard(name, full(*tensor.shape) * (tensor != 0)))
        x = shard("x", full(SEQUENCE, BATCH, INPUTS)).clone().requires_grad_()
        before, factorised.TILE_BYTES = factorised.TILE_BYTES, tile_bytes
        try:
            widths.append(layer.width)
            y = layer(x)[0]
            (y * shard("y", full(SEQUENCE, BATCH, OUTPUTS))).sum().backward()
        finally:
            factorised.TILE_BYTES = before
        found.append([y.detach(), x.grad, layer.U.grad, layer.V.grad])
    return widths, found


class Wire(TorchDispatchMode):
    """Records every collective with the elements of the larger of its two sides."""

    NAMES: ClassVar = {
        "_allgather_base_": "gather",
        "_reduce_scatter_base_": "scatter",
        "allreduce_": "reduce",
    }

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d":
            tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
            sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
            self.sent.append((self.NAMES.get(name, name), max(sizes)))
        return function(*args, **(kwargs or {}))


def collectives(rank: int, world_size: int, case: Case) -> tuple[list, list]:
    """What the forward and the backward pass of one layer send."""
    group = join(world_size).tp_group
    layer = filled_layer(case, group)
    x = sharder(case, group)("x", sample(0, INPUTS, case)).clone().requires_grad_()
    with Wire() as forward:
        y = layer(x)[0]
    with Wire() as backward:
        y.sum().backward()
    return sorted(forward.sent), sorted(backward.sent)
