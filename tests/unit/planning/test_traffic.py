"""Predicted bytes, operations and memory of a step against those of the engine, counted."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from inrank_megatron.config import orthogonalisation_costs
from inrank_megatron.lowrank.layers import factorised
from inrank_megatron.lowrank.linalg import orthogonalise
from inrank_megatron.planning import traffic
from tests.harness import ROOT
from tests.unit.planning.counted import Case

LLAMA = {"model_type": "llama", "ffn_hidden_size": 512}
APART = {"factorised_linears": "mlp-attention", "qkv_factors": "separate"}
SEPARATE = {"hidden_size": 1344, "num_layers": 1, "zero_stage": 0}  # the width keeps factors in rank space
OTHER_SIZE = {"num_layers": 6, "micro_batch_size": 1}
CASES = [
    *(Case(phase, 1, {"zero_stage": stage}) for stage, phase in ((0, 0), (2, 2), (3, 1))),
    Case(0, 4, {"bf16": True}),
    Case(1, 4, {"bf16": True, "zero_stage": 2}),
    Case(2, 1, {"bf16": True, "zero_stage": 3}),
    Case(2, 4, {"zero_stage": 0}),
    Case(1, 2, {"bf16": True}),
    Case(0, 4, {"fp16": True, "zero_stage": 2}, accumulation=1),
    Case(2, 2, {"zero_stage": 3, "recompute_granularity": "full", "factorised_linears": "mlp-attention"}),
    Case(0, 2, {"recompute_granularity": "full"}),
    *(Case(phase, 2, {"sequence_parallel": False}) for phase in (1, 2)),
    *(Case(phase, 2, LLAMA) for phase in (0, 1)),
    Case(0, 2, LLAMA | {"num_query_groups": 1, "recompute_granularity": "full"}),  # ranks share keys
    Case(0, 2, LLAMA | APART | {"qk_layernorm": True, "sequence_parallel": False}),
    Case(2, 2, LLAMA | APART | {"num_query_groups": 2, "kv_channels": 16}),  # keys of fewer features
    Case(1, 2, SEPARATE, accumulation=1, on_cpu=False),
    Case(0, 1, {"zero_stage": 0} | OTHER_SIZE),
    Case(2, 2, {"zero_stage": 2, "fp16": True} | OTHER_SIZE),
    Case(0, 1, {"bf16": True}, accumulation=1),
]
SMALL = {"micro_batch_size": 1, "seq_length": 32, "hidden_size": 384}
"""Few activations, so that buckets and what is gathered decide the memory."""
MUON = {"matrix_optimizer": "muon", "factor_optimizer": "lora-muon"} | SMALL
SMALL_CASES = [
    *(Case(1, 1, {"zero_stage": stage} | SMALL) for stage in (1, 2, 3)),
    *(Case(0, 1, {"zero_stage": stage, "bf16": True} | SMALL, accumulation=1) for stage in (1, 3)),
    Case(0, 2, {"zero_stage": 2, "fp16": True} | SMALL, replicas=1),
    # The optimizer's step takes the most.
    Case(1, 1, {"zero_stage": 2, "bf16": True} | MUON | {"hidden_size": 768}),
    Case(0, 2, {"zero_stage": 2, "fp16": True} | MUON, replicas=1),
    Case(0, 1, {"zero_stage": 1, "fp16": True} | MUON, replicas=4),
    Case(2, 1, {"zero_stage": 0} | MUON),
]
PLAIN = {"truncation": "plain"} | SMALL
SWITCHES = [
    Case(1, 1, {"zero_stage": 1}, final=64),
    Case(1, 2, {"zero_stage": 2} | PLAIN, final=128),
    Case(0, 1, {"zero_stage": 3, "fp16": True}, final=64, replicas=4),
    Case(1, 1, {"zero_stage": 2, "truncation": "fisher", "fp16": True}, final=32, replicas=4),
    Case(
        1, 1, {"zero_stage": 0, "matrix_optimizer": "muon", "factor_optimizer": "muon"}, final=64, replicas=1
    ),
    Case(0, 1, {"zero_stage": 1, "fp16": True} | PLAIN, final=64, replicas=1),
    Case(1, 1, {"zero_stage": 2, "fp16": True} | PLAIN | {"hidden_size": 192}, final=8),
]
OTHERS = [*SMALL_CASES, *SWITCHES]
"""Of which memory alone is compared."""
VOTES = 400
"""Bytes of norms, votes and overflow flags at most, which are not predicted."""


@pytest.fixture(scope="module")
def figures():
    """All cases in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.planning.counted"],
        cwd=ROOT,
        input="\n".join(json.dumps(asdict(case)) for case in [*CASES, *OTHERS]),
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index])[4:])
def test_predicted_figures_are_those_that_are_counted(index, figures):
    sent, predicted = figures[index]["sent"]
    assert 0 <= sent - predicted <= VOTES
    assert figures[index]["flops"][0] == figures[index]["flops"][1]
    memory, predicted = figures[index]["memory"]
    assert predicted == pytest.approx(memory, rel=0.1)


@pytest.mark.parametrize("index", range(len(OTHERS)), ids=lambda index: str(OTHERS[index])[4:])
def test_predicted_memory_is_what_is_counted(index, figures):
    memory, predicted = figures[len(CASES) + index]["memory"]
    assert predicted == pytest.approx(memory, rel=0.1)


@pytest.mark.parametrize("index", range(len(SWITCHES)), ids=lambda index: str(SWITCHES[index])[4:])
@pytest.mark.parametrize("where", ["switch", "switch beside a host"])
def test_predicted_memory_of_the_switch_is_what_is_counted(index, where, figures):
    memory, predicted = figures[len(CASES) + len(SMALL_CASES) + index][where]
    assert predicted == pytest.approx(memory, rel=0.1)


def test_a_step_computes_as_many_entries_together_as_the_plan_says():
    assert orthogonalisation_costs.BATCH == orthogonalise._BATCH


def test_the_choice_of_collectives_is_that_of_the_layers():
    rates = factorised.OPERATIONS_PER_ELEMENT
    expected = {"cpu": rates["gloo"], "gpu": rates["nccl"]}
    assert expected == traffic.OPERATIONS_PER_ELEMENT
