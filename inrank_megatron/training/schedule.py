"""The learning rate as a pure function of the step, so that nothing of it needs saving."""

import math

from inrank_megatron.config.schema import Config
from inrank_megatron.lowrank.methods.registry import METHODS


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of optimizer step ``step`` (from 1).

    Linear from zero over ``lr_warmup_iters`` steps to ``lr``, then ``lr_decay_style`` down to ``min_lr`` at
    ``lr_decay_iters`` (``train_iters`` where it is left out), and ``min_lr`` from there. A method may change
    its shape (``Method.learning_rate``).
    """
    return METHODS[config.training.method].learning_rate(step, config, lambda at: _smooth(at, config))


def changed_rate(step: int, before: Config, now: Config) -> str | None:
    """A note for a run that continues after ``step`` steps if its learning rate jumps, or stays at zero."""
    first = step + 1
    was, rate = (learning_rate(first, config) for config in (before, now))
    end = now.decay_iters
    if rate == was == 0.0 and end < first <= now.training.train_iters:
        longer = f"--lr-decay-iters {now.training.train_iters}"
        return f"learning rate at step {first}: 0, as its decay ends at step {end}; {longer} continues it"
    if math.isclose(rate, was, rel_tol=1e-9):
        return None
    kept = before.decay_iters
    hint = "" if kept == end else f"; --lr-decay-iters {kept} keeps the old decay"
    return f"learning rate at step {first}: {was:.3g} by the settings so far, {rate:.3g} now{hint}"


def _smooth(step: int, config: Config) -> float:
    optimizer = config.optimizer
    warmup = optimizer.lr_warmup_iters
    if step <= warmup:
        return optimizer.lr * step / warmup
    if optimizer.lr_decay_style == "constant":
        return optimizer.lr
    progress = min(1.0, (step - warmup) / max(1, config.decay_iters - warmup))
    share = (
        1.0 - progress if optimizer.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)
