"""What ranks hold in common is compared to the bit: real trainings pass, a planted difference is named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from inrank_megatron.engine.replicas import check_replicas
from inrank_megatron.errors import UserError
from tests.contract.cases import CHECK
from tests.contract.layouts import LAYOUTS, Layout
from tests.contract.sessions import Session, build
from tests.harness import run_ranks

LAYER = "decoder.layers.1.mlp.linear_fc2"
NORM = "decoder.layers.0.input_layernorm.weight"


def parameter(name: str) -> Callable[[Session], torch.Tensor]:
    return lambda session: session.engine.model.get_parameter(name).data


def state(name: str, key: str | None) -> Callable[[Session], torch.Tensor]:
    """What this rank holds of the optimizer's state."""

    def find(session: Session) -> torch.Tensor:
        parameter = session.engine.model.get_parameter(name)
        return session.engine.master_weights.held(parameter, key)[0]

    return find


STATE = {
    f"exp_avg of {NORM}": state(NORM, "exp_avg"),
    f"exp_avg_sq of {NORM}": state(NORM, "exp_avg_sq"),
    f"exp_avg of {LAYER}.V": state(f"{LAYER}.V", "exp_avg"),
    f"the master weight of {NORM}": state(NORM, None),
    f"the master weight of {LAYER}.V": state(f"{LAYER}.V", None),
}
TENSORS = {
    NORM: parameter(NORM),
    f"{LAYER}.U": parameter(f"{LAYER}.U"),
    f"{LAYER}.weight": parameter(f"{LAYER}.weight"),
    f"{LAYER}.V0": lambda session: session.engine.initial[LAYER][1],
}


@contextmanager
def planted(tensor: torch.Tensor | None) -> Iterator[None]:
    """Two entries of ``tensor`` that differ change places for a while; None: nothing happens."""
    if tensor is None:
        yield
        return
    original = tensor.clone()
    flat = tensor.view(-1)
    other = int((flat != flat[0]).nonzero()[0]) if (flat != flat[0]).any() else None
    if other is None:  # a norm that has not been trained is all ones
        flat[0] += 1
    else:
        flat[[0, other]] = flat[[other, 0]]
    yield
    tensor.copy_(original)


def verdict(session: Session) -> str:
    try:
        check_replicas(session.engine, step=session.step, last_good=CHECK)
    except UserError as error:
        return str(error)
    return "equal"


def verdicts(rank: int, world_size: int, layout: Layout, odd_rank: int, settings: dict) -> dict[str, str]:
    """What each rank says of a trained model: as it is, and with a difference planted on one rank."""
    session = build("inrank", layout, **settings).start().train(CHECK + 1)
    said = {"trained": verdict(session)}
    for name, find in TENSORS.items():
        with planted(find(session) if rank == odd_rank else None):
            said[name] = verdict(session)
    layer = session.engine.factorised[LAYER]
    layer.spec = replace(layer.spec, rank=layer.spec.rank + (rank == odd_rank))
    said[f"the rank of {LAYER}"] = verdict(session)
    return said


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "zero_stage": 2}], ids=["FP32", "BF16"])
@pytest.mark.parametrize(
    ("layout", "odd_rank", "named"),
    [
        ("DP2", 1, {"common": "ranks 0, 1 differ", "shard": "ranks 0, 1 differ"}),
        ("TP2 SP DP2", 2, {"common": "rank 2 differs", "shard": "ranks 0, 2 differ"}),
    ],
)
def test_replica_difference_is_reported_on_every_rank(layout, odd_rank, named, settings):
    layout = LAYOUTS[layout]
    first, *others = run_ranks(verdicts, layout.world_size, layout, odd_rank, settings)
    assert all(said == first for said in others)
    assert first.pop("trained") == "equal"
    for name, message in first.items():
        common = name == NORM or name.startswith("the rank of")
        assert message.startswith(f"{name}: {named['common' if common else 'shard']} after step {CHECK + 1}")


def test_tensor_parallel_ranks_compare_replicated_tensors_alone():
    said = run_ranks(verdicts, 2, LAYOUTS["TP2 SP"], 0, {})[1]
    assert said[NORM].startswith(f"{NORM}: ranks 0, 1 differ")
    assert {said[name] for name in TENSORS if name != NORM} == {"equal"}, "no other rank has these"


def both_phases(rank: int, world_size: int, name: str, layout: Layout, settings: dict) -> list[str]:
    session = build(name, layout, switch=CHECK + 2, **settings).start()
    said = [verdict(session)]
    for steps in (CHECK - 1, 2, 3):
        said.append(verdict(session.train(steps)))
    return said


@pytest.mark.parametrize(
    ("name", "layout", "settings"),
    [
        ("inrank-efficient-attention", "TP2 SP DP2", {"bf16": True}),
        ("inrank-efficient", "TP2 without SP", {}),
        ("inrank-efficient", "TP2 SP DP2", {"zero_stage": 3}),
        ("relora", "DP2", {}),
    ],
)
def test_replicas_stay_bitwise_equal(name, layout, settings):
    """At the start, before and after growth, after the switch or restart: no difference is ever found."""
    layout = LAYOUTS[layout]
    for said in run_ranks(both_phases, layout.world_size, name, layout, settings):
        assert said == ["equal"] * 4


def state_verdicts(rank: int, world_size: int, layout: Layout, odd_rank: int, settings: dict) -> dict:
    """What each rank says of optimizer state that is another one on one rank."""
    session = build("inrank", layout, **settings).start().train(CHECK + 1)
    said = {"trained": verdict(session)}
    for name, find in STATE.items():
        with planted(find(session) if rank == odd_rank and find(session).numel() else None):
            said[name] = verdict(session)
    return said


@pytest.mark.parametrize(
    ("layout", "settings", "found"),
    [
        ("DP2", {"bf16": True, "zero_stage": 0}, STATE.keys()),
        ("TP2 SP DP2", {"zero_stage": 0}, {name for name in STATE if name.startswith("exp")}),
        ("TP2 SP DP2", {"bf16": True, "zero_stage": 1}, {name for name in STATE if name.endswith(NORM)}),
        ("TP2 SP", {"zero_stage": 3}, {name for name in STATE if name.endswith(NORM)}),
    ],
)
def test_optimizer_state_that_two_ranks_hold_is_compared(layout, settings, found):
    """All of it without ZeRO; with it, what tensor-parallel ranks have in common. In FP32 of stage 0 the
    parameter is its own master weight, and has that one's name.
    """
    layout, odd_rank = LAYOUTS[layout], 1
    first, *others = run_ranks(state_verdicts, layout.world_size, layout, odd_rank, settings)
    assert all(said == first for said in others)
    assert first.pop("trained") == "equal"
    differing = {name for name, message in first.items() if message.startswith(f"{name}: rank")}
    own_master = {name for name, message in first.items() if message.startswith(f"{name.split()[-1]}: rank")}
    assert differing == set(found)
    masters = {name for name in STATE if name.startswith("the master")}
    assert own_master == (masters if settings == {"zero_stage": 0} else set())
    assert all(first[name] == "equal" for name in STATE.keys() - differing - own_master)
