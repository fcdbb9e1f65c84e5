"""The factorised linear ``y = (W0 + U V) x + b``, serial and tensor-parallel by the same code.

Letters: T tokens (S x B), I input features, O output features, k columns in use, K columns allocated,
n tensor-parallel ranks. A trailing ``/n`` is this rank's share of an axis.

Stored on each rank (``weight`` is W0 and is absent in the second phase)::

    column-parallel   weight [O/n, I]   U [O/n, K]   V [K, I/n]   bias [O/n]
    row-parallel      weight [O, I/n]   U [O/n, K]   V [K, I/n]   bias [O]

Both factors are cut on their feature axis, never on K, so that a growing or odd rank moves no shard,
and each rank stores and optimises 1/n of both. The factor that must be whole (V of a column layer, U of a
row layer) is gathered in the forward pass: ``AG(V)`` below, k I elements. With sequence parallelism (SP)
the tokens are cut outside the layers.

Column layer, x [T/n, I] under SP, else x [T, I] on every rank; y [T, O/n]:

===============  ======================================  =====================================
                 forward                                 backward
===============  ======================================  =====================================
W0 + U V, SP     X = AG_T(x); y = X W0^T + (X V^T) U^T   dx = RS_T(dy W0 + dz V); dV = RS_I(dz^T X)
W0 + U V         y = x W0^T + (x V^T) U^T                dx = AR(dy W0 + dz V);   dV = RS_I(dz^T x)
U V, SP          z = AG_T(x V^T); y = z U^T              dz = RS_T(dy U); dV = RS_I(dz^T x)
U V              z = x V^T; y = z U^T                    dz = AR(dy U); dV = slice_I(dz^T x)
===============  ======================================  =====================================

Row layer, x [T, I/n]; y [T/n, O] under SP, else y [T, O] on every rank:

===============  ======================================  =====================================
W0 + U V, SP     y = RS_T(x W0^T + (x V^T) U^T)          dY = AG_T(dy); dU = RS_O(dY^T z)
W0 + U V         y = AR(x W0^T + (x V^T) U^T)            dU = RS_O(dy^T z)
U V, SP          z = RS_T(x V^T); y = z U^T              dz = AG_T(dy U); dU = RS_O(dy^T z)
U V              z = AR(x V^T); y = z U^T                dU = slice_O(dy^T z)
===============  ======================================  =====================================

With W0 the factors' partial sums ride in W0's own collective, so the first phase sends no more
activations than the dense layer. Without W0 only rank-sized activations z travel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class FactorSpec:
    """How one linear is factorised.

    Args:
        columns: columns of U (rows of V) to allocate, K.
        active: columns in use at the start, k <= K.
        rank: decided rank r <= k; the rest of the columns in use are buffer.
        base: whether a frozen ``W0`` stands beside the factors.
    """

    columns: int
    active: int
    rank: int
    base: bool = True


class FactorisedLinear(nn.Module):
    """Base of the column- and the row-parallel layer; at group size 1 both are the serial layer.

    Attributes:
        weight: frozen ``W0`` without gradient, or None.
        U, V: the trained factors. Columns from ``active`` on are zero and take no part.
        active: columns in use, k. Raise it with :meth:`activate`.
        input_size, output_size: I and O of the whole matrix.
    """

    row_parallel: bool

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        bias: bool,
        factors: FactorSpec,
        tp_group: ProcessGroup,
        skip_bias_add: bool = True,
    ):
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.skip_bias_add = skip_bias_add
        self.active = factors.active
        n = tp_group.size()
        for size in (input_size, output_size):
            if size % n:
                raise ValueError(f"feature size {size} is not divisible by the {n} tensor-parallel ranks")

        def parameter(shape, *, partition_dim=None):
            tensor = torch.zeros(shape, dtype=config.params_dtype)
            result = nn.Parameter(tensor)
            if partition_dim is not None:
                result.tensor_model_parallel = True
                result.partition_dim = partition_dim
                result.partition_stride = 1
            return result

        self.U = parameter((output_size // n, factors.columns), partition_dim=0)
        self.V = parameter((factors.columns, input_size // n), partition_dim=1)
        self.weight = None
        if factors.base:
            shape = (output_size, input_size // n) if self.row_parallel else (output_size // n, input_size)
            self.weight = parameter(shape, partition_dim=1 if self.row_parallel else 0).requires_grad_(False)
        self.bias = None
        if bias and self.row_parallel:
            self.bias = parameter((output_size,))
            self.bias.sequence_parallel = config.sequence_parallel
        elif bias:
            self.bias = parameter((output_size // n,), partition_dim=0)

    @property
    def capacity(self) -> int:
        """Columns allocated, K."""
        return self.V.shape[0]

    def activate(self, columns: int) -> None:
        """Use ``columns`` columns from now on. Parameter shapes, and so optimizer state, stay as they are."""
        if not self.active <= columns <= self.capacity:
            raise ValueError(
                f"columns {columns} must lie between {self.active} in use and {self.capacity} allocated"
            )
        self.active = columns

    def _gather(self, factor: Tensor, *, partial_gradient: bool) -> Tensor:
        # [features/n, k] -> [features, k]. Where each rank holds a part of the gradient's sum it is
        # reduce-scattered; where every rank holds the whole gradient each takes its slice.
        return gather_from_sequence_parallel_region(
            factor.contiguous(), tensor_parallel_output_grad=partial_gradient, group=self.tp_group
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` [S, B, features] -> ``(y, bias)`` if ``skip_bias_add``, as Megatron's linears, else ``(y +
        bias, None)``.
        """
        y = self._product(x)
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Shards for Megatron's ``dist_checkpointing``."""
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: p.partition_dim for name, p in state.items() if hasattr(p, "partition_dim")}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

    def extra_repr(self) -> str:
        return (
            f"I={self.input_size}, O={self.output_size}, active={self.active}, capacity={self.capacity}, "
            f"base={self.weight is not None}"
        )


