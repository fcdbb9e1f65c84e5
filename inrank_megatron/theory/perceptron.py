"""The two-layer perceptron of InRank's figures 3 and 15: its data, its initialisations, its training."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inrank_megatron.errors import UserError
from inrank_megatron.spectra.recorder import Row, SpectrumRecorder


@dataclass(frozen=True)
class Pictures:
    """Training and test sets.

    Attributes:
        inputs [pictures, pixels]: FP32, scaled to mean 0 and variance 1 over the training set.
        labels [pictures]: classes from 0, int64.
    """

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def digits() -> Pictures:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries; every fifth is for the test.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError(
            "scikit-learn is not installed, which has the digits; pip install 'inrank-megatron[figures]'"
        ) from error
    data, target = load_digits(return_X_y=True)
    return split(torch.tensor(data, dtype=torch.float32), torch.tensor(target))


def fashion_mnist(name: str = "zalando-datasets/fashion_mnist") -> Pictures:
    """Fashion-MNIST, 28 x 28 pixels, from the hub, its cache, or a folder in the same format.

    Raises:
        UserError: it is in none of them.
    """
    from datasets import load_dataset

    try:
        found = load_dataset(name).with_format("torch")
    except OSError as error:
        raise UserError(
            f"dataset {name} cannot be read: {str(error).splitlines()[0]}; connect to the hub once, or copy "
            f"its cache (HF_HOME) to this machine, or its files to the folder {name} of this directory"
        ) from error
    train, test = found["train"], found["test"]
    inputs, test_inputs = (part["image"][:].flatten(1).float() for part in (train, test))
    mean, spread = inputs.mean(), inputs.std()
    return Pictures(
        (inputs - mean) / spread, train["label"][:], (test_inputs - mean) / spread, test["label"][:]
    )


def split(inputs: Tensor, labels: Tensor) -> Pictures:
    """Every fifth picture for the test, all pixels on the scale of the training set."""
    test = torch.arange(len(inputs)) % 5 == 0
    mean, spread = inputs[~test].mean(), inputs[~test].std()
    scaled = (inputs - mean) / spread
    return Pictures(scaled[~test], labels[~test], scaled[test], labels[test])


def perceptron(pixels: int, hidden: int, classes: int, *, initialisation: str, seed: int) -> nn.Sequential:
    """Linear [hidden, pixels], ReLU, linear [classes, hidden], FP32; biases start at zero.

    ``initialisation``: of the weights, a name of ``INITIALISATIONS``.
    """
    model = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
            INITIALISATIONS[initialisation](layer.weight, generator)
    return model


@torch.no_grad()
def zero_(weight: Tensor, generator: torch.Generator) -> None:
    """ZerO (Zhao et al., arXiv 2110.12661): a part of the identity; a part of a Hadamard matrix if wider.

    For more outputs than inputs, ``2^-(m-1)/2 H_m`` with ``2^m`` the smallest power that covers the outputs.
    """
    outputs, inputs = weight.shape
    if outputs <= inputs:
        nn.init.eye_(weight)
        return
    power = math.ceil(math.log2(outputs))
    hadamard = torch.ones(1, 1)
    for _ in range(power):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    weight.copy_(2 ** (-(power - 1) / 2) * hadamard[:outputs, :inputs])


INITIALISATIONS: dict[str, Callable[[Tensor, torch.Generator], object]] = {
    "orthogonal": lambda weight, generator: nn.init.orthogonal_(weight, generator=generator),
    "ZerO": zero_,
    "Kaiming": lambda weight, generator: nn.init.kaiming_normal_(
        weight, nonlinearity="relu", generator=generator
    ),
}
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "SGD": (torch.optim.SGD, 0.1),
    "Adam": (torch.optim.Adam, 1e-3),
    "Adadelta": (torch.optim.Adadelta, 1.0),
}
"""Each with its learning rate."""


@dataclass(frozen=True)
class Trained:
    """The recorded spectra of ``W_t - W_0``; cross-entropy on both sets; test accuracy from 0 to 1."""

    rows: list[Row]
    loss: float
    test_loss: float
    accuracy: float


def train(
    model: nn.Module,
    pictures: Pictures,
    *,
    optimizer: str,
    steps: int,
    every: int,
    seed: int,
    batch_size: int = 64,
    rate: float | None = None,
    match: str = "",
) -> Trained:
    """Train by cross-entropy on batches that are drawn with replacement.

    Args:
        optimizer: a name of ``OPTIMIZERS``. rate: its learning rate; None: the one there.
        every: steps from one record to the next.
        match: as of :class:`SpectrumRecorder`.
    """
    recorder = SpectrumRecorder(model, every=every, match=match).attach()
    make, usual = OPTIMIZERS[optimizer]
    stepper = make(model.parameters(), lr=rate or usual)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(pictures.inputs), (batch_size,), generator=generator)
        stepper.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures.inputs[batch]), pictures.labels[batch])
        loss.backward()
        stepper.step()
    recorder.detach()
    with torch.no_grad():
        scores = model(pictures.test_inputs)
        right = scores.argmax(1) == pictures.test_labels
        return Trained(
            recorder.rows,
            loss=nn.functional.cross_entropy(model(pictures.inputs), pictures.labels).item(),
            test_loss=nn.functional.cross_entropy(scores, pictures.test_labels).item(),
            accuracy=right.float().mean().item(),
        )
