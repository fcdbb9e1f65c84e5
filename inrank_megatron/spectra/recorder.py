"""Singular values of what training has added to each weight: ``D_t = W_t - W_0`` (InRank, definition 1)."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from inrank_megatron.errors import UserError
from inrank_megatron.spectra.values import exact_values, leading_values

Row = dict[str, Any]


class SpectrumRecorder:
    """Records the spectra of a model's cumulative updates while it trains.

    A row is ``{"step": 100, "layer": "fc1.weight", "values": [...]}``: the singular values of ``W_t - W_0``,
    descending, in the units of the weight. ``values`` is empty where the weight holds NaN or Inf.

    Shards of FSDP2, and those of Megatron-Core's tensor parallelism, are decomposed without being gathered:
    all ranks record the same steps, and all get the same values.

    Args:
        model: any PyTorch module. Its weights now are W_0: make the recorder before training. Recorded are
            trainable parameters of two or more dimensions; more than two count as ``[shape[0], rest]``.
        every: optimizer steps from one record to the next [100].
        steps: record after exactly these steps instead.
        start_step: steps that were taken before, where training goes on [0]. W_0 is what the model has now.
        match: regular expression that matches somewhere in the name of a recorded parameter [all].
        leading: largest singular values to record of a matrix, at most [256].
        exact_up_to: a matrix whose smaller dimension is larger gets a randomised decomposition [1024].
        file: rows are appended to it as JSON lines, by rank 0 of ``torch.distributed`` alone.
        tensor_parallel_group: of a model with shards by Megatron-Core's ``partition_dim``.

    Memory: one copy of this rank's recorded weights on the host in their own dtype, for a time one matrix in
    FP64 on its device, and the rows. Time: an exact decomposition takes about ``4 m h^2`` operations for an
    ``m x h`` matrix, a randomised one ``10 m h (leading + 16)``.

    Raises:
        UserError: nothing matches, as FSDP1's flat parameters; a shard without its group; a parameter of
            which this process holds nothing, as under ZeRO stage 3; a DTensor that is cut in another way than
            FSDP2's, along its first axis.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        steps: Collection[int] | None = None,
        start_step: int = 0,
        match: str = "",
        leading: int = 256,
        exact_up_to: int = 1024,
        file: str | Path | None = None,
        tensor_parallel_group: ProcessGroup | None = None,
    ):
        if min(every, leading) < 1:
            raise UserError(
                f"every={every}, leading={leading}: both are at least 1; leave them out for 100, 256"
            )
        self.rows: list[Row] = []
        self._every, self._steps = every, steps
        self._leading, self._exact_up_to = leading, exact_up_to
        self._file, self._group = Path(file) if file else None, tensor_parallel_group
        self._hook: RemovableHandle | None = None
        self._step = start_step
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.ndim >= 2 and re.search(match, name)
        }
        if not self._parameters:
            raise UserError(
                f"match={match!r} is in the name of no trainable matrix of this model; leave it out"
            )
        for name, parameter in self._parameters.items():
            self._check(name, parameter)
        self._first = {name: _own(p).detach().to("cpu", copy=True) for name, p in self._parameters.items()}

    def _check(self, name: str, parameter: Tensor) -> None:
        if isinstance(parameter, DTensor) and len(_cuts(parameter)) > 1:
            raise UserError(
                f"{name} is a DTensor with placements {parameter.placements}; record where it is whole or "
                "cut once, along its first axis (FSDP2)"
            )
        if parameter.numel() == 0:
            raise UserError(
                f"{name}: this process holds none of it (ZeRO stage 3?); record with stage 2 or lower"
            )
        if _partition_dim(parameter) is not None and self._group is None:
            raise UserError(f"{name} is a shard of tensor parallelism; give tensor_parallel_group")

    def attach(self) -> "SpectrumRecorder":
        """Count and record after the steps of whichever optimizer has the first recorded parameter.

        DeepSpeed and Megatron-Core's optimizers update copies of the parameters: call :meth:`step` after
        their steps instead.
        """
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(lambda optimizer, *_: self._stepped(optimizer))
        return self

    def detach(self) -> None:
        """Record no more; rows stay."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def step(self) -> None:
        """Count a step, and record if it is one of those chosen."""
        self._step += 1
        if self._step in self._steps if self._steps is not None else self._step % self._every == 0:
            self.record(self._step)

    def record(self, step: int) -> list[Row]:
        """Record now, as ``step``; returns the new rows. Collective over the tensor-parallel group."""
        rows = [
            {"step": step, "layer": name, "values": self._values(name, parameter)}
            for name, parameter in self._parameters.items()
        ]
        self.rows += rows
        if self._file is not None and not (dist.is_initialized() and dist.get_rank()):
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows

    def _stepped(self, optimizer: Optimizer) -> None:
        first = next(iter(self._parameters.values()))
        if any(parameter is first for group in optimizer.param_groups for parameter in group["params"]):
            self.step()

    @torch.no_grad()
    def _values(self, name: str, parameter: Tensor) -> list[float]:
        dim, group = self._cut(parameter)
        own = _own(parameter)
        update = own.double() - self._first[name].to(own.device, torch.float64)
        if not _all_finite(update, group):
            return []
        x = update.flatten(1)
        x = x.t() if dim == 1 or (dim is None and x.shape[0] < x.shape[1]) else x
        rows = x.shape[0] * (1 if group is None else group.size())
        if isinstance(parameter, DTensor) and group is not None:
            rows = parameter.shape[0]  # FSDP2's shards may be of different sizes
        smaller = min(rows, x.shape[1])
        count = min(self._leading, smaller)  # of shards of a wide matrix more come back, which are zero
        if smaller <= self._exact_up_to:
            return exact_values(x, group)[:count].tolist()
        return leading_values(x, count, group).tolist()

    def _cut(self, parameter: Tensor) -> tuple[int | None, ProcessGroup | None]:
        """The axis along which it is sharded, and over which group; None: it is whole."""
        if isinstance(parameter, DTensor):
            cuts = _cuts(parameter)
            return (0, parameter.device_mesh.get_group(cuts[0])) if cuts else (None, None)
        dim = _partition_dim(parameter)
        return dim, None if dim is None else self._group


def _own(parameter: Tensor) -> Tensor:
    """What this process holds of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _cuts(parameter: DTensor) -> list[int]:
    """The dimensions of its mesh over which it is cut along its first axis; two or more for other cuts."""
    placements = parameter.placements
    if all(type(one) is Replicate or one == Shard(0) for one in placements):
        return [place for place, one in enumerate(placements) if one == Shard(0)]
    return [-1, -1]


def _partition_dim(parameter: Tensor) -> int | None:
    """Along which tensor parallelism has cut it; None: it is whole. The attributes are Megatron-Core's."""
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return getattr(parameter, "partition_dim", 0) if sharded else None


def _all_finite(update: Tensor, group: ProcessGroup | None) -> bool:
    finite = update.isfinite().all().to(torch.int32)
    if group is not None:
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=group)
    return bool(finite)
