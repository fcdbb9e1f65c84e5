"""Whole trainings on a GPU that is not there: what CUDA and NCCL ask holds, ranks agree on their collectives,
and the host waits for the device once per step.
"""

import functools
import itertools
from collections import Counter

import pytest

from inrank_megatron.lowrank.methods.registry import METHODS as REGISTRY
from tests.contract.cases import ACCUMULATION, METHODS
from tests.contract.layouts import LAYOUTS
from tests.emulated.device import run_emulated
from tests.emulated.rules import Collective, Wait
from tests.emulated.trainings import AFTER, BEFORE, Seen, agreed_training, training

OFFLOAD = {"offload_optimizer": True}
REPEATS = {"deterministic_mode": True}
RECOMPUTE, SGD = {"recompute_granularity": "full"}, {"optimizer": "sgd"}
FUSED, ON_HOST = {"optimizer": "fused-adam"}, {"optimizer": "cpu-adam", **OFFLOAD}
CASES = {
    "fp32 ZeRO 0": ("inrank", "TP2 without SP", {"zero_stage": 0}),
    "bf16 ZeRO 0": ("lora", "TP1 DP1", {"zero_stage": 0, "bf16": True}),
    "fp32 ZeRO 1": ("inrank-efficient-patience", "DP2", {"zero_stage": 1}),
    "bf16 ZeRO 1": ("inrank-efficient", "TP2 SP", {"zero_stage": 1, "bf16": True, **REPEATS}),
    "bf16 ZeRO 1 offload": ("inrank", "DP2", {"zero_stage": 1, "bf16": True, **ON_HOST}),
    "fp16 ZeRO 1": ("warm-start", "TP2 SP DP2", {"zero_stage": 1, "fp16": True, **RECOMPUTE}),
    "fp32 ZeRO 2 offload": ("dense", "DP2", {"zero_stage": 2, **OFFLOAD}),
    "fp32 ZeRO 2": ("inrank-efficient-spectron", "TP2 SP DP2", {"zero_stage": 2}),
    "bf16 ZeRO 2": ("llama-inrank-efficient", "TP2 SP DP2", {"zero_stage": 2, "bf16": True}),
    "fp16 ZeRO 2": ("fixed-rank", "TP2 SP", {"zero_stage": 2, "fp16": True, "rank": 16, **SGD}),
    "fp32 ZeRO 3": ("llama-dense", "TP2 SP DP2", {"zero_stage": 3, **RECOMPUTE, **FUSED}),
    "bf16 ZeRO 3": ("relora", "DP2", {"zero_stage": 3, "bf16": True, **REPEATS}),
    "bf16 ZeRO 3 offload": ("llama-relora", "TP2 SP", {"zero_stage": 3, "bf16": True, **OFFLOAD}),
    "fp16 ZeRO 3": ("inrank-efficient-fisher", "TP2 SP DP2", {"zero_stage": 3, "fp16": True, **REPEATS}),
}
ON_SEVERAL_RANKS = [case for case, (_, layout, _) in CASES.items() if LAYOUTS[layout].world_size > 1]
OTHER_RANK = {"fp16 ZeRO 1": 1, "fp32 ZeRO 2": 1, "bf16 ZeRO 2": 2}
"""Next to rank 0; elsewhere the last of the job. So rank 0 is compared with every rank of a job of four."""

FETCH = "inrank_megatron.engine.step_report:fetch"
GROUPS = 3
"""Parameter groups, at most, of the cases that wait for each."""
BUDGET: dict[str, dict[str, int]] = {
    # DeepSpeed awaits its own streams: the reduction's once per micro-batch, the gathering's once per step;
    # and it makes the mark of a norm that is not finite on the host, for each group.
    "ZeRO 3": {
        "deepspeed.runtime.zero.stage3:independent_gradient_partition_epilogue": ACCUMULATION,
        "deepspeed.runtime.zero.partition_parameters:_allgather_params_coalesced": 1,
        "deepspeed.runtime.zero.stage3:get_grad_norm_direct": GROUPS,
    },
    # It adds up the groups' norms on the host: reads, copies back and reads again.
    "bf16 ZeRO 0": {"deepspeed.runtime.utils:get_weight_norm": 3 * GROUPS},
}
"""What DeepSpeed's own code waits for, by a part of the case's name: most waits a step at each place."""
MOVES_TO_THE_HOST = (
    "deepspeed.runtime.zero.stage_1_and_2:",
    "deepspeed.runtime.zero.stage3:",
    "deepspeed.runtime.zero.partition_parameters:",
    "inrank_megatron.engine.replicated:",
)
"""With offload every gradient goes to the host, every parameter comes back, and DeepSpeed waits for each."""


