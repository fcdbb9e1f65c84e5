"""Steps of Muon, Spectron and LoRA-Muon in an engine, against their rules on whole matrices."""

import math

import pytest
import torch
from torch import Tensor

from inrank_megatron.engine.fragments import inner_optimizer
from inrank_megatron.engine.orthogonalised import Matrix
from inrank_megatron.lowrank.linalg import oracle
from tests.contract.cases import CHECK, SIZES
from tests.contract.layouts import LAYOUTS, Layout
from tests.contract.probes import snapshot
from tests.contract.sessions import build
from tests.harness import run_ranks

BUFFER = ".momentum_buffer"
DECAY, MOMENTUM = 0.1, 0.95


def one_step(rank: int, world_size: int, layout: Layout, settings: dict) -> dict:
    """All state before and after the first step past a growth."""
    session = build("inrank-efficient-spectron", layout, **settings).start().train(CHECK)
    before = snapshot(session)
    session.train_step()
    return {"before": before, "after": snapshot(session)}


def expected(before: dict[str, Tensor], after: dict[str, Tensor], name: str, settings: dict) -> Tensor:
    """The matrix after the step, from the momentum before and after it."""
    old, new = before[name + BUFFER].double(), after[name + BUFFER].double()
    gradient = (new - MOMENTUM * old) / (1 - MOMENTUM)
    momentum = (1 - MOMENTUM) * gradient + MOMENTUM * new
    lr, weight = SIZES["lr"], before[name].double()
    if not name.endswith((".U", ".V")):
        size = 0.2 * math.sqrt(max(new.shape)) * lr
        return weight * (1 - lr * DECAY) - size * oracle.orthogonalised(momentum)
    u, v = (before[f"{name[:-2]}.{factor}"].double() for factor in "UV")
    lr *= settings.get("factor_lr_multiplier", 1.0)
    size = 0.2 * math.sqrt(max(len(u), v.shape[1])) * lr
    if "factor_optimizer" not in settings:
        size /= torch.linalg.matrix_norm(u, 2) + torch.linalg.matrix_norm(v, 2) + 1
        return weight * (1 - lr * DECAY) - size * oracle.orthogonalised(momentum)
    used = u.count_nonzero(dim=0) > 0  # columns past the rank and its buffer are zero
    direction = torch.zeros_like(weight)
    if name.endswith(".U"):
        direction[:, used] = oracle.lora_muon_step(momentum[:, used], oracle.inverse_root(v[used].mT))
    else:
        direction[used] = oracle.lora_muon_step(momentum[used].mT, oracle.inverse_root(u[:, used])).mT
    kept = math.sqrt(1 - lr * DECAY)
    return weight * kept - size / 2 * direction / kept


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("TP1 DP1", {"factor_lr_multiplier": 3.0}),
        ("TP2 SP DP2", {"zero_stage": 3}),
        ("TP2 SP DP2", {"factor_optimizer": "lora-muon", "zero_stage": 1}),
        ("DP2", {"factor_optimizer": "lora-muon", "zero_stage": 3}),
    ],
    ids=str,
)
def test_step_follows_the_rule_on_whole_matrices(layout, settings):
    shape = LAYOUTS[layout]
    seen = run_ranks(one_step, shape.world_size, shape, settings)[0]
    before, after = seen["before"], seen["after"]
    names = [name.removesuffix(BUFFER) for name in after if name.endswith(BUFFER)]
    assert len(names) == 2 * (2 + 2 * 2), "attention's two linears and four factors in each of two layers"
    for name in names:
        moved = (after[name] - before[name]).abs().max()
        assert moved > 1e-4, name
        # The spectral norms may be too small by a hundredth; what FP32 keeps of a gradient is not its bits.
        assert (after[name] - expected(before, after, name, settings)).abs().max() < 0.01 * moved, name


def factors_computed(rank: int, world_size: int, layout: Layout, settings: dict) -> list[tuple[str, bool]]:
    """The layers' names and whether it is U, of the factors whose steps this rank computes."""
    session = build("inrank-efficient-spectron", layout, factor_optimizer="lora-muon", **settings).start()
    names = {id(module): name for name, module in session.engine.model.named_modules()}
    groups = inner_optimizer(session.engine.deepspeed.optimizer)._groups.values()
    computed: list[Matrix] = [group.matrices[i] for group in groups for i in group.own]
    return [(names[id(matrix.layer)], matrix.is_left) for matrix in computed if matrix.layer]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_replica_computes_both_factors_of_a_layer(stage):
    """So the inverse root that a step needs of the other factor is where it is needed, and there alone."""
    seen = run_ranks(factors_computed, 2, LAYOUTS["DP2"], {"zero_stage": stage})
    layers = [{name for name, _ in own} for own in seen]
    assert [len(own) for own in seen] == [4, 4]
    assert [sorted(own) for own in seen] == [
        sorted((name, left) for name in names for left in (True, False)) for names in layers
    ]
