"""The planned memory of GPT-2 large at full size, against the tensors alive on the emulated device."""

import pytest

from tests.emulated.device import run_emulated
from tests.emulated.memory import peak_and_plan

RANK = 312  # of the paper
CASES = [
    (None, False, {"bf16": True}),
    (RANK, True, {"fp16": True, "bf16": False, "zero_stage": 2}),
    (RANK, False, {"bf16": False}),
]


@pytest.mark.parametrize(("columns", "frozen_base", "settings"), CASES)
def test_gpt2_large_takes_the_planned_memory(columns, frozen_base, settings):
    """`pytest -s` shows the figures."""
    settings = {"micro_batch_size": 4} | settings
    peak, planned = run_emulated(peak_and_plan, "large", columns, frozen_base, settings, timeout=280)
    print(f"\n{settings} columns {columns}: {peak / 2**30:.2f} GiB, plan {planned / 2**30:.2f} GiB")
    assert planned == pytest.approx(peak, rel=0.1)