def seen(case: str, rank: int = 0) -> Seen:
    return _seen(case, rank)


@functools.cache
def _seen(case: str, rank: int) -> Seen:
    return run_emulated(training, rank, *CASES[case])


def over_budget(case: str, waits: list[Wait]) -> list[str]:
    """The waits of a step that no budget allows."""
    allowed = Counter({FETCH: 1})
    for name, places in BUDGET.items():
        if name in case:
            allowed.update(places)
    found = []
    for wait in waits:
        allowed[wait.place] -= 1
        with_offload = "offload" in case and wait.place.startswith(MOVES_TO_THE_HOST)
        if allowed[wait.place] < 0 and not with_offload:
            found.append(str(wait))
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_keeps_the_rules_of_cuda_and_nccl(case):
    """It comes to its end and goes on from what it saved. In half precision all products of a step are in
    it, and fall on whole tiles.
    """
    result = seen(case)
    for phase in (BEFORE, AFTER):
        assert result.collectives[phase] or LAYOUTS[CASES[case][1]].world_size == 1
        assert result.misaligned.get(phase, []) == []
        assert "fp32" in case or result.wide.get(phase, []) == []
    assert result.collectives["resumed"]


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_once_a_step(case):
    """Neither in the forward nor in the backward pass, and not for the tokens of the next step."""
    for phase in (BEFORE, AFTER):
        waits = seen(case).waits[phase]
        assert not over_budget(case, waits)
        assert [wait.place for wait in waits].count(FETCH) == 1


def test_both_phases_and_the_switch_have_peaks_of_memory():
    assert seen("bf16 ZeRO 1").parts == ("start", "phase_1", "switch", "phase_2")


@pytest.mark.parametrize("case", CASES)
def test_nothing_happens_where_nothing_is_due(case):
    """Between two steps without a check, an evaluation or a save the host neither waits nor sends."""
    result = seen(case)
    for phase in ("changes 1", "between 1", "between 2", "between 3"):
        assert result.waits.get(phase, []) == result.collectives.get(phase, []) == []


SWITCHING_CASES = [
    case
    for case, (method, *_) in CASES.items()
    if ("efficient" in method or "warm" in method) and "patience" not in method  # no loss falls there
]


@pytest.mark.parametrize("case", SWITCHING_CASES)
def test_nothing_holds_the_first_phase_after_the_switch(case):
    """So that its memory can be given back: neither W0 nor factors, masters or moments."""
    assert seen(case).left == []


def test_ranks_and_truncation_share_their_second_moments():
    """They are of the same weights and batches. Each layer's is added up over the replicas once."""
    changes = seen("fp16 ZeRO 1").collectives["changes 2"]
    moments = [entry for entry in changes if entry.name == "reduce_" and entry.group == "dp of 2"]
    assert len(moments) == 2


@pytest.mark.parametrize("case", ON_SEVERAL_RANKS)
def test_ranks_agree_on_their_collectives(case):
    """Two ranks of the job call the same ones in the same order: operation, group, shapes and types."""
    layout = LAYOUTS[CASES[case][1]]
    rank = OTHER_RANK.get(case, layout.world_size - 1)
    of_replicas = rank >= layout.tensor_parallel
    one, other = (seen(case, each).collectives for each in (0, rank))
    assert difference(one, other, of_replicas=of_replicas) is None


def difference(
    one: dict[str, list[Collective]], other: dict[str, list[Collective]], *, of_replicas: bool
) -> str | None:
    """The first collective in which two ranks differ. Only rank 0 resumes.

    Args:
        of_replicas: the ranks belong to two replicas. These share layers out, so between steps their
            tensor-parallel groups compute different ones.
    """
    for phase in sorted((one.keys() | other.keys()) - {"resumed"}):
        without_tp = of_replicas and not phase.startswith("step")
        mine, theirs = (_common(entries.get(phase, []), without_tp=without_tp) for entries in (one, other))
        for number, (a, b) in enumerate(itertools.zip_longest(mine, theirs)):
            if a != b:
                return f"{phase}, collective {number}: {a} and {b}"
    return None


def _common(entries: list[Collective], *, without_tp: bool) -> list[Collective]:
    """Those in which both ranks take part as each other's likes."""
    return [
        entry
        for entry in entries
        if not entry.group.endswith(" of 1") and not (without_tp and entry.group.startswith("tp"))
    ]


