"""Planted faults are seen: a rule that lets all of them pass would show nothing."""

from pathlib import Path

import pytest

from tests.emulated import faults
from tests.emulated.device import run_emulated
from tests.emulated.test_training import over_budget

REFUSED = {
    "reduces_on_the_host": "allreduce_ of a tensor on the cpu",
    "reduces_a_transposed_matrix": "not contiguous",
    "reduces_short_integers": "torch.int16, which NCCL does not carry",
    "mixes_devices": "on the same device, but found at least two",
}
WAITS = {
    "reads_a_value": "reads a torch.bfloat16",
    "chooses_by_a_mask": "chooses by a mask",
    "copies_a_number": "copies cpu -> gpu",
    "copies_from_pageable_memory": "copies from pageable memory",
}


@pytest.fixture(scope="module")
def outcomes() -> dict:
    return run_emulated(faults.in_the_forward_pass)


@pytest.mark.parametrize("fault", REFUSED)
def test_what_nccl_or_cuda_refuses_is_refused(outcomes, fault):
    message, _ = outcomes[fault]
    assert REFUSED[fault] in message, message
    if fault != "mixes_devices":  # FakeTensorMode's own rule does not say where
        assert f"tests.emulated.faults:_{fault} (line {line_of(fault)})" in message


@pytest.mark.parametrize("fault", WAITS)
def test_a_wait_is_found_and_its_line_named(outcomes, fault):
    message, log = outcomes[fault]
    assert not message
    first, *_ = over_budget("bf16 ZeRO 1", log.waits["step 1"])
    assert first.startswith(f"tests.emulated.faults:_{fault} (line {line_of(fault)}): {WAITS[fault]}")


def test_without_a_fault_nothing_is_found(outcomes):
    message, log = outcomes["nothing"]
    assert not message and not over_budget("bf16 ZeRO 1", log.waits["step 1"])
    assert log.misaligned.get("step 1", []) == []


def test_a_product_that_leaves_its_tile_is_found(outcomes):
    _, log = outcomes["leaves_a_tile"]
    assert any("products:" in product for product in log.misaligned["step 1"])


def test_a_collective_that_one_rank_alone_calls_is_found(outcomes):
    one, other = outcomes["nothing"][1].collectives["step 1"], run_emulated(faults.of_the_last_rank)
    assert len(other) == len(one) + faults.ACCUMULATION


def line_of(fault: str) -> int:
    """The line on which the function of that name does it."""
    lines = Path(faults.__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=2) if line.startswith(f"def _{fault}("))
