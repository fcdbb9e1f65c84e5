"""Spectra and truncation over 1, 2 and 4 real ranks: shares of any size, equal bits everywhere, messages."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.linalg import oracle, spectra, truncation
from inrank_megatron.lowrank.linalg.orthogonal import orthonormal_columns, product_svd
from inrank_megatron.lowrank.linalg.spectra import Product, Update
from inrank_megatron.lowrank.linalg.truncation import ShardedMatrix
from tests.harness import run_ranks

O, I = 48, 20  # noqa: E741 - the project's letter for input features
SHARES = {
    "whole": ([48], [20]),
    "even": ([24, 24], [10, 10]),
    "uneven": ([47, 1], [3, 17]),
    "four, one empty": ([0, 30, 8, 10], [7, 6, 7, 0]),
}
BOTH = pytest.mark.parametrize("shares", SHARES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dependent(k: int) -> tuple[Tensor, Tensor]:
    """Nearly equal columns: a product that goes the Householder path."""
    left = normal(O, k)
    left[:, 1] = left[:, 0] + 1e-9 * left[:, 1]
    return left, normal(k, I, seed=1)


PAIRS = [
    (normal(O, 6), normal(6, I, seed=1)),
    dependent(8),
    (normal(O, 11, seed=3).float(), normal(11, I, seed=4).float()),
    (torch.zeros(O, 6), normal(6, I)),
    dependent(6),
    (normal(O, 24), normal(24, I)),
    (normal(O, 6, seed=5).bfloat16(), normal(6, I, seed=6).bfloat16()),
]


def local_products(rank: int, shares: tuple[list[int], list[int]]) -> list[Product | Update]:
    """The products of PAIRS and a small update of each, from this rank's shares."""
    products = []
    for number, (u, v) in enumerate(PAIRS):
        u_local, v_local = u.split(shares[0])[rank], v.split(shares[1], dim=1)[rank]
        products.append(Product(f"layer {number}", u_local, v_local))
        u1, v1 = (1 + 1e-5) * u.double(), v.double() + 1e-6 * normal(*v.shape, seed=7)
        u1, v1 = u1.split(shares[0])[rank], v1.split(shares[1], dim=1)[rank]
        products.append(Update(f"layer {number}", u1, v1, u_local, v_local))
    return products


def expected_spectra() -> list[Tensor]:
    products = local_products(0, ([O], [I]))
    return [
        oracle.singular_values(p.U, p.V)
        if isinstance(p, Product)
        else oracle.update_singular_values(p.U, p.V, p.U0, p.V0)
        for p in products
    ]


def all_spectra(rank: int, world_size: int, shares) -> list[Tensor]:
    return spectra.singular_values(local_products(rank, shares), dist.group.WORLD, step=3)


@BOTH
def test_spectra_do_not_depend_on_the_sharding(shares):
    results = run_ranks(all_spectra, len(SHARES[shares][0]), SHARES[shares])
    for number, expected in enumerate(expected_spectra()):
        values = results[0][number]
        assert all(torch.equal(result[number], values) for result in results)
        known = min(len(values), len(expected))
        assert (values[:known] - expected[:known]).abs().max() <= 1e-8 * expected.max()
        assert (values[known:] <= 1e-8 * expected.max()).all()


@contextmanager
def arithmetic_of_another_machine(rank: int):
    """Off rank 0 every spectrum is wrong, and rank 1 would send every product the Householder path."""
    svdvals, solve = torch.linalg.svdvals, torch.linalg.solve_triangular
    torch.linalg.svdvals = lambda a: svdvals(a) * (1 + 1e-3 * rank)
    torch.linalg.solve_triangular = lambda *a, **k: solve(*a, **k) * (1e9 if rank == 1 else 1)
    try:
        yield
    finally:
        torch.linalg.svdvals, torch.linalg.solve_triangular = svdvals, solve


def perturbed_spectra(rank: int, world_size: int, shares) -> list[Tensor]:
    with arithmetic_of_another_machine(rank):
        return all_spectra(rank, world_size, shares)


