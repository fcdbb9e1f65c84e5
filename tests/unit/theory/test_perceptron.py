"""The perceptron's initialisations and data, and its training on pictures that are drawn here."""

import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from inrank_megatron.errors import UserError
from inrank_megatron.theory import perceptron as tested
from inrank_megatron.theory.perceptron import OPTIMIZERS, Pictures, perceptron, split, train


def drawn(pixels: int = 16, classes: int = 4) -> Pictures:
    """A picture is its class's pattern with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (400,), generator=generator)
    patterns = torch.randn(classes, pixels, generator=generator)
    return split(patterns[labels] + 0.3 * torch.randn(400, pixels, generator=generator), labels)


def weight(shape: tuple[int, int], name: str) -> torch.Tensor:
    return perceptron(shape[1], shape[0], 3, initialisation=name, seed=0)[0].weight.detach()


def test_initialisations_are_what_their_papers_say():
    wide = weight((24, 8), "orthogonal")
    assert wide.T @ wide == pytest.approx(np.eye(8), abs=1e-5)
    assert weight((6, 8), "ZerO") == pytest.approx(np.eye(6, 8))
    hadamard = weight((8, 8 - 3), "ZerO")
    assert hadamard.T @ hadamard == pytest.approx(8 / 4 * np.eye(5), abs=1e-5)
    assert set(hadamard.abs().flatten().tolist()) == {0.5}
    assert weight((400, 50), "Kaiming").std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.03)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns_the_pictures_and_records_both_layers(optimizer):
    model = perceptron(16, 32, 4, initialisation="Kaiming", seed=0)
    first = model[0].weight.detach().clone()
    trained = train(model, drawn(), optimizer=optimizer, steps=200, every=100, seed=0)
    rows = trained.rows
    pictures = drawn()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(inputs), labels).item()
            for inputs, labels in (
                (pictures.inputs, pictures.labels),
                (pictures.test_inputs, pictures.test_labels),
            )
        ]
    assert trained.accuracy > 0.9 and [trained.loss, trained.test_loss] == pytest.approx(losses)
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, layer) for step in (100, 200) for layer in ("0.weight", "2.weight")
    ]
    update = (model[0].weight.detach() - first).double()
    assert rows[2]["values"] == pytest.approx(np.linalg.svd(update)[1], rel=1e-5, abs=1e-6)


def test_the_split_has_a_fifth_for_the_test_and_the_scale_of_the_training_set():
    pictures = drawn()
    assert (len(pictures.labels), len(pictures.test_labels)) == (320, 80)
    assert pictures.inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert pictures.inputs.std().item() == pytest.approx(1)


def test_the_digits_are_those_of_scikit_learn():
    pytest.importorskip("sklearn")
    pictures = tested.digits()
    assert pictures.inputs.shape == (1437, 64) and pictures.test_inputs.shape == (360, 64)
    assert set(pictures.labels.tolist()) == set(range(10))


def test_without_scikit_learn_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        UserError, match=r"scikit-learn is not installed.*pip install 'inrank-megatron\[figures\]'"
    ):
        tested.digits()


def test_a_dataset_that_is_not_there_is_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^dataset .*none cannot be read: .*; connect to the hub once.*$"):
        tested.fashion_mnist(str(tmp_path / "none"))


def test_fashion_mnist_is_read_as_datasets_gives_it(tmp_path):
    """From a folder in the hub's format, in the place of the hub."""
    features = Features({"image": Image(), "label": ClassLabel(10)})
    pictures = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for part in ("train", "test"):
        rows = {"image": list(pictures), "label": [3, 7]}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{part}-00000.parquet")
    found = tested.fashion_mnist(str(tmp_path))
    assert found.inputs.shape == found.test_inputs.shape == (2, 784)
    assert found.labels.tolist() == [3, 7] and found.labels.dtype == torch.int64
    assert found.inputs.std().item() == pytest.approx(1) and found.inputs[0, 1] > found.inputs[0, 0]
