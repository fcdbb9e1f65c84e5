"""The factorised linear ``y = (W0 + U V) x + b``, serial and tensor-parallel by the same code.

Letters: T tokens (S x B), I input features, O output features, k columns in use, K columns allocated,
n tensor-parallel ranks. A trailing ``/n`` is this rank's shard of an axis.

Stored on each rank (``weight`` is W0 and is absent in the second phase)::

    column-parallel   weight [O/n, I]   U [O/n, K]   V [K, I/n]   bias [O/n]
    row-parallel      weight [O, I/n]   U [O/n, K]   V [K, I/n]   bias [O]

Both factors are sharded on their feature axis, never on K, so that a growing or odd rank moves no shard,
and each rank stores and optimises 1/n of both. The output features of a column layer may belong to several
matrices, one after the other (``stride``: gate and up of SwiGLU); a rank then has its shard of each. One
factor is multiplied with local tokens (V of a column layer, U of a row layer). It is gathered, which takes
k I or k O elements per step. Its gradient is reduce-scattered back (RS_I, RS_O), or, where every rank could
compute all of it, each rank computes its slice. With sequence parallelism (SP) the tokens are sharded outside
the layers. AG, RS, AR: all-gather, reduce-scatter, all-reduce over the group; the index names the axis.

Column layer, x [T/n, I] under SP, else x [T, I] on every rank; y [T, O/n]:

U V, SP
    forward   z = AG_T(x V^T); y = z U^T
    backward  dz = RS_T(dy U); dx = dz V; dV = RS_I(dz^T x)
U V
    forward   z = x V^T; y = z U^T
    backward  dz = AR(dy U); dx = dz V; dV = dz^T slice_I(x)
W0 + U V, SP, separate
    forward   X = AG_T(x); z = AG_T(x V^T); y = X W0^T + z U^T
    backward  dz = RS_T(dy U); dx = RS_T(dy W0) + dz V; dV = RS_I(dz^T x)
W0 + U V, SP, fused
    forward   X = AG_T(x); z = X V^T; y = X W0^T + z U^T
    backward  dz = dy U; dx = RS_T(dy W0 + dz V); dV = RS_I(dz^T X)
W0 + U V
    forward   z = x V^T; y = x W0^T + z U^T
    backward  dz = dy U; dx = AR(dy W0 + dz V); dV = RS_I(dz^T x)

and always dU = dy^T z. Row layer, x [T, I/n]; y [T/n, O] under SP, else y [T, O] on every rank:

U V, SP
    forward   z = RS_T(x V^T); y = z U^T
    backward  dz = AG_T(dy U); dx = dz V; dU = RS_O(dy^T z)
U V
    forward   z = AR(x V^T); y = z U^T
    backward  dz = dy U; dx = dz V; dU = slice_O(dy)^T z
W0 + U V, SP, separate
    forward   z = RS_T(x V^T); y = RS_T(x W0^T) + z U^T
    backward  dz = AG_T(dy U); dx = AG_T(dy) W0 + dz V; dU = RS_O(dy^T z)
W0 + U V, SP, fused
    forward   z = x V^T; y = RS_T(x W0^T + z U^T)
    backward  dY = AG_T(dy); dz = dY U; dx = dY W0 + dz V; dU = RS_O(dY^T z)
W0 + U V
    forward   z = x V^T; y = AR(x W0^T + z U^T)
    backward  dz = dy U; dx = dy W0 + dz V; dU = RS_O(dy^T z)

and always dV = dz^T x.

Without W0 only rank-sized activations travel, and under SP no product is computed twice. With W0 there is a
choice. With *separate* collectives the factors stay in rank space: each pass through the layer sends
2 (n-1)/n T k more elements, no product is computed twice, and only x [T/n, I] is saved for the backward pass.
With *fused* collectives the factors' partial sums travel with those of W0: no activation is sent beyond the
dense layer's, but every rank computes the products with the gathered factor over all T, and X [T, I] is
saved. Separate collectives save 6 (n-1)/n T k h operations for 2 (n-1)/n T k elements, 3 h for each element,
whatever n, T and k are. :func:`prefers_fused_collectives` is that rule.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.layers.full_factor import FullFactor
from inrank_megatron.lowrank.layers.products import ColumnProduct, RowProduct
from inrank_megatron.lowrank.layers.spec import FactorSpec

# Operations that a rank does in the time of one element on the wire. Gloo: measured on two cores of a machine
# (150 GFLOP/s against 0.06 to 0.18 G elements/s; both ways of an MLP break even near h = 768). NCCL: an
# order of magnitude, 400 TFLOP/s of BF16 products against 200 GB/s of all-gather in an NVLink node.
OPERATIONS_PER_ELEMENT = {"gloo": 2300, "nccl": 4000}

# Arguments of Megatron's linears without effect here: the product adds the bias at no cost, so no bias is
# left to add; values are written after the model is built; the last names a buffer of Transformer Engine.
UNUSED = {"skip_bias_add", "init_method", "tp_comm_buffer_name"}

# Tensor cores load 16 bytes at once. If the rows of a matrix in half precision do not begin at multiples of
# 16 bytes, they load smaller pieces, or the product does not use them.
TILE_BYTES = 16


def prefers_fused_collectives(hidden: int, group: ProcessGroup) -> bool:
    """Whether the factors of a first-phase layer should join W0's collective instead of staying in rank
    space.

    Rank space costs one more element on the wire for every 3 ``hidden`` operations that it saves. So it pays
    if the machine does fewer operations than that in the time in which it sends one element.
    """
    return 3 * hidden < OPERATIONS_PER_ELEMENT.get(dist.get_backend(group), OPERATIONS_PER_ELEMENT["nccl"])


class FactorisedLinear(nn.Module):
    """Base of the column- and the row-parallel layer; at group size 1 both are the serial layer.

    The arguments are those of Megatron's linears, and ``factors``. In ``others``, arguments named in
    ``UNUSED`` have no effect, and of those in ``supported`` only the value there is implemented.

    Attributes:
        weight: frozen ``W0`` without gradient, or None.
        U, V: the trained factors. Columns from ``active_columns`` on are zero and change nothing.
        active_columns, capacity: columns in use, k, and allocated, K. :meth:`activate` raises k.
        input_size, output_size: I and O of the full matrix.
    """

    row_parallel: bool
    product: type[torch.autograd.Function]
    supported: ClassVar[Mapping[str, bool]]

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        bias: bool,
        factors: FactorSpec,
        tp_group: ProcessGroup,
        stride: int = 1,
        **others: object,
    ):
        super().__init__()
        self._refuse_unsupported(others)
        self.input_size, self.output_size = input_size, output_size
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel and tp_group.size() > 1
        # Without sequence parallelism every rank has all tokens anyway: joining costs nothing.
        self.fused_collectives = factors.frozen_base and (
            not self.sequence_parallel or prefers_fused_collectives(min(input_size, output_size), tp_group)
        )
        self.full_factor = FullFactor(tp_group)
        self.active_columns, self.capacity = factors.active_columns, factors.capacity
        self._make_parameters(config, bias=bias, frozen_base=factors.frozen_base, stride=stride)

    def _make_parameters(self, config, *, bias: bool, frozen_base: bool, stride: int) -> None:
        """Zeros of this rank's shapes, with the attributes by which Megatron knows how they are sharded."""
        n, o, i = self.tp_group.size(), self.output_size, self.input_size
        for size, parts in ((i, n), (o, n * stride)):
            if size % parts:
                raise ValueError(f"feature size {size} is not divisible by the {n} tensor-parallel ranks")

        def parameter(shape, *, partition_dim=None, stride=1):
            tensor = torch.zeros(shape, dtype=config.params_dtype)
            result = nn.Parameter(tensor)
            if partition_dim is not None:
                result.tensor_model_parallel = True
                result.partition_dim = partition_dim
                result.partition_stride = stride
            return result

        self.U = parameter((o // n, self.capacity), partition_dim=0, stride=stride)
        self.V = parameter((self.capacity, i // n), partition_dim=1)
        self.weight = None
        if frozen_base:
            shape = (o, i // n) if self.row_parallel else (o // n, i)
            self.weight = parameter(shape, partition_dim=1 if self.row_parallel else 0, stride=stride)
            self.weight.requires_grad_(False)
        self.bias = None
        if bias and self.row_parallel:
            self.bias = parameter((o,))
            self.bias.sequence_parallel = config.sequence_parallel
        elif bias:
            self.bias = parameter((o // n,), partition_dim=0, stride=stride)

    def _refuse_unsupported(self, given: Mapping[str, object]) -> None:
        if unknown := given.keys() - self.supported.keys() - UNUSED:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(sorted(unknown))}")
        for name, value in self.supported.items():
            if given.get(name, value) != value:
                raise ValueError(f"{type(self).__name__} supports {name}={value} alone")

    def activate(self, columns: int) -> None:
        """Use ``columns`` columns from now on. Parameter shapes, and so optimizer state, stay as they are."""
        if not self.active_columns <= columns <= self.capacity:
            raise ValueError(
                f"columns {columns} must lie between {self.active_columns} in use and {self.capacity} "
                "allocated"
            )
        self.active_columns = columns

    @property
    def tile(self) -> int:
        """Products use a multiple of this number of columns, so that rows begin at multiples of 16 bytes."""
        return TILE_BYTES // self.U.itemsize if self.U.itemsize < 4 else 1

    @property
    def width(self) -> int:
        """Number of columns in the products: those in use, and zero columns that fill the last tile. The zero
        columns change no sum. Their gradients are products with each other, so they stay zero.
        """
        return min(self.capacity, -(-self.active_columns // self.tile) * self.tile)

    def used_u(self, u: Tensor, width: int) -> Tensor:
        """The first ``width`` columns of U [O/n, K]."""
        if width == self.capacity:
            return u
        u = u[:, :width]
        return u.contiguous() if self.capacity % self.tile else u  # its rows are a capacity apart

    def used_v(self, v: Tensor, width: int) -> Tensor:
        """The first ``width`` rows of V [K, I/n]."""
        return v[:width]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """``x`` [S, B, features] -> ``(y, None)``; the bias is part of ``y``, added within the product."""
        y = self.product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.U, self.V, self.bias, self)
        return y.view(-1, *x.shape[1:-1], y.shape[-1]), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Shards for Megatron's ``dist_checkpointing``."""
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: p.partition_dim for name, p in state.items() if hasattr(p, "partition_dim")}
        shards = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        if self.U.partition_stride == 2:  # of weight and bias Megatron's MLP itself splits gate and up
            singleton = (metadata or {}).get("singleton_local_shards", False)
            shards[f"{prefix}U"] = apply_swiglu_sharded_factory(
                shards[f"{prefix}U"], sharded_offsets, singleton
            )
        return shards

    def extra_repr(self) -> str:
        return (
            f"I={self.input_size}, O={self.output_size}, active={self.active_columns}, "
            f"capacity={self.capacity}, frozen_base={self.weight is not None}"
        )


class ColumnParallelFactorised(FactorisedLinear):
    """Output features are sharded over the group. See the module's table for shapes and collectives."""

    row_parallel = False
    product = ColumnProduct
    supported: ClassVar = {"gather_output": False, "is_expert": False}


class RowParallelFactorised(FactorisedLinear):
    """Input features are sharded over the group. See the module's table for shapes and collectives."""

    row_parallel = True
    product = RowProduct
    supported: ClassVar = {"input_is_parallel": True, "is_expert": False}
