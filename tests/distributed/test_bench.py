"""The instrument that counts elements on the wire: by hand, on real ranks, and as the benchmark uses it."""

import json

import pytest
import torch
import torch.distributed as dist

from inrank_megatron.benchmarks.blocks import DENSE, RANKS, phase_1, phase_2
from inrank_megatron.benchmarks.collectives import Traffic, count, traffic
from inrank_megatron.benchmarks.wire import mlp_pass, more_tokens
from inrank_megatron.distributed.process_groups import initialise
from tests.forked import run_forked
from tests.harness import ROOT, run_ranks

VARIANTS = {
    "phase-2": phase_2(RANKS["tiny"]),
    "phase-1-fused": phase_1(RANKS["tiny"], fused_collectives=True),
    "phase-1-separate": phase_1(RANKS["tiny"], fused_collectives=False),
    "dense": DENSE,
}
TOKENS = 1024


def each_collective(rank: int, world_size: int) -> dict[str, float]:
    """Elements sent for a tensor of 12 (whole), by every name in use."""
    full, part = torch.ones(12), torch.ones(12 // world_size)
    parts = [torch.ones(12 // world_size) for _ in range(world_size)]
    calls = {
        "all_reduce": lambda: dist.all_reduce(full),
        "all_reduce, asynchronous": lambda: dist.all_reduce(full, async_op=True).wait(),
        "all_gather": lambda: dist.all_gather(parts, part),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(full, part),
        "_all_gather_base": lambda: dist._all_gather_base(full, part),
        "reduce_scatter": lambda: dist.reduce_scatter(part, parts),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, full),
        "_reduce_scatter_base": lambda: dist._reduce_scatter_base(part, full),
        "broadcast": lambda: dist.broadcast(full, src=0),
        "barrier": dist.barrier,
    }
    return {name: sum(c.sent for c in count(call)) for name, call in calls.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_collective_bytes_follow_the_ring_formula(ranks):
    once = 12 * (ranks - 1) / ranks
    for sent in run_ranks(each_collective, ranks):
        assert sent.pop("barrier") == 0
        assert sent.pop("all_reduce") == sent.pop("all_reduce, asynchronous") == 2 * once
        assert sent == dict.fromkeys(sent, once)


def unknown_collective(rank: int, world_size: int) -> str:
    from torch.distributed._functional_collectives import all_reduce

    try:
        count(lambda: all_reduce(torch.ones(2), "sum", dist.group.WORLD))
    except NotImplementedError as error:
        return str(error)
    return "nothing was said"


def test_unknown_collective_is_an_error():
    for message in run_ranks(unknown_collective, 2):
        assert "all_reduce is not counted" in message


def mixed_traffic(rank: int, world_size: int) -> Traffic:
    def run(tokens: int) -> None:
        dist.all_reduce(torch.ones(tokens, 3))
        dist.all_reduce(torch.ones(10))
        dist.all_reduce(torch.ones(5 * tokens + 7))

    return traffic(run, 8, more_tokens=10)


def test_activation_traffic_is_what_grows_with_tokens():
    """An all-reduce sends 2 k = 1 of each element on two ranks."""
    assert run_ranks(mixed_traffic, 2) == [Traffic(activation=8 * 3 + 8 * 5, parameter=10 + 7)] * 2


def mlp_on_real_ranks(rank: int, world_size: int, name: str, recompute: bool) -> Traffic:
    parallel = initialise(backend="gloo", tensor_model_parallel_size=world_size)
    run = mlp_pass("tiny", VARIANTS[name], parallel, recompute=recompute)
    return traffic(run, TOKENS, more_tokens=more_tokens(TOKENS))


@pytest.fixture(scope="module")
def figures() -> list[dict]:
    """What the benchmark counts on one process that plays rank 0."""
    sizes = ["--tensor-model-parallel-size", "2", "4"]
    run = run_forked(ROOT / "tools" / "bench.py", "wire", "--preset", "tiny", "--json", *sizes)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_single_process_count_matches_real_ranks(figures, ranks, name):
    case = f"{name} tiny n={ranks} T={TOKENS}"
    of_case = {row["quantity"]: row["measured"] for row in figures if row["case"] == case}
    for sent in run_ranks(mlp_on_real_ranks, ranks, name, False):
        assert of_case["activation elements"] == sent.activation
        assert of_case["parameter elements"] == sent.parameter
        assert of_case["total elements"] == sent.total
    again = run_ranks(mlp_on_real_ranks, ranks, name, True)[0]
    assert of_case["elements that recomputation adds"] == again.total - sent.total


@pytest.mark.parametrize("tokens", [1024, 8192])
@pytest.mark.parametrize("ranks", [2, 4])
def test_traffic_is_within_the_design_bounds(figures, ranks, tokens):
    """Second phase 4 k T r; first phase fused at most 4 k T h, separate 4 k T r more; dense Megatron 5 k T
    h.
    """
    share, width = (ranks - 1) / ranks, 192
    sent = {
        name: {r["quantity"]: r for r in figures if r["case"] == f"{name} tiny n={ranks} T={tokens}"}
        for name in VARIANTS
    }
    assert sent["phase-2"]["activation elements"]["measured"] <= 4 * share * tokens * RANKS["tiny"]
    assert sent["phase-1-fused"]["activation elements"]["measured"] <= 4 * share * tokens * width
    separate = 4 * share * tokens * (width + RANKS["tiny"])
    assert sent["phase-1-separate"]["activation elements"]["measured"] == separate
    assert sent["dense"]["activation elements"]["measured"] == 5 * share * tokens * width
    assert sent["dense"]["parameter elements"]["measured"] == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_second_phase_repeats_no_matrix_product(figures, ranks):
    for row in figures:
        if row["quantity"] == "FLOP per rank" and row["case"].startswith(f"phase-2 tiny n={ranks}"):
            assert row["measured"] == pytest.approx(row["limit"], rel=0.02)