@pytest.mark.parametrize("shares", ["even", "four, one empty"])
def test_ranks_with_different_rounding_decide_alike(shares):
    """Owners' numbers count, error bounds included: nobody's own arithmetic changes his values or his way."""
    results = run_ranks(perturbed_spectra, len(SHARES[shares][0]), SHARES[shares])
    exact = run_ranks(all_spectra, len(SHARES[shares][0]), SHARES[shares])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    assert any((a != b).any() for a, b in zip(results[0], exact[0], strict=True))


@contextmanager
def counted_messages():
    """Collects (name, elements) of every collective that this rank takes part in."""
    seen, names = [], ("all_gather", "all_reduce", "broadcast", "reduce", "reduce_scatter")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(first, *args, **kwargs):
            tensors = first if isinstance(first, list) else [first]
            seen.append((name, sum(t.numel() for t in tensors)))
            return originals[name](first, *args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, counting(name))
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def messages_of_spectra(rank: int, world_size: int, layers: int, round_elements: int):
    u, v = normal(O, 16).chunk(world_size)[rank], normal(16, I).chunk(world_size, dim=1)[rank]
    before = spectra._ROUND_ELEMENTS
    spectra._ROUND_ELEMENTS = round_elements
    try:
        with counted_messages() as seen:
            values = spectra.singular_values([Product("a", u, v)] * layers, dist.group.WORLD, step=1)
    finally:
        spectra._ROUND_ELEMENTS = before
    return seen, values


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_two_collectives_serve_all_layers(layers):
    """A reduce-scatter of two Gram matrices per layer, of which an owner keeps its own, and an all-gather."""
    for seen, _ in run_ranks(messages_of_spectra, 2, layers, 2**25):
        own = (layers + 1) // 2
        assert seen == [("reduce_scatter", own * 2 * 16 * 16), ("all_gather", 2 * own * (4 + 16))]


def test_layers_beyond_the_memory_limit_are_batched():
    at_once, rounds = (run_ranks(messages_of_spectra, 2, 7, size) for size in (2**25, 3 * 2 * 256))
    assert [name for name, _ in rounds[0][0]] == ["reduce_scatter"] * 3 + ["all_gather"] * 3
    assert all(map(torch.equal, rounds[0][1], at_once[0][1]))


def failure_message(rank: int, world_size: int, poisoned: int) -> str:
    products = local_products(rank, SHARES["even"])
    if rank == poisoned:
        products[4].V[2, 1] = float("inf")
    try:
        spectra.singular_values(products, dist.group.WORLD, step=3)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("poisoned", [0, 1])
def test_non_finite_shard_is_reported_by_all_ranks(poisoned):
    for message in run_ranks(failure_message, 2, poisoned):
        assert message.startswith("factor V of layer 2 at step 3 holds NaN or Inf")


def local_triples(rank: int, world_size: int, shares, pair: tuple[Tensor, Tensor], r: int):
    u, v = pair[0].split(shares[0])[rank], pair[1].split(shares[1], dim=1)[rank]
    return product_svd(u, v, r, dist.group.WORLD)


@BOTH
@pytest.mark.parametrize("deficient", [False, True], ids=["full rank", "deficient"])
def test_singular_vectors_of_a_product_match_the_dense_ones(shares, deficient):
    """Orthonormal even where the values are zero and the first rank has no rows to put a direction into."""
    u, v = normal(O, 8), normal(8, I, seed=1)
    if deficient:
        u[:, 2:7] = 0
    results = run_ranks(local_triples, len(SHARES[shares][0]), SHARES[shares], (u, v), 8)
    a, b = torch.cat([x[0] for x in results]), torch.cat([x[2] for x in results], dim=1)
    s = results[0][1]
    for gram in (a.t() @ a, b @ b.t()):
        torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(a * s @ b, u @ v, rtol=0, atol=1e-13 * float(s[0]))
    assert all(torch.equal(x[1], s) for x in results)


