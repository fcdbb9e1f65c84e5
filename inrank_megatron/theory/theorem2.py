"""Theorem 2 of InRank: how the product of a network with two weight matrices grows from an aligned start.

Units of time are those of tau (tau = 1). Letters: N_x inputs, N_h hidden units, N_y outputs; a mode has the
strength s in the data, and a, b in the two weights, whose product is u = a b.

The gradient flow of a mode is ``da/dt = b (s - a b)``, ``db/dt = a (s - a b)`` (equation 11).

*a = b.* ``du/dt = 2 u (s - u)`` (12). With ``1 / (u (s - u)) = (1/u + 1/(s - u)) / s`` its integral is
``2 s t = ln [u (s - u0) / (u0 (s - u))]`` (13). Let E be ``exp(2 s t)``. Then ``u0 E (s - u) = u (s - u0)``,
so ``u = s E / (E - 1 + s / u0)``; less u0 this is the mode of D_t = A_t - A_0 (14, which is equation 4).

*a != b.* ``c = a^2 - b^2`` does not change, and ``du/dt = (a^2 + b^2) (s - u) = sqrt(c^2 + 4 u^2) (s - u)``.
The ratio ``x = b / a`` obeys ``dx/dt = (1 - x^2) (s - u) = s - c x - s x^2``, as ``u = c x / (1 - x^2)``.
With the roots ``x+-`` of the right side and ``k = sqrt(c^2 + 4 s^2)``: ``(x - x+) / (x - x-)`` decays as
``exp(-k t)``. A mode is then faster than by equation 4, the more so the larger c is against s and u0.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def equation_4(t: Array, s: Array | float, u0: Array | float) -> Array:
    """``u(t) - u0`` at the times t [times] of a mode that starts with a = b.

    If u0 < 0 it has a pole at ``ln(1 + s / |u0|) / (2 s)``.
    """
    growth = np.exp(-2 * s * t)  # of 1 / E: E itself overflows
    return s / (1 - growth + growth * s / u0) - u0


def unequal_mode(t: Array, s: float, a0: float, b0: float) -> Array:
    """``u(t) - u0`` at the times t [times] of a mode that starts with a^2 != b^2 and a != 0."""
    c = a0**2 - b0**2
    k = np.sqrt(c**2 + 4 * s**2)
    high, low = (k - c) / (2 * s), (-k - c) / (2 * s)
    decay = (b0 / a0 - high) / (b0 / a0 - low) * np.exp(-k * t)
    x = (high - low * decay) / (1 - decay)
    return c * x / (1 - x**2) - a0 * b0


@dataclass(frozen=True)
class Network:
    """Data and start of a network ``y = W2 W1 x``.

    Attributes:
        left [N_y, N_h], right [N_x, N_h]: singular vectors of the modes that the hidden units can hold.
        s [N_h]: strengths of the modes in the data.
        inputs [N_x, N_x]: second moments of the inputs, ``Sigma^xx``; the theorem assumes the identity.
        w1 [N_h, N_x], w2 [N_y, N_h]: weights at time 0.
    """

    left: Array
    right: Array
    s: Array
    inputs: Array
    w1: Array
    w2: Array

    def trajectory(self, times: Array) -> Array:
        """``D_t = W2 W1 - (W2 W1 at 0)`` [times, N_y, N_x] under gradient flow, from zero at ``times[0]``.

        The fourth-order Runge-Kutta method steps from one of ``times`` to the next, which should be
        at most 0.1 over the largest of s and u0 later.
        """
        w1, w2, start = self.w1, self.w2, self.w2 @ self.w1
        found = [np.zeros_like(start)]
        for h in np.diff(times):
            k1 = self._slope(w1, w2)
            k2 = self._slope(w1 + h / 2 * k1[0], w2 + h / 2 * k1[1])
            k3 = self._slope(w1 + h / 2 * k2[0], w2 + h / 2 * k2[1])
            k4 = self._slope(w1 + h * k3[0], w2 + h * k3[1])
            w1, w2 = (
                w + h / 6 * (p + 2 * q + 2 * r + z)
                for w, p, q, r, z in zip((w1, w2), k1, k2, k3, k4, strict=True)
            )
            found.append(w2 @ w1 - start)
        return np.array(found)

    def _slope(self, w1: Array, w2: Array) -> tuple[Array, Array]:
        """Of W1 and W2 in time, equation 8."""
        rest = self.left * self.s @ self.right.T - w2 @ w1 @ self.inputs
        return w2.T @ rest, rest @ w1.T

    def modes(self, updates: Array) -> tuple[Array, Array]:
        """Of D_t: the mode strengths [times, N_h], and the norm of what is outside of the modes [times]."""
        inside = np.einsum("yi,tyx,xi->ti", self.left, updates, self.right)
        rest = updates - np.einsum("yi,ti,xi->tyx", self.left, inside, self.right)
        return inside, np.linalg.norm(rest, axis=(1, 2))


def aligned_network(
    s: Array, m1: Array, m2: Array, *, seed: int, inputs: Array | None = None, extra: int = 2
) -> Network:
    """``W2 = U M2 O^T``, ``W1 = O M1 V^T`` with random orthogonal U, V and O.

    ``N_x = N_h + extra``, ``N_y = N_h + extra - 1``. ``inputs``: as in :class:`Network`; None: the identity.
    """
    n = len(s)
    rng = np.random.default_rng(seed)
    left, right, o = (
        np.linalg.qr(rng.standard_normal((rows, n)))[0] for rows in (n + extra - 1, n + extra, n)
    )
    identity = np.eye(n + extra) if inputs is None else inputs
    return Network(left, right, s, identity, w1=(o * m1) @ right.T, w2=(left * m2) @ o.T)
