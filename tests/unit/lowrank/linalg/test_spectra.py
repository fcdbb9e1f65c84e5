"""Spectra of products that are never formed: accuracy, choice of the way, errors. On one rank."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.criteria.explained_ratio import grow, update_ratio
from inrank_megatron.lowrank.linalg import oracle, spectra
from inrank_megatron.lowrank.linalg.gram import packed_gram, packed_size, unpack_gram
from inrank_megatron.lowrank.linalg.spectra import Product, Update
from tests.harness import run_ranks

O, I, K = 60, 44, 10  # noqa: E741 - the project's letter for input features


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def of_condition(rows: int, columns: int, condition: float, seed: int = 0) -> Tensor:
    """A matrix of that condition number whose columns are all alike in norm: no scaling improves it."""
    values = torch.logspace(0, -np.log10(condition), columns, dtype=torch.float64)
    return orthonormal(rows, columns, seed) * values @ orthonormal(columns, columns, seed + 1).t()


def opposed(condition: float) -> tuple[Tensor, Tensor]:
    """Factors of that condition number each, whose product has K singular values 1: nearly all cancels."""
    left = of_condition(O, K, condition)
    return left, torch.linalg.pinv(left, rtol=0) @ orthonormal(O, K, 5) @ orthonormal(I, K, 6).t()


def changed(left: Tensor, right: Tensor, *, columns: int, value: float, of: str) -> tuple[Tensor, Tensor]:
    left, right = left.clone(), right.clone()
    if "U" in of:
        left[:, :columns] = value * left[:, -columns:]
    if "V" in of:
        right[:columns] = value * right[-columns:]
    return left, right


RANDOM = normal(O, K), normal(K, I, seed=1)
SCALE = torch.logspace(0, -12, K, dtype=torch.float64)
PAIRS = {
    "random": RANDOM,
    "one column": (RANDOM[0][:, :1], RANDOM[1][:1]),
    "several block rows": (normal(300, 130), normal(130, 200, seed=1)),
    "more columns than features": (normal(O, 70), normal(70, I, seed=1)),
    **{
        f"condition 1e{c}": (of_condition(O, K, 10.0**c), of_condition(I, K, 10.0**c, 3).t())
        for c in (2, 4, 6, 8)
    },
    "values from 1 to 1e-8": (orthonormal(O, K) * torch.logspace(0, -8, K), orthonormal(I, K, 3).t()),
    "cancelling": opposed(1e6),
    "zero columns in U": changed(*RANDOM, columns=3, value=0.0, of="U"),
    "zero columns in U, zero rows in V": changed(*RANDOM, columns=3, value=0.0, of="UV"),
    "zero columns in U, rows of V repeated": (
        changed(*RANDOM, columns=3, value=0.0, of="U")[0],
        changed(*RANDOM, columns=3, value=1.0, of="V")[1],
    ),
    "repeated columns": changed(*RANDOM, columns=3, value=1.0, of="U"),
    "nearly repeated columns": changed(*RANDOM, columns=3, value=1 + 1e-14, of="UV"),
    "repeated values": (orthonormal(O, K), 3 * orthonormal(I, K, 2).t()),
    "all zero": (torch.zeros(O, K), torch.zeros(K, I)),
    "zero U": (torch.zeros(O, K), RANDOM[1].float()),
    "columns of all sizes": (RANDOM[0] * SCALE, RANDOM[1]),
    "columns scaled against rows": (RANDOM[0] * SCALE, RANDOM[1] / SCALE[:, None]),
    "tiny": (1e-30 * RANDOM[0].float(), 1e-30 * RANDOM[1].float()),
    "FP32": (RANDOM[0].float(), RANDOM[1].float()),
    "BF16": (RANDOM[0].bfloat16(), RANDOM[1].bfloat16()),
}


@pytest.mark.parametrize("k", [1, 99, 100, 250])
def test_packed_gram_matrices(k):
    columns = normal(7, k)
    square = unpack_gram(packed_gram(columns), k)
    torch.testing.assert_close(square.tril(), (columns.t() @ columns).tril())
    assert len(packed_gram(columns)) == packed_size(k) <= (k * k if k < 100 else 0.76 * k * k)


def values(rank: int, world_size: int, products: list[Product | Update]) -> list[Tensor]:
    return spectra.singular_values(products, dist.group.WORLD, step=7)


def assert_spectrum(result: Tensor, expected: Tensor, accuracy: float) -> None:
    """``expected`` may be longer or shorter; both continue with zeros."""
    padded = torch.zeros(max(len(result), len(expected)), dtype=torch.float64)
    padded[: len(expected)] = expected
    assert result.dtype == torch.float64
    assert (result - padded[: len(result)]).abs().max() <= accuracy * expected.max()
    assert padded[len(result) :].sum() <= 1e-9 * expected.max()


def test_all_kinds_of_products_at_once():
    """Shapes, dtypes and conditions mixed in one call, against the dense oracle."""
    results = run_ranks(values, 1, [Product(name, *pair) for name, pair in PAIRS.items()])[0]
    for (name, pair), result in zip(PAIRS.items(), results, strict=True):
        assert len(result) == pair[1].shape[0], name
        assert_spectrum(result, oracle.singular_values(*pair), 1e-8)


def householder_calls(rank: int, world_size: int, products: list[Product]) -> tuple[int, Tensor]:
    """How many products went the Householder path, and the first one's values had it been closed."""
    seen, original, limit = [], spectra._householder, spectra._GRAM_ACCURACY
    try:
        spectra._householder = lambda poor, group: (seen.extend(poor), original(poor, group))[1]
        values(rank, world_size, products)
        count = len(seen)
        spectra._GRAM_ACCURACY = torch.inf
        return count, values(rank, world_size, products)[0]
    finally:
        spectra._householder, spectra._GRAM_ACCURACY = original, limit


