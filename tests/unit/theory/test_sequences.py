"""Networks that read sequences."""

import pytest
import torch

from inrank_megatron.theory.sequences import ATTENTION, network, squares


@pytest.mark.parametrize(("kind", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_a_network_reads_rows_of_pixels_one_after_the_other(kind, gates):
    """The scores depend on the order of the rows, and each layer has as many squares as gates."""
    model = network(kind, layers=2, width=16, seed=0)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert model(inputs).shape == (3, 10)
    assert not torch.allclose(model(inputs), model(_backward(inputs)))
    assert [part.shape for part in squares(model.cells.weight_hh_l1)] == [(16, 16)] * gates


def test_a_transformer_knows_the_rows_by_their_places():
    model = network(ATTENTION, layers=1, width=16, seed=0)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model(inputs), model(_backward(inputs)), atol=1e-4)
    torch.nn.init.zeros_(model.places)
    assert torch.allclose(model(inputs), model(_backward(inputs)), atol=1e-5)
    assert len(squares(model.layers[0].self_attn.in_proj_weight)) == 3


def _backward(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.unflatten(1, (8, 8)).flip(1).flatten(1)
