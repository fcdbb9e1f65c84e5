"""The networks of InRank's figures 8 to 14, which read the digits as sequences: a row of pixels is a step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

PIXELS, CLASSES = 8, 10
CELLS: dict[str, Callable[..., nn.RNNBase]] = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
ATTENTION = "Transformer"


class Recurrent(nn.Module):
    """Layers of ``cell`` with ``width`` hidden units, and a linear on the last step's output.

    ``cells.weight_hh_l{l}`` of the layer l is [gates x width, width]: 1 for RNN (tanh), 3 for GRU, 4 for
    LSTM.
    """

    def __init__(self, cell: str, *, layers: int, width: int):
        super().__init__()
        self.cells = CELLS[cell](PIXELS, width, layers, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` [batch, steps x pixels] to scores [batch, classes]."""
        return self.head(self.cells(inputs.unflatten(1, (-1, PIXELS)))[0][:, -1])


class Encoder(nn.Module):
    """A Transformer encoder with 4 heads and ReLU, and a linear on the mean over the steps.

    Of the layer l, ``layers.{l}.self_attn.in_proj_weight`` is [3 width, width], ``layers.{l}.linear1.weight``
    [4 width, width].
    """

    def __init__(self, *, layers: int, width: int):
        super().__init__()
        self.embedding = nn.Linear(PIXELS, width)
        self.places = nn.Parameter(0.1 * torch.randn(PIXELS, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """As of :class:`Recurrent`."""
        steps = self.embedding(inputs.unflatten(1, (-1, PIXELS))) + self.places
        return self.head(self.layers(steps).mean(1))


def network(kind: str, *, layers: int, width: int, seed: int) -> nn.Module:
    """One of the ``CELLS``, or ``ATTENTION``, with PyTorch's own initialisation."""
    torch.manual_seed(seed)
    if kind == ATTENTION:
        return Encoder(layers=layers, width=width)
    return Recurrent(kind, layers=layers, width=width)


def squares(matrix: Tensor) -> tuple[Tensor, ...]:
    """A matrix [k width, width] as k of [width, width]: gates, or query, key and value, or units."""
    return matrix.split(matrix.shape[1])
