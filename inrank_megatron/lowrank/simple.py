"""InRank and InRank-Efficient on one page: algorithms 2 and 3 of the paper in plain PyTorch, on one device.

``python -m inrank_megatron.lowrank.simple`` trains a toy problem in seconds. The tests train this page and
the real engine on the same data: their ranks, losses and weights agree. Comments such as `2.7` name the
algorithm and its line in the paper; where the code departs from that line, the comment says why.

Letters: O output features, I input features, r rank, b buffer, k = r + b columns in use, K columns allocated.
W [O, I] = W0 [O, I] + U [O, K] V [K, I]; G [O, I] the loss gradient at W0; s singular values.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Batch = tuple[Tensor, Tensor]
Draw = Callable[["InRankLinear", int, int], tuple[Tensor, Tensor]]


class InRankLinear(nn.Module):
    """A linear of weight W0 + U V. Columns past k are zero, and so are their gradients: they stay zero."""

    def __init__(self, dense: nn.Linear, *, rank: int = 2, buffer: int, capacity: int):
        super().__init__()
        o, i = dense.weight.shape
        self.W0 = nn.Parameter(dense.weight.detach().clone(), requires_grad=False)  # 2.1
        self.U, self.V = nn.Parameter(torch.zeros(o, capacity)), nn.Parameter(torch.zeros(capacity, i))  # 2.1
        self.bias, self.rank, self.buffer = dense.bias, rank, buffer

    def forward(self, x: Tensor) -> Tensor:
        y = linear(linear(x, self.V), self.U, self.bias)
        return y if self.W0 is None else y + linear(x, self.W0)


def initialise(layers: list[InRankLinear], loss: Callable[[], Tensor], epsilon: float) -> None:
    """Lines 2 and 3: the first columns are leading singular vectors of the gradient, of norm ``epsilon``."""
    for layer in layers:
        layer.W0.requires_grad_(True)
    gradients = torch.autograd.grad(loss(), [layer.W0 for layer in layers])
    for layer, G in zip(layers, gradients, strict=True):
        layer.W0.requires_grad_(False)
        u, _, vh = torch.linalg.svd(G.double(), full_matrices=False)  # 2.2
        k = layer.rank + layer.buffer
        # 2.3 prints U = -eps v and V = eps u, which fits G^T: with G = sum s u v^T this is the way downhill.
        layer.U.data[:, :k], layer.V.data[:k] = -epsilon * u[:, :k], epsilon * vh[:k]


def explained_ratio(s: Tensor, r: int, b: int) -> float:
    """Equation 7, ``1 - var(s[r+1..r+b]) / var(s[1..r+b])``. Past the columns in use s is zero."""
    window = torch.nn.functional.pad(s, (0, b))[: r + b]
    total = window.var(correction=0)
    return 1.0 if total == 0 else float(1 - window[r:].var(correction=0) / total)


def random_columns(layer: InRankLinear, start: int, stop: int, *, norm: float = 0.1) -> tuple[Tensor, Tensor]:
    """Columns ``start`` to ``stop`` of U and rows of V: random directions of norm ``norm``."""
    left, right = torch.randn(layer.U.shape[0], stop - start), torch.randn(stop - start, layer.V.shape[1])
    return norm * left / left.norm(dim=0), norm * right / right.norm(dim=1, keepdim=True)


@torch.no_grad()
def check_rank(layer: InRankLinear, alpha: float, draw: Draw = random_columns) -> None:
    """Lines 6 to 8: raise r until it explains ``alpha`` of the spectrum of U V, and fill the new columns."""
    k, capacity = layer.rank + layer.buffer, layer.U.shape[1]
    s = torch.linalg.svdvals(layer.U.double() @ layer.V.double())[:k]  # 2.6
    while explained_ratio(s, layer.rank, layer.buffer) < alpha and layer.rank + layer.buffer < capacity:
        layer.rank += 1  # 2.7
    grown = layer.rank + layer.buffer
    if grown > k:
        layer.U[:, k:grown], layer.V[k:grown] = draw(layer, k, grown)  # 2.8


@torch.no_grad()
def switch(layer: InRankLinear) -> None:
    """Algorithm 3: W0 + U V becomes U* V* of rank r. The buffer goes, and W0 with it."""
    W = layer.W0.double() + layer.U.double() @ layer.V.double()  # 3.4
    u, s, vh = torch.linalg.svd(W, full_matrices=False)  # 3.5
    r, root = layer.rank, s.sqrt()
    # 3.6 prints U = v and V = u, without the singular values: the loss would jump much further.
    layer.U = nn.Parameter((u * root)[:, :r].float())
    layer.V = nn.Parameter((root[:, None] * vh)[:r].float())
    layer.W0, layer.buffer = None, 0


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    epsilon: float = 0.5,
    alpha: float = 0.9,
    interval: int = 1,
    switch_step: int | None = None,
    draw: Draw = random_columns,
) -> Iterator[tuple[int, float, list[InRankLinear]]]:
    """Trains one step per batch, and yields its number, its loss and the factorised layers of ``model``.

    ``interval``: steps between checks. ``switch_step``: T of algorithm 3; None: algorithm 2 to the end.
    """
    layers = [module for module in model.modules() if isinstance(module, InRankLinear)]
    initialise(layers, lambda: loss(model, batches[0]), epsilon)
    factors = make_optimizer([p for layer in layers for p in (layer.U, layer.V)])
    rest = [p for name, p in model.named_parameters() if name.rpartition(".")[2] not in ("W0", "U", "V")]
    optimizers = [make_optimizer(rest)] if rest else []
    for t, batch in enumerate(batches, start=1):  # 2.4
        value = loss(model, batch)
        model.zero_grad()
        value.backward()
        for optimizer in (factors, *optimizers):
            optimizer.step()  # 2.5
        if t % interval == 0 and (switch_step is None or t <= switch_step):
            for layer in layers:
                check_rank(layer, alpha, draw)
        if t == switch_step:
            for layer in layers:
                switch(layer)
            factors = make_optimizer([p for layer in layers for p in (layer.U, layer.V)])  # 3.7
        yield t, value.item(), layers


# ---- a toy problem: a two-layer network learns the function of one whose matrices have rank 4 ----


def toy(*, width: int = 32, steps: int = 600, rank: int = 4) -> tuple[nn.Module, list[Batch]]:
    """A network to train, and one batch of inputs and targets per step."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    teacher = deepcopy(student)
    with torch.no_grad():
        for weight in (teacher[0].weight, teacher[2].weight):
            left, right = (torch.linalg.qr(torch.randn(size, rank)).Q for size in weight.shape)
            weight.copy_(4 * left @ right.T)
        for weight in (student[0].weight, student[2].weight):
            weight.normal_(0.0, 0.02)
        inputs = torch.randn(steps, 64, width)
        return student, [(x, teacher(x)) for x in inputs]


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def main(switch_step: int = 300, interval: int = 50) -> None:
    torch.set_num_threads(1)  # the matrices are too small to be shared
    dense, batches = toy()
    inrank = deepcopy(dense)
    for index in (0, 2):
        inrank[index] = InRankLinear(inrank[index], buffer=8, capacity=24)
    adam = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0)
    optimizer = adam(dense.parameters())
    for batch in batches:
        loss = squared_error(dense, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    run = train(inrank, batches, squared_error, adam, interval=interval, switch_step=switch_step)
    for step, value, layers in run:
        if step % interval == 0:
            print(f"step {step:3}  loss {value:.5f}  ranks {[layer.rank for layer in layers]}")
        if step == switch_step:
            after = squared_error(inrank, batches[step - 1]).item()
            print(f"switch: W0 + U V -> U* V*, loss {after:.5f}")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (inrank, dense)]
    print(f"InRank-Efficient: loss {value:.5f}, {sizes[0]} parameters; dense: {loss.item():.5f}, {sizes[1]}")


if __name__ == "__main__":
    main()