class ColumnParallelFactorised(FactorisedLinear):
    """Output features are cut over the group. See the module's table for shapes and collectives."""

    row_parallel = False

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        bias: bool,
        factors: FactorSpec,
        tp_group: ProcessGroup,
        skip_bias_add: bool = True,
        init_method=None,
        gather_output: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        stride: int = 1,
    ):
        if gather_output or is_expert or stride != 1:
            raise ValueError(
                "a factorised column layer supports gather_output=False, is_expert=False, stride=1"
            )
        super().__init__(
            input_size,
            output_size,
            config=config,
            bias=bias,
            factors=factors,
            tp_group=tp_group,
            skip_bias_add=skip_bias_add,
        )

    def _product(self, x: Tensor) -> Tensor:
        k, group = self.active, self.tp_group
        joint = self.weight is not None
        v = self._gather(self.V[:k].t(), partial_gradient=joint or self.sequence_parallel)  # [I, k]
        u = self.U[:, :k]
        if joint:
            if self.sequence_parallel:
                x = gather_from_sequence_parallel_region(x, group=group)
            else:
                x = copy_to_tensor_model_parallel_region(x, group=group)
            return F.linear(x, self.weight) + F.linear(x @ v, u)
        z = x @ v
        if self.sequence_parallel:
            z = gather_from_sequence_parallel_region(z, group=group)
        else:
            z = copy_to_tensor_model_parallel_region(z, group=group)
        return F.linear(z, u)


class RowParallelFactorised(FactorisedLinear):
    """Input features are cut over the group. See the module's table for shapes and collectives."""

    row_parallel = True

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        bias: bool,
        factors: FactorSpec,
        tp_group: ProcessGroup,
        skip_bias_add: bool = True,
        init_method=None,
        input_is_parallel: bool = True,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
    ):
        if not input_is_parallel or is_expert:
            raise ValueError("a factorised row layer supports input_is_parallel=True, is_expert=False")
        super().__init__(
            input_size,
            output_size,
            config=config,
            bias=bias,
            factors=factors,
            tp_group=tp_group,
            skip_bias_add=skip_bias_add,
        )

    def _product(self, x: Tensor) -> Tensor:
        k, joint = self.active, self.weight is not None
        u = self._gather(self.U[:, :k], partial_gradient=joint or self.sequence_parallel)  # [O, k]
        z = F.linear(x, self.V[:k])
        if joint:
            return self._reduce(F.linear(x, self.weight) + F.linear(z, u))
        return F.linear(self._reduce(z), u)

    def _reduce(self, partial: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
