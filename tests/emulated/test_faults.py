"""Planted faults are seen: a rule that lets all of them pass would show nothing."""

from pathlib import Path

import pytest

from tests.emulated import faults
from tests.emulated.device import run_emulated
from tests.emulated.test_training import difference, over_budget

REFUSED = {
    "reduces_on_the_host": "allreduce_ of a tensor on the cpu",
    "reduces_a_transposed_matrix": "not contiguous",
    "reduces_short_integers": "torch.int16, which NCCL does not carry",
    "combines_bits": "all_reduce with BOR, which NCCL does not have",
    "gathers_another_type": "torch.bfloat16 and torch.float32: NCCL carries one type",
    "gathers_into_too_little": "3 elements into 4",
    "mixes_devices": "devices",  # in torch's own words, which vary
    "uses_a_sum_before_it_is_there": "memory that allreduce_ writes on stream",
    "writes_what_a_collective_still_reads": "memory that _allgather_base_ reads on stream",
    "reads_on_a_stream_that_has_not_waited": "on the default stream, for which nothing has waited",
    "writes_what_another_stream_reads": "on the default stream memory that sum in",
    "drops_what_another_stream_reads": "memory that was given back while sum in",
    "fills_a_pinned_buffer_again": "memory from which the device still copies",
    "looks_at_a_copy_that_is_under_way": "memory into which the device still copies",
    "draws_with_a_generator_of_the_host": "with a generator of the cpu",
    "pins_what_is_on_the_device": "pins a tensor of the device",
    "updates_on_the_device_what_the_host_has": "multi_tensor_adam of a tensor on the cpu",
    "updates_on_the_host_what_is_not_there_yet": "adam_update touches memory into which",
}
WAITS = {
    "reads_a_value": "reads a torch.bfloat16",
    "chooses_by_a_mask": "chooses by a mask",
    "gives_memory_back": "gives memory back",
    "copies_a_number": "copies cpu -> gpu",
    "copies_from_pageable_memory": "copies from pageable memory",
    "picks_by_an_index_of_the_host": "copies an index from the host",
    "prints_a_tensor": "prints a tensor",
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
    assert log.misaligned.get("step 1", []) == log.wide.get("step 1", []) == []


def test_streams_that_wait_are_no_fault(outcomes):
    message, log = outcomes["has_streams_wait"]
    assert not message and not over_budget("bf16 ZeRO 1", log.waits["step 1"])


def test_a_product_that_leaves_its_tile_is_found(outcomes):
    _, log = outcomes["leaves_a_tile"]
    assert any("products:" in product for product in log.misaligned["step 1"])


def test_a_product_in_fp32_is_found(outcomes):
    _, log = outcomes["multiplies_in_fp32"]
    assert f"faults:_multiplies_in_fp32 (line {line_of('multiplies_in_fp32')})" in log.wide["step 1"][0]


def test_an_exchange_of_objects_is_a_wait(outcomes):
    _, log = outcomes["agrees_on_an_object"]
    assert any("broadcast_object" in wait for wait in over_budget("bf16 ZeRO 1", log.waits["step 1"]))


def test_a_collective_that_one_rank_alone_calls_is_found(outcomes):
    one, other = outcomes["nothing"][1].collectives["step 1"], run_emulated(faults.of_the_last_rank)
    assert len(other) == len(one) + faults.ACCUMULATION
    assert "step 1, collective" in difference({"step 1": one}, {"step 1": other}, of_replicas=False)


def line_of(fault: str) -> int:
    """The line on which the function of that name does it: the one that says so, else the first."""
    lines = Path(faults.__file__).read_text().splitlines()
    first = next(number for number, line in enumerate(lines, start=1) if line.startswith(f"def _{fault}("))
    body = lines[first : lines.index("", first)]
    return first + next((number for number, line in enumerate(body, start=1) if "# here" in line), 1)