@pytest.mark.parametrize("fault", ["order", "type", "size", "group", "one more"])
def test_a_difference_of_two_ranks_is_found(fault):
    """Planted in what a rank has called in its last step."""
    calls = seen("fp32 ZeRO 1").collectives
    assert difference(calls, calls, of_replicas=True) is None
    planted = {phase: _common(entries, without_tp=False) for phase, entries in calls.items()}
    last = planted[AFTER]
    [((shape, kind), *others)] = [last[-1].tensors]
    number = next(i for i in range(len(last) - 1) if last[i] != last[i + 1])
    if fault == "order":
        last[number], last[number + 1] = last[number + 1], last[number]
    elif fault == "one more":
        last.append(last[-1])
    else:
        tensor = {"type": (shape, "torch.int8"), "size": ((*shape, 2), kind), "group": (shape, kind)}[fault]
        group = "another" if fault == "group" else last[-1].group
        last[-1] = Collective(last[-1].name, group, (tensor, *others))
    found = difference(calls, planted, of_replicas=True)
    assert found and found.startswith(AFTER)


@pytest.mark.parametrize("case", ["bf16 ZeRO 1", "fp16 ZeRO 2"])
def test_replicated_gradients_are_summed_at_once(case):
    """Under sequence parallelism: those of three norms and two biases, of width 64, once per step."""
    entries = [entry for entry in seen(case).collectives[BEFORE] if entry.group.startswith("tp")]
    shapes = [entry.tensors[0][0] for entry in entries if entry.name == "allreduce_"]
    assert [shape for shape in shapes if len(shape) == 1 and shape[0] % 64 == 0] == [(8 * 64,)]


def test_cases_cover_every_method_setting_and_layout():
    settings = [settings for *_, settings in CASES.values()]
    assert {METHODS[method]["method"] for method, *_ in CASES.values()} == REGISTRY.keys()
    kinds = {(s["zero_stage"], next((p for p in ("bf16", "fp16") if s.get(p)), "fp32")) for s in settings}
    assert kinds == {(z, p) for z in range(4) for p in ("fp32", "bf16", "fp16")} - {(0, "fp16")}
    assert {layout for _, layout, _ in CASES.values()} >= LAYOUTS.keys() - {"TP2 SP separate", "TP4 SP"}
    assert {s["zero_stage"] for s in settings if s.get("offload_optimizer")} == {1, 2, 3}
    assert {s["optimizer"] for s in settings if "optimizer" in s} == {"sgd", "fused-adam", "cpu-adam"}


GROWS_AT_2 = ("fp32 ZeRO 0", "fp32 ZeRO 1")
"""A rank check follows step 2, and no switch. With offload the masters come from the host, and it waits."""


WRITES = {"inrank_megatron.engine.fragments:finish_writes": 1}
LEFT_TO_ALL_RANKS = {
    "inrank_megatron.lowrank.linalg.spectra:rows": 1,
    "inrank_megatron.distributed.device_copies:wait": 1,
    "inrank_megatron.lowrank.linalg.spectra:_householder": 1,
    "inrank_megatron.distributed.process_groups:call_or_raise_on_all_ranks": 1,
    "inrank_megatron.engine.layer_distribution:gathered_spectra": 1,
    "inrank_megatron.engine.decisions:finish": 1,
}
"""What the outcome of a check waits for, once the step after it has ended, however many layers there are, if
a product goes the Householder path, which a constant for every error bound asks for.
"""


@pytest.mark.parametrize("case", GROWS_AT_2)
def test_a_rank_check_lets_the_device_go_on(case):
    """The host sends it after step 2 and goes on to step 3, which has no wait of it."""
    result = seen(case)
    assert result.waits.get("changes 2", []) == []
    assert not over_budget(case, result.waits["step 3"])
    assert Counter(wait.place for wait in result.waits["changes 3"]) == LEFT_TO_ALL_RANKS


@pytest.mark.parametrize(("smallest", "waits"), [(0.9, WRITES), (1e-9, {})], ids=["grows", "stays"])
def test_a_check_that_the_threads_decide_waits_for_nothing(smallest, waits):
    """Unless columns come into use."""
    result = run_emulated(agreed_training, 0, smallest, *CASES["fp32 ZeRO 0"])
    assert result.waits.get("changes 2", []) == []
    assert Counter(wait.place for wait in result.waits.get("changes 3", [])) == waits
    assert not result.collectives.get("changes 3")
