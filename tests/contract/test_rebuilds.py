"""A switch builds a second model and engine in the process: the first must be gone."""

import gc
import threading

import torch
import torch.distributed as dist
from torch import nn

from tests.contract.sessions import LAYOUTS, Layout, build
from tests.harness import run_ranks


def census() -> dict[str, int]:
    """What is alive in this process."""
    gc.collect()
    things = gc.get_objects()
    kinds = [type(thing).__name__ for thing in things]
    modules = [thing for thing in things if issubclass(type(thing), nn.Module)]
    tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor)]
    return {
        "engines": kinds.count("DeepSpeedEngine"),
        "models": kinds.count("GPTModel"),
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules
        ),
        "tensor elements": sum(t.numel() for t in tensors),
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "python threads": threading.active_count(),
    }


def rebuild_often(rank: int, world_size: int, layout: Layout, bf16: bool) -> list[dict[str, int]]:
    """A census after the switch, and one after each of ten more rebuilds; a training step before each."""
    session = build("inrank-efficient", layout, switch=2, bf16=bf16).start().train(3)
    counts = [census()]
    for _ in range(10):
        session.engine._build(session.engine.factor_specs())
        session.train(1)
        counts.append(census())
    return counts


def test_rebuilds_leave_nothing_behind():
    """Neither engine nor model, hook, memory or process group: all counts are those after the switch."""
    for bf16 in (False, True):
        for counts in run_ranks(rebuild_often, 2, LAYOUTS["DP2"], bf16):
            assert counts[0]["engines"] == counts[0]["models"] == 1
            assert counts[-1] == counts[0], counts
