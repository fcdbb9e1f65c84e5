"""What ranks learn of a step together."""

import math

import pytest
import torch
from deepspeed.runtime.zero import stage_1_and_2

from inrank_megatron.engine.step_report import StepReport, norms_through
from tests.groups import join
from tests.harness import run_ranks


def reports(rank: int, world_size: int, tensor_parallel: int) -> list[tuple[float, int, float]]:
    """Loss, notice and norm as this rank has them, for several steps."""
    parallel, seen = join(tensor_parallel), []
    for notices, scale, norm in (((0, 0), 1.0, 0.1), ((1, 2), 1.0, 0.1), ((0, 1), math.nan, 0.1)):
        total = torch.tensor(scale * (parallel.dp_rank + 1.0), dtype=torch.float64)
        report = StepReport(total, 2 * parallel.dp_size, notices[rank], parallel, need_finite=True)
        fetched = report.fetch(torch.tensor(norm))
        assert fetched.dtype == torch.float32
        seen.append((report.loss, report.notice, fetched.item()))
    return seen


@pytest.mark.parametrize(("tensor_parallel", "loss"), [(1, 0.75), (2, 0.5)])
def test_every_rank_learns_the_mean_loss_and_the_largest_notice(tensor_parallel, loss):
    """The norm passes unchanged, unless the loss forbids an update."""
    one, other = run_ranks(reports, 2, tensor_parallel)
    norm = torch.tensor(0.1).item()
    assert one[:2] == other[:2] == [(loss, 0, norm), (loss, 2, norm)]
    for last in (one[2], other[2]):
        assert math.isnan(last[0]) and last[1:] == (1, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_deepspeed_computes_the_same_norms_on_the_way(bad):
    """One that is not finite is still infinite for the optimizer; afterwards everything is as it was."""
    before = vars(stage_1_and_2).copy()
    passed = []
    for value in (0.1, bad):
        results = []
        for norms in (before, vars(stage_1_and_2)):
            with norms_through(lambda norm: passed.append(norm) or norm):
                groups = [torch.tensor(value), torch.tensor(3.0)]
                norms["mask_nan_or_inf_with_val_inplace"](groups[0], device="cpu")
                results.append(norms["combine_grad_norm_groups"](groups).item())
        assert results[0] == results[1]
        assert math.isfinite(results[1]) == math.isfinite(value)
    assert len(passed) == 2
    assert vars(stage_1_and_2) == before
