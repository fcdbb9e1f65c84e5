"""A loss is a spike by the median and the median absolute deviation of those before it."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from inrank_megatron.training.loss_history import FACTOR, FEWEST, TO_SIGMA, WINDOW, LossHistory
from inrank_megatron.training.progress import Progress, recorded_progress, resume_progress


def history(losses):
    found = LossHistory()
    for step, loss in enumerate(losses, start=1):
        found = found.after(step, float(loss), skipped=False)
    return found


def test_the_limit_is_that_of_the_formula():
    losses = np.random.default_rng(0).normal(3.0, 0.1, 3 * WINDOW)
    window = losses[-WINDOW:]
    deviation = np.median(np.abs(window - np.median(window)))
    assert history(losses).limit() == pytest.approx(np.median(window) + FACTOR * TO_SIGMA * deviation)
    assert TO_SIGMA * deviation == pytest.approx(0.1, rel=0.3), "it estimates the standard deviation"


def test_noise_and_a_falling_loss_have_no_spikes():
    generator = np.random.default_rng(1)
    steps = np.arange(5000)
    losses = 3.0 + 7.0 * np.exp(-steps / 300) + generator.normal(0, 0.05, len(steps))
    found, spikes = LossHistory(), 0
    for step, loss in enumerate(losses, start=1):
        spikes += found.is_spike(float(loss))
        found = found.after(step, float(loss), skipped=False)
    assert spikes == 0 and len(found.losses) == WINDOW


def test_spikes_do_not_hide_one_another():
    losses = np.random.default_rng(2).normal(3.0, 0.1, WINDOW)
    losses[::4] += 5.0
    assert history(losses).is_spike(5.0)


def test_too_few_losses_have_no_spike():
    assert not history([3.0] * (FEWEST - 1)).is_spike(1e9)
    assert history([3.0, 3.1] * FEWEST).is_spike(1e9)


@pytest.mark.parametrize("loss", [np.inf, np.nan])
def test_a_loss_that_is_not_finite_is_no_spike(loss):
    """Left out as one, an overflow would neither lower the loss scale nor be reported."""
    assert not history([3.0, 3.1] * FEWEST).is_spike(loss)


def test_a_checkpoint_keeps_it_to_the_last_bit():
    found = history(np.random.default_rng(3).normal(3.0, 0.1, 70)).after(71, 9.0, skipped=True)
    state = json.loads(json.dumps(recorded_progress(Progress(71, 1.0, history=found), check_under_way=False)))
    assert resume_progress(SimpleNamespace(state=state)).history == found
    assert asdict(found)["skipped_steps"] == (71,)
    del state["loss_history"]
    assert resume_progress(SimpleNamespace(state=state)).history == LossHistory(), "of earlier versions"
