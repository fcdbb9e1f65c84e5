"""Default buffers and capacities."""

import pytest

from inrank_megatron.lowrank.criteria.buffer import default_buffer, default_capacity


@pytest.mark.parametrize(
    ("width", "buffer"), [(768, 100), (1024, 100), (1280, 100), (192, 25), (64, 8), (4, 1), (1, 1)]
)
def test_buffer_is_the_papers_or_its_proportion(width, buffer):
    assert default_buffer(width) == buffer


def test_capacity_is_half_the_width():
    assert default_capacity(768, initial_rank=2, buffer=100) == 384


def test_capacity_holds_the_first_columns_even_past_half():
    assert default_capacity(64, initial_rank=30, buffer=8) == 38


def test_capacity_never_exceeds_the_width():
    assert default_capacity(64, initial_rank=60, buffer=8) == 64
