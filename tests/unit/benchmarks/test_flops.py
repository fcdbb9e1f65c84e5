"""Counted operations against hand-computed ones."""

import torch
import torch.nn.functional as F

from inrank_megatron.benchmarks.flops import count_flops


def test_matrix_products_forward_and_backward():
    weight, x = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    assert count_flops(lambda: F.linear(x, weight).sum().backward()) == 3 * 2 * 7 * 3 * 5


def test_a_product_that_adds_in_place():
    total, a, b = torch.zeros(4, 6), torch.ones(4, 5), torch.ones(5, 6)
    assert count_flops(lambda: total.addmm_(a, b)) == 2 * 4 * 5 * 6


def test_decompositions_of_a_batch():
    tall, square = torch.randn(4, 30, 6), torch.eye(6).expand(2, 6, 6)
    assert count_flops(lambda: torch.linalg.qr(tall, mode="r")) == 4 * (2 * 30 * 36 - 2 * 216 // 3)
    assert count_flops(lambda: torch.linalg.qr(tall)) == 8 * (2 * 30 * 36 - 2 * 216 // 3)
    assert count_flops(lambda: torch.linalg.svdvals(tall.mT)) == 4 * (2 * 30 * 36 + 2 * 216)
    assert count_flops(lambda: torch.linalg.svd(tall, full_matrices=False)) == 4 * (6 * 30 * 36 + 20 * 216)
    assert count_flops(lambda: torch.linalg.cholesky(square)) == 2 * 72
    assert count_flops(lambda: torch.linalg.eigh(square)) == 2 * 9 * 216
    triangle = torch.eye(6)
    assert count_flops(lambda: torch.linalg.solve_triangular(triangle, tall.mT[0], upper=True)) == 6 * 180


def test_attention_counts_as_two_products():
    q = torch.randn(1, 2, 8, 4)
    assert (
        count_flops(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)) == 2 * 2 * 2 * 8 * 8 * 4
    )
