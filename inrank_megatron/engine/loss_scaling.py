"""Dynamic loss scaling under DeepSpeed: its state, the steps that it skipped, and when they are too many."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from inrank_megatron.errors import UserError

STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScaling:
    """Counts skipped steps and carries the scale over rebuilds and resumes.

    Attributes:
        skipped: steps without an update so far, over the whole run.
        in_a_row: the latest of them that followed each other.
    """

    def __init__(self, *, enabled: bool, limit: int):
        self.enabled, self._limit = enabled, limit
        self.skipped = self.in_a_row = 0
        self._last_chance = False
        self._optimizer: Any = None  # of DeepSpeed, once there is a model
        self._left: dict[str, Any] = {}

    def attach(self, optimizer) -> None:
        """Follow DeepSpeed's ``optimizer`` from now on, and give it the state of the one before."""
        self._optimizer = optimizer
        if self.enabled:  # its own error says neither the step nor a remedy
            optimizer.loss_scaler.raise_error_at_min_scale = False
        self._set_state(self._left)

    def detach(self) -> None:
        """The optimizer is about to go."""
        self._left, self._optimizer = self._state(), None

    @property
    def scale(self) -> float | None:
        """The present loss scale; None without loss scaling."""
        return float(self._optimizer.loss_scaler.cur_scale) if self.enabled else None

    def count(self, *, overflow: bool, step: int) -> None:
        """Count a step.

        Raises:
            UserError: on every rank, after too many skipped steps in a row, or one at the smallest scale.
        """
        self.in_a_row = self.in_a_row + 1 if overflow else 0
        self.skipped += overflow
        if overflow:
            self._forget_gradients()
        at_minimum, self._last_chance = self._last_chance, self._cannot_halve()
        if overflow and (at_minimum or self.in_a_row >= self._limit):
            limit = "the smallest there is" if at_minimum else f"overflow_limit = {self._limit}"
            raise UserError(
                f"step {step}: {self.in_a_row} steps in a row overflowed float16, at last with loss scale "
                f"{self.scale:g} ({limit}); lower --lr and continue from the last checkpoint with --resume "
                "auto, or start again with --bf16"
            )

    @contextmanager
    def unless(self, forbidden: Callable[[], bool]) -> Iterator[None]:
        """What DeepSpeed's optimizer does within it leaves no trace if the update was ``forbidden``, which it
        takes for an overflow.
        """
        before = self._state()
        yield
        if forbidden():
            self._set_state(before)
            self._forget_gradients()

    def record(self) -> dict:
        """For a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "state": self._state()}

    def load(self, record: dict) -> None:
        """As a checkpoint recorded it."""
        self.skipped, self.in_a_row = record["skipped"], record["in_a_row"]
        self._set_state(record["state"])

    def _state(self) -> dict:
        return {name: getattr(self._optimizer.loss_scaler, name) for name in STATE} if self.enabled else {}

    def _set_state(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self._optimizer.loss_scaler, name, value)
        self._last_chance = self._cannot_halve()

    def _forget_gradients(self) -> None:
        # With offload DeepSpeed's stages 1 and 2 keep the sums that overflowed, and every later step would
        # add to them and overflow too. After a step that is taken they drop them in this way.
        if getattr(self._optimizer, "cpu_offload", False) and hasattr(self._optimizer, "averaged_gradients"):
            self._optimizer.averaged_gradients = dict.fromkeys(self._optimizer.averaged_gradients)

    def _cannot_halve(self) -> bool:
        """Whether an overflow in the next step would leave nothing to try."""
        if not self.enabled:
            return False
        scaler = self._optimizer.loss_scaler
        return scaler.cur_scale <= scaler.min_scale and scaler.cur_hysteresis == 1
