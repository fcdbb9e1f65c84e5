"""What one MLP (h -> f -> h) sends between tensor-parallel ranks, and what each of them computes.

Letters: T tokens, h and f widths, r columns of the factors, n ranks, k = (n - 1) / n. The layers run as they
are, forward and backward, on one process that is rank 0 of n, with tensors that have a shape and no data.

Reading the rows. ``over dense`` compares with the dense layer's least activation traffic, ``4 k T h``: an
all-gather and a reduce-scatter of activations each way. Megatron's column layer gathers its input a second
time in the backward pass instead of keeping it; that is a row of its own. ``over reference`` compares with
``8 k T r``, the scheme of BOOST (arXiv 2512.12131), the best that is published. What recomputation in the
backward pass adds is a row of its own. The first phase has two modes, of which a layer takes one by the rule
in ``lowrank/layers/factorised.py``; both are counted. The gradients of the row layer's bias and of the norms,
h elements each and the same in every variant, are summed by the engine once per step and are not in these
figures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from inrank_megatron.benchmarks.blocks import (
    DENSE,
    Variant,
    build_layer,
    mlp_output,
    phase_1,
    phase_2,
    preset_config,
    rank_0_of,
)
from inrank_megatron.benchmarks.collectives import Traffic, traffic
from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.errors import UserError

TOKENS = (1024, 8192)


@dataclass(frozen=True)
class Figures:
    """Of one rank: what it sends once, what it sends where the backward pass recomputes, its operations."""

    traffic: Traffic
    recomputing: Traffic
    flops: int


def measure(preset: str, rank: int, sizes: tuple[int, ...]) -> Iterator[Row]:
    """Rows for every tensor-parallel size, number of tokens and variant."""
    width = preset_config(preset).model.hidden_size
    for n in sizes:
        if width % n:
            raise UserError(f"--tensor-model-parallel-size {n}: must divide the width {width} of {preset}")
    variants = (
        phase_2(rank),
        phase_1(rank, fused_collectives=True),
        phase_1(rank, fused_collectives=False),
        DENSE,
    )
    serial = {(v, tokens): _count(preset, v, 1, tokens).flops for v in variants for tokens in TOKENS}
    for n in sizes:
        for tokens in TOKENS:
            for variant in variants:
                case = f"{variant.name.split()[0]} {preset} n={n} T={tokens}"
                figures = _count(preset, variant, n, tokens)
                yield from _traffic_rows(case, preset, variant, n, tokens, figures)
                limit, dense = serial[variant, tokens] / n, serial[DENSE, tokens] / n
                yield Row(case, "FLOP per rank", figures.flops, limit, figures.flops / dense)


def mlp_pass(
    preset: str, variant: Variant, parallel: Parallel, *, recompute: bool = False
) -> Callable[[int], None]:
    """A function that takes ``tokens`` tokens through the MLP on this rank, forward and backward."""
    n = parallel.tp_size
    # Of the layer only the MLP is used: as many heads as ranks let every n divide them.
    config = preset_config(preset, tensor_model_parallel_size=n, num_attention_heads=n)
    mlp: Any = build_layer(config, variant, parallel).mlp
    like = next(mlp.parameters())

    def run(tokens: int) -> None:
        shape = (tokens // n, 1, mlp.config.hidden_size)
        x = torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=True)
        y = _forward(mlp, x, recompute)
        y.backward(torch.ones_like(y))

    return run


def more_tokens(tokens: int) -> int:
    """Tokens of the second run that separates activations from parameters."""
    return tokens + tokens // 8


def _forward(mlp: nn.Module, x: torch.Tensor, recompute: bool) -> torch.Tensor:
    if recompute:
        # As Megatron does it: the full forward pass again, not only what the backward pass needs.
        with set_checkpoint_early_stop(False):
            return checkpoint(mlp_output, mlp, x, use_reentrant=False, preserve_rng_state=False)
    return mlp_output(mlp, x)


def _count(preset: str, variant: Variant, n: int, tokens: int) -> Figures:
    with rank_0_of(n) as parallel, FakeTensorMode():
        once, again = (mlp_pass(preset, variant, parallel, recompute=flag) for flag in (False, True))
        return Figures(
            traffic(once, tokens, more_tokens=more_tokens(tokens)),
            traffic(again, tokens, more_tokens=more_tokens(tokens)),
            count_flops(lambda: once(tokens)),
        )


def _traffic_rows(
    case: str, preset: str, variant: Variant, n: int, tokens: int, figures: Figures
) -> list[Row]:
    width, share = preset_config(preset).model.hidden_size, (n - 1) / n
    dense, columns = 4 * share * tokens * width, variant.columns or 0
    rank_sized = columns and not variant.frozen_base
    activations = 4 * share * tokens * columns if rank_sized else dense
    if variant.fused_collectives is False:
        activations += 4 * share * tokens * columns
    parameters = 4 * share * columns * width
    boost = 8 * share * tokens * columns if rank_sized else None

    def row(quantity: str, measured: float, limit: float | None = None, *, over: float = dense) -> Row:
        return Row(case, quantity, measured, limit, measured / over, measured / boost if boost else None)

    sent, megatron = figures.traffic, dense + share * tokens * width
    rows = [
        row("activation elements", sent.activation, activations),
        row("parameter elements", sent.parameter, parameters),
        row("total elements", sent.total, activations + parameters),
        row("total elements, over all that Megatron's dense layer sends", sent.total, over=megatron),
        row("elements that recomputation adds", figures.recomputing.total - sent.total),
    ]
    if not columns:
        extra = sent.activation - dense
        rows.append(row("of the activations: the input's second gather", extra, share * tokens * width))
    return rows
