"""Steps of Muon and Spectron in an engine, against their rules on whole matrices."""

import math

import pytest
import torch
from torch import Tensor

from inrank_megatron.lowrank.linalg import oracle
from tests.contract.cases import CHECK, SIZES
from tests.contract.layouts import LAYOUTS, Layout
from tests.contract.probes import snapshot
from tests.contract.sessions import build
from tests.harness import run_ranks

BUFFER = ".momentum_buffer"
DECAY, MOMENTUM = 0.1, 0.95


def one_step(rank: int, world_size: int, layout: Layout, zero_stage: int, rates: dict[str, float]) -> dict:
    """All state before and after the first step past a growth."""
    session = build("inrank-efficient-spectron", layout, zero_stage=zero_stage, **rates).start().train(CHECK)
    before = snapshot(session)
    session.train_step()
    return {"before": before, "after": snapshot(session)}


def expected(before: dict[str, Tensor], after: dict[str, Tensor], name: str, rates: dict) -> Tensor:
    """The matrix after the step, from the momentum before and after it."""
    old, new = before[name + BUFFER].double(), after[name + BUFFER].double()
    gradient = (new - MOMENTUM * old) / (1 - MOMENTUM)
    update = oracle.orthogonalised((1 - MOMENTUM) * gradient + MOMENTUM * new)
    lr, features = SIZES["lr"], max(new.shape)
    if name.endswith((".U", ".V")):
        layer = name[:-2]
        u, v = before[f"{layer}.U"].double(), before[f"{layer}.V"].double()
        lr *= rates.get("factor_lr_multiplier", 1.0)
        features = max(len(u), v.shape[1])
        update /= torch.linalg.matrix_norm(u, 2) + torch.linalg.matrix_norm(v, 2) + 1
    return before[name].double() * (1 - lr * DECAY) - 0.2 * math.sqrt(features) * lr * update


@pytest.mark.parametrize(
    ("layout", "zero_stage", "rates"), [("TP1 DP1", 0, {"factor_lr_multiplier": 3.0}), ("TP2 SP DP2", 3, {})]
)
def test_step_follows_the_rule_on_whole_matrices(layout, zero_stage, rates):
    shape = LAYOUTS[layout]
    seen = run_ranks(one_step, shape.world_size, shape, zero_stage, rates)[0]
    before, after = seen["before"], seen["after"]
    names = [name.removesuffix(BUFFER) for name in after if name.endswith(BUFFER)]
    assert len(names) == 2 * (2 + 2 * 2), "attention's two linears and four factors in each of two layers"
    for name in names:
        moved = (after[name] - before[name]).abs().max()
        assert moved > 1e-4, name
        # The spectral norms may be too small by a hundredth; what FP32 keeps of a gradient is not its bits.
        assert (after[name] - expected(before, after, name, rates)).abs().max() < 0.01 * moved, name