def local_columns(rank: int, world_size: int, matrix: Tensor, sizes: list[int]) -> Tensor:
    return orthonormal_columns(matrix.split(sizes)[rank], dist.group.WORLD)


@BOTH
def test_orthonormal_columns_of_dependent_ones(shares):
    matrix = normal(O, 9)
    matrix[:, 3], matrix[:, 5:] = matrix[:, 1], 0
    q = torch.cat(run_ranks(local_columns, len(SHARES[shares][0]), matrix, SHARES[shares][0]))
    torch.testing.assert_close(q.t() @ q, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(q @ (q.t() @ matrix), matrix, rtol=0, atol=1e-13)


TOKENS = (200, 6)


def input_moment(tokens: int, features: int) -> Tensor:
    x = normal(tokens, features, seed=tokens) * torch.logspace(0, -2, features, dtype=torch.float64)
    return x.t() @ x / tokens


def model(dim: int) -> list[tuple[Tensor, Tensor | None, int]]:
    """(W, moment, r) of five layers: plain, steep, of low rank; activation-aware, also with few tokens."""
    shape = (O, I) if dim == 0 else (I, O)
    steep = normal(*shape) * torch.logspace(0, -11, shape[1], dtype=torch.float64)
    low = normal(shape[0], 4) @ normal(4, shape[1])
    layers = [(normal(*shape, seed=1), None, 7), (steep, None, 15), (low, None, 6)]
    for tokens in TOKENS:
        W, C = normal(*shape, seed=tokens), input_moment(tokens, shape[1])
        layers.append((W, C if dim == 0 else W @ C @ W.t(), 9))
    return layers


def local_truncations(rank: int, world_size: int, dim: int, sizes: list[int]):
    layers = model(dim)
    matrices = [
        ShardedMatrix(f"layer {n}", lambda W=W: W.split(sizes, dim)[rank], dim, moment)
        for n, (W, moment, _) in enumerate(layers)
    ]
    group = dist.group.WORLD
    energies = truncation.output_energies(matrices, group, step=1)
    with counted_messages() as seen:
        results = list(truncation.truncate(matrices, [r for *_, r in layers], group, step=1))
    return [(x.left, x.right, x.energies) for x in results], energies, max(size for _, size in seen)


def assembled(results, number: int) -> tuple[Tensor, Tensor]:
    parts = [result[0][number] for result in results]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)


@BOTH
@pytest.mark.parametrize("dim", [0, 1], ids=["column", "row"])
def test_truncation_from_shards_matches_dense(shares, dim):
    """The minimum of the full matrix, for several layers that their owners decompose side by side."""
    results = run_ranks(local_truncations, len(SHARES[shares][0]), dim, SHARES[shares][0])
    for number, (W, moment, r) in enumerate(model(dim)):
        left, right = assembled(results, number)
        assert left.shape == (W.shape[0], r)
        assert right.shape == (r, W.shape[1])
        if moment is None:
            best = (W - torch.mm(*oracle.truncate(W, r))).norm()
            assert ((W - left @ right).norm() - best).abs() <= 1e-13 * W.norm()
        else:
            C = input_moment(TOKENS[number - 3], W.shape[1])
            best = oracle.output_error(W, torch.mm(*oracle.truncate_for_activations(W, C, r)), C)
            zero_error = oracle.output_error(W, torch.zeros_like(W), C)
            assert (oracle.output_error(W, left @ right, C) - best).abs() <= 1e-12 * zero_error
        for result in results:
            assert torch.equal(result[1][number], results[0][1][number])
            assert torch.equal(result[0][number][2], results[0][0][number][2])
        torch.testing.assert_close(results[0][1][number], results[0][0][number][2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1], ids=["column", "row"])
def test_collectives_carry_no_full_matrix(dim):
    """The largest one is a square of the narrow side (twice: a Gram matrix of each rank), not O x I."""
    for _, _, largest in run_ranks(local_truncations, 2, dim, SHARES["even"][0]):
        assert largest <= 2 * I * (I + 1) < O * I
