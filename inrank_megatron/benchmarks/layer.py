"""Time of an MLP and of a transformer layer, forward and backward, against dense in the same rounds.

``limit`` of a time is the dense time times the ratio of operations; the gap is the difference. The
reference is the same arithmetic in plain torch, ``linear(linear(x, V), U)`` next to ``linear(x, W0)``,
without the layers of this project.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrank_megatron.benchmarks.blocks import (
    DENSE,
    Variant,
    build_layer,
    mlp_output,
    phase_1,
    phase_2,
    preset_config,
    single_process,
)
from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.timing import Times, interleaved
from inrank_megatron.config.costs import precision
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.distributed.platform import device
from inrank_megatron.lowrank.criteria.buffer import default_buffer

SEQUENCES = {"cpu": 1, "cuda": 8}
"""Sequences of 1024 tokens (tiny: 256) that pass at once: enough to fill the device."""


def measure(preset: str, rank: int, *, repeats: int) -> Iterator[Row]:
    """Rows of the MLP and of the transformer layer for every variant."""
    variants = layer_variants(preset, rank)
    with single_process() as parallel:
        config = preset_config(preset)
        layers = {variant: build_layer(config, variant, parallel) for variant in variants}
        blocks = {"MLP": _mlp_output, "transformer layer": layer_output}
        for block, output in blocks.items():
            runs = {v.name: forward_backward(output, layer, config) for v, layer in layers.items()}
            flops = {name: count_flops(run) for name, run in runs.items()}
            if block == "MLP":
                runs |= {
                    f"plain {v.name}": forward_backward(_plain_mlp_output, layer, config)
                    for v, layer in layers.items()
                }
            times = interleaved(runs, repeats=repeats)
            for variant in variants:
                yield from _rows(block, preset, variant, flops, times)


def layer_variants(preset: str, rank: int) -> tuple[Variant, ...]:
    """Dense, phase 2 at ``rank``, phase 1 with the columns that it starts with and with ``rank`` columns."""
    model = preset_config(preset).model
    start = 2 + default_buffer(min(model.hidden_size, model.ffn_hidden_size))
    return (DENSE, phase_2(rank), *(phase_1(k) for k in sorted({min(start, rank), rank})))


def forward_backward(
    output: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, config: Config
) -> Callable[[], None]:
    """A function that takes one batch through ``layer`` and back, from the same numbers each time."""
    tokens = config.model.seq_length
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, SEQUENCES[device().type], config.model.hidden_size)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision(config)]
    x, gradient = (torch.randn(shape, generator=generator).to(device(), dtype) for _ in range(2))
    x.requires_grad_()

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        output(layer, x).backward(gradient)

    return run


def _mlp_output(layer: Any, x: Tensor) -> Tensor:
    return mlp_output(layer.mlp, x)


def layer_output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, attention_mask=None)[0]


def _plain_mlp_output(layer: Any, x: Tensor) -> Tensor:
    return _plain_linear(layer.mlp.linear_fc2, F.gelu(_plain_linear(layer.mlp.linear_fc1, x)))


def _plain_linear(linear: Any, x: Tensor) -> Tensor:
    if not hasattr(linear, "U"):
        return F.linear(x, linear.weight, linear.bias)
    low_rank = F.linear(F.linear(x, linear.V), linear.U, linear.bias)
    return low_rank if linear.weight is None else low_rank + F.linear(x, linear.weight)


def _rows(block: str, preset: str, variant: Variant, flops: Mapping[str, int], times: Times) -> Iterator[Row]:
    case, name = f"{block} {preset} {variant.name}", variant.name
    share = flops[name] / flops[DENSE.name]
    seconds, dense = times.median(name), times.median(DENSE.name)
    reference = times.ratio(name, f"plain {name}") if f"plain {name}" in times.seconds else None
    formula = _mlp_flops(preset, variant) if block == "MLP" else None
    yield Row(case, "FLOP, forward + backward", flops[name], formula, share)
    yield Row(
        case,
        "seconds, forward + backward",
        seconds,
        dense * share,
        times.ratio(name, DENSE.name),
        reference,
    )


def _mlp_flops(preset: str, variant: Variant) -> int:
    """6 T O I for a dense linear; 6 T k (O + I) for factors, and 4 T O I for a frozen W0 next to them."""
    config = preset_config(preset)
    tokens = config.model.seq_length * SEQUENCES[device().type]
    total = 0
    for name, (o, i) in linear_shapes(config).items():
        if not name.startswith("decoder.layers.0.mlp."):
            continue
        k = variant.columns
        total += 6 * o * i if k is None else 6 * k * (o + i) + (4 * o * i if variant.frozen_base else 0)
    return tokens * total
