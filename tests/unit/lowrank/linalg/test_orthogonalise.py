"""Momentum orthogonalised in k x k, and spectral norms: against decompositions and torch's Muon, sharded."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS
from torch.optim._muon import _zeropower_via_newtonschulz as rule_of_torch

from inrank_megatron.lowrank.linalg import oracle
from inrank_megatron.lowrank.linalg import orthogonalise as module
from inrank_megatron.lowrank.linalg.factors import gather_matrix, shard_matrix
from inrank_megatron.lowrank.linalg.orthogonalise import (
    inverse_roots,
    norms_of_grams,
    orthogonalise,
    spectral_norms,
)
from tests.harness import run_ranks

SHAPES = ((60, 12), (12, 60), (32, 32), (8, 4), (240, 104))


class KeepsItsType(Tensor):
    """What torch's rule takes for BF16 stays what it is."""

    def bfloat16(self, memory_format=torch.preserve_format):
        return self.clone()


def normal(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrices() -> list[Tensor]:
    """FP32: random ones, one with singular values from 1 to 1e-7, one of rank 1, one with zero columns, one
    of zeros."""
    spread = torch.linalg.qr(normal((60, 12))).Q * torch.logspace(0, -7, 12)
    few = normal((60, 12), seed=1)
    few[:, 4:] = 0
    special = [spread @ torch.linalg.qr(normal((12, 12))).Q, normal((60, 1)) @ normal((1, 12)), few]
    return [m.float() for m in [*map(normal, SHAPES), *special, torch.zeros(8, 4)]]


def one(function, *arguments):
    return run_ranks(_alone, 1, function, arguments)[0]


def _alone(rank, world_size, function, arguments):
    return function(*arguments, dist.group.WORLD)


def error(result: Tensor, expected: Tensor) -> float:
    return (result.double() - expected).abs().max().item()


@pytest.mark.parametrize("dim", [0, 1])
def test_equals_the_decomposition(dim):
    given = matrices()
    results = one(orthogonalise, given, [dim] * len(given))
    assert max(error(r, oracle.orthogonalised(m)) for r, m in zip(results, given, strict=True)) < 1e-6
    assert all(r.dtype == torch.float32 for r in results)


def test_equals_the_rule_of_torch():
    coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    given = [m.double() for m in matrices()]
    for result, matrix in zip(one(orthogonalise, given, [0] * len(given)), given, strict=True):
        expected = rule_of_torch(matrix.as_subclass(KeepsItsType), coefficients, DEFAULT_NS_STEPS, EPS)
        assert error(result, expected.as_subclass(Tensor)) < 1e-9


def test_singular_values_end_near_one():
    result = one(orthogonalise, [normal((60, 12))], [0])[0]
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3


def sharded(rank, world_size, *, fault=False, batch=module._BATCH):
    module._BATCH = batch
    group, given = dist.group.WORLD, matrices()
    dims = [index % 2 for index in range(len(given))]
    shards = [shard_matrix(m, dim, group) for m, dim in zip(given, dims, strict=True)]
    if fault:  # one rank has other values
        shards = [s + rank * 1e-3 for s in shards]
    parts = orthogonalise(shards, dims, group)
    full = [gather_matrix(part, dim, group) for part, dim in zip(parts, dims, strict=True)]
    return full, spectral_norms(shards, dims, group)


def in_small_batches(rank, world_size):
    return sharded(rank, world_size, batch=2 * 12**2)


def with_a_fault(rank, world_size):
    return sharded(rank, world_size, fault=True)


@pytest.mark.parametrize(("ranks", "shard"), [(1, sharded), (2, in_small_batches), (4, sharded)])
def test_sharded_equals_serial(ranks, shard):
    given = matrices()
    for results, norms in run_ranks(shard, ranks):
        assert max(error(r, oracle.orthogonalised(m)) for r, m in zip(results, given, strict=True)) < 1e-6
        expected = torch.stack([torch.linalg.matrix_norm(m.double(), 2) for m in given])
        assert (norms <= expected * (1 + 1e-12)).all()
        assert (norms >= expected * (1 - math.log(104) / 512)).all()


def whitened(rank, world_size):
    """Steps on U and on V of a factorised matrix, each sharded along its longer axis."""
    group, (u, v, mu, mv) = dist.group.WORLD, factors_and_momenta()
    shards = [shard_matrix(m, dim, group) for m, dim in ((u, 0), (v, 1), (mu, 0), (mv, 1))]
    root_u, root_v = inverse_roots(shards[:2], [0, 1], group)
    steps = orthogonalise(shards[2:], [0, 1], group, [root_v, root_u])
    return [gather_matrix(step, dim, group) for step, dim in zip(steps, (0, 1), strict=True)]


def factors_and_momenta() -> list[Tensor]:
    """U [60, 12], V [12, 32] and their momenta; V's rows are of very different sizes."""
    u, v, mu, mv = (normal(shape, seed) for seed, shape in enumerate([(60, 12), (12, 32)] * 2))
    return [u, v * torch.logspace(0, -2, 12)[:, None], mu, mv]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_steps_on_factors_follow_the_partner(ranks):
    u, v, mu, mv = factors_and_momenta()
    on_u = oracle.lora_muon_step(mu, oracle.inverse_root(v.mT))
    on_v = oracle.lora_muon_step(mv.mT, oracle.inverse_root(u)).mT
    for results in run_ranks(whitened, ranks):
        for result, expected in zip(results, (on_u, on_v), strict=True):
            # The damping is a share of a spectral norm that may be too small by a hundredth.
            assert error(result, expected) < 0.005 * expected.abs().max()


def test_sharded_steps_on_factors_equal_serial_ones():
    [serial] = run_ranks(whitened, 1)
    for steps in run_ranks(whitened, 4):
        assert all(error(step, one) < 1e-9 for step, one in zip(steps, serial, strict=True))


def test_step_on_a_factor_does_not_depend_on_the_balance():
    """U c and V / c are the same matrix: the step on it is the same."""
    u, v, mu, mv = factors_and_momenta()
    moved = []
    for c in (1.0, 1e3):
        [root_u, root_v] = one(inverse_roots, [u * c, v / c], [0, 1])
        on_u, on_v = one(steps_on_factors, [mu / c, mv * c], [root_v, root_u])
        moved.append(on_u @ (v / c) + (u * c) @ on_v)
    assert error(*moved) < 1e-9


def steps_on_factors(momenta, roots, group):
    return orthogonalise(momenta, [0, 1], group, roots)


def test_no_step_beside_a_factor_of_zeros():
    roots = one(inverse_roots, [torch.zeros(8, 4), torch.zeros(4, 8)], [0, 1])
    assert all(torch.equal(root, torch.zeros(4, 4, dtype=torch.float64)) for root in roots)
    steps = one(steps_on_factors, [normal((8, 4)), normal((4, 8))], roots)
    assert all(step.count_nonzero() == 0 for step in steps)


def test_another_shard_on_one_rank_is_seen():
    given = matrices()
    results, _ = run_ranks(with_a_fault, 2)[0]
    assert max(error(r, oracle.orthogonalised(m)) for r, m in zip(results, given, strict=True)) > 1e-4


def test_spectral_norms_of_values_that_are_alike():
    """The worst case of the bound: one value just above very many."""
    for below in (1.0, 0.999, 0.995, 0.99, 0.98, 0.95):
        values = torch.full((200,), below, dtype=torch.float64)
        values[0] = 1.0
        rotation = torch.linalg.qr(normal((200, 200))).Q
        norm = norms_of_grams((rotation * values.square() @ rotation.t())[None]).item()
        assert 1 - math.log(200) / 512 < norm < 1 + 1e-12
