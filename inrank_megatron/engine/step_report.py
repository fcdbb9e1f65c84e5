"""What the host learns of a step, brought from the device at once.

The host prepares the device's work ahead of it, as long as it asks for no result: every such question drains
the queue. A step needs one answer, the gradient norm, by which the optimizer goes on or not; whatever else
the host wants to know comes with it. DeepSpeed's optimizers ask for the norm up to five times, so while they
step they are given it as a value of the host. docs/guides/throughput.md lists the questions that are left.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime import utils as deepspeed_utils
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor

from inrank_megatron.distributed.process_groups import Parallel

NOTICES = 2
"""The largest notice that a rank can give the others."""
_NORMS = (
    # Where DeepSpeed's optimizers look up what computes the norm: BF16 of stage 1, stages 1 and 2, stage 3.
    (bf16_optimizer, "get_global_norm_of_tensors"),
    (stage_1_and_2, "combine_grad_norm_groups"),
    (stage3, "combine_grad_norm_groups"),
)
_MARK = "mask_nan_or_inf_with_val_inplace"


class StepReport:
    """Loss, notice and gradient norm of one step. Every rank makes it at the same point: it sums at once.

    Args:
        total: this rank's sum of the losses of its micro-batches, a scalar in FP64 on the device.
        count: micro-batches of all replicas together.
        notice: what this rank has to report to the others, 0 (nothing) to ``NOTICES``.
        need_finite: whether a loss that is not finite forbids the update.
        forbids: whether a loss forbids the update for another reason; the same on all ranks.
        seconds: of this rank, to be sent to all; None, on all ranks alike: none are sent.

    Attributes:
        loss, notice: mean loss over all micro-batches, largest notice of all ranks; after :meth:`fetch`.
        forbidden: what ``forbids`` said. rank_seconds: those of all ranks, by rank; empty if none were sent.
    """

    def __init__(
        self,
        total: Tensor,
        count: int,
        notice: int,
        parallel: Parallel,
        *,
        need_finite: bool,
        forbids: Callable[[float], bool] = lambda loss: False,
        seconds: float | None = None,
    ):
        self.loss: float | None = None
        self.notice, self.forbidden = 0, False
        self.rank_seconds: list[float] = []
        self._count, self._need_finite, self._forbids = count, need_finite, forbids
        times = 0 if seconds is None else parallel.world_size
        self._sums = torch.zeros(1 + NOTICES + times, dtype=torch.float64, device=total.device)
        if seconds is not None:
            self._sums[1 + NOTICES + parallel.rank] = seconds
        if parallel.tp_rank == 0:  # the others have the same
            self._sums[0] = total
        if notice:
            self._sums[notice] = 1.0
        dist.all_reduce(self._sums)

    def fetch(self, norm: Tensor | None = None) -> Tensor:
        """Bring everything to the host, ``norm`` with it, a scalar of any floating type; without: 0.

        It becomes infinite where the loss forbids the update, so that the optimizer leaves the step out.
        """
        own = torch.zeros((), device=self._sums.device) if norm is None else norm
        if own.device == self._sums.device:
            *sums, last = torch.cat([self._sums, own.double().view(1)]).cpu().tolist()
        else:  # with offload the norm is the host's
            sums, last = self._sums.cpu().tolist(), own.item()
        total, notices, self.rank_seconds = sums[0], sums[1 : 1 + NOTICES], sums[1 + NOTICES :]
        self.loss = total / self._count
        self.notice = max((notice for notice, count in enumerate(notices, start=1) if count), default=0)
        self.forbidden = self._forbids(self.loss)
        if self.forbidden or (self._need_finite and not math.isfinite(self.loss)):
            last = math.inf
        return torch.tensor(last, dtype=own.dtype)


@contextmanager
def norms_through(fetch: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it the norms that DeepSpeed's optimizers compute pass through ``fetch``."""
    marks = [(module, _MARK) for module in (deepspeed_utils, stage_1_and_2, stage3)]
    originals = {place: getattr(*place) for place in (*_NORMS, *marks)}

    def through(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: fetch(compute(*args, **kwargs))

    try:
        for place in _NORMS:
            setattr(*place, through(originals[place]))
        for place in marks:
            setattr(*place, _mark)
        yield
    finally:
        for place, original in originals.items():
            setattr(*place, original)


def _mark(norm: Tensor, device: object = None, val: float = -1.0) -> None:
    """As DeepSpeed's: ``val`` for a norm that is not finite; it would copy that from the host."""
    norm.masked_fill_(~norm.isfinite(), val)


def leave_overflow_to_the_norm(optimizer) -> None:
    """DeepSpeed's ``optimizer`` asks for the norm alone, not for an overflow before it.

    A gradient that is not finite makes the norm so, which has the same consequence. With offload the
    gradients are looked at one by one, on their way to the host.
    """
    if hasattr(optimizer, "overflow_checker"):  # BF16 of stage 0
        optimizer.overflow_checker.has_overflow = lambda *args, **kwargs: False
    elif not (getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)):
        optimizer.check_overflow = lambda *args, **kwargs: None
