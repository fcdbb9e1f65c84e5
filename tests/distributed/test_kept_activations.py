"""The activations that the plan counts are those that Megatron's and our layers keep."""

import pytest

from tests.distributed.kept_activations import kept_and_planned
from tests.harness import run_ranks

CASES = {
    "GPT-2": (1, {}, 0, False),
    "GPT-2 phase 1": (1, {}, 32, True),
    "GPT-2 phase 2": (1, {}, 32, False),
    "GPT-2 phase 2 bf16": (1, {"bf16": True}, 32, False),
    "GPT-2 recomputed": (1, {"recompute_granularity": "full"}, 0, False),
    "GPT-2 attention too": (1, {"factorised_linears": "mlp-attention"}, 32, False),
    "GPT-2 TP 2": (2, {"sequence_parallel": False}, 0, False),
    "GPT-2 TP 2 SP": (2, {}, 0, False),
    "GPT-2 TP 2 SP phase 1": (2, {}, 32, True),
    "GPT-2 TP 2 SP phase 2": (2, {}, 32, False),
    "LLaMA": (1, {"model_type": "llama"}, 0, False),
    "LLaMA phase 1": (1, {"model_type": "llama"}, 32, True),
    "LLaMA TP 2 SP phase 2": (2, {"model_type": "llama"}, 32, False),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_activation_bytes_match_saved_tensors(case):
    """On a CPU RMSNorm is not a fused kernel and keeps 2 h numbers per layer more."""
    world_size, settings, columns, frozen_base = CASES[case]
    for kept, planned in run_ranks(kept_and_planned, world_size, settings, columns, frozen_base):
        assert planned == pytest.approx(kept, rel=0.1)
