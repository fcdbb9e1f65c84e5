"""What methods read of a run's configuration: that knows the methods, not they it."""

from collections.abc import Iterator
from typing import Any, Protocol

Adaptation = tuple[str, Any, str]
"""A setting to change, its new value, and why."""


class Training(Protocol):
    """Of the section on training."""

    @property
    def method(self) -> str: ...

    @property
    def train_iters(self) -> int: ...

    @property
    def pretrained_checkpoint(self) -> str | None: ...


class Optimizer(Protocol):
    """Of the section on the optimizer."""

    @property
    def adam_beta1(self) -> float: ...

    @property
    def adam_beta2(self) -> float: ...

    @property
    def factor_optimizer(self) -> str: ...


class Run(Protocol):
    """A run's configuration. ``inrank``: the settings of all methods, each by its own name."""

    @property
    def inrank(self) -> Any: ...

    @property
    def training(self) -> Training: ...

    @property
    def optimizer(self) -> Optimizer: ...


class Asked(Protocol):
    """A run before its defaults are adapted to what the user asked for.

    ``min_dim``: the smallest dimension of its MLP linears.
    """

    @property
    def config(self) -> Run: ...

    @property
    def min_dim(self) -> int: ...

    def free(self, name: str) -> bool:
        """Whether nobody gave this setting, so that its default may be changed."""


class Rule(Protocol):
    """The defaults to change, with a reason each."""

    def __call__(self, asked: Asked, /) -> Iterator[Adaptation]: ...
