"""Every two settings that can stand together do so in a training on the emulated device."""

import itertools
from collections.abc import Iterable

import pytest

from inrank_megatron.config.checks import check
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.registry import METHODS as REGISTRY
from tests.contract.cases import METHODS
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import configuration
from tests.emulated import pairs
from tests.emulated.device import run_emulated
from tests.emulated.test_training import CASES, FUSED, OFFLOAD, RECOMPUTE

BF16, FP16 = {"bf16": True}, {"fp16": True}
ROWS = [
    ("llama-lora", "TP2 without SP", {"zero_stage": 1, **FP16, **OFFLOAD, **RECOMPUTE}),
    ("llama-fixed-rank", "DP2", {"zero_stage": 0, **RECOMPUTE}),
    ("llama-warm-start", "TP2 without SP", {"zero_stage": 2, **BF16, **OFFLOAD}),
    ("llama-inrank", "DP2", {"zero_stage": 2, **FP16, **OFFLOAD, **RECOMPUTE}),
    ("fixed-rank", "TP2 without SP", {"zero_stage": 3, "rank": 16, **BF16, **OFFLOAD, **RECOMPUTE}),
    ("relora", "TP2 without SP", {"zero_stage": 1, **OFFLOAD, **RECOMPUTE}),
    ("lora", "TP2 SP", {"zero_stage": 3, **OFFLOAD, **RECOMPUTE}),
    ("llama-warm-start", "TP1 DP1", {"zero_stage": 3, **OFFLOAD}),
    ("dense", "TP2 without SP", {"zero_stage": 1, **FP16, **OFFLOAD, **RECOMPUTE}),
    ("llama-relora", "TP2 SP", {"zero_stage": 0, **RECOMPUTE}),
    ("relora", "TP2 SP", {"zero_stage": 2, **FP16, **RECOMPUTE}),
    ("inrank", "TP2 SP", {"zero_stage": 3, **FP16, **RECOMPUTE}),
    ("inrank-efficient", "TP2 without SP", {"zero_stage": 0, **RECOMPUTE}),
    ("dense", "TP1 DP1", {"zero_stage": 0, **BF16, **FUSED}),
    ("fixed-rank", "TP2 without SP", {"zero_stage": 1, "rank": 16, **FP16}),
    ("inrank-efficient", "DP2", {"zero_stage": 3, **OFFLOAD, **RECOMPUTE}),
    ("llama-lora", "TP1 DP1", {"zero_stage": 2, **BF16, **OFFLOAD}),
    ("llama-warm-start", "TP1 DP1", {"zero_stage": 0, **RECOMPUTE}),
]
VALUES = {
    "method": tuple(REGISTRY),
    "zero_stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16", "fp16"),
    "offload": (False, True),
    "tensor": ("TP1", "TP2", "TP2 SP"),
    "architecture": ("gpt2", "llama"),
    "recompute": (False, True),
}
IMPOSSIBLE = {(("precision", "fp16"), ("zero_stage", 0)), (("offload", True), ("zero_stage", 0))}

Pair = tuple[tuple[str, object], tuple[str, object]]


def traits(method: str, layout: str, settings: dict) -> dict[str, object]:
    """The values of a training."""
    every, ranks = METHODS[method] | settings, LAYOUTS[layout]
    sequence = " SP" if ranks.sequence_parallel else ""
    return {
        "method": every["method"],
        "zero_stage": every["zero_stage"],
        "precision": next((name for name in ("bf16", "fp16") if every.get(name)), "fp32"),
        "offload": bool(every.get("offload_optimizer")),
        "tensor": "TP1" if ranks.tensor_parallel == 1 else f"TP{ranks.tensor_parallel}{sequence}",
        "architecture": every.get("model_type", "gpt2"),
        "recompute": every.get("recompute_granularity") is not None,
    }


def covered(rows: Iterable[tuple[str, str, dict]]) -> set[Pair]:
    return {pair for row in rows for pair in itertools.combinations(sorted(traits(*row).items()), 2)}


def all_pairs() -> set[Pair]:
    names = itertools.combinations(sorted(VALUES), 2)
    return {((a, x), (b, y)) for a, b in names for x in VALUES[a] for y in VALUES[b]} - IMPOSSIBLE


def matrix(found: set[Pair]) -> str:
    """A line for each value: what it stands together with, and what it does not."""
    lines = []
    for name, values in VALUES.items():
        for value in values:
            own = {pair for pair in all_pairs() if (name, value) in pair}
            gaps = sorted(f"{a}={x} with {b}={y}" for (a, x), (b, y) in own - found)
            lines.append(f"{name}={value}: {len(own & found)} of {len(own)} {'; '.join(gaps)}".rstrip())
    return "\n".join(lines)


def test_every_pair_of_settings_is_covered():
    """`pytest -s` shows the matrix."""
    found = covered([*CASES.values(), *ROWS])
    print(f"\n{matrix(found)}")
    assert all_pairs() - found == set(), matrix(found)
    assert all_pairs() - covered([*CASES.values(), *ROWS[1:]]), "a row less would be seen"


def test_the_impossible_pairs_are_refused():
    for settings in ({"zero_stage": 0, **FP16}, {"zero_stage": 0, **OFFLOAD}):
        with pytest.raises(UserError, match="zero_stage = 0"):
            check(configuration("dense", LAYOUTS["DP2"], **settings), world_size=2)


def test_a_step_of_each_keeps_the_rules():
    assert run_emulated(pairs.faults, ROWS, timeout=280) == {}
