"""Peaks of memory by part of a run."""

import psutil
import torch

from inrank_megatron.distributed.peak_memory import PeakMemory, largest


def test_peak_memory_of_a_cpu_process():
    """In bytes, whatever unit the system counts in; it never falls."""
    peaks = PeakMemory(torch.device("cpu"), "start")
    before = peaks.since_last()["peak_rss"]
    assert psutil.Process().memory_info().rss * 0.9 <= before < psutil.virtual_memory().total
    peaks.begin("phase_1")
    assert list(peaks.parts) == ["start"]
    after = peaks.since_last()["peak_rss"]
    assert peaks.parts["phase_1"]["peak_rss"] == after >= peaks.parts["start"]["peak_rss"] >= before


def test_peak_is_the_largest_over_ranks_and_sessions():
    first = {"phase_1": {"a": 3, "b": 1}, "switch": {"a": 9, "b": 9}}
    second = {"phase_1": {"a": 2, "b": 5}, "phase_2": {"a": 1, "b": 1}}
    both = largest([first, second])
    assert both == {"phase_1": {"a": 3, "b": 5}, "switch": {"a": 9, "b": 9}, "phase_2": {"a": 1, "b": 1}}
    assert largest([{}, {}]) == {}
