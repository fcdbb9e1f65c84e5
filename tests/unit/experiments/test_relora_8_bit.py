"""What the 8-bit form of a matrix keeps of it, and what it takes."""

import sys

import pytest
import torch

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.relora_8_bit import in_8_bits


def test_a_value_is_off_by_half_a_step_of_its_row_at_most():
    matrix = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    matrix[2] *= 100
    values, size = in_8_bits(matrix)
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((values - matrix).abs() <= 0.51 * step).all() and (values != matrix).any()
    assert 6 * 40 <= size <= 6 * 40 + 6 * 8  # a byte each, and a scale for each row


def test_without_torchao_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"torchao is not installed.*pip install .*\[torchao\]"):
        in_8_bits(torch.ones(2, 2))
