"""The learning rate is a function of the step."""

import math
from itertools import pairwise

import pytest

from inrank_megatron.config.loading import from_flat
from inrank_megatron.training.schedule import changed_rate, learning_rate


def rates(**changes):
    flat = {"model_preset": "tiny", "train_iters": 20, "lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 4}
    config = from_flat(flat | changes)
    return [learning_rate(step, config) for step in range(1, 26)]


@pytest.mark.parametrize("style", ["linear", "cosine", "constant"])
def test_warmup_and_final_rate(style):
    values = rates(lr_decay_style=style)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    end = 1.0 if style == "constant" else 0.1
    assert values[19:] == pytest.approx([end] * 6)
    assert all(first >= second for first, second in pairwise(values[3:]))


def test_decay_shapes():
    half = 12 - 1  # the middle between step 4 and step 20
    assert rates(lr_decay_style="linear")[half] == pytest.approx(0.55)
    assert rates(lr_decay_style="cosine")[half] == pytest.approx(0.55)
    assert rates(lr_decay_style="cosine")[7] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates(lr_decay_style="linear", lr_decay_iters=12)[11:] == pytest.approx([0.1] * 14)
    assert rates(lr_warmup_iters=0)[0] < 1.0


def test_relora_rises_again_after_every_merge():
    relora = {"method": "relora", "rank": 4, "relora_interval": 8, "relora_warmup_iters": 3}
    plain, jagged = rates(), rates(**relora)
    restarts = {8, 9, 10, 16, 17, 18, 24}  # the steps 9, 10, 11, ...
    for index, (smooth, value) in enumerate(zip(plain, jagged, strict=True)):
        assert index in restarts or value == smooth
    assert jagged[8:11] == pytest.approx([plain[10] / 3, plain[10] * 2 / 3, plain[10]])
    assert jagged[16:19] == pytest.approx([plain[18] / 3, plain[18] * 2 / 3, plain[18]])


def run_of(steps, **changes):
    return from_flat(
        {"model_preset": "tiny", "lr": 2e-3, "lr_warmup_iters": 20, "train_iters": steps} | changes
    )


def test_a_jump_of_the_rate_on_resume_is_said():
    """A longer run of the same file draws its decay out: after its end the rate jumped to half its peak."""
    before, said = run_of(260), changed_rate(260, run_of(260), run_of(520))
    assert said.startswith("learning rate at step 261: 0 by the settings so far, 0.00106 now")
    assert said.endswith("; --lr-decay-iters 260 keeps the old decay")
    kept = changed_rate(260, before, run_of(520, lr_decay_iters=260))
    assert (
        kept
        == "learning rate at step 261: 0, as its decay ends at step 260; --lr-decay-iters 520 continues it"
    )
    lower = changed_rate(100, before, run_of(260, lr=1e-3))
    assert lower == "learning rate at step 101: 0.00149 by the settings so far, 0.000744 now"
    assert changed_rate(100, before, run_of(260, min_lr=1e-3)) is not None


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (run_of(260), run_of(260)),
        (run_of(260, lr_decay_style="constant"), run_of(520, lr_decay_style="constant")),
        (run_of(260, lr_decay_iters=300), run_of(290, lr_decay_iters=300)),
        (run_of(260, lr=0.0), run_of(260, lr=0.0)),
    ],
)
def test_a_rate_that_goes_on_is_not_worth_a_word(before, now):
    assert changed_rate(100, before, now) is None
