"""Closed forms against their differential equations, and linear networks against the closed forms."""

import numpy as np
import pytest
import torch

from inrank_megatron.theory.theorem2 import aligned_network, equation_4, unequal_mode

S, U0 = np.array([0.5, 1.0, 2.0, 3.0]), np.array([0.3, 0.01, 0.1, 0.002])
TIMES = np.linspace(0, 12, 1200)


def slope(t: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.gradient(u, t, edge_order=2)


@pytest.mark.parametrize(("s", "u0"), [(1.0, 0.01), (2.0, 1.5), (0.5, 2.0)])
def test_equation_4_solves_equation_12_and_inverts_equation_13(s, u0):
    t = np.linspace(0, 3, 3001)
    u = equation_4(t, s, u0) + u0
    assert u[0] == pytest.approx(u0) and slope(t, u) == pytest.approx(2 * u * (s - u), abs=1e-3)
    assert np.log(u * (s - u0) / (u0 * (s - u))) / (2 * s) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.1), (0.1, 1.0), (0.5, -0.2), (2.0, 1.0)])
def test_unequal_modes_solve_equation_11(a, b):
    t, s = np.linspace(0, 3, 3001), 1.2
    u = unequal_mode(t, s, a, b) + a * b
    assert u[0] == pytest.approx(a * b)
    assert slope(t, u) == pytest.approx(np.sqrt((a**2 - b**2) ** 2 + 4 * u**2) * (s - u), abs=1e-4)


def test_unequal_modes_become_equation_4_as_the_weights_become_equal():
    assert unequal_mode(TIMES, 1.0, 0.3 + 1e-6, 0.3) == pytest.approx(equation_4(TIMES, 1.0, 0.09), abs=1e-5)


def test_the_flow_is_the_gradient_of_the_squared_error_of_orthonormal_inputs():
    """Equation 8, from real inputs and targets by autograd."""
    network = aligned_network(S, np.sqrt(U0), np.sqrt(U0), seed=0)
    x = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    targets = torch.tensor(network.left * S @ network.right.T) @ x
    w1, w2 = (torch.tensor(w, requires_grad=True) for w in (network.w1, network.w2))
    ((targets - w2 @ w1 @ x).square().sum() / 2).backward()
    for found, weight in zip(network._slope(network.w1, network.w2), (w1, w2), strict=True):
        assert found == pytest.approx(-weight.grad.numpy())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.2])
def test_a_network_of_any_orthogonal_start_follows_the_closed_form(ratio, seed):
    """Singular values of D_t, with no knowledge of the modes, and the modes in their own directions."""
    m1, m2 = np.sqrt(U0) * ratio, np.sqrt(U0) / ratio
    network = aligned_network(S, m1, m2, seed=seed)
    assert not np.allclose(network.w1, aligned_network(S, m1, m2, seed=seed + 1).w1)
    updates = network.trajectory(TIMES)
    form = [equation_4(TIMES, *m) for m in zip(S, U0, strict=True)] if ratio == 1 else [
        unequal_mode(TIMES, *m) for m in zip(S, m1, m2, strict=True)
    ]  # fmt: skip
    expected = np.array(form).T
    modes, outside = network.modes(updates)
    assert modes == pytest.approx(expected, abs=1e-6) and outside.max() < 1e-10
    values = np.linalg.svd(updates, compute_uv=False)[:, :4]
    assert values == pytest.approx(-np.sort(-np.abs(expected), axis=1), abs=1e-6)
    assert values[-1] == pytest.approx((S - U0)[::-1], abs=0.01)


def test_correlated_inputs_leave_the_modes():
    inputs = np.full((6, 6), 0.1) + 0.9 * np.eye(6)
    network = aligned_network(S, np.sqrt(U0), np.sqrt(U0), seed=0, inputs=inputs)
    modes, outside = network.modes(network.trajectory(TIMES))
    expected = np.array([equation_4(TIMES, *m) for m in zip(S, U0, strict=True)]).T
    assert outside.max() > 0.1 and np.abs(modes - expected).max() > 0.1


def test_a_mode_of_opposite_signs_never_crosses_zero_where_equation_4_has_a_pole():
    """With a = -b the flow ends at the saddle u = 0; equation 4 was derived for a = b, where u0 >= 0."""
    s, u0 = np.array([1.0]), np.array([-0.25])
    times = np.linspace(0, 8, 800)
    network = aligned_network(s, np.sqrt(-u0), -np.sqrt(-u0), seed=0)
    modes, _ = network.modes(network.trajectory(times))
    u = modes[:, 0] + u0[0]
    assert (u < 0).all() and u[-1] == pytest.approx(0, abs=1e-3)
    pole = np.log(1 + s / -u0) / (2 * s)
    assert abs(equation_4(pole - 1e-6, s, u0)) > 1e4
