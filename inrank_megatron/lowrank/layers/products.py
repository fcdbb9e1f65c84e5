"""The two autograd functions of the factorised linear. Shapes and collectives: ``factorised.py``.

Tokens are flattened. There are T inside the layer, and T' outside it: T/n under sequence parallelism, else
T. ``weight`` (W0) or ``bias`` may be None. Collectives begin as early, and are awaited as late, as the
products allow.

U and V have all K columns; k of them are used. A factor that is not gathered is saved for the backward pass
as the parameter itself; a view of it would keep alive what ZeRO 3 has gathered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from inrank_megatron.lowrank.layers.collectives import (
    Pending,
    begin_all_gather,
    begin_all_reduce,
    begin_reduce_scatter,
    local_shard,
)


class ColumnProduct(torch.autograd.Function):
    """x [T', I], weight [O/n, I], all_u [O/n, K], all_v [K, I/n], bias [O/n] -> y [T, O/n]."""

    @staticmethod
    def forward(ctx, x, weight, all_u, all_v, bias, layer) -> Tensor:
        width = layer.width
        u, v = layer.used_u(all_u, width), layer.used_v(all_v, width)
        group, sequence_parallel, fused = layer.tp_group, layer.sequence_parallel, layer.fused_collectives
        gathering_x = (
            begin_all_gather(x, group) if sequence_parallel and weight is not None else Pending(x, None)
        )
        full = layer.full_factor.gather(v.t())  # [I, k]
        if fused:
            x = gathering_x.wait()
            z = x @ full
            y = F.linear(x, weight, bias).addmm_(z, u.t())
        else:
            z = x @ full
            gathering_z = begin_all_gather(z, group) if sequence_parallel else None
            y = None if weight is None else F.linear(gathering_x.wait(), weight, bias)
            z = gathering_z.wait() if gathering_z else z
            y = F.linear(z, u, bias) if y is None else y.addmm_(z, u.t())
        ctx.layer, ctx.fused_collectives, ctx.has_bias, ctx.width = layer, fused, bias is not None, width
        ctx.save_for_backward(x, z, weight, all_u, all_v if group.size() == 1 else full)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, z, weight, all_u, kept = ctx.saved_tensors
        layer, group, sequence_parallel = ctx.layer, ctx.layer.tp_group, ctx.layer.sequence_parallel
        u = layer.used_u(all_u, ctx.width)
        full = layer.used_v(kept, ctx.width).t() if group.size() == 1 else kept
        begin_sum = begin_reduce_scatter if sequence_parallel else begin_all_reduce
        dz = dy @ u  # [T, k], a part of the sum over ranks
        if ctx.fused_collectives:
            summing = begin_sum((dy @ weight).addmm_(dz, full.t()), group)
            reducing = layer.full_factor.begin_reduce((dz.t() @ x).t())
            du = dy.t() @ z
            dx = summing.wait()
        else:
            summing_z = begin_sum(dz, group)
            summing_x = begin_sum(dy @ weight, group) if weight is not None else None
            du = dy.t() @ z
            dz = summing_z.wait()
            if sequence_parallel:
                reducing = layer.full_factor.begin_reduce((dz.t() @ x).t())
            else:
                local_x = local_shard(x.t(), group).t()
                reducing = layer.full_factor.begin_reduce((dz.t() @ local_x).t(), shared=True)
            dx = dz @ full.t() if summing_x is None else summing_x.wait().addmm_(dz, full.t())
        dv = reducing.wait()
        dw = None
        if ctx.needs_input_grad[1]:  # only for the start from gradients: W0 is frozen in training
            every = x if ctx.fused_collectives or not sequence_parallel else begin_all_gather(x, group).wait()
            dw = dy.t() @ every
        db = dy.sum(0) if ctx.has_bias else None
        du, dv = _of_all_columns(du, dv.t(), layer.capacity)
        return dx, dw, du, dv, db, None


class RowProduct(torch.autograd.Function):
    """x [T, I/n], weight [O, I/n], all_u [O/n, K], all_v [K, I/n], bias [O] -> y [T', O]."""

    @staticmethod
    def forward(ctx, x, weight, all_u, all_v, bias, layer) -> Tensor:
        width = layer.width
        u, v = layer.used_u(all_u, width), layer.used_v(all_v, width)
        group, sequence_parallel, fused = layer.tp_group, layer.sequence_parallel, layer.fused_collectives
        begin_sum = begin_reduce_scatter if sequence_parallel else begin_all_reduce
        full = layer.full_factor.gather(u)  # [O, k]
        z = F.linear(x, v)  # [T, k], a part of the sum over ranks
        if fused:
            y = begin_sum(F.linear(x, weight).addmm_(z, full.t()), group).wait()
            y = y if bias is None else y.add_(bias)
        else:
            summing_z = begin_sum(z, group)
            summing_y = begin_sum(F.linear(x, weight), group) if weight is not None else None
            z = summing_z.wait()
            y = F.linear(z, full, bias)
            y = y if summing_y is None else y.add_(summing_y.wait())
        ctx.layer, ctx.fused_collectives, ctx.has_bias, ctx.width = layer, fused, bias is not None, width
        ctx.save_for_backward(x, z, weight, all_v, all_u if group.size() == 1 else full)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, z, weight, all_v, kept = ctx.saved_tensors
        layer, group, sequence_parallel = ctx.layer, ctx.layer.tp_group, ctx.layer.sequence_parallel
        v = layer.used_v(all_v, ctx.width)
        full = layer.used_u(kept, ctx.width) if group.size() == 1 else kept
        every = dy  # [T, O]
        if ctx.fused_collectives:
            every = begin_all_gather(dy, group).wait() if sequence_parallel else dy
            dz = every @ full
            reducing = layer.full_factor.begin_reduce(every.t() @ z)
        elif sequence_parallel:
            dz = dy @ full
            gathering_z = begin_all_gather(dz, group)
            gathering_y = begin_all_gather(dy, group) if weight is not None else None
            reducing = layer.full_factor.begin_reduce(dy.t() @ z)
            dz = gathering_z.wait()
            every = gathering_y.wait() if gathering_y else dy
        else:
            dz = dy @ full
            reducing = layer.full_factor.begin_reduce(local_shard(dy.t(), group) @ z, shared=True)
        dv = dz.t() @ x
        dx = dz @ v
        if weight is not None:
            dx.addmm_(every, weight)
        du = reducing.wait()
        dw = every.t() @ x if ctx.needs_input_grad[1] else None
        db = dy.sum(0) if ctx.has_bias else None
        du, dv = _of_all_columns(du, dv, layer.capacity)
        return dx, dw, du, dv, db, None


def _of_all_columns(du: Tensor, dv: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Gradients of U [O/n, K] and V [K, I/n] from those of the columns in use; the others have none."""
    unused = capacity - du.shape[1]
    return (F.pad(du, (0, unused)), F.pad(dv, (0, 0, 0, unused))) if unused else (du, dv)
