"""The experiments measure what they say: small cases with a known answer, on one rank."""

import pytest
import torch

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.controls import noisy_gradients
from inrank_megatron.experiments.driver import smallest_rank
from inrank_megatron.experiments.relora_8_bit import always_rounded, in_8_bits
from inrank_megatron.experiments.teacher import Learned, Teacher, learn, student_config
from tests.contract.layouts import LAYOUTS
from tests.contract.probes import dense_gradients
from tests.contract.sessions import build
from tests.groups import join
from tests.harness import run_ranks

TEACHER = Teacher(width=48, rank=6, value=8.0, seed=1)


@pytest.mark.parametrize(("rank", "own"), [(4, 4), (16, 15), (64, 60)])
def test_explained_ratio_of_equal_singular_values(rank, own):
    """1 - t (256 - t) / (r (256 - r)) >= 0.9 for t values left out."""
    left_out = rank - own
    ratio = [1 - t * (256 - t) / (rank * (256 - rank)) for t in (left_out, left_out + 1)]
    assert ratio[0] >= 0.9 > ratio[1]
    assert Teacher(256, rank, 8.0, seed=0).own_rank(0.9) == own


def test_reestimated_rank_may_fall():
    assert smallest_rank([5.0, 4.0, 0.01, 0.01], threshold=0.9, length=64) == 2


def test_teacher_has_the_stated_spectrum():
    values = torch.linalg.svdvals(TEACHER.matrix)
    torch.testing.assert_close(values[:6], torch.full((6,), 8.0))
    assert values[6] < 1e-5


def student(rank: int, world_size: int, steps: int, interval: int) -> Learned:
    config = student_config(TEACHER, train_iters=steps, rank_check_interval=interval, lr=4e-3, buffer=8)
    return learn(TEACHER, config, join(1))


def test_student_learns_the_rank_of_the_teacher():
    [found] = run_ranks(student, 1, 600, 300)
    own = TEACHER.own_rank(0.9)
    assert found.rank == found.re_estimated == own
    assert found.loss < 0.05 * 8**2 * 6 / 48  # of the targets' own mean square


def test_training_without_a_rank_check_is_refused():
    assert run_ranks(refusal, 1) == ["10 steps: the first rank check comes after 300; give more --steps"]


def refusal(rank: int, world_size: int) -> str:
    try:
        student(rank, world_size, 10, 300)
    except UserError as error:
        return str(error)
    return "accepted"


def noisy(rank: int, world_size: int) -> dict:
    """Gradients of one batch as they are and as noise, of the same weights."""
    session = build("inrank", LAYOUTS["TP1 DP1"]).start()
    model, seen = session.engine.model, []
    for prepare in (lambda engine: None, noisy_gradients):
        prepare(session.engine)
        model.zero_grad()
        sum(session.engine.loss(model, batch) for batch in session.batch(0)).backward()
        seen.append({name: p.grad.clone() for name, p in session.engine.parameters() if p.grad is not None})
    active = {name: layer.active_columns for name, layer in session.engine.layers.items()}
    return {"plain": seen[0], "noise": seen[1], "active": active}


def starting_products(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Cosine of every layer's ``U0 V0`` with the loss gradient of W0: as a run starts, and under noise."""
    cosines = []
    for prepare in (lambda engine: None, noisy_gradients):
        session = build("inrank", LAYOUTS["TP1 DP1"])
        gradients = dense_gradients(session)
        prepare(session.engine)
        session.start()
        products = {name: (x.U.data @ x.V.data).double() for name, x in session.engine.layers.items()}
        cosines.append(
            [
                torch.cosine_similarity(p.flatten(), gradients[n].flatten(), 0).item()
                for n, p in products.items()
            ]
        )
    return tuple(cosines)


def test_noise_control_starts_without_the_gradient():
    [(plain, noise)] = run_ranks(starting_products, 1)
    assert max(plain) < -0.3
    assert max(map(abs, noise)) < 0.05


def test_noise_control_keeps_gradient_norms_and_unused_columns():
    [found] = run_ranks(noisy, 1)
    assert found["plain"], "this way of taking gradients sees none"
    for name, plain in found["plain"].items():
        noise = found["noise"][name]
        assert noise.norm().item() == pytest.approx(plain.norm().item(), rel=1e-4), name
        if plain.norm() > 0:
            cosine = (plain * noise).sum() / (plain.norm() * noise.norm())
            assert abs(cosine) < 5 / plain.numel() ** 0.5 + 0.05, name
    for layer, k in found["active"].items():
        assert not found["noise"][f"{layer}.V"][k:].any()
        assert found["noise"][f"{layer}.V"][:k].any()


def always_in_8_bits(rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """W0 of each layer as it should be and is: after the start, and after the first merge."""
    plain, session = (build("relora", LAYOUTS["TP1 DP1"]) for _ in range(2))
    always_rounded(session.engine)
    session.start()
    layers = session.engine.layers
    found = [
        (in_8_bits(layer.weight.data)[0], layers[name].weight.clone())
        for name, layer in plain.engine.layers.items()
    ]
    for _ in range(session.method.interval):
        session.train_step()
    with torch.no_grad():
        expected = {name: in_8_bits(layer.weight + layer.U @ layer.V)[0] for name, layer in layers.items()}
    session.apply(session.decide())
    return found + [(expected[name], layer.weight.clone()) for name, layer in layers.items()]


def test_w0_has_its_8_bit_values_at_the_start_and_after_a_merge():
    [found] = run_ranks(always_in_8_bits, 1)
    assert len(found) > 4
    for expected, there in found:
        step = expected.abs().amax(1, keepdim=True) / 127
        assert (there - expected).abs().max() < 1.01 * step.max()  # where a sum lies between two values
        assert ((there - expected).abs() < 0.01 * step).float().mean() > 0.99