def test_only_what_needs_it_goes_the_householder_way():
    """It is needed: on factors that cancel the Gram path alone would be wrong, by far more than allowed."""
    names = ["cancelling", "random", "condition 1e2", "columns of all sizes", "condition 1e8", "zero U"]
    names += ["zero columns in U, rows of V repeated", "columns scaled against rows", "BF16"]
    products = [Product(name, *PAIRS[name]) for name in names]
    count, gram_alone = run_ranks(householder_calls, 1, products)[0]
    assert count == 2
    assert (gram_alone - 1).abs().max() > spectra.ACCURACY


def four_factors(size: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, V, U0, V0 with a relative change of about ``size``, as rounded to ``dtype``."""
    u0, v0 = (t.to(dtype) for t in RANDOM)
    return (
        (u0.double() + size * normal(O, K, seed=8)).to(dtype),
        (v0.double() + size * normal(K, I, seed=9)).to(dtype),
        u0,
        v0,
    )


def exact_delta(U: Tensor, V: Tensor, U0: Tensor, V0: Tensor) -> Tensor:
    """Singular values of ``U V - U0 V0`` formed in extended precision."""
    u, v, u0, v0 = (t.double().numpy().astype(np.longdouble) for t in (U, V, U0, V0))
    return torch.linalg.svdvals(torch.from_numpy((u @ v - u0 @ v0).astype(np.float64)))


STILL = four_factors(0.0)
UPDATES = {
    **{f"change of {size:g}": four_factors(size) for size in (1.0, 1e-2, 1e-4, 1e-6)},
    "BF16": four_factors(1e-1, torch.bfloat16),
    "U alone": (four_factors(1e-3)[0], *STILL[1:]),
    "V alone": (STILL[0], four_factors(1e-3)[1], *STILL[2:]),
    "no change": STILL,
    "from zero": (*STILL[:2], torch.zeros(O, K), torch.zeros(K, I)),
    "one column": (torch.where(torch.arange(K) == 2, four_factors(1e-5)[0], STILL[0]), *STILL[1:]),
}


def test_updates_are_exact_relative_to_themselves():
    """Also where the update is a millionth of the products whose difference it is."""
    results = run_ranks(values, 1, [Update(name, *four) for name, four in UPDATES.items()])[0]
    for (name, four), result in zip(UPDATES.items(), results, strict=True):
        expected = exact_delta(*four)
        assert len(result) == 2 * K, name
        assert_spectrum(result, expected, 1e-9)
        assert_spectrum(result, oracle.update_singular_values(*four), 1e-6)
    assert not results[list(UPDATES).index("no change")].any()


def failure(rank: int, world_size: int, product: Product | Update) -> str:
    try:
        values(rank, world_size, [Product("sound", *RANDOM), product])
    except UserError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", ["U", "V"])
def test_values_that_are_not_finite_are_named(factor, poison):
    """The story of a decomposition that a NaN from FP16 training reached, and whose message spoke of an
    algorithm that did not converge (jiaweizzhao/GaLore issues 26 and 58).
    """
    pair = {"U": RANDOM[0].clone(), "V": RANDOM[1].clone()}
    pair[factor][3, 4] = poison
    message = run_ranks(failure, 1, Product("layers.3.fc1", **pair))[0]
    assert message.startswith(f"factor {factor} of layers.3.fc1 at step 7 holds NaN or Inf")
    assert "lower --lr" in message


def test_columns_that_cancel_beyond_fp64_are_an_error():
    """The alternative would be a decision on rounding errors."""
    message = run_ranks(failure, 1, Product("layers.3.fc1", *opposed(1e11)))[0]
    assert message.startswith("the columns of layers.3.fc1 at step 7 cancel")
    assert "checkpoint" in message


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 0.99])
def test_decisions_are_those_of_the_dense_reference(threshold):
    """FP32 ``svdvals`` of the formed product, as the authors' code decides."""
    pairs = [(normal(96, 40, seed=s).float(), normal(40, 384, seed=s + 9).float()) for s in range(4)]
    results = run_ranks(values, 1, [Product(str(s), *pair) for s, pair in enumerate(pairs)])[0]
    for (u, v), result in zip(pairs, results, strict=True):
        dense = torch.linalg.svdvals(u @ v)
        decided = [
            grow(lambda r, s=s: update_ratio(s.tolist(), r, length=96), 2, threshold=threshold, limit=39)
            for s in (result, dense)
        ]
        assert decided[0].rank == decided[1].rank
        assert decided[0].capped == decided[1].capped
